"""The rules for stored notebooks, which `tests/lint.py` applies: each takes a notebook and returns its faults."""

import ast
import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
PARTS = ("What you will be able to do", "What you need", "Time", "What to remember", "Where it is in the paper")
SHORTEST_ALT = 20  # characters; "a figure" is no description

ENDING = ("What to remember", "Quick questions", "Weekend project", "Further reading")
WIDTH, LENGTH = 90, 25  # characters of a line, lines of a code cell
WORDS_PER_MINUTE = 180
# Words that personify pixels or replace a term of the field.
AVOIDED = re.compile(
    r"\b(?:(?:pixels?|messages?|kernels?|models?|networks?|CRFs?) (?:hears?|says?|tells?|talks?|calls?|knows?|thinks?"
    r"|believes?|wants?|listens?)|hear|hears|heard|listen|listens|listened|friends?|mend|mends|mended"
    r"|put right|surer|untuned|as it lies|straw man|parrot|whispers?|shrugs?|votes?|voted|outvoted|crew|price tags?"
    r"|priced|dear|but for|earns? (?:its|their) keep)\b",
    re.I,
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<target>[^)\s]+)[^)]*\)")
HTML_IMAGE = re.compile(r"<img\b[^>]*>", re.I)
HTML_ALT = re.compile(r"""\balt\s*=\s*(["'])(?P<alt>.+?)\1""", re.I | re.S)
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\((?P<target>[^)\s]+)\)|href=\"(?P<html>[^\"]+)\"")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DOTTED = re.compile(r"(?<![\w./])pwlib(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"^(?:pwlib|tests|benchmarks|notebooks|data)/[\w./-]*$")
HIDDEN = re.compile(r"^ *### BEGIN (HIDDEN TESTS|SOLUTION)\n.*?^ *### END \1\n?", re.M | re.S)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|root|home|Users)/")


def faults(notebook, name: str) -> list[str]:
    """Return all faults of a notebook stored as notebooks/<name>.ipynb, one sentence each."""
    rules = [execution, images, links, names, anatomy, outputs, widths, plotting, wording, ending, reading_time]
    return [f"{name}: {fault}" for rule in rules for fault in rule(notebook, name)]


def lab_faults(notebook, name: str) -> list[str]:
    """Return all faults of the source of a lab. Style counts in what students see, and in the model answer."""
    rules = [(execution, images, names, outputs), (widths, plotting, wording)]
    views = (notebook, released(notebook))
    return [f"{name}: {f}" for part, view in zip(rules, views, strict=True) for rule in part for f in rule(view, name)]


def released(notebook):
    """A copy of a lab without hidden tests and solutions."""
    view = copy.deepcopy(notebook)
    for cell in view.cells:
        cell.source = HIDDEN.sub("", cell.source)
    return view


def is_graded_test(cell) -> bool:
    marks = cell.metadata.get("nbgrader", {})
    return bool(marks.get("grade")) and not marks.get("solution")


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execution(notebook, name: str) -> Iterator[str]:
    """Every code cell ran once, in order, and raised nothing unless it is tagged raises-exception."""
    for place, cell in enumerate(code_cells(notebook), 1):
        if not cell.source.strip():
            yield f"cell {cell.id} is empty"
        if cell.execution_count is None:
            yield f"cell {cell.id} was not executed"
        elif cell.execution_count != place:
            yield f"cell {cell.id} is code cell {place} but ran as number {cell.execution_count}: out of order"
        raised = [o.ename for o in cell.outputs if o.output_type == "error"]
        if raised and "raises-exception" not in tags(cell):
            yield f"cell {cell.id} ended with {raised[0]}"


def images(notebook, name: str) -> Iterator[str]:
    """Every picture, stored or linked, has alternative text; a widget has a static picture next to it."""
    pictured, widgets = [], []
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for mime in (m for m in data if m.startswith("image/")):
                pictured.append(place)
                if len(output.metadata.get(mime, {}).get("alt", "").strip()) < SHORTEST_ALT:
                    yield f"cell {cell.id} shows a figure without alt text: use pwlib.course.plots.show(figure, alt=…)"
            if WIDGET in data:
                widgets.append((place, cell.id))
            else:
                yield from html_images(cell, "".join(data.get("text/html", "")))
        if cell.cell_type == "markdown":
            for image in IMAGE.finditer(prose(cell)):
                if not image["alt"].strip():
                    yield f"cell {cell.id} has an image without alt text: {image['target']}"
            yield from html_images(cell, prose(cell))
    for place, cell_id in widgets:
        if not any(abs(place - other) <= 2 for other in pictured):
            yield f"cell {cell_id} shows a widget with no static figure within two cells: some readers see no widgets"


