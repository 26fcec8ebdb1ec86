"""Data loaders whose order is a function of (seed, stage, epoch), in one process or in several."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler, Subset

from pwlib.inputs import check_label

Batches = Iterable[tuple[Tensor, Tensor]]


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes; (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait until every process has come to this call."""
    if rank_and_world_size()[1] > 1:
        torch.distributed.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place, and return them."""
    if rank_and_world_size()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers; close numbers give unrelated random streams."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore their state after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rebuilt(loader: Batches, *, dataset: Dataset | None = None, even: bool = True) -> Batches:
    """The same loader in the order of `start_epoch`'s seed, over `dataset` if that is given, divided among processes.

    Process r of n takes every n-th item from the r-th on, so that n processes with batches of b see in each step what
    one process sees with batches of n * b. Training needs equally many items in each process (`even`: up to n - 1 are
    left out), evaluation each item once, in the stored order. All options but `generator` are kept. (Persistent workers
    keep their random state, so that a resumed run draws other random numbers.) A list of batches, a subclass of
    DataLoader, and a loader with a sampler that repeats or leaves out items are returned as they are; ValueError for a
    `dataset` or several processes then.
    """
    rank, world_size = rank_and_world_size()
    sampler = loader.sampler if type(loader) is DataLoader and loader.batch_size is not None else None
    if isinstance(sampler, RandomSampler):
        plain = not sampler.replacement and sampler.num_samples == len(loader.dataset)
    else:
        plain = isinstance(sampler, SequentialSampler) or getattr(sampler, "num_replicas", None) == world_size
    if plain:
        dataset = loader.dataset if dataset is None else dataset
        replaced = {"dataset", "shuffle", "sampler", "batch_sampler", "generator"}
        options = {name: getattr(loader, name) for name in inspect.signature(DataLoader).parameters.keys() - replaced}
        if not even:
            return DataLoader(Subset(dataset, range(rank, len(dataset), world_size)), **options)
        shuffle = getattr(sampler, "shuffle", isinstance(sampler, RandomSampler))
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, drop_last=True)
        return DataLoader(dataset, sampler=sampler, **options)
    if dataset is not None or world_size > 1:
        own = type(loader if sampler is None else sampler).__name__
        raise ValueError(
            f"{own} has an order of its own, which cannot be kept for a part of the data set or several processes; "
            "expected a DataLoader without a sampler=, or crf_loader= with the images of stage 2"
        )
    return loader


def start_epoch(loader: Batches, seed: int) -> None:
    """Set the order of the next epoch of a loader that `rebuilt` returned."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        loader.sampler.set_epoch(seed)


# Errors of torch that an unsuitable batch causes, and what to do about them.
ADVICE = {
    r"equal size, but got (\[.*?\]) at entry 0 and (\[.*?\]) at entry": "the images of a batch have different sizes, "
    "{} and {}; give the data set size=(H, W) (--size), crop with Augment((H, W)), or use batch_size=1",
    r"more than 1 value per channel": "batch normalisation cannot train on a batch of 1 image: it has one value per "
    "channel; if that is the rest of an epoch, choose another batch size (--batch), or DataLoader(drop_last=True)",
}


@contextmanager
def explained_errors() -> Iterator[None]:
    """Replace the errors of torch that `ADVICE` lists by a ValueError with what to do about them."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        for pattern, advice in ADVICE.items():
            if match := re.search(pattern, str(error)):
                raise ValueError(advice.format(*match.groups())) from error
        raise


def read_batch(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """image [B, 3, H, W] and label int64 [B, H, W] of a batch, on `device`; ValueError if it is no such pair."""
    expected = "expected (image [B, 3, H, W], label [B, H, W]); a collate_fn of the DataLoader can make them"
    if not isinstance(batch, (tuple, list)) or [isinstance(part, Tensor) for part in batch] != [True, True]:
        kind = type(batch).__name__
        if isinstance(batch, (Mapping, tuple, list)):
            kind += f" of {', '.join(part if isinstance(part, str) else type(part).__name__ for part in batch)}"
        raise ValueError(f"a batch is a {kind}; {expected}")
    image, label = (part.to(device, non_blocking=True) for part in batch)
    if image.ndim != 4 or label.shape != (len(image), *image.shape[-2:]):
        raise ValueError(f"a batch has images {list(image.shape)} and labels {list(label.shape)}; {expected}")
    return image, check_label(label)
