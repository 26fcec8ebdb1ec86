"""Tables of grades for learning platforms, as nbgrader's export plugins, and the penalty for late work."""

from __future__ import annotations

import csv

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import LateSubmissionPlugin
from nbgrader.plugins.export import ExportPlugin
from traitlets import Float


class PenaltyPerDay(LateSubmissionPlugin):
    """Take some percent of the points that were reached for each day, begun or full, after the deadline."""

    percent = Float(10, help="of the score, for each day").tag(config=True)
    grace_seconds = Float(300, help="after the deadline that are not counted as late").tag(config=True)

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float | None:
        if total_seconds_late <= self.grace_seconds:
            return None
        days = -(-total_seconds_late // 86400)
        return score * min(1.0, days * self.percent / 100)


def points(gradebook: Gradebook, lab: str, student: str) -> str:
    """The points after the penalty; empty for a lab that was not handed in or waits to be graded by hand."""
    try:
        submission = gradebook.find_submission(lab, student)
    except MissingEntry:
        return ""
    if submission.needs_manual_grade:
        return ""
    return f"{max(0.0, submission.score - submission.late_submission_penalty):g}"


def roll(gradebook: Gradebook) -> list:
    """The students, sorted by name."""
    return sorted(gradebook.students, key=lambda student: student.id)


class TableExport(ExportPlugin):
    """One row for each student, one column for each lab."""

    def labs(self, gradebook: Gradebook) -> list:
        wanted = {str(name) for name in self.assignment}
        return [lab for lab in gradebook.assignments if not wanted or lab.name in wanted]

    def write(self, rows: list[list[str]]) -> None:
        with open(self.to, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


class MoodleExport(TableExport):
    """For Grades, Import, CSV file: map `username` to Username (or ID number), each lab to its grade item."""

    def export(self, gradebook: Gradebook) -> None:
        labs = [lab.name for lab in self.labs(gradebook)]
        students = [[s.id, *(points(gradebook, lab, s.id) for lab in labs)] for s in roll(gradebook)]
        self.write([["username", *labs], *students])


class CanvasExport(TableExport):
    """For Grades, Import: Canvas finds students by `SIS Login ID` and takes each lab as an assignment."""

    def export(self, gradebook: Gradebook) -> None:
        labs = self.labs(gradebook)
        rows = [["Student", "ID", "SIS Login ID", "Section", *(lab.name for lab in labs)]]
        rows.append(["Points Possible", "", "", "", *(f"{lab.max_score:g}" for lab in labs)])
        for student in roll(gradebook):
            name = f"{student.last_name}, {student.first_name}" if student.last_name else student.id
            rows.append([name, "", student.id, "", *(points(gradebook, lab.name, student.id) for lab in labs)])
        self.write(rows)