def html_images(cell, html: str) -> Iterator[str]:
    for image in HTML_IMAGE.finditer(html):
        if not HTML_ALT.search(image[0]):
            yield f"cell {cell.id} has an <img> without alt text"


def prose(cell) -> str:
    """A markdown cell without its fenced code."""
    return FENCE.sub("", cell.source)


def links(notebook, name: str) -> Iterator[str]:
    """Every link to a file of this repository or to a heading has an existing target."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for link in LINK.finditer(prose(cell)):
                target = link["target"] or link["html"]
                if not target_exists(target, notebook):
                    yield f"cell {cell.id} links to {target}, which does not exist"
            for image in IMAGE.finditer(prose(cell)):
                if not target_exists(image["target"], notebook):
                    yield f"cell {cell.id} shows {image['target']}, which does not exist"


def target_exists(target: str, notebook) -> bool:
    path, _, anchor = target.partition("#")
    if "://" in target:
        return target.startswith("https://")
    if path:
        return (ROOT / "notebooks" / path).exists()
    headings = re.findall(r"^#+ (.+)$", "\n".join(prose(c) for c in notebook.cells if c.cell_type == "markdown"), re.M)
    return anchor in {heading.strip().replace(" ", "-") for heading in headings}


def names(notebook, name: str) -> Iterator[str]:
    """Every name of pwlib in code, in solutions and in the text's `code` exists, and so does every file."""
    bound: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from (f"cell {cell.id} uses {fault}" for fault in unknown_names(cell.source, bound))
            continue
        for language, block in FENCE.findall(cell.source):
            if language == "python":
                yield from (f"cell {cell.id} uses {fault}" for fault in unknown_names(block, dict(bound)))
        yield from (f"cell {cell.id} names {missing}, which does not exist" for missing in missing_names(prose(cell)))


def missing_names(text: str) -> Iterator[str]:
    """Names of pwlib and files of the repository that a markdown text puts in `code` and that do not exist."""
    for code in INLINE_CODE.findall(text):
        yield from (dotted for dotted in DOTTED.findall(code) if not resolves(dotted))
        if FILE.match(code) and not (ROOT / code).exists():
            yield f"the file {code}"


def unknown_names(source: str, bound: dict[str, object]) -> Iterator[str]:
    """Names of pwlib that a cell uses and that do not exist; `bound` maps the notebook's variables to modules."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    # A block whose only line is a magic would be empty without it; `...` replaces the magic.
    text = "\n".join(
        re.match(r"\s*", old)[0] + "..." if old.strip() and not new else new
        for old, new in zip(source.splitlines(), lines, strict=True)
    )
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pwlib":
            for alias in node.names:
                found = look_up(f"{node.module}.{alias.name}")
                if found is None:
                    yield f"{node.module}.{alias.name}, which does not exist"
                bound[alias.asname or alias.name] = found
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "pwlib":
                    found = look_up(alias.name)
                    if found is None:
                        yield f"{alias.name}, which does not exist"
                    bound[alias.asname or "pwlib"] = found if alias.asname else importlib.import_module("pwlib")
    rebound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    rebound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        chain = dotted_chain(node)
        if chain and chain[0] in bound and chain[0] not in rebound:
            found = bound[chain[0]]
            for attribute in chain[1:]:
                if not isinstance(found, ModuleType):
                    break
                if member(found, attribute) is None:
                    yield f"{'.'.join(chain)}, which does not exist"
                    break
                found = member(found, attribute)


def dotted_chain(node: ast.AST) -> list[str]:
    """["data", "load"] of the expression data.load; [] of anything else."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return [node.id, *reversed(attributes)] if attributes and isinstance(node, ast.Name) else []


def resolves(dotted: str) -> bool:
    return look_up(dotted) is not None


