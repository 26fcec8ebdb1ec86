// What the panels draw: maps over the N pixels of one image's mean field, Float32Array(N) each.
//
// At iteration t everything on show belongs to one update: the marginals of iteration t - 1 send the messages, weights
// and compatibility turn these into the pairwise energy, and softmax(-unary - pairwise) is the marginal of iteration t.
import { numerics } from "./meanfield.js";

// Python's blocks: gzipped, low bytes first, the differences from one iteration to the next.
export const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});
const WORDS = { uint8: Uint8Array, float16: Uint16Array, float32: Uint32Array };
const DIFFERENCES = new Set(["messages", "q", "labels"]);

export async function unpack(list, data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const blocks = {};
  let at = 0;
  for (const { name, dtype, shape } of list) {
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

// What both kinds of trace share. A subclass gives plane(name, t, k, m) for "unary", "q", "messages" and "pairwise",
// labels(t), ready (the last iteration there is) and free (the free energies).
class Trace {
  constructor(meta) {
    this.meta = meta;
    [this.height, this.width] = meta.size;
    this.N = this.height * this.width;
    this.K = meta.classes.length;
    this.M = meta.kernels.length;
    this.ranges = new Map();
    this.changes = [];
  }
  q(t, c) { return this.plane("q", t, c); }
  entropy(t) {
    const out = new Float32Array(this.N);
    for (let k = 0; k < this.K; k++) {
      const q = this.q(t, k);
      for (let i = 0; i < this.N; i++) if (q[i] > 0) out[i] -= q[i] * Math.log(q[i]);
    }
    return out;
  }
  changed(t) { // how many pixels took another label at iteration t, and how many of those went back to the one before
    if (this.changes[t]) return this.changes[t];
    const now = this.labels(t), before = this.labels(t - 1), earlier = t > 1 ? this.labels(t - 2) : null;
    let changed = 0, returned = 0;
    for (let i = 0; i < this.N; i++)
      if (now[i] !== before[i]) { changed++; if (earlier && now[i] === earlier[i]) returned++; }
    return (this.changes[t] = { changed, returned });
  }
  counts(t) { // how many pixels have each label
    const out = new Uint32Array(this.K);
    for (const k of this.labels(t)) out[k]++;
    return out;
  }
  range(name, c, m) { // lowest and highest over all iterations, so that colours keep their meaning while playing
    const key = [name, c, m].join();
    let { upTo = name === "unary" ? -1 : 0, low = Infinity, high = -Infinity } = this.ranges.get(key) ?? {};
    for (const last = name === "unary" ? 0 : this.ready; upTo < last; upTo++)
      for (const v of this.plane(name, upTo + 1, c, m)) { if (v < low) low = v; if (v > high) high = v; }
    this.ranges.set(key, { upTo, low, high });
    return [low, high];
  }
  senders(m, pixel) { // a row of the normalised kernel matrix
    const out = new Float32Array(this.N), sums = this.sums.subarray(m * this.N, (m + 1) * this.N);
    const { normalization, self_message } = this.kernels, f = this.features[m], D = f.length / this.N;
    for (let i = 0; i < this.N; i++) {
      let d2 = 0;
      for (let d = 0; d < D; d++) d2 += (f[i * D + d] - f[pixel * D + d]) ** 2;
      let w = Math.exp(-d2 / 2);
      if (normalization === "symmetric") w /= Math.sqrt(sums[i] * sums[pixel]);
      else if (normalization === "row") w /= sums[pixel];
      out[i] = w;
    }
    if (!self_message) out[pixel] = 0;
    return out;
  }
  get knowsSenders() { return Boolean(this.sums ?? this.coupling); }
}

// A trace that Python made: half precision, unpacked plane by plane.
export class StoredTrace extends Trace {
  constructor(meta, blocks) {
    super(meta);
    this.blocks = blocks;
    this.ready = meta.iterations;
    this.free = meta.free_energy;
    this.sums = blocks.sums;
    this.features = meta.kernels.map((_, m) => blocks[`features${m}`]);
    this.kernels = meta;
  }
  plane(name, t, k, m = 0) {
    const out = new Float32Array(this.N), words = this.blocks[name];
    if (!words) { // the pairwise term, where it follows from the messages
      for (let m = 0; m < this.M; m++)
        for (let l = 0; l < this.K; l++) {
          const factor = this.meta.compatibility[k][l] * this.meta.weights[m], messages = this.blocks.messages;
          if (factor === 0) continue;
          for (let i = 0, at = (((t - 1) * this.M + m) * this.K + l) * this.N; i < this.N; i++, at++) out[i] += factor * HALF[messages[at]];
        }
      return out;
    }
    const index = { unary: k, q: t * this.K + k, pairwise: (t - 1) * this.K + k, messages: ((t - 1) * this.M + m) * this.K + k }[name];
    for (let i = 0, at = index * this.N; i < this.N; i++, at++) out[i] = HALF[words[at]];
    return out;
  }
  labels(t) { return this.blocks.labels.subarray(t * this.N, (t + 1) * this.N); }
}

const { features, couplings } = numerics();

// A trace that the browser computes; it grows while its iterations arrive.
export class ComputedTrace extends Trace {
  constructor(meta, problem, settings, run) {
    super(meta);
    Object.assign(this, { frames: [], free: [], ready: -1, kernels: settings, run });
    if (problem.coupling) this.coupling = couplings(problem, settings);
    else {
      const grid = Float64Array.from({ length: 2 * this.N }, (_, at) => (at % 2 ? Math.floor(at / 2 / this.width) : (at / 2) % this.width) / settings.theta_gamma);
      this.features = [grid, features(problem, settings)];
    }
  }
  add({ t, free, at, unary, sums, exact, logZ, ...frame }) {
    if (unary) Object.assign(this, { energies: unary, exact, logZ });
    if (sums) this.sums = sums;
    if (free !== undefined) this.free[at] = free;
    if (t !== undefined) { this.frames[t] = frame; this.ready = t; }
  }
  plane(name, t, k, m = 0) {
    const values = name === "unary" ? this.energies : this.frames[t][name], at = (m * this.K + k) * this.N;
    return values.subarray(at, at + this.N);
  }
  labels(t) { return this.frames[t].labels; }
  senders(m, pixel) { return this.coupling ? Float32Array.from(this.coupling.subarray(pixel * this.N, (pixel + 1) * this.N)) : super.senders(m, pixel); }
}
