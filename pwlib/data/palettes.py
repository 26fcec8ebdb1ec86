"""Colours for labels: one uint8 row a class, the last row for void."""

import numpy as np
import torch

from .images import VOID

# Scenes: hues that say what the class is, chosen so that any two stay apart for the colour-blind too
# (the test simulates protan-, deuter- and tritanopia).
SCENES_COLOURS = {
    "sky": (168, 216, 255),
    "sea": (0, 96, 190),
    "land": (222, 203, 118),
    "plane": (255, 255, 255),
    "boat": (240, 100, 160),
    "wall": (150, 150, 150),
    "roof": (200, 60, 20),
    "tent": (255, 170, 30),
    "tree": (20, 100, 60),
    "pole": (60, 10, 60),
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
