// Mean field, exactly as DenseCRF.trace in crf.py computes it with filtering="exact":
//
//   q_i(l) <- softmax_l( -unary_i(l) - sum_l' mu(l, l') sum_m w_m sum_j k_m(i, j) q_j(l') )
//
// and on small graphs with a coupling matrix J in place of the kernels, beside the exact marginals by enumeration.
// Everything is inside one function: its text is what a worker is started from, so it uses nothing from outside.
//
// problem: { height, width, K, image [N * 3] in [0, 1], logits [K * N], compatibility [K][K], coupling [N * N] or null }
// job:     { settings, strokes [N], 255 where nothing is painted }
export function numerics() {
  const NONE = 255;

  // The unary energies [K * N] that the settings and the strokes make of the network's logits.
  function unaryEnergies({ K, logits }, settings, strokes) {
    const N = logits.length / K, out = new Float64Array(K * N), z = new Float64Array(K);
    const { temperature = 1, confidence = 0.7, double_softmax = false } = settings;
    for (let i = 0; i < N; i++) {
      const painted = strokes ? strokes[i] : NONE;
      for (let k = 0; k < K; k++)
        z[k] = painted === NONE ? logits[k * N + i] / temperature : Math.log(k === painted ? confidence : (1 - confidence) / (K - 1));
      if (double_softmax) softmax(z);
      let high = -Infinity, sum = 0;
      for (const v of z) if (v > high) high = v;
      for (const v of z) sum += Math.exp(v - high);
      for (let k = 0; k < K; k++) out[k * N + i] = high + Math.log(sum) - z[k];
    }
    return out;
  }

  function softmax(z) {
    let high = -Infinity, sum = 0;
    for (const v of z) if (v > high) high = v;
    for (let k = 0; k < z.length; k++) sum += z[k] = Math.exp(z[k] - high);
    for (let k = 0; k < z.length; k++) z[k] /= sum;
  }

  // The penalties [K][K]; with the wrong sign, agreement costs what the worst disagreement cost (Potts becomes the identity).
  function penalties(compatibility, settings) {
    if (settings.sign !== "reward") return compatibility;
    const high = Math.max(...compatibility.flat());
    return compatibility.map((row) => row.map((v) => high - v));
  }

  // Colours [N * 3] as the bilateral kernel sees them: grey levels, or (a fault) with mean 0 and standard deviation 1.
  function colours(image, normalised) {
    const N = image.length / 3, out = Float64Array.from(image, (v) => 255 * v);
    if (!normalised) return out;
    for (let c = 0; c < 3; c++) {
      let mean = 0, square = 0;
      for (let i = 0; i < N; i++) mean += image[3 * i + c] / N;
      for (let i = 0; i < N; i++) square += (image[3 * i + c] - mean) ** 2;
      const deviation = Math.sqrt(square / (N - 1));
      for (let i = 0; i < N; i++) out[3 * i + c] = (image[3 * i + c] - mean) / deviation;
    }
    return out;
  }

  // The bilateral kernel's features [N * 5]: position over theta_alpha, colour over theta_beta.
  function features({ height, width, image }, settings) {
    const N = height * width, out = new Float64Array(5 * N), colour = colours(image, settings.normalised_colours);
    for (let i = 0; i < N; i++) {
      out[5 * i] = (i % width) / settings.theta_alpha;
      out[5 * i + 1] = Math.floor(i / width) / settings.theta_alpha;
      for (let c = 0; c < 3; c++) out[5 * i + 2 + c] = colour[3 * i + c] / settings.theta_beta;
    }
    return out;
  }

  // Memory for the bilateral kernel as a matrix (rows of `stride` numbers, 0 beyond pixel N), values and their product.
  // Values lie in blocks of four labels: label k of pixel i at place(k) + 4 i, so that the product reads them in order.
  function workspace(N, blocks) {
    const stride = Math.ceil(N / 64) * 64, rows = Math.ceil(N / 4) * 4, lengths = [rows * stride, 4 * blocks * stride, 4 * blocks * stride];
    const memory = { stride, N, blocks, place: (k) => (k >> 2) * 4 * stride + (k & 3) };
    const total = 4 * lengths.reduce((a, b) => a + b);
    let buffer;
    try { // WebAssembly's memory has to hold what its code reads
      const linear = new WebAssembly.Memory({ initial: Math.ceil(total / 65536) });
      memory.fourRows = new WebAssembly.Instance(new WebAssembly.Module(assembled()), { e: { m: linear } }).exports.f;
      buffer = linear.buffer;
    } catch { buffer = new ArrayBuffer(total); } // no WebAssembly, or no SIMD: plain loops
    let at = 0;
    [memory.matrix, memory.values, memory.filtered] = lengths.map((length) => new Float32Array(buffer, 4 * (at += length) - 4 * length, length));
    return memory;
  }

  // The bilateral kernel and its row sums n. Tiles of 64 x 64, computed once and written twice: the matrix is symmetric.
  function* bilateralKernel(problem, settings, cache) {
    const key = [settings.theta_alpha, settings.theta_beta, settings.normalised_colours].join();
    if (cache.key === key) return;
    cache.key = null;
    const { matrix, stride, N } = cache, tile = 64, n = (cache.n = new Float64Array(N)), f = features(problem, settings);
    for (let top = 0; top < N; top += tile) {
      for (let left = 0; left <= top; left += tile) {
        const bottom = Math.min(top + tile, N), right = Math.min(left + tile, N);
        for (let i = top; i < bottom; i++) {
          const x = f[5 * i], y = f[5 * i + 1], r = f[5 * i + 2], g = f[5 * i + 3], b = f[5 * i + 4], end = Math.min(right, i + 1);
          for (let j = left, at = 5 * left; j < end; j++, at += 5) {
            const dx = x - f[at], dy = y - f[at + 1], dr = r - f[at + 2], dg = g - f[at + 3], db = b - f[at + 4];
            const half = 0.5 * (dx * dx + dy * dy + dr * dr + dg * dg + db * db);
            matrix[i * stride + j] = matrix[j * stride + i] = half > 30 ? 0 : Math.exp(-half); // e^-30 beside K_ii = 1
          }
        }
        if (left % 1024 === 0) yield;
      }
    }
    for (let i = 0; i < N; i++) {
      let sum = 0;
      for (let at = i * stride, end = at + N; at < end; at++) sum += matrix[at];
      n[i] = sum;
      if (i % 256 === 0) yield;
    }
    cache.key = key;
  }

  // The spatial kernel is a product of two small matrices: exp(-(dy^2 + dx^2) / 2 theta^2) = gy gx.
  function spatialKernel(height, width, theta) {
    const axis = (length) => Float64Array.from({ length: length * length }, (_, at) => Math.exp(-(((at % length) - Math.floor(at / length)) ** 2) / (2 * theta ** 2)));
    const sums = (g, length) => Array.from({ length }, (_, i) => g.subarray(i * length, (i + 1) * length).reduce((a, b) => a + b));
    const gy = axis(height), gx = axis(width), ny = sums(gy, height), nx = sums(gx, width);
    return { gy, gx, n: Float64Array.from({ length: height * width }, (_, i) => ny[Math.floor(i / width)] * nx[i % width]) };
  }

  // filtered = matrix @ values, four rows by four labels at a time.
  function* product({ matrix, values, filtered, stride, N, blocks, fourRows }) {
    for (let row = 0; row < N; row += 4) {
      for (let block = 0; block < blocks; block++) {
        const base = block * 4 * stride, to = base + 4 * row;
        if (fourRows) fourRows(4 * row * stride, 4 * stride, values.byteOffset + 4 * base, stride / 64, filtered.byteOffset + 4 * to);
        else
          for (let i = 0; i < 4; i++) {
            let a = 0, b = 0, c = 0, d = 0;
            for (let j = 0, at = (row + i) * stride, v = base; j < N; j++, at++, v += 4) {
              const w = matrix[at];
              a += w * values[v]; b += w * values[v + 1]; c += w * values[v + 2]; d += w * values[v + 3];
            }
            filtered.set([a, b, c, d], to + 4 * i);
          }
      }
      if (row % 64 === 0) yield;
    }
  }

  // WebAssembly with SIMD for the product's inner loops: f(matrix, stride, values, chunks, out), all addresses in bytes.
  // Sums of 64 columns are added to totals: single precision then loses less. Written out, in the order of the code:
  //   total = 0; do { sum = 0; do 16 times: 4 columns: sum[row] += matrix[row] * value; total += sum } while (--chunks)
  function assembled() {
    const leb = (v) => { const out = []; do { out.push((v & 127) | (v > 127 ? 128 : 0)); v >>>= 7; } while (v); return out; };
    const get = (l) => [0x20, l], set = (l) => [0x21, l], simd = (op, ...rest) => [0xfd, ...leb(op), ...rest];
    const plus = (l, by) => [...get(l), 0x41, ...leb(by), 0x6a, ...set(l)], loop = (...code) => [0x03, 0x40, ...code.flat(), 0x0b];
    const again = (l) => [...get(l), 0x41, 1, 0x6b, 0x22, l, 0x0d, 0], zero = simd(12, ...Array(16).fill(0)), add = simd(0xe4), times = simd(0xe6);
    const rows = [0, 5, 6, 7], [matrix, stride, values, chunks, out, counter] = [0, 1, 2, 3, 4, 8], sum = 9, total = 13, value = 17;
    const columns = [0, 1, 2, 3].flatMap((u) => [
      ...get(values), ...simd(0, 4, ...leb(16 * u)), ...set(value),
      ...rows.flatMap((row, i) => [...get(sum + i), ...get(row), ...simd(9, 2, ...leb(4 * u)), ...get(value), ...times, ...add, ...set(sum + i)]),
    ]);
    const code = [
      ...rows.slice(1).flatMap((row, i) => [...get(rows[i]), ...get(stride), 0x6a, ...set(row)]),
      ...loop(
        rows.flatMap((_, i) => [...zero, ...set(sum + i)]), [0x41, 16, ...set(counter)],
        loop(columns, rows.flatMap((row) => plus(row, 16)), [...get(values), 0x41, ...[0xc0, 0], 0x6a, ...set(values)], again(counter)),
        rows.flatMap((_, i) => [...get(total + i), ...get(sum + i), ...add, ...set(total + i)]), again(chunks)),
      ...rows.flatMap((_, i) => [...get(out), ...get(total + i), ...simd(11, 4, ...leb(16 * i))]),
    ];
    const body = [2, 4, 0x7f, 9, 0x7b, ...code, 0x0b], section = (id, ...content) => [id, ...leb(content.length), ...content];
    return new Uint8Array([
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
      ...section(1, 1, 0x60, 5, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0), // f takes five 32-bit integers
      ...section(2, 1, 1, 0x65, 1, 0x6d, 2, 0, 1), // and works on the memory e.m
      ...section(3, 1, 0), ...section(7, 1, 1, 0x66, 0, 0), ...section(10, 1, ...leb(body.length), ...body),
    ]);
  }

  function* separable({ gy, gx }, height, width, { values, filtered, stride, blocks }) {
    const rows = new Float64Array(4 * height * width);
    for (let block = 0; block < blocks; block++) {
      const base = block * 4 * stride;
      rows.fill(0);
      for (let y = 0; y < height; y++)
        for (let other = 0; other < height; other++) {
          const g = gy[y * height + other];
          if (g < 1e-13) continue;
          for (let at = y * 4 * width, from = base + other * 4 * width, end = at + 4 * width; at < end; at++, from++) rows[at] += g * values[from];
        }
      yield;
      for (let y = 0; y < height; y++)
        for (let x = 0; x < width; x++) {
          let v0 = 0, v1 = 0, v2 = 0, v3 = 0;
          for (let other = 0, at = 4 * y * width; other < width; other++, at += 4) {
            const g = gx[x * width + other];
            v0 += g * rows[at]; v1 += g * rows[at + 1]; v2 += g * rows[at + 2]; v3 += g * rows[at + 3];
          }
          const to = base + 4 * (y * width + x);
          filtered[to] = v0; filtered[to + 1] = v1; filtered[to + 2] = v2; filtered[to + 3] = v3;
        }
      yield;
    }
  }

  // All iterations, one step after the other. Yields nothing where it may be interrupted, else what is new:
  // { unary, sums }, then { t, q, labels, messages, pairwise } for t = 0, 1, ... and { free, at } as each becomes known.
  function* meanField(problem, { settings, strokes }, cache = {}) {
    if (problem.coupling) return yield* meanFieldOnGraph(problem, settings, strokes);
    const { height, width, K } = problem, N = height * width;
    const unary = unaryEnergies(problem, settings, strokes), mu = penalties(problem.compatibility, settings);
    const weights = [settings.w_spatial, settings.w_bilateral], M = 2;
    const symmetric = settings.normalization === "symmetric", row = settings.normalization === "row";
    const frame = (t, q) => ({ t, q: Float32Array.from(q), labels: best(q, K) });
    let q = marginals(unary, null, K);
    yield { unary: Float32Array.from(unary) };
    yield frame(0, q);
    if (!cache.matrix) Object.assign(cache, workspace(N, Math.ceil(K / 4)));
    yield* bilateralKernel(problem, settings, cache);
    const { values, filtered, place } = cache, spatial = spatialKernel(height, width, settings.theta_gamma), sums = new Float32Array(2 * N);
    sums.set(spatial.n);
    sums.set(cache.n, N);
    yield { sums };
    for (let t = 1; t <= settings.iterations + 1; t++) {
      const messages = new Float32Array(M * K * N), total = new Float64Array(K * N);
      for (let m = 0; m < M; m++) {
        const n = m ? cache.n : spatial.n, scale = n.map((v) => (symmetric ? 1 / Math.sqrt(v) : 1));
        for (let k = 0; k < K; k++)
          for (let i = 0, at = place(k); i < N; i++, at += 4) values[at] = q[k * N + i] * scale[i];
        yield* m ? product(cache) : separable(spatial, height, width, cache);
        for (let k = 0; k < K; k++)
          for (let i = 0, at = place(k); i < N; i++, at += 4) {
            const own = settings.self_message ? 0 : values[at], v = (filtered[at] - own) * (row ? 1 / n[i] : scale[i]);
            messages[(m * K + k) * N + i] = v;
            total[k * N + i] += weights[m] * v;
          }
        yield;
      }
      const pairwise = penalised(mu, total, K, N);
      yield { at: t - 1, free: freeEnergy(q, unary, pairwise) };
      if (t > settings.iterations) break;
      q = marginals(unary, pairwise, K);
      yield { ...frame(t, q), messages, pairwise: Float32Array.from(pairwise) };
    }
  }

  function marginals(unary, pairwise, K) {
    const N = unary.length / K, out = new Float64Array(K * N), z = new Float64Array(K);
    for (let i = 0; i < N; i++) {
      for (let k = 0; k < K; k++) z[k] = -unary[k * N + i] - (pairwise ? pairwise[k * N + i] : 0);
      softmax(z);
      for (let k = 0; k < K; k++) out[k * N + i] = z[k];
    }
    return out;
  }

  function best(q, K) {
    const N = q.length / K, out = new Uint8Array(N);
    for (let i = 0; i < N; i++) for (let k = 1; k < K; k++) if (q[k * N + i] > q[out[i] * N + i]) out[i] = k;
    return out;
  }

  function penalised(mu, total, K, N) {
    const out = new Float64Array(K * N);
    for (let k = 0; k < K; k++)
      for (let l = 0; l < K; l++) {
        const penalty = mu[k][l];
        if (penalty) for (let i = 0; i < N; i++) out[k * N + i] += penalty * total[l * N + i];
      }
    return out;
  }

  // F(Q) = sum q (unary + pairwise / 2) + sum q log q, in nats.
  function freeEnergy(q, unary, pairwise) {
    let sum = 0;
    for (let at = 0; at < q.length; at++) if (q[at] > 0) sum += q[at] * (unary[at] + pairwise[at] / 2 + Math.log(q[at]));
    return sum;
  }

  // ---- small graphs ----------------------------------------------------------------------------------------------

  // The coupling matrix that the settings make of the given one: scaled, some edges changed, the diagonal (what a pixel
  // sends to itself) set.
  function couplings({ coupling, height, width }, settings) {
    const N = height * width, out = Float64Array.from(coupling, (v) => v * (settings.scale ?? 1));
    for (const [i, j, v] of settings.edges ?? []) out[i * N + j] = out[j * N + i] = v;
    if (settings.self_weight !== undefined) for (let i = 0; i < N; i++) out[i * N + i] = settings.self_weight;
    return out;
  }

  function* meanFieldOnGraph(problem, settings, strokes) {
    const { K } = problem, N = problem.height * problem.width, J = couplings(problem, settings), mu = penalties(problem.compatibility, settings);
    const unary = unaryEnergies(problem, settings, strokes);
    const message = (q, i, k) => { let sum = 0; for (let j = 0; j < N; j++) sum += J[i * N + j] * q[k * N + j]; return sum; };
    const all = (q) => Float64Array.from({ length: K * N }, (_, at) => message(q, at % N, Math.floor(at / N)));
    let q = marginals(unary, null, K);
    yield { unary: Float32Array.from(unary), ...enumerate(unary, J, mu, K) };
    yield { t: 0, q: Float32Array.from(q), labels: best(q, K) };
    for (let t = 1; t <= settings.iterations + 1; t++) {
      let messages = all(q), pairwise = penalised(mu, messages, K, N);
      yield { at: t - 1, free: freeEnergy(q, unary, pairwise) };
      if (t > settings.iterations) break;
      if (settings.in_turn) // each pixel uses what the pixels before it have become: coordinate descent
        for (let i = 0; i < N; i++) {
          const z = new Float64Array(K);
          for (let k = 0; k < K; k++) messages[k * N + i] = message(q, i, k);
          for (let k = 0; k < K; k++) {
            pairwise[k * N + i] = mu[k].reduce((sum, penalty, l) => sum + penalty * messages[l * N + i], 0);
            z[k] = -unary[k * N + i] - pairwise[k * N + i];
          }
          softmax(z);
          for (let k = 0; k < K; k++) q[k * N + i] = z[k];
        }
      else q = marginals(unary, pairwise, K);
      yield { t, q: Float32Array.from(q), labels: best(q, K), messages: Float32Array.from(messages), pairwise: Float32Array.from(pairwise) };
    }
  }

  // Exact marginals [K * N] and log Z from all K^N labellings: E(x) = sum_i unary + sum_{i<j} J_ij mu(x_i, x_j).
  function enumerate(unary, J, mu, K) {
    const N = unary.length / K, count = K ** N;
    if (count > 2 ** 18) return {};
    const energies = new Float64Array(count), x = new Uint8Array(N), exact = new Float64Array(K * N);
    const visit = (each) => {
      for (let s = 0; s < count; s++) {
        for (let i = N - 1, rest = s; i >= 0; i--, rest = Math.floor(rest / K)) x[i] = rest % K;
        each(s);
      }
    };
    let low = Infinity, z = 0;
    visit((s) => {
      let energy = 0;
      for (let i = 0; i < N; i++) {
        energy += unary[x[i] * N + i];
        for (let j = i + 1; j < N; j++) energy += J[i * N + j] * mu[x[i]][x[j]];
      }
      energies[s] = energy;
      if (energy < low) low = energy;
    });
    for (const energy of energies) z += Math.exp(low - energy);
    visit((s) => { const p = Math.exp(low - energies[s]) / z; for (let i = 0; i < N; i++) exact[x[i] * N + i] += p; });
    return { exact: Float32Array.from(exact), logZ: Math.log(z) - low };
  }

  // ---- one job after the other -----------------------------------------------------------------------------------

  // accept(message) for a worker or, with short slices, for the page itself. { problem } comes first, then jobs
  // { id, hard, settings, strokes }; a job that is sent again may become hard. A new job ends the one that runs: at once if it is hard (a setting was
  // released), else (a slider is being dragged) after that one's first iteration, so that there is something to see.
  function serve(post, slice, pause) {
    const cache = {};
    let problem = null, running = null, pending = null;
    async function work() {
      while (pending) {
        running = pending;
        pending = null;
        let since = performance.now(), first = false;
        for (const step of meanField(problem, running, cache)) {
          if (step) post({ id: running.id, ...step }, Object.values(step).filter((v) => ArrayBuffer.isView(v)).map((v) => v.buffer));
          first ||= step?.t > 0;
          if (performance.now() - since < slice) continue;
          await pause();
          if (pending && (first || pending.hard)) break;
          since = performance.now();
        }
        if (!pending) post({ id: running.id, done: true }, []);
      }
      running = null;
    }
    return (message) => {
      if (message.problem) { problem = message.problem; return; }
      if (pending?.id === message.id) { pending.hard ||= message.hard; return; }
      if (running?.id === message.id) return;
      pending = message;
      if (!running) work();
    };
  }

  return { meanField, unaryEnergies, penalties, features, couplings, enumerate, serve };
}
