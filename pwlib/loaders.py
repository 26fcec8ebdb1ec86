"""Data loaders whose order is a function of (seed, stage, epoch), in one process or in several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

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


def rebuilt(loader: Batches, *, dataset: Dataset | None = None, even: bool = True) -> Batches:
    """The same loader with an `EpochSampler` in place of its own sampler; over `dataset`, if one is given.

    Batch size, workers, collation and whether it shuffles are kept. What is not a plain DataLoader (a list of batches,
    a sampler of your own) comes back as it is, and cannot be shared among processes: ValueError if there are several.
    """
    plain = isinstance(loader, DataLoader) and loader.batch_size is not None
    if plain and isinstance(loader.sampler, (RandomSampler, SequentialSampler, EpochSampler)):
        data = loader.dataset if dataset is None else dataset
        shuffle = not isinstance(loader.sampler, SequentialSampler) and getattr(loader.sampler, "shuffle", True)
        return DataLoader(
            data,
            batch_size=loader.batch_size,
            sampler=EpochSampler(len(data), shuffle=shuffle, even=even),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=loader.drop_last,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )
    if dataset is not None or process()[1] > 1:
        raise ValueError(f"{type(loader).__name__} has an order of its own; expected a DataLoader without a sampler=")
    return loader


def start_epoch(loader: Batches, seed: int) -> None:
    """Fix the order of the loader's next epoch, where it is ours to fix."""
    if isinstance(getattr(loader, "sampler", None), EpochSampler):
        loader.sampler.seed = seed