def look_up(dotted: str) -> object:
    """Return the module, class, function or attribute with this dotted name of pwlib; None if there is none."""
    first, *rest = dotted.split(".")
    found: object = importlib.import_module(first)
    for attribute in rest:
        found = member(found, attribute)
        if found is None:
            return None
    return found


def member(owner: object, attribute: str) -> object:
    if hasattr(owner, attribute):
        value = getattr(owner, attribute)
        return "None" if value is None else value
    if isinstance(owner, ModuleType):
        try:
            return importlib.import_module(f"{owner.__name__}.{attribute}")
        except ModuleNotFoundError:
            return None
    if inspect.isclass(owner):  # attributes that instances get: annotated, or set through self
        annotated = any(attribute in vars(base).get("__annotations__", {}) for base in owner.__mro__)
        in_source = any(
            re.search(rf"\bself\.{attribute}\b[^=\n]*=", inspect.getsource(base))
            for base in owner.__mro__
            if base.__module__.startswith("pwlib")
        )
        return "attribute" if annotated or in_source else None
    return None


def anatomy(notebook, name: str) -> Iterator[str]:
    """Title, sections, Colab badge, installing cell and kernel are as in every notebook."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if not notebook.cells[0].source.startswith(f"# {name[:2]}"):
        yield f"the first cell is not the title # {name[:2]} · …"
    for part in PARTS:
        if part not in text:
            yield f"there is no part {part!r}"
    first = code_cells(notebook)[0]
    if "nbval-skip" not in tags(first) or "except ImportError" not in first.source:
        yield "the first code cell is not the one about installing pwlib, or is not tagged nbval-skip"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernel is not python3"


def outputs(notebook, name: str) -> Iterator[str]:
    """Outputs are small, contain no path of the machine that ran the notebook, and no warning."""
    stored = 0
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = str(dict(output))
            stored += len(text)
            if MACHINE_PATH.search(re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)):
                yield f"cell {cell.id} shows a path of the machine that ran it"
            if output.output_type == "stream" and output.name == "stderr" and "Warning" in output.text:
                yield f"cell {cell.id} shows a warning"
    explorers = len(str(notebook.metadata.get("widgets", "")))
    if stored > 1.5e6:
        yield f"its outputs take {stored / 1e6:.1f} MB; expected at most 1.5"
    if stored + explorers > 6e6:
        yield f"its outputs and explorers take {(stored + explorers) / 1e6:.1f} MB; expected at most 6"


# ---------------------------------------------------------------------------------------------- the second edition


def widths(notebook, name: str) -> Iterator[str]:
    """Lines are at most 90 characters wide, except in tables, and code cells at most 25 lines long."""
    for cell in notebook.cells:
        if "nbval-skip" in tags(cell):  # `make publish-config` writes the cell that installs
            continue
        for line in cell.source.splitlines():
            if len(line) > WIDTH and not (cell.cell_type == "markdown" and line.startswith("|")):
                yield f"cell {cell.id} has a line of {len(line)} characters; expected at most {WIDTH}: {line[:40]}"
        lines = len(cell.source.splitlines())
        free = "hide-input" in tags(cell) or is_graded_test(cell)  # a graded test cannot be split
        if cell.cell_type == "code" and lines > LENGTH and not free:
            yield f"cell {cell.id} has {lines} lines; expected at most {LENGTH}"
        for output in cell.get("outputs", []):
            for line in output.get("text", "").splitlines():
                if len(line) > WIDTH:
                    yield f"cell {cell.id} prints a line of {len(line)} characters; expected at most {WIDTH}"


def plotting(notebook, name: str) -> Iterator[str]:
    """Alternative texts are in `pwlib.course.figures` or in a cell with the tag hide-input."""
    for cell in code_cells(notebook):
        if "hide-input" not in tags(cell) and re.search(r"\balt=", cell.source):
            yield f"cell {cell.id} contains an alt text: move the figure to pwlib.course.figures, or tag it hide-input"


def wording(notebook, name: str) -> Iterator[str]:
    """Texts and comments use the terms of the field."""
    for cell in notebook.cells:
        text = prose(cell) if cell.cell_type == "markdown" else "\n".join(re.findall(r"#.*", cell.source))
        for found in AVOIDED.finditer(INLINE_CODE.sub("", text).replace("\n", " ")):
            yield f"cell {cell.id} uses {found[0]!r}: use a term of the field"


def ending(notebook, name: str) -> Iterator[str]:
    """The last sections are there, in order; each of three questions has options A to D and an answer."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.+)$", text, re.M)
    for part in ENDING:
        if headings.count(part) != 1:
            yield f"there is no section ## {part}, or more than one"
    if [heading for heading in headings if heading in ENDING] != list(ENDING):
        yield f"its last sections are not in the order {', '.join(ENDING)}"
    questions = text.partition("## Quick questions")[2].partition("\n## ")[0]
    for number, question in enumerate(re.split(r"^\*\*Question \d\.\*\*", questions, flags=re.M)[1:], 1):
        options = re.findall(r"^- ([A-D])\. ", question, re.M)
        answer = re.search(r"<details>\s*<summary>Answer</summary>(.*?)</details>", question, re.S)
        if options != list("ABCD"):
            yield f"question {number} has the options {options}; expected A to D"
        if not answer or not all(re.search(rf"\b{letter}\b", answer[1]) for letter in "ABCD"):
            yield f"question {number} has no answer that explains each of A to D"
    if questions.count("**Question ") != 3:
        yield f"it has {questions.count('**Question ')} quick questions; expected three"


