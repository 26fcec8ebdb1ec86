"""Runs that are repeated, resumed after a kill or a full disk, or divided among processes: bit for bit the same."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import PLAIN, SIZE, changed, run, untimed, weights
from torch.utils.data import DataLoader

from pwlib import checkpoints, losses
from pwlib.data import load
from pwlib.evaluation import best_record

TINY_RUN = Path(__file__).with_name("tiny_run.py")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run without interruption."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("whole"))


def differences(one, other):
    """What is not bit-identical in two runs: the weights of every stage's last and best epoch, the history."""
    result = set()
    for path in sorted(one.glob("*.pt")):
        a, b = checkpoints.load(path)["model"], checkpoints.load(other / path.name)["model"]
        result |= {f"{path.stem} {name}" for name, value in a.items() if not torch.equal(value, b[name])}
    histories = [untimed(json.loads((out / "history.json").read_text())) for out in (one, other)]
    return result | ({"history"} if histories[0] != histories[1] else set())


def test_the_best_epoch_is_kept(whole_run):
    trainer = whole_run
    val = DataLoader(load("scenes", "val", size=SIZE, length=5), batch_size=2)
    assert trainer.evaluate(val) == best_record(trainer.history["stage3"])["val"]
    json.dumps(trainer.history, allow_nan=False)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, whole_run):
    assert not differences(whole_run.out, run(tmp_path / "0").out)
    assert differences(whole_run.out, run(tmp_path / "1", seed=1).out) >= {"history", "stage1-last unary.fc6.0.weight"}


# ---------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
def test_a_run_killed_and_resumed_in_every_stage_equals_an_uninterrupted_one(tmp_path, whole_run):
    """SIGKILL in the second epoch of stage 1; resumed, and killed in stage 2; the same in stage 3; then resumed."""
    out = tmp_path / "run"

    def start(*options):
        command = [sys.executable, str(TINY_RUN), str(out), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    expected = {"stage1-last.pt", "stage1-best.pt", "history.json"}
    # Before each of its epochs stage 2 reads its 4 images once more, for the temperature.
    kills = ((8 + 4, set()), (8 + 4 + 4 + 4 + 2, {"stage2-last.pt", "stage2-best.pt"}), (4 + 4 + 12 + 5, None))
    for kill_at, extra in kills:
        options = ["--kill-at", str(kill_at)] + (["--resume"] if out.exists() else [])
        assert (process := start(*options)).returncode == -signal.SIGKILL, process.stderr
        expected |= extra if extra is not None else {"stage3-last.pt", "stage3-best.pt"}
        assert {path.name for path in out.iterdir()} == expected
    assert (process := start("--resume")).returncode == 0, process.stderr
    assert not differences(whole_run.out, out)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nothing", "optimizer"])
def test_a_checkpoint_holds_what_resuming_needs(tmp_path, whole_run, loss):
    """Control: a run resumed without the optimizer's momentum must differ."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=8 + 4, then=interrupt)
    path = tmp_path / "stage1-last.pt"
    if loss == "optimizer":
        state = checkpoints.load(path)
        state["optimizer"]["state"] = {}
        checkpoints.save(path, state)
    run(tmp_path, resume=True)
    assert bool(differences(whole_run.out, tmp_path)) == (loss == "optimizer")


@pytest.mark.slow
def test_a_run_that_averages_stage_3_is_resumed(tmp_path):
    """Interrupted in the second epoch of stage 3, whose start is no longer the model."""
    whole = run(tmp_path / "whole", average_stage3=True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", average_stage3=True, stop_at=16 + 16 + 12 + 5, then=interrupt)
    resumed = run(tmp_path / "resumed", average_stage3=True, resume=True)
    assert not differences(whole.out, resumed.out)


def squared(scores, label):
    return scores.square().mean()


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_loss_function(tmp_path):
    run(tmp_path, loss=squared)
    run(tmp_path, loss=squared, resume=True)
    with pytest.raises(ValueError, match=r"made with loss = \S*squared, this run has \S*cross_entropy: it cannot"):
        run(tmp_path, loss=losses.cross_entropy, resume=True)


def test_an_option_newer_than_the_checkpoint_has_its_default(tmp_path, whole_run):
    shutil.copytree(whole_run.out, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*-last.pt"):
        state = checkpoints.load(path)
        del state["config"]["freeze_batch_norm"]
        checkpoints.save(path, state)
    run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="made with freeze_batch_norm = False, this run has True: it cannot"):
        run(tmp_path, freeze_batch_norm=True, resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path, whole_run):
    shutil.copytree(whole_run.out, tmp_path, dirs_exist_ok=True)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run(tmp_path, resume=True, stop_at=1, then=interrupt)
    assert not changed(weights(whole_run.model), again.model) and again.history == whole_run.history
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """torchrun with gloo: batches of 2 in each of two processes against batches of 4 in one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, str(TINY_RUN), str(tmp_path), "--distributed"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    two = json.loads((tmp_path / "history.json").read_text())
    one = run(batch=4, **PLAIN)
    state = checkpoints.load(tmp_path / "stage3-best.pt")["model"]
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for stage, records in one.history.items():
        for a, b in zip(records, two[stage], strict=True):
            assert a["epoch"] == b["epoch"]
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            for part in a["val"]:
                assert a["val"][part]["pixels"] == b["val"][part]["pixels"]
                for score in ("miou", "pixel_accuracy", "boundary_iou"):
                    assert a["val"][part][score] == pytest.approx(b["val"][part][score], abs=2e-3)


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.mark.slow
def test_a_run_that_filled_the_disk_can_be_resumed(tmp_path, whole_run, monkeypatch):
    write = checkpoints.write_atomically

    def full(path, data):
        if Path(path).name == "stage2-last.pt":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert not differences(whole_run.out, run(tmp_path, resume=True).out)


def test_all_losses_are_finite(whole_run):
    numbers = [record["loss"] for records in whole_run.history.values() for record in records if "loss" in record]
    assert len(numbers) == 6 and all(math.isfinite(number) for number in numbers)
