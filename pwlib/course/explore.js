// The mean-field explorer: draws a trace (see explore.py) and lets the reader step, point and compare.
// One file, no import, no request: anywidget loads it beside a live kernel, `embed_html` puts it into a page as it is.
//
// At iteration t everything on show belongs to one update: the marginals of iteration t - 1 send the messages, weights
// and compatibility turn these into the pairwise energy, and softmax(-unary - pairwise) is the marginal of iteration t.

// ---- the data ---------------------------------------------------------------------------------------------------

const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});
const WORDS = { uint8: Uint8Array, float16: Uint16Array, float32: Uint32Array };
const DIFFERENCES = new Set(["messages", "q", "labels"]);

async function unpack(meta, data) {
  const zipped = typeof data === "string"
    ? Uint8Array.from(atob(data), (c) => c.charCodeAt(0))
    : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const blocks = {};
  let at = 0;
  for (const { name, dtype, shape } of meta.blocks) {
    const count = shape.reduce((a, b) => a * b, 1), words = new WORDS[dtype](count);
    for (let byte = 0; byte < words.BYTES_PER_ELEMENT; byte++, at += count)
      for (let i = 0; i < count; i++) words[i] |= raw[at + i] << (8 * byte);
    if (DIFFERENCES.has(name)) {
      const stride = count / shape[0];
      for (let i = stride; i < count; i++) words[i] += words[i - stride];
    }
    blocks[name] = dtype === "float32" ? new Float32Array(words.buffer) : words;
  }
  return blocks;
}

// Maps over the N pixels, Float32Array(N) each, and the ranges their colours cover; t as in the header above.
class Trace {
  constructor(meta, blocks) {
    Object.assign(this, { meta, blocks });
    [this.height, this.width] = meta.size;
    this.N = this.height * this.width;
    this.K = meta.classes.length;
    this.M = meta.kernels.length;
    this.T = meta.iterations;
    this.ranges = new Map();
  }
  plane(block, index) {
    const words = this.blocks[block], out = new Float32Array(this.N);
    for (let i = 0, at = index * this.N; i < this.N; i++) out[i] = HALF[words[at + i]];
    return out;
  }
  unary(c) { return this.plane("unary", c); }
  q(t, c) { return this.plane("q", t * this.K + c); }
  message(t, m, c) { return this.plane("messages", ((t - 1) * this.M + m) * this.K + c); }
  pairwise(t, c) {
    if (this.blocks.pairwise) return this.plane("pairwise", (t - 1) * this.K + c);
    const out = new Float32Array(this.N), words = this.blocks.messages;
    for (let m = 0; m < this.M; m++)
      for (let l = 0; l < this.K; l++) {
        const factor = this.meta.compatibility[c][l] * this.meta.weights[m];
        if (factor === 0) continue;
        const at = (((t - 1) * this.M + m) * this.K + l) * this.N;
        for (let i = 0; i < this.N; i++) out[i] += factor * HALF[words[at + i]];
      }
    return out;
  }
  entropy(t) {
    const out = new Float32Array(this.N), words = this.blocks.q;
    for (let k = 0, at = t * this.K * this.N; k < this.K; k++, at += this.N)
      for (let i = 0; i < this.N; i++) {
        const p = HALF[words[at + i]];
        if (p > 0) out[i] -= p * Math.log(p);
      }
    return out;
  }
  labels(t) { return this.blocks.labels.subarray(t * this.N, (t + 1) * this.N); }
  changed(t) { // how many pixels took another label at iteration t, and how many of those went back to the one before
    const now = this.labels(t), before = this.labels(t - 1), earlier = t > 1 ? this.labels(t - 2) : null;
    let changed = 0, returned = 0;
    for (let i = 0; i < this.N; i++)
      if (now[i] !== before[i]) { changed++; if (earlier && now[i] === earlier[i]) returned++; }
    return { changed, returned };
  }
  range(key, maps) { // lowest and highest value over all iterations, so that colours keep their meaning while playing
    if (!this.ranges.has(key)) {
      let low = Infinity, high = -Infinity;
      for (const map of maps()) for (const v of map) { if (v < low) low = v; if (v > high) high = v; }
      this.ranges.set(key, [low, high]);
    }
    return this.ranges.get(key);
  }
  updates() { return Array.from({ length: this.T }, (_, t) => t + 1); }
  get knowsSenders() { return "sums" in this.blocks; }
  senders(m, pixel) { // the row of the normalised kernel matrix, as Trace.senders in crf.py
    const f = this.blocks[`features${m}`], D = f.length / this.N, out = new Float32Array(this.N);
    const sums = this.blocks.sums.subarray(m * this.N, (m + 1) * this.N);
    for (let i = 0; i < this.N; i++) {
      let d2 = 0;
      for (let d = 0; d < D; d++) d2 += (f[i * D + d] - f[pixel * D + d]) ** 2;
      let w = Math.exp(-d2 / 2);
      if (this.meta.normalization === "symmetric") w /= Math.sqrt(sums[i] * sums[pixel]);
      else if (this.meta.normalization === "row") w /= sums[pixel];
      out[i] = w;
    }
    if (!this.meta.self_message) out[pixel] = 0;
    return out;
  }
}

