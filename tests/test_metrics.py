"""Scores, against torchmetrics, hand-counted tables and brute-force distances."""

import json
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.distributed
import torch.multiprocessing
import torchmetrics.classification as tm

from pwlib.metrics import ConfusionMatrix, SegmentationScores, boundary_mask


def noisy(num_classes=5, size=(3, 20, 31), seed=0, error=0.4, void=0.1):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, num_classes, size, generator=g)
    guess = torch.where(torch.rand(size, generator=g) < error, torch.randint(0, num_classes, size, generator=g), label)
    return guess, label.masked_fill(torch.rand(size, generator=g) < void, 255)


def filled(guess, label, num_classes=5):
    matrix = ConfusionMatrix(num_classes)
    matrix.update(guess, label)
    return matrix


# --------------------------------------------------------------------------------------------------- confusion matrix


def test_counts_are_those_of_a_loop_over_pixels():
    guess, label = noisy()
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(label.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    assert torch.equal(filled(guess, label).matrix, expected)


def test_all_scores_are_torchmetrics():
    guess, label = noisy()
    ours = filled(guess, label).scores()
    for name, metric, average in [
        ("miou", tm.MulticlassJaccardIndex, "macro"),
        ("per_class_iou", tm.MulticlassJaccardIndex, "none"),
        ("frequency_weighted_iou", tm.MulticlassJaccardIndex, "weighted"),
        ("pixel_accuracy", tm.MulticlassAccuracy, "micro"),
        ("mean_class_accuracy", tm.MulticlassAccuracy, "macro"),
        ("precision", tm.MulticlassPrecision, "macro"),
        ("per_class_precision", tm.MulticlassPrecision, "none"),
        ("recall", tm.MulticlassRecall, "macro"),
        ("per_class_recall", tm.MulticlassRecall, "none"),
        ("f1", tm.MulticlassF1Score, "macro"),
        ("per_class_f1", tm.MulticlassF1Score, "none"),
    ]:
        theirs = metric(num_classes=5, average=average, ignore_index=255)(guess, label)
        torch.testing.assert_close(ours[name].float(), theirs, msg=name)


def test_scores_of_a_table_counted_by_hand():
    """Class 0: 4 of 5 pixels are correct. 1: its one pixel is labelled 0. 2: predicted once, never true. 3: absent."""
    label = torch.tensor([[[0, 0, 0, 0, 0, 1, 255, 255]]])
    guess = torch.tensor([[[0, 0, 0, 0, 2, 0, 3, 1]]])
    scores = filled(guess, label, 4).scores()
    nan = math.nan
    for name, expected in {
        "per_class_iou": [4 / 6, 0, 0, nan],
        "per_class_precision": [4 / 5, 0, 0, nan],
        "per_class_recall": [4 / 5, 0, 0, nan],
        "per_class_f1": [8 / 10, 0, 0, nan],
        "miou": 4 / 6 / 3,
        "pixel_accuracy": 4 / 6,
        "mean_class_accuracy": (4 / 5 + 0) / 2,  # over classes 0 and 1, which occur in the labels
        "frequency_weighted_iou": 5 / 6 * 4 / 6,
        "precision": 4 / 5 / 3,
    }.items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(scores[name], expected, equal_nan=True, msg=name)


def test_updates_add_up():
    guess, label = noisy()
    running = ConfusionMatrix(5)
    for i in range(3):
        running.update(guess[i], label[i])
    assert torch.equal(filled(guess, label).matrix, running.matrix)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_of_any_type_and_non_contiguous_tensors_give_the_same_counts(dtype):
    guess, label = noisy()
    expected = filled(guess, label).matrix
    assert torch.equal(filled(guess.to(dtype), label.to(dtype)).matrix, expected)
    assert torch.equal(filled(guess.transpose(1, 2), label.transpose(1, 2)).matrix, expected)


def test_predictions_on_void_do_not_matter():
    guess, label = noisy()
    assert torch.equal(filled(guess.masked_fill(label == 255, 255), label).matrix, filled(guess, label).matrix)


@pytest.mark.parametrize(
    ("guess", "label", "message"),
    [
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 7), r"label holds 7; expected 0\.\.4 or 255 for void"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), -1), "label holds -1"),
        (torch.full((1, 2, 2), 5), torch.zeros(1, 2, 2).long(), r"prediction holds 5; expected 0\.\.4$"),
        (torch.full((1, 2, 2), 255), torch.zeros(1, 2, 2).long(), "prediction holds 255"),
        (torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2).long(), r"\(1, 5, 2, 2\), label \(1, 2, 2\)"),
        (torch.rand(1, 2, 2), torch.zeros(1, 2, 2).long(), "prediction has dtype torch.float32"),
    ],
)
def test_invalid_input_is_named_and_does_not_change_the_counts(guess, label, message):
    matrix = filled(*noisy())
    before = matrix.matrix.clone()
    with pytest.raises(ValueError, match=message):
        matrix.update(guess, label)
    assert torch.equal(matrix.matrix, before)


def test_one_class_is_rejected():
    with pytest.raises(ValueError, match="num_classes is 1"):
        ConfusionMatrix(1)


# ----------------------------------------------------------------------------------------------------------- boundaries


