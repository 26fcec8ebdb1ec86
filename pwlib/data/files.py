"""Folders of images and labels, paired by stem (the file name without its suffix)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .images import IMAGE_SUFFIXES, LABEL_SUFFIXES, read_image_uint8


@dataclass
class LabelledFiles:
    """Reads pair i: image uint8 [3, H, W] and label uint8 [H, W]; `read` is the function that reads a label file."""

    pairs: list[tuple[Path, Path]]
    read: Callable[[Path], torch.Tensor]

    def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.pairs[index]
        return read_image_uint8(image), self.read(label)


def list_files(folder, suffixes: Iterable[str]) -> list[Path]:
    """The files of a folder with one of the suffixes, in any case, sorted by name.

    Hidden files and the resource forks of macOS (`._name.png`) are left out, and folders (`__MACOSX`) are not entered.
    """
    paths = sorted(Path(folder).iterdir())
    return [p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()]


def pair_files(image_folder: Path, label_folder: Path, name: str) -> list[tuple[Path, Path]]:
    """Find the pairs of an image and a label of the same stem, in the order of the stems.

    FileNotFoundError if a folder is missing or empty, or if an image has no label or a label no image.
    """
    images = by_stem(image_folder, "images", name, IMAGE_SUFFIXES)
    labels = by_stem(label_folder, "label maps", name, LABEL_SUFFIXES)
    for stem in sorted(images.keys() ^ labels.keys()):
        if stem in labels:
            raise FileNotFoundError(f"{name}: {labels[stem]} has no image {image_folder / stem}.*")
        jpeg = list_files(label_folder, (".jpg", ".jpeg"))
        remedy = "; JPEG changes the values of labels: save them as PNG" if jpeg else ""
        raise FileNotFoundError(f"{name}: {images[stem]} has no label {label_folder / stem}.png{remedy}")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def by_stem(folder: Path, what: str, name: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: {folder} is not a folder; expected the {what} there")
    files: dict[str, Path] = {}
    for path in list_files(folder, suffixes):
        if files.setdefault(path.stem, path) != path:
            raise ValueError(f"{name}: {files[path.stem]} and {path} have the same stem; expected one file per stem")
    if not files:
        found = ", ".join(sorted({path.suffix for path in folder.iterdir() if path.suffix})) or "nothing"
        raise FileNotFoundError(f"{name}: {folder} contains no {what}; expected {', '.join(suffixes)}; found {found}")
    return files
