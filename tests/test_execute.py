"""`docs/execute.py`: a notebook that is run twice is stored twice the same."""

import runpy
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_rules import ROOT

SCRIPT = ROOT / "docs" / "execute.py"
PRINTS = """
import sys, time
for i in range(4):
    print(i, flush=True)
    time.sleep(0.05 * (i % 2))
    print("half\\rwhole", flush=True)
print("to the other stream", file=sys.stderr)
print("end")"""
WIDGETS = """
from ipywidgets import HBox, IntSlider
HBox([IntSlider(3), IntSlider(4)])"""


@pytest.mark.slow
def test_a_second_run_changes_nothing(tmp_path):
    path = tmp_path / "twice.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_markdown_cell("# Twice\n\nA text."), new_code_cell(PRINTS), new_code_cell(WIDGETS)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, "odd": 1}), path)
    runs = []
    for _ in range(2):
        subprocess.run([sys.executable, SCRIPT, path], check=True, capture_output=True)
        runs.append(path.read_bytes())
    assert runs[0] == runs[1]
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    texts = [(output.name, output.text) for output in notebook.cells[1].outputs]
    assert ("stderr", "to the other stream\n") in texts
    printed = "".join(text for name, text in texts if name == "stdout")
    assert printed == "".join(f"{i}\nwhole\n" for i in range(4)) + "end\n"
    view = notebook.cells[2].outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]
    state = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    children = [name.removeprefix("IPY_MODEL_") for name in state[view]["state"]["children"]]
    assert [state[child]["state"]["value"] for child in children] == [3, 4], "renamed widgets find one another"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "widgets"}


def test_normalising_again_changes_nothing():
    pytest.importorskip("nbclient")
    normalise = runpy.run_path(str(SCRIPT))["normalise"]
    for path in sorted((ROOT / "notebooks").glob("0[03]*.ipynb")):
        once = normalise(nbformat.read(path, 4))
        assert normalise(once) == once
        stored = nbformat.read(path, 4)
        assert [cell.source for cell in once.cells] == [cell.source for cell in stored.cells]