def islands(seed=0, size=(2, 24, 29)):
    """Smooth regions of three classes, in places with a strip of void between them."""
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), (0, 3, 3))
    label = np.digitize(noise, np.quantile(noise, [0.3, 0.7]))
    return torch.from_numpy(np.where(np.abs(noise) < 0.01, 255, label))


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_band_is_every_pixel_near_another_label(width):
    label = islands()
    expected = torch.zeros_like(label, dtype=torch.bool)
    for i, one in enumerate(label.numpy()):
        for value in np.unique(one):  # distance to the nearest pixel of another label, per label
            distance = scipy.ndimage.distance_transform_cdt(one == value, metric="chessboard")
            expected[i] |= torch.from_numpy((one == value) & (distance <= width))
    found = boundary_mask(label, width)
    assert torch.equal(found, expected)
    assert (width == 40) == bool(found.all())


def test_band_reaches_beyond_a_void_strip_and_does_not_follow_the_border_of_the_image():
    label = torch.tensor([[[0] * 6 + [255] * 5 + [1] * 6]])
    band = boundary_mask(label, 2) & (label != 255)
    assert band[0, 0].nonzero().flatten().tolist() == [4, 5, 11, 12]
    assert not boundary_mask(torch.zeros(1, 4, 5).long(), 3).any()
    with pytest.raises(ValueError, match="width is 0; expected at least 1"):
        boundary_mask(label, 0)


INTEGERS = [torch.uint8, torch.int16, torch.uint16, torch.int32]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_type_have_the_same_band_and_scores(dtype):
    label = islands()
    guess = label.roll(1, 2).masked_fill(label == 255, 0).masked_fill(label.roll(1, 2) == 255, 0)
    assert torch.equal(boundary_mask(label.to(dtype), 2), boundary_mask(label, 2))
    results = []
    for kind in (torch.int64, dtype):
        scores = SegmentationScores(3)
        scores.update(guess.to(kind), label.to(kind))
        results.append(scores.result())
    assert results[0] == results[1]


def test_two_classes_may_be_booleans():
    label = islands() == 1
    assert torch.equal(boundary_mask(label), boundary_mask(label.long()))
    scores = SegmentationScores(2)
    scores.update(~label, label)
    assert scores.result()["pixel_accuracy"] == 0.0
    with pytest.raises(ValueError, match=r"label has dtype torch\.float32"):
        boundary_mask(label.float())


def test_boundary_scores_are_those_of_the_band_alone():
    label = islands()
    guess = torch.where(boundary_mask(label, 2), (label + 1) % 3, label).masked_fill(label == 255, 0)
    scores = SegmentationScores(3, boundary_width=2)
    scores.update(guess, label)
    result = scores.result()
    assert result["boundary_iou"] == result["boundary_accuracy"] == 0  # every pixel of the band is wrong
    band = boundary_mask(label, 2)[label != 255].float().mean().item()
    assert result["pixel_accuracy"] == pytest.approx(1 - band)
    wider = SegmentationScores(3, boundary_width=4)
    wider.update(guess, label)
    assert 0 < wider.result()["boundary_iou"] < result["miou"]


# -------------------------------------------------------------------------------------------------------------- results


def test_result_is_json_with_class_names():
    guess, label = noisy()
    scores = SegmentationScores(5, ["sky", "road", "tree", "car", "sign"])
    scores.update(guess, label)
    result = json.loads(json.dumps(scores.result(), allow_nan=False))
    table = scores.everywhere.scores()
    assert result["miou"] == table["miou"].item() and result["pixels"] == int((label != 255).sum())
    assert result["per_class_iou"] == dict(
        zip(["sky", "road", "tree", "car", "sign"], table["per_class_iou"].tolist(), strict=True)
    )
    with pytest.raises(ValueError, match="got 2 class names; expected 5"):
        SegmentationScores(5, ["a", "b"])


def test_without_a_labelled_pixel_there_is_no_score():
    scores = SegmentationScores(2)
    for label in (torch.full((1, 3, 4), 255), torch.full((0, 3, 4), 255)):
        scores.update(torch.zeros_like(label), label)
        assert all(value.isnan().all() for value in scores.everywhere.scores().values())
        result = scores.result()
        assert result.pop("pixels") == 0
        assert result["per_class_iou"] == {"0": None, "1": None}
        assert all(value is None for value in result.values() if not isinstance(value, dict))


def test_one_region_has_scores_but_no_boundary():
    scores = SegmentationScores(2)
    scores.update(torch.zeros(1, 5, 5).long(), torch.zeros(1, 5, 5).long())
    result = scores.result()
    assert result["miou"] == result["frequency_weighted_iou"] == 1.0
    assert result["boundary_iou"] is None and result["per_class_iou"] == {"0": 1.0, "1": None}


# ------------------------------------------------------------------------------------------------------- many processes


def _one_of_two(rank, address, folder):
    torch.set_num_threads(1)  # a forked process must not enter its parent's OpenMP pool
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    guess, label = noisy(size=(4, 20, 31))
    scores = SegmentationScores(5)
    scores.update(guess[rank::2], label[rank::2])
    total = scores.all_reduce()
    assert scores.result() != total.result()  # `all_reduce` does not change the counts of the process
    torch.save(total.result(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_scores_of_one(tmp_path):
    # Forked, because a spawned process imports everything again.
    torch.multiprocessing.start_processes(_one_of_two, (tmp_path / "meet", tmp_path), nprocs=2, start_method="fork")
    alone = SegmentationScores(5)
    alone.update(*noisy(size=(4, 20, 31)))
    assert alone.all_reduce().result() == alone.result()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == alone.result()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counts_stay_on_the_device_and_agree():
    guess, label = noisy()
    scores, on_gpu = SegmentationScores(5), SegmentationScores(5)
    scores.update(guess, label)
    on_gpu.update(guess.cuda(), label.cuda())
    assert on_gpu.everywhere.matrix.is_cuda and on_gpu.result() == scores.result()
