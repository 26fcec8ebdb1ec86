"""A user's own images: a folder of images and a folder of label PNGs."""

from functools import partial
from pathlib import Path

import numpy as np

from .dataset import SegmentationDataset
from .files import LabelledFiles, pair_files
from .images import VOID, image_size, read_label
from .palettes import voc_palette


def load(root, split: str, *, class_names=None, num_classes: int | None = None, palette=None, **options):
    """Load the images of `root/<split>/images` with the labels of the same stem in `root/<split>/labels`.

    If there is no folder for the split, `root/images` and `root/labels` are used: split "all" is all of them, "train"
    the first four fifths by name and "val" the rest (by name, so that the frames of a video stay together).

    Args:
        class_names: K names; None: the lines of `root/classes.txt`, else "class 0", "class 1", ...
        num_classes: K; None: the number of class names, else the largest label of all splits plus one.
        palette: uint8 [K + 1, 3], void last, to decode colour labels and to show classes; None: PASCAL VOC's.

    Raises:
        FileNotFoundError: a folder or a file is missing. ValueError: sizes differ, or options contradict each other.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: {root} is not a folder; expected one with images/ and labels/ in it")
    base = root / split if (root / split).is_dir() else root
    if base is root and split not in ("all", "train", "val"):
        raise FileNotFoundError(
            f"folder: {root} has no folder {split!r}; without it, the splits are train, val and all"
        )
    images, labels = pair_files(base / "images", base / "labels", "folder")
    for image, label in zip(images, labels, strict=True):
        if (sizes := [image_size(image), image_size(label)])[0] != sizes[1]:
            sizes = ["{}x{}".format(*size) for size in sizes]
            raise ValueError(f"folder: {image} is {sizes[0]} but its label {label} is {sizes[1]} (height x width)")

    if num_classes is not None and num_classes < 1:
        raise ValueError(f"folder: num_classes={num_classes}; expected at least one")
    if palette is not None:
        palette = np.asarray(palette, np.uint8)
        num_classes = num_classes or len(palette) - 1
    if class_names is None and (root / "classes.txt").is_file():
        lines = (root / "classes.txt").read_text(encoding="utf-8").splitlines()
        class_names = [line.strip() for line in lines if line.strip()]
    if class_names is None:
        class_names = [f"class {index}" for index in range(num_classes or _largest_label(root) + 1)]
    elif num_classes not in (None, len(class_names)):
        raise ValueError(f"folder: {len(class_names)} class names for num_classes={num_classes}; expected as many")

    items = range(len(images))
    if base is root and split != "all":
        if len(images) < 2:
            raise ValueError(f"folder: {root / 'images'} contains one image; train and val need at least two")
        cut = min(max(1, round(0.8 * len(images))), len(images) - 1)
        items = items[:cut] if split == "train" else items[cut:]
    dataset = SegmentationDataset(
        LabelledFiles(images, labels, partial(read_label, palette=palette)),
        name="folder",
        split=split,
        names=[path.stem for path in images],
        class_names=class_names,
        palette=voc_palette(len(class_names)) if palette is None else palette,
        **options,
    )
    return dataset.subset(items)


def _largest_label(root: Path) -> int:
    """The largest class number in the labels of all splits, which agree on the classes in this way."""
    labels = (read_label(path) for path in [*root.glob("labels/*.png"), *root.glob("*/labels/*.png")])
    largest = max((int(label[label != VOID].max()) for label in labels if (label != VOID).any()), default=-1)
    if largest < 0:
        raise ValueError(f"folder: every label in {root} is void; give num_classes= or classes.txt")
    return largest
