"""`make html`: the site as a reader opens it from disk, in a browser, with no other host in reach."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest

import pwlib
from pwlib.course import photos

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("sphinx")
    output = tmp_path_factory.mktemp("site") / "html"
    build = subprocess.run([sys.executable, ROOT / "docs" / "build.py", output], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    # That notebooks link to what exists is test_notebooks.py's to say.
    warnings = [line for line in build.stderr.splitlines() if "WARNING" in line and "xref_missing" not in line]
    assert not warnings, warnings
    return output


def title(path: Path) -> str:
    return nbformat.read(path, 4).cells[0].source.splitlines()[0].lstrip("# ")


def test_contents_name_every_notebook(site, open_page):
    page = open_page((site / "index.html").as_uri())
    listed = page.locator("article").inner_text().replace("’", "'")  # Sphinx sets apostrophes as a printer would
    for path in NOTEBOOKS:
        assert title(path) in listed
        assert page.locator(f"article a[href='notebooks/{path.stem}.html']").count() == 1
    page.locator("article a[href='notebooks/00_why_structure.html']").click()
    assert page.locator("h1").first.inner_text().startswith("00")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_page_of_a_notebook(site, open_page, path):
    """Mathematics set, pictures there and described, explorers alive, links to other notebooks not dead."""
    page = open_page((site / "notebooks" / f"{path.stem}.html").as_uri())
    notebook = nbformat.read(path, 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if "$" in re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S):
        page.wait_for_function("document.querySelectorAll('mjx-container').length > 0")
        page.evaluate("MathJax.startup.promise")
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        assert page.locator(".math:not(:has(mjx-container))").count() == 0
        paragraphs = page.locator("article p:not(:has(code)), article li:not(:has(code))").all_inner_texts()
        assert not [text for text in paragraphs if "$" in text], "mathematics left as it was typed"
    pictures = page.locator(".cell_output img")
    drawn = pictures.evaluate_all("all => all.map(i => [i.complete && i.naturalWidth > 0, i.alt.length])")
    stored = sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))
    assert len(drawn) >= stored
    assert all(loaded and length >= 20 for loaded, length in drawn)
    explorers = str(notebook.cells).count("application/vnd.jupyter.widget-view+json")
    assert page.locator(".pwlib-explorer").count() == explorers
    for target in page.locator("article a[href$='.html']").evaluate_all("all => all.map(a => a.href)"):
        assert Path(target.removeprefix("file://")).exists(), target
    folded = sum("hide-input" in cell.metadata.get("tags", []) for cell in notebook.cells)
    assert page.locator(".tag_hide-input details").count() == folded
    raw = page.locator("article a[href$='.ipynb']").evaluate_all("all => all.map(a => a.href)")
    assert not [a for a in raw if a.startswith("file:") and Path(a).stem in {p.stem for p in NOTEBOOKS}]


def test_on_a_phone_figures_keep_a_readable_size_and_the_page_does_not_scroll_sideways(site, open_page):
    page = open_page((site / "notebooks" / "05_three_stages.html").as_uri(), width=390, height=800)
    sizes = page.locator(".cell_output img").evaluate_all("all => all.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) > 10 and all(shown >= min(natural, 600) for natural, shown in sizes), sizes
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_an_explorer_steps_on_the_page(site, open_page):
    with_explorer = [p for p in NOTEBOOKS if "widget-view+json" in p.read_text("utf-8")]
    if not with_explorer:
        pytest.skip("no notebook stores an explorer yet")
    page = open_page((site / "notebooks" / f"{with_explorer[0].stem}.html").as_uri())
    slider = page.locator(".pwlib-explorer").first.locator("input[type=range]").first
    before = slider.input_value()
    key = "ArrowRight" if before != slider.get_attribute("max") else "ArrowLeft"
    for _ in range(20):  # on a busy machine the explorer may draw itself once more after the first press
        slider.press(key)
        if slider.input_value() != before:
            break
        page.wait_for_timeout(100)
    assert slider.input_value() != before


def test_the_front_page_segments_a_photograph_and_follows_the_theme(site, open_page):
    page = open_page((site / "index.html").as_uri(), width=1280, height=720)
    page.locator(".explorer").scroll_into_view_if_needed()  # it computes when it comes into view
    page.wait_for_selector(".explorer[data-busy=false]")
    page.get_by_role("tab", name="Paint").click()
    share = 100 * (photos.strokes("portrait", (61, 52)) != pwlib.VOID).float().mean()  # as in notebook 02
    assert page.locator(".share").inner_text() == f"{share:.1f} % of the pixels painted"
    for theme in ("dark", "light"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        page.wait_for_selector(f".frame[data-theme={theme}]")


@pytest.fixture
def served(site):
    """The address of the site on a server of this machine, and the sizes of the files that it sent."""
    sent = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path = Path(self.translate_path(self.path))
            sent[path.name] = path.stat().st_size if path.is_file() else 0
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


def test_the_front_page_is_light_and_shows_its_icons(served, open_page):
    address, sent = served
    page = open_page(f"{address}/index.html", width=1280, height=720)
    page.wait_for_load_state("networkidle")
    assert sum(sent.values()) < 1_000_000, sent
    drawn = "icon => getComputedStyle(icon, '::before').content"
    icons = page.locator("i[class*='fa-']").evaluate_all(f"icons => icons.map({drawn})")
    assert icons and all(icon not in ("none", "normal") for icon in icons)
    assert page.evaluate("document.fonts.check('900 16px \"Font Awesome 7 Free\"')")


@pytest.mark.parametrize("name", ["02_crf_from_scratch", "03_messages_fast"])
def test_axe_finds_nothing_in_explorers_that_nobody_has_scrolled_to(served, open_page, name):
    """An explorer computes when it comes into view; before that its panels are empty."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(f"{served[0]}/notebooks/{name}.html")
    page.locator(".pwlib-explorer [role=toolbar]").first.wait_for(state="attached")
    found = axe.run(page, context=".pwlib-explorer", options={"preload": False}).response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"][:200]) for v in found]


