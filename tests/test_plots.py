"""The figures: what they draw is what they were given."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib import colors

from pwlib.course import plots
from pwlib.data import VOID, colorize, voc_palette


def a_history():
    def epoch(number, loss, unary, crf=None):
        val = {"unary": {"miou": unary}} | ({} if crf is None else {"crf": {"miou": crf}})
        return {"epoch": number, "val": val} | ({} if loss is None else {"loss": loss, "miou": unary / 2})

    return {
        "stage1": [epoch(1, 2.0, 0.2), epoch(2, 1.0, 0.4)],
        "stage2": [epoch(0, None, 0.4, 0.5), epoch(1, 0.9, 0.4, 0.6)],
    }


def test_history_draws_every_number_at_its_epoch():
    figure = plots.history(a_history())
    left, right = figure.axes
    losses = [line.get_xydata().tolist() for line in left.lines if line.get_marker() == "."]
    assert losses == [[[1, 2.0], [2, 1.0]], [[3, 0.9]]]
    drawn = [point for line in right.lines if line.get_marker() == "^" for point in line.get_xydata().tolist()]
    assert drawn == [[2, 0.5], [3, 0.6]], "stage 2's epoch 0 is where stage 1 ended"
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "training batches",
        "validation, unary",
        "validation, CRF",
    ]


def test_history_draws_every_part_that_was_validated():
    """A run with a contextual CRF scores three parts; each gets a curve of its own colour and marker."""
    scores = {"unary": {"miou": 0.3}, "context": {"miou": 0.4}, "crf": {"miou": 0.5}}
    _, right = plots.history({"stage2": [{"epoch": 1, "loss": 1.0, "val": scores}]}).axes
    drawn = [line for line in right.lines if line.get_marker() != "None"]
    assert [line.get_ydata().tolist() for line in drawn] == [[0.3], [0.4], [0.5]]
    assert len({line.get_marker() for line in drawn}) == len({line.get_color() for line in drawn}) == 3
    wanted = ["validation, unary", "validation, context", "validation, CRF"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == wanted


def test_history_of_a_run_without_validation(tmp_path):
    plots.history({"stage1": [{"epoch": 1, "loss": 1.0, "miou": None}]}).savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_lines_are_told_apart_without_red_and_green():
    """The curves' colours as a deuteranope sees them (Vienot, Brettel & Mollon 1999) stay apart; others would not."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])

    def seen(colour):
        lms = to_lms @ np.array(colors.to_rgb(colour)) ** 2.2
        lms[1] = 0.494207 * lms[0] + 1.24827 * lms[2]
        return np.clip(np.linalg.inv(to_lms) @ lms, 0, 1) ** (1 / 2.2)

    def distance(one, other):
        return np.linalg.norm(seen(one) - seen(other))

    used = [plots.COLOURS[name] for name in ("black", "orange", "blue", "vermilion")]
    assert min(distance(a, b) for a, b in itertools.combinations(used, 2)) > 0.2
    assert distance("#b05a00", "#7a7a00") < 0.2, "the measure finds any two colours apart"


def test_overlay_leaves_void_bare_and_blends_the_rest():
    image = torch.full((3, 1, 2), 0.5)
    label = torch.tensor([[VOID, 1]])
    palette = voc_palette(3)
    out = plots.overlay(image, label, palette, alpha=0.25)
    assert out.dtype == np.uint8 and out[0, 0].tolist() == [128, 128, 128]
    assert out[0, 1] == pytest.approx(0.75 * 128 + 0.25 * palette[1], abs=1)


def test_predictions_show_each_label_map_and_name_the_classes_that_occur():
    palette, names = voc_palette(4), ("a", "b", "c", "d")
    maps = {"truth": torch.tensor([[0, 2], [2, VOID]]), "CRF": torch.tensor([[0, 2], [0, 0]])}
    figure = plots.predictions([(torch.rand(3, 2, 2), maps)] * 2, palette, names)
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert len(pictures) == 6
    for row in (0, 3):
        for picture, label in zip(pictures[row + 1 : row + 3], maps.values(), strict=True):
            assert (np.asarray(picture) == colorize(label, palette)).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c", "void"]
    assert [axes.get_title() for axes in figure.axes] == ["image", "truth", "CRF", "", "", ""]


def test_figures_do_not_pile_up():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.history(a_history())
    assert plt.get_fignums() == before
