"""Colours of labels: palettes are uint8 [K + 1, 3], one row per class and the last row for void."""

import numpy as np
import torch

from .images import VOID


def voc_palette(num_classes: int) -> np.ndarray:
    """PASCAL VOC's palette, uint8 [num_classes + 1, 3]; the last row is entry 255, VOC's colour of void.

    The bits of the index are distributed over R, G, B in turn, to the highest bits first.
    """
    index = np.array([*range(num_classes), VOID])[:, None]  # [K + 1, 1]
    return sum((index >> (3 * bit + np.arange(3)) & 1) << (7 - bit) for bit in range(8)).astype(np.uint8)


def colorize(label, palette) -> np.ndarray:
    """Paint a label map, a tensor or array of integers [H, W] (255 = void), with a palette [K + 1, 3]: uint8 [H, W, 3].

    ValueError if a label is neither void nor one of the palette's K classes.
    """
    palette = np.asarray(palette, np.uint8)
    label = label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else np.asarray(label)
    classes = len(palette) - 1
    if label.ndim != 2:
        raise ValueError(f"label has shape {list(label.shape)}; expected one label map [H, W]")
    if not ((label == VOID) | (label >= 0) & (label < classes)).all():
        raise ValueError(f"labels are {np.unique(label).tolist()}; expected 0..{classes - 1}, or {VOID} for void")
    return palette[np.where(label == VOID, classes, label)]