def reading_time(notebook, name: str) -> Iterator[str]:
    """The stated time is that of the words, without solutions, and of the exercises, rounded to 5 minutes."""
    texts = [SOLUTION.sub("", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    minutes = sum(int(effort["minutes"]) for text in texts for effort in EFFORT.finditer(text))
    expected = 5 * round((sum(len(text.split()) for text in texts) / WORDS_PER_MINUTE + minutes) / 5)
    stated = re.search(r"\*\*Time\.\*\* (\d+) minutes", texts[0])
    if not stated or int(stated[1]) != expected:
        yield f"it states {stated[1] if stated else 'no'} minutes; its text and exercises take {expected}"


# ------------------------------------------------------------------------------------------------------ exercises

HEADING = re.compile(r"^### Exercise (?P<name>\d\d\.\d+) · (?P<title>.+)$", re.M)
EFFORT = re.compile(r"^\*(?P<minutes>\d+) minutes · difficulty (?P<stars>[★☆]{3})\*$", re.M)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"""\bcheck\(\s*["'](?P<name>[\d.]+)["']\s*,\s*(?P<answer>\w+)\s*\)""")


@dataclass
class Printed:
    """An exercise as a notebook prints it.

    text: the markdown cell. checked, answer: the name and the variable in the check cell, `check("02.1", answer)`.
    stub, solution: code.
    """

    name: str
    text: str
    stub: str = ""
    checked: str = ""
    answer: str = ""
    solution: str = ""

    def faults(self, registered: dict) -> Iterator[str]:
        """How the text differs from the registered check (`pwlib.course.checks.Exercise`) of the same name."""
        entry, effort = registered[self.name], EFFORT.search(self.text)
        stars = "★" * entry.difficulty + "☆" * (3 - entry.difficulty)
        if HEADING.search(self.text)["title"].strip() != entry.title:
            yield f"is not called {entry.title!r} as in its check"
        if not effort or (int(effort["minutes"]), effort["stars"]) != (entry.minutes, stars):
            yield f"lacks the line *{entry.minutes} minutes · difficulty {stars}*"
        if "<summary>Hint" not in self.text:
            yield "has no hint"
        if self.checked != self.name:
            yield f"is checked as {self.checked!r}"


def exercises(notebook) -> dict[str, Printed]:
    """Return the exercises of a notebook in order: heading, stub tagged `exercise`, check cell, solution."""
    found: dict[str, Printed] = {}
    current = None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if heading := HEADING.search(cell.source):
                current = found[heading["name"]] = Printed(heading["name"], cell.source)
            if current and (solution := SOLUTION.search(cell.source)):
                current.solution, current = solution[1], None
        elif current and "exercise" in tags(cell):
            current.stub += cell.source + "\n"
        elif current and (call := CHECK.search(cell.source)):
            current.checked, current.answer = call["name"], call["answer"]
    return found
