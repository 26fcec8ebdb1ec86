// The pictures: one canvas each, the same pixel marked on all of them.
import { clamp, gradient, make, number, TABLES } from "./tools.js";

// app: { height, width, N, K, names, palette, colours, shadow, state, point(y, x), painting, schedule() }
// describe() gives { map, range, colours } for a map (with { sum } or { first }, the range at the first settings),
// { fill(rgba), text, chip } for a picture, { blank } for nothing; and a { symbol } that replaces the one given.
export class Panel {
  constructor(app, { key, title, symbol = "", badge = "", size = [app.height, app.width], groups = ["maps"], spoken, describe }) {
    Object.assign(this, { app, key, groups, describe, size, spoken: spoken || title });
    const canvas = make("canvas", { width: size[1], height: size[0], role: "img", tabindex: -1, "data-panel": key, "aria-label": this.spoken });
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.mark = make("span", { class: "mark", "aria-hidden": "true" });
    this.blank = make("span", { class: "blank" });
    this.legend = make("div", { class: "legend" });
    this.symbol = make("span", { class: "symbol" }, symbol);
    this.node = make("figure", { class: `panel ${key}` },
      make("figcaption", {}, ...(badge ? [make("span", { class: "badge" }, badge)] : []), make("b", {}, title), " ", this.symbol),
      make("div", { class: "stage", style: `aspect-ratio: ${app.width} / ${app.height}` }, canvas, this.mark, this.blank), this.legend);
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointerup", () => app.painting.end());
    canvas.addEventListener("pointercancel", () => app.painting.end());
  }
  find(event) {
    const box = this.canvas.getBoundingClientRect(), { height, width } = this.app;
    return [clamp(Math.floor(((event.clientY - box.top) / box.height) * height), 0, height - 1), clamp(Math.floor(((event.clientX - box.left) / box.width) * width), 0, width - 1)];
  }
  move(event) {
    const { app } = this, { painting } = app, [y, x] = this.find(event);
    if (painting.active && event.buttons & 1) {
      painting.to(y, x, app.state.c);
      app.point(y, x);
    } else if (!app.pinned) app.point(y, x);
  }
  down(event) {
    const { app } = this, { painting } = app, [y, x] = this.find(event);
    app.focusable(this);
    this.canvas.focus({ preventScroll: true });
    if (painting.active) {
      this.canvas.setPointerCapture(event.pointerId);
      painting.begin();
      painting.to(y, x, app.state.c);
      event.preventDefault();
    } else app.pinned = event.pointerType === "touch" || !app.pinned;
    app.point(y, x);
    app.schedule();
  }
  draw() {
    const view = this.describe(), { app, context } = this, { state, names } = app, [y, x] = state.pixel, [height, width] = this.size;
    this.node.classList.toggle("empty", "blank" in view);
    this.mark.style.left = `${((x + 0.5) / app.width) * 100}%`;
    this.mark.style.top = `${((y + 0.5) / app.height) * 100}%`;
    this.blank.textContent = view.blank ?? "";
    if (view.symbol) this.symbol.textContent = view.symbol;
    let spoken = view.blank;
    if (view.fill || view.map) {
      const picture = context.createImageData(width, height), out = picture.data;
      if (view.fill) view.fill(out);
      else {
        const [low, high] = view.range, table = TABLES[view.colours], scale = high > low ? 255 / (high - low) : 0;
        for (let i = 0; i < app.N; i++) {
          const colour = table[clamp(Math.round((view.map[i] - low) * scale), 0, 255)];
          out[4 * i] = colour[0]; out[4 * i + 1] = colour[1]; out[4 * i + 2] = colour[2]; out[4 * i + 3] = 255;
        }
        const here = view.map[state.i], notch = make("i", { style: `left: ${clamp(((here - low) * scale) / 2.55, 0, 100)}%` });
        const short = app.tiny ? (v) => number(v, 2) : number, { first = view.range } = view;
        const moved = Math.abs(low - first[0]) + Math.abs(high - first[1]) > 0.1 * (first[1] - first[0]);
        const about = moved ? `The colours are rescaled: at the first settings they covered ${number(first[0])} to ${number(first[1])}.` : "";
        this.legend.classList.toggle("moved", moved);
        this.legend.title = about;
        const summed = "sum" in view, bar = make("span", { class: "bar", style: `background: ${gradient(view.colours)}` }, notch);
        this.legend.replaceChildren(...(app.tiny && summed ? [bar] : [short(low), bar, short(high)]),
          summed ? make("span", { class: "sum", title: "the sum over all pixels: the message" }, `Σ ${short(view.sum)}`) : "");
        spoken = `from ${number(low)} to ${number(high)}; ${number(here)} at the marked pixel${summed ? `; the sum is ${number(view.sum)}` : ""}${about && `. ${about}`}`;
      }
      context.putImageData(picture, 0, 0);
    } else context.clearRect(0, 0, width, height);
    if (!view.map) this.legend.replaceChildren(...(view.chip ? [make("span", { class: "swatch", style: `background: ${view.chip}` })] : []), view.text ?? "");
    spoken ??= view.text;
    const of = ["image", "labels", "entropy", "wrong"].some((name) => this.key.startsWith(name)) ? "" : `, class ${names[state.c]}`;
    this.canvas.setAttribute("aria-label", `${this.spoken}${of}, iteration ${state.t}: ${spoken}`);
  }
}

