"""The rules for stored notebooks find planted faults, and so does running a notebook with nbval."""

import copy
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import budgets
import nbformat
import pytest
from notebook_rules import (
    ROOT,
    WIDGET,
    Printed,
    code_cells,
    exercises,
    faults,
    lab_faults,
    resolves,
    tags,
)

from pwlib.course.checks import Exercise


@pytest.fixture
def first():
    """Notebook 00, for a test to change."""
    return nbformat.read(ROOT / "notebooks" / "00_why_structure.ipynb", as_version=4)


# ----------------------------------------------------------------------------------- faults in a stored notebook


def figure_cell(notebook):
    return next(c for c in code_cells(notebook) if any("image/png" in o.get("data", {}) for o in c.outputs))


def not_executed(notebook):
    code_cells(notebook)[5].execution_count = None


def out_of_order(notebook):
    cells = code_cells(notebook)
    cells[4].execution_count, cells[5].execution_count = cells[5].execution_count, cells[4].execution_count


def stored_exception(notebook):
    error = nbformat.v4.new_output("error", ename="KeyError", evalue="'paint'", traceback=[])
    code_cells(notebook)[3].outputs.append(error)


def figure_without_alt(notebook):
    cell = figure_cell(notebook)
    next(o for o in cell.outputs if "image/png" in o.get("data", {})).metadata = nbformat.NotebookNode()


def figure_with_an_empty_alt(notebook):
    cell = figure_cell(notebook)
    next(o for o in cell.outputs if "image/png" in o.get("data", {})).metadata["image/png"]["alt"] = "figure"


def widget_without_picture(notebook):
    for cell in code_cells(notebook):
        cell.outputs = []
    view = nbformat.v4.new_output("display_data", data={WIDGET: {"model_id": "1"}})
    code_cells(notebook)[3].outputs = [view]


def write(text):
    def plant(notebook):
        notebook.cells[0].source += text

    return plant


def run(code):
    def plant(notebook):
        code_cells(notebook)[2].source += code

    return plant


def shows(text, name="stdout"):
    def plant(notebook):
        code_cells(notebook)[3].outputs.append(nbformat.v4.new_output("stream", name=name, text=text))

    return plant


def without(pattern, instead=""):
    def plant(notebook):
        for cell in notebook.cells:
            cell.source = re.sub(pattern, instead, cell.source)

    return plant


@pytest.mark.parametrize(
    "plant, fault",
    [
        (not_executed, "was not executed"),
        (out_of_order, "out of order"),
        (stored_exception, "ended with KeyError"),
        (figure_without_alt, "figure without alt text"),
        (figure_with_an_empty_alt, "figure without alt text"),
        (widget_without_picture, "no static figure"),
        (write("\n![](https://example.org/a.png)"), "image without alt text"),
        (write('\n<img src="a.png">'), "<img> without alt text"),
        (write("\n[next](99_nowhere.ipynb)"), "99_nowhere.ipynb, which does not exist"),
        (write("\n[there](#No-such-heading)"), "#No-such-heading, which does not exist"),
        (write("\nsee `pwlib.crf.SparseCRF`"), "pwlib.crf.SparseCRF, which does not exist"),
        (write("\nsee `pwlib.crf.DenseCRF.log_v`"), "log_v, which does not exist"),
        (write("\nsee `pwlib/crfs.py`"), "the file pwlib/crfs.py"),
        (write("\n\n```python\nfrom pwlib.crf import TreeCRF\n```"), "pwlib.crf.TreeCRF"),
        (run("\nfrom pwlib import nothing"), "pwlib.nothing, which does not exist"),
        (run("\nimport pwlib.nowhere"), "pwlib.nowhere, which does not exist"),
        (run("\ndata.unload('scenes')"), "data.unload, which does not exist"),
        (shows("/home/me/pwlib/notebooks"), "path of the machine"),
        (shows("x" * 2_000_000), "expected at most 1.5"),
        (shows("UserWarning: no", "stderr"), "shows a warning"),
        (without("What to remember"), "no part 'What to remember'"),
        (without("except ImportError", "finally"), "not the one about installing pwlib"),
        (without("^# 00.*"), "not the title"),
        (write("\n" + "wide " * 20), "a line of 100 characters; expected at most 90"),
        (run("\nx = 1" * 30), "lines; expected at most 25"),
        (run("\nplots.show(figure, alt='a figure')"), "contains an alt text"),
        (shows("-" * 91), "prints a line of 91 characters"),
        (write("\nA pixel\nhears its neighbours."), "uses 'pixel hears'"),
        (run("\nx = 1  # every friend"), "uses 'friend'"),
        (without("## Weekend project"), "no section ## Weekend project"),
        (without("## Further reading", "## Quick questions"), "in the order What to remember, Quick questions"),
        (without("(?m)^- D\\. .*"), "question 1 has the options"),
        (without("<summary>Answer", "<summary>Hint"), "question 2 has no answer that explains"),
        (without("Question 3"), "has 2 quick questions; expected three"),
        (without(r"Time\.\*\* \d+", "Time.** 5"), "states 5 minutes; its text and exercises take"),
    ],
)
def test_a_planted_fault_is_found(first, plant, fault):
    before = faults(first, "00_why_structure")
    plant(first)
    assert any(fault in found for found in faults(first, "00_why_structure") if found not in before)


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("{}", True),
        ("### BEGIN HIDDEN TESTS\n{}\n### END HIDDEN TESTS", False),
        ("def answer():\n    ### BEGIN SOLUTION\n    {}\n    ### END SOLUTION", False),
    ],
)
def test_the_style_of_a_lab_is_that_of_what_students_see(cell, found):
    wide = cell.format("number = 0  # " + "-" * 90)
    lab = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(wide, execution_count=1)])
    assert any("expected at most 90" in fault for fault in lab_faults(lab, "lab9")) == found


