"""Data sets of pairs (image, label), their augmentation and their colours.

train = load("scenes", "train", transform=Augment())
image, label = train[0]          # float32 [3, H, W] in [0, 1]; int64 [H, W], 255 = void
"""

from . import camvid, scenes, voc
from .dataset import SegmentationDataset, hold_out
from .images import VOID, read_image, read_label
from .palettes import colorize, voc_palette
from .transforms import Augment

__all__ = ["VOID", "Augment", "SegmentationDataset", "colorize", "hold_out", "load", "read_image", "read_label"]
__all__ += ["voc_palette"]

NAMES = ("scenes", "camvid", "voc2012", "folder")


def load(name: str, split: str, root="data", *, download=False, size=None, transform=None, **options):
    """Load a split of a data set.

    Args:
        name: scenes, camvid, voc2012 or folder.
        split: train, val or test.
        root: folder of the files; data/README.md describes the layout of each data set.
        download: fetch camvid or voc2012 if it is missing.
        size: (H, W) in px to which items are resized; None: as stored (scenes: drawn at 64x96).
        transform: function (image, label) -> (image, label), for example `Augment()`.
        options: `cache` (keep decoded items in memory) for every set; `length`, `seed` for scenes; `sbd` for voc2012
            (add SBD's labels to train); those of `pwlib.annotations.folder.load` for folder.

    Raises:
        ValueError: unknown name or split. FileNotFoundError: missing files. TypeError: unknown option.
    """
    options |= {"size": size, "transform": transform}
    if name == "scenes":
        return scenes.load(split, **options)
    if name == "folder":
        from pwlib.annotations import folder  # it imports this package

        return folder.load(root, split, **options)
    if name in ("camvid", "voc2012"):
        return (camvid if name == "camvid" else voc).load(root, split, download=download, **options)
    raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
