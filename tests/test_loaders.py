"""Loaders and checkpoints: the order of an epoch, what a rebuilt loader keeps, files that survive a full disk."""

import os
import resource
import stat
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset, WeightedRandomSampler

from pwlib import checkpoints, loaders

DATA = TensorDataset(torch.rand(8, 3, 4, 6), torch.zeros(8, 4, 6, dtype=torch.int64))


def epoch(loader, *seed):
    """The indices of an epoch, as the loader's batches have them."""
    loaders.start_epoch(loader, loaders.derive_seed(*seed))
    return torch.cat([indices for (indices,) in loader]).tolist()


def indices(length, **options):
    return DataLoader(TensorDataset(torch.arange(length)), batch_size=3, **options)


def test_order_depends_on_the_seed_and_covers_everything():
    loader = loaders.rebuilt(indices(20, shuffle=True))
    orders = {seed: epoch(loader, *seed) for seed in ((0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1))}
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 4
    assert epoch(loader, 0, 1, 1) == orders[0, 1, 1] == epoch(loaders.rebuilt(loader), 0, 1, 1)


def test_processes_share_an_epoch_without_overlap(monkeypatch):
    """Together they see in each step what one process sees with batches three times as large."""

    def shares(**options):
        result = []
        for rank in range(3):
            monkeypatch.setattr(loaders, "rank_and_world_size", lambda rank=rank: (rank, 3))
            loader = loaders.rebuilt(indices(20, shuffle=True), **options)
            result.append(epoch(loader, 0))
            assert len(loader) == -(-len(result[-1]) // 3)
        return result

    whole = epoch(loaders.rebuilt(indices(20, shuffle=True)), 0)
    assert [list(step) for step in zip(*shares(), strict=True)] == [whole[i : i + 3] for i in range(0, 18, 3)]
    assert sorted(chain(*shares(even=False))) == list(range(20))


def collate(items):
    return torch.utils.data.default_collate(items)


def test_a_rebuilt_loader_keeps_every_option_but_the_order():
    """Only the generator is replaced: the order and the workers' seeds follow from the trainer's seed."""
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
        DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=4, rank=1)),
        Reversed(DATA),
        [(torch.rand(2, 3, 4, 6), torch.zeros(2, 4, 6).long())],
    ],
)
def test_another_sampler_is_left_alone(loader, monkeypatch):
    assert loaders.rebuilt(loader) is loader
    monkeypatch.setattr(loaders, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(ValueError, match="expected a DataLoader without a sampler="):
        loaders.rebuilt(loader)


def test_a_rebuilt_loader_shuffles_if_the_given_one_does():
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
