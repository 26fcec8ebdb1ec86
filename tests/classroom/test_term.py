"""A small lab through a term: deadline, late work, unchanged and single submissions, tables of grades, feedback."""

import csv
import os
import re
import subprocess
import zipfile
from datetime import datetime, timezone

import nbformat
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
    bob = "bob lab9: 3.2 of 4 points (4 reached, minus 0.8 for lateness)"
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == [bob], done.stderr
    done = call(lab9, "grade", str(work))
    assert done.stdout.splitlines()[1:] == [
        "ada lab9: 4 of 4 points",
        f"{bob}, unchanged",
        "cyd lab9: 0 of 4 points",
    ]
    hand_in(work, "cyd", RIGHT, 11 * 24 * HOUR)
    done = call(lab9, "grade", str(work))
    assert [line.endswith("unchanged") for line in done.stdout.splitlines()[1:]] == [True, True, False]
    assert "cyd lab9: 0 of 4 points (4 reached, minus 4 for lateness)" in done.stdout
    done = call(lab9, "grade", str(work), "--student", "ada", "--again")
    assert done.stdout.splitlines()[1:] == ["ada lab9: 4 of 4 points"]

    assert call(lab9, "export").returncode == 0
    assert table(lab9 / "grades-moodle.csv") == [["username", "lab9"], ["ada", "4"], ["bob", "3.2"], ["cyd", "0"]]
    canvas = table(lab9 / "grades-canvas.csv")
    assert canvas[0] == ["Student", "ID", "SIS Login ID", "Section", "lab9"] and canvas[1][0] == "Points Possible"
    assert [(row[2], row[4]) for row in canvas[1:]] == [("", "4"), ("ada", "4"), ("bob", "3.2"), ("cyd", "0")]
    assert len(table(lab9 / "grades.csv")) == 4

    assert call(lab9, "feedback").returncode == 0
    assert [path.name for path in (lab9 / "feedback" / "bob" / "lab9").iterdir()] == ["lab9.html"]
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
    assert "ada lab9: 0 of 4 points\n" in call(lab9, "grade", str(tmp_path)).stdout


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
    said = call(course, "grade", str(tmp_path)).stdout
    assert "3.6 of 5 points (4 reached, minus 0.4 for lateness; the written answer is not graded yet)" in said
    by_hand = f"""
from nbgrader.api import Gradebook
with Gradebook("sqlite:///{course / "gradebook.db"}") as gradebook:
    grade = gradebook.find_grade("why", "lab9", "lab9", "ada")
    grade.manual_score, grade.needs_manual_grade = 1, False
    gradebook.db.commit()
"""
    subprocess.run([NBGRADER, "-c", by_hand], check=True)
    said = call(course, "grade", str(tmp_path), "--again").stdout
    assert "ada lab9: 4.5 of 5 points (5 reached, minus 0.5 for lateness)\n" in said
    assert call(course, "export").returncode == 0
    assert table(course / "grades-moodle.csv")[1] == ["ada", "4.5"]
    submission.cells[3].source = "Another answer."
    put(submission, tmp_path, "ada", "lab9")
    os.utime(tmp_path / "ada" / "lab9.ipynb", (DUE + HOUR,) * 2)
    assert "the written answer is not graded yet" in call(course, "grade", str(tmp_path)).stdout


def test_a_time_that_is_none_is_refused(lab9):
    for due in ("next week", "05.11.2030 18:00", "2030-11-28", "2030-11-28 18:00", "2030-11-28 18:00 PST"):
        done = call(lab9, "release", "--due", due)
        assert done.returncode and f"DUE is {due!r}; expected a time and its zone" in done.stderr


def test_the_feedbacks_table_of_contents_names_the_tasks(course, tmp_path):
    lab, submission = small_lab(), clean()
    submission.cells[1].source, submission.cells[3].source = RIGHT, "## Task 8 · My own heading\n\nAdding is cheap."
    for notebook in (lab, submission):
        notebook.cells.insert(3, new_markdown_cell("## Task 2 · In writing (1 point)\n\nIs `double` fast?"))
        notebook.cells.insert(1, new_markdown_cell(TASK))
    install(course, lab)
    assert call(course, "release", "lab9").returncode == 0
    put(submission, tmp_path, "ada", "lab9")
    assert call(course, "grade", str(tmp_path)).returncode == 0
    comments = f"""
from nbgrader.api import Gradebook
with Gradebook("sqlite:///{course / "gradebook.db"}") as gradebook:
    for cell in ("double", "why"):
        gradebook.find_comment(cell, "lab9", "lab9", "ada").manual_comment = "Well done."
    gradebook.db.commit()
"""
    subprocess.run([NBGRADER, "-c", comments], check=True)
    assert call(course, "feedback", "lab9").stdout.endswith("lab9.html (the written answer is not graded yet)\n")
    page = (course / "feedback" / "ada" / "lab9" / "lab9.html").read_text("utf-8")
    assert "Is <code>double</code> fast?" in page
    contents = re.search(r'<div id="toc">(.*?)</div>', page, re.S)[1]
    assert re.findall(r'<a href="#([^"]*)">([^<]*)</a>', contents) == [
        ("comment-double", "Comment on Task 1 · Doubling"),
        ("test_double", "Task 1 · Doubling"),
        ("why", "Task 2 · In writing"),
        ("comment-why", "Comment on Task 2 · In writing"),
    ]


def test_archives_of_moodle_and_canvas_are_sorted_by_number(course, tmp_path):
    """Two students may have the same name: the number in the name of a file tells them apart."""
    install(course, small_lab())
    assert call(course, "release", "lab9").returncode == 0
    folder = course / "downloaded" / "lab9" / "archive"
    folder.mkdir(parents=True)
    names = {
        "11": "Wei Wang_11_assignsubmission_file_lab9.ipynb",
        "12": "Wei Wang_12_assignsubmission_file_lab9.ipynb",
        "13": "Ada King-Noel_13_assignsubmission_file/lab9.ipynb",
        "21": "wangwei_21_301_lab9.ipynb",
        "22": "wangwei_LATE_22_302_lab9-1.ipynb",
    }
    with zipfile.ZipFile(folder / "submissions.zip", "w") as archive:
        for number, name in names.items():
            submission = clean()
            submission.cells[0].source = number
            archive.writestr(name, nbformat.writes(submission))
    path = os.pathsep.join([str(NBGRADER.parent), os.environ["PATH"]])
    done = subprocess.run(
        [NBGRADER, "-m", "nbgrader", "zip_collect", "lab9"],
        cwd=course,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {
        path.parts[-3]: nbformat.read(path, 4).cells[0].source for path in course.glob("submitted/*/lab9/lab9.ipynb")
    }
    assert found == {number: number for number in names}
