"""The explorer in a real browser: a page without a kernel, and JupyterLab with one. The oracle is the trace itself."""

import math
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch

pytest.importorskip("anywidget")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from kernel_row import kernel_row  # noqa: E402
from pages import CLOSE, colours, drawn, expected, hover, iteration, numbers, painted, table, where  # noqa: E402

from pwlib.context import ContextualCRF  # noqa: E402
from pwlib.course.explorer import embed_notebook  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = ["sky", "sea", "land", "tree"]


@pytest.fixture(scope="module")
def trace(make_trace):
    return make_trace()


@pytest.fixture
def page(still, trace):
    return still(trace, class_names=NAMES, iteration=2, label=1, pixel=(5, 7))


# Without a kernel.


def test_the_table_is_the_trace_at_every_iteration(page, trace):
    page.locator("button.first").click()
    for t in range(trace.iterations + 1):
        assert iteration(page) == t
        np.testing.assert_allclose(table(page), expected(trace, t, *where(page)), **CLOSE)
        if t < trace.iterations:
            page.locator("button.step").click()
    expect(page.locator("button.step")).to_be_disabled()
    page.locator("button.back").click()
    assert iteration(page) == trace.iterations - 1


def test_pointing_reads_every_panel_and_a_click_holds(page, trace):
    for n, panel in enumerate(["image", "unary", "q", "labels", "message0", "message1", "pairwise", "entropy"]):
        row, column = (5 * n + 1) % 24, (7 * n + 3) % 32
        hover(page, panel, trace, row, column)
        assert where(page) == (row, column)
        np.testing.assert_allclose(table(page), expected(trace, 2, row, column), **CLOSE)
    hover(page, "q", trace, 20, 30, click=True)
    hover(page, "q", trace, 3, 3)
    assert where(page) == (20, 30)
    page.keyboard.press("Escape")
    hover(page, "q", trace, 3, 4)
    assert where(page) == (3, 4)


def test_the_slider_takes_every_value(page, trace):
    slider = page.get_by_role("slider", name="Iteration")
    for t in range(trace.iterations + 1):
        slider.fill(str(t))
        assert iteration(page) == t
        np.testing.assert_allclose(table(page), expected(trace, t, *where(page)), **CLOSE)


def test_the_colours_are_the_traces(page, trace):
    """Against matplotlib's own colour maps, for the class and iteration shown."""

    def same(panel, values, low, high, cmap):
        off = np.abs(colours(page, panel).astype(float) - painted(values, low, high, cmap))
        assert off.max() <= 5 and off.mean() < 1.5, f"{panel}: off by {off.max()}"

    page.locator("button.step").click()
    t, c = 3, 1
    same("q", trace.q[t, c], 0, 1, "viridis")
    same("entropy", trace.entropy[t], 0, math.log(4), "cividis")
    same("unary", trace.unary[c], trace.unary[c].min().item(), trace.unary[c].max().item(), "cividis")
    for m in range(2):
        values = trace.messages[:, m, c]
        same(f"message{m}", values[t - 1], values.min().item(), values.max().item(), "viridis")
    values = trace.pairwise[:, c]
    same("pairwise", values[t - 1], values.min().item(), values.max().item(), "cividis")
    np.testing.assert_allclose(colours(page, "image"), 255 * trace.image.permute(1, 2, 0), atol=1)
    painted_labels = colours(page, "labels")
    palette = np.array([painted_labels[tuple(np.argwhere(trace.labels[t].numpy() == k)[0])] for k in range(4)])
    np.testing.assert_array_equal(painted_labels, palette[trace.labels[t].numpy()])
    assert len(np.unique(palette, axis=0)) == 4


def test_the_senders_are_the_kernels_row(page, trace):
    hover(page, "image", trace, 9, 17, click=True)
    for m in range(2):
        mass = kernel_row(trace, m, 9 * 32 + 17) * trace.q[1, 1]
        off = np.abs(colours(page, f"senders{m}").astype(float) - painted(mass, 0, mass.max().item(), "viridis"))
        assert off.max() <= 5
        # What all pixels send adds up to the message in the table.
        total = numbers(page.locator(f".senders{m} .sum").inner_text().removeprefix("Σ "))
        assert total == pytest.approx(trace.messages[1, m, 1, 9, 17].item(), abs=2e-3)
    page.get_by_role("button", name="weight", exact=True).click()
    for m in range(2):
        weights = kernel_row(trace, m, 9 * 32 + 17)
        off = np.abs(colours(page, f"senders{m}").astype(float) - painted(weights, 0, weights.max().item(), "viridis"))
        assert off.max() <= 5


