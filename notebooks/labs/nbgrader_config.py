"""nbgrader's configuration of this course; it is read by every `nbgrader` that is started in this folder."""

import os
import sys
from pathlib import Path

from nbconvert.exporters import HTMLExporter
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.converters.autograde import Autograde
from nbgrader.converters.generate_assignment import GenerateAssignment
from nbgrader.preprocessors import Execute, GetGrades

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE / "grading"))

from exports import PenaltyPerDay  # noqa: E402
from preprocessors import ForStudents, Restore, RunConfined, WithoutTests, keep_local  # noqa: E402

c = get_config()  # noqa: F821 (traitlets puts it here)

c.CourseDirectory.course_id = "piecewise"
c.CourseDirectory.root = str(COURSE)
# Two submissions are graded at a time: each waits for the other to write its marks.
c.CourseDirectory.ignore.extend(["graded.json", "nbgrader.log"])  # records of course.py, not copied to the feedback
c.CourseDirectory.db_url = f"sqlite:///{COURSE / 'gradebook.db'}?timeout=60"

c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError"}
c.ClearSolutions.text_stub = "*Your answer here.*"
c.GenerateAssignment.preprocessors = [*GenerateAssignment.preprocessors.default(), ForStudents]

c.Restore.release = str(COURSE / "release")
c.Autograde.sanitize_preprocessors = [Restore, *Autograde.sanitize_preprocessors.default()]
c.Autograde.autograde_preprocessors = [
    RunConfined if step is Execute else step for step in Autograde.autograde_preprocessors.default()
]
c.RunConfined.timeout = int(os.environ.get("CELL_SECONDS", 120))
c.RunConfined.notebook_seconds = int(os.environ.get("NOTEBOOK_SECONDS", 600))

# Each day after the deadline (make release DUE=…) costs a tenth of the points; the first five minutes do not count.
c.AssignLatePenalties.plugin_class = PenaltyPerDay
c.PenaltyPerDay.percent = 10
c.PenaltyPerDay.grace_seconds = 300

# For `nbgrader zip_collect`: the names of files in the archives that Moodle and Canvas make of submissions, such as
# `Ada Lovelace_12_assignsubmission_file_lab2.ipynb` and `lovelaceada_LATE_12_345_lab2.ipynb`. Two students may have the
# same name, so a student is called by the number.
c.FileNameCollectorPlugin.named_regexp = (
    r".*/[^/]*_(?P<student_id>\d+)_(?:assignsubmission_file_?/?|\d+_)(?P<file_id>lab\d+)(?:-\d+)?(?:\.ipynb)?$"
)

c.GenerateFeedback.preprocessors = [GetGrades, WithoutTests, CSSHTMLHeaderPreprocessor]
# The instructor looks at outputs of students' cells, so these must not contain scripts. (For their text see Restore.)
c.HTMLExporter.sanitize_html = True
keep_local(HTMLExporter)
