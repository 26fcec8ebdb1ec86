"""One lab released, handed in by five made-up students, graded and returned: what the tests look at, made once."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from students import (
    LABS,
    NBGRADER,
    ROOT,
    answers,
    by_hand,
    call,
    hand_in,
    is_task,
    is_test,
    make_course,
    marks,
    put,
    reference,
)

GRADES = """
import json, sys
from nbgrader.api import Gradebook
with Gradebook("sqlite:///" + sys.argv[1]) as gradebook:
    notebooks = [(s.student.id, s.notebooks[0]) for s in gradebook.assignment_submissions(sys.argv[2])]
    print(json.dumps({student: {g.name: [g.auto_score, g.max_score, g.needs_manual_grade] for g in notebook.grades}
                      for student, notebook in notebooks}))
"""

# Tries what it can to get at the files named in PATHS and at the environment; says READ or WROTE where it could.
SPY = """
import glob, os, pathlib, subprocess, sys

def attempt(word, action):
    try:
        print(word, repr(action())[:2000])
    except BaseException as error:
        print("no:", type(error).__name__)

for path in PATHS:
    attempt("READ", lambda: open(path, "rb").read())
    attempt("READ", lambda: os.symlink(path, "link") or open("link", "rb").read())
    attempt("READ", lambda: os.link(path, "hard") or open("hard", "rb").read())
    attempt("READ", lambda: subprocess.run(["cat", path], capture_output=True, check=True).stdout)
    attempt("READ", lambda: os.listdir(os.path.dirname(path)).index(os.path.basename(path)))
    attempt("WROTE", lambda: open(path, "ab").write(b"x"))
    attempt("WROTE", lambda: open(os.path.dirname(path) + "/planted", "w"))
    attempt("WROTE", lambda: os.truncate(path, 0))
    attempt("WROTE", lambda: os.remove(path))
    attempt("WROTE", lambda: os.rename(path, path + ".moved"))
    attempt("CHANGED", lambda: os.chmod(path, 0) or oct(os.stat(path).st_mode))
attempt("FOUND", lambda: [open(p).read() for p in glob.glob("../**/*.ipynb", recursive=True)][0])
print("ENVIRONMENT", dict(os.environ))
attempt("ENVIRONMENT", lambda: open(f"/proc/{os.getppid()}/environ").read())
"""

CALLS_OUT = """
import socket
attempt("SENT", lambda: socket.create_connection(("127.0.0.1", PORT), timeout=2).sendall(b"hello"))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", PORT)))
attempt("signal", lambda: os.kill(os.getppid(), 9))  # grading survives it; test_release.py checks datagrams
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(321)", MARK], start_new_session=True)
"""

SCRIPT = "<img src=x onerror='window.taken = 1'><script>window.taken = 1</script><a href='javascript:taken=1'>here</a>"


@dataclass
class Cycle:
    lab: str
    course: Path
    released: nbformat.NotebookNode
    release_text: str
    planted: str  # occurs in the source's answers, hidden tests, outputs, metadata, widgets, attachments
    secrets: list[Path]
    mark: str
    seconds: float  # that grading the hostile submission took
    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    grades: dict[str, dict[str, list]] = field(default_factory=dict)

    def points(self, student: str) -> dict[str, float]:
        """Points by test cell, given by machine."""
        tests = {marks(cell)["grade_id"] for cell in self.released.cells if is_test(cell)}
        return {name: grade[0] for name, grade in self.grades[student].items() if name in tests}

    def full(self) -> dict[str, float]:
        return {marks(cell)["grade_id"]: marks(cell)["points"] for cell in self.released.cells if is_test(cell)}

    def autograded(self, student: str) -> nbformat.NotebookNode:
        return nbformat.read(self.course / "autograded" / student / self.lab / f"{self.lab}.ipynb", 4)

    def feedback(self, student: str) -> Path:
        return self.course / "feedback" / student / self.lab / f"{self.lab}.html"


def plant(notebook, word: str) -> None:
    """`word` wherever a source may hold what students must not see."""
    for cell in notebook.cells:
        for mark in ("### BEGIN SOLUTION", "### BEGIN HIDDEN TESTS"):
            lines = cell.source.splitlines()
            cell.source = "\n".join(
                f"{line}\n{line[: len(line) - len(line.lstrip())]}# {word}" if line.strip() == mark else line
                for line in lines
            )
        cell.metadata["note"] = {"answer": word}
        if cell.cell_type == "markdown":
            cell.attachments = {"answer.txt": {"text/plain": base64.b64encode(word.encode()).decode()}}
        else:
            cell.outputs.append(new_output("display_data", data={"text/plain": word}, metadata={"word": word}))
        if by_hand(cell):
            cell.source += f"\n\n{word}"
    notebook.metadata["author"] = word
    state = {"state": {"1": {"model_name": "HTMLModel", "state": {"value": word}}}, "version_major": 2}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}


UNSTOPPABLE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
ENDS = "import os\nos._exit(0)"


def hostile(released, paths: list[Path], port: int, mark: str, end: str):
    notebook = hand_in(released, {})
    [cell for cell in notebook.cells if is_task(cell)][-1].source = end
    tests = [cell for cell in notebook.cells if is_test(cell)]
    tests[-1].source = "pass"
    tests[-1].metadata.nbgrader.points = 1000
    tests[-2].metadata.nbgrader.grade = False
    tests[-2].metadata.tags = ["skip-execution"]
    tests[-3].cell_type = "markdown"
    del tests[-3]["outputs"], tests[-3]["execution_count"]
    notebook.cells.remove(tests[0])
    spy = f"PATHS = {[str(path) for path in paths]!r}\n{SPY}\nPORT, MARK = {port}, {mark!r}\n{CALLS_OUT}"
    notebook.cells[1:1] = [
        new_code_cell(spy),
        new_code_cell(f"from IPython.display import HTML, Javascript, display\ndisplay(HTML({SCRIPT!r}))\n"
                      "display(Javascript('window.taken = 1'))"),
        new_markdown_cell(SCRIPT),
        new_code_cell("while True:\n    pass"),
        new_code_cell("while True:\n    print('x' * 100_000)"),
    ]  # fmt: skip
    return notebook


def state_of(course: Path, but: str) -> dict[str, str]:
    """A digest of every file of the course that grading `but`'s submission has no business to change."""
    made = {course / step / but for step in ("submitted", "autograded")}
    files = [path for path in course.rglob("*") if path.is_file() and not made & set(path.parents)]
    kept = [path for path in files if path.suffix not in (".db", ".pyc")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + oct(path.stat().st_mode) for path in kept}