def test_the_class_is_chosen_from_the_list_or_the_table(page, trace):
    page.get_by_label("Class shown").select_option("tree")
    np.testing.assert_allclose(colours(page, "q"), painted(trace.q[2, 3], 0, 1, "viridis"), atol=5)
    page.locator(".explorer tbody tr").nth(2).click()
    np.testing.assert_allclose(colours(page, "q"), painted(trace.q[2, 2], 0, 1, "viridis"), atol=5)
    assert page.get_by_label("Class shown").input_value() == "2"


def test_playing_goes_through_all_iterations_and_stops(page, trace):
    page.locator("button.first").click()
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    seen = set()
    for _ in range(100):
        seen.add(iteration(page))
        if max(seen) == trace.iterations:
            break
        page.wait_for_timeout(100)
    assert seen == set(range(trace.iterations + 1))
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.get_by_role("button", name="Play").click()  # from the end: once more from the start
    assert iteration(page) < 2
    page.get_by_role("button", name="Pause").click()
    paused = iteration(page)
    page.wait_for_timeout(1400)
    assert iteration(page) == paused


def test_the_keyboard_does_it_all(page, trace):
    def at_focus():
        return page.evaluate(
            "() => { const a = document.querySelector('.pwlib-explorer').shadowRoot.activeElement;"
            " return a && (a.dataset.panel || a.ariaLabel || a.getAttribute('aria-labelledby') || a.textContent); }"
        )

    order = []
    for _ in range(13):
        page.keyboard.press("Tab")
        order.append(at_focus())
    assert order[:7] == [
        "First iteration", "Step back", "Play", "Step forward", "Last iteration", "Iteration", "Class shown"
    ]  # fmt: skip
    assert order[7:] == ["weight × q", "weight", "image", "Energy", "tab-0", "Numbers of the marked pixel"]
    page.locator("canvas[data-panel=image]").focus()
    for key, by in {"ArrowRight": (0, 1), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowUp": (-1, 0)}.items():
        row, column = where(page)
        page.keyboard.press(key)
        assert where(page) == (row + by[0], column + by[1])
    row, column = where(page)
    page.keyboard.press("Shift+ArrowRight")
    assert where(page) == (row, column + 8)
    for _ in range(5):
        page.keyboard.press("Shift+ArrowUp")  # stops at the border
    assert where(page) == (0, column + 8)
    for key, t in {"PageDown": 3, "PageUp": 2, "End": 6, "Home": 0}.items():
        page.keyboard.press(key)
        assert iteration(page) == t
    page.locator("button.play").focus()
    for key, t in {"ArrowRight": 1, "End": 6, "ArrowLeft": 5, "Home": 0}.items():
        page.keyboard.press(key)
        assert iteration(page) == t
    page.locator("input").focus()
    for key, t in {"ArrowRight": 1, "End": 6, "ArrowLeft": 5, "Home": 0}.items():
        page.keyboard.press(key)
        assert iteration(page) == t
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_it_can_be_heard(page, trace):
    labels = page.locator(".explorer canvas").evaluate_all("all => all.map(c => c.getAttribute('aria-label'))")
    assert len(labels) == 10 and all("iteration 2" in label for label in labels)
    q = trace.q[2, 1, 5, 7].item()
    assert f"marginal, class sea, iteration 2: from 0 to 1.000; {q:.3f} at the marked pixel" in labels
    names = page.locator(".explorer button").evaluate_all(
        "all => all.map(b => b.getAttribute('aria-label') || b.textContent)"
    )
    assert all(names) and len(set(names)) == len(names)
    page.locator("button.step").click()
    changed = int((trace.labels[3] != trace.labels[2]).sum())
    live = page.locator(".explorer [aria-live=polite]")
    expect(live).to_contain_text("Iteration 3 of 6. Free energy")
    expect(live).to_contain_text(f"{changed} of 768 pixels changed label.")
    page.locator("canvas[data-panel=q]").click(position={"x": 2, "y": 2})
    page.keyboard.press("ArrowRight")
    expect(live).to_contain_text("Row 0, column 1: ")
    free = page.locator(".charts svg").first.get_attribute("aria-label")
    assert "never rises" in free
    assert page.locator(".pwlib-explorer").get_attribute("data-lm-suppress-shortcuts") == "true"


def test_a_sign_error_shows(still, make_trace, page, trace):
    assert page.locator(".explorer .warning").count() == 0
    wrong = still(make_trace(torch.eye(4) - 1), iteration=4)
    warning = wrong.locator(".explorer .warning")
    expect(warning.filter(has_text="the labels oscillate")).to_be_visible()
    assert wrong.locator(".segment.rise").count() > 0
    assert "rises in places" in wrong.locator(".charts svg").first.get_attribute("aria-label")


def test_free_energy_is_drawn_to_scale(page, trace):
    energy = trace.free_energy.numpy()
    circles = page.locator(".charts circle").evaluate_all(
        "all => all.map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
    )
    x, y = np.array(circles).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), np.linspace(0, 1, 7), atol=1e-3)
    np.testing.assert_allclose((y.max() - y) / np.ptp(y), (energy - energy.min()) / np.ptp(energy), atol=1e-3)
    first = page.locator(".charts svg").first.bounding_box()
    page.mouse.click(first["x"] + x[5], first["y"] + 40)
    assert iteration(page) == 5


