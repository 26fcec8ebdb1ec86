"""Checks of images and labels.

image    float RGB [B, 3, H, W] in [0, 1]
label    integers 0..K-1, 255 = void
"""

import math

import torch
from torch import Tensor

from pwlib.data import VOID

ROUNDING = 1e-3  # how far a float image may leave [0, 1], for example in half precision


def check_image(image: Tensor) -> Tensor:
    """Return the image if it is RGB [B, 3, H, W], float, not empty and in [0, 1]; raise ValueError otherwise."""
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


def check_label(label: Tensor, num_classes: int) -> Tensor:
    """Return the label if it holds integers 0..K-1 or 255 (void); raise ValueError otherwise."""
    if label.is_floating_point():
        raise ValueError(f"label has dtype {label.dtype}; expected class indices, int64")
    wrong = (label != VOID) & ((label < 0) | (label >= num_classes))
    if wrong.any():
        raise ValueError(f"label holds {label[wrong][0].item()}; expected 0..{num_classes - 1} or {VOID} for void")
    return label
