"""Build the course's site: `python docs/build.py OUTPUT [--sources FOLDER]`.

The script copies the executed notebooks in a form that needs no kernel (explorers as HTML, pictures with their
alternative text, remote badges as words) and the labs without their solutions, adds the reference of the library and
MathJax, runs Sphinx, and removes what no page needs.
"""

import argparse
import html
import importlib
import os
import pkgutil
import re
import shutil
import sys
from pathlib import Path

import mathjax
import nbformat
from sphinx.cmd.build import main as sphinx

import pwlib
from pwlib.course.explorer import embed_notebook

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
LABS = NOTEBOOKS / "labs"
sys.path.insert(0, str(LABS / "grading"))

from leaks import leaks  # noqa: E402

NOT_IN_THE_REFERENCE = ("pwlib.__main__", "pwlib.cli", "pwlib.course", "pwlib.tools")
REGION = re.compile(r"^([ \t]*)### BEGIN (SOLUTION|HIDDEN TESTS)\n.*?^[ \t]*### END \2[ \t]*(?:\n|\Z)", re.S | re.M)
ICON = re.compile(r"fa-[a-z0-9-]+")
ICON_RULE = re.compile(r'\.fa-[\w.,-]+\{--fa:"[^"]*"\}')
TOGGLE = '<summary><span class="toctree-toggle"'  # the theme's, without a name for screen readers
STUBS = {"SOLUTION": "\\1# YOUR CODE HERE\n\\1raise NotImplementedError\n", "HIDDEN TESTS": ""}
# 1.6 MB of icons that the theme's stylesheet has as a font, too.
ICON_SCRIPT = re.compile(r'<script defer src="[^"]*fontawesome\.js[^"]*"></script>')
REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
SKILLS = re.compile(r"What you will be able to do\W*\n+((?:[-*] .*\n(?:  .*\n)*)+)")


def page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Convert a notebook for the site."""
    notebook = embed_notebook(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = REMOTE_IMAGE.sub(r"\1", cell.source)
        elif "nbval-skip" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["remove-cell"]
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                alt = html.escape(output.metadata.get("image/png", {}).get("alt", ""))
                picture = f'<img alt="{alt}" src="data:image/png;base64,{png.strip()}">'
                output["data"] = {"text/html": picture, "text/plain": alt}
    return notebook


def lab_page(source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a lab as students get it, without solutions and hidden tests; ValueError if it would show one."""
    lab = nbformat.from_dict(source)
    lab.metadata = nbformat.from_dict({"kernelspec": source.metadata.kernelspec, "language_info": {"name": "python"}})
    for cell in lab.cells:
        marks, cell.metadata = cell.metadata.get("nbgrader", {}), nbformat.from_dict({})
        cell.pop("attachments", None)
        if cell.cell_type == "markdown":
            cell.source = "*Your answer here.*" if marks.get("solution") else cell.source
            continue
        cell.outputs, cell.execution_count = [], None
        cell.source = REGION.sub(lambda found: found.expand(STUBS[found[2]]), cell.source).rstrip()
    if found := leaks(source, lab):
        raise ValueError("The page of a lab would give its answers away: " + "; ".join(found))
    return lab


def title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def contents(notebooks: dict[str, nbformat.NotebookNode], labs: dict[str, nbformat.NotebookNode]) -> str:
    """Return the contents: every notebook with its learning goals, every lab, and Sphinx's tables of contents."""
    lines = []
    for name, notebook in notebooks.items():
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        lines += ["", f"**[{title(notebook)}](notebooks/{name}.ipynb)**", ""]
        if skills := SKILLS.search(text + "\n"):
            lines += skills[1].rstrip().splitlines()
    lines += ["", "## The labs", "", *(f"- [{title(lab)}](labs/{name}.ipynb)" for name, lab in labs.items()), ""]
    tables = [
        toctree("Notebooks", [f"notebooks/{name}" for name in notebooks]),
        toctree("Labs", [f"labs/{name}" for name in labs]),
        toctree("Reference", ["glossary", "api"]),
    ]
    return "\n".join([*lines, *tables])


def summary(thing) -> str:
    return f"`{thing}`" if isinstance(thing, int) else (thing.__doc__ or "").strip().partition("\n")[0]


