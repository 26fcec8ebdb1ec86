"""Every exercise: its solution passes, its stub is "not yet", its planted wrong answers are told apart.

`tests/wrong_answers/nb02.py` holds WRONG = {"02.1": [(wrong_answer, "fragment of the message it must get"), …], …}.
"""

import importlib.util
import math
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pwlib.course import checks

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb"))
HEADING = re.compile(r"^### Exercise (?P<name>\d\d\.\d+) · (?P<title>.+)$", re.M)
EFFORT = re.compile(r"^\*(?P<minutes>\d+) minutes · difficulty (?P<stars>[★☆]{3})\*$", re.M)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"""\bcheck\(\s*["'](?P<name>[\d.]+)["']\s*,\s*(?P<answer>\w+)\s*\)""")


@dataclass
class Printed:
    """An exercise as the notebook prints it; answer: the variable that the check cell hands over."""

    name: str
    text: str
    stub: str = ""
    answer: str = ""
    solution: str = ""


def printed(path: Path) -> dict[str, Printed]:
    """The exercises of a notebook, in order: heading, stub tagged `exercise`, check cell, solution."""
    found: dict[str, Printed] = {}
    current = None
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            if heading := HEADING.search(cell.source):
                current = found[heading["name"]] = Printed(heading["name"], cell.source)
            if current and (solution := SOLUTION.search(cell.source)):
                current.solution, current = solution[1], None
        elif current and "exercise" in cell.metadata.get("tags", []):
            current.stub += cell.source + "\n"
        elif current and (call := CHECK.search(cell.source)):
            assert call["name"] == current.name, f"{path.name}: exercise {current.name} is checked as {call['name']}"
            current.answer = call["answer"]
    return found


def wrong_answers(notebook: str) -> dict[str, list]:
    """WRONG of tests/wrong_answers/nbXX.py, loaded by its path."""
    path = HERE / "wrong_answers" / f"nb{notebook}.py"
    assert path.exists(), f"notebook {notebook} has no planted wrong answers: {path.name} is missing"
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{notebook}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def answer_of(code: str, name: str):
    """What `code` binds to `name`, run with the names every notebook's first cells import."""
    namespace = {"torch": torch, "F": F, "nn": torch.nn, "np": np, "math": math}
    exec(compile(code, "<answer>", "exec"), namespace)
    return namespace[name]


EXERCISES = [(path, exercise) for path in NOTEBOOKS for exercise in printed(path).values()]
each_exercise = pytest.mark.parametrize("path, exercise", EXERCISES, ids=[e.name for _, e in EXERCISES])
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


@each_notebook
def test_notebook_and_checks_have_the_same_exercises(path):
    notebook = path.stem[:2]
    names = list(printed(path))
    assert names == [f"{notebook}.{i + 1}" for i in range(len(names))], "exercises are numbered in order"
    assert len(names) >= 4, "at least four exercises in a notebook"
    assert set(names) == set(checks.exercises(notebook)) == set(wrong_answers(notebook))


@each_exercise
def test_printed_title_and_effort_are_the_registered_ones(path, exercise):
    registered = checks.exercises(path.stem[:2])[exercise.name]
    assert HEADING.search(exercise.text)["title"].strip() == registered.title
    effort = EFFORT.search(exercise.text)
    assert effort, "the line under the heading reads *10 minutes · difficulty ★★☆*"
    assert int(effort["minutes"]) == registered.minutes
    assert effort["stars"] == "★" * registered.difficulty + "☆" * (3 - registered.difficulty)
    assert "<summary>Hint" in exercise.text, "every exercise has a hint"


@each_exercise
def test_solution_passes(path, exercise):
    verdict = checks.check(exercise.name, answer_of(exercise.solution, exercise.answer))
    assert verdict.passed, verdict


@each_exercise
def test_stub_is_not_yet_an_answer(path, exercise):
    verdict = checks.check(exercise.name, answer_of(exercise.stub, exercise.answer))
    assert verdict.passed is None, verdict


@each_exercise
def test_wrong_answers_are_told_apart(path, exercise):
    wrong = wrong_answers(path.stem[:2])[exercise.name]
    assert len(wrong) >= 3, "at least three wrong answers for an exercise"
    messages = []
    for answer, fragment in wrong:
        verdict = checks.check(exercise.name, answer)
        assert verdict.passed is False, f"accepted a wrong answer that should be told {fragment!r}: {verdict}"
        assert fragment in verdict.message, verdict
        messages.append(verdict.message)
    assert len(set(messages)) == len(messages), "each wrong answer gets a message of its own"
