// The table of the marked pixel's numbers, and the charts of all iterations.
import { clamp, make, number } from "./tools.js";

// What the columns' headings start with, and what they mean.
const ABOUT = [
  ["class", "Click a row to show its class in the pictures. ◂ is the most probable class here."],
  ["unary", "Unary energy of the class at the marked pixel, in nats. Larger: less probable."],
  ["ψ +", "Unary plus pairwise energy, in nats. q is the softmax of its negative."],
  ["ψ", "Unary energy, in nats. Larger: less probable."],
  ["pairwise", "Pairwise energy: compatibility times the weighted messages, in nats. Larger: less probable."],
  ["exact", "Exact marginal, by enumeration of all labellings."],
  ["q", "Mean-field marginal of the class."],
  ["Δq", "q of B minus q of A."],
  ["pixels", "Pixels of the image with this label at this iteration."],
];

export function numbersTable(app, panes) {
  const { state, names, colours } = app, pair = panes.length > 1, [pane] = panes;
  const heads = pair
    ? ["class", ...["A", "B"].flatMap((l) => [`ψ ${l}`, `pairwise ${l}`, `q ${l}`]), "Δq", "pixels A, B"]
    : ["class", "unary ψ", ...pane.meta.kernels.map((k) => `${k} msg`), "pairwise", "ψ + pw.", ...(pane.meta.coupling ? ["exact P"] : []), "q", "pixels"];
  const about = (head) => ABOUT.find(([start]) => head.startsWith(start))?.[1] ?? "The sum of this kernel's weights times q of the iteration before, over all pixels.";
  const kind = (head) => (head === "q" ? "q" : head === "pixels A, B" ? "counts" : false);
  const caption = make("caption"), body = make("tbody");
  const node = make("table", {}, caption, make("thead", {}, make("tr", {}, ...heads.map((h) => make("th", { scope: "col", title: about(h), class: kind(h) }, h)))), body);
  const rows = names.map((name, k) => {
    const cells = heads.slice(1).map((head) => make("td", { class: kind(head) }));
    const row = make("tr", { title: name, onclick: () => app.choose(k) },
      make("th", { scope: "row" }, make("span", { class: "swatch", style: `background: ${colours[k]}` }), make("span", { class: "name" }, name)), ...cells);
    body.append(row);
    return { row, cells };
  });
  const at = (pane, name, k, m) => (pane.t === 0 && name !== "unary" && name !== "q" ? null : pane.trace.plane(name, pane.t, k, m)[state.i]);
  function draw() {
    const [y, x] = state.pixel, counts = panes.map((pane) => pane.trace.counts(pane.t)), winner = panes.at(-1).trace.labels(panes.at(-1).t)[state.i];
    caption.replaceChildren(make("b", {}, `pixel (${y}, ${x})`), ` row, column · iteration ${state.t}${app.pinned ? " · arrow keys move it; click or Esc: follow the pointer" : ""}`);
    rows.forEach(({ row, cells }, k) => {
      const q = panes.map((pane) => at(pane, "q", k));
      let values;
      if (pair) values = [...panes.flatMap((pane, n) => [at(pane, "unary", k), at(pane, "pairwise", k), q[n]]), q[1] - q[0]];
      else {
        const unary = at(pane, "unary", k), pairwise = at(pane, "pairwise", k), { exact } = pane.trace;
        values = [unary, ...pane.meta.kernels.map((_, m) => at(pane, "messages", k, m)), pairwise, unary + (pairwise ?? 0), ...(pane.meta.coupling ? [exact?.[k * pane.N + state.i]] : []), q[0]];
      }
      values.forEach((v, n) => { cells[n].textContent = number(v); });
      cells.at(-1).textContent = counts.map((c) => c[k]).join(", ");
      if (!pair) cells.at(-2).style.setProperty("--q", q[0]);
      row.classList.toggle("chosen", k === state.c);
      row.classList.toggle("winner", k === winner);
    });
  }
  return { node, draw };
}

