"""Your own images: a folder of images, a folder of label PNGs."""

from pathlib import Path

import numpy as np

from .dataset import SegmentationDataset
from .files import LabelledFiles, pair_files
from .images import VOID, image_size, read_label
from .palettes import voc_palette


def load(
    root, split: str, *, class_names=None, num_classes: int | None = None, palette=None, **options
) -> SegmentationDataset:
    """Images in `root/<split>/images`, labels of the same stem in `root/<split>/labels`.

    Without a folder for the split, `root/images` and `root/labels` serve: split "all" is all of them, "train" the first
    four fifths by name and "val" the rest (by name, so that frames of one video stay together).

    Labels are PNGs of class numbers (grey or palette), 255 = void, or colours that `palette` lists.
    class_names   by default the lines of `root/classes.txt`, else "class 0", "class 1", …
    num_classes   by default the number of class names, else the largest label found plus one
    palette       uint8 [K+1, 3], void last; by default PASCAL VOC's

    Sizes are compared here, by the files' headers; label values when an item is read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: {root} is not a folder; expected one with images/ and labels/ in it")
    base = root / split if (root / split).is_dir() else root
    if base is root and split not in ("all", "train", "val"):
        raise FileNotFoundError(
            f"folder: {root} has no folder {split!r}, and images/ without splits gives train, val or all"
        )
    images, labels = pair_files(base / "images", base / "labels", "folder")
    for image, label in zip(images, labels, strict=True):
        if image_size(image) != image_size(label):
            sizes = ["{}x{}".format(*image_size(path)) for path in (image, label)]
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
        # Over every split, so that all of them agree on the classes.
        count = num_classes or _largest_label(root) + 1
        class_names = [f"class {index}" for index in range(count)]
    elif num_classes not in (None, len(class_names)):
        raise ValueError(f"folder: {len(class_names)} class names for num_classes={num_classes}; expected as many")

    items = range(len(images))
    if base is root and split != "all":
        if len(images) < 2:
            raise ValueError(
                f"folder: {root / 'images'} holds one image; expected two at least to make train and val of"
            )
        cut = min(max(1, round(0.8 * len(images))), len(images) - 1)
        items = items[:cut] if split == "train" else items[cut:]
    dataset = SegmentationDataset(
        LabelledFiles(images, labels, palette=palette),
        name="folder",
        split=split,
        names=[path.stem for path in images],
        class_names=class_names,
        palette=voc_palette(len(class_names)) if palette is None else palette,
        **options,
    )
    return dataset.subset(items)


def _largest_label(root: Path) -> int:
    largest = -1
    for path in [*root.glob("labels/*.png"), *root.glob("*/labels/*.png")]:
        label = read_label(path)
        label = label[label != VOID]
        largest = max(largest, int(label.max()) if len(label) else -1)
    if largest < 0:
        raise ValueError(f"folder: every label in {root} is void; give num_classes= or classes.txt")
    return largest
