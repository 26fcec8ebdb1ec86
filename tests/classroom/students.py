"""Made-up students: their submissions, made from the released labs and the answers of lab1.py, lab2.py, …"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "notebooks" / "labs"
NBGRADER = ROOT / ".venv-classroom" / "bin" / "python"
LABS = sorted(path.stem for path in (COURSE / "source").glob("lab*/lab*.ipynb") if path.parent.name == path.stem)
# One worker runs all tests of one lab, so that its course is released and graded once.
EACH_LAB = [pytest.param(lab, marks=pytest.mark.xdist_group(lab)) for lab in LABS]


def source(lab: str) -> nbformat.NotebookNode:
    return nbformat.read(COURSE / "source" / lab / f"{lab}.ipynb", 4)


def answers(lab: str) -> ModuleType:
    return importlib.import_module(lab)


def marks(cell) -> dict:
    """What nbgrader knows about a cell: grade_id, points, solution, …; empty for a cell of no interest to it."""
    return cell.metadata.get("nbgrader", {})


def is_task(cell) -> bool:
    return cell.cell_type == "code" and bool(marks(cell).get("solution"))


def is_test(cell) -> bool:
    return cell.cell_type == "code" and bool(marks(cell).get("grade")) and not marks(cell).get("solution")


def by_hand(cell) -> bool:
    return cell.cell_type == "markdown" and bool(marks(cell).get("points"))


def tasks(notebook) -> list[str]:
    """The grade_ids of the answers that a test cell follows."""
    found, waiting = [], []
    for cell in notebook.cells:
        if is_task(cell):
            waiting.append(marks(cell)["grade_id"])
        elif is_test(cell):
            found += waiting
            waiting = []
    return found


def hand_in(released, codes: dict[str, str], written: str | None = None):
    """A copy of the released lab with these answers by grade_id, and `written` in what is graded by hand."""
    notebook = copy.deepcopy(released)
    known = {marks(cell).get("grade_id"): cell for cell in notebook.cells}
    for grade_id, code in codes.items():
        known[grade_id].source = code.strip("\n")
    for cell in notebook.cells:
        if written and by_hand(cell) and marks(cell)["solution"]:
            cell.source = written
    return notebook


def reference(lab: str) -> dict[str, str]:
    return {marks(cell)["grade_id"]: cell.source for cell in source(lab).cells if is_task(cell)}


def make_course(folder: Path, labs: list[str]) -> Path:
    generated = ("release", "submitted", "autograded", "feedback", "source", "gradebook.db", "__pycache__", ".*")
    shutil.copytree(COURSE, folder, ignore=shutil.ignore_patterns(*generated))
    for lab in labs:
        shutil.copytree(COURSE / "source" / lab, folder / "source" / lab)
    return folder


def put(notebook, folder: Path, student: str, lab: str) -> None:
    (folder / student).mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / student / f"{lab}.ipynb")


def call(course: Path, *command: str, seconds: float = 1500, **environment: str) -> subprocess.CompletedProcess:
    """course.py of a copy of the course, as make calls it."""
    environment = {**os.environ, "LAB_PYTHON": sys.executable, **environment}
    script = course / "grading" / "course.py"
    return subprocess.run(
        [NBGRADER, script, *command], env=environment, capture_output=True, text=True, timeout=seconds
    )
