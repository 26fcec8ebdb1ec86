"""The command line: the files it writes, its output, and its exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_fixtures import CLASSES, python
from PIL import Image

from pwlib.cli.parser import main
from pwlib.cli.profiles import PROFILES
from pwlib.data import voc_palette
from pwlib.runs import build_model

# ---------------------------------------------------------------------------------------------------------------- train


def test_train_prints_one_table(finished):
    lines = finished[1].stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "mIoU" in line)
    rows = [line[:32].strip() for line in lines[start + 1 : start + 7]]
    first = ["stage1 unary", "stage1 + CRF, default parameters"]
    assert rows == [*first, "stage2 unary", "stage2 CRF", "stage3 unary", "stage3 CRF"]
    numbers = [[float(cell) for cell in line[38:].split()] for line in lines[start + 1 : start + 7]]
    assert all(len(row) == 3 and all(0 <= number <= 100 for number in row) for row in numbers)
    assert numbers[0] == numbers[2], "stage 2 must not change the network"


def test_train_leaves_a_run_folder(finished):
    out, process = finished
    stages = {f"stage{i}-{which}.pt" for i in (1, 2, 3) for which in ("best", "last")}
    assert {path.name for path in out.iterdir()} == stages | {"config.json", "history.json", "predictions.png"}
    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == list(CLASSES) and config["settings"]["size"] == [24, 36]
    history = json.loads((out / "history.json").read_text())
    assert [len(history[stage]) for stage in ("stage1", "stage2", "stage3")] == [1, 2, 2]
    assert Image.open(out / "predictions.png").size > (500, 200)
    assert "stage 1  epoch   1/1" in process.stderr


def test_the_table_agrees_with_evaluate(finished, capsys):
    """`evaluate` loads the checkpoints in another process and gets the scores of the table."""
    out, process = finished
    assert main(["evaluate", str(out), "--split", "val"]) == 0
    scores = json.loads(capsys.readouterr().out)
    for name in ("stage1 unary", "stage2 unary", "stage2 CRF", "stage3 unary", "stage3 CRF"):
        stage, part = name.lower().split()
        line = next(line for line in process.stdout.splitlines() if line.startswith(name + " "))
        printed = [float(cell) for cell in line.split()[3:]]
        measured = [100 * scores[stage][part][key] for key in ("miou", "pixel_accuracy", "boundary_iou")]
        assert printed == pytest.approx(measured, abs=0.06)


def test_the_seed_determines_the_weights(pictures, tmp_path):
    base = ["train", "--data", "folder", "--root", str(pictures), "--size", "16x24", "--epochs", "1,0,0", "--quiet"]
    states = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*base, "--seed", seed, "--out", str(tmp_path / name)]) == 0
        states.append(torch.load(tmp_path / name / "stage1-last.pt", weights_only=True)["model"])
    same = [all(torch.equal(states[0][k], other[k]) for k in states[0]) for other in states[1:]]
    assert same == [True, False]


# The command in a process that gets Ctrl-C's signal as soon as stage 1's checkpoint is written. A signal from outside
# could come too late, and tests that run in the background inherit that it is ignored.
CTRL_C = """
import os, signal, sys
from pwlib import checkpoints
from pwlib.cli.parser import main

signal.signal(signal.SIGINT, signal.default_int_handler)
save = checkpoints.save

def save_and_interrupt(path, state):
    save(path, state)
    if path.name == "stage1-last.pt":
        os.kill(os.getpid(), signal.SIGINT)