@pytest.mark.parametrize("name", ["pwlib.VOID", "pwlib.crf.Trace.q", "pwlib.crf.DenseCRF.log_w", "pwlib.data.palettes"])
def test_names_that_exist_resolve(name):
    assert resolves(name)


def test_an_exercise_that_differs_from_its_check_is_found(first):
    registered = {"00.1": Exercise("00.1", "Paint", 5, 1, None)}
    text = "### Exercise 00.1 · Paint\n\n*5 minutes · difficulty ★☆☆*\n\n<details><summary>Hint</summary>"
    assert not list(Printed("00.1", text, checked="00.1").faults(registered))
    for old, new, fault in [
        ("Paint", "Draw", "is not called 'Paint'"),
        ("5 minutes", "15 minutes", "lacks the line"),
        ("★☆☆", "★★☆", "lacks the line"),
        ("Hint", "Help", "no hint"),
    ]:
        assert any(
            fault in found for found in Printed("00.1", text.replace(old, new), checked="00.1").faults(registered)
        )
    assert list(Printed("00.1", text, checked="00.2").faults(registered)) == ["is checked as '00.2'"]
    assert list(exercises(first)) == ["00.1", "00.2", "00.3", "00.4", "00.5"]


def test_a_slow_notebook_is_over_budget():
    budget = {"00": {"cpu_minutes": 1.0, "gpu_minutes": 0.1}}
    assert not budgets.over_budget({"00": 100.0}, budget, "cpu")
    assert "00 took 400 s" in budgets.over_budget({"00": 400.0}, budget, "cpu")[0]
    assert "00 took 100 s" in budgets.over_budget({"00": 100.0}, budget, "gpu")[0]
    assert "no budget" in budgets.over_budget({"01": 1.0}, budget, "cpu")[0]


# -------------------------------------------------------------------------------- faults in a notebook that is run


@pytest.mark.slow
def test_running_a_notebook_finds_an_exception_and_a_changed_number(first, tmp_path):
    """nbval, called as in `make notebooks`, on two cells of notebook 00: unchanged, and with a planted fault."""
    verdict = [c for c in code_cells(first) if "nbval-check-output" in tags(c)][-1]
    first.cells = [code_cells(first)[1], verdict]
    changed = {"sound": first}
    for name in ("raises", "number", "untagged"):
        changed[name] = copy.deepcopy(first)
    changed["raises"].cells[0].source += "\nraise KeyError('planted')"
    number = re.compile(r"\d\.\d")
    for name in ("number", "untagged"):
        output = changed[name].cells[1].outputs[0]
        assert number.search(output.text), "the cell's output has no number to change"
        output.text = number.sub("0.7", output.text, count=1)
    changed["untagged"].cells[1].metadata.tags = []
    for name, notebook in changed.items():
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "--junitxml=report.xml", "-q"]
    options += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval.cfg"), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "pytest", *options, "."], cwd=tmp_path, env=environment, capture_output=True)
    failed = {}
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        failed.setdefault(case.get("classname").removesuffix(".ipynb").split(".")[-1], []).append(
            case.find("failure") is not None
        )
    assert failed == {"sound": [False, False], "raises": [True, False], "number": [False, True],
                      "untagged": [False, False]}  # fmt: skip
