"""Build the course's site: `python docs/build.py OUTPUT [--sources FOLDER]`.

The script copies the executed notebooks in a form that needs no kernel (explorers as HTML, pictures with their
alternative text, remote badges as words), adds MathJax, and runs Sphinx.
"""

import argparse
import html
import os
import re
import shutil
from pathlib import Path

import mathjax
import nbformat
from sphinx.cmd.build import main as sphinx

from pwlib.course.explorer import embed_notebook

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
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


def contents(notebooks: dict[str, nbformat.NotebookNode]) -> str:
    """Return the contents page: every notebook with its learning goals, and Sphinx's table of contents."""
    lines = []
    for name, notebook in notebooks.items():
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        lines += ["", f"**[{notebook.cells[0].source.splitlines()[0].lstrip('# ')}](notebooks/{name}.ipynb)**", ""]
        if skills := SKILLS.search(text + "\n"):
            lines += skills[1].rstrip().splitlines()
    return "\n".join(
        [*lines, "", "```{toctree}", ":hidden:", *(f"notebooks/{name}" for name in notebooks), "glossary", "```", ""]
    )


def explorer_of(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    """Return the explorer that a cell shows, as a block of HTML in Markdown."""
    cells = [cell for cell in notebook.cells if cell.id == cell_id]
    (cell,) = embed_notebook(nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)).cells
    return f"````{{raw}} html\n{cell.outputs[0].data['text/html']}\n````\n"


def write_sources(folder: Path) -> None:
    """Write everything that Sphinx reads to a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    notebooks = {path.stem: nbformat.read(path, 4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
    for name, notebook in notebooks.items():
        nbformat.write(page(notebook), folder / "notebooks" / f"{name}.ipynb")
    for name in ("conf.py", "publish.py", "glossary.md"):
        shutil.copy(HERE / name, folder)
    index = (HERE / "index.md").read_text("utf-8")
    index = index.replace("```{contents-of-the-course}\n```\n", contents(notebooks))
    index = index.replace("```{explorer}\n```\n", explorer_of(notebooks["02_crf_from_scratch"], "02-76"))
    (folder / "index.md").write_text(index, "utf-8")
    static = folder / "_static"
    static.mkdir()
    for name in ("course.css", "favicon.svg"):
        shutil.copy(HERE / name, static)
    es5 = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(es5 / fonts, static / "mathjax" / fonts)
    shutil.copy(es5 / "tex-mml-chtml.js", static / "mathjax")


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
    for leftover in ("_sources", ".buildinfo"):
        path = options.output / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    print(f"The site is {options.output / 'index.html'}" if status == 0 else "Sphinx failed")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
