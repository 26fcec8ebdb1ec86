// One mean field on show: a stored trace, or a problem that the browser computes anew when a setting changes.
import { Computer } from "./computer.js";
import { ComputedTrace, HALF, StoredTrace, unpack } from "./traces.js";
import { toRuns } from "./painting.js";
import { clamp } from "./tools.js";

const SETTINGS = ["settings", "settings_b"]; // the widget's traits for the first pane and the second

export class Pane {
  // app: { model, painting, state, began(pane), arrived(pane, done) }
  constructor(app, index, meta) {
    Object.assign(this, { app, index, meta, trace: null, incoming: null, busy: false, trait: SETTINGS[index] });
    const [height, width] = meta.size;
    Object.assign(this, { height, width, N: height * width, K: meta.classes.length, M: meta.kernels.length });
    this.settable = "settings" in meta; // its settings can be changed
    this.remote = Boolean(meta.remote); // but only Python can compute it
    this.hasSenders = this.settable || meta.blocks.some(({ name }) => name === "sums");
  }
  async load(data) {
    const blocks = await unpack(this.meta.blocks, data), image = this.meta.blocks[0];
    const values = image.dtype === "float16" ? Float32Array.from(blocks.image, (bits) => HALF[bits]) : Float32Array.from(blocks.image, (v) => v / 255);
    this.pixels = Uint8ClampedArray.from(values, (v) => 255 * v);
    this.imageSize = image.shape;
    if (!this.settable || this.remote) this.trace = new StoredTrace(this.meta, blocks);
    else {
      const { height, width, K } = this;
      this.problem = { height, width, K, image: values, logits: Float32Array.from(blocks.logits, (bits) => HALF[bits]), compatibility: this.meta.compatibility, coupling: this.meta.coupling };
    }
  }
  get settings() { return this.app.model.get(this.trait); }
  get T() { return this.settable && !this.remote ? this.settings.iterations : this.trace.meta.iterations; }
  get t() { return clamp(this.app.state.t, 0, this.trace.ready); } // the iteration on show
  painted() { return !this.app.painting.empty; }

  change(changes, hard) {
    const { model } = this.app;
    this.changing = true;
    model.set(this.trait, { ...this.settings, ...changes });
    this.changing = false;
    this.compute(hard);
    if (hard) model.save_changes();
  }
  reset() { this.change({ ...this.meta.settings }, true); }
  coupling(i, j) {
    const edge = this.settings.edges.find(([a, b]) => (a === i && b === j) || (a === j && b === i));
    return edge ? edge[2] : +(this.meta.coupling[i * this.N + j] * this.settings.scale).toFixed(3);
  }
  changeEdge(i, j, v, hard) {
    const edges = this.settings.edges.filter(([a, b]) => !((a === i && b === j) || (a === j && b === i)));
    this.change({ edges: [...edges, [Math.min(i, j), Math.max(i, j), v]] }, hard);
  }

  compute(hard) {
    if (!this.settable) return;
    const { app } = this, { strokes } = app.painting;
    if (this.remote) {
      if (hard && app.model.send) { this.busy = true; app.model.send({ kind: "compute", pane: this.index, settings: this.settings, strokes: toRuns(strokes) }); }
      return app.began(this);
    }
    this.computer ??= new Computer(this.problem, (step) => this.receive(step));
    const { busy } = this;
    this.busy = true; // a small graph is done when run returns
    if (!this.computer.run(this.settings, strokes, hard)) this.busy = busy;
    app.began(this);
  }
  receive({ id, done, ...step }) {
    if (done) { this.busy = false; return this.app.arrived(this, true); }
    if (step.unary) this.incoming = new ComputedTrace(this.meta, this.problem, this.settings, id);
    this.incoming.add(step);
    // The trace before stays on show until there is a message to see.
    if (this.incoming.ready < Math.min(this.trace ? 1 : 0, this.app.state.t, this.settings.iterations)) return;
    this.trace = this.incoming;
    // Later ranges of colours are compared with its.
    this.first ??= this.trace;
    if (step.t !== undefined || !("at" in step)) this.app.arrived(this, false);
  }
  async receiveTrace(meta, data) { // from Python
    this.trace = new StoredTrace(meta, await unpack(meta.blocks, data));
    this.busy = false;
    this.app.arrived(this, true);
  }
  end() { this.computer?.end(); }
}