// ---- small tools ------------------------------------------------------------------------------------------------

// Colour maps for any colour vision, 33 stops of matplotlib's: viridis for probability mass, cividis for energies.
const MAPS = {
  viridis: "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725",
  cividis: "00224e00285b002e6a0533711a386f273e6e32436d3b496c434e6c4b546c535a6d5a5f6e61656f686a716f70737676767d7c788482798c8878938e789b9476a39a74aba072b4a76fbcae6cc4b468cdbb63d5c25edec958e7d150f0d846f9e03afee838",
};
const rgb = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
const TABLES = {};
for (const [name, hex] of Object.entries(MAPS)) {
  const stops = hex.match(/.{6}/g).map(rgb), last = stops.length - 1;
  TABLES[name] = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * last, k = Math.min(Math.floor(at), last - 1);
    return stops[k].map((v, ch) => Math.round(v + (at - k) * (stops[k + 1][ch] - v)));
  });
}
const gradient = (name) => `linear-gradient(to right, ${MAPS[name].match(/.{6}/g).map((c) => "#" + c).join()})`;

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const minus = (text) => text.replace("-", "−");
function number(v) { // about four digits, whatever the size
  if (v === null || v === undefined || Number.isNaN(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size < 5e-4) return minus(v.toExponential(0));
  if (size >= 1e5) return minus(v.toExponential(3));
  return minus(v.toFixed(size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0));
}

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect", "text", "polyline"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const ICONS = {
  first: "M6 5v14M19 5 9 12l10 7z", back: "M15 5 8 12l7 7", play: "M7 4l13 8-13 8z", pause: "M8 5v14M16 5v14",
  step: "M9 5l7 7-7 7", last: "M18 5v14M5 5l10 7-10 7z", warn: "M12 3 22 20H2zM12 10v5M12 17.5v.5",
};
const icon = (name) => make("svg", { viewBox: "0 0 24 24", "aria-hidden": "true", class: `icon ${name}` },
  make("path", { d: ICONS[name] }));

// What a page without a kernel uses in place of the widget's model.
function stillModel(values) {
  const handlers = {};
  return {
    get: (name) => values[name],
    set(name, value) { values[name] = value; for (const f of handlers[`change:${name}`] ?? []) f(); },
    on(event, f) { (handlers[event] ??= []).push(f); },
    off(event, f) { handlers[event] = (handlers[event] ?? []).filter((g) => g !== f); },
    save_changes() {},
  };
}

// ---- the page ---------------------------------------------------------------------------------------------------

