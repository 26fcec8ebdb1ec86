"""Data loaders whose order is a function of (seed, stage, epoch), in one process or in several."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from pwlib.losses import class_indices

Batches = Iterable[tuple[Tensor, Tensor]]


def process() -> tuple[int, int]:
    """(rank, number) of this process among those that train together: (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def wait() -> None:
    """Until every process is here."""
    if process()[1] > 1:
        torch.distributed.barrier()


def summed(values: Tensor) -> Tensor:
    """`values` added up over all processes."""
    if process()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def derive_seed(*parts: int) -> int:
    """One seed from several numbers; neighbours give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators start from `seed` inside and go on as if nothing had happened outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class EpochSampler(Sampler[int]):
    """Indices 0 .. length - 1, shuffled anew for every `seed` it is given, dealt to the processes in turn.

    Process r of n takes every n-th index from the r-th on, so that n processes with batches of b see, step by step, the
    images that one process sees with batches of n * b. With `even`, each process gets equally many (training steps in
    lockstep; up to n - 1 images sit out an epoch); without, nothing is left out or seen twice (evaluation).
    """

    def __init__(self, length: int, *, shuffle: bool, even: bool):
        self.length, self.shuffle, self.even, self.seed = length, shuffle, even, 0

    def _mine(self, order: Tensor) -> Tensor:
        rank, processes = process()
        if self.even:
            order = order[: self.length - self.length % processes]
        return order[rank::processes]

    def __len__(self) -> int:
        return len(self._mine(torch.arange(self.length)))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        return iter(self._mine(order).tolist())


def read_batch(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two tensors of a batch on `device`: image [B, 3, H, W] and label int64 [B, H, W], of any integer type before.

    Raises:
        ValueError: the batch is no such pair.
    """
    expected = "expected (image [B, 3, H, W], label [B, H, W]); a collate_fn of the DataLoader can make them"
    if not isinstance(batch, (tuple, list)) or [isinstance(part, Tensor) for part in batch] != [True, True]:
        kind = type(batch).__name__
        if isinstance(batch, Mapping):
            kind += f" of {', '.join(map(str, batch))}"
        elif isinstance(batch, (tuple, list)):
            kind += f" of {', '.join(type(part).__name__ for part in batch) if len(batch) == 2 else len(batch)}"
        raise ValueError(f"a batch is a {kind}; {expected}")
    image, label = (part.to(device, non_blocking=True) for part in batch)
    if image.ndim != 4 or label.shape != (len(image), *image.shape[-2:]):
        raise ValueError(f"a batch has images {list(image.shape)} and labels {list(label.shape)}; {expected}")
    return image, class_indices("label", label)


def rebuilt(loader: Batches, *, dataset: Dataset | None = None, even: bool = True) -> Batches:
    """The same loader with an `EpochSampler` in place of its own sampler; over `dataset`, if one is given.

    Whether it shuffles and all its options are kept, except for `generator`: seeds decide here. Persistent workers keep
    their random state from epoch to epoch, so that a resumed run draws other augmentations. What is not a plain
    DataLoader (a list of batches, a subclass, a sampler that repeats or leaves out items) comes back as it is, and
    cannot be shared among processes: ValueError if there are several.
    """
    sampler = loader.sampler if type(loader) is DataLoader and loader.batch_size is not None else None
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset)):
        sampler = None
    if isinstance(sampler, (RandomSampler, SequentialSampler, EpochSampler)):
        data = loader.dataset if dataset is None else dataset
        shuffle = not isinstance(sampler, SequentialSampler) and getattr(sampler, "shuffle", True)
        replaced = {"dataset", "shuffle", "sampler", "batch_sampler", "generator"}
        options = {name: getattr(loader, name) for name in inspect.signature(DataLoader).parameters.keys() - replaced}
        return DataLoader(data, sampler=EpochSampler(len(data), shuffle=shuffle, even=even), **options)
    if dataset is not None or process()[1] > 1:
        raise ValueError(f"{type(loader).__name__} has an order of its own; expected a DataLoader without a sampler=")
    return loader


def start_epoch(loader: Batches, seed: int) -> None:
    """Fix the order of the loader's next epoch, where it is ours to fix."""
    if isinstance(getattr(loader, "sampler", None), EpochSampler):
        loader.sampler.seed = seed
