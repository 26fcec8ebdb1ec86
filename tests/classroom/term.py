"""A term with many made-up students: python tests/classroom/term.py [--lab lab2] [--students 60] [--json FILE].

Releases a lab with a deadline, hands in four kinds of submission, a quarter of them late, grades them, then grades
again after a tenth of the students handed in once more. Prints the minutes, and every mark that is not as expected.
The expected points come from lab2.py, the expected penalties from the rule: a tenth of the points for each day begun,
after five minutes that are free.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell
from students import answers, call, hand_in, is_test, make_course, marks, put, reference

DUE = datetime(2030, 1, 10, 12, tzinfo=timezone.utc).timestamp()
LATE = {100: 0.0, 3600: 0.1, 25 * 3600: 0.2, 9.5 * 86400: 1.0}  # seconds after the deadline: share of the points


def kinds(lab: str, released) -> dict[str, tuple[dict[str, str], float]]:
    """By kind of student: the answers, and the points that the machine should give."""
    full = sum(marks(cell)["points"] for cell in released.cells if is_test(cell))
    right, made_up = reference(lab), answers(lab)
    naive, lost = made_up.NAIVE
    return {
        "reference": (right, full),
        "alternative": (right | made_up.ALTERNATIVE, full),
        "naive": (right | naive, full - sum(lost.values())),
        "blank": ({}, 0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lab", default="lab2")
    parser.add_argument("--students", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    lab = options.lab
    with tempfile.TemporaryDirectory(prefix="term-") as place:
        course, work = make_course(Path(place) / "course", [lab]), Path(place) / "handed_in"
        done = call(course, "release", lab, "--due", "2030-01-10 12:00 UTC")
        assert done.returncode == 0, done.stderr
        released = nbformat.read(course / "release" / lab / f"{lab}.ipynb", 4)
        expected = {}
        made = list(kinds(lab, released).items())

        def one(number: int, kind: int, late: float) -> None:
            student = f"student{number:02}"
            codes, points = made[kind % len(made)][1]
            submission = hand_in(released, codes)
            submission.cells.append(new_markdown_cell(f"Handed in by {student}."))
            put(submission, work, student, lab)
            os.utime(work / student / f"{lab}.ipynb", (DUE + late,) * 2)
            expected[student] = points * (1 - LATE.get(late, 0.0))

        delays = list(LATE)
        for number in range(options.students):
            one(number, number, delays[number // 4 % len(delays)] if number % 4 == 3 - number // 16 % 4 else -3600)
        minutes = {}
        for name, again in (("grade", range(0)), ("grade again", range(0, options.students, 10))):
            for number in again:
                one(number, number + 1, 25 * 3600)
            start = time.monotonic()
            done = call(course, "grade", str(work), seconds=3600)
            minutes[name] = round((time.monotonic() - start) / 60, 2)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            unchanged = sum(line.endswith("unchanged") for line in done.stdout.splitlines())
            print(f"{name}: {minutes[name]} minutes, {unchanged} unchanged", flush=True)
        start = time.monotonic()
        assert call(course, "feedback", lab, seconds=3600).returncode == 0
        minutes["feedback"] = round((time.monotonic() - start) / 60, 2)
        pages = len(list((course / "feedback").glob(f"*/{lab}/{lab}.html")))
        assert call(course, "export").returncode == 0
        with open(course / "grades.csv", newline="", encoding="utf-8") as file:
            rows = {row["student_id"]: row for row in csv.DictReader(file)}
        found = {
            name: max(0.0, float(row["raw_score"] or 0) - float(row["late_submission_penalty"] or 0))
            for name, row in rows.items()
        }
    wrong = {s: (found.get(s), points) for s, points in expected.items() if abs(found.get(s, -1) - points) > 1e-6}
    result = {"lab": lab, "students": options.students, "minutes": minutes, "pages": pages, "wrong marks": wrong}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong or unchanged != options.students - len(range(0, options.students, 10)) else 0


if __name__ == "__main__":
    sys.exit(main())
