"""nbgrader's configuration of this course; it is read by every `nbgrader` that is started in this folder."""

import os
import sys
from pathlib import Path

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.converters.autograde import Autograde
from nbgrader.converters.generate_assignment import GenerateAssignment
from nbgrader.preprocessors import Execute, GetGrades

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE / "grading"))

from preprocessors import ForStudents, Restore, RunConfined, WithoutTests  # noqa: E402

c = get_config()  # noqa: F821 (traitlets puts it here)

c.CourseDirectory.course_id = "piecewise"
c.CourseDirectory.root = str(COURSE)

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

c.GenerateFeedback.preprocessors = [GetGrades, WithoutTests, CSSHTMLHeaderPreprocessor]
# What a student's cell shows is a page of the instructor's, too: it may hold no script. (Their text: see Restore.)
c.HTMLExporter.sanitize_html = True
