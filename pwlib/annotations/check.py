"""Check the files of a "folder" data set: find labels that cannot be trained on, and count its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pwlib.annotations.classes import LabelReader, read_classes
from pwlib.annotations.folder import find_split, split_names
from pwlib.data import VOID, read_image
from pwlib.data.files import by_stem
from pwlib.data.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, ORIENTATION, image_size, read_label_values
from pwlib.data.palettes import voc_palette


@dataclass
class Report:
    """What was found in a data set.

    Attributes:
        errors, warnings: (file or split, sentence).
        class_names: K names; palette: uint8 [K + 1, 3], void last.
        pixels: {split: int64 [K + 1], pixels per class, void last}. images: {split: int64 [K], images with the class}.
        sizes: {split: {(H, W): number of images}}.
        files: the pairs of image and label without an error. reader: what read the labels.
    """

    errors: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    palette: np.ndarray = field(default_factory=lambda: voc_palette(0))
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, Counter] = field(default_factory=dict)
    files: list[tuple[Path, Path]] = field(default_factory=list)
    reader: LabelReader = field(default_factory=LabelReader)

    def raise_errors(self, root: Path) -> None:
        """ValueError with the first error, if there is one."""
        if self.errors:
            place, text = self.errors[0]
            more = f" (and {len(self.errors) - 1} more: python -m pwlib labels {root})" if len(self.errors) > 1 else ""
            raise ValueError(f"{place}: {text}{more}")

    def __str__(self) -> str:
        lines = []
        for split, sizes in self.sizes.items():
            common = ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes.most_common(3))
            more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
            lines.append(f"{split}: {sum(sizes.values())} images, {common}{more}")
        width = max([5, *map(len, self.class_names)])
        lines.append(f"\n{'class':{width}}" + "".join(f" {split + ' %':>9} {'images':>7}" for split in self.pixels))
        for k, name in enumerate((*self.class_names, "void")):
            cells = ""
            for split, counts in self.pixels.items():
                share = 100 * counts[k] / max(counts.sum(), 1)
                cells += f" {share:9.2f} {self.images[split][k] if k < len(self.class_names) else '':>7}"
            lines.append(f"{name:{width}}{cells}")
        for kind, problems in (("error", self.errors), ("warning", self.warnings)):
            lines += [""] * bool(problems) + [f"{kind}: {place}: {text}" for place, text in problems]
        return "\n".join(lines) + ("" if self.errors or self.warnings else "\n\nno problems found")


def check_folder(
    root: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    palette: np.ndarray | None = None,
    values: Mapping[int, int] | None = None,
    void: int | None = VOID,
    decode_images: bool = False,
) -> Report:
    """Read every label of a "folder" data set once, and report what prevents or endangers training.

    Args:
        class_names, palette, values, void: as in `pwlib.annotations.folder.load`.
        decode_images: also decode every image completely, not only its header.

    Raises:
        FileNotFoundError, ValueError: the folders cannot be paired, or classes.txt cannot be read.
    """
    root = Path(root)
    if class_names is None and (root / "classes.txt").is_file():
        class_names, colours = read_classes(root / "classes.txt")
        palette = colours if palette is None else palette
    report, stored, found = Report(reader=LabelReader(palette, values, void)), set(), {}
    splits = split_names(root)
    for split in splits:
        base, _ = find_split(root, split)
        report.sizes[split], found[split] = Counter(), []
        images = by_stem(base / "images", "images", "folder", IMAGE_SUFFIXES)
        labels = by_stem(base / "labels", "label maps", "folder", LABEL_SUFFIXES)
        for stem in sorted(images.keys() ^ labels.keys()):
            path, missing = (images[stem], "label") if stem in images else (labels[stem], "image")
            report.errors.append((str(path), f"there is no {missing} of this name"))
        for image, label in ((images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())):
            try:
                classes, raw = _check_pair(image, label, report, split, decode_images)
            except ValueError as error:
                report.errors.append((str(label), str(error).removeprefix(f"{label}: ")))
                continue
            found[split].append((label, np.bincount(classes.reshape(-1), minlength=256)))
            stored |= raw
            report.files.append((image, label))
    occurring = sorted({k for rows in found.values() for _, row in rows for k in np.flatnonzero(row).tolist()} - {VOID})
    named = class_names is not None or palette is not None
    count = (
        len(class_names) if class_names is not None else len(palette) - 1 if named else max(occurring, default=0) + 1
    )
    report.class_names = tuple(class_names or (f"class {k}" for k in range(count)))
    report.palette = voc_palette(count) if palette is None else np.asarray(palette)
    for split, rows in found.items():
        table = np.array([row for _, row in rows], np.int64).reshape(-1, 256)  # [images, 256]
        report.pixels[split] = np.append(table[:, :count].sum(0), table[:, VOID].sum())
        report.images[split] = (table[:, :count] > 0).sum(0)
        for label, row in rows:
            if row[count:VOID].any():
                wrong = count + int(np.flatnonzero(row[count:VOID])[0])
                report.errors.append((str(label), f"value {wrong} is outside the {count} classes; {_hint(stored)}"))
            elif not row[:VOID].any():
                report.warnings.append((str(label), "every pixel is void"))
    _check_classes(report, occurring, stored, named, splits[0])
    return report


def _check_pair(image: Path, label: Path, report: Report, split: str, decode: bool):
    """Check an image and its label; return the classes [H, W] and the set of values in the file."""
    values, classes = read_classes_of(label, report.reader)
    size, orientation = image_size(image), image_orientation(image)
    if classes.shape != size:
        raw = "; it is rotated as the stored pixels of the photo, whose EXIF tag the label must follow"
        raise ValueError(
            f"{label}: the label is {classes.shape[0]}x{classes.shape[1]} and its image {image.name} "
            f"{size[0]}x{size[1]} (height x width){raw if orientation >= 5 and classes.shape == size[::-1] else ''}"
        )
    report.sizes[split][size] += 1
    if decode or orientation > 1:
        pixels = read_image(image)
        if (warning := _raw_orientation(pixels, classes, orientation)) is not None:
            report.warnings.append((str(label), warning))
    return classes, set(np.flatnonzero(np.bincount(values.ravel())).tolist()) if values.ndim == 2 else set()


def read_classes_of(label: Path, reader: LabelReader) -> tuple[np.ndarray, np.ndarray]:
    """The stored values of a label file, and its classes uint8 [H, W]; ValueError if its borders are smoothed."""
    values = read_label_values(label, reader.palette)
    if values.ndim == 2 and reader.values is None and _looks_blended(values):
        binary = {*np.argsort(np.bincount(values.ravel()))[-2:].tolist()} == {0, 255}
        raise ValueError(
            f"{label}: many values occur only in single pixels between other values, as anti-aliasing makes them; "
            f"export the mask without smoothing{', or map ranges with --values 0-127=0,128-255=1' if binary else ''}"
        )
    try:
        return values, reader.classes(values, label)
    except ValueError as error:
        if not _looks_blended(values if values.ndim == 2 else values[..., :3].astype(np.int64) @ (65536, 256, 1)):
            raise
        ranges = ", or map ranges of values, like 0-127=0,128-255=1" if values.ndim == 2 else ""
        raise ValueError(f"{error}; export the mask without smoothing (anti-aliasing){ranges}") from None


def _check_classes(report: Report, occurring: list[int], stored: set[int], named: bool, first: str) -> None:
    """Add the problems that concern the whole data set: classes that never occur, and masks that look binary."""
    count = len(report.class_names)
    if report.errors:
        return
    if (text := classes_error(occurring, count, stored, named=named)) is not None:
        report.errors.append(("labels", text))
        return
    absent = []  # one line for all: most of COCO's 80 categories may be
    for k, name in enumerate(report.class_names):
        splits = [split for split, images in report.images.items() if images[k]]
        if not splits:
            absent.append(f"{name} (class {k})")
        elif first not in splits:
            report.warnings.append(("labels", f"{name} (class {k}) occurs in {splits[0]} but not in {first}"))
    if absent:
        report.warnings.append(("labels", f"no pixel of {', '.join(absent)}"))


def classes_error(occurring: Sequence[int], count: int, stored: set[int], *, named: bool) -> str | None:
    """What is wrong if of `count` classes only these occur, in files with the values `stored`; None: nothing."""
    if len(occurring) < 2:
        what = f"only class {occurring[0]} occurs" if occurring else "no class occurs"
        return f"{what}, so there is nothing to learn; {_hint(stored)}"
    if not named and len(occurring) < count / 2:
        return f"{count - len(occurring)} of {count} classes never occur; {_hint(stored)} or list them in classes.txt"
    return None


def _hint(stored: set[int]) -> str:
    """Suggest a mapping of the values that occur in the label files."""
    values = sorted(stored)
    if len(values) > 12:
        return "expected class numbers; map other values with --values"
    binary = " (a black-and-white mask? 255 is void unless it is mapped)" if values == [0, VOID] else ""
    pairs = ",".join(f"{v}={'void' if v == VOID and not binary else k}" for k, v in enumerate(values))
    return f"the files contain the values {', '.join(map(str, values))}{binary}; map them with --values {pairs}"


def _looks_blended(values: np.ndarray) -> bool:
    """Whether five or more rare values [H, W] occur mostly in isolated pixels, as anti-aliasing makes them."""
    if values.max(initial=0) >= 2**16:  # colours: number them
        values = np.unique(values, return_inverse=True)[1].reshape(values.shape)
    counts = np.bincount(values.ravel())
    rare = (counts > 0) & (counts < 0.01 * values.size + 1)
    if rare.sum() < 5:
        return False
    isolated = np.ones(values.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = values[one] != values[other]
        isolated[one] &= differ
        isolated[other] &= differ
    alone = np.bincount(values[isolated], minlength=len(counts))  # isolated pixels per value
    return (alone[rare] > 0.5 * counts[rare]).sum() >= 5 and isolated.mean() < 0.3


def image_orientation(image: Path) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 means upright."""
    with Image.open(image) as picture:
        return picture.getexif().get(ORIENTATION, 1)


