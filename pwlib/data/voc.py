"""PASCAL VOC 2012 (Everingham et al., 2015) through torchvision, with the labels of SBD (Hariharan et al., 2011)."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .dataset import SegmentationDataset
from .files import LabelledFiles
from .images import read_label
from .palettes import voc_palette

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval")


def read(path: Path) -> torch.Tensor:
    """Read a label map uint8 [H, W]: a PNG of VOC, or a MATLAB file of SBD."""
    if path.suffix != ".mat":
        return read_label(path)
    from scipy.io import loadmat  # from the optional extra "voc"

    try:
        return torch.from_numpy(np.array(loadmat(path)["GTcls"][0]["Segmentation"][0], np.uint8))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as an SBD label file ({error})") from error


def load(root, split: str, *, download: bool = False, sbd: bool = False, **options) -> SegmentationDataset:
    """Load a split: train (1464 images), val (1449) or trainval, from `root/VOCdevkit/VOC2012`.

    Args:
        download: fetch what is missing (VOC 2 GB, SBD 1.4 GB).
        sbd: add to train the images that SBD labels (`root/sbd`) and that are in neither train nor val of VOC: 10582 in
            all, "train_aug" in the literature. If both label an image, VOC's finer label is used.
    """
    if split not in SPLITS:
        raise ValueError(f"voc2012: unknown split {split!r}; expected {', '.join(SPLITS)} (test labels are not public)")
    if sbd and split != "train":
        raise ValueError(f"voc2012: sbd=True adds training labels; expected split 'train', got {split!r}")
    root = Path(root)
    parts = [_voc(root, split, download), *(_sbd(root / "sbd", download) if sbd else [])]
    pairs = [(Path(image), Path(label)) for part in parts for image, label in zip(part.images, part.masks, strict=True)]
    if sbd:
        count = len(parts[0].images)
        taken = {Path(path).stem for path in [*parts[0].images, *_voc(root, "val", False).images]}
        pairs = pairs[:count] + [pair for pair in pairs[count:] if pair[0].stem not in taken]
    if missing := [path for pair in pairs for path in pair if not path.is_file()]:
        raise FileNotFoundError(f"voc2012: {missing[0]} is listed in the split but is missing")
    return SegmentationDataset(
        LabelledFiles(pairs, read),
        name="voc2012",
        split=split,
        names=[image.stem for image, _ in pairs],
        class_names=CLASS_NAMES,
        palette=voc_palette(len(CLASS_NAMES)),
        **options,
    )


def _voc(root: Path, split: str, download: bool) -> Dataset:
    from torchvision.datasets import VOCSegmentation

    there = root / "VOCdevkit" / "VOC2012"
    with _missing(there, "give root= the folder that contains VOCdevkit/, or download=True (--download): 2 GB"):
        return VOCSegmentation(str(root), year="2012", image_set=split, download=download and not there.is_dir())


def _sbd(root: Path, download: bool) -> list[Dataset]:
    """Both parts of SBD. They overlap with either split of VOC, so the caller removes images by name."""
    from torchvision.datasets import SBDataset

    with _missing(root, "expected img/, cls/, train.txt and val.txt there, or download=True to fetch SBD (1.4 GB)"):
        first = SBDataset(str(root), image_set="train", mode="segmentation", download=download and not root.is_dir())
        return [first, SBDataset(str(root), image_set="val", mode="segmentation")]


@contextmanager
def _missing(path: Path, remedy: str):
    """Turn torchvision's errors for missing files into one sentence with a remedy."""
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(f"voc2012: {path} is missing or incomplete ({error}); {remedy}") from error