async function render({ model, el }) {
  const shadow = (el.shadowRoot ?? el.attachShadow({ mode: "open" }));
  el.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab: leave our keys to us
  const meta = model.get("meta");
  const trace = new Trace(meta, await unpack(meta, model.get("data")));
  const { width, height, K, M, T, N } = trace;
  const names = meta.classes, palette = meta.colours.map((c) => [...rgb(c.slice(1)), 255]);

  const state = {
    get t() { return model.get("iteration"); },
    get c() { return model.get("label"); },
    get pixel() { return model.get("pixel"); },
    get i() { const [y, x] = model.get("pixel"); return y * width + x; },
    get mass() { return model.get("senders") === "mass"; },
  };
  const go = (t) => { model.set("iteration", clamp(t, 0, T)); model.save_changes(); };
  let saving = null, pinned = false, timer = null;
  function point(y, x) {
    model.set("pixel", [clamp(y, 0, height - 1), clamp(x, 0, width - 1)]);
    clearTimeout(saving); // the pointer moves faster than a kernel listens
    saving = setTimeout(() => model.save_changes(), 120);
  }

  // Toolbar.
  const button = (name, label, action) => make("button", { type: "button", title: label, "aria-label": label, onclick: action, class: name }, icon(name));
  const playButton = button("play", "Play", () => play());
  const slider = make("input", { type: "range", min: 0, max: T, step: 1, "aria-label": "Iteration", oninput: () => { stop(); go(+slider.value); } });
  const reading = make("output", { class: "iteration" });
  const classes = make("select", { "aria-label": "Class shown", onchange: () => { model.set("label", +classes.value); model.save_changes(); } },
    ...names.map((name, k) => make("option", { value: k }, name)));
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  const toolbar = make("div", { class: "toolbar", role: "toolbar", "aria-label": "Iterations and class" },
    make("span", { class: "buttons" },
      button("first", "First iteration", () => { stop(); go(0); }), button("back", "Step back", () => { stop(); go(state.t - 1); }), playButton,
      button("step", "Step forward", () => { stop(); go(state.t + 1); }), button("last", "Last iteration", () => { stop(); go(T); })),
    slider, reading, make("label", { class: "class" }, "class ", swatch, classes));
  const status = make("div", { class: "status" });
  const live = make("div", { class: "hidden", role: "status", "aria-live": "polite" });

  // Panels: one canvas each, with the same pixel marked on all.
  const panels = [];
  function panel(key, title, symbol, describe, options = {}) {
    const canvas = make("canvas", { width, height, role: "img", tabindex: panels.length ? -1 : 0, "data-panel": key });
    const mark = make("span", { class: "mark", "aria-hidden": "true" }), blank = make("span", { class: "blank" });
    const legend = make("div", { class: "legend" });
    const stage = make("div", { class: "stage", style: `aspect-ratio: ${width} / ${height}` }, canvas, mark, blank);
    const node = make("figure", { class: `panel ${key}` },
      make("figcaption", {}, make("b", {}, title), " ", make("span", { class: "symbol" }, symbol)), stage, legend);
    const p = { key, title, node, canvas, mark, blank, legend, describe, context: canvas.getContext("2d"), ...options };
    const find = (event) => {
      const box = canvas.getBoundingClientRect();
      point(Math.floor(((event.clientY - box.top) / box.height) * height), Math.floor(((event.clientX - box.left) / box.width) * width));
    };
    canvas.addEventListener("pointermove", (event) => { if (!pinned) find(event); });
    canvas.addEventListener("pointerdown", (event) => {
      for (const other of panels) other.canvas.tabIndex = other === p ? 0 : -1;
      canvas.focus({ preventScroll: true });
      pinned = event.pointerType === "touch" || !pinned;
      find(event);
      schedule();
    });
    panels.push(p);
    return node;
  }
  // describe() -> { map, range, colours } for a map, { rgba, text } for a picture, { blank } where there is nothing.
  const nothing = { blank: "no message yet" };
  panel("image", "image", `${meta.blocks[0].shape[0]} × ${meta.blocks[0].shape[1]}`, () => {
    const [y, x] = state.pixel, [h, w] = meta.blocks[0].shape; // may be finer than the grid of labels
    const at = 3 * (Math.floor(((y + 0.5) * h) / height) * w + Math.floor(((x + 0.5) * w) / width));
    return { picture: true, text: `here: RGB ${[...trace.blocks.image.subarray(at, at + 3)].join(", ")}` };
  });
  panel("unary", "unary energy", "ψ", () => ({ map: trace.unary(state.c), range: trace.range(`u${state.c}`, () => [trace.unary(state.c)]), colours: "cividis" }));
  panel("q", "marginal", "q", () => ({ map: trace.q(state.t, state.c), range: [0, 1], colours: "viridis" }));
  panel("labels", "labels", "argmax q", () => {
    const labels = trace.labels(state.t);
    return { rgba: (i) => palette[labels[i]], text: `here: ${names[labels[state.i]]}`, chip: meta.colours[labels[state.i]] };
  });
  const entropy = ["entropy", "nats", () => ({ map: trace.entropy(state.t), range: [0, Math.log(K)], colours: "cividis" })];
  if (M >= 4) panel("entropy", ...entropy); // so that both rows are full
  for (let m = 0; m < M; m++)
    panel(`message${m}`, meta.kernels[m], "message", () => state.t === 0 ? nothing : {
      map: trace.message(state.t, m, state.c), colours: "viridis",
      range: trace.range(`m${m},${state.c}`, () => trace.updates().map((t) => trace.message(t, m, state.c))),
    }, { spoken: `message of the ${meta.kernels[m]} kernel` });
  panel("pairwise", "pairwise energy", "μ Σ w m", () => state.t === 0 ? nothing : {
    map: trace.pairwise(state.t, state.c), colours: "cividis",
    range: trace.range(`p${state.c}`, () => trace.updates().map((t) => trace.pairwise(t, state.c))),
  });
  if (M < 4) panel("entropy", ...entropy);
  const upper = panels.map((p) => p.node);
  if (trace.knowsSenders)
    for (let m = 0; m < M; m++)
      panel(`senders${m}`, meta.kernels[m], "senders", () => {
        if (state.mass && state.t === 0) return nothing;
        const map = trace.senders(m, state.i);
        if (state.mass) { const q = trace.q(state.t - 1, state.c); for (let i = 0; i < N; i++) map[i] *= q[i]; }
        let high = 0, sum = 0;
        for (const v of map) { if (v > high) high = v; sum += v; }
        return { map, range: [0, high], colours: "viridis", sum };
      }, { spoken: `what each pixel sends to the marked one by the ${meta.kernels[m]} kernel` });
  const lower = panels.slice(upper.length).map((p) => p.node);

  // Below: who sends, the charts, and the numbers of the marked pixel.
  const mode = (value, text) => make("button", { type: "button", "data-senders": value, onclick: () => { model.set("senders", value); model.save_changes(); } }, text);
  const modes = [mode("mass", "weight × q"), mode("weights", "weight")];
  const heard = make("div", { class: "heading" }, make("b", {}), make("span", { class: "modes", role: "group", "aria-label": "What the sender panels show" }, ...modes));
  const charts = make("div", { class: "charts" });
  const body = make("tbody");
  const head = ["class", "unary ψ", ...meta.kernels.map((k) => `${k} msg`), "pairwise", "ψ + pw.", "q"];
  const caption = make("caption");
  const table = make("table", {}, caption, make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))), body);
  const rows = names.map((name, k) => {
    const cells = head.slice(1).map(() => make("td"));
    const row = make("tr", { onclick: () => { model.set("label", k); model.save_changes(); } },
      make("th", { scope: "row" }, make("span", { class: "swatch", style: `background: ${meta.colours[k]}` }), make("span", { class: "name" }, name)), ...cells);
    body.append(row);
    return { row, cells };
  });
  const columns = clamp(M + 2, 4, 5), below = M > 2 ? columns : 2; // each kernel's senders stand below its message
  charts.style.gridColumn = `${trace.knowsSenders ? (M % below) + 1 : 1} / -1`;
  const help = make("details", { class: "help" }, make("summary", {}, "Keys, and how to read this"),
    make("p", {}, "Left and right: step. Space: play or pause. Home, End: first and last iteration. On a picture the arrows move the marked pixel (with Shift by 8), Page Up and Page Down step, Enter holds the mark in place and Escape frees it; so does a click. Click a row of the table to show its class."),
    make("p", {}, "At iteration t the marginals of iteration t − 1 send the messages; the pairwise energy is the compatibility times the weighted messages; q is the softmax of minus (unary + pairwise). Colours cover the range of all iterations, written under each picture; the notch is the marked pixel."));
  const root = make("div", { class: "explorer", tabindex: -1, role: "group", "aria-label": `Mean-field explorer: ${height} by ${width} pixels, ${K} labels, ${T} iterations`, style: `--columns: ${columns}` },
    toolbar, status,
    make("div", { class: "panels", role: "group", "aria-label": "Pictures; with one in focus, arrow keys move the marked pixel" }, ...upper),
    make("div", { class: M > 2 ? "below wide" : "below" },
      make("section", { class: "left" }, trace.knowsSenders ? heard : "", make("div", { class: "lower" }, ...lower, charts)),
      make("section", { class: "numbers" }, table)),
    help, live);
  shadow.replaceChildren(make("style", {}, model.get("_css")), make("div", { class: "frame" }, root));

  // Drawing.
  const photo = (() => {
    const [h, w] = meta.blocks[0].shape, picture = new ImageData(w, h), pixels = trace.blocks.image;
    for (let i = 0; i < h * w; i++) picture.data.set([pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2], 255], 4 * i);
    return picture;
  })();
  Object.assign(panels[0].canvas, { width: photo.width, height: photo.height });

  function draw(p) {
    const view = p.describe(), [y, x] = state.pixel, context = p.context;
    p.node.classList.toggle("empty", "blank" in view);
    p.mark.style.left = `${((x + 0.5) / width) * 100}%`;
    p.mark.style.top = `${((y + 0.5) / height) * 100}%`;
    p.blank.textContent = view.blank ?? "";
    let spoken = view.blank ?? view.text;
    if (view.picture) context.putImageData(photo, 0, 0);
    else if (view.rgba) {
      const picture = context.createImageData(width, height);
      for (let i = 0; i < N; i++) picture.data.set(view.rgba(i), 4 * i);
      context.putImageData(picture, 0, 0);
    } else if (view.map) {
      const picture = context.createImageData(width, height), out = picture.data;
      const [low, high] = view.range, table = TABLES[view.colours], scale = high > low ? 255 / (high - low) : 0;
      for (let i = 0; i < N; i++) {
        const colour = table[clamp(Math.round((view.map[i] - low) * scale), 0, 255)];
        out[4 * i] = colour[0]; out[4 * i + 1] = colour[1]; out[4 * i + 2] = colour[2]; out[4 * i + 3] = 255;
      }
      context.putImageData(picture, 0, 0);
      const here = view.map[state.i], sum = view.sum === undefined ? "" : `Σ ${number(view.sum)}`;
      const notch = make("i", { style: `left: ${clamp(((here - low) * scale) / 2.55, 0, 100)}%` });
      p.legend.replaceChildren(number(low), make("span", { class: "bar", style: `background: ${gradient(view.colours)}` }, notch), number(high),
        ...(sum ? [make("span", { class: "sum", title: "the sum over all pixels: the message" }, sum)] : []));
      spoken = `from ${number(low)} to ${number(high)}; ${number(here)} at the marked pixel${sum && `; the sum is ${number(view.sum)}`}`;
    } else context.clearRect(0, 0, width, height);
    if (!view.map) p.legend.replaceChildren(...(view.chip ? [make("span", { class: "swatch", style: `background: ${view.chip}` })] : []), view.text ?? "");
    const of = ["image", "labels", "entropy"].includes(p.key) ? "" : `, class ${names[state.c]}`;
    p.canvas.setAttribute("aria-label", `${p.spoken ?? p.title}${of}, iteration ${state.t}: ${spoken}`);
  }

  function drawTable() {
    const { t, i } = state, [y, x] = state.pixel, winner = trace.labels(t)[i];
    caption.replaceChildren(make("b", {}, `pixel (${y}, ${x})`), ` row, column · iteration ${t}${pinned ? " · held: click or Esc to free" : ""}`);
    const at = (block, index) => HALF[trace.blocks[block][index * N + i]];
    const message = (m, l) => at("messages", ((t - 1) * M + m) * K + l);
    rows.forEach(({ row, cells }, k) => {
      const unary = at("unary", k), messages = meta.kernels.map((_, m) => (t ? message(m, k) : null));
      let pairwise = t ? 0 : null;
      if (t && trace.blocks.pairwise) pairwise = at("pairwise", (t - 1) * K + k);
      else if (t) meta.compatibility[k].forEach((mu, l) => { if (mu) meta.weights.forEach((w, m) => { pairwise += mu * w * message(m, l); }); });
      const q = at("q", t * K + k);
      [unary, ...messages, pairwise, unary + (pairwise ?? 0), q].forEach((v, n) => { cells[n].textContent = number(v); });
      cells.at(-1).style.setProperty("--q", q);
      row.classList.toggle("chosen", k === state.c);
      row.classList.toggle("winner", k === winner);
      row.title = k === winner ? `${names[k]}: the most probable label here` : names[k];
    });
  }

  const changes = trace.updates().map((t) => trace.changed(t));
  const energy = meta.free_energy, finite = energy.filter((f) => f !== null);
  const slack = 1e-6 * Math.max(1, ...finite.map(Math.abs)) + 1e-3; // float32's rounding is no rise
  const rose = (t) => t > 0 && energy[t] !== null && energy[t - 1] !== null && energy[t] > energy[t - 1] + slack;
  const swings = (t) => t > 1 && changes[t - 1].changed > 0.02 * N && changes[t - 1].returned > 0.7 * changes[t - 1].changed;

  function tell(t) { // what happened at iteration t: [sentence, is it a warning]
    if (t === 0) return [["The unary alone: no message has been sent.", false], ...(energy.length ? [[`Free energy ${number(energy[0])} nats.`, false]] : [])];
    const { changed, returned } = changes[t - 1], out = [];
    if (energy.length) out.push([`Free energy ${number(energy[t])} nats, ${energy[t] > energy[t - 1] ? "up" : "down"} ${number(Math.abs(energy[t] - energy[t - 1]))}.`, rose(t)]);
    out.push([`${changed} of ${N} pixels changed label.`, false]);
    if (swings(t)) out.push([`${returned} of them changed back: the labels oscillate.`, true]);
    return out;
  }

  function drawStatus() {
    const { t } = state;
    slider.value = t;
    slider.setAttribute("aria-valuetext", `iteration ${t} of ${T}`);
    reading.textContent = `iteration ${t} of ${T}`;
    classes.value = state.c;
    swatch.style.background = meta.colours[state.c];
    for (const b of modes) b.setAttribute("aria-pressed", b.dataset.senders === model.get("senders"));
    heard.firstChild.textContent = `who sends to pixel (${state.pixel.join(", ")})`;
    status.replaceChildren(...tell(t).map(([text, warn]) => make("span", { class: warn ? "warning" : "" }, ...(warn ? [icon("warn")] : []), text, " ")));
    const [first, back, , step, last] = toolbar.querySelectorAll("button");
    first.disabled = back.disabled = t === 0;
    step.disabled = last.disabled = t === T;
  }

  function drawCharts() {
    const w = Math.max(charts.clientWidth, 120), left = 52, right = 12, across = (t) => left + (T ? (t / T) * (w - left - right) : 0);
    const pick = (event) => { stop(); go(Math.round(((event.offsetX - left) / (w - left - right)) * T)); };
    const chart = (h, label, ...nodes) => make("svg", { width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label, onclick: pick },
      make("line", { x1: across(state.t), x2: across(state.t), y1: 4, y2: h - 16, class: "now" }), ...nodes);
    const text = (x, y, s, anchor = "end", kind = "") => make("text", { x, y, "text-anchor": anchor, class: kind }, s);
    const out = [];
    if (finite.length) {
      const h = 118, low = Math.min(...finite), high = Math.max(...finite), up = (f) => 12 + (high > low ? (high - f) / (high - low) : 0.5) * (h - 40);
      const segments = energy.slice(1).map((f, t) => f === null || energy[t] === null ? "" : make("line", { x1: across(t), y1: up(energy[t]), x2: across(t + 1), y2: up(f), class: rose(t + 1) ? "segment rise" : "segment" }));
      const dots = energy.map((f, t) => f === null ? "" : make("circle", { cx: across(t), cy: up(f), r: t === state.t ? 4.5 : 2, class: t === state.t ? "dot current" : "dot" }));
      out.push(make("div", { class: "chart-title" }, make("b", {}, "free energy"), " nats"), chart(h,
        `Free energy by iteration, from ${number(energy[0])} to ${number(energy.at(-1))} nats; ${number(energy[state.t])} at iteration ${state.t}. It ${trace.updates().some(rose) ? "rises in places" : "never rises"}.`,
        text(left - 6, 16, number(high)), text(left - 6, h - 24, high > low ? number(low) : ""), ...segments, ...dots,
        text(across(0), h - 3, "0", "middle"), T ? text(across(T), h - 3, String(T), "middle") : "", state.t > 0 && state.t < T ? text(across(state.t), h - 3, String(state.t), "middle", "current") : ""));
    }
    if (T) {
      const h = 62, most = Math.max(1, ...changes.map((c) => c.changed)), wide = clamp(((w - left - right) / T) * 0.6, 2, 14);
      const bars = changes.map(({ changed }, t) => { const tall = (changed / most) * (h - 26); return make("rect", { x: across(t + 1) - wide / 2, y: h - 16 - tall, width: wide, height: Math.max(tall, 0.5), class: t + 1 === state.t ? "column current" : "column" }); });
      out.push(make("div", { class: "chart-title" }, make("b", {}, "labels changed"), " pixels"), chart(h,
        `Pixels that changed label, by iteration: ${changes.map((c) => c.changed).join(", ")}.`, text(left - 6, 16, String(most)), text(left - 6, h - 16, "0"), ...bars));
    }
    charts.replaceChildren(...out);
  }

  let pending = false;
  function schedule() { // however many changes, one drawing a frame
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      drawStatus();
      panels.forEach(draw);
      drawTable();
      drawCharts();
    });
  }

  // Announcements wait until the reader pauses, and while playing until the end.
  let speaking = null;
  function say(text) {
    clearTimeout(speaking);
    speaking = setTimeout(() => { if (!timer) live.textContent = text(); }, 300);
  }
  const tellIteration = () => `Iteration ${state.t} of ${T}. ${tell(state.t).map(([s]) => s).join(" ")}`;
  const tellPixel = () => {
    const k = trace.labels(state.t)[state.i], [y, x] = state.pixel;
    return `Row ${y}, column ${x}: ${names[k]}, q ${number(trace.q(state.t, k)[state.i])}; ${names[state.c]}, q ${number(trace.q(state.t, state.c)[state.i])}.`;
  };

  function stop() {
    clearInterval(timer);
    timer = null;
    playButton.replaceChildren(icon("play"));
    playButton.title = "Play";
    playButton.setAttribute("aria-label", "Play");
    say(tellIteration);
  }
  function play() {
    if (timer) return stop();
    if (state.t === T) go(0);
    timer = setInterval(() => { go(state.t + 1); if (state.t === T) stop(); }, 600);
    playButton.replaceChildren(icon("pause"));
    playButton.title = "Pause";
    playButton.setAttribute("aria-label", "Pause");
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === classes) return;
    const key = event.key, onCanvas = event.target.tagName === "CANVAS", onButton = ["BUTTON", "SUMMARY"].includes(event.target.tagName);
    const step = (by) => { stop(); go(state.t + by); };
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (onCanvas && move) {
      const by = event.shiftKey ? 8 : 1, [y, x] = state.pixel;
      point(y + by * move[0], x + by * move[1]);
      say(tellPixel);
    } else if (onCanvas && key === "Enter") { pinned = !pinned; schedule(); }
    else if (key === "Escape" && pinned) { pinned = false; schedule(); }
    else if (key === "ArrowLeft" || key === "PageUp") step(-1);
    else if (key === "ArrowRight" || key === "PageDown") step(1);
    else if (key === "Home") { stop(); go(0); }
    else if (key === "End") { stop(); go(T); }
    else if (key === " " && !onButton) play();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const changeIteration = () => { schedule(); say(tellIteration); };
  model.on("change:iteration", changeIteration);
  for (const name of ["label", "pixel", "senders"]) model.on(`change:${name}`, schedule);
  const sizes = new ResizeObserver(() => drawCharts());
  sizes.observe(charts);
  schedule();
  return () => {
    clearInterval(timer);
    sizes.disconnect();
    model.off("change:iteration", changeIteration);
    for (const name of ["label", "pixel", "senders"]) model.off(`change:${name}`, schedule);
  };
}

export default { render };