def rotated(label: np.ndarray, orientation: int) -> np.ndarray:
    """The label of stored pixels, uint8 [H, W], rotated as the EXIF orientation of their photo says."""
    picture = Image.fromarray(label)
    picture.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


def _raw_orientation(pixels: torch.Tensor, classes: np.ndarray, orientation: int) -> str | None:
    """Compare the contrast at the borders of a label before and after the rotation in its photo's EXIF tag."""
    turned = rotated(classes, orientation)
    if turned.shape != classes.shape or (turned == classes).all():
        return None
    grey = pixels.mean(0).numpy()  # [H, W]
    contrast = np.zeros_like(grey)
    contrast[:, :-1] += np.abs(np.diff(grey, axis=1))
    contrast[:-1] += np.abs(np.diff(grey, axis=0))
    scores = []
    for label in (classes, turned):
        border = np.zeros(label.shape, bool)
        border[:, :-1] |= label[:, 1:] != label[:, :-1]
        border[:-1] |= label[1:] != label[:-1]
        scores.append(255 * float(contrast[border].mean()) if border.any() else 0.0)
    if scores[1] <= 1.25 * scores[0]:
        return None
    return (
        f"the borders fit the photo better after its EXIF rotation (mean contrast {scores[1]:.0f} instead of "
        f"{scores[0]:.0f} grey levels): the label seems to have the orientation of the stored pixels"
    )
