"""A small lab through a term: deadline, late work, unchanged and single submissions, tables of grades, feedback."""

import csv
import os
import re
import subprocess
from datetime import datetime, timezone

import pytest
from nbformat.v4 import new_markdown_cell
from students import NBGRADER, call, put
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


def test_marks_given_by_hand_stay_when_an_unchanged_submission_is_graded_again(course, tmp_path):
    """The penalty is computed from all points: the guide has the lab graded again after the written answers."""
    install(course, small_lab())
    assert call(course, "release", "lab9", "--due", "2030-01-10 13:00 +01:00").stdout.endswith(
        "(due 2030-01-10 12:00 UTC)\n"
    )
    submission = clean()
    submission.cells[1].source, submission.cells[3].source = RIGHT, "Adding is cheap."
    put(submission, tmp_path, "ada", "lab9")
    os.utime(tmp_path / "ada" / "lab9.ipynb", (DUE + HOUR,) * 2)
    assert "ada lab9 4/5, 0.4 off for lateness (an answer" in call(course, "grade", str(tmp_path)).stdout
    by_hand = f"""
from nbgrader.api import Gradebook
with Gradebook("sqlite:///{course / "gradebook.db"}") as gradebook:
    grade = gradebook.find_grade("why", "lab9", "lab9", "ada")
    grade.manual_score, grade.needs_manual_grade = 1, False
    gradebook.db.commit()
"""
    subprocess.run([NBGRADER, "-c", by_hand], check=True)
    assert "ada lab9 5/5, 0.5 off for lateness\n" in call(course, "grade", str(tmp_path), "--again").stdout
    assert call(course, "export").returncode == 0
    assert table(course / "grades-moodle.csv")[1] == ["ada", "4.5"]
    submission.cells[3].source = "Another answer."
    put(submission, tmp_path, "ada", "lab9")
    os.utime(tmp_path / "ada" / "lab9.ipynb", (DUE + HOUR,) * 2)
    assert "(an answer waits" in call(course, "grade", str(tmp_path)).stdout


def test_a_time_that_is_none_is_refused(lab9):
    for due in ("next week", "05.11.2030 18:00", "2030-11-28", "2030-11-28 18:00", "2030-11-28 18:00 PST"):
        done = call(lab9, "release", "--due", due)
        assert done.returncode and f"DUE is {due!r}; expected a time and its zone" in done.stderr
