"""The explorer without a browser: what its data decodes to, its traits, what a notebook stores, the page it makes."""

import gzip
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from kernel_row import kernel_row

import pwlib
from pwlib.course import plots
from pwlib.crf import DenseCRF
from pwlib.data import VOID
from pwlib.tools.dense import probabilities_from_labels
from pwlib.trace import Trace

pytest.importorskip("anywidget")
from ipywidgets.embed import embed_data

from pwlib.course.explorer import WIDGET_STATE, WIDGET_VIEW, Explorer, embed_html, embed_notebook, explore


def make_trace(classes=4, height=10, width=13, iterations=5, **options) -> Trace:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, height, width, generator=generator)
    logits = 3 * torch.randn(classes, height, width, generator=generator)
    crf = DenseCRF(classes, theta_alpha=5, theta_beta=60, theta_gamma=2, **options)
    return crf.trace(logits, image, iterations=iterations)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace()


def decode(explorer: Explorer) -> dict[str, np.ndarray]:
    """The format undone, from its description alone: bytes by significance, then sums along the iterations."""
    raw, at, blocks = gzip.decompress(explorer.data), 0, {}
    for block in explorer.meta["panes"][0]["blocks"]:
        kind = np.dtype(block["dtype"])
        count = int(np.prod(block["shape"]))
        planes = np.frombuffer(raw, np.uint8, count * kind.itemsize, at).reshape(kind.itemsize, count)
        words = sum(plane.astype(np.uint64) << (8 * n) for n, plane in enumerate(planes)).reshape(block["shape"])
        if block["name"] in {"messages", "q", "labels"}:
            words = np.cumsum(words, axis=0, dtype=np.uint64)
        blocks[block["name"]] = words.astype(f"u{kind.itemsize}").view(kind)
        at += count * kind.itemsize
    assert at == len(raw)
    return blocks


def test_the_data_is_the_trace_in_half_precision(trace):
    blocks = decode(explore(trace))
    assert set(blocks) == {"image", "unary", "messages", "q", "labels", "sums", "features0", "features1"}
    for name in ("unary", "messages", "q"):
        values = getattr(trace, name).numpy()
        np.testing.assert_allclose(blocks[name].astype(np.float64), values, rtol=2**-11, atol=2**-24)
    np.testing.assert_array_equal(blocks["labels"], trace.labels.numpy())
    np.testing.assert_allclose(blocks["image"] / 255, trace.image.permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
    for m, features in enumerate(trace.features):
        np.testing.assert_array_equal(blocks[f"features{m}"], features.numpy())


def test_a_pairwise_term_that_the_messages_do_not_explain_is_stored(trace):
    other = replace(trace, pairwise=trace.pairwise + torch.rand_like(trace.pairwise), weights=None, compatibility=None)
    np.testing.assert_allclose(decode(explore(other))["pairwise"], other.pairwise.numpy(), rtol=2**-10)
    assert "pairwise" not in decode(explore(trace))


def test_numbers_too_large_for_half_precision_stay_finite(trace):
    blocks = decode(explore(replace(trace, unary=trace.unary * 1e6)))
    assert np.isfinite(blocks["unary"]).all() and blocks["unary"].max() == np.finfo(np.float16).max


@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
@pytest.mark.parametrize("self_message", [True, False])
def test_a_message_is_the_kernel_s_row_times_the_marginals(normalization, self_message):
    trace = make_trace(normalization=normalization, self_message=self_message, filtering="exact")
    for kernel in range(2):
        for pixel in (0, 57, 129):
            sent = (kernel_row(trace, kernel, pixel) * trace.q[2]).sum((1, 2))
            torch.testing.assert_close(sent, trace.messages[2, kernel].flatten(1)[:, pixel], rtol=1e-4, atol=1e-5)


def test_a_trace_made_by_hand_needs_neither_features_nor_a_free_energy(trace):
    bare = {"features": (), "sums": None, "free_energy": None, "weights": None}
    one = replace(trace, kernels=("above",), messages=trace.messages[:, :1], **bare)
    explorer = explore(one)
    assert explorer.meta["panes"][0]["free_energy"] == [] and "sums" not in decode(explorer)


def test_every_slider_value_reaches_the_callbacks(trace):
    explorer, seen = explore(trace, iteration=0, label=0, pixel=(0, 0)), []
    explorer.observe(lambda change: seen.append((change["name"], change["new"])), ["iteration", "label", "pixel"])
    moves = [("iteration", t) for t in range(1, trace.iterations + 1)] + [("label", k) for k in range(1, 4)]
    moves += [("pixel", (y, x)) for y in range(10) for x in range(13)][1:]
    for name, value in moves:
        # What arrives when the reader's hand moves: JSON, so tuples come as lists.
        explorer.set_state({name: json.loads(json.dumps(value))})
        assert getattr(explorer, name) == value
    assert seen == moves


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("iteration", 6, "iteration is 6; this trace has iterations 0 to 5"),
        ("iteration", -1, "iteration is -1; this trace has iterations 0 to 5"),
        ("label", 4, "label is 4; this trace has labels 0 to 3"),
        ("pixel", (10, 0), r"pixel is \(10, 0\); expected \(row, column\) within 10 x 13"),
    ],
)
def test_a_value_out_of_range_is_refused_in_a_sentence(trace, name, value, sentence):
    explorer = explore(trace)
    before = getattr(explorer, name)
    with pytest.raises(ValueError, match=sentence):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before
    with pytest.raises(ValueError, match=sentence):
        explore(trace, **{name: value})


