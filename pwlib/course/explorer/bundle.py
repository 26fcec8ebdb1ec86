"""The explorer's script: the ES modules of this folder joined into one, for widgets and for pages without a kernel."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
# A module stands after those that it imports from.
MODULES = (
    "tools", "theme", "meanfield", "traces", "computer", "settings", "painting", "panels", "numbers", "pane", "main"
)  # fmt: skip
IMPORT = re.compile(r"^import \{([^}]*)\} from \"\./(\w+)\.js\";\n", re.M)


@functools.cache
def script() -> str:
    """Join the style and all modules without comments and indentation; the last line is `export default { render };`.

    Raises ValueError for an import that does not name what an earlier module exports.
    """
    exported: dict[str, set[str]] = {}
    style = re.sub(r"/\*.*?\*/", "", (HERE / "explorer.css").read_text("utf-8"), flags=re.S)
    parts = [f"const CSS = {json.dumps(' '.join(style.split()))};"]
    for module in MODULES:
        text = (HERE / f"{module}.js").read_text("utf-8")
        for names, source in IMPORT.findall(text):
            missing = {name.strip() for name in names.split(",")} - exported.get(source, set())
            if missing:
                raise ValueError(f"{module}.js imports {', '.join(sorted(missing))}, which {source}.js does not export")
        exported[module] = set(re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", text, re.M))
        text = re.sub(r"^export (?!default)", "", IMPORT.sub("", text), flags=re.M)
        lines = (line.strip() for line in text.splitlines())
        parts += [line for line in lines if line and not line.startswith("//")]
    return "\n".join(parts) + "\n"


LOADER = """// The mean-field explorer (pwlib/course/explorer), gzipped: every widget of a notebook stores its script.
const code = "CODE";
async function load() {
  const zipped = Uint8Array.from(atob(code), (c) => c.charCodeAt(0));
  const text = await new Response(new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  return (await import(url)).default;
}
export default {
  async render(context) {
    globalThis.NAME ??= load();
    return (await globalThis.NAME).render(context);
  },
};
"""


@functools.cache
def loader() -> str:
    """Return a module that unpacks `script()` in the browser: less than half its size."""
    code = gzip.compress(script().encode(), 9, mtime=0)
    name = "pwlibExplorer" + hashlib.sha256(code).hexdigest()[:8]
    return LOADER.replace("CODE", base64.b64encode(code).decode()).replace("NAME", name)
