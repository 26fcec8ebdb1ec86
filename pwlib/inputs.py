"""Checks of images, labels and numbers that several modules share. All raise ValueError."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from pwlib.data import VOID

ROUNDING = 1e-3  # how far a float image may leave [0, 1], for example in half precision


def at_least(lowest: int, **values: float) -> None:
    """Raise ValueError for a value below `lowest`, or NaN; the keyword is its name in the message."""
    for name, value in values.items():
        if not value >= lowest:
            raise ValueError(f"{name} is {value}; expected at least {lowest}")


def one_of(allowed: Collection[str], **values: str) -> None:
    """Raise ValueError for a value that is not allowed; the keyword is its name in the message."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def check_image(image: Tensor) -> Tensor:
    """Return the image if it is RGB [B, 3, H, W], float, not empty and in [0, 1]."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [B, 3, H, W] (RGB), none of them empty")
    if not image.is_floating_point():
        raise ValueError(f"image has dtype {image.dtype}; expected float RGB in [0, 1] (divide uint8 by 255)")
    if torch.compiler.is_compiling():  # values are unknown in torch.export and torch.compile
        return image
    low, high = torch.stack(image.detach().aminmax()).tolist()  # NaN if the image contains NaN
    if not (low > -math.inf and high < math.inf):
        raise ValueError("image contains NaN or infinity; expected RGB in [0, 1]")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"image has values {low:.3g} to {high:.3g}; expected RGB in [0, 1] (divide 0..255 by 255)")
    return image


def check_label(label: Tensor, num_classes: int | None = None, *, name: str = "label", void: bool = True) -> Tensor:
    """Return class indices of any integer type as int64, since a smaller type would wrap around in sums and products.

    Given K = `num_classes`, all must be in 0..K-1, or 255 with `void`.
    """
    if label.is_floating_point() or label.is_complex():
        raise ValueError(f"{name} has dtype {label.dtype}; expected class indices, an integer type (an argmax?)")
    label = label.long()
    if num_classes is not None:
        wrong = (label < 0) | (label >= num_classes)
        if void:
            wrong &= label != VOID
        if wrong.any():
            allowed = f"0..{num_classes - 1}" + (f" or {VOID} for void" if void else "")
            raise ValueError(f"{name} holds {label[wrong][0].item()}; expected {allowed}")
    return label
