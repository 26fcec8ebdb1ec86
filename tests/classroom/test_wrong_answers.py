"""Every task's tests pass its reference and turn down at least three wrong answers, each told what is wrong with it.

In this process, without nbgrader: the source's cells run in order, and each wrong answer takes its turn in its place.
"""

import matplotlib
import pytest
from students import EACH_LAB, answers, is_task, is_test, marks, source, tasks

from pwlib.course import plots

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(plots, "show", lambda figure, **options: None)


def run(code: str, names: dict) -> str | None:
    """What the code raises, in words."""
    try:
        exec(compile(code, "<cell>", "exec"), names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def until_tested(cells: list, start: int) -> list:
    """The code cells after cells[start], up to the last test before the next task that follows a test."""
    found, last = [], 0
    for cell in cells[start + 1 :]:
        if last and is_task(cell):
            break
        if cell.cell_type == "code":
            found.append(cell)
            last = len(found) if is_test(cell) else last
    return found[:last]


def verdicts(cells: list, start: int, code: str, names: dict) -> list[str]:
    """What is said of `code` in the place of cells[start], by itself and by its tests; names are as before after it."""
    kept = dict(names)
    said = [run(code, names)]
    for cell in until_tested(cells, start):
        words = run(cell.source, names)
        if is_test(cell):
            said.append(words)
    # In place, for functions keep this very mapping as their globals.
    names.clear()
    names.update(kept)
    return [words for words in said if words]


@pytest.mark.parametrize("lab", EACH_LAB)
def test_wrong_answers_are_told_what_is_wrong(lab):
    notebook, wrong = source(lab), answers(lab).WRONG
    assert set(wrong) == set(tasks(notebook))
    names, faults = {"__name__": "__main__"}, []
    last = max(place for place, cell in enumerate(notebook.cells) if is_test(cell))
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        task = marks(cell).get("grade_id") if is_task(cell) else None
        for number, (code, words) in enumerate(wrong.get(task, [])):
            said = verdicts(notebook.cells, place, code, names)
            if not said:
                faults.append(f"{task}: wrong answer {number} passes")
            elif not any(words in sentence for sentence in said):
                faults.append(f"{task}: wrong answer {number} is told {said}, not {words!r}")
            elif "of your own" in words and len(said) < sum(map(is_test, until_tested(notebook.cells, place))):
                faults.append(f"{task}: wrong answer {number}, which calls pwlib, passes one of the tests")
        if task in wrong and len(wrong[task]) < 3:
            faults.append(f"{task}: only {len(wrong[task])} wrong answers")
        # What comes after the last test is the cycle's to run.
        if place <= last and (words := run(cell.source, names)):
            faults.append(f"{marks(cell).get('grade_id', place)}: the reference ends with {words}")
    assert not faults, "\n".join(faults)
