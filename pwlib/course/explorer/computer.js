// Mean field beside the page: in a worker, or where none may start in short slices on the page itself.
import { numerics } from "./meanfield.js";

const SLICE = { worker: 16, page: 10 }; // milliseconds between looks at what has arrived

export class Computer {
  constructor(problem, onStep) {
    Object.assign(this, { problem, onStep, id: 0, sent: null });
    this.receive = (step) => { if (step.id !== this.id) return; this.done = step.done; this.onStep(step); };
    if (problem.coupling) this.post = this.here(Infinity); // nine pixels: at once
    else this.startWorker();
  }
  here(slice) {
    const accept = numerics().serve(this.receive, slice, () => new Promise((done) => setTimeout(done)));
    accept({ problem: this.problem });
    return accept;
  }
  startWorker() {
    const code = `const channel = new MessageChannel();
      const pause = () => new Promise((done) => { channel.port1.onmessage = done; channel.port2.postMessage(0); });
      const accept = (${numerics})().serve((step, buffers) => postMessage(step, buffers), ${SLICE.worker}, pause);
      onmessage = ({ data }) => accept(data);
      postMessage({ started: true });`;
    const refused = () => {
      this.end();
      this.post = this.here(SLICE.page);
      if (this.job) this.post(this.job);
    };
    try {
      const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
      this.worker = new Worker(url);
      const patience = setTimeout(refused, 3000); // a page's policy may refuse it without a word
      this.worker.onmessage = ({ data }) => { if (data.started) clearTimeout(patience), URL.revokeObjectURL(url); else this.receive(data); };
      this.worker.onerror = () => { clearTimeout(patience); refused(); };
      this.post = (message) => this.worker.postMessage(message);
      this.post({ problem: this.problem });
    } catch { refused(); }
  }
  // Starts a job unless it is what was sent last; hard: even a running job without a first iteration is left.
  run(settings, strokes, hard) {
    const key = JSON.stringify([settings, [...strokes]]), same = key === this.sent;
    if (same && (!hard || this.done)) return false;
    if (!same) this.id++;
    Object.assign(this, { sent: key, done: false, job: { id: this.id, settings, strokes: strokes.slice(), hard } });
    this.post(this.job);
    return true;
  }
  end() { this.worker?.terminate(); this.worker = null; }
}