def write_reference(folder: Path) -> None:
    """Write a page for each module of the library, and one that lists them and the names of `pwlib` itself."""
    (folder / "api").mkdir()
    pages: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(pwlib.__path__, "pwlib."):
        if not module.name.startswith(NOT_IN_THE_REFERENCE):
            pages.setdefault(".".join(module.name.split(".")[:2]), []).append(module.name)
    for page, modules in pages.items():
        blocks = []
        for name in modules:
            heading = [f"# {name}", ""] if name == page else [f"## {name}", ""]
            blocks += [*heading, "```{eval-rst}", f".. automodule:: {name}", "```", ""]
        (folder / "api" / f"{page}.md").write_text("\n".join(blocks), "utf-8")
    lines = ["# Library reference", "", "`import pwlib` provides these names:", "", "| | |", "|---|---|"]
    for name in pwlib.__all__:
        thing = getattr(pwlib, name)
        link = f"`{name}`" if isinstance(thing, int) else f"{{py:obj}}`{name} <{thing.__module__}.{name}>`"
        lines.append(f"| {link} | {summary(thing)} |")
    lines += ["", "The modules:", "", "| | |", "|---|---|"]
    lines += [f"| [{page}](api/{page}.md) | {summary(importlib.import_module(page))} |" for page in pages]
    lines += ["", "```{toctree}", ":hidden:", "", *(f"api/{page}" for page in pages), "```", ""]
    (folder / "api.md").write_text("\n".join(lines), "utf-8")


def explorer_of(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    """Return the explorer that a cell shows, as a block of HTML in Markdown."""
    cells = [cell for cell in notebook.cells if cell.id == cell_id]
    (cell,) = embed_notebook(nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)).cells
    return f"````{{raw}} html\n{cell.outputs[0].data['text/html']}\n````\n"


def write_sources(folder: Path) -> None:
    """Write everything that Sphinx reads to a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    static = folder / "_static"
    for made in (folder / "notebooks", folder / "labs", static / "notebooks", static / "labs"):
        made.mkdir(parents=True)
    notebooks = {path.stem: nbformat.read(path, 4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
    for name, notebook in notebooks.items():
        nbformat.write(page(notebook), folder / "notebooks" / f"{name}.ipynb")
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", static / "notebooks")
    labs = {path.stem: lab_page(nbformat.read(path, 4)) for path in sorted((LABS / "source").glob("lab*/lab*.ipynb"))}
    for name, lab in labs.items():
        for place in (folder, static):
            nbformat.write(lab, place / "labs" / f"{name}.ipynb")
    write_reference(folder)
    for name in ("conf.py", "publish.py", "glossary.md"):
        shutil.copy(HERE / name, folder)
    index = (HERE / "index.md").read_text("utf-8")
    index = index.replace("```{contents-of-the-course}\n```\n", contents(notebooks, labs))
    index = index.replace("```{explorer}\n```\n", explorer_of(notebooks["02_crf_from_scratch"], "02-76"))
    (folder / "index.md").write_text(index, "utf-8")
    for name in ("course.css", "favicon.svg"):
        shutil.copy(HERE / name, static)
    shutil.copy(HERE / "pipeline.png", static / "preview.png")
    es5 = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(es5 / fonts, static / "mathjax" / fonts)
    shutil.copy(es5 / "tex-mml-chtml.js", static / "mathjax")


def finish(output: Path) -> None:
    """Name the theme's buttons, and remove what no page needs: records, maps of scripts, other languages, icons."""
    static = output / "_static"
    used = set()
    for path in output.rglob("*.html"):
        text = ICON_SCRIPT.sub("", path.read_text("utf-8"))
        text = text.replace(TOGGLE, TOGGLE.replace(">", ' aria-label="Pages of this section">', 1))
        path.write_text(text, "utf-8")
        used |= set(ICON.findall(text))
    for path in static.glob("scripts/*theme.js"):
        used |= set(ICON.findall(path.read_text("utf-8")))
    for path in static.glob("styles/*.css"):
        style = path.read_text("utf-8")
        path.write_text(
            ICON_RULE.sub(lambda rule: rule[0] if used & set(ICON.findall(rule[0])) else "", style), "utf-8"
        )
    leftovers = [output / "_sources", output / ".buildinfo", static / "locales", *static.rglob("*.map")]
    for path in [*leftovers, *static.glob("scripts/fontawesome.*"), *static.glob("*webpack-macros.html")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the course's static site.")
    parser.add_argument("output", type=Path, help="the site's folder, build/html for example")
    parser.add_argument("--sources", type=Path, help="folder for Sphinx's sources (default: next to the output)")
    options = parser.parse_args()
    sources = options.sources or options.output.with_name(options.output.name + "-sources")
    write_sources(sources)
    os.environ["PWLIB_ROOT"] = str(HERE.parent)
    shutil.rmtree(options.output, ignore_errors=True)
    # Sphinx's own records stay beside the sources, out of what is published.
    status = sphinx(["-q", "-b", "html", "-d", str(sources / "doctrees"), str(sources), str(options.output)])
    finish(options.output)
    print(f"The site is {options.output / 'index.html'}" if status == 0 else "Sphinx failed")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