@pytest.mark.parametrize("kernels", [1, 3, 5])
def test_any_number_of_kernels(still, trace, kernels):
    pick = [m % 2 for m in range(kernels)]
    many = replace(
        trace,
        kernels=tuple(f"relation {m}" for m in range(kernels)),
        messages=trace.messages[:, pick],
        weights=trace.weights[pick],
        features=tuple(trace.features[m] for m in pick),
        sums=trace.sums[pick],
    )
    page = still(many, iteration=3, pixel=(4, 4))
    assert page.locator("canvas").count() == 6 + 2 * kernels
    np.testing.assert_allclose(table(page), expected(many, 3, 4, 4), **CLOSE)
    left = [
        page.locator(f".{p}{m}").bounding_box()["x"] for p in ("message", "senders") for m in range(min(kernels, 3))
    ]
    assert kernels > 4 or left[: len(left) // 2] == pytest.approx(left[len(left) // 2 :], abs=8)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_bare_trace_on_a_coarse_grid(still, trace):
    """No features, no weights, no free energy, an image finer than the grid: what a contextual CRF may bring."""
    image = torch.rand(3, 96, 128)
    bare = replace(trace, image=image, features=(), sums=None, free_energy=None, weights=None, compatibility=None)
    page = still(bare, iteration=1, pixel=(3, 3))
    np.testing.assert_allclose(table(page), expected(bare, 1, 3, 3), **CLOSE)
    assert page.locator(".senders0").count() == 0 and page.locator("circle").count() == 0
    assert colours(page, "image").shape == (96, 128, 3)


def test_a_contextual_trace_shows_what_each_relation_says(still):
    torch.manual_seed(3)
    crf = ContextualCRF(4, 3, hidden=6)
    for network in crf.networks.values():
        torch.nn.init.normal_(network.scores.weight)
    image = torch.rand(3, 36, 48)
    trace = crf.trace(2 * torch.randn(4, 9, 12), torch.randn(3, 9, 12), image)
    page = still(trace, class_names=NAMES, iteration=0, label=1, pixel=(5, 7))
    headings = page.locator(".explorer thead th").all_inner_texts()
    assert headings == ["class", "unary ψ", "surrounding msg", "above_below msg", "pairwise", "ψ + pw.", "q", "pixels"]
    for t in range(4):
        np.testing.assert_allclose(table(page), expected(trace, t, 5, 7), **CLOSE)
        if t < 3:
            page.locator("button.step").click()
    assert colours(page, "image").shape == (36, 48, 3) and colours(page, "q").shape == (9, 12, 3)
    for relation in crf.relations:
        assert page.get_by_role("img", name=f"message of the {relation} kernel").count() == 1


def test_two_labels_one_iteration(still, make_trace):
    small = make_trace(classes=2, iterations=1)
    page = still(small, pixel=(0, 31))
    np.testing.assert_allclose(table(page), expected(small, 1, 0, 31), **CLOSE)
    page.locator("button.back").click()
    np.testing.assert_allclose(table(page), expected(small, 0, 0, 31), **CLOSE)
    assert page.locator(".message0 .blank").inner_text() == "no message yet"


@pytest.mark.timed
def test_the_largest_trace_stays_quick(still, trace):
    """21 labels, 30 iterations, 96 x 128 pixels, and a step still takes a fraction of a second."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(1, 2, 21, 96, 128, generator=generator).exp()
    messages = step * torch.linspace(1, 0.5, 30)[:, None, None, None, None]
    weights, compatibility = torch.tensor([1.0, 0.5]), 1 - torch.eye(21)
    pairwise = torch.einsum("kl,m,tmlhw->tkhw", compatibility, weights, messages)
    unary = torch.rand(21, 96, 128, generator=generator)
    q = torch.softmax(-unary - torch.cat([torch.zeros_like(pairwise[:1]), pairwise]), dim=1)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    big = replace(
        trace,
        image=torch.rand(3, 96, 128, generator=generator),
        unary=unary,
        weights=weights,
        compatibility=compatibility,
        messages=messages,
        pairwise=pairwise,
        q=q,
        free_energy=torch.linspace(2, 1, 31),
        features=(torch.stack([x, y], -1).reshape(-1, 2),) * 2,
        sums=torch.ones(2, 96 * 128),
    )
    with pytest.warns(UserWarning, match=r"this explorer holds \d+ MB"):
        page = still(big, iteration=1, pixel=(50, 60))
    milliseconds = page.evaluate(
        """async () => {
            const root = document.querySelector(".pwlib-explorer").shadowRoot, step = root.querySelector("button.step");
            const frame = () => new Promise((done) => requestAnimationFrame(done)), times = [];
            for (let n = 0; n < 5; n++) {
                const start = performance.now();
                step.click();
                await frame();
                await frame();
                times.push(performance.now() - start);
            }
            return times.sort((a, b) => a - b)[2];
        }"""
    )
    np.testing.assert_allclose(table(page), expected(big, 6, 50, 60), rtol=4e-3, atol=4e-3)
    assert milliseconds < 700


@pytest.mark.parametrize("width", [400, 640, 900, 1400])
def test_it_fits_its_column(still, trace, width):
    page = still(trace, width=width, class_names=["a class of a rather long name", *NAMES[1:]])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [page.locator(f"canvas[data-panel={p}]").bounding_box() for p in ("image", "unary", "q", "labels")]
    assert len({round(b["width"]) for b in boxes}) == 1
    assert all(b["width"] / b["height"] == pytest.approx(32 / 24, rel=0.02) for b in boxes)


def test_dark_pages_stay_legible(still, trace):
    page = still(trace, style="background: #111; color: #ddd", class_names=NAMES)
    for selector in (".status", "td", "caption", "button.play", "select", ".legend"):
        colour = page.locator(f".explorer {selector}").first.evaluate(
            """node => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = '#111';
                c.fillRect(0, 0, 1, 1); c.fillStyle = getComputedStyle(node).color; c.fillRect(0, 0, 1, 1);
                return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); }"""
        )
        light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]
        contrast = (luminance + 0.05) / (0.0056 + 0.05)
        assert contrast > 4.5, f"{selector}: contrast {contrast:.1f}"


# A notebook, stored and live.


def test_an_exported_notebook_needs_no_kernel(executed, open_page, tmp_path, trace):
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    # nbconvert's own template asks a CDN for RequireJS and MathJax; here it is the explorer's turn to ask for nothing.
    config = Config({"HTMLExporter": {"preprocessors": ["pwlib.course.explorer.embed_notebook"]}})
    html, _ = HTMLExporter(config=config, require_js_url="", mathjax_url="").from_notebook_node(executed)
    path = tmp_path / "exported.html"
    path.write_text(html, encoding="utf-8")
    page = open_page(path.as_uri(), width=1100)
    drawn(page)
    # The cell after the explorer's set these from Python, before the notebook was stored.
    assert iteration(page) == 4 and where(page) == (3, 5)
    np.testing.assert_allclose(table(page), expected(trace, 4, 3, 5), **CLOSE)
    page.locator("button.step").click()
    hover(page, "labels", trace, 11, 13)
    np.testing.assert_allclose(table(page), expected(trace, 5, 11, 13), **CLOSE)


def test_a_stored_notebook_is_small_and_valid(executed):
    assert len(nbformat.writes(executed)) < 0.5e6
    nbformat.validate(embed_notebook(executed))
    assert "object at 0x" not in nbformat.writes(executed)


def test_in_jupyterlab(lab, open_page, trace):
    page = open_page(lab("explorer.ipynb"), width=1300, height=1300)
    page.set_default_timeout(60_000)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    cells = page.locator(".jp-CodeCell")

    def run(cell: int) -> None:
        cells.nth(cell).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")

    def python_knows() -> str:
        run(2)
        expect(cells.nth(2).locator(".jp-InputPrompt")).not_to_have_text("[*]:")
        page.wait_for_timeout(300)
        return cells.nth(2).locator(".jp-OutputArea-output").inner_text().strip()

    run(0)
    run(1)
    drawn(page)
    assert iteration(page) == 2
    np.testing.assert_allclose(table(page), expected(trace, 2, *where(page)), **CLOSE)
    page.locator("button.step").click()
    hover(page, "q", trace, 9, 17, click=True)
    np.testing.assert_allclose(table(page), expected(trace, 3, 9, 17), **CLOSE)
    page.get_by_label("Class shown").select_option("land")
    # JupyterLab leaves our keys to us: no cell is added, deleted or run by them.
    page.locator("canvas[data-panel=q]").focus()
    for key in ("ArrowDown", "ArrowRight", "a", "b", "d", "d", "PageDown"):
        page.keyboard.press(key)
    assert cells.count() == 4 and where(page) == (10, 18) and iteration(page) == 4
    page.wait_for_timeout(500)
    assert python_knows() == "4 2 (10, 18) mass"
    # And the other way round.
    run(3)
    expect(page.locator(".explorer caption")).to_contain_text("pixel (3, 5)")
    assert iteration(page) == 4
    np.testing.assert_allclose(table(page), expected(trace, 4, 3, 5), **CLOSE)
    page.get_by_role("button", name="Play").click()
    page.wait_for_selector("text=iteration 6 of 6")
    page.wait_for_timeout(500)
    assert python_knows() == "6 2 (3, 5) mass"


def test_a_large_image_is_computed_by_the_kernel(lab, open_page, large_problem):
    page = open_page(lab("large.ipynb"), width=1300, height=900)
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    for cell in page.locator(".jp-CodeCell .cm-content").all():
        cell.click()
        page.keyboard.press("Control+Enter")
    drawn(page)
    image, logits, crf = large_problem()
    np.testing.assert_allclose(table(page), expected(crf.trace(logits, image, iterations=2), 2, 5, 7), **CLOSE)
    page.locator("input[data-setting=w_bilateral]").evaluate(
        "node => { node.value = 60; for (const kind of ['input', 'change']) node.dispatchEvent(new Event(kind)); }"
    )
    page.wait_for_selector(".explorer[data-busy=true]")
    page.wait_for_selector(".explorer[data-busy=false]")
    image, logits, crf = large_problem(w_bilateral=0.158)  # 0.01 * (100 / 0.01)^(60 / 200)
    np.testing.assert_allclose(table(page), expected(crf.trace(logits, image, iterations=2), 2, 5, 7), **CLOSE)


def test_a_notebook_that_is_not_trusted_asks_to_run_the_cell(lab, open_page, executed, notebook_path):
    nbformat.write(executed, notebook_path.with_name("stored.ipynb"))
    page = open_page(lab("stored.ipynb"), width=1300, height=900)
    expect(page.get_by_text("Mean-field explorer. Run this cell to use it.")).to_be_visible()
    assert page.locator(".explorer").count() == 0
