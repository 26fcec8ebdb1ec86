"""The one data set class, and how a part of it is held out."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import VOID, check_size, resize_image, resize_label


class SegmentationDataset(Dataset):
    """Pairs of image and label, whatever they come from.

    `dataset[i]` -> (image float32 RGB [3, H, W] in [0, 1], label int64 [H, W], 255 = void).

    read         i -> (image uint8 [3, H, W], label uint8 [H, W] with 255 = void); picklable, for workers
    names        one name an item; class_names: one a class; palette: uint8 [K+1, 3], the last row for void
    groups       the drive, sequence or scene an item belongs to; by default each item is its own
    size         (H, W): resize as loaded, the image bilinear with antialiasing, the label to its nearest
    transform    (image, label) -> (image, label), applied last
    cache        keep decoded and resized items in memory (4 bytes a pixel), in each worker its own
    """

    def __init__(
        self,
        read: Callable,
        *,
        name: str,
        split: str,
        names: Sequence[str],
        class_names: Sequence[str],
        palette,
        groups: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        transform: Callable | None = None,
        cache: bool = False,
    ):
        self.name, self.split = name, split
        self.class_names = tuple(class_names)
        self.palette = np.asarray(palette, np.uint8)
        if self.palette.shape != (self.num_classes + 1, 3):
            raise ValueError(
                f"{name}: a palette of shape {list(self.palette.shape)}; expected [{self.num_classes + 1}, 3], "
                f"a row for each of the {self.num_classes} classes and one for void"
            )
        self.names = list(names)
        self.groups = list(groups) if groups is not None else list(names)
        self.size = None if size is None else check_size(size, name)
        self.transform = transform
        self._read = read
        self._indices = range(len(self.names))
        self._cache: dict | None = {} if cache else None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"SegmentationDataset({self.name!r}, {self.split!r}: {len(self)} items, {self.num_classes} classes)"

    def _load(self, source: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Item `source` of what is read, as uint8, checked and resized."""
        if self._cache is not None and source in self._cache:
            return self._cache[source]
        image, label = self._read(source)
        where = f"{self.name} {self.split}, item {self.names[list(self._indices).index(source)]!r}"
        if image.shape[-2:] != label.shape:
            raise ValueError(f"{where}: the image is {_by(image)} but its label is {_by(label)} (height x width)")
        wrong = label[(label >= self.num_classes) & (label != VOID)]
        if len(wrong):
            raise ValueError(
                f"{where}: label value {int(wrong[0])} is outside the {self.num_classes} classes "
                f"(expected 0..{self.num_classes - 1}, or {VOID} for void)"
            )
        if self.size not in (None, tuple(label.shape)):
            image, label = resize_image(image, self.size), resize_label(label, self.size)
        if self._cache is not None:
            self._cache[source] = image, label
        return image, label

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self._load(self._indices[index])
        image, label = image.float() / 255, label.long()
        return (image, label) if self.transform is None else self.transform(image, label)

    def check(self) -> None:
        """Read every item once; the first that is broken raises its ValueError."""
        for source in self._indices:
            self._load(source)

    def pixel_counts(self) -> torch.Tensor:
        """Count the pixels of each class over all labels, before any transform: int64 [K + 1], void last."""
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64)
        for source in self._indices:
            label = self._load(source)[1].long()
            counts += label.masked_fill(label == VOID, self.num_classes).flatten().bincount(minlength=len(counts))
        return counts

    def with_transform(self, transform: Callable | None) -> "SegmentationDataset":
        """The same items under another transform (None: none)."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def subset(self, indices: Sequence[int]) -> "SegmentationDataset":
        """The items at `indices`, in that order, with all else kept (and the cache shared)."""
        other = copy.copy(self)
        chosen = [int(i) for i in indices]
        other._indices = [self._indices[i] for i in chosen]
        other.names = [self.names[i] for i in chosen]
        other.groups = [self.groups[i] for i in chosen]
        return other


def _by(tensor: torch.Tensor) -> str:
    return f"{tensor.shape[-2]}x{tensor.shape[-1]}"


def hold_out(
    dataset: SegmentationDataset, fraction: float = 0.25, seed: int = 0
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Split into (fit, held), about `fraction` of the items held; no item is in both.

    Neighbouring frames of a video are nearly one image, so frames of one sequence must not be dealt to both sides at
    random. With four groups or more, whole groups are held. With fewer (CamVid's train split is three drives of 62, 101
    and 204 frames), holding a drive would take all of one light or one district away from training: instead each drive
    gives a run of consecutive frames at one of its ends (the seed says which), so it is cut in one place only.

    ValueError if `fraction` is not between 0 and 1 or one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hold_out: fraction {fraction} is not between 0 and 1")
    if len(dataset) < 2:
        raise ValueError(f"hold_out: {dataset!r} has too few items to hold any out; expected two at least")
    generator = torch.Generator().manual_seed(seed)
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(dataset)), key=dataset.names.__getitem__):
        members.setdefault(dataset.groups[index], []).append(index)
    groups = list(members.values())
    held: list[int] = []
    if len(groups) >= 4:
        wanted = max(fraction * len(dataset), 1)
        for which in torch.randperm(len(groups), generator=generator).tolist():
            # Take a group if that brings the count nearer to what is wanted, and something is left to fit.
            if len(held) + len(groups[which]) / 2 <= wanted and len(held) + len(groups[which]) < len(dataset):
                held += groups[which]
        if not held:
            held = min(groups, key=len)
    else:
        for group in groups:
            count = min(round(fraction * len(group)), len(group) - 1)
            if len(groups) == 1:
                count = max(count, 1)
            at_start = bool(torch.rand((), generator=generator) < 0.5)
            held += group[:count] if at_start else group[len(group) - count :]
        if not held:
            held = [max(groups, key=len)[-1]]
    inside = set(held)
    return dataset.subset([i for i in range(len(dataset)) if i not in inside]), dataset.subset(sorted(inside))
