"""The explorer that computes: settings, strokes, small graphs and pairs. The oracle is `DenseCRF.trace`."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from pages import CLOSE, colours, drawn, expected, hover, iteration, numbers, table, where  # noqa: E402

from pwlib.course.explorer import explore  # noqa: E402
from pwlib.crf import DenseCRF  # noqa: E402
from pwlib.data import VOID  # noqa: E402
from pwlib.tools.dense import probabilities_from_labels  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = ["sky", "sea", "land", "tree"]
PENS = np.array([[255, 0, 255], [0, 255, 255], [255, 255, 0], [1, 2, 3]], np.uint8)
LOOSE = {"rtol": 3e-3, "atol": 3e-3}  # digits on the page, and single precision in Python


def problem(classes=4, height=24, width=32, **options):
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x > 0.5) * 0.6 + 0.2]) + 0.05 * torch.rand(3, height, width, generator=generator)
    truth = (2 * (y > 0.5) + (x > 0.5)).long() % classes
    logits = 1.5 * torch.nn.functional.one_hot(truth, classes).permute(2, 0, 1)
    logits = (logits + torch.randn(classes, height, width, generator=generator)).half().float()
    image = (255 * image.clamp(0, 1)).round() / 255
    settings = {
        "theta_alpha": 6,
        "theta_beta": 40,
        "theta_gamma": 1.5,
        "w_bilateral": 3,
        "w_spatial": 2,
        "iterations": 6,
    }
    return image, logits, DenseCRF(classes, **(settings | options), filtering="exact")


def computed(page) -> None:
    """Wait until the last computation has ended and is drawn."""
    page.wait_for_selector(".explorer[data-busy=false]")
    drawn(page)


def move(page, setting: str, value: int) -> None:
    """Put a slider at a position and let it go, as a hand does."""
    page.locator(f"input[data-setting={setting}]").evaluate(
        "(node, value) => { node.value = value; for (const kind of ['input', 'change'])"
        " node.dispatchEvent(new Event(kind, { bubbles: true })); }",
        value,
    )
    computed(page)


def follow_the_line(page, image, logits, **names):
    """The trace that the copyable line of Python makes."""
    line = page.locator(".python").first.inner_text()
    assert re.fullmatch(r"DenseCRF\(.*\)\.trace\(.*\)", line)
    names |= {"DenseCRF": DenseCRF, "torch": torch, "image": image, "logits": logits}
    return eval(line.replace("iterations=", "filtering='exact', iterations=", 1), names)


@pytest.fixture
def live(still):
    def show(*source, **options):
        page_options = {name: options.pop(name) for name in ("style", "width", "height", "media") if name in options}
        page = still(explore(*source, **{"class_names": NAMES, **options}), **page_options)
        computed(page)
        return page

    return show


def test_it_computes_what_python_does(live):
    image, logits, crf = problem()
    page = live(image, logits, crf, iteration=0, pixel=(5, 7))
    trace = crf.trace(logits, image, iterations=6)
    for t in range(7):
        assert iteration(page) == t
        np.testing.assert_allclose(table(page), expected(trace, t, 5, 7), **LOOSE)
        if t < 6:
            page.locator("button.step").click()
    hover(page, "q", trace, 20, 30, click=True)
    for m in range(2):
        total = numbers(page.locator(f".senders{m} .sum").inner_text().removeprefix("Σ "))
        c = page.get_by_label("Class shown").input_value()
        assert total == pytest.approx(trace.messages[5, m, int(c), 20, 30].item(), abs=2e-3)


def test_every_setting_does_what_its_line_of_python_does(live):
    image, logits, crf = problem()
    page = live(image, logits, crf, pixel=(5, 7))
    seen = {page.locator(".python").inner_text()}

    def check():
        line = page.locator(".python").inner_text()
        assert line not in seen
        seen.add(line)
        trace = follow_the_line(page, image, logits)
        np.testing.assert_allclose(table(page), expected(trace, trace.iterations, 5, 7), rtol=6e-3, atol=6e-3)

    for n, setting in enumerate(
        ["w_bilateral", "w_spatial", "theta_alpha", "theta_beta", "theta_gamma", "temperature"]
    ):
        move(page, setting, 60 + 15 * n)
        check()
    move(page, "iterations", 9)
    assert iteration(page) == 9  # whoever looks at the last iteration stays there
    check()
    for name in ("normalisation", "self-message", "sign", "unary from", "colours"):
        choice = page.get_by_label(name, exact=True)
        choice.select_option(index=1)
        computed(page)
        check()
    page.get_by_role("button", name="Reset the settings").click()
    computed(page)
    assert page.locator(".python").inner_text() in seen
    np.testing.assert_allclose(table(page), expected(crf.trace(logits, image, iterations=6), 6, 5, 7), **LOOSE)


def test_the_presets_are_the_faults(live):
    """As notebook 02 makes them."""
    image, logits, crf = problem()
    page = live(image, logits, crf, pixel=(9, 9), iterations=4)
    flat = 0.5 + (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True) / 255
    faults = {
        "wrong sign": (problem(compatibility=torch.eye(4))[2], logits, image),
        "double softmax": (crf, torch.softmax(logits, 0), image),
        "normalised colours": (crf, logits, flat),
        "as given": (crf, logits, image),
    }
    for name, (model, z, picture) in faults.items():
        page.get_by_label("preset").select_option(label=f"preset: {name}")
        computed(page)
        trace = model.trace(z, picture, iterations=4)
        np.testing.assert_allclose(table(page), expected(trace, 4, 9, 9), **LOOSE)


def test_the_last_setting_wins(live):
    """Settings that follow each other faster than they can be computed."""
    image, logits, crf = problem(height=40, width=60)
    page = live(image, logits, crf, pixel=(5, 7))
    page.locator("input[data-setting=theta_beta]").evaluate(
        """async (node) => {
            for (let v = 20; v <= 160; v += 2) {
                node.value = v;
                node.dispatchEvent(new Event("input"));
                await new Promise((done) => setTimeout(done, 10));
            }
            node.dispatchEvent(new Event("change"));
        }"""
    )
    computed(page)
    trace = follow_the_line(page, image, logits)
    np.testing.assert_allclose(table(page), expected(trace, 6, 5, 7), **LOOSE)


def counts(page) -> list[str]:
    drawn(page)
    return page.locator(".explorer tbody tr td:last-child").all_inner_texts()


def test_pixels_of_each_label_are_counted_and_wrong_ones_shown(live):
    image, logits, crf = problem()
    truth = problem()[1].argmax(0)
    truth[:, :5], truth[3:9, 10:20] = VOID, 2
    page = live(image, logits, crf, truth=truth, palette=PENS, iteration=3)
    labels = crf.trace(logits, image, iterations=6).labels[3]
    assert counts(page) == [str(int((labels == k).sum())) for k in range(4)]
    wrong = (labels != truth) & (truth != VOID)
    shown = np.where(wrong[..., None], PENS[truth.clamp(max=3)], 0)
    np.testing.assert_array_equal(colours(page, "wrong"), shown)
    assert page.locator(".wrong .legend").inner_text() == f"{int(wrong.sum())} of {24 * 27} pixels"


def test_a_rescaled_range_of_colours_is_marked(live):
    page = live(*problem(), pixel=(5, 7))
    pairwise = page.locator(".panel.pairwise .legend")
    first = pairwise.inner_text().split()
    assert page.locator(".legend.moved").count() == 0
    move(page, "w_bilateral", 160)
    expect(page.locator(".panel.pairwise .legend.moved")).to_be_visible()
    assert pairwise.get_attribute("title").endswith(f"they covered {first[0]} to {first[-1]}.")
    page.get_by_role("button", name="Reset the settings").click()
    computed(page)
    assert page.locator(".legend.moved").count() == 0


def test_nothing_is_announced_before_the_reader_acts(live):
    page = live(*problem())
    page.wait_for_timeout(500)  # announcements wait for 0.3 s
    live_region = page.locator(".explorer [aria-live=polite]")
    assert live_region.inner_text() == ""
    page.locator("button.back").click()
    expect(live_region).to_contain_text("Iteration 5 of 6.")


def test_the_wrong_sign_is_visible_from_the_first_iteration_on(live):
    page = live(*problem(compatibility=torch.eye(4)), iteration=0)
    assert page.locator(".warning").count() == 0
    for _ in range(3):
        page.locator("button.step").click()
        expect(page.locator(".warning").filter(has_text="the labels oscillate")).to_be_visible()


# Painting.


def canvas_point(page, row, column, height, width):
    box = page.locator("canvas[data-panel=image]").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / width, box["y"] + (row + 0.5) * box["height"] / height


def on_image(page, explorer_palette, height, width):
    """The strokes that the image shows, int64 [H, W]."""
    shown = colours(page, "image")
    labels = torch.full((height, width), VOID)
    for k, colour in enumerate(explorer_palette):
        labels[torch.from_numpy((shown == colour).all(-1))] = k
    return labels


def test_strokes_change_the_unary_and_spread(live):
    image, _, crf = problem()
    logits = torch.zeros(4, 24, 32)
    page = live(image, logits, crf, palette=PENS, pixel=(0, 0))
    page.get_by_role("tab", name="Paint").click()
    page.get_by_role("button", name="sea", exact=True).click()
    page.mouse.move(*canvas_point(page, 3, 4, 24, 32))
    page.mouse.down()
    page.mouse.move(*canvas_point(page, 3, 12, 24, 32), steps=4)
    page.mouse.up()
    page.get_by_role("button", name="tree", exact=True).click()
    page.mouse.move(*canvas_point(page, 20, 20, 24, 32))
    page.mouse.down()
    page.mouse.move(*canvas_point(page, 14, 26, 24, 32), steps=3)
    page.mouse.up()
    computed(page)
    strokes = on_image(page, PENS, 24, 32)
    assert (strokes[3, 4:13] == 1).all() and strokes[20, 20] == strokes[14, 26] == 3 and (strokes != VOID).sum() == 16
    z = probabilities_from_labels(strokes, 4, confidence=0.7).log()
    trace = crf.trace(z, image, iterations=6)
    for row, column in [(3, 6), (8, 8), (16, 24), (23, 31)]:
        hover(page, "labels", trace, row, column)
        np.testing.assert_allclose(table(page), expected(trace, 6, row, column), **LOOSE)
        page.mouse.move(1, 1)
    move(page, "confidence", 20)  # from 0.26 in steps of 0.01
    trace = crf.trace(probabilities_from_labels(strokes, 4, confidence=0.46).log(), image, iterations=6)
    np.testing.assert_allclose(table(page), expected(trace, 6, *where(page)), **LOOSE)
    page.get_by_role("tab", name="Settings").click()
    assert "probabilities_from_labels(strokes, 4, confidence=0.46)" in page.locator(".python").inner_text()
    line = follow_the_line(page, image, logits, strokes=strokes, probabilities_from_labels=probabilities_from_labels)
    torch.testing.assert_close(line.q, trace.q, rtol=1e-3, atol=1e-3)


def test_undo_clear_erase_and_a_wider_brush(live):
    image, logits, crf = problem()
    page = live(image, logits, crf, palette=PENS)
    page.get_by_role("tab", name="Paint").click()
    for row in (4, 12):
        page.mouse.click(*canvas_point(page, row, 10, 24, 32))
    assert (on_image(page, PENS, 24, 32) != VOID).sum() == 2
    page.get_by_role("button", name="Undo").click()
    assert (on_image(page, PENS, 24, 32) != VOID).nonzero().tolist() == [[4, 10]]
    page.get_by_label("Brush").select_option("3")
    page.mouse.click(*canvas_point(page, 12, 10, 24, 32))
    assert (on_image(page, PENS, 24, 32)[11:14, 9:12] != VOID).all()
    page.get_by_role("button", name="erase").click()
    page.mouse.click(*canvas_point(page, 4, 10, 24, 32))
    assert (on_image(page, PENS, 24, 32) != VOID).sum() == 9
    page.get_by_role("button", name="Clear").click()
    assert (on_image(page, PENS, 24, 32) != VOID).sum() == 0
    computed(page)
    trace = crf.trace(logits, image, iterations=6)
    np.testing.assert_allclose(table(page), expected(trace, 6, *where(page)), **LOOSE)


def test_painting_with_the_keyboard_alone(live):
    image, logits, crf = problem()
    page = live(image, logits, crf, palette=PENS, label=2, pixel=(6, 6))
    page.get_by_role("tab", name="Settings").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Paint")).to_have_attribute("aria-selected", "true")
    page.locator("canvas[data-panel=image]").focus()
    for key in ["Enter", "ArrowRight", "ArrowRight", "ArrowDown", "Enter", "ArrowRight"]:
        page.keyboard.press(key)
    assert (on_image(page, PENS, 24, 32) == 2).nonzero().tolist() == [[6, 6], [6, 7], [6, 8], [7, 8]]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")
    assert (on_image(page, PENS, 24, 32) == 2).sum() == 3
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert (on_image(page, PENS, 24, 32) == 2).sum() == 0


def test_painting_by_touch(live, browser):
    image, logits, crf = problem()
    page = live(image, logits, crf, palette=PENS, width=390, height=844, media={"has_touch": True, "is_mobile": True})
    page.get_by_role("tab", name="Paint").tap()
    page.locator("canvas[data-panel=image]").scroll_into_view_if_needed()
    page.touchscreen.tap(*canvas_point(page, 10, 20, 24, 32))
    assert (on_image(page, PENS, 24, 32) != VOID).nonzero().tolist() == [[10, 20]]


# Small graphs.


def nine_pixels():
    p = torch.tensor([0.85, 0.70, 0.20, 0.35, 0.80, 0.55, 0.90, 0.75, 0.25])
    grey = torch.tensor([[0.75, 0.80, 0.35], [0.70, 0.78, 0.30], [0.82, 0.72, 0.40]])
    y, x = torch.arange(9) // 3, torch.arange(9) % 3
    distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
    return grey.expand(3, 3, 3), torch.stack([1 - p, p]).log().reshape(2, 3, 3), 0.75 * (distance == 1)


def test_nine_pixels_show_the_exact_marginals(live):
    page = live(*nine_pixels(), class_names=["sea", "boat"], pixel=(1, 0), label=1, iterations=20)
    headings = page.locator(".explorer thead th").all_inner_texts()
    boat = dict(
        zip(headings, page.locator(".explorer tbody tr").nth(1).locator("th, td").all_inner_texts(), strict=True)
    )
    assert numbers(boat["exact P"]) == pytest.approx(0.76, abs=5e-3)  # notebook 02, by enumeration
    assert numbers(boat["q"]) > 0.76  # mean field is over-confident
    page.get_by_role("tab", name="Energy").click()
    assert "Minus log Z is 3." in page.locator(".charts svg").first.get_attribute("aria-label")
    # An edge's slider changes both ends.
    page.get_by_role("tab", name="Settings").click()
    assert page.locator(".edges input").count() == 3
    move(page, "edge4", 100)  # from -5 in steps of 0.05: 0
    assert page.locator(".edges .value").nth(1).inner_text() == "0"
    hover(page, "image", Size(3, 3), 1, 1, click=True)
    assert page.locator(".edges .value").all_inner_texts().count("0") == 1


class Size:
    """Stands in for a trace where only its size is asked for."""

    def __init__(self, height, width):
        self.q = torch.zeros(1, 1, height, width)


def test_two_pixels_oscillate_unless_they_are_updated_in_turn(live):
    logits = torch.tensor([[0.3, 0.7], [0.7, 0.3]]).log().reshape(2, 1, 2)
    coupling = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    page = live(torch.rand(3, 1, 2), logits, coupling, class_names=["sea", "boat"], iterations=12)
    expect(page.locator(".warning").filter(has_text="oscillate")).to_be_visible()
    page.get_by_label("update").select_option(index=1)
    computed(page)
    assert page.locator(".warning").count() == 0
    page.get_by_label("update").select_option(index=0)
    move(page, "self_weight", 60)  # 3: the matrix is positive semi-definite
    assert page.locator(".warning").count() == 0


def test_no_iterations_and_back(live):
    """Zero iterations leave the unary alone; the first update comes back with its messages."""
    page = live(*problem(iterations=2), pixel=(5, 7))
    for steps, blank in [(0, 4), (2, 0)]:
        move(page, "iterations", steps)
        assert iteration(page) == steps
        assert page.locator(".panel.empty").count() in (blank, blank + 1)
    trace = problem()[2].trace(*problem()[1::-1], iterations=2)
    np.testing.assert_allclose(table(page), expected(trace, 2, 5, 7), **LOOSE)


# Pairs.


def test_a_pair_has_one_cursor_one_iteration_one_class(live):
    image, logits, crf = problem()
    other = problem(w_bilateral=0.5)[2].trace(logits, image, iterations=6)
    first = crf.trace(logits, image, iterations=6)
    page = live((image, logits, crf), other, titles=("strong", "weak"), iteration=6, label=2, pixel=(5, 7))

    def check(t, row, column):
        a, b = expected(first, t, row, column), expected(other, t, row, column)
        wanted = np.column_stack([a[:, [0, 3, 5]], b[:, [0, 3, 5]], b[:, 5] - a[:, 5]])
        np.testing.assert_allclose(table(page), wanted, **LOOSE)

    check(6, 5, 7)
    page.locator("button.back").click()
    check(5, 5, 7)
    hover(page, "q-b", first, 13, 20)
    check(5, 13, 20)
    difference = other.q[5, 2] - first.q[5, 2]
    shown = colours(page, "difference").astype(int)
    up, down = difference > 0.5 * difference.abs().max(), difference < -0.5 * difference.abs().max()
    assert (shown[..., 2] > shown[..., 0])[up].all() and (shown[..., 0] > shown[..., 2])[down].all()
    assert up.any() or down.any()
    move(page, "w_bilateral", 0)
    assert (
        page.get_by_role("tab", name="Settings A").count() == 1
        and page.get_by_role("tab", name="Settings B").count() == 0
    )


def test_two_settings_beside_each_other(live):
    image, logits, crf = problem()
    page = live((image, logits, crf), (image, logits, crf), pixel=(5, 7))
    assert np.nanmax(np.abs(table(page)[:, -1])) == 0
    page.get_by_role("tab", name="Settings B").click()
    page.get_by_role("tabpanel", name="Settings B").get_by_label("sign").select_option(index=1)
    computed(page)
    wrong = problem(compatibility=torch.eye(4))[2].trace(logits, image, iterations=6)
    np.testing.assert_allclose(table(page)[:, 3:6], expected(wrong, 6, 5, 7)[:, [0, 3, 5]], **LOOSE)
    right = crf.trace(logits, image, iterations=6)
    np.testing.assert_allclose(table(page)[:, :3], expected(right, 6, 5, 7)[:, [0, 3, 5]], **CLOSE)


def test_a_pair_shows_its_senders_in_place_of_its_messages(live):
    image, logits, crf = problem()
    stored = problem(w_bilateral=0.5)[2].trace(logits, image, iterations=6)
    page = live((image, logits, crf), stored, iteration=4, label=2, pixel=(5, 7))
    page.get_by_role("button", name="senders: weight × q").click()
    drawn(page)
    for trace, end in ((crf.trace(logits, image, iterations=6), ""), (stored, "-b")):
        for m in range(2):
            total = numbers(page.locator(f".message{m}{end} .sum").inner_text().removeprefix("Σ "))
            assert total == pytest.approx(trace.messages[3, m, 2, 5, 7].item(), abs=3e-3)
    page.get_by_role("button", name="messages").click()
    drawn(page)
    assert page.locator(".sum").count() == 0


# Speed. On a busy machine a measurement is repeated; the bound stays.

WATCH = """
window.long = [];
const watch = (list) => window.long.push(...list.getEntries().map((entry) => entry.duration));
new PerformanceObserver(watch).observe({ entryTypes: ["longtask"] });
"""
RELEASE = """
async ([setting, value]) => {
  const root = document.querySelector(".pwlib-explorer").shadowRoot, explorer = root.querySelector(".explorer");
  const node = root.querySelector(`input[data-setting=${setting}]`);
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  window.long = [];
  const start = performance.now();
  node.value = value;
  node.dispatchEvent(new Event("input"));
  node.dispatchEvent(new Event("change"));
  let first = null;
  do {
    await frame();
    if (first === null && explorer.dataset.run !== explorer.dataset.asked) continue;
    first ??= performance.now() - start;
  } while (explorer.dataset.busy !== "false" || first === null);
  await frame();
  return [first, performance.now() - start, Math.max(0, ...window.long)];
}
"""


@pytest.mark.timed
def test_it_is_quick(live):
    """48 x 72 pixels, 10 labels, 8 iterations: first frame in 0.3 s, all in 1 s; no long task on the page."""
    image, logits, crf = problem(10, 48, 72, iterations=8)
    page = live(image, logits, crf, class_names=None, height=720, width=1280)
    page.evaluate(WATCH)
    best = [np.inf] * 3
    for attempt in range(8):
        best = np.minimum(best, page.evaluate(RELEASE, ["theta_beta", 90 + attempt]))
        if best[0] < 300 and best[1] < 1000 and best[2] <= 50:
            break
    assert best[0] < 300 and best[1] < 1000 and best[2] <= 50, (
        f"first {best[0]:.0f} ms, all {best[1]:.0f} ms, longest task {best[2]:.0f} ms"
    )


@pytest.mark.timed
def test_nine_pixels_take_one_frame(live):
    page = live(*nine_pixels(), class_names=["sea", "boat"])
    times = [page.evaluate(RELEASE, ["scale", 100 + n])[1] for n in range(5)]
    assert min(times) < 50  # the frame in which it is computed, and the one awaited after it


@pytest.mark.timed
def test_a_page_that_refuses_workers_computes_in_slices(live, open_page, tmp_path):
    from pages import PAGE

    from pwlib.course.explorer import embed_html

    image, logits, crf = problem(10, 48, 72, iterations=3)
    html = "<script>window.Worker = class { constructor() { throw new Error('refused'); } };</script>" + WATCH.join(
        ("<script>", "</script>")
    )
    html += embed_html(explore(image, logits, crf, pixel=(5, 7)))
    (tmp_path / "refused.html").write_text(PAGE.format(style="", html=html), encoding="utf-8")
    page = open_page((tmp_path / "refused.html").as_uri())
    computed(page)
    np.testing.assert_allclose(table(page), expected(crf.trace(logits, image, iterations=3), 3, 5, 7), **LOOSE)
    longest = min(page.evaluate(RELEASE, ["theta_beta", 90 + n])[2] for n in range(4))
    assert longest <= 50


# Layout, themes, accessibility.


@pytest.mark.parametrize("kind", ["single", "pair", "graph", "many labels"])
@pytest.mark.parametrize("width", [690, 820, 1240])
def test_it_fits_on_a_screen(live, kind, width):
    image, logits, crf = problem(10, 48, 72) if kind != "many labels" else problem(21, 48, 72)
    source = ((image, logits, crf),) * 2 if kind == "pair" else (image, logits, crf)
    names = None
    if kind == "graph":
        source, names = nine_pixels(), ["sea", "boat"]
    page = live(*source, class_names=names, width=width, height=720)
    box = page.locator(".explorer").bounding_box()
    assert box["y"] + box["height"] <= 720 - 110  # JupyterLab's own bars take some 110
    for selector in (".left > [role=tabpanel]:not([hidden])", *([] if kind == "many labels" else [".numbers"])):
        sizes = page.locator(selector).evaluate("n => [n.scrollHeight, n.clientHeight, n.scrollWidth, n.clientWidth]")
        assert sizes[0] <= sizes[1] and sizes[2] <= sizes[3], f"{selector} scrolls: {sizes}"


@pytest.mark.parametrize("panes", [1, 2])
def test_on_a_phone_nothing_is_clipped(live, panes):
    source = problem(10, 48, 72)
    phone = {"width": 390, "height": 844, "media": {"has_touch": True, "is_mobile": True}}
    page = live(*(source if panes == 1 else (source, source)), class_names=None, **phone)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.locator(".explorer tbody tr td").evaluate_all("all => all.map(n => n.getBoundingClientRect().right)")
    assert max(boxes) <= 390
    small = page.locator(".explorer button, .explorer select, .explorer input").evaluate_all(
        "all => all.filter(n => n.offsetParent && n.getBoundingClientRect().height < 43.5).map(n => n.outerHTML)"
    )
    assert not small


@pytest.mark.parametrize(
    "mark",
    [
        "document.documentElement.dataset.theme = '{}'",
        "document.body.dataset.jpThemeLight = '{}' === 'light'",
        "document.body.className = 'vscode-{}'",
    ],
)
def test_light_and_dark_follow_the_page(live, mark):
    page = live(*problem())
    frame = page.locator(".frame")
    expect(frame).to_have_attribute("data-theme", "light")
    for theme in ("dark", "light"):
        page.evaluate(mark.format(theme))
        expect(frame).to_have_attribute("data-theme", theme)


def test_a_light_theme_of_high_contrast_is_light(live):
    """VS Code gives it the class of the dark one, too."""
    page = live(*problem())
    page.evaluate("document.body.className = 'vscode-high-contrast'")
    expect(page.locator(".frame")).to_have_attribute("data-theme", "dark")
    page.evaluate("document.body.className = 'vscode-high-contrast-light vscode-high-contrast'")
    expect(page.locator(".frame")).to_have_attribute("data-theme", "light")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["single", "pair", "graph"])
def test_axe_finds_nothing(live, kind, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    image, logits, crf = problem()
    sources = {"single": (image, logits, crf), "pair": ((image, logits, crf),) * 2, "graph": nine_pixels()}
    options = {"class_names": ["sea", "boat"]} if kind == "graph" else {}
    page = live(*sources[kind], **options, style="background: #111; color: #ddd" if theme == "dark" else "")
    for tab in page.get_by_role("tab").all():
        tab.click()
        drawn(page)
        result = axe.run(page, context=".pwlib-explorer")
        assert not (found := result.response["violations"]), [
            (v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in found
        ]
