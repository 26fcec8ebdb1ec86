// The settings of one pane: what can be set, in which range, and what it is called in Python.
import { clamp, icon, make, number } from "./tools.js";

// Sliders. Logarithmic ones cover `low` to `high` by equal factors.
const DENSE = [
  { key: "w_bilateral", text: "w bilateral", low: 0.01, high: 100, about: "Weight of the bilateral kernel. Larger: pixels of similar colour agree more, and thin objects may vanish. pydensecrf: compat of addPairwiseBilateral." },
  { key: "w_spatial", text: "w spatial", low: 0.01, high: 100, about: "Weight of the spatial kernel. Larger: neighbours agree more, whatever their colours; small regions vanish. pydensecrf: compat of addPairwiseGaussian." },
  { key: "theta_alpha", text: "θ α", low: 0.5, high: 200, unit: "px", about: "Bandwidth theta_alpha of the bilateral kernel in position (standard deviation). Larger: more distant pixels send messages. pydensecrf: sxy of addPairwiseBilateral." },
  { key: "theta_beta", text: "θ β", low: 0.5, high: 500, unit: "grey levels", about: "Bandwidth theta_beta of the bilateral kernel in colour, from 0 to 255 (standard deviation). Larger: more different colours count as similar, and messages cross edges. pydensecrf: srgb of addPairwiseBilateral." },
  { key: "theta_gamma", text: "θ γ", low: 0.2, high: 50, unit: "px", about: "Bandwidth theta_gamma of the spatial kernel (standard deviation). Larger: smoothing over a wider neighbourhood. pydensecrf: sxy of addPairwiseGaussian." },
];
const GRAPH = [
  { key: "scale", text: "all weights ×", low: 0.05, high: 20, about: "Factor on every coupling J_ij of the given graph. Larger: neighbours agree more." },
  { key: "self_weight", text: "self weight", low: 0, high: 10, linear: 0.05, about: "The diagonal J_ii of the coupling matrix: what a pixel sends to itself. Larger: marginals change less from one iteration to the next, and become overconfident." },
];
const BOTH = [
  { key: "temperature", text: "temperature", half: true, low: 0.1, high: 10, about: "The logits are divided by the temperature. Larger: the unary is less confident, and the messages count for more." },
  { key: "iterations", text: "iterations", half: true, low: 0, high: 30, linear: 1, about: "Iterations of mean field. Larger: closer to a fixed point, if there is one. pydensecrf: the argument of inference." },
];
// Choices: [value, text] each.
const CHOICES = {
  normalization: { text: "normalisation", about: "How messages are normalised by n_i, the sum of the kernel's row.", options: [["symmetric", "norm: symmetric"], ["row", "norm: row"], ["none", "norm: none"]] },
  self_message: { text: "self-message", about: "Whether a pixel sends a message to itself.", options: [[true, "self-msg: on"], [false, "self-msg: off"]] },
  sign: { text: "sign", about: "Whether disagreement is penalised, or (a fault) agreement.", options: [["penalty", "sign: penalty"], ["reward", "sign: wrong"]] },
  double_softmax: { text: "unary from", about: "Whether the unary is made of logits, or (a fault) of probabilities passed as logits.", options: [[false, "unary: logits"], [true, "unary: probabilities"]] },
  normalised_colours: { text: "colours", about: "Grey levels from 0 to 255, or (a fault) colours with mean 0 and standard deviation 1.", options: [[false, "colours: 0–255"], [true, "colours: normalised"]] },
  in_turn: { text: "update", about: "All pixels at once, or one after the other (coordinate descent).", options: [[false, "update: all at once"], [true, "update: in turn"]] },
};
const PRESETS = {
  "as given": {}, "wrong sign": { sign: "reward" }, "double softmax": { double_softmax: true }, "normalised colours": { normalised_colours: true },
};

export const isGraph = (meta) => "coupling" in meta;
const sliders = (meta) => [...(isGraph(meta) ? GRAPH : DENSE), ...BOTH];
const choices = (meta) => (isGraph(meta) ? ["in_turn", "sign", "double_softmax"] : ["normalization", "self_message", "sign", "double_softmax", "normalised_colours"]);
const presets = (meta) => Object.keys(PRESETS).filter((name) => !isGraph(meta) || name !== "normalised colours");

// The settings as one line of Python.
export function python(meta, settings, painted) {
  const n = (v) => String(+v.toPrecision(6)), K = meta.classes.length, given = meta.settings;
  let logits = settings.temperature === 1 ? "logits" : `logits / ${n(settings.temperature)}`;
  if (painted) logits = `torch.where(strokes == 255, ${logits}, probabilities_from_labels(strokes, ${K}, confidence=${n(settings.confidence)}).log())`;
  if (settings.double_softmax) logits = `torch.softmax(${logits}, 0)`;
  const mu = meta.potts ? (settings.sign === "reward" ? "torch.eye(" + K + ")" : null) : settings.sign === "reward" ? "mu.max() - mu" : "mu";
  if (isGraph(meta)) {
    let coupling = settings.scale === 1 ? "coupling" : `${n(settings.scale)} * coupling`;
    if (settings.edges?.length || settings.self_weight !== given.self_weight) coupling = "explorer.coupling";
    return `mean_field${settings.in_turn ? "_in_turn" : ""}(-torch.log_softmax(${logits}, 0).flatten(1).T, ${coupling}, ${mu ?? `1 - torch.eye(${K})`}, ${settings.iterations})`;
  }
  const numbers = ["theta_alpha", "theta_beta", "theta_gamma", "w_bilateral", "w_spatial"].map((key) => `${key}=${n(settings[key])}`);
  const rest = [
    ...(mu ? [`compatibility=${mu}`] : []), ...(settings.normalization === "symmetric" ? [] : [`normalization="${settings.normalization}"`]),
    ...(settings.self_message ? [] : ["self_message=False"]),
  ];
  const image = settings.normalised_colours ? "0.5 + (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True) / 255" : "image";
  return `DenseCRF(${[K, `iterations=${settings.iterations}`, ...numbers, ...rest].join(", ")}).trace(${logits}, ${image})`;
}

