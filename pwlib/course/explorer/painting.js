// Strokes on the unary: painted pixels take the unary of probabilities_from_labels, the others keep the network's.
import { make } from "./tools.js";
import { slider } from "./settings.js";

const NONE = 255;

// Runs [label, first pixel, pixels] in row-major order: how strokes are kept in the widget's state.
export function toRuns(strokes) {
  const runs = [];
  for (let i = 0; i < strokes.length; i++) {
    if (strokes[i] === NONE) continue;
    const last = runs.at(-1);
    if (last && last[0] === strokes[i] && last[1] + last[2] === i) last[2]++;
    else runs.push([strokes[i], i, 1]);
  }
  return runs;
}
export function fromRuns(runs, N) {
  const strokes = new Uint8Array(N).fill(NONE);
  for (const [label, start, length] of runs) strokes.fill(label, start, start + length);
  return strokes;
}

export class Painting {
  // onChange(hard) is called when pixels have changed, and once more when a stroke ends.
  constructor(height, width, runs, onChange) {
    Object.assign(this, { height, width, onChange, strokes: fromRuns(runs, height * width), past: [], size: 1, erase: false, active: false, last: null });
  }
  get empty() { return this.strokes.every((s) => s === NONE); }
  begin() { this.past.push(this.strokes.slice()); if (this.past.length > 50) this.past.shift(); this.last = null; }
  // A line of the brush's width from the last point of this stroke.
  to(y, x, label) {
    const [y0, x0] = this.last ?? [y, x], steps = Math.max(Math.abs(y - y0), Math.abs(x - x0), 1), reach = (this.size - 1) / 2;
    for (let s = 0; s <= steps; s++) {
      const cy = Math.round(y0 + ((y - y0) * s) / steps), cx = Math.round(x0 + ((x - x0) * s) / steps);
      for (let dy = -reach; dy <= reach; dy++)
        for (let dx = -reach; dx <= reach; dx++) {
          const row = cy + dy, column = cx + dx;
          if (row >= 0 && row < this.height && column >= 0 && column < this.width) this.strokes[row * this.width + column] = this.erase ? NONE : label;
        }
    }
    this.last = [y, x];
    this.onChange(false);
  }
  end() { if (this.last) { this.last = null; this.onChange(true); } }
  undo() { if (this.past.length) { this.last = null; this.strokes = this.past.pop(); this.onChange(true); } }
  clear() { if (!this.empty) { this.begin(); this.strokes.fill(NONE); this.onChange(true); } }
  load(runs) { this.strokes = fromRuns(runs, this.height * this.width); }
}

export function paintingPanel(painting, pane, names, colours, chosen, choose) {
  const K = names.length, press = (node, on) => node.setAttribute("aria-pressed", on);
  const pens = names.map((name, k) => make("button", { type: "button", class: "pen", onclick: () => { painting.erase = false; choose(k); } }, make("span", { class: "swatch", style: `background: ${colours[k]}` }), name));
  const eraser = make("button", { type: "button", class: "pen", onclick: () => { painting.erase = true; show(); } }, "erase");
  const brush = make("select", { "aria-label": "Brush", onchange: () => { painting.size = +brush.value; } }, ...[1, 3, 5].map((size) => make("option", { value: size }, `${size} px`)));
  const undo = make("button", { type: "button", onclick: () => painting.undo() }, "Undo");
  const clear = make("button", { type: "button", onclick: () => painting.clear() }, "Clear");
  const least = Math.ceil(100 / K + 1) / 100;
  const confidence = slider({ key: "confidence", text: "confidence", low: least, high: 0.99, linear: 0.01, about: "Probability that a stroke's label is right. The other labels share the rest. pydensecrf: gt_prob." },
    () => pane.settings.confidence, (v, hard) => pane.change({ confidence: v }, hard));
  const share = make("span", { class: "share" });
  const node = make("div", { class: "painting" },
    make("div", { class: "pens", role: "group", "aria-label": "Class to paint" }, ...pens, eraser),
    make("div", { class: "tools" }, make("label", { class: "choice" }, make("span", {}, "brush"), brush), undo, clear, share), confidence.node,
    make("p", {}, "Draw on the image. Keyboard: arrows move the mark, Enter lowers and lifts the pen, Delete erases a pixel, Ctrl+Z undoes. A stroke changes the unary; the CRF may give a painted pixel another label."));
  function show() {
    pens.forEach((pen, k) => press(pen, !painting.erase && k === chosen()));
    press(eraser, painting.erase);
    confidence.show();
    undo.disabled = !painting.past.length;
    const count = painting.strokes.reduce((n, s) => n + (s !== NONE), 0);
    clear.disabled = !count;
    share.textContent = `${((100 * count) / painting.strokes.length).toFixed(1)} % of the pixels painted`;
  }
  return { node, show };
}
