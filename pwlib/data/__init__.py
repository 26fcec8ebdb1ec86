"""Data sets as pairs (image, label), their augmentation and their colours.

train = load("scenes", "train", transform=Augment())
image, label = train[0]          # float32 [3, H, W] in [0, 1]; int64 [H, W], 255 = void
"""

from . import camvid, folder, scenes, voc
from .dataset import SegmentationDataset, hold_out
from .images import VOID, read_image, read_label
from .palettes import colorize, voc_palette
from .transforms import Augment

__all__ = [
    "VOID",
    "Augment",
    "SegmentationDataset",
    "colorize",
    "hold_out",
    "load",
    "read_image",
    "read_label",
    "voc_palette",
]

NAMES = ("scenes", "camvid", "voc2012", "folder")


def load(
    name: str, split: str, root="data", *, download: bool = False, size=None, transform=None, **options
) -> SegmentationDataset:
    """A split of a data set.

    name        scenes, camvid, voc2012 or folder
    split       train, val or test
    root        where the files lie; see data/README.md for each layout
    download    fetch camvid or voc2012 if it is not there
    size        (H, W): resize as loaded; by default as stored (scenes: 64x96)
    transform   (image, label) -> (image, label), for example `Augment()`
    options     every set: cache= (keep decoded items in memory). scenes: length=, seed=. voc2012: sbd=True adds SBD's
                labels to train. folder: class_names=, num_classes=, palette=.

    ValueError for a name or split that is not known, FileNotFoundError for what is missing, TypeError for an option
    that the set does not have.
    """
    options |= {"size": size, "transform": transform}
    if name == "scenes":
        return scenes.load(split, **options)
    if name == "camvid":
        return camvid.load(root, split, download=download, **options)
    if name == "voc2012":
        return voc.load(root, split, download=download, **options)
    if name == "folder":
        return folder.load(root, split, **options)
    raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