const STEPS = 200;
export function slider({ key, text, low, high, linear, half = false, unit = "", about }, get, change) {
  const steps = linear ? (high - low) / linear : STEPS;
  const value = (at) => (linear ? +(low + at * linear).toFixed(6) : +(low * (high / low) ** (at / steps)).toPrecision(3));
  const position = (v) => Math.round(linear ? (v - low) / linear : (steps * Math.log(v / low)) / Math.log(high / low));
  const input = make("input", { type: "range", min: 0, max: steps, step: 1, "aria-label": text, title: about, "data-setting": key,
    oninput: () => change(value(+input.value), false), onchange: () => change(value(+input.value), true) });
  const reading = make("span", { class: "value" });
  const show = () => {
    const v = get();
    input.value = clamp(position(v), 0, steps);
    const digits = linear ? String(v) : number(v).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
    reading.textContent = `${digits} ${unit}`.trim();
    input.setAttribute("aria-valuetext", reading.textContent);
  };
  return { node: make("label", { class: half ? "setting half" : "setting", title: about }, make("span", { class: "name" }, text), input, reading), show };
}

// The settings of one pane as a panel of controls. pane: { meta, settings, change(changes, hard), painted() }.
export function settingsPanel(pane, letter = "") {
  const { meta } = pane, shows = [];
  const add = ({ node, show }) => { shows.push(show); return node; };
  const select = (label, about, options, get, change) => {
    const node = make("select", { "aria-label": label, title: about, onchange: () => change(options[node.selectedIndex][0]) }, ...options.map(([, text]) => make("option", {}, text)));
    shows.push(() => { node.selectedIndex = options.findIndex(([value]) => value === get()); });
    return node;
  };
  const rows = sliders(meta).map((s) => add(slider(s, () => pane.settings[s.key], (v, hard) => pane.change({ [s.key]: v }, hard))));
  const picks = choices(meta).map((key) => select(CHOICES[key].text, CHOICES[key].about, CHOICES[key].options, () => pane.settings[key], (v) => pane.change({ [key]: v }, true)));
  const faults = Object.assign({}, ...Object.values(PRESETS)), keys = Object.keys(faults);
  const current = () => presets(meta).find((name) => keys.every((key) => pane.settings[key] === (PRESETS[name][key] ?? meta.settings[key])));
  picks.push(select("preset", "The settings as they were given, or with one of the course's faults.", presets(meta).map((name) => [name, `preset: ${name}`]), current,
    (name) => pane.change({ ...Object.fromEntries(keys.map((key) => [key, meta.settings[key]])), ...PRESETS[name] }, true)));
  const edges = make("div", { class: "edges" });
  const line = make("code", { class: "python", role: "group", tabindex: 0, "aria-label": "The settings in Python" });
  const copy = make("button", { type: "button", class: "copy-line", title: "Copy this line", "aria-label": `Copy the line of Python${letter && ` of ${letter}`}`, onclick: async () => {
    try { await navigator.clipboard.writeText(line.textContent); copy.classList.add("copied"); setTimeout(() => copy.classList.remove("copied"), 1200); }
    catch { getSelection().selectAllChildren(line); }
  } }, icon("copy"));
  const reset = make("button", { type: "button", class: "reset", "aria-label": `Reset the settings${letter && ` of ${letter}`}`, onclick: () => pane.reset() }, "Reset");
  const node = make("div", { class: "settings" }, make("div", { class: "sliders" }, ...rows), edges, make("div", { class: "choices" }, ...picks)), foot = make("div", { class: "line" }, line, copy, reset);
  let shown = null;
  function show(pixel, width) {
    for (const f of shows) f();
    line.textContent = python(meta, pane.settings, pane.painted());
    if (isGraph(meta)) showEdges(pixel, width);
  }
  // One slider for each coupling of the marked pixel to another one.
  function showEdges([y, x], width) {
    const pixel = y * width + x, N = meta.size[0] * width;
    if (shown?.pixel !== pixel) {
      shown = { pixel, shows: [] };
      const others = [...Array(N).keys()].filter((j) => j !== pixel && (meta.coupling[pixel * N + j] || Math.abs(Math.floor(j / width) - y) + Math.abs((j % width) - x) === 1));
      edges.replaceChildren(...others.map((j) => {
        const s = slider({ key: `edge${j}`, text: `to (${Math.floor(j / width)}, ${j % width})`, low: -5, high: 10, linear: 0.05, about: "The coupling J of these two pixels. Larger: they agree more; negative: they prefer to differ." },
          () => pane.coupling(pixel, j), (v, hard) => pane.changeEdge(pixel, j, v, hard));
        shown.shows.push(s.show);
        return s.node;
      }));
    }
    for (const f of shown.shows) f();
  }
  return { node, foot, show };
}
