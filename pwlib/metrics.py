"""Scores of a segmentation, all computed from one confusion matrix: matrix[t, p] counts pixels of class t labelled p.

Void pixels (label 255) are not counted. A class that occurs neither in labels nor in predictions has no score (nan) and
is left out of every mean; one that occurs in only one of them scores 0 and stays in the means.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.data import VOID
from pwlib.inputs import at_least, check_label
from pwlib.loaders import all_reduce_sum


class ConfusionMatrix:
    """Counts `matrix`, int64 [K, K]: rows are true classes, columns predicted ones. device None: that of the labels."""

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None):
        at_least(2, num_classes=num_classes)
        self.num_classes, self.device = num_classes, device
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count class indices of any integer type and of equal shapes, such as [B, H, W]; label 255 is not counted.

        ValueError for unequal shapes, floats (take the argmax of scores first) and values that are no class.
        """
        if prediction.shape != label.shape:
            shapes = f"{tuple(prediction.shape)}, label {tuple(label.shape)}"
            raise ValueError(f"prediction has shape {shapes}; expected both [B, H, W]")
        device = self.device = self.device or label.device
        classes = self.num_classes
        label = check_label(label.to(device), classes)
        counted = label != VOID
        guess = check_label(prediction.to(device)[counted], classes, name="prediction", void=False)
        truth = label[counted]
        counts = torch.bincount(truth * classes + guess, minlength=classes**2)
        self.matrix = self.matrix.to(device) + counts.view(classes, classes)

    def all_reduce(self) -> "ConfusionMatrix":
        """The sum over all processes as a new matrix; every one has to call it, with counts on the GPU under NCCL."""
        total = copy.copy(self)
        total.matrix = all_reduce_sum(self.matrix.clone())
        return total

    def scores(self) -> dict[str, Tensor]:
        """All scores, float64 on the CPU: [K] per class (nan where it occurs on neither side), the others scalars.

        With t true, p predicted and c correct pixels of a class, and T pixels in all:
        per_class_iou c / (t + p - c), per_class_precision c / p, per_class_recall c / t, per_class_f1 2c / (t + p);
        miou, precision, recall, f1: their means over the classes that occur on either side;
        pixel_accuracy sum c / T; mean_class_accuracy: the mean recall of the classes that occur in the labels;
        frequency_weighted_iou sum t / T iou (Long, Shelhamer & Darrell, CVPR 2015, section 5). All nan without pixels.
        """
        matrix = self.matrix.cpu().double()
        correct, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)  # [K] each
        occurs = true + predicted > 0

        def ratio(part: Tensor, whole: Tensor) -> Tensor:
            return torch.where(occurs, part / whole.clamp(min=1), math.nan)

        per_class = {
            "iou": ratio(correct, true + predicted - correct),
            "precision": ratio(correct, predicted),
            "recall": ratio(correct, true),
            "f1": ratio(2 * correct, true + predicted),
        }
        iou, means = per_class["iou"], {name: values.nanmean() for name, values in per_class.items()}
        return {
            "miou": means.pop("iou"),
            "pixel_accuracy": correct.sum() / matrix.sum(),
            "mean_class_accuracy": per_class["recall"][true > 0].mean(),
            "frequency_weighted_iou": (true / matrix.sum() * iou).nansum() if matrix.any() else iou.nanmean(),
            **means,
            **{f"per_class_{name}": values for name, values in per_class.items()},
        }


def boundary_mask(label: Tensor, width: int = 3) -> Tensor:
    """The band around label boundaries: pixels that have a differently labelled one at most `width` px away.

    label is of any integer type, [B, H, W], the result bool [B, H, W]. The distance is Chebyshev's, so that the band is
    `width` px wide on either side. Void counts as a label of its own: where a data set draws a void strip between
    objects (VOC), the band reaches `width` px beyond it on each side, as in Kraehenbuehl & Koltun's trimaps (NIPS 2011,
    section 6; after Kohli, Ladicky & Torr, IJCV 2009). The border of the image is no boundary.
    """
    at_least(1, width=width)
    label, side = check_label(label), 2 * width + 1
    # A window holds two labels if and only if its maximum differs from its minimum.
    both = torch.stack([label, -label], dim=1).float()  # [B, 2, H, W]
    for window, padding in (((side, 1), (width, 0)), ((1, side), (0, width))):
        both = F.max_pool2d(both, window, stride=1, padding=padding)
    return both[:, 0] != -both[:, 1]


class SegmentationScores:
    """Scores of a data set, over all pixels and over the band around boundaries.

    Call `update(prediction, label)` for each batch, then `result()`, or `all_reduce().result()` in several processes.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        boundary_width: int = 3,
        *,
        device: torch.device | str | None = None,
    ):
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        if len(self.class_names) != num_classes:
            raise ValueError(f"got {len(self.class_names)} class names; expected {num_classes}")
        self.boundary_width = boundary_width
        self.everywhere = ConfusionMatrix(num_classes, device=device)
        self.boundary = ConfusionMatrix(num_classes, device=device)

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count class indices [B, H, W]; see `ConfusionMatrix.update`."""
        label = check_label(label)
        self.everywhere.update(prediction, label)
        band = boundary_mask(label, self.boundary_width)
        self.boundary.update(prediction, label.masked_fill(~band, VOID))

    def all_reduce(self) -> "SegmentationScores":
        """The scores over the pixels of all processes, as a new object."""
        total = copy.copy(self)
        total.everywhere, total.boundary = self.everywhere.all_reduce(), self.boundary.all_reduce()
        return total

    def result(self) -> dict:
        """`ConfusionMatrix.scores` as plain numbers, per class by name; None where no pixel was counted.

        Adds boundary_iou and boundary_accuracy, miou and pixel_accuracy over the band alone ("trimap IoU"; not the
        "Boundary IoU" of Cheng et al. 2021, which compares two bands), and pixels, the number of pixels counted.
        """
        scores = self.everywhere.scores()
        band = self.boundary.scores()
        scores |= {"boundary_iou": band["miou"], "boundary_accuracy": band["pixel_accuracy"]}
        result = {name: _number(value) for name, value in scores.items() if value.ndim == 0}
        result["pixels"] = int(self.everywhere.matrix.sum())
        for name, values in scores.items():
            if values.ndim == 1:
                result[name] = {c: _number(v) for c, v in zip(self.class_names, values, strict=True)}
        return result


def _number(value: Tensor) -> float | None:
    return None if math.isnan(value) else float(value)
