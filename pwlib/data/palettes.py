"""Colours for labels: one uint8 row a class, the last row for void."""

import numpy as np
import torch

from .images import VOID

# Hues near what the class suggests, found by search so that any two stay apart for the colour-blind too: at least 0.1
# in OKLab under simulated protan-, deuter- and tritanopia (the test measures it).
SCENES_COLOURS = {
    "sky": (140, 208, 245),
    "sea": (40, 40, 150),
    "land": (250, 205, 105),
    "plane": (255, 255, 245),
    "boat": (225, 110, 255),
    "wall": (110, 155, 150),
    "roof": (170, 25, 5),
    "tent": (232, 105, 0),
    "tree": (0, 105, 95),
    "pole": (140, 0, 210),
}
SCENES_VOID = (0, 0, 0)


def voc_palette(num_classes: int) -> np.ndarray:
    """PASCAL VOC's palette, uint8 [num_classes + 1, 3]: the bits of the index dealt to R, G, B from the top bit down.

    The last row is VOC's own void colour, its entry 255.
    """
    palette = np.zeros((num_classes + 1, 3), np.uint8)
    for row, index in enumerate([*range(num_classes), VOID]):
        for bit in range(8):
            for channel in range(3):
                palette[row, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return palette


def colorize(label, palette) -> np.ndarray:
    """Paint a label map: integers [H, W] (255 = void), palette uint8 [K+1, 3] -> uint8 [H, W, 3].

    Takes tensors and arrays. ValueError if a label is neither void nor one of the palette's K classes.
    """
    palette = np.asarray(palette, np.uint8)
    label = label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else np.asarray(label)
    classes = len(palette) - 1
    if label.ndim != 2:
        raise ValueError(f"colorize expects one label map [H, W], got shape {list(label.shape)}")
    row = np.where(label == VOID, classes, label)
    if label.size and (row.min() < 0 or row.max() > classes or np.any((label == classes) & (label != VOID))):
        raise ValueError(
            f"colorize: labels must be 0..{classes - 1} or {VOID} for void, got {np.unique(label).tolist()}"
        )
    return palette[row]
