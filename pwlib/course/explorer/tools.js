// Colours, numbers and elements.

// Colour maps for any colour vision, 33 stops of matplotlib's: viridis for probability mass, cividis for energies.
export const MAPS = {
  viridis: "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c1f988b1fa08822a78528ae8032b67a3fbc734ec36b5ec96270cf5784d44b98d83eaddc30c2df23d8e219ece51bfde725",
  cividis: "00224e00285b002e6a0533711a386f273e6e32436d3b496c434e6c4b546c535a6d5a5f6e61656f686a716f70737676767d7c788482798c8878938e789b9476a39a74aba072b4a76fbcae6cc4b468cdbb63d5c25edec958e7d150f0d846f9e03afee838",
};
// For differences: vermilion below zero, blue above it.
MAPS.difference = ["b34700", "f7f7f7", "1f6fb2"].join("");
export const rgb = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
export const TABLES = {};
for (const [name, hex] of Object.entries(MAPS)) {
  const stops = hex.match(/.{6}/g).map(rgb), last = stops.length - 1;
  TABLES[name] = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * last, k = Math.min(Math.floor(at), last - 1);
    return stops[k].map((v, ch) => Math.round(v + (at - k) * (stops[k + 1][ch] - v)));
  });
}
export const gradient = (name) => `linear-gradient(to right, ${MAPS[name].match(/.{6}/g).map((c) => "#" + c).join()})`;

export const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const minus = (text) => text.replace("-", "−");
export function number(v, digits = 4) { // about as many digits, whatever the size
  if (v === null || v === undefined || Number.isNaN(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size < 5e-4) return minus(v.toExponential(0));
  if (size >= 1e5) return minus(v.toExponential(3));
  if (digits < 4) return minus(size < 0.01 ? v.toExponential(0) : String(+v.toPrecision(digits)));
  return minus(v.toFixed(size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0));
}

export function make(tag, attributes = {}, ...children) {
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
  step: "M9 5l7 7-7 7", last: "M18 5v14M5 5l10 7-10 7z", warn: "M12 3 22 20H2zM12 10v5M12 17.5v.5", copy: "M8 8h12v12H8zM4 16V4h12",
};
export const icon = (name) => make("svg", { viewBox: "0 0 24 24", "aria-hidden": "true", class: `icon ${name}` },
  make("path", { d: ICONS[name] }));