checkpoints.save = save_and_interrupt
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_run_is_resumed_from_its_folder(pictures, finished, tmp_path):
    """Ctrl-C ends with 130 and a hint; `--resume` needs only the folder, and reaches the uninterrupted run's scores."""
    out = tmp_path / "run"
    command = ["train", "--data", "folder", "--root", str(pictures), "--size", "24x36", "--epochs", "1,1,1"]
    process = subprocess.run(
        [sys.executable, "-c", CTRL_C, *command, "--out", str(out)], capture_output=True, text=True, timeout=180
    )
    stderr = process.stderr
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and f"--out {out} --resume" in stderr
    assert not (out / "stage3-last.pt").exists(), "the run ended before it was interrupted"
    resumed = python("train", "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    table, expected = (p.stdout[p.stdout.index("stage1 unary") :].splitlines()[:6] for p in (resumed, finished[1]))
    assert table == expected


# ------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_writes_the_format_of_the_readme(finished, pictures, tmp_path, capsys):
    out, _ = finished
    file = tmp_path / "scores.json"
    arguments = ["evaluate", str(out), "--data", "folder", "--root", str(pictures), "--split", "val"]
    assert main([*arguments, "--json", str(file)]) == 0
    assert capsys.readouterr().out == ""
    scores = json.loads(file.read_text())
    assert {stage: set(parts) for stage, parts in scores.items()} == {
        "stage1": {"unary", "untuned_crf"},
        "stage2": {"unary", "crf"},
        "stage3": {"unary", "crf"},
    }
    for parts in scores.values():
        for values in parts.values():
            assert set(values) == {"miou", "pixel_accuracy", "boundary_iou", "per_class_iou"}
            assert tuple(values["per_class_iou"]) == CLASSES
            present = [v for v in values["per_class_iou"].values() if v is not None]
            assert values["miou"] == pytest.approx(np.mean(present))


def test_evaluate_scores_the_stages_that_have_checkpoints(finished, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    (tmp_path / "stage2-best.pt").write_bytes((finished[0] / "stage2-best.pt").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"stage2"}


# -------------------------------------------------------------------------------------------------------------- predict


SIZES = {"rgb": (45, 31), "grey": (45, 31), "rgba": (45, 31), "deep": (45, 31), "palette": (45, 31)}
SIZES |= {"turned": (31, 45), "dot": (1, 1)}


def test_predict_labels_any_image(finished, photographs, tmp_path):
    images = sorted(map(str, photographs.iterdir()))
    assert main(["predict", str(finished[0]), *images, "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 3 * len(SIZES)
    for name, size in SIZES.items():
        label = Image.open(tmp_path / f"{name}-label.png")
        overlay = Image.open(tmp_path / f"{name}-overlay.png")
        confidence = Image.open(tmp_path / f"{name}-confidence.png")
        assert label.size == overlay.size == confidence.size == size
        assert (label.mode, overlay.mode, confidence.mode) == ("P", "RGB", "L")
        assert np.asarray(label).max() < len(CLASSES)
        assert np.asarray(confidence).min() >= 255 // len(CLASSES)
        palette = np.array(label.getpalette()).reshape(-1, 3)
        assert (palette[: len(CLASSES)] == voc_palette(len(CLASSES))[:-1]).all()
        assert (palette[255] == voc_palette(len(CLASSES))[-1]).all()


def test_predict_agrees_with_the_model_with_and_without_crf(finished, photographs, tmp_path):
    from pwlib.data import read_image

    for flags, crf in (([], True), (["--no-crf"], False)):
        out = tmp_path / str(crf)
        assert main(["predict", str(finished[0]), str(photographs / "rgb.png"), "--out", str(out), *flags]) == 0
        config = json.loads((finished[0] / "config.json").read_text())
        model = build_model(config["settings"], len(CLASSES)).eval()
        model.load_state_dict(torch.load(finished[0] / "stage3-best.pt", weights_only=True)["model"])
        expected = model.predict(read_image(photographs / "rgb.png"), short_side=24, apply_crf=crf)
        assert (np.asarray(Image.open(out / "rgb-label.png")) == expected.argmax(0).numpy()).all()
    one, other = (np.asarray(Image.open(tmp_path / str(crf) / "rgb-confidence.png")) for crf in (True, False))
    assert (one != other).any()


# ------------------------------------------------------------------------------------------------------------ the rest


def test_help_shows_examples_and_exit_codes(capsys):
    for command in ("train", "evaluate", "predict"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and f"python -m pwlib {command} " in text and "exit codes" in text


def test_every_profile_builds_its_model():
    assert {name for name, _ in PROFILES} == {"scenes", "camvid", "voc2012", "folder"}
    for key, profile in PROFILES.items():
        assert (profile.size or profile.crop) is not None, key
        settings = {"width": 1 / 32, "batch_norm": profile.batch_norm, "dropout": 0.5, "crf": profile.crf}
        unary, crf = build_model(settings, 3).eval()(torch.rand(1, 3, 16, 16))
        assert unary.shape == crf.shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_scenes_quick_in_one_seed(tmp_path):
    """The quick profile with fewer epochs: on unseen scenes the CRF adds three points of mean IoU to the unary."""
    assert main(["train", "--data", "scenes", "--epochs", "8,1,0", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--split", "test", "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["stage2"]
    assert scores["crf"]["miou"] > scores["unary"]["miou"] + 0.03
    assert scores["crf"]["boundary_iou"] > scores["unary"]["boundary_iou"]


@pytest.mark.slow
def test_two_processes_write_one_run(pictures, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pwlib"]
    command += ["train", "--data", "folder", "--root", str(pictures), "--size", "16x24", "--epochs", "1,1,0"]
    command += ["--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("stage1 unary") == 1
    assert (tmp_path / "run" / "stage2-best.pt").exists()
