"""Sphinx settings of the site: MyST-NB on the executed notebooks, which are not run; nothing loads from other hosts.

`docs/build.py` prepares the sources and runs Sphinx.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import publish

project = "pwlib"
author = "the pwlib authors"
copyright = "text: CC BY 4.0, code: MIT licence"
html_title = "Structured prediction for images"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # explorers are embedded as plain HTML and need no widget manager
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True  # $$…$$ inside a paragraph, as in Jupyter
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

mathjax_path = "mathjax/tex-mml-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its menu would load files that are not included

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_favicon = "_static/favicon.svg"
myst_html_meta = {
    "description": "A course in executable notebooks on segmentation with a CNN and a conditional random field."
}
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers do not allow from disk
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
if address := publish.repository(Path(os.environ["PWLIB_ROOT"])):
    html_theme_options |= {
        "repository_url": f"https://github.com/{address}",
        "repository_branch": "main",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
    }