const NOTHING = { blank: "no message yet" };

// The panels of one pane. letter: "" alone, "A" or "B" beside another one; the keys of B's end in "-b".
export function panelsOf(app, pane, letter) {
  const { state, names, colours, palette } = app, { M, K, N } = pane, single = !letter, end = letter === "B" ? "-b" : "";
  const make = (key, title, symbol, describe, more = {}) => new Panel(app, { key: key + end, title, symbol: single || key.startsWith("message") ? symbol : "", badge: letter, describe, spoken: letter && `${title}, ${letter}`, ...more, ...(more.spoken && letter ? { spoken: `${more.spoken}, ${letter}` } : {}) });
  const trace = () => pane.trace, both = ["maps", "paint"];
  const map = (name, colours, m) => () => {
    const t = pane.t;
    if (t === 0 && (name === "messages" || name === "pairwise")) return NOTHING;
    return { map: trace().plane(name, t, state.c, m), range: trace().range(name, state.c, m), first: pane.first?.range(name, state.c, m), colours };
  };
  const sent = (m) => () => {
    if (state.mass && pane.t === 0) return NOTHING;
    if (!trace().knowsSenders) return { blank: pane.hasSenders ? "computing" : "not stored" };
    const map = trace().senders(m, state.i);
    if (state.mass) { const q = trace().q(pane.t - 1, state.c); for (let i = 0; i < N; i++) map[i] *= q[i]; }
    let low = 0, high = 0, sum = 0;
    for (const v of map) { if (v > high) high = v; if (v < low) low = v; sum += v; }
    return { map, range: [low, high], colours: "viridis", sum };
  };
  const unary = make("unary", "unary", "energy", map("unary", "cividis"), { spoken: "unary energy" });
  const q = make("q", "marginal", "q", () => ({ map: trace().q(pane.t, state.c), range: [0, 1], colours: "viridis" }), { groups: both });
  const labels = make("labels", "labels", "argmax q", () => {
    const labels = trace().labels(pane.t);
    const fill = (out) => labels.forEach((k, i) => { const c = palette[k]; out[4 * i] = c[0]; out[4 * i + 1] = c[1]; out[4 * i + 2] = c[2]; out[4 * i + 3] = 255; });
    return { fill, text: `here: ${names[labels[state.i]]}`, chip: colours[labels[state.i]] };
  }, { groups: both });
  const messages = pane.meta.kernels.map((name, m) => make(`message${m}`, name, "message", () => ({ ...(single || state.messages ? map("messages", "viridis", m) : sent(m))(), symbol: single || state.messages ? "message" : "senders" }), { spoken: single ? `message of the ${name} kernel` : `${name} kernel` }));
  const pairwise = make("pairwise", "pairwise", "energy", map("pairwise", "cividis"), { spoken: "pairwise energy" });
  if (!single) return { unary, messages, pairwise, q, labels };
  const { truth } = app;
  const wrong = truth && make("wrong", "wrong", "true label", () => {
    const labels = trace().labels(pane.t), counts = [0, 0];
    // Right pixels, and those of unknown label, are black.
    const fill = (out) => truth.forEach((k, i) => {
      if (k !== 255) counts[+(labels[i] !== k)]++;
      out.set(k === 255 || labels[i] === k ? [0, 0, 0, 255] : palette[k], 4 * i);
    });
    return { fill, get text() { return `${counts[1]} of ${counts[0] + counts[1]} pixels`; } };
  }, { spoken: "wrong pixels in the colour of their true label" });
  const entropy = make("entropy", "entropy", "nats", () => ({ map: trace().entropy(pane.t), range: [0, Math.log(K)], colours: "cividis" }));
  const exact = pane.meta.coupling ? [make("exact", "exact", "P", () => {
    const { exact } = trace();
    return exact ? { map: exact.subarray(state.c * N, (state.c + 1) * N), range: [0, 1], colours: "viridis" } : { blank: "too many labellings" };
  }, { spoken: "exact marginal by enumeration" })] : [];
  const senders = pane.hasSenders ? pane.meta.kernels.map((name, m) => make(`senders${m}`, name, "senders", sent(m), { spoken: `what each pixel sends to the marked one by the ${name} kernel` })) : [];
  return { unary, messages, pairwise, q, labels, entropy: wrong || entropy, exact, senders };
}

