"""Sphinx settings of the site: MyST-NB on the executed notebooks, which are not run; nothing loads from other hosts.

`docs/build.py` prepares the sources and runs Sphinx.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import publish

project = "pwlib"
author = "the pwlib authors"
copyright = "text: CC BY 4.0, code: MIT licence"
html_title = "pwlib: a hands-on course on CNN + CRF segmentation"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
highlight_language = "none"  # of docstrings' indented blocks: equations and tables
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # explorers are embedded as plain HTML and need no widget manager
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True  # $$…$$ inside a paragraph, as in Jupyter
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

mathjax_path = "mathjax/tex-mml-chtml.js"
# MathJax's menu would load files that are not included. Equations as large as the text fit at 1280 pixels.
mathjax3_config = {"options": {"enableMenu": False}, "chtml": {"matchFontHeight": False}}

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_favicon = "_static/favicon.svg"
description = "A course in executable notebooks on segmentation with a CNN and a conditional random field."
myst_html_meta = {
    "description": description,
    "property=og:title": html_title,
    "property=og:description": description,
    "property=og:type": "website",
    "property=og:image": "_static/preview.png",
}
html_copy_source = False
# Snippets are taken from the pages, which browsers do not allow a page from disk to read. Equations that are wider than
# the screen can be scrolled with the keyboard.
SCRIPT = """
DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== "file:";
addEventListener("load", () => window.MathJax?.startup?.promise.then(() => {
  for (const equation of document.querySelectorAll("mjx-container[display]"))
    if (equation.scrollWidth > equation.clientWidth) equation.tabIndex = 0;
}));
"""
html_js_files = [(None, {"body": SCRIPT})]
html_context = {"default_mode": "auto"}  # course.css gives figures a white background in the dark
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
# docs/build.py names the project's folder; its address is set by `make publish-config`.
address = publish.repository(Path(os.environ["PWLIB_ROOT"]))
if address:
    owner, _, name = address.partition("/")
    html_baseurl = f"https://{owner.lower()}.github.io/{name}/"
    myst_html_meta["property=og:image"] = f"{html_baseurl}_static/preview.png"
    html_theme_options |= {
        "repository_url": f"https://github.com/{address}",
        "use_repository_button": True,
        "use_issues_button": True,
    }


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    folder, _, name = page.rpartition("/")
    if folder == "labs":
        return f"notebooks/labs/source/{name}/{name}.ipynb"
    if folder == "notebooks":
        return f"{page}.ipynb"
    if folder == "api":
        return os.path.relpath(sys.modules[name].__file__, os.environ["PWLIB_ROOT"]).replace(os.sep, "/")
    return f"docs/{page}.md"


def add_buttons(app, page: str, template: str, context: dict, doctree) -> None:
    """Add links that download a notebook and edit a page's source."""
    if doctree is None:
        return
    buttons = context["header_buttons"]
    if page.startswith(("notebooks/", "labs/")):
        url = context["pathto"](f"_static/{page}.ipynb", 1)
        buttons.append({"type": "link", "url": url, "icon": "fas fa-download", "tooltip": "Download this notebook"})
    if address:
        url = f"https://github.com/{address}/edit/main/{source_of(page)}"
        buttons.append({"type": "link", "url": url, "icon": "fas fa-pencil-alt", "tooltip": "Edit this page"})


def inline_rst(text: str) -> str:
    """Double the backticks of `code`, and escape what reStructuredText would read as markup."""
    pieces = re.split(r"(`[^`]+`)", text)
    pieces[::2] = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    # A word may go on after code (`Kernel`s), which reStructuredText allows after an escaped space.
    pieces[1::2] = [
        f"`{code}`\\ " if re.match(r"\w", after) else f"`{code}`"
        for code, after in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return "".join(pieces)


def plain_to_rst(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Turn a docstring's plain text into reStructuredText: an indented block is literal, `code` is code.

    The sections Args and Raises of Google's style stay as they are for napoleon, which runs next. Returns becomes a
    field of its own, since napoleon takes the text before a colon as a type.
    """
    result: list[str] = []
    section, literal = "", False
    for line in lines:
        indent, last = len(line) - len(line.lstrip()), result[-1] if result else ""
        if line.strip() and not indent:
            section, literal = line.strip() if line.strip() in ("Args:", "Returns:", "Raises:") else "", False
            if section == "Returns:":
                line = ":returns:"
            elif re.match(r"[-*] |\d+\. ", line) and last.strip() and not re.match(r"[-*] |\d+\. |  ", last):
                result.append("")
        elif section == "Returns:" and (value := re.match(r" {4}(\w+): ", line)):
            line = f"    - `{value[1]}`: {line[value.end() :]}"
            result += [""] if last == ":returns:" else []
        elif section == "Returns:" and indent > 4:
            line = line[2:]
        elif indent and not section and not literal and not last.strip():
            result += ["::", ""]
            literal = True
        result.append(line if literal else inline_rst(line))
    lines[:] = result


def setup(app) -> None:
    app.connect("html-page-context", add_buttons, priority=900)  # after the theme's own
    app.connect("autodoc-process-docstring", plain_to_rst, priority=100)  # before napoleon
