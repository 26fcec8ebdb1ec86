"""Scenes: synthetic images of a shore with boats, planes, houses and tents, drawn when they are read.

The images have five properties that make every part of a CNN + CRF segmenter useful:
1. Colour does not determine the class. Sky and sea take their colours from the same list, land and trees from another,
   painted objects from a third; light, tint and texture vary between images.
2. Borders are sharp: the colour changes within one pixel, much finer than the cells of a stride-8 network.
3. Two pairs of classes look the same and differ in their surroundings only. Plane and boat have the same shape and the
   same colours; one is in the sky, the other in the sea. Roof and tent: one is on a wall, the other on land.
4. Poles and wires are one or two pixels wide and half transparent, as in a photograph; a dense CRF erodes them.
5. Objects have an outline of one pixel of void, as in PASCAL VOC.
"""

import math
from functools import partial

import numpy as np
import torch

from .dataset import SegmentationDataset
from .images import VOID, check_size

# Found by search: any two colours are at least 0.1 apart in OKLab, also under simulated protanopia, deuteranopia and
# tritanopia (a test measures it).
COLOURS = {
    "sky": (140, 208, 245), "sea": (40, 40, 150), "land": (250, 205, 105), "plane": (255, 255, 245),
    "boat": (225, 110, 255), "wall": (110, 155, 150), "roof": (170, 25, 5), "tent": (232, 105, 0),
    "tree": (0, 105, 95), "pole": (140, 0, 210),
}  # fmt: skip
CLASS_NAMES = tuple(COLOURS)
SKY, SEA, LAND, PLANE, BOAT, WALL, ROOF, TENT, TREE, POLE = range(10)
PALETTE = np.array([*COLOURS.values(), (0, 0, 0)], np.uint8)
LENGTHS = {"train": 400, "val": 100, "test": 100}
SIZE = (64, 96)

# RGB before lighting, 0 to 255. Classes that share a list cannot be distinguished by colour.
AIR_AND_WATER = [(198, 222, 238), (150, 194, 228), (96, 150, 200), (62, 104, 156)]
AIR_AND_WATER += [(118, 182, 186), (240, 206, 186), (184, 172, 214), (112, 132, 156)]
EARTH_AND_LEAF = [(138, 176, 88), (88, 132, 72), (190, 188, 108), (218, 200, 150), (160, 132, 92), (56, 92, 62)]
EARTH_AND_LEAF += [(116, 112, 70)]
PAINT = [(214, 72, 58), (242, 178, 58), (246, 242, 232), (64, 92, 164), (186, 84, 138), (70, 158, 138), (70, 60, 72)]
PLASTER = [(232, 220, 196), (190, 154, 122), (170, 180, 192), (244, 234, 222), (214, 170, 156), (150, 128, 118)]
WOOD = [(56, 46, 44), (222, 214, 204), (104, 76, 60)]