// What happened: free energies, labels that changed, and whether they oscillate.
export function story(pane) {
  const { trace } = pane, { N, free, ready } = trace, known = (t) => Number.isFinite(free[t]);
  const finite = free.filter(Number.isFinite), slack = 1e-6 * Math.max(1, ...finite.map(Math.abs)) + 1e-3; // rounding is no rise
  const changes = Array.from({ length: Math.max(ready, 0) }, (_, t) => trace.changed(t + 1));
  const rose = (t) => t > 0 && known(t) && known(t - 1) && free[t] > free[t - 1] + slack;
  const swings = (t) => t > 1 && changes[t - 1]?.changed > 0.02 * N && changes[t - 1].returned > 0.7 * changes[t - 1].changed;
  function tell(t, brief) { // [sentence, is it a warning] each
    const { changed = 0, returned = 0 } = changes[t - 1] ?? {}, out = [];
    if (known(t)) {
      const by = t && known(t - 1) && !brief ? `, ${free[t] > free[t - 1] ? "up" : "down"} ${number(Math.abs(free[t] - free[t - 1]))}` : "";
      out.push([`${brief ? "F" : "Free energy"} ${number(free[t])} nats${by}.`, rose(t)]);
    }
    if (t === 0) out.unshift(["The unary alone: no message has been sent.", false]);
    else out.push([brief ? `${changed} labels changed.` : `${changed} of ${N} pixels changed label.`, false]);
    if (t === 1 && swings(2)) out.push(["Most of them change back at iteration 2: the labels oscillate.", true]);
    if (swings(t)) out.push([brief ? "They oscillate." : `${returned} of them changed back: the labels oscillate.`, true]);
    return out;
  }
  return { free, finite, known, changes, rose, tell };
}

// Two charts over the iterations: free energy (with -log Z where it is known) and labels that changed.
export function charts(pane, letter, width, t, last, go) {
  const { free, finite, known, changes, rose } = story(pane), { logZ } = pane.trace, left = 56, right = 12;
  const across = (t) => left + (last ? (t / last) * (width - left - right) : 0), of = letter && `, ${letter}`;
  const pick = (event) => go(Math.round(((event.offsetX - left) / (width - left - right)) * last));
  const chart = (h, label, ...nodes) => make("svg", { width, height: h, viewBox: `0 0 ${width} ${h}`, role: "img", "aria-label": label, onclick: pick },
    make("line", { x1: across(t), x2: across(t), y1: 4, y2: h - 16, class: "now" }), ...nodes);
  const text = (x, y, s, anchor = "end", kind = "") => make("text", { x, y, "text-anchor": anchor, class: kind }, s);
  const out = [], title = (name, unit) => make("div", { class: "chart-title" }, make("b", {}, name), ` ${unit}${of}`);
  if (finite.length) {
    const h = letter ? 68 : 96, floor = logZ === undefined ? [] : [-logZ], low = Math.min(...finite, ...floor), high = Math.max(...finite);
    const up = (f) => 12 + (high > low ? (high - f) / (high - low) : 0.5) * (h - 40), steps = free.map((_, t) => t);
    const segments = steps.slice(1).map((t) => (known(t) && known(t - 1) ? make("line", { x1: across(t - 1), y1: up(free[t - 1]), x2: across(t), y2: up(free[t]), class: rose(t) ? "segment rise" : "segment" }) : ""));
    const dots = steps.map((s) => (known(s) ? make("circle", { cx: across(s), cy: up(free[s]), r: s === t ? 4.5 : 2, class: s === t ? "dot current" : "dot" }) : ""));
    const bound = floor.length ? [make("line", { x1: left, x2: width - right, y1: up(-logZ), y2: up(-logZ), class: "bound" }), text(width - right, up(-logZ) - 3, `−log Z ${number(-logZ)}`)] : [];
    out.push(title("free energy", "nats; not comparable between settings"), chart(h,
      `Free energy by iteration${of}, from ${number(free[0])} to ${number(free.at(-1))} nats; ${number(free[t])} at iteration ${t}. It ${steps.some(rose) ? "rises in places" : "never rises"}.${floor.length ? ` Minus log Z is ${number(-logZ)}.` : ""}`,
      text(left - 6, 16, number(high)), text(left - 6, h - 24, high > low ? number(low) : ""), ...bound, ...segments, ...dots,
      text(across(0), h - 3, "0", "middle"), last ? text(across(last), h - 3, String(last), "middle") : "", t > 0 && t < last ? text(across(t), h - 3, String(t), "middle", "current") : ""));
  }
  if (last && changes.length && !letter) {
    const h = 62, most = Math.max(1, ...changes.map((c) => c.changed)), wide = clamp(((width - left - right) / last) * 0.6, 2, 14);
    const bars = changes.map(({ changed }, n) => { const tall = (changed / most) * (h - 26); return make("rect", { x: across(n + 1) - wide / 2, y: h - 16 - tall, width: wide, height: Math.max(tall, 0.5), class: n + 1 === t ? "column current" : "column" }); });
    out.push(title("labels changed", "pixels"), chart(h, `Pixels that changed label, by iteration: ${changes.map((c) => c.changed).join(", ")}.`, text(left - 6, 16, String(most)), text(left - 6, h - 16, "0"), ...bars));
  }
  return out;
}
