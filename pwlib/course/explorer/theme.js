// Light or dark, as the page around: JupyterLab, VS Code, Colab and Sphinx say so; elsewhere the text's colour does.
function isDark(el) {
  const { body, documentElement: html } = document;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  if (body.classList.contains("vscode-dark") || body.classList.contains("vscode-high-contrast")) return true;
  if (body.classList.contains("vscode-light")) return false;
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