def test_names_palettes_and_parts_that_do_not_fit_are_refused(trace):
    with pytest.raises(ValueError, match="class_names has 2 names; this trace has 4 labels"):
        explore(trace, class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"palette has shape \[3, 3\]; expected \[4, 3\]"):
        explore(trace, palette=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="parts disagree"):
        explore(replace(trace, q=trace.q[:-1]))


def test_a_palette_may_end_with_void(trace):
    palette = np.arange(15, dtype=np.uint8).reshape(5, 3)
    assert explore(trace, palette=palette).meta["panes"][0]["colours"] == ["#000102", "#030405", "#060708", "#090a0b"]
    assert len(set(explore(make_trace(classes=21, iterations=1)).meta["panes"][0]["colours"])) == 21


# Problems that the browser solves: what is stored, and what comes back to Python.


def make_problem(classes=3, height=6, width=5, **options):
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(3, height, width, generator=generator)
    logits = 3 * torch.randn(classes, height, width, generator=generator)
    crf = DenseCRF(classes, theta_alpha=5, theta_beta=60, theta_gamma=2, filtering="exact", iterations=4, **options)
    return image, logits, crf


def test_a_problem_stores_only_image_and_logits():
    image, logits, crf = make_problem()
    explorer = explore(image, logits, crf)
    blocks = decode(explorer)
    assert set(blocks) == {"image", "logits"}
    np.testing.assert_array_equal(blocks["logits"], logits.half().numpy())
    np.testing.assert_array_equal(blocks["image"], image.half().permute(1, 2, 0).numpy())
    grey = (255 * image).round() / 255  # a photograph's eight bits stay eight bits
    assert decode(explore(grey, logits, crf))["image"].dtype == np.uint8
    assert explorer.settings["theta_beta"] == 60 and explorer.iteration == 4


def test_settings_go_on_in_python():
    """What the page changes and sends as JSON is what `crf`, `logits`, `image` and `trace()` then have."""
    image, logits, crf = make_problem()
    explorer = explore(image, logits, crf)
    plain = crf.trace(logits.half().float(), image.half().float(), iterations=4)
    torch.testing.assert_close(explorer.trace().q, plain.q, rtol=1e-4, atol=1e-5)
    change = {"theta_beta": 20.0, "normalization": "row", "self_message": False, "iterations": 2, "temperature": 2.0}
    explorer.set_state({"settings": json.loads(json.dumps(explorer.settings | change))})
    other = DenseCRF(
        3, theta_alpha=5, theta_beta=20, theta_gamma=2, filtering="exact", normalization="row", self_message=False
    )
    expected = other.trace(logits.half().float() / 2, image.half().float(), iterations=2)
    torch.testing.assert_close(explorer.trace().messages, expected.messages, rtol=1e-4, atol=1e-5)


def test_strokes_become_the_unary_of_probabilities_from_labels():
    image, logits, crf = make_problem()
    explorer = explore(image, torch.zeros_like(logits), crf)
    labels = torch.full((6, 5), VOID)
    labels[1, 1:4], labels[4, 4], labels[5, 0] = 2, 0, 0
    explorer.strokes = [[2, 6, 3], [0, 24, 2]]
    assert torch.equal(explorer.painted, labels)
    assert torch.equal(explore(image, logits, crf, strokes=labels).painted, labels)
    expected = probabilities_from_labels(labels, 3, confidence=0.7)
    torch.testing.assert_close(torch.softmax(explorer.logits, 0), expected)
    explorer = explore(image, logits, crf)
    explorer.strokes = [[2, 6, 3], [0, 24, 2]]
    torch.testing.assert_close(explorer.logits[:, labels == VOID], logits.half().float()[:, labels == VOID])


@pytest.mark.parametrize(
    ("compatibility", "wrong"), [("potts", torch.eye(3)), (torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]]), None)]
)
def test_the_wrong_sign_rewards_disagreement(compatibility, wrong):
    image, logits, crf = make_problem(compatibility=compatibility)
    explorer = explore(image, logits, crf)
    explorer.settings = explorer.settings | {"sign": "reward"}
    expected = 3 - compatibility if wrong is None else wrong
    assert torch.equal(explorer.crf.compatibility.detach(), expected)


