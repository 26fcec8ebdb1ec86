"""The quick questions of notebooks as a question bank for Moodle."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("questions", ROOT / "notebooks" / "labs" / "grading" / "questions.py")
bank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bank)

SECTION = """## Quick questions

**Question 1.** What is the
energy of $x_1 = \\{0\\}$ in `a[i] ~ b`?

- A. It is **0**: nothing is paid.
- B. It is
  1 < 2.

<details>
<summary>Answer</summary>

**B.** A *halves* it.

</details>
"""
EXPECTED = """$CATEGORY: 02 · Energies

::02 · Energies, question 1::[html]What is the energy of \\\\(x_1 \\= \\\\\\{0\\\\\\}\\\\) in <code>a[i] \\~ b</code>? {
\t~A. It is <b>0</b>\\: nothing is paid.
\t=B. It is 1 &lt; 2.
\t####<b>B.</b> A <i>halves</i> it.
}
"""


def notebook(section: str) -> nbformat.NotebookNode:
    after = new_markdown_cell("## What to remember\n\n**Question 9.** is not a quick question.")
    return new_notebook(
        cells=[new_markdown_cell("# 02 · Energies"), new_code_cell("1"), new_markdown_cell(section), after]
    )


def test_a_question_is_written_as_moodle_reads_it():
    assert bank.as_gift("02 · Energies", bank.questions(notebook(SECTION), "02.ipynb")) == EXPECTED


@pytest.mark.parametrize("old, new", [("**B.**", "**C.**"), ("<details>", ""), ("- A.", "A."), ("**B.**", "B.")])
def test_a_question_without_an_answer_among_its_options_is_refused(old, new):
    with pytest.raises(ValueError, match=r"question 1 of 02\.ipynb has \d options"):
        bank.questions(notebook(SECTION.replace(old, new)), "02.ipynb")


def test_the_questions_of_the_course_can_be_read():
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        read = nbformat.read(path, 4)
        written = sum(cell.source.count("**Question ") for cell in read.cells if "## Quick questions" in cell.source)
        assert len(bank.questions(read, path.name)) >= written
