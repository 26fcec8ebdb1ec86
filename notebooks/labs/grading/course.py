"""Release the labs, grade what was handed in, make the feedback and tables of grades, with nbgrader. See INSTRUCTOR.md.

    course.py release [lab2 …] [--due TIME]    source/ -> release/
    course.py grade FOLDER [--lab lab2] [--student ada] [--again] [--unsafe]
                                               FOLDER/student/lab2.ipynb -> submitted/, autograded/, gradebook.db
    course.py feedback [lab2 …]                autograded/ -> feedback/
    course.py export                           gradebook.db -> grades.csv, grades-moodle.csv, grades-canvas.csv

It needs the environment that `make classroom` makes; LAB_PYTHON names the Python that runs the students' code, the
repository's .venv/bin/python where it is not set.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from threading import Lock

import nbformat
from dateutil import tz
from nbgrader.api import Gradebook, MissingEntry

COURSE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(COURSE / "grading"))

from leaks import leaks  # noqa: E402

REPOSITORY = COURSE.parents[1]
LARGEST = 20_000_000  # bytes of a submission
STUDENT = re.compile(r"[\w@][\w.@+-]*")
BY_HAND = "LOOK AT THIS BY HAND: "
AT_ONCE = 2  # submissions graded at the same time
DATABASE = f"sqlite:///{COURSE / 'gradebook.db'}?timeout=60"
# The nbgrader commands that run now; the lock keeps `end_orphans` from ending one before it is listed.
RUNNING: dict[int, subprocess.Popen] = {}
STARTING = Lock()


def labs(names: list[str]) -> list[str]:
    known = sorted(path.stem for path in (COURSE / "source").glob("*/*.ipynb") if path.parent.name == path.stem)
    for name in names:
        if name not in known:
            sys.exit(f"There is no lab {name}; source/ holds {', '.join(known)}.")
    return names or known


def nbgrader(*arguments: str, seconds: float | None = None, **environment: str) -> tuple[int, str]:
    """Run an nbgrader command, kill it after `seconds`, and return its exit status and log."""
    # nbgrader calls alembic by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with STARTING:
        process = subprocess.Popen(
            [sys.executable, "-m", "nbgrader", *arguments],
            cwd=COURSE,
            env={**os.environ, **environment, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        RUNNING[process.pid] = process
    try:
        log, _ = process.communicate(timeout=seconds)
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        log += f"\nStopped after {seconds:.0f} seconds."
    finally:
        with STARTING:
            del RUNNING[process.pid]
    return process.returncode, log


def time_of(due: str) -> datetime:
    """A deadline such as '2030-11-28 18:00 Europe/Berlin' or '… +01:00' in UTC, without a zone, as nbgrader stores it.

    Times in other notations are refused, because some can be read in two ways, and so are zones that are not known.
    """
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d) *(\S+)", due.strip())
    try:
        if found and found[2][0] in "+-":
            return datetime.fromisoformat(found[1] + found[2]).astimezone(timezone.utc).replace(tzinfo=None)
        if found and (zone := tz.gettz(found[2])):
            return datetime.fromisoformat(found[1]).replace(tzinfo=zone).astimezone(timezone.utc).replace(tzinfo=None)
    except ValueError:
        pass  # there is no such day, hour or offset
    sys.exit(f"DUE is {due!r}; expected a time and its zone, such as '2030-11-28 18:00 Europe/Berlin' or '… +01:00'.")


def release(names: list[str], due: str | None) -> None:
    deadline = time_of(due) if due else None
    for lab in labs(names):
        target = COURSE / "release" / lab
        status, log = nbgrader("generate_assignment", lab, "--force")
        if status:
            shutil.rmtree(target, ignore_errors=True)
            sys.exit(f"{log}\n{lab} was not released: see the message of nbgrader above.")
        found = leaks(*(nbformat.read(COURSE / step / lab / f"{lab}.ipynb", 4) for step in ("source", "release")))
        if found:
            shutil.rmtree(target)
            sys.exit("\n".join([f"{lab} was not released, because it would give its answers away:", *found]))
        if deadline:
            with Gradebook(DATABASE) as gradebook:
                gradebook.update_or_create_assignment(lab, duedate=deadline)
        print(target / f"{lab}.ipynb", *([f"(due {deadline:%Y-%m-%d %H:%M} UTC)"] if deadline else []))


def handed_in(folder: Path) -> Iterator[tuple[str, str, bytes | str]]:
    """(student, lab, the notebook's bytes, or a sentence why there are none) of FOLDER/student/[lab/]lab.ipynb.

    Students may write to the folder at any time, so no link is followed, and only plain files of limited size are read.
    """
    known = labs([])
    for student in sorted(entry.name for entry in folder.iterdir()):
        if student.startswith(".") or not (folder / student).is_dir():
            continue
        if not STUDENT.fullmatch(student):
            yield student, "", "the name of the folder is not that of a student; expected letters, digits and . _ + - @"
            continue
        for lab in known:
            for way in ([student, f"{lab}.ipynb"], [student, lab, f"{lab}.ipynb"]):
                try:
                    content = read_without_links(folder, way)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    content = f"{'/'.join(way)} cannot be read: {error.strerror}"
                yield student, lab, content
                break


def read_without_links(folder: Path, way: list[str]) -> bytes | str:
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for depth, name in enumerate(way, 1):
            kind = os.O_DIRECTORY if depth < len(way) else os.O_NONBLOCK
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=place)
            os.close(place)
            place = inner
        found = os.fstat(place)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            return f"{'/'.join(way)} is not a plain file"
        if found.st_size > LARGEST:
            return f"{'/'.join(way)} has {found.st_size:,} bytes; at most {LARGEST:,} are read"
        with os.fdopen(os.dup(place), "rb") as file:
            return file.read(LARGEST)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and (folder / "/".join(way)).exists():
            return f"{'/'.join(way)} is a symbolic link, or is in a linked folder"
        raise
    finally:
        os.close(place)


def isolation(unsafe: bool) -> dict[str, str]:
    """Environment variables with which nbgrader isolates its kernels; exits where that is not possible."""
    python = os.environ.get("LAB_PYTHON", str(REPOSITORY / ".venv" / "bin" / "python"))
    # The font manager makes the list of fonts that each kernel is handed a copy of: it takes seconds.
    look = "import matplotlib.font_manager, pwlib; print(matplotlib.get_cachedir())"
    try:
        # From the root and without PYTHONPATH, as kernels run: a pwlib in the current folder would be found first.
        found = subprocess.run([python, "-E", "-c", look], capture_output=True, text=True, cwd=os.sep)
    except OSError:
        found = None
    if found is None or found.returncode:
        sys.exit(f"{python} cannot run the labs: it lacks pwlib. LAB_PYTHON names the Python that has it.")
    environment = {"LAB_PYTHON": python, "LAB_MATPLOTLIB": found.stdout.strip()}
    if unsafe:
        print("UNSAFE: the students' code can read and change whatever you can.", file=sys.stderr)
        return environment | {"LAB_UNSAFE": "1"}
    confine = subprocess.run([sys.executable, "-I", COURSE / "grading" / "confine.py", "--check"], capture_output=True)
    if confine.returncode:
        why = confine.stderr.decode().strip().splitlines()[-1].removeprefix("confine.py: ")
        sys.exit(
            f"Nothing was graded: {why}, so the students' code could read and change your files. Install bubblewrap, "
            "grade on Linux 6.12 or newer, or use UNSAFE=1 in a machine or container that contains nothing else."
        )
    print(f"Isolation: {confine.stdout.decode().strip()}.")
    return environment


def grade(folder: str, lab: str | None, student: str | None, again: bool, unsafe: bool) -> None:
    if not folder or not Path(folder).is_dir():
        sys.exit(f"SUBMITTED is {folder!r}; expected the folder that holds one folder for each student.")
    if lab:
        labs([lab])
    environment = isolation(unsafe)
    adopt_orphans()
    place = Path(folder).resolve()
    wanted = [
        found for found in handed_in(place) if found[0] == (student or found[0]) and found[1] in (lab or found[1], "")
    ]
    # Each command has one core, so that two of them do not wait for one another.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    graded = failed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            waiting = [pool.submit(grade_one, place, *found, again, environment) for found in wanted]
            for (name, which, _), result in zip(wanted, waiting, strict=True):
                done, sentence = result.result()
                graded, failed = graded + done, failed + (not done)
                title = " ".join(filter(None, (name, which)))
                print(f"{title}:", sentence if done else f"NOT GRADED: {sentence}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with STARTING:
                for process in RUNNING.values():
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    if failed:
        sys.exit(f"{failed} of {graded + failed} could not be graded.")
    if not graded:
        of = "".join([f" of {lab}" * bool(lab), f" by the student {student!r}" * bool(student)])
        sys.exit(f"{folder} contains no submission{of}; expected student/lab2.ipynb or student/lab2/lab2.ipynb.")


def grade_one(
    folder: Path, student: str, lab: str, content: bytes | str, again: bool, environment: dict[str, str]
) -> tuple[bool, str]:
    """Grade a submission unless it and the lab are as they were when it was last graded: (whether, marks or reason)."""
    if lab and not (COURSE / "release" / lab).is_dir():
        return False, f"{lab} has not been released from here: make release comes first"
    if isinstance(content, str):
        return False, content
    target, record = COURSE / "submitted" / student / lab, COURSE / "autograded" / student / lab / "graded.json"
    submitted = timestamp(folder, student, lab)
    known = json.loads(record.read_text()) if record.is_file() else {}
    state = {"submission": digest(content), "lab": digest(*lab_files(lab)), "submitted": submitted, "due": due(lab)}
    if not again and {key: known.get(key) for key in state} == state:
        return True, f"{marks(student, lab)}{known['notes']}, unchanged"
    # What `nbgrader collect` put beside a notebook (its time, the key to its feedback) stays.
    if folder != COURSE / "submitted":
        shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{lab}.ipynb").write_bytes(content)
    (target / "timestamp.txt").write_text(submitted)
    seconds = int(os.environ.get("NOTEBOOK_SECONDS", 600)) + 300
    command = ("autograde", lab, f"--CourseDirectory.student_id={student!r}", "--force")
    status, log = nbgrader(*command, seconds=seconds, **environment)
    end_orphans()
    if status:
        (target / "nbgrader.log").write_text(log)
        return False, "nbgrader failed: " + (log.strip().splitlines() or ["no message"])[-1]
    if known.get("submission") == state["submission"]:
        keep_manual_marks(student, lab)
    notes = "".join(f"; look by hand: {line.split(BY_HAND)[1]}" for line in log.splitlines() if BY_HAND in line)
    record.write_text(json.dumps(state | {"notes": notes}))
    return True, marks(student, lab) + notes


def keep_manual_marks(student: str, lab: str) -> None:
    """Keep marks given by hand for an unchanged submission; nbgrader would ask for them again."""
    with Gradebook(DATABASE) as gradebook:
        for notebook in gradebook.find_submission(lab, student).notebooks:
            for grade in notebook.grades:
                if grade.manual_score is not None:
                    grade.needs_manual_grade = False
        gradebook.db.commit()


def timestamp(folder: Path, student: str, lab: str) -> str:
    """When the lab was handed in, as nbgrader writes it: what `nbgrader collect` noted, or the notebook's own time."""
    for place in (folder / student / lab, folder / student):
        if not place.is_symlink() and (place / f"{lab}.ipynb").is_file():
            noted = place / "timestamp.txt"
            if folder == COURSE / "submitted" and noted.is_file():
                return noted.read_text().strip()
            seconds = (place / f"{lab}.ipynb").lstat().st_mtime
            return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return ""


def digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def lab_files(lab: str) -> list[bytes]:
    """What a grade depends on besides the submission."""
    return [(COURSE / step / lab / f"{lab}.ipynb").read_bytes() for step in ("source", "release")]


@cache
def due(lab: str) -> str:
    with Gradebook(DATABASE) as gradebook:
        try:
            return str(gradebook.find_assignment(lab).duedate)
        except MissingEntry:
            return "unknown"


def marks(student: str, lab: str) -> str:
    with Gradebook(DATABASE) as gradebook:
        submission = gradebook.find_submission(lab, student)
        score, late = submission.score, submission.late_submission_penalty
        points = f"{max(0.0, score - late):g} of {submission.max_score:g} points"
        notes = [f"{score:g} reached, minus {late:g} for lateness"] if late else []
        if submission.needs_manual_grade:
            notes.append("the written answer is not graded yet")
        return points + (f" ({'; '.join(notes)})" if notes else "")


def adopt_orphans() -> None:
    """Make processes that a student's code leaves running our children when their parent ends, to find them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_orphans(seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and (children := our_children()):
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def our_children() -> list[int]:
    """The children of this process, except the nbgrader commands that it runs."""
    found = []
    with STARTING:
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The second field is the program's name in brackets, which may hold anything.
                parent = status.read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid() and int(status.parent.name) not in RUNNING:
                found.append(int(status.parent.name))
    return found


def feedback(names: list[str]) -> None:
    wanted = [lab for lab in labs(names) if list((COURSE / "autograded").glob(f"*/{lab}/{lab}.ipynb"))]
    if not wanted:
        sys.exit("Nothing has been graded yet: make grade SUBMITTED=folder comes first.")
    for lab in wanted:
        status, log = nbgrader("generate_feedback", lab, "--force")
        if status:
            sys.exit(f"{log}\nThe feedback of {lab} is not complete: see the message of nbgrader above.")
        for page in sorted((COURSE / "feedback").glob(f"*/{lab}/{lab}.html")):
            # nbgrader copies this file beside the page; `nbgrader release_feedback` needs it, for submissions that came
            # by nbgrader's exchange, with their secret.
            if not (page.parent / "submission_secret.txt").exists():
                (page.parent / "timestamp.txt").unlink(missing_ok=True)
            with Gradebook(DATABASE) as gradebook:
                waiting = gradebook.find_submission(lab, page.parents[1].name).needs_manual_grade
            print(page, *["(the written answer is not graded yet)"] * waiting)


def export() -> None:
    """Write every student's grades as nbgrader's table, and as Moodle and Canvas import them."""
    if not (COURSE / "gradebook.db").exists():
        sys.exit("Nothing has been graded yet: make grade SUBMITTED=folder comes first.")
    for exporter in ("nbgrader.plugins.CsvExportPlugin", "exports.MoodleExport", "exports.CanvasExport"):
        system = exporter.rpartition(".")[2].removesuffix("Export").lower()
        target = COURSE / ("grades.csv" if exporter.startswith("nbgrader") else f"grades-{system}.csv")
        status, log = nbgrader("export", f"--exporter={exporter}", f"--to={target}", PYTHONPATH=str(COURSE / "grading"))
        if status:
            sys.exit(f"{log}\n{target.name} was not written: see the message of nbgrader above.")
        print(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("release", "feedback"):
        commands.add_parser(name).add_argument("labs", nargs="*", metavar="lab2")
    commands.choices["release"].add_argument("--due", help="the deadline: '2030-11-28 18:00 Europe/Berlin'")
    commands.add_parser("export")
    grading = commands.add_parser("grade")
    grading.add_argument("folder")
    grading.add_argument("--lab", help="only this lab")
    grading.add_argument("--student", help="only this student")
    grading.add_argument("--again", action="store_true", help="grade unchanged submissions, too")
    grading.add_argument("--unsafe", action="store_true", help="do not confine the students' code")
    options = parser.parse_args()
    # Ended from outside as by Ctrl-C: what was started is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if options.command == "grade":
        grade(options.folder, options.lab, options.student, options.again, options.unsafe)
    elif options.command == "release":
        release(options.labs, options.due)
    elif options.command == "feedback":
        feedback(options.labs)
    else:
        export()


if __name__ == "__main__":
    main()