// The image, with the strokes on it.
export function imagePanel(app, pixels, [h, w], groups) {
  const { height, width } = app, opaque = new Uint8ClampedArray(4 * h * w).map((_, at) => (at % 4 === 3 ? 255 : pixels[3 * (at >> 2) + (at % 4)]));
  return new Panel(app, { key: "image", title: "image", symbol: `${h} × ${w}`, size: [h, w], groups, describe() {
    const [y, x] = app.state.pixel, { strokes } = app.painting; // the image may be finer than the grid of labels
    const at = 3 * (Math.floor(((y + 0.5) * h) / height) * w + Math.floor(((x + 0.5) * w) / width));
    const fill = (out) => {
      out.set(opaque);
      if (app.painting.empty) return;
      for (let i = 0; i < h * w; i++) {
        const painted = strokes[Math.floor(((Math.floor(i / w) + 0.5) / h) * height) * width + Math.floor((((i % w) + 0.5) / w) * width)];
        if (painted !== 255) out.set(app.palette[painted], 4 * i);
      }
    };
    return { fill, text: `RGB ${[...pixels.subarray(at, at + 3)].join(", ")}` };
  } });
}

// q of B minus q of A.
export function differencePanel(app, [a, b]) {
  const difference = () => {
    const { state } = app, q = a.trace.q(a.t, state.c), other = b.trace.q(b.t, state.c);
    const map = other.map((v, i) => v - q[i]), most = map.reduce((high, v) => Math.max(high, Math.abs(v)), 0.01);
    return { map, range: [-most, most], colours: "difference" };
  };
  return new Panel(app, { key: "difference", title: "q: B − A", groups: ["maps", "paint"], spoken: "difference of the marginals, B minus A", describe: difference });
}

// Columns and width of the pictures: in rows of `perRow`, unless other rows make them much larger in this width and height.
export function arrange(count, perRow, aspect, width, height, fixed) {
  const GAP = 10, TEXT = 40;
  let best = { columns: 1, size: 1, worth: 0 };
  for (let columns = fixed ? perRow : 1; columns <= (fixed ? perRow : count); columns++) {
    const rows = Math.ceil(count / columns), size = Math.floor(Math.min((width - GAP * (columns - 1)) / columns, (height / rows - TEXT) * aspect));
    const worth = columns === perRow ? 1.1 * size : size;
    if (worth > best.worth) best = { columns, size, worth };
  }
  return best;
}
