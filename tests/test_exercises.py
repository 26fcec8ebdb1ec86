"""Every exercise: its solution passes, its stub is "not yet", and each planted wrong answer gets its own message.

`tests/wrong_answers/nb02.py` defines WRONG = {"02.1": [(wrong_answer, "part of the message it must get"), …], …}.
"""

import importlib.util
import math
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from notebook_rules import exercises

from pwlib.course import checks

HERE = Path(__file__).parent
NOTEBOOKS = {path.stem[:2]: nbformat.read(path, 4) for path in sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb"))}


def wrong_answers(notebook: str) -> dict[str, list]:
    """Return WRONG of tests/wrong_answers/nbXX.py."""
    path = HERE / "wrong_answers" / f"nb{notebook}.py"
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{notebook}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def answer_of(code: str, name: str):
    """Run an answer with the imports of every notebook's first cells, and return its variable `name`."""
    namespace = {"torch": torch, "F": F, "nn": torch.nn, "np": np, "math": math}
    exec(compile(code, "<answer>", "exec"), namespace)
    return namespace[name]


EXERCISES = [exercise for notebook in NOTEBOOKS.values() for exercise in exercises(notebook).values()]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=[exercise.name for exercise in EXERCISES])


@each_exercise
def test_solution_passes(exercise):
    verdict = checks.check(exercise.name, answer_of(exercise.solution, exercise.answer))
    assert verdict.passed, verdict


@each_exercise
def test_stub_is_not_yet_an_answer(exercise):
    verdict = checks.check(exercise.name, answer_of(exercise.stub, exercise.answer))
    assert verdict.passed is None, verdict


@each_exercise
def test_each_wrong_answer_gets_its_own_message(exercise):
    wrong = wrong_answers(exercise.name[:2])[exercise.name]
    assert len(wrong) >= 3, "at least three wrong answers for an exercise"
    messages = []
    for answer, fragment in wrong:
        verdict = checks.check(exercise.name, answer)
        assert verdict.passed is False, f"accepted a wrong answer that should be told {fragment!r}: {verdict}"
        assert fragment in verdict.message, verdict
        messages.append(verdict.message)
    assert len(set(messages)) == len(messages), "each wrong answer gets a message of its own"
