"""The course as a static site: Sphinx with MyST-NB over the executed notebooks; nothing is run, no other host is asked.

`docs/build.py` lays the sources that this file reads.
"""

project = "pwlib"
author = "the pwlib authors"
copyright = "MIT licence"
html_title = "Structured prediction for images"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # explorers are embedded as plain HTML; no widget manager from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True  # $$…$$ inside a paragraph, as in Jupyter
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

mathjax_path = "mathjax/tex-mml-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its menu would load parts that are not here

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which a browser forbids to a site opened from disk
html_context = {"default_mode": "light"}  # figures are drawn on white
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