def running(mark: str) -> list[str]:
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline")]
    found = []
    for command in commands:
        try:
            if mark.encode() in command.read_bytes().split(b"\0"):
                found.append(command.parent.name)
        except OSError:
            pass
    return found


@cache
def cycle(lab: str, folder: Path) -> Cycle:
    course = make_course(folder / "course", [lab])
    word, mark = (f"{random.getrandbits(64):016x}" for _ in range(2))
    path = course / "source" / lab / f"{lab}.ipynb"
    notebook = nbformat.read(path, 4)
    plant(notebook, word)
    nbformat.write(notebook, path)
    release = call(course, "release", lab)
    assert release.returncode == 0, release.stderr[-3000:]
    text = (course / "release" / lab / f"{lab}.ipynb").read_text("utf-8")
    released = nbformat.reads(text, 4)

    # The hostile submission comes first: what it does to the course, the others must not notice.
    home = folder / "home"
    home.mkdir()
    (home / "diary").write_text(word)
    written = "A written answer."
    put(hand_in(released, {}, written), course / "submitted", "earlier", lab)
    secrets = [path, course / "gradebook.db", course / "submitted" / "earlier" / f"{lab}.ipynb", home / "diary",
               ROOT / "README.md", Path("../../source") / lab / f"{lab}.ipynb"]  # fmt: skip
    end = UNSTOPPABLE if lab == LABS[0] else ENDS
    put(hostile(released, secrets, 9, mark, end), folder / "first", "hostile", lab)
    before, start = state_of(course, "hostile"), time.monotonic()
    limits = {"CELL_SECONDS": "12", "NOTEBOOK_SECONDS": "120", "LAB_DIARY": word, "HOME": str(home)}
    said = call(course, "grade", str(folder / "first"), **limits)
    result = Cycle(lab, course, released, text, word, secrets, mark, time.monotonic() - start)
    result.left = running(mark)
    after = state_of(course, "hostile")
    result.changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    result.said["hostile"] = said.stdout + said.stderr
    assert said.returncode == 0, result.said["hostile"][-3000:]

    right, made_up = reference(lab), answers(lab)
    submissions = {
        "reference": hand_in(released, right, written),
        "alternative": hand_in(released, right | made_up.ALTERNATIVE, written),
        "naive": hand_in(released, right | made_up.NAIVE[0], written),
        "blank": released,
    }
    for student, submission in submissions.items():
        put(submission, folder / "class", student, lab)
    # Limits for a machine that does something else besides: nothing here comes near the default ones by itself.
    said = call(course, "grade", str(folder / "class"), HOME=str(home), CELL_SECONDS="500", NOTEBOOK_SECONDS="1000")
    result.said["class"] = said.stdout + said.stderr
    assert said.returncode == 0, result.said["class"][-3000:]
    grades = subprocess.run([NBGRADER, "-c", GRADES, course / "gradebook.db", lab], capture_output=True, text=True)
    assert grades.returncode == 0, grades.stderr[-2000:]
    result.grades = json.loads(grades.stdout.splitlines()[-1])
    made = call(course, "feedback", lab)
    assert made.returncode == 0, made.stderr[-3000:]
    return result


def spied(paths: list[str], folder: Path) -> str:
    """What the spy finds where nothing holds it back: the oracle for its finding nothing."""
    code = f"PATHS = {paths!r}\n{SPY}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """graded("lab2"): the lab's `Cycle`."""
    return cache(lambda lab: cycle(lab, tmp_path_factory.mktemp(lab)))
