"""The figures draw the numbers and label maps that they are given."""

import numpy as np
import pytest
import torch
from test_data import DICHROMACY, closest

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
    assert drawn == [[2, 0.5], [3, 0.6]], "epoch 0 of stage 2 has the position of the last epoch of stage 1"
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


@pytest.mark.parametrize("vision", DICHROMACY)
def test_the_colours_of_curves_stay_apart_with_any_colour_vision(vision):
    colours = [tuple(bytes.fromhex(code[1:])) for code in plots.COLOURS.values()]
    assert closest(colours, vision) > 0.05


def test_overlay_blends_all_pixels_but_void():
    image = torch.full((3, 1, 2), 0.5)
    label = torch.tensor([[VOID, 1]])
    palette = voc_palette(3)
    out = plots.overlay(image, label, palette, alpha=0.25)
    assert out.dtype == np.uint8 and out[0, 0].tolist() == [128, 128, 128]
    assert out[0, 1] == pytest.approx(0.75 * 128 + 0.25 * palette[1], abs=1)


def test_predictions_show_each_label_map_and_list_the_classes_that_occur():
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


def test_pyplot_does_not_keep_the_figures():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.history(a_history())
    assert plt.get_fignums() == before