def test_a_graph_keeps_its_coupling():
    coupling = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    explorer = explore(torch.rand(3, 1, 2), torch.randn(2, 1, 2), coupling)
    explorer.settings = explorer.settings | {"scale": 2.0, "self_weight": 1.0}
    assert explorer.coupling.tolist() == [[1, 6], [6, 1]]
    explorer.settings = explorer.settings | {"edges": [[0, 1, -0.5]]}
    assert explorer.coupling.tolist() == [[1, -0.5], [-0.5, 1]]


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (lambda i, z, c: (i, z), "cannot explore a Tensor; expected a Trace or"),
        (lambda i, z, c: (i, z[:2], c), r"logits have shape \[2, 6, 5\]; expected \[3, 6, 5\]"),
        (
            lambda i, z, c: (i, z, torch.zeros(4, 4)),
            r"the coupling matrix has shape \[4, 4\]; expected a symmetric \[30, 30\]",
        ),
        (lambda i, z, c: ((i, z, c), (i[:, :5], z[:, :5], c)), "the two sources differ in size or labels"),
        (lambda i, z, c: (i,) * 4, "explore got 4 sources; expected image, logits, crf, or one or two traces"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources, sentence):
    with pytest.raises(ValueError, match=sentence):
        explore(*sources(*make_problem()))


def test_a_truth_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"truth has shape \[6, 4\]; expected \[6, 5\]"):
        explore(*make_problem(), truth=torch.zeros(6, 4, dtype=torch.int64))


def test_settings_have_their_names():
    explorer = explore(*make_problem())
    with pytest.raises(ValueError, match="settings differ in theta; change values, not names"):
        explorer.settings = explorer.settings | {"theta": 1.0}


@pytest.mark.slow
def test_a_large_image_is_computed_by_the_kernel_on_request():
    image, logits, crf = make_problem(height=81, width=80)
    explorer, sent = explore(image, logits, crf), []
    explorer.send = lambda content, buffers=None: sent.append((content, buffers))
    assert explorer.meta["panes"][0]["remote"] and "messages" in decode(explorer)
    settings = explorer.settings | {"w_bilateral": 0.5, "iterations": 1}
    explorer._handle_custom_msg({"kind": "compute", "pane": 0, "settings": settings, "strokes": []}, [])
    ((content, buffers),) = sent
    assert content["meta"]["iterations"] == 1 and content["meta"]["weights"][1] == pytest.approx(0.5)
    assert buffers[0][:2] == b"\x1f\x8b"  # gzip


def test_a_pair_shares_one_block_of_data(trace):
    explorer = explore(trace, trace, titles=("one", "other"))
    (start, length), (next_start, next_length) = (pane["bytes"] for pane in explorer.meta["panes"])
    assert (start, next_start) == (0, length) and len(explorer.data) == length + next_length
    assert "beside other" in repr(explorer)


def test_where_no_widget_can_be_shown_the_reader_is_told_to_run_the_cell(trace):
    bundle = explore(trace)._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "Run this cell" in data["text/html"] and WIDGET_VIEW in data


def test_the_script_is_small_and_complete():
    from pwlib.course.explorer import bundle

    assert len(bundle.script()) < 90_000
    assert not re.search(r"^\s*(import|export) (?!default)", bundle.script(), re.M)
    folder = Path(bundle.__file__).parent
    assert {path.stem for path in folder.glob("*.js")} == set(bundle.MODULES)
    tops = [
        n
        for path in folder.glob("*.js")
        for n in re.findall(
            r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", path.read_text("utf-8"), re.M
        )
    ]
    assert len(tops) == len(set(tops)), "two modules use one name at their top level"


def test_the_repr_is_for_people(trace):
    assert repr(explore(trace)) == "Explorer(10 x 13 pixels, 4 labels, 5 iterations, kernels: spatial, bilateral)"


# What a notebook stores, and the page made from it.


def executed(*explorers: Explorer) -> nbformat.NotebookNode:
    """A notebook as nbclient leaves it: one view an explorer, and all state in the metadata."""
    outputs = [
        nbformat.v4.new_output(
            "execute_result",
            {WIDGET_VIEW: {"model_id": e.model_id, "version_major": 2, "version_minor": 1}, "text/plain": repr(e)},
        )
        for e in explorers
    ]
    cells = [nbformat.v4.new_code_cell("explorer", outputs=[o], execution_count=n) for n, o in enumerate(outputs)]
    state = embed_data(views=list(explorers), drop_defaults=False)["manager_state"]
    return nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {WIDGET_STATE: json.loads(json.dumps(state))}})


