"""The data set class, and how a part of a data set is held out."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import VOID, check_size, resize_image, resize_label


@dataclass(eq=False, repr=False)
class SegmentationDataset(Dataset):
    """Pairs of an image, float32 RGB [3, H, W] in [0, 1], and its label, int64 [H, W] (255 = void)."""

    read: Callable  # i -> (image uint8 [3, H, W], label uint8 [H, W], 255 = void); picklable, for workers
    _: KW_ONLY
    name: str
    split: str
    names: Sequence[str]  # one per item
    class_names: Sequence[str]
    palette: np.ndarray  # uint8 [K + 1, 3], the last row for void
    groups: Sequence[str] | None = None  # the drive or sequence of each item; None: every item is a group
    size: tuple[int, int] | None = None  # (H, W) in px; images are resized bilinearly, labels to the nearest pixel
    transform: Callable | None = None  # (image, label) -> (image, label), applied last
    cache: bool = False  # keep decoded and resized items in memory (4 bytes per pixel), separately in each worker

    def __post_init__(self):
        self.names, self.class_names = list(self.names), tuple(self.class_names)
        self.groups = list(self.names if self.groups is None else self.groups)
        self.palette = np.asarray(self.palette, np.uint8)
        if self.palette.shape != (self.num_classes + 1, 3):
            expected = f"[{self.num_classes + 1}, 3], one row per class and one for void"
            raise ValueError(f"{self.name}: the palette has shape {list(self.palette.shape)}; expected {expected}")
        self.size = None if self.size is None else check_size(self.size, self.name)
        self._indices = range(len(self.names))
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"SegmentationDataset({self.name!r}, {self.split!r}: {len(self)} items, {self.num_classes} classes)"

    def _load(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read an item, check it and resize it; uint8."""
        source = self._indices[index]
        if source in self._cache:
            return self._cache[source]
        image, label = self.read(source)
        where = f"{self.name} {self.split}, item {self.names[index]!r}"
        if image.shape[-2:] != label.shape:
            sizes = "{}x{} but its label is {}x{}".format(*image.shape[-2:], *label.shape)
            raise ValueError(f"{where}: the image is {sizes} (height x width)")
        if len(wrong := label[(label >= self.num_classes) & (label != VOID)]):
            expected = f"the {self.num_classes} classes (expected 0..{self.num_classes - 1}, or {VOID} for void)"
            raise ValueError(f"{where}: label value {int(wrong[0])} is outside {expected}")
        if self.size not in (None, tuple(label.shape)):
            image, label = resize_image(image, self.size), resize_label(label, self.size)
        if self.cache:
            self._cache[source] = image, label
        return image, label

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self._load(index)
        image, label = image.float() / 255, label.long()
        if self.transform is None:
            return image, label
        from torchvision import tv_tensors  # imported when used, as elsewhere: it takes as long as importing torch

        # torchvision's v2 transforms move the label together with the image only if they know which is which.
        image, label = self.transform(tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    def check(self) -> None:
        """Read every item once; ValueError for the first broken one."""
        for index in range(len(self)):
            self._load(index)

    def pixel_counts(self) -> torch.Tensor:
        """Count the pixels of each class over all labels, before any transform: int64 [K + 1], void last."""
        counts = torch.zeros(256, dtype=torch.int64)
        for index in range(len(self)):
            counts += self._load(index)[1].flatten().bincount(minlength=256)
        return counts[[*range(self.num_classes), VOID]]

    def with_transform(self, transform: Callable | None) -> "SegmentationDataset":
        """The same items with another transform, or None."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def subset(self, indices: Sequence[int]) -> "SegmentationDataset":
        """The items at `indices`, in that order; the cache is shared."""
        other = copy.copy(self)
        chosen = [int(i) for i in indices]
        other._indices = [self._indices[i] for i in chosen]
        other.names = [self.names[i] for i in chosen]
        other.groups = [self.groups[i] for i in chosen]
        return other


def hold_out(
    dataset: SegmentationDataset, fraction: float = 0.25, split: int = 0
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Split into (fit, held), with about `fraction` of the items in held and none in both.

    The split depends on names, groups and these arguments, and not on the seed of a training run: runs with different
    seeds hold out the same images. Neighbouring frames of a video are almost the same image, so whole groups are held
    out. Of four groups or more these are the first ones in a random order, which `split` numbers. Of two or three it is
    the group whose size comes closest (of CamVid's train split drive 0006R0, 101 of 367 frames). A single group is cut:
    its last frames are held out.

    ValueError if `fraction` is not between 0 and 1, or if one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hold_out: fraction {fraction} is not between 0 and 1")
    if len(dataset) < 2:
        raise ValueError(f"hold_out: {dataset!r} has too few items to hold any out; expected at least two")
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(dataset)), key=dataset.names.__getitem__):
        members.setdefault(dataset.groups[index], []).append(index)
    groups, wanted = list(members.values()), max(fraction * len(dataset), 1)
    held: list[int] = []
    if len(groups) >= 4:
        for which in torch.randperm(len(groups), generator=torch.Generator().manual_seed(split)).tolist():
            # Take a group if the count gets closer to the wanted one, and something is left to fit.
            if len(held) + len(groups[which]) / 2 <= wanted and len(held) + len(groups[which]) < len(dataset):
                held += groups[which]
        held = held or min(groups, key=len)
    elif len(groups) > 1:
        held = min(groups, key=lambda group: abs(len(group) - wanted))
    else:
        held = groups[0][len(dataset) - min(round(wanted), len(dataset) - 1) :]
    return dataset.subset(sorted({*range(len(dataset))} - {*held})), dataset.subset(sorted(held))
