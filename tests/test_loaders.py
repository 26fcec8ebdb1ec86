"""Loaders and checkpoints: the order of an epoch, what a rebuilt loader keeps, files that survive a full disk."""

import os
import resource
import stat
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from pwlib import checkpoints, loaders

DATA = TensorDataset(torch.rand(8, 3, 4, 6), torch.zeros(8, 4, 6, dtype=torch.int64))


def test_order_depends_on_the_seed_and_covers_everything():
    sampler = loaders.EpochSampler(20, shuffle=True, even=True)
    orders = {}
    for stage, epoch in ((1, 1), (1, 2), (2, 1)):
        sampler.seed = loaders.derive_seed(0, stage, epoch)
        orders[stage, epoch] = list(sampler)
        assert sorted(orders[stage, epoch]) == list(range(20))
        assert list(sampler) == orders[stage, epoch]
    assert len(set(map(tuple, orders.values()))) == 3


def test_processes_share_an_epoch_without_overlap(monkeypatch):
    def shares(length, even):
        result = []
        for rank in range(3):
            monkeypatch.setattr(loaders, "process", lambda rank=rank: (rank, 3))
            sampler = loaders.EpochSampler(length, shuffle=True, even=even)
            assert len(sampler) == len(list(sampler))
            result.append(list(sampler))
        return result

    every = shares(20, even=False)
    assert sorted(chain(*every)) == list(range(20))
    even = shares(20, even=True)
    assert [len(share) for share in even] == [6, 6, 6] and len(set(chain(*even))) == 18
    assert [share[0] for share in every] == [share[0] for share in even]


def collate(items):
    return torch.utils.data.default_collate(items)


def test_a_rebuilt_loader_keeps_every_option_but_the_order():
    """The generator alone is replaced: order and workers' seeds follow from the trainer's seed."""
    options = {
        "batch_size": 3,
        "num_workers": 1,
        "collate_fn": collate,
        "pin_memory": True,
        "drop_last": True,
        "timeout": 7,
        "worker_init_fn": print,
        "prefetch_factor": 5,
        "persistent_workers": True,
        "in_order": False,
    }
    loader = DataLoader(DATA, shuffle=True, multiprocessing_context="fork", generator=torch.Generator(), **options)
    rebuilt = loaders.rebuilt(loader)
    assert rebuilt is not loader
    assert {name: getattr(rebuilt, name) for name in options} == options
    assert rebuilt.multiprocessing_context.get_start_method() == "fork"
    assert rebuilt.generator is None


class Reversed(DataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True, num_samples=4)),
        DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=4)),
        DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 8, 5)),
        Reversed(DATA),
        [(torch.rand(2, 3, 4, 6), torch.zeros(2, 4, 6).long())],
    ],
)
def test_an_order_of_ones_own_is_left_alone(loader, monkeypatch):
    assert loaders.rebuilt(loader) is loader
    monkeypatch.setattr(loaders, "process", lambda: (0, 2))
    with pytest.raises(ValueError, match="expected a DataLoader without a sampler="):
        loaders.rebuilt(loader)


def test_a_plain_loader_shuffles_or_not_as_before():
    for shuffle in (True, False):
        rebuilt = loaders.rebuilt(DataLoader(DATA, shuffle=shuffle))
        loaders.start_epoch(rebuilt, 5)
        assert (list(rebuilt.sampler) == list(range(8))) != shuffle
        assert sorted(rebuilt.sampler) == list(range(8))


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
def test_files_get_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoints.save(tmp_path / "a.pt", {"model": {}})
        checkpoints.save_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "stage1-last.pt"
    checkpoints.save(path, {"model": {"w": torch.ones(3)}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(OSError, match=r"stage1-last\.pt cannot be written .*; the previous one is intact"):
            checkpoints.save(path, {"model": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(checkpoints.load(path)["model"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a half-written file was left behind"