def test_a_notebook_becomes_one_without_widgets(trace):
    first, second = explore(trace, label=1), explore(trace, label=2)
    notebook = executed(first, second)
    before = json.dumps(notebook)
    converted = embed_notebook(notebook)
    assert json.dumps(notebook) == before, "the notebook given was changed"
    assert "widgets" not in converted.metadata
    for cell, explorer in zip(converted.cells, (first, second), strict=True):
        data = cell.outputs[0].data
        assert set(data) == {"text/html", "text/plain"}
        alone = explorer is first  # the script is in the page once
        assert data["text/html"] == embed_html(explorer, code=alone)
    assert first.to_html() == embed_html(first)
    nbformat.validate(converted)
    assert embed_notebook(notebook, {"some": 1})[1] == {"some": 1}


def test_other_widgets_stay_in_the_notebook(trace):
    import ipywidgets

    explorer, slider = explore(trace), ipywidgets.IntSlider()
    notebook = executed(explorer, slider)
    converted = embed_notebook(notebook)
    saved = converted.metadata.widgets[WIDGET_STATE]["state"]
    assert slider.model_id in saved and explorer.model_id not in saved
    assert WIDGET_VIEW in converted.cells[1].outputs[0].data
    with pytest.raises(ValueError, match="saved state of an explorer"):
        embed_html(notebook.metadata.widgets[WIDGET_STATE]["state"][slider.model_id])


@pytest.mark.slow
def test_stripping_keeps_the_explorers(trace, tmp_path):
    pytest.importorskip("nbstripout")
    path = tmp_path / "notebook.ipynb"
    notebook = executed(explore(trace))
    notebook.metadata["signature"] = "to be stripped"
    nbformat.write(notebook, path)
    flags = ["--keep-output", "--keep-count", "--keep-metadata-keys", "metadata.widgets"]
    subprocess.run([sys.executable, "-m", "nbstripout", *flags, str(path)], check=True)
    stripped = nbformat.read(path, as_version=4)
    assert "signature" not in stripped.metadata
    assert "text/html" in embed_notebook(stripped).cells[0].outputs[0].data


def test_the_page_asks_no_host_for_anything(trace):
    html = embed_html(trace)
    addresses = {a for a in re.findall(r"\bhttps?://[^\s\"'`)]+", html) if a != "http://www.w3.org/2000/svg"}
    assert not addresses
    assert not re.search(r"\bimport\s*[({\"']|\bfetch\s*\(|<link|\bsrc=|@import|url\(", html)


def test_a_class_name_cannot_break_out_of_the_page(trace):
    html = embed_html(trace, class_names=["</script><b>", "a", "b", "c"])
    assert html.count("</script>") == 1 and html.endswith("</script>")


def test_the_size_promised():
    """64 x 48 pixels, 8 labels, 11 states of a noisy image: less than 1.8 MB in a notebook or a page."""
    html = embed_html(make_trace(classes=8, height=48, width=64, iterations=10))
    assert 0.5e6 < len(html) < 1.8e6


def test_only_the_explorer_needs_widgets_and_it_says_so(monkeypatch):
    modules = Path(pwlib.__file__).parent.rglob("*.py")
    assert {path.parent.name for path in modules if "import anywidget" in path.read_text("utf-8")} == {"explorer"}
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "pwlib.course.explorer")
    with pytest.raises(ImportError, match="the explorer is a widget and needs anywidget: pip install anywidget"):
        importlib.import_module("pwlib.course.explorer")


# The static figure.


def images(figure) -> dict[str, np.ndarray]:
    return {axes.get_title(): axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()}


def test_the_static_figure_shows_the_trace(trace):
    figure = plots.trace(trace, iterations=(0, 3), label=2)
    shown = images(figure)
    np.testing.assert_allclose(shown["spatial\nmessage"], trace.messages[2, 0, 2])
    np.testing.assert_allclose(shown["bilateral\nmessage"], trace.messages[2, 1, 2])
    np.testing.assert_allclose(shown["pairwise\nenergy"], trace.pairwise[2, 2])
    np.testing.assert_allclose(shown["marginal\nq"], trace.q[0, 2])
    (chart,) = [axes for axes in figure.axes if axes.lines]
    np.testing.assert_allclose(chart.lines[0].get_ydata(), trace.free_energy)
    assert {"iteration 0", "iteration 3"} == {t.get_text() for axes in figure.axes for t in axes.texts}


def test_the_static_figure_takes_any_trace(trace):
    short = make_trace(classes=2, iterations=1)
    bare = replace(short, messages=short.messages[:, :1], kernels=("above",), features=(), sums=None, free_energy=None)
    assert {"iteration 0", "iteration 1"} == {t.get_text() for a in plots.trace(bare).axes for t in a.texts}
    assert plots.trace(make_trace(iterations=0)).axes
