"""Small photographs, free of copyright restrictions, for notebooks that run from the wheel and without a network.

README.md in this folder lists the source and the licence of each photograph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pwlib.data import VOID, read_image

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jpg")))

# The regions in the order of their class numbers, each with the lines of a pen through points (x, y) in px.
REGIONS: dict[str, dict[str, list[list[tuple[int, int]]]]] = {
    "portrait": {
        "background": [[(140, 5), (190, 15), (215, 60), (210, 130), (230, 175)], [(250, 10), (262, 190)]],
        "flag": [
            [(15, 15), (60, 30), (50, 80), (40, 140)],
            [(75, 20), (75, 180)],
            [(75, 60), (95, 15)],
            [(30, 170), (60, 175)],
            [(5, 200), (5, 300)],
        ],
        "face": [[(95, 100), (115, 130), (115, 160), (140, 200)], [(110, 80), (165, 80), (180, 130)]],
        "uniform": [
            [(90, 60), (180, 60)],
            [(120, 35), (165, 40)],
            [(45, 230), (30, 300), (250, 300), (240, 230), (200, 210)],
        ],
    }
}
# Colours of Okabe & Ito for the regions of the portrait, and white for pixels without a stroke: uint8 [K + 1, 3].
PALETTE = np.array([[86, 180, 233], [213, 94, 0], [240, 228, 66], [70, 70, 110], [255, 255, 255]], np.uint8)


def load(name: str, size: tuple[int, int] | None = None) -> Tensor:
    """Read a photograph: float32 RGB [3, H, W] in [0, 1].

    Args:
        name: one of `NAMES`, "portrait" for example.
        size: (H, W) in px to which it is resized; None: as stored, 320 px on the longer side.

    Raises:
        ValueError: there is no photograph of this name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown photograph {name!r}; expected one of {', '.join(NAMES)}")
    image = read_image(FOLDER / f"{name}.jpg")
    if size is None:
        return image
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def strokes(name: str, size: tuple[int, int] | None = None, *, width: float = 4.0) -> Tensor:
    """Return the strokes of a pen on a photograph: int64 [H, W], a class number on each stroke and 255 elsewhere.

    Args:
        name: one of the keys of `REGIONS`; the names of the classes are the keys of `REGIONS[name]`.
        size: (H, W) in px as for `load`; the strokes are scaled with the photograph.
        width: of the pen, in px of the stored photograph; at least one pixel after scaling.

    Raises:
        ValueError: no strokes are stored for this photograph.
    """
    if name not in REGIONS:
        raise ValueError(f"no strokes are stored for {name!r}; expected one of {', '.join(REGIONS)}")
    with Image.open(FOLDER / f"{name}.jpg") as stored:
        full = stored.size  # (W, H)
    height, wide = full[::-1] if size is None else size
    scale = np.array([wide / full[0], height / full[1]])
    picture = Image.new("L", (wide, height), VOID)
    pen = ImageDraw.Draw(picture)
    for label, lines in enumerate(REGIONS[name].values()):
        for line in lines:
            points = [tuple((np.array(point) * scale).tolist()) for point in line]
            pen.line(points, fill=label, width=max(1, round(width * scale.mean())), joint="curve")
    return torch.from_numpy(np.array(picture)).long()