def test_search_finds_a_word_and_quotes_its_page(site, served, open_page):
    for address in (site.as_uri(), served[0]):
        page = open_page(f"{address}/search.html?q=independence")
        page.wait_for_selector("#search-results li a")
        found = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        assert any("00_why_structure" in href for href in found)
    page.wait_for_selector("#search-results li p.context")
    assert "independen" in page.locator("#search-results li p.context").first.inner_text().lower()


def test_a_lab_shows_its_tasks_and_no_solution(site, open_page):
    for path in sorted((ROOT / "notebooks" / "labs" / "source").glob("lab*/lab*.ipynb")):
        text = (site / "labs" / f"{path.stem}.html").read_text("utf-8")
        tasks = sum("### BEGIN SOLUTION" in cell.source for cell in nbformat.read(path, 4).cells)
        assert tasks and text.count("# YOUR CODE HERE") == tasks
        assert not re.search(r"BEGIN (SOLUTION|HIDDEN)", text)


def test_every_public_name_is_in_the_reference(site):
    listed = (site / "api.html").read_text("utf-8")
    for name in pwlib.__all__:
        assert name in listed
    for page, name in (("pwlib.crf", "pwlib.crf.DenseCRF.trace"), ("pwlib.graph", "pwlib.graph.mean_field")):
        assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text("utf-8")


def test_pages_lead_on_and_notebooks_can_be_downloaded(site, open_page):
    page = open_page((site / "notebooks" / "02_crf_from_scratch.html").as_uri())
    assert page.locator("a.left-prev").get_attribute("href") == "01_unary_network.html"
    assert page.locator("a.right-next").get_attribute("href") == "03_messages_fast.html"
    link = page.locator("a[title='Download this notebook'], a[data-bs-original-title='Download this notebook']")
    copy = Path(link.evaluate("a => a.href").removeprefix("file://"))
    assert copy.read_bytes() == (ROOT / "notebooks" / "02_crf_from_scratch.ipynb").read_bytes()
    assert page.locator("meta[property='og:image']").get_attribute("content").endswith("_static/preview.png")
    assert (site / "_static" / "preview.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_equations_and_code_fit_on_a_laptop(site, open_page, path):
    page = open_page((site / "notebooks" / f"{path.stem}.html").as_uri(), width=1280, height=720)
    page.evaluate("window.MathJax && MathJax.startup && MathJax.startup.promise")
    wide = "all => all.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    assert not page.locator("article div.math, article div.math > mjx-container").evaluate_all(wide)
    code = page.locator("article .cell_input pre").evaluate_all(wide)
    assert all(max(map(len, cell.splitlines())) > 90 for cell in code), "90 characters fit"


def test_a_reader_with_a_narrow_screen_needs_no_sideways_scrolling(site, open_page):
    page = open_page((site / "notebooks" / "00_why_structure.html").as_uri(), width=400, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 410
