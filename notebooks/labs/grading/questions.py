"""Collect the notebooks' quick questions for a question bank: `python questions.py OUTPUT [NOTEBOOK …]`.

A section `## Quick questions` of a notebook contains questions that start with `**Question 1.**`, options `- A. …`, and
the answer in <details>, which starts with the letter of the right option: `**B.** …`. The output has Moodle's GIFT
format, one category for each notebook. https://docs.moodle.org/en/GIFT_format
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path
from typing import NamedTuple

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^## Quick questions\b.*?$(.*?)(?=^# |^## |\Z)", re.S | re.M)
QUESTION = re.compile(r"^\*\*Question (\d+)\.\*\* ", re.M)
OPTION = re.compile(r"^[-*] ([A-Z])\. ", re.M)
ANSWER = re.compile(r"<details>\s*<summary>.*?</summary>\s*\*\*([A-Z])\.\*\*\s*(.*?)\s*</details>", re.S)
INLINE = {
    r"\$\$(.+?)\$\$": r"\\[\1\\]",
    r"\$(.+?)\$": r"\\(\1\\)",
    r"`([^`]+)`": r"<code>\1</code>",
    r"\*\*(.+?)\*\*": r"<b>\1</b>",
    r"(?<![*\w])\*(?!\s)(.+?)(?<!\s)\*(?![*\w])": r"<i>\1</i>",
}


class Question(NamedTuple):
    number: int
    text: str
    options: dict[str, str]
    right: str
    reason: str


def questions(notebook: nbformat.NotebookNode, name: str) -> list[Question]:
    """Return the notebook's quick questions; ValueError for one that lacks options or an answer among them."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = []
    for section in SECTION.findall(text):
        _, *parts = QUESTION.split(section)
        for number, body in zip(parts[::2], parts[1::2], strict=True):
            answer = ANSWER.search(body)
            stem, *letters = OPTION.split(body[: answer.start()] if answer else body)
            options = dict(zip(letters[::2], map(line, letters[1::2]), strict=True))
            if answer is None or answer[1] not in options or len(options) < 2:
                raise ValueError(
                    f"question {number} of {name} has {len(options)} options and "
                    f"{'the answer ' + answer[1] if answer else 'no answer'}; expected two or more options `- A. …` "
                    "and <details> that start with the letter of one of them"
                )
            found.append(Question(int(number), line(stem), options, answer[1], line(answer[2])))
    return found


def line(text: str) -> str:
    return " ".join(text.split())


def gift(text: str) -> str:
    """Markdown in one line as HTML in which GIFT's own characters are escaped."""
    text = html.escape(text, quote=False)
    for pattern, replacement in INLINE.items():
        text = re.sub(pattern, replacement, text)
    return re.sub(r"([\\~=#{}:])", r"\\\1", text)


def as_gift(title: str, found: list[Question]) -> str:
    """A category of a GIFT file. The reasons name options by letter, so Moodle must not shuffle them."""
    lines = [f"$CATEGORY: {title}", ""]
    for question in found:
        lines.append(f"::{gift(title)}, question {question.number}::[html]{gift(question.text)} {{")
        for letter, option in question.options.items():
            lines.append(f"\t{'=' if letter == question.right else '~'}{letter}. {gift(option)}")
        lines += [f"\t####{gift(f'**{question.right}.** {question.reason}')}", "}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the GIFT file")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: those of the course")
    options = parser.parse_args()
    categories, total = [], 0
    for path in options.notebooks or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, 4)
        if found := questions(notebook, path.name):
            categories.append(as_gift(notebook.cells[0].source.splitlines()[0].lstrip("# "), found))
            total += len(found)
    options.output.write_text("\n".join(categories), "utf-8")
    print(f"{options.output}: {total} questions of {len(categories)} notebooks")


if __name__ == "__main__":
    main()
