"""The data set "folder": a user's own images and label files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pwlib.annotations.classes import LabelReader, read_classes
from pwlib.data.dataset import SegmentationDataset
from pwlib.data.files import LabelledFiles, list_files, pair_files
from pwlib.data.images import LABEL_SUFFIXES, VOID, image_size
from pwlib.data.palettes import voc_palette

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation", "dev"), "test": ("testing",)}


def load(
    root: str | Path,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    palette: np.ndarray | None = None,
    values: Mapping[int, int] | None = None,
    void: int | None = VOID,
    **options,
) -> SegmentationDataset:
    """Load the images of `root/<split>/images` with the labels of the same stem in `root/<split>/labels`.

    If there is no folder for the split, `root/images` and `root/labels` are used: split "all" is all of them, "train"
    the first four fifths by name and "val" the rest (by name, so that the frames of a video stay together). If only
    one of "train" and "val" has a folder, all of `root/images` belong to the other.

    Args:
        class_names: K names; None: those of `root/classes.txt` (see `read_classes`), else "class 0", "class 1", ...
        num_classes: K; None: the number of class names, else the largest class in the labels of all splits plus one.
        palette: uint8 [K + 1, 3], void last, to decode colour labels and to show classes; None: the colours in
            `root/classes.txt`, else PASCAL VOC's (which are not used to decode).
        values, void: the meaning of the values in label files, see `LabelReader`.

    Raises:
        FileNotFoundError: a folder or a file is missing. ValueError: sizes differ, or options contradict each other.
    """
    root = Path(root)
    base, items = find_split(root, split)
    pairs = pair_files(base / "images", base / "labels", "folder")
    check_sizes(pairs)
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"folder: num_classes={num_classes}; expected at least one")
    if class_names is None and num_classes is None and (root / "classes.txt").is_file():
        class_names, colours = read_classes(root / "classes.txt")
        palette = colours if palette is None else palette
    if palette is not None:
        palette = np.asarray(palette, np.uint8)
        num_classes = num_classes or len(palette) - 1
    reader = LabelReader(palette, values, void)
    if class_names is None:
        class_names = [f"class {index}" for index in range(num_classes or count_classes(root, reader))]
    elif num_classes not in (None, len(class_names)):
        raise ValueError(f"folder: {len(class_names)} class names for num_classes={num_classes}; expected as many")
    dataset = SegmentationDataset(
        LabelledFiles(pairs, reader),
        name="folder",
        split=split,
        names=[image.stem for image, _ in pairs],
        class_names=class_names,
        palette=voc_palette(len(class_names)) if palette is None else palette,
        **options,
    )
    return dataset.subset(range(len(pairs))[items])


def find_split(root: Path, split: str) -> tuple[Path, slice]:
    """The folder that contains images/ and labels/ of a split, and which of the files belong to it."""
    if not root.is_dir():
        raise FileNotFoundError(f"folder: {root} is not a folder; expected one with images/ and labels/ in it")
    if (root / split).is_dir():
        return root / split, slice(None)
    if other := [name for name in OTHER_NAMES.get(split, ()) if (root / name).is_dir()]:
        raise FileNotFoundError(f"folder: {root} has no folder {split!r} but {other[0]!r}; rename it to {split!r}")
    if split not in ("all", "train", "val"):
        raise FileNotFoundError(
            f"folder: {root} has no folder {split!r}; without it, the splits are train, val and all"
        )
    if not (root / "images").is_dir() and (found := [name for name in SPLITS if (root / name).is_dir()]):
        raise FileNotFoundError(f"folder: {root} has no folder {split!r}; it has {', '.join(found)}")
    if split == "all" or (root / {"train": "val", "val": "train"}[split]).is_dir():
        return root, slice(None)
    count = len(pair_files(root / "images", root / "labels", "folder"))
    if count < 2:
        raise ValueError(f"folder: {root / 'images'} contains one image; train and val need at least two")
    cut = min(max(1, round(0.8 * count)), count - 1)
    return root, slice(cut) if split == "train" else slice(cut, None)


def split_names(root: Path) -> list[str]:
    """The splits of a root: its folders train, val and test, and the one that is in root/images (see `load`)."""
    folders = [name for name in SPLITS if (root / name).is_dir()]
    missing = [name for name in ("train", "val") if name not in folders]
    if not folders or (missing and (root / "images").is_dir()):
        folders += missing if len(missing) == 1 else ["all"]
    return sorted(folders, key=("all", *SPLITS).index)


def check_sizes(pairs: Sequence[tuple[Path, Path]]) -> None:
    """ValueError for the first label whose size differs from its image's, from the headers of the files."""
    for image, label in pairs:
        (height, width), found = image_size(image), image_size(label)
        if found != (height, width):
            raw = found == (width, height)
            rotated = "; it seems to be rotated, as the stored pixels of a photo with an EXIF orientation are"
            raise ValueError(
                f"folder: {image} is {height}x{width} but its label {label} is {found[0]}x{found[1]} (height x width)"
                f"{rotated if raw else ''}"
            )


def count_classes(root: Path, reader: LabelReader) -> int:
    """The largest class in the labels of all splits plus one."""
    largest = -1
    for folder in (root / "labels", *(root / split / "labels" for split in SPLITS)):
        for path in list_files(folder, LABEL_SUFFIXES) if folder.is_dir() else ():
            classes = reader(path)
            largest = max(largest, int(classes[classes != VOID].max()) if (classes != VOID).any() else -1)
    if largest < 0:
        raise ValueError(f"folder: every label in {root} is void; give num_classes= or classes.txt")
    return largest + 1
