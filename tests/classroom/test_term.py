"""A small lab through a term: deadline, late work, unchanged and single submissions, tables of grades, feedback."""

import csv
import os
import re
from datetime import datetime, timezone

import pytest
from nbformat.v4 import new_markdown_cell
from students import call, put
from test_release import clean, install, small_lab

DUE = datetime(2030, 1, 10, 12, tzinfo=timezone.utc).timestamp()
RIGHT = "import pwlib\n\ndef double(number):\n    return number + number"
WRONG = "def double(number):\n    return number"
TASK = "## Task 1 · Doubling (4 points)\n\nAs in $x + x$."
HOUR = 3600


@pytest.fixture
def lab9(course):
    """A course whose lab9 is released with a deadline."""
    lab = small_lab()
    lab.cells.insert(1, new_markdown_cell(TASK))
    lab.cells = [cell for cell in lab.cells if cell.cell_type == "code" or "nbgrader" not in cell.metadata]
    install(course, lab)
    done = call(course, "release", "lab9", "--due", "2030-01-10 12:00 UTC")
    assert done.returncode == 0, done.stderr
    return course


def hand_in(folder, student, code, seconds_late):
    submission = clean()
    submission.cells = [cell for cell in submission.cells if cell.metadata.get("nbgrader", {}).get("grade_id") != "why"]
    submission.cells[1].source = code
    submission.cells.insert(1, new_markdown_cell(TASK))
    put(submission, folder, student, "lab9")
    os.utime(folder / student / "lab9.ipynb", (DUE + seconds_late,) * 2)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_term(lab9, tmp_path):
    work, other = tmp_path / "handed_in", tmp_path / "other" / "pwlib"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    hand_in(work, "ada", RIGHT, -HOUR)
    hand_in(work, "bob", RIGHT, 25 * HOUR)
    hand_in(work, "cyd", WRONG, 100)

    # The kernel does not get the teacher's PYTHONPATH: it must be allowed to read the pwlib that it finds itself.
    done = call(lab9, "grade", str(work), "--student", "bob", "--lab", "lab9", PYTHONPATH=str(other.parent))
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == ["bob lab9 4/4, 0.8 off for lateness"], done.stderr
    done = call(lab9, "grade", str(work))
    assert done.stdout.splitlines()[1:] == [
        "ada lab9 4/4",
        "bob lab9 4/4, 0.8 off for lateness, unchanged",
        "cyd lab9 0/4",
    ]
    hand_in(work, "cyd", RIGHT, 11 * 24 * HOUR)
    done = call(lab9, "grade", str(work))
    assert [line.endswith("unchanged") for line in done.stdout.splitlines()[1:]] == [True, True, False]
    assert "cyd lab9 4/4, 4 off for lateness" in done.stdout
    done = call(lab9, "grade", str(work), "--student", "ada", "--again")
    assert done.stdout.splitlines()[1:] == ["ada lab9 4/4"]

    assert call(lab9, "export").returncode == 0
    assert table(lab9 / "grades-moodle.csv") == [["username", "lab9"], ["ada", "4"], ["bob", "3.2"], ["cyd", "0"]]
    canvas = table(lab9 / "grades-canvas.csv")
    assert canvas[0] == ["Student", "ID", "SIS Login ID", "Section", "lab9"] and canvas[1][0] == "Points Possible"
    assert [(row[2], row[4]) for row in canvas[1:]] == [("", "4"), ("ada", "4"), ("bob", "3.2"), ("cyd", "0")]
    assert len(table(lab9 / "grades.csv")) == 4

    assert call(lab9, "feedback").returncode == 0
    page = (lab9 / "feedback" / "bob" / "lab9" / "lab9.html").read_text("utf-8")
    assert "Task 1 · Doubling" in page and "Test cell" not in page
    assert "Late submission penalty (Score: -0.8)" in page
    assert not re.search(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//', page), (
        "the page asks another host"
    )


def test_a_changed_lab_is_graded_again(lab9, tmp_path):
    hand_in(tmp_path, "ada", RIGHT, -HOUR)
    assert call(lab9, "grade", str(tmp_path)).returncode == 0
    source = lab9 / "source" / "lab9" / "lab9.ipynb"
    source.write_text(source.read_text("utf-8").replace("double(-3.5) == -7.0", "double(-3.5) == 7.0"), "utf-8")
    assert call(lab9, "release").returncode == 0
    assert "ada lab9 0/4\n" in call(lab9, "grade", str(tmp_path)).stdout


def test_a_time_that_is_none_is_refused(lab9):
    done = call(lab9, "release", "--due", "next week")
    assert done.returncode and "DUE is 'next week'; expected a time such as" in done.stderr
