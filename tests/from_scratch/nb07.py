"""The functions of notebook 07 against the library, torchmetrics, scipy and loops."""

import math

import pytest
import torch

from pwlib import metrics


def labels(seed, *shape, classes=5):
    generator = torch.Generator().manual_seed(seed)
    # Regions of 4x4 pixels, so that bands around borders have an inside and an outside.
    coarse = torch.randint(classes, (shape[0], shape[1] // 4, shape[2] // 4), generator=generator)
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return fine.masked_fill(torch.rand(fine.shape, generator=generator) < 0.05, 255)


def scores(seed, n=2, classes=4, height=6, width=8):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, height, width, generator=generator)
    label = torch.randint(classes, (n, height, width), generator=generator)
    label[:, 0] = 255
    return logits, label


@pytest.mark.parametrize("seed", range(3))
def test_confusion_and_scores_equal_the_library(pull, seed):
    label, prediction = labels(seed, 2, 16, 24, classes=4), labels(seed + 9, 2, 16, 24).clamp(max=4)
    library = metrics.ConfusionMatrix(6)  # class 5 occurs nowhere, class 4 is predicted only
    library.update(prediction, label)
    matrix = pull("07", "confusion")(prediction, label, 6)
    assert torch.equal(matrix, library.matrix)
    for name, value in pull("07", "scores_from")(matrix).items():
        torch.testing.assert_close(value, library.scores()[name], equal_nan=True)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_band_equals_the_library(pull, width):
    label = labels(width, 2, 16, 24)
    ours = torch.stack([pull("07", "band")(x, width) for x in label])
    assert torch.equal(ours, metrics.boundary_mask(label, width))
    assert ours.any() and (width > 1 or not ours.all())


def test_calibration_error_agrees_with_torchmetrics(pull):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(5000, generator=generator)
    y = (torch.rand(5000, generator=generator) < p**2).long()
    both = torch.stack([1 - p, p], 1)
    confidence, chosen = both.max(1)
    wanted = torchmetrics.multiclass_calibration_error(both, y, num_classes=2, n_bins=15)
    assert pull("07", "calibration_error")(confidence, chosen == y, 15).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_reliability_computed_by_hand(pull):
    confidence = torch.tensor([0.05, 0.15, 0.19, 1.0])
    share, mean, accuracy = pull("07", "reliability")(confidence, torch.tensor([False, True, False, True]), 10)
    assert share.tolist() == [0.25, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.25]
    assert mean[1].item() == pytest.approx(0.17) and accuracy[1].item() == 0.5 and math.isnan(mean[2])
    assert mean[9].item() == accuracy[9].item() == 1


@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
def test_temperature_minimises_the_loss(pull, scale):
    optimize = pytest.importorskip("scipy.optimize")
    logits, label = scores(1, n=4)
    label[:, 1:4] = logits.argmax(1)[:, 1:4]  # right more often than not, so that there is a finite best temperature
    logits = logits * scale

    def nll(log_t):
        return torch.nn.functional.cross_entropy(logits.double() / math.exp(log_t), label, ignore_index=255).item()

    wanted = math.exp(optimize.minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-8}).x)
    assert pull("07", "fit_temperature")(logits, label) == pytest.approx(wanted, rel=1e-4)


def test_bootstrap_scores_the_drawn_images(pull):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randint(0, 30, (6, 4, 4), generator=generator)
    picks = torch.randint(6, (7, 6), generator=generator)
    found = pull("07", "bootstrap_miou")(matrices, picks)
    for row, value in zip(picks, found, strict=True):
        pooled = metrics.ConfusionMatrix(4)
        pooled.matrix = sum(matrices[i] for i in row.tolist())
        torch.testing.assert_close(value, pooled.scores()["miou"])
