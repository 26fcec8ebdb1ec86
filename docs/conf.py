"""Sphinx settings of the site: MyST-NB on the executed notebooks, which are not run; nothing loads from other hosts.

`docs/build.py` prepares the sources and runs Sphinx.
"""

project = "pwlib"
author = "the pwlib authors"
copyright = "MIT licence"
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
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers do not allow from disk
html_context = {"default_mode": "light"}  # figures have a white background
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
