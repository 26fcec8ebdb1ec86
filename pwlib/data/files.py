"""Folders of images and labels, paired by stem."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .images import IMAGE_SUFFIXES, read_image_uint8, read_label


@dataclass
class LabelledFiles:
    """Reads pair i: (image uint8 [3, H, W], label uint8 [H, W]), the label's values passed through `to_classes`."""

    images: list[Path]
    labels: list[Path]
    to_classes: Callable[[torch.Tensor], torch.Tensor] | None = None
    palette: np.ndarray | None = None

    def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = read_label(self.labels[index], self.palette)
        return read_image_uint8(self.images[index]), label if self.to_classes is None else self.to_classes(label)


def _by_stem(folder: Path, what: str, name: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: {folder} is not a folder; expected the {what} there")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise ValueError(f"{name}: {files[path.stem]} and {path} have one stem; expected one file each")
        files[path.stem] = path
    if not files:
        raise FileNotFoundError(f"{name}: {folder} holds no {what} (looked for {', '.join(suffixes)})")
    return files


def pair_files(image_folder, label_folder, name: str) -> tuple[list[Path], list[Path]]:
    """Images and label PNGs of the same stem, in the order of the stems.

    FileNotFoundError if a folder is missing or empty, or an image lacks its label or a label its image.
    """
    image_folder, label_folder = Path(image_folder), Path(label_folder)
    images = _by_stem(image_folder, "images", name, IMAGE_SUFFIXES)
    labels = _by_stem(label_folder, "label maps", name, (".png",))
    for stem in sorted(images.keys() ^ labels.keys()):
        have, lack = (
            (images[stem], f"label {label_folder / stem}.png")
            if stem in images
            else (labels[stem], f"image {image_folder / stem}.*")
        )
        raise FileNotFoundError(f"{name}: {have} has no {lack}")
    stems = sorted(images)
    return [images[stem] for stem in stems], [labels[stem] for stem in stems]