class _Canvas:
    """An image and its label, painted from back to front. Coordinates in px, y down; `unit` is 1 px at 64x96."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.height, self.width = size
        self.unit = min(self.height / SIZE[0], self.width / SIZE[1])
        self.rng = rng
        self.y, self.x = np.mgrid[: self.height, : self.width].astype(np.float32) + 0.5
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.full(size, SKY, np.uint8)

    def clouds(self, down: float, across: float) -> np.ndarray:
        """Smooth noise [H, W] of about unit variance: noise on a grid of `down` x `across` units, interpolated."""
        rows = _interpolation(self.height, max(down * self.unit, 1))
        columns = _interpolation(self.width, max(across * self.unit, 1))
        noise = self.rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
        return 1.5 * rows @ noise @ columns.T

    def fill(self, mask, colour, label: int, texture=0.0, outline: bool = True) -> None:
        """Paint `mask` (bool [H, W]) with a colour plus a texture (grey levels), and outline it with void."""
        if outline:
            self.label[_dilate(mask) & ~mask] = VOID
        self.label[mask] = label
        shade = np.broadcast_to(np.asarray(texture, np.float32), mask.shape)[mask]
        self.image[mask] = np.asarray(colour, np.float32) + shade[:, None]

    def polygon(self, points) -> np.ndarray:
        """Mask of the pixels whose centre is in the polygon [(x, y), ...], by the even-odd rule."""
        inside = np.zeros(self.label.shape, bool)
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            if y0 != y1:
                crosses = (self.y > y0) != (self.y > y1)
                inside ^= crosses & (self.x < x0 + (self.y - y0) * ((x1 - x0) / (y1 - y0)))
        return inside


def _interpolation(count: int, grain: float) -> np.ndarray:
    """Weights [count, cells + 1] that interpolate a grid with a cell every `grain` px linearly."""
    position = np.arange(count, dtype=np.float32) / grain
    grid = np.arange(int(position[-1]) + 2, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(position[:, None] - grid))


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The mask and the four neighbours of its pixels."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    return wide


def _pick(rng, palette, against=(), contrast=0.0) -> np.ndarray:
    """A random, slightly varied colour of the palette at least `contrast` grey levels from all colours in `against`.

    Distances are root mean squares over the channels. If no colour is far enough, the most distant one.
    """
    colours = np.asarray(palette, np.float32)
    colours = colours[rng.permutation(len(colours))] + rng.normal(0, 6, (1, 3)).astype(np.float32)
    gaps = np.sqrt(((colours[:, None] - np.reshape(against, (-1, 3))) ** 2).mean(-1)).min(1, initial=np.inf)
    return colours[np.minimum(gaps, contrast).argmax()]  # the first that is far enough, else the most distant


def _craft(canvas: _Canvas, x: float, y: float, label: int, behind) -> None:
    """Draw a plane or a boat: a hull with a fin (or sail) in two colours. Only the label differs."""
    rng, unit = canvas.rng, canvas.unit
    length, height = rng.uniform(18, 28) * unit, rng.uniform(10, 14) * unit
    flip = rng.choice([-1, 1])
    top, deck, keel = y - 0.5 * height, y + 0.12 * height, y + 0.5 * height
    hull = [(-0.5, deck), (0.5, deck), (0.3, keel), (-0.4, keel)]
    fin = [(-0.42, deck + 1), (-0.36, top), (-0.22, top), (0.2, deck + 1)]
    paint = _pick(rng, PAINT, behind, 48)
    trim = _pick(rng, PAINT, [*behind, paint], 48)
    shape = canvas.polygon([(x + flip * length * px, py) for px, py in hull])
    sail = canvas.polygon([(x + flip * length * px, py) for px, py in fin]) & ~shape
    canvas.fill(shape | sail, paint, label)
    canvas.image[sail] = trim


def _gable(canvas: _Canvas, x: float, base: float, width: float, label: int, paint) -> None:
    """Draw a roof or a tent: a gable with its base at y = `base`. Only the label differs."""
    rng, unit = canvas.rng, canvas.unit
    height, ridge = rng.uniform(9, 13) * unit, rng.uniform(0, 0.25) * width
    top = base - height
    corners = [(x - width / 2, base), (x - ridge / 2, top), (x + ridge / 2, top), (x + width / 2, base)]
    rows = 5 * np.sign(np.sin((canvas.y - base) * (math.pi / (1.5 * max(unit, 1)))))
    canvas.fill(canvas.polygon(corners), paint, label, texture=rows)


def _house(canvas: _Canvas, x: float, base: float, behind) -> None:
    rng, unit = canvas.rng, canvas.unit
    width, height = rng.uniform(17, 25) * unit, rng.uniform(9, 13) * unit
    paint = _pick(rng, PAINT, behind, 48)
    plaster = _pick(rng, PLASTER, [*behind, paint], 40)
    wall = (abs(canvas.x - x) < width / 2) & (canvas.y < base) & (canvas.y > base - height)
    canvas.fill(wall, plaster, WALL)
    for place in (-0.28, 0.28):
        window = (abs(canvas.x - x - place * width) < 1.6 * unit) & (abs(canvas.y - base + 0.55 * height) < 1.8 * unit)
        canvas.image[window & wall] = plaster * 0.62
    _gable(canvas, x, base - height, width + 3 * unit, ROOF, paint)


def _tree(canvas: _Canvas, x: float, base: float, behind) -> None:
    rng, unit = canvas.rng, canvas.unit
    radius, trunk = rng.uniform(5, 7.5) * unit, rng.uniform(3, 6) * unit
    stem = (abs(canvas.x - x) < 1.3 * unit) & (canvas.y < base) & (canvas.y > base - trunk - radius)
    crown = np.zeros_like(stem)
    for angle in np.arange(4) * (math.pi / 2) + rng.uniform(0, 1.5):
        dx, dy = 0.55 * radius * math.cos(angle), 0.55 * radius * math.sin(angle)
        across, down = canvas.x - (x + dx), canvas.y - (base - trunk - radius + dy)
        crown |= across**2 + down**2 < (0.72 * radius) ** 2
    leaf = _pick(rng, EARTH_AND_LEAF, behind, 36)
    canvas.fill(stem | crown, WOOD[2], TREE)
    canvas.image[crown] = leaf + 8 * canvas.clouds(2, 2)[crown][:, None]


def _poles(canvas: _Canvas, shore: float, behind) -> None:
    """Draw a row of one to three poles, 2 px wide at any size, and a wire of 1 px between them and beyond."""
    rng, unit = canvas.rng, canvas.unit
    count = int(rng.integers(1, 4))
    gap = canvas.width / count
    start = rng.uniform(0.15, 0.85) * gap
    base = rng.uniform(shore + 3 * unit, canvas.height)
    top = base - rng.uniform(28, 38) * unit
    mask = np.zeros_like(canvas.label, bool)
    for i in range(count):
        x = round(start + i * gap)
        mask |= (canvas.x > x) & (canvas.x < x + 2) & (canvas.y < base) & (canvas.y > top)
        mask |= (abs(canvas.x - x - 1) < 3.2 * unit) & (abs(canvas.y - round(top + 2) - 0.5) < 0.5)
    phase = np.mod(canvas.x - start, gap) / gap
    wire = top + 2 + 0.4 * min(gap, 40 * unit) * phase * (1 - phase)  # parabolas that sag by a tenth of their span
    mask |= np.floor(canvas.y) == np.floor(wire)
    # Thin objects are half transparent: a camera spreads light over about a pixel.
    mixed = 0.5 * _pick(rng, WOOD, behind, 40) + 0.5 * canvas.image[mask]
    canvas.fill(mask, 0, POLE)
    canvas.image[mask] = mixed


def draw(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene: image uint8 [H, W, 3], label uint8 [H, W] (255 = void)."""
    canvas = _Canvas(size, rng)
    height, width, unit = canvas.height, canvas.width, canvas.unit

    # One object per plot of land, so that they hide little of each other; boats stay where the objects are low.
    plots = max(3, round(width / (20 * unit)))
    kinds = rng.permutation([WALL, TENT, TREE, *rng.choice([WALL, TENT, TREE, -1, -1], plots - 3)])

    # The background, from far to near: sky, sea, in half of the scenes hills, land.
    horizon = rng.uniform(0.34, 0.46) * height
    shore = rng.uniform(0.64, 0.74) * height
    sky = _pick(rng, AIR_AND_WATER)
    sea = _pick(rng, AIR_AND_WATER, [sky], 34)
    if rng.random() < 0.5:  # every colour is equally likely for both
        sky, sea = sea, sky
    land = _pick(rng, EARTH_AND_LEAF, [sky, sea], 34)
    everywhere = np.ones(size, bool)
    canvas.fill(everywhere, sky, SKY, 5 * canvas.clouds(10, 24) - 12 * (canvas.y / height - 0.3), outline=False)
    canvas.fill(canvas.y > horizon, sea, SEA, 5 * canvas.clouds(1.5, 8), outline=False)
    if rng.random() < 0.5:
        hill = _pick(rng, EARTH_AND_LEAF, [sky, sea], 34)
        rise = horizon - unit * (3 + 4 * canvas.clouds(64, 14)[:1])
        canvas.fill((canvas.y > rise) & (canvas.y < horizon), hill, LAND, 4 * canvas.clouds(3, 5), outline=False)
    for label, colour, top, bottom, places in (
        (PLANE, sky, 0, horizon, rng.permutation(plots)),
        (BOAT, sea, horizon, shore, sorted(rng.permutation(plots), key=lambda plot: kinds[plot] in (WALL, TREE))),
    ):
        apart = [plot for plot in places if plot % 2 == places[0] % 2]
        for plot in apart[: rng.choice(3, p=[0.15, 0.5, 0.35])]:
            x = (0.14 + 0.72 * plot / (plots - 1)) * width + rng.uniform(-4, 4) * unit
            y = (top + bottom) / 2 + rng.uniform(-0.15, 0.15) * (bottom - top)
            _craft(canvas, x, y, label, [colour])
    ground = canvas.y > shore + unit * 1.5 * canvas.clouds(64, 20)[:1]
    canvas.fill(ground, land, LAND, 6 * canvas.clouds(3, 4), outline=False)
    canvas.label[_dilate(ground) & (canvas.label == BOAT)] = VOID  # the ground hides keels: also a border of an object

    # Objects on the land, from far to near.
    bases = np.sort(rng.uniform(shore + 0.35 * (height - shore), height - 2 * unit, plots))
    for plot, base in zip(rng.permutation(plots), bases, strict=True):
        kind = kinds[plot]
        x = (plot + 0.5) * width / plots + rng.uniform(-2, 2) * unit
        if kind == WALL:
            _house(canvas, x, base, [land, sea, sky])
        elif kind == TENT:
            _gable(canvas, x, base, rng.uniform(20, 28) * unit, TENT, _pick(rng, PAINT, [land, sea, sky], 48))
        elif kind == TREE:
            _tree(canvas, x, base, [land, sea, sky])
    if rng.random() < 0.75:
        _poles(canvas, shore, [sky, sea])

    # Light: strength, tint and a slope across the image. Noise of the sensor: partly common to the channels.
    strength = rng.uniform(0.74, 1.12) * rng.uniform(0.94, 1.06, 3)
    slope = 1 + rng.uniform(-0.1, 0.1) * (canvas.x / width - 0.5)
    noise = rng.normal(0, 6, (*size, 3)) + rng.normal(0, 5, (*size, 1))
    image = canvas.image * strength * slope[..., None] + noise
    return image.round().clip(0, 255).astype(np.uint8), canvas.label


def _read(seed: int, split: str, size: tuple[int, int], index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scene `index` of a split from the random stream (seed, split, index)."""
    image, label = draw(size, np.random.default_rng([seed, list(LENGTHS).index(split), index]))
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def load(split: str, *, size=None, length: int | None = None, seed: int = 0, cache: bool = True, **options):
    """Load a split: train (400 scenes), val or test (100 each), or `length` scenes, drawn at `size` (H, W) or 64x96.

    A scene depends only on (seed, split, index, size). ValueError for an unknown split or an impossible option.
    """
    if split not in LENGTHS:
        raise ValueError(f"scenes: unknown split {split!r}; expected one of {', '.join(LENGTHS)}")
    length = LENGTHS[split] if length is None else length
    if length < 1 or seed < 0:
        raise ValueError(f"scenes: length {length}, seed {seed}; expected at least one scene and a seed of at least 0")
    size = SIZE if size is None else check_size(size, "scenes")
    return SegmentationDataset(
        partial(_read, seed, split, size),
        name="scenes",
        split=split,
        names=[f"{split}_{index:05d}" for index in range(length)],
        class_names=CLASS_NAMES,
        palette=PALETTE,
        size=size,
        cache=cache,
        **options,
    )
