"""Run notebooks and store them so that running one again without a change gives no diff but for what it measures.

    execute.py notebooks/00_why_structure.ipynb …    run in the quick profile on the CPU, then normalise
    execute.py --normalise FILE …                    only normalise what is stored

Normalised: printed text arrives in pieces whose number depends on timing, and is joined; times of execution and what
only one machine knows are removed; the random names of widgets are replaced by numbered ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NAME = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
WIDGETS = "application/vnd.jupyter.widget-state+json"
KEPT = {"kernelspec", "widgets"}


def join_streams(outputs: list) -> list:
    """Join neighbouring pieces of one stream, and keep what a carriage return leaves of a line."""
    joined: list = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
    return joined


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of the notebook without what changes from run to run."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict({k: v for k, v in notebook.metadata.items() if k in KEPT})
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
    names = widget_names(notebook)
    text = NAME.sub(lambda name: names.get(name[0], name[0]), nbformat.writes(notebook))
    return nbformat.reads(text, 4)


def widget_names(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Numbered names for the widgets' models: first those that cells show, each followed by those it refers to."""
    models = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    text = {name: json.dumps(model, sort_keys=True) for name, model in models.items()}
    shown = NAME.findall(json.dumps(notebook.cells))
    # Models that no cell shows come in the order of their contents without names.
    waiting = [*shown, *sorted(models, key=lambda name: NAME.sub("", text[name]))][::-1]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in models and name not in found:
            found[name] = f"{len(found):032x}"
            waiting += NAME.findall(text[name])[::-1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--normalise", action="store_true", help="do not run them")
    options = parser.parse_args()
    os.environ.setdefault("PWLIB_PROFILE", "quick")
    for path in options.notebooks:
        notebook = nbformat.read(path, 4)
        if not options.normalise:
            print(f"running {path}", flush=True)
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
        path.write_text(nbformat.writes(normalise(notebook)) + "\n", "utf-8", newline="\n")


if __name__ == "__main__":
    main()
