"""PASCAL VOC 2012 (Everingham et al., 2015) through torchvision, with SBD's labels (Hariharan et al., 2011)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import SBDataset, VOCSegmentation

from .dataset import SegmentationDataset
from .images import read_image_uint8, read_label
from .palettes import voc_palette

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval")


@dataclass
class _Files:
    """VOC's label PNGs, and SBD's MATLAB files."""

    images: list[str]
    labels: list[str]

    def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.labels[index]
        label = _read_sbd(path) if path.endswith(".mat") else read_label(path)
        return read_image_uint8(self.images[index]), label


def _read_sbd(path: str) -> torch.Tensor:
    from scipy.io import loadmat  # in the extra "voc": no other set needs it

    try:
        return torch.from_numpy(np.array(loadmat(path)["GTcls"][0]["Segmentation"][0], np.uint8))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as an SBD label file ({error})") from error


def load(root, split: str, *, download: bool = False, sbd: bool = False, **options) -> SegmentationDataset:
    """Split train (1464 images), val (1449) or trainval, from `root/VOCdevkit/VOC2012`; download=True fetches 2 GB.

    sbd=True adds to train every image that SBD labels (`root/sbd`) and VOC's train and val do not: 10582 in all, the
    "train_aug" of the literature. Where both label an image, VOC's finer label counts.
    """
    if split not in SPLITS:
        raise ValueError(
            f"voc2012: unknown split {split!r}; expected one of {', '.join(SPLITS)} (test labels are not public)"
        )
    if sbd and split != "train":
        raise ValueError(f"voc2012: sbd=True adds training labels; expected split 'train', got {split!r}")
    root = Path(root)
    voc = _voc(root, split, download)
    images, labels = list(voc.images), list(voc.masks)
    if sbd:
        taken = {Path(path).stem for path in [*images, *_voc(root, "val", False).images]}
        for part in _sbd(root / "sbd", download):
            for image, label in zip(part.images, part.masks, strict=True):
                if Path(image).stem not in taken:
                    images.append(image)
                    labels.append(label)
    for path in [*images, *labels]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"voc2012: {path} is listed in the split but is not there")
    return SegmentationDataset(
        _Files(images, labels),
        name="voc2012",
        split=split,
        names=[Path(path).stem for path in images],
        class_names=CLASS_NAMES,
        palette=voc_palette(len(CLASS_NAMES)),
        **options,
    )


def _voc(root: Path, split: str, download: bool) -> VOCSegmentation:
    there = root / "VOCdevkit" / "VOC2012"
    try:
        return VOCSegmentation(str(root), year="2012", image_set=split, download=download and not there.is_dir())
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"voc2012: {there} is missing or not whole ({error}); give root= the folder that holds VOCdevkit/, "
            "or download=True to fetch it (2 GB)"
        ) from error


def _sbd(root: Path, download: bool) -> list[SBDataset]:
    """SBD's own train and val. (Its val has VOC train images and the reverse: what counts is taken out by name.)"""
    try:
        first = SBDataset(str(root), image_set="train", mode="segmentation", download=download and not root.is_dir())
        return [first, SBDataset(str(root), image_set="val", mode="segmentation")]
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"voc2012: {root} is not SBD ({error}); expected img/, cls/, train.txt and val.txt there, "
            "or download=True to fetch it (1.4 GB)"
        ) from error
