// Light or dark, as the page around: JupyterLab, VS Code, Colab and Sphinx say so; elsewhere the text's colour does.
function isDark(el) {
  const { body, documentElement: html } = document;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  const code = body.dataset.vscodeThemeKind ?? body.className; // a light theme of high contrast has the classes of both
  if (/vscode-(high-contrast-)?light/.test(code)) return false;
  if (/vscode-(dark|high-contrast)/.test(code)) return true;
  const said = html.dataset.theme ?? html.getAttribute("theme");
  if (said === "dark" || said === "light") return said === "dark";
  const text = getComputedStyle(el).color.match(/[\d.]+/g).map(Number);
  return 0.299 * text[0] + 0.587 * text[1] + 0.114 * text[2] > 127;
}

// Keeps frame's data-theme as the page's; returns what ends that.
export function followTheme(el, frame) {
  const look = () => { frame.dataset.theme = isDark(el) ? "dark" : "light"; };
  const observer = new MutationObserver(look), system = matchMedia("(prefers-color-scheme: dark)");
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true });
  system.addEventListener("change", look);
  look();
  return () => { observer.disconnect(); system.removeEventListener("change", look); };
}
