// The mean-field explorer: what the reader sees and does. anywidget calls render; a page without a kernel does the same
// with stillModel in place of the widget's model. CSS is explorer.css, which bundle.py adds.
import { charts, numbersTable, story } from "./numbers.js";
import { Painting, fromRuns, paintingPanel, toRuns } from "./painting.js";
import { Pane } from "./pane.js";
import { arrange, differencePanel, imagePanel, panelsOf } from "./panels.js";
import { settingsPanel } from "./settings.js";
import { followTheme } from "./theme.js";
import { clamp, icon, make, number, rgb } from "./tools.js";

export function stillModel(values) {
  const handlers = {};
  values.data = Uint8Array.from(atob(values.data), (c) => c.charCodeAt(0));
  return {
    get: (name) => values[name],
    set(name, value) { values[name] = value; for (const f of handlers[`change:${name}`] ?? []) f(); },
    on(event, f) { (handlers[event] ??= []).push(f); },
    off(event, f) { handlers[event] = (handlers[event] ?? []).filter((g) => g !== f); },
    save_changes() {},
  };
}

async function render({ model, el }) {
  const shadow = el.shadowRoot ?? el.attachShadow({ mode: "open" });
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab: leave our keys to us
  for (const node of el.querySelectorAll(":scope > .still")) node.remove();
  const { panes: metas, truth } = model.get("meta"), [meta] = metas;
  const [height, width] = meta.size, names = meta.classes, N = height * width, K = names.length;
  const app = { model, shadow, height, width, N, K, names, colours: meta.colours, palette: meta.colours.map((c) => [...rgb(c.slice(1)), 255]), pinned: false };
  const state = (app.state = {
    get t() { return Math.min(model.get("iteration"), last()); },
    get c() { return model.get("label"); },
    get pixel() { return model.get("pixel"); },
    get i() { const [y, x] = model.get("pixel"); return y * width + x; },
    get mass() { return model.get("senders") !== "weights"; },
    // Of a pair: messages stand where senders may.
    get messages() { return model.get("senders") === "none"; },
  });
  app.painting = new Painting(height, width, model.get("strokes"), (hard) => {
    panes.forEach((pane) => pane.compute(hard));
    if (hard) { ownStrokes = true; model.set("strokes", toRuns(app.painting.strokes)); ownStrokes = false; model.save_changes(); }
    schedule();
  });
  app.truth = truth && fromRuns(JSON.parse(truth), N);
  const panes = metas.map((each, n) => new Pane(app, n, each)), pair = panes.length > 1, letters = pair ? ["A", "B"] : [""];
  const data = model.get("data");
  await Promise.all(panes.map((pane) => pane.load(new Uint8Array(data.buffer, data.byteOffset + pane.meta.bytes[0], pane.meta.bytes[1]))));
  const last = () => Math.max(...panes.map((pane) => pane.T)); // the last iteration there is or will be
  const busy = () => panes.some((pane) => pane.busy);
  let saving = null, timer = null, ownStrokes = false, follow = false;

  const go = (t) => { model.set("iteration", clamp(t, 0, last())); model.save_changes(); };
  app.choose = (k) => { model.set("label", k); model.save_changes(); };
  app.point = (y, x) => {
    model.set("pixel", [clamp(y, 0, height - 1), clamp(x, 0, width - 1)]);
    clearTimeout(saving); // the pointer moves faster than a kernel reads
    saving = setTimeout(() => model.save_changes(), 120);
  };
  app.began = () => {
    if (follow) model.set("iteration", last());
    else if (model.get("iteration") > last()) go(last());
    schedule();
  };
  app.arrived = (_, done) => { schedule(); if (done && !busy()) say(tellIteration); };

  // Toolbar.
  const button = (name, label, action) => make("button", { type: "button", title: label, "aria-label": label, onclick: action, class: name }, icon(name));
  const playButton = button("play", "Play", () => play());
  const slider = make("input", { type: "range", min: 0, max: 1, step: 1, "aria-label": "Iteration", oninput: () => { stop(); go(+slider.value); } });
  const reading = make("output", { class: "iteration" });
  const classes = make("select", { "aria-label": "Class shown", onchange: () => app.choose(+classes.value) }, ...names.map((name, k) => make("option", { value: k }, name)));
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  const mode = (value, text) => make("button", { type: "button", "data-senders": value, onclick: () => { model.set("senders", value); model.save_changes(); } }, text);
  const modes = panes.some((pane) => pane.hasSenders) ? [...(pair ? [mode("none", "messages")] : []), mode("mass", `${pair ? "senders: " : ""}weight × q`), mode("weights", `${pair ? "senders: " : ""}weight`)] : [];
  const toolbar = make("div", { class: "toolbar", role: "toolbar", "aria-label": "Iterations and class" },
    make("span", { class: "buttons" },
      button("first", "First iteration", () => { stop(); go(0); }), button("back", "Step back", () => { stop(); go(state.t - 1); }), playButton,
      button("step", "Step forward", () => { stop(); go(state.t + 1); }), button("last", "Last iteration", () => { stop(); go(last()); })),
    slider, reading, make("label", { class: "class" }, "class ", swatch, classes));
  const senders = modes.length ? make("span", { class: "modes", role: "group", "aria-label": "What the sender panels show" }, make("span", { class: "name" }, pair ? "kernels" : "senders"), ...modes) : "";
  const status = make("div", { class: "status" });
  const live = make("div", { class: "hidden", role: "status", "aria-live": "polite" });

  // Pictures.
  const [h, w] = panes[0].imageSize, image = imagePanel(app, panes[0].pixels, [h, w], ["maps", "paint"]);
  const sets = panes.map((pane, n) => panelsOf(app, pane, letters[n]));
  const rest = pair ? differencePanel(app, panes) : null, most = Math.max(...panes.map((pane) => pane.M)), gap = () => make("div", { class: "gap" });
  let perRow, order;
  if (pair) {
    perRow = most + 5;
    order = sets.flatMap((s, n) => [n ? rest : image, s.unary, ...s.messages, ...Array.from({ length: most - s.messages.length }, gap), s.pairwise, s.q, s.labels]);
  } else {
    const { unary, messages, pairwise, q, labels, entropy, exact, senders } = sets[0];
    const upper = [image, unary, ...messages, pairwise], lower = [labels, q, ...exact, ...senders, ...(exact.length ? [] : [entropy])];
    perRow = senders.length ? upper.length : Math.ceil((upper.length + lower.length) / 2);
    order = senders.length || messages.length > 2 ? [...upper, ...lower] : [image, unary, q, labels, ...messages, pairwise, entropy];
  }
  const panels = order.filter((p) => p.canvas);
  const tails = !pair && sets[0].senders.length && sets[0].messages.length > 1 ? [sets[0].pairwise, sets[0].entropy] : [];
  // To the left of the settings these form a row of their own.
  for (const p of tails) p.node.classList.add("tail");
  if (pair) for (const p of [image, rest]) p.node.classList.add("start");
  app.focusable = (panel) => { for (const other of panels) other.canvas.tabIndex = other === panel ? 0 : -1; };
  app.focusable(panels[0]);
  const pictures = make("div", { class: "panels", role: "group", "aria-label": "Pictures; with one in focus, arrow keys move the marked pixel" }, ...order.map((p) => p.node ?? p));

  // Below them: tabs, and the numbers of the marked pixel.
  const settings = panes.map((pane, n) => (pane.settable ? settingsPanel(pane, letters[n]) : null));
  const settable = panes.find((pane) => pane.settable);
  const painter = settable && paintingPanel(app.painting, { get settings() { return settable.settings; }, change: (c, hard) => panes.forEach((pane) => pane.settable && pane.change(c, hard)) }, names, app.colours, () => state.c, (k) => app.choose(k));
  const chart = make("div", { class: "charts" });
  const help = make("div", { class: "help" },
    make("p", {}, "Left and right: step. Space: play, pause. Home, End: first and last iteration. On a picture the arrows move the marked pixel (with Shift by 8), Page Up and Page Down step, Enter or a click fixes the mark; Escape or another click lets it follow the pointer again. Click a row of the table to show its class. Point at sliders and headings for their meaning."),
    make("p", {}, "At iteration t the marginals of iteration t − 1 send the messages; the pairwise energy is the compatibility times the weighted messages; q is the softmax of minus (unary + pairwise). Colours cover the range of all iterations; a blue range has changed with the settings. The notch is the marked pixel. Senders are the pixels whose messages reach the marked one: weight times q, or the weight."));
  const tabs = [
    ...settings.flatMap((s, n) => (s ? [[`Settings${letters[n] && ` ${letters[n]}`}`, s.node]] : [])), ...(painter ? [["Paint", painter.node]] : []), ["Energy", chart], ["Help", help],
  ].map(([name, node], n) => {
    const id = `tab-${n}`, tab = make("button", { type: "button", role: "tab", id, "aria-controls": `${id}-panel`, onclick: () => open(n) }, name);
    const panel = make("div", { role: "tabpanel", tabindex: ["Energy", "Help"].includes(name) ? 0 : false, id: `${id}-panel`, "aria-labelledby": id }, node);
    return { name, tab, panel };
  });
  const tablist = make("div", { class: "tabs", role: "tablist", "aria-label": "Settings, painting, energies and help", onkeydown: (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], at = tabs.findIndex(({ tab }) => tab === event.target);
    if (!by) return;
    const next = tabs[(at + by + tabs.length) % tabs.length];
    next.tab.click();
    next.tab.focus();
    event.preventDefault();
    event.stopPropagation();
  } }, ...tabs.map(({ tab }) => tab));
  let opened = null;
  function open(n) {
    opened = tabs[n].name;
    tabs.forEach(({ tab, panel }, k) => { tab.setAttribute("aria-selected", k === n); tab.tabIndex = k === n ? 0 : -1; panel.hidden = k !== n; });
    app.painting.active = opened === "Paint";
    settings.forEach((s, k) => { if (s) s.foot.hidden = opened !== `Settings${letters[k] && ` ${letters[k]}`}`; });
    frame.classList.toggle("drawing", app.painting.active);
    for (const p of order) (p.node ?? p).hidden = !(p.groups ?? ["maps"]).includes(app.painting.active ? "paint" : "maps");
    layout();
    schedule();
  }
  const table = numbersTable(app, panes);
  const numbers = make("div", { class: "numbers", role: "group", tabindex: 0, "aria-label": "Numbers of the marked pixel" }, table.node);
  const below = make("div", { class: "below" }, make("section", { class: "left" }, tablist, ...tabs.map(({ panel }) => panel)), numbers);
  const what = pair ? `two mean fields, ${panes.map((p) => p.meta.title).join(" and ")}` : `${names.length} labels`;
  const root = make("div", { class: "explorer", tabindex: -1, role: "group", "aria-label": `Mean-field explorer: ${height} by ${width} pixels, ${what}` },
    toolbar, make("div", { class: "news" }, status, senders),
    make("div", { class: "main" }, pictures, below),
    ...settings.flatMap((s) => s?.foot ?? []), live);
  const frame = make("div", { class: "frame" }, root);
  shadow.replaceChildren(make("style", {}, CSS), frame);
  const endTheme = followTheme(el, frame);

  // Pictures stand above settings and table, or to their left where that makes them larger: as many columns as fill the
  // height that can be seen. In VS Code and Colab this page is a frame of any height, so the screen's counts.
  function layout() {
    const space = root.clientWidth - 26, shown = order.filter((p) => !(p.node ?? p).hidden).length, aspect = width / height, painting = app.painting.active;
    if (space <= 0) return;
    const phone = space < 620, seen = (self === parent ? innerHeight : screen.availHeight - 100) - 110, high = clamp(seen - 122, 480, 800);
    const above = arrange(shown, painting ? shown : perRow, aspect, space, clamp(seen - (space < 760 ? 396 : 380), 204, 460), pair && !painting);
    const left = arrange(pair && !painting ? 4 * (most + 2) : shown, painting ? (pair ? 3 : 2) : tails.length || pair ? most + 2 : perRow, aspect, space - 434, high, pair || tails.length || painting);
    const side = !phone && space > 900 && left.size > above.size;
    const { columns: c, size } = phone ? { columns: 2, size: (space - 10) / 2 } : side ? left : above;
    pictures.style.gridTemplateColumns = `repeat(${c}, minmax(0, ${Math.min(size, 420)}px))`;
    below.style.height = side ? `${high}px` : "";
    frame.classList.toggle("phone", phone);
    frame.classList.toggle("side", side);
    frame.classList.toggle("small", size < 108);
    frame.classList.toggle("narrow", !phone && space < (pair ? 1000 : 900));
    if (app.tiny !== size < 108) { app.tiny = size < 108; schedule(); }
  }

  function drawStatus() {
    const { t } = state, T = last();
    slider.max = T;
    slider.value = t;
    slider.setAttribute("aria-valuetext", `iteration ${t} of ${T}`);
    reading.textContent = `iteration ${t} of ${T}`;
    classes.value = state.c;
    swatch.style.background = app.colours[state.c];
    for (const b of modes) b.setAttribute("aria-pressed", b.dataset.senders === model.get("senders"));
    const warn = (text) => make("span", { class: "warning" }, icon("warn"), text, " ");
    const sentences = panes.flatMap((pane, n) => [
      ...(pair ? [make("span", { class: "badge" }, letters[n]), make("b", {}, ` ${pane.meta.title}: `)] : []),
      ...story(pane).tell(pane.t, pair).map(([text, alarm]) => (alarm ? warn(text) : make("span", {}, text, " "))),
    ]);
    const remote = panes.some((pane) => pane.remote);
    status.replaceChildren(...sentences, ...(busy() ? [make("span", { class: "busy" }, "computing …")] : []),
      ...(remote && !model.send ? [make("span", {}, "Run the notebook to compute this image with other settings.")] : []));
    const [first, back, , step, end] = toolbar.querySelectorAll("button");
    first.disabled = back.disabled = t === 0;
    step.disabled = end.disabled = t === T;
    Object.assign(root.dataset, { asked: panes.map((pane) => pane.computer?.id), run: panes.map((pane) => pane.trace.run), ready: Math.min(...panes.map((pane) => pane.trace.ready)), busy: busy() });
  }

  // What has to be drawn, longest waiting first. Frame by frame as much as leaves the page responsive.
  const drawings = [
    drawStatus, table.draw, ...panels.map((p) => () => { if (!p.node.hidden) p.draw(); }), () => settings.forEach((s) => s?.show(state.pixel, width)), () => { if (opened === "Paint") painter.show(); },
    () => { if (opened === "Energy") chart.replaceChildren(...panes.flatMap((pane, n) => charts(pane, letters[n], Math.max(chart.clientWidth, 120), pane.t, last(), (t) => { stop(); go(t); }))); },
  ], waiting = new Set();
  function frameOf() {
    const end = performance.now() + 8;
    if (panes.some((pane) => !pane.trace)) return waiting.clear();
    try {
      for (const draw of waiting) {
        waiting.delete(draw);
        draw();
        if (performance.now() > end) break;
      }
    } finally {
      root.dataset.drawn = !waiting.size;
      if (waiting.size) requestAnimationFrame(frameOf);
    }
  }
  const schedule = (app.schedule = () => {
    if (!waiting.size) requestAnimationFrame(frameOf);
    for (const draw of drawings) waiting.add(draw);
    root.dataset.drawn = false;
  });

  // Announcements wait until the reader pauses, and while playing until the end; before the reader's first act there are none.
  let speaking = null, used = false;
  for (const kind of ["pointerdown", "keydown", "input"]) root.addEventListener(kind, () => { used = true; }, true);
  function say(text) {
    if (!used) return;
    clearTimeout(speaking);
    speaking = setTimeout(() => { if (!timer && panes.every((pane) => pane.trace)) live.textContent = text(); }, 300);
  }
  const tellIteration = () => `Iteration ${state.t} of ${last()}. ${panes.map((pane, n) => `${letters[n] && `${letters[n]}: `}${story(pane).tell(pane.t, pair).map(([s]) => s).join(" ")}`).join(" ")}`;
  const tellPixel = () => {
    const [y, x] = state.pixel, q = (pane, k) => number(pane.trace.q(pane.t, k)[state.i]);
    return `Row ${y}, column ${x}: ${panes.map((pane, n) => {
      const k = pane.trace.labels(pane.t)[state.i];
      return `${letters[n] && `${letters[n]}, `}${names[k]}, q ${q(pane, k)}; ${names[state.c]}, q ${q(pane, state.c)}.`;
    }).join(" ")}`;
  };

  function showPlay(playing) {
    const name = playing ? "Pause" : "Play";
    playButton.replaceChildren(icon(name.toLowerCase()));
    playButton.title = name;
    playButton.setAttribute("aria-label", name);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    showPlay(false);
    say(tellIteration);
  }
  function play() {
    if (timer) return stop();
    if (state.t === last()) go(0);
    timer = setInterval(() => { go(state.t + 1); if (state.t === last()) stop(); }, 600);
    showPlay(true);
  }

  let penDown = false;
  function paintingKey(key, event) { // whether the key was the painter's
    const { painting } = app, [y, x] = state.pixel;
    if (key === "z" && (event.ctrlKey || event.metaKey)) painting.undo();
    else if (key === "Enter") {
      penDown = !penDown;
      if (penDown) { painting.begin(); painting.to(y, x, state.c); } else painting.end();
      say(() => (penDown ? "Pen down." : "Pen up."));
    } else if (key === "Delete" || key === "Backspace") {
      const { erase } = painting;
      painting.begin();
      painting.erase = true;
      painting.to(y, x, state.c);
      painting.erase = erase;
      painting.end();
    } else return false;
    return true;
  }
  root.addEventListener("keydown", (event) => {
    const { key, target } = event, onCanvas = target.tagName === "CANVAS", onButton = ["BUTTON", "SUMMARY"].includes(target.tagName);
    const paints = onCanvas && app.painting.active;
    if (paints && paintingKey(key, event)) { event.preventDefault(); event.stopPropagation(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || target.tagName === "SELECT" || (target.tagName === "INPUT" && target !== slider)) return;
    const step = (by) => { stop(); go(state.t + by); };
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (onCanvas && move) {
      const by = event.shiftKey ? 8 : 1, [y, x] = state.pixel;
      app.point(y + by * move[0], x + by * move[1]);
      if (paints && penDown) app.painting.to(...state.pixel, state.c);
      say(tellPixel);
    } else if (onCanvas && key === "Enter") { app.pinned = !app.pinned; schedule(); }
    else if (key === "Escape" && app.pinned) { app.pinned = false; schedule(); }
    else if (target === numbers && (move?.[0] || key.startsWith("Page"))) return; // its own scrolling
    else if (key === "ArrowLeft" || key === "PageUp") step(-1);
    else if (key === "ArrowRight" || key === "PageDown") step(1);
    else if (key === "Home") { stop(); go(0); }
    else if (key === "End") { stop(); go(last()); }
    else if (key === " " && !onButton) play();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  // What changes in the model, by hand or from Python.
  const listeners = {
    "change:iteration": () => { follow = model.get("iteration") === last(); schedule(); say(tellIteration); },
    "change:strokes": () => { if (ownStrokes) return; app.painting.load(model.get("strokes")); panes.forEach((pane) => pane.compute(true)); },
    "msg:custom": ({ pane, meta }, [buffer]) => panes[pane].receiveTrace(meta, buffer),
  };
  for (const name of ["label", "pixel", "senders"]) listeners[`change:${name}`] = schedule;
  for (const pane of panes) listeners[`change:${pane.trait}`] = () => { if (!pane.changing) pane.compute(true); };
  for (const [event, f] of Object.entries(listeners)) model.on(event, f);
  follow = model.get("iteration") === last();
  const sizes = new ResizeObserver(() => { layout(); schedule(); });
  sizes.observe(root);
  addEventListener("resize", layout);
  open(app.painting.empty ? 0 : tabs.findIndex(({ name }) => name === "Paint")); // where strokes are given, more may follow
  // Pages hold several explorers: each one computes when it comes into view.
  const sight = new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) { sight.disconnect(); panes.forEach((pane) => { if (!pane.remote) pane.compute(true); }); } }, { rootMargin: "300px" });
  sight.observe(root);
  return () => {
    clearInterval(timer);
    panes.forEach((pane) => pane.end());
    sizes.disconnect();
    sight.disconnect();
    removeEventListener("resize", layout);
    endTheme();
    for (const [event, f] of Object.entries(listeners)) model.off(event, f);
  };
}

export default { render };
