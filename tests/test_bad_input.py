"""Bad input to the model, the trainer and the command line: one clear sentence, and no file is lost."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SIZE, K, run, tiny_model
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from pwlib import checkpoints
from pwlib.cli.parser import main
from pwlib.crf import DenseCRF
from pwlib.data import load
from pwlib.losses import cross_entropy
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.trainer import PiecewiseTrainer


def trainer_of(model, **options):
    return PiecewiseTrainer(model, "cpu", K, **{"learning_rate": 1e-2, "progress": False, **options})


def batches(value=0, size=SIZE, batch=2):
    return [(torch.rand(batch, 3, *size), torch.full((batch, *size), value))]


# ---------------------------------------------------------------------------------------------------------------- model


def test_one_class_is_rejected():
    with pytest.raises(ValueError, match="num_classes is 1; expected at least 2"):
        PiecewiseTrainedModel(num_classes=1)


def test_a_one_pixel_image_can_be_labelled():
    unary, crf = tiny_model().eval()(torch.rand(1, 3, 1, 1))
    assert unary.shape == crf.shape == (1, K, 1, 1)
    torch.testing.assert_close(crf.exp().sum(), torch.tensor(1.0))


def test_a_one_pixel_image_can_be_trained_on():
    history = trainer_of(tiny_model(batch_norm=False)).train_piecewise(batches(3, (1, 1)), 1, 1, 1)
    assert all(np.isfinite(record["loss"]) for records in history.values() for record in records)


class Broken(nn.Module):
    def __init__(self, value, classes=K):
        super().__init__()
        self.value, self.classes = nn.Parameter(torch.tensor(value)), classes

    def forward(self, image):
        return self.value.expand(len(image), self.classes, *image.shape[-2:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_logits(value):
    model = PiecewiseTrainedModel(K, unary=Broken(value), crf=DenseCRF(K))
    with pytest.raises(ValueError, match="logits contain NaN or infinity"):
        model(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"nan or infinity.*diverged"):
        trainer_of(model).train_stage1(batches(), 1)


def test_an_infinite_loss_names_its_step():
    trainer = trainer_of(tiny_model(), loss=lambda scores, label: scores.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan in stage 1, epoch 1, step 1"):
        trainer.train_stage1(batches(), 1)


def test_a_network_with_other_classes():
    model = PiecewiseTrainedModel(K, unary=Broken(0.0, classes=3), crf=DenseCRF(K))
    with pytest.raises(ValueError, match=r"Broken returned \(1, 3, 8, 8\); expected logits \[1, 10, H, W\]"):
        model(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    "image", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8)]
)
def test_invalid_images(image):
    with pytest.raises(ValueError, match="expected"):
        tiny_model()(image)


# -------------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected one of sgd, adamw"),
        ({"schedule": "step"}, "schedule is 'step'; expected one of poly, onecycle, constant"),
        ({"crf_loss": "joint"}, "crf_loss is 'joint'; expected 'marginal' or a function"),
        ({"loss": "hinge"}, "loss is 'hinge'; expected 'cross_entropy' or a function"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a positive number"),
        ({"patience": 0}, "patience is 0"),
        ({"class_weights": torch.ones(3)}, "class_weights are .*; expected 10 finite"),
    ],
)
def test_unknown_names_and_impossible_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model(), **options)


def test_a_wrong_number_of_classes():
    with pytest.raises(ValueError, match="num_classes is 21; the model has 10"):
        PiecewiseTrainer(model=tiny_model(), device="cpu", num_classes=21)


def test_a_batch_of_void_changes_nothing():
    model = tiny_model()
    void, good = batches(255)[0], batches(3)[0]
    history = trainer_of(model).train_piecewise([void, good], 1, 1, 1)
    assert all(np.isfinite(record["loss"]) for records in history.values() for record in records)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_labels_that_are_all_void(stage):
    with pytest.raises(ValueError, match=f"not one labelled pixel in epoch 1 of stage {stage}: all labels are 255"):
        getattr(trainer_of(tiny_model()), f"train_stage{stage}")(batches(255), 1)


def test_an_empty_loader():
    with pytest.raises(ValueError, match="stage 1 has no batch to train on"):
        trainer_of(tiny_model()).train_stage1([], 1)


def test_labels_outside_the_classes():
    with pytest.raises(ValueError, match=r"label holds 10; expected 0\.\.9 or 255"):
        trainer_of(tiny_model()).train_stage1(batches(K), 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_images_of_different_sizes(workers, stage):
    """A batch of them fails inside torch's stack; the message names the sizes and what to do."""
    sizes = [(16, 24), (24, 16)]
    items = [(torch.rand(3, *size), torch.zeros(size, dtype=torch.int64)) for size in sizes]
    loader = DataLoader(items, batch_size=2, num_workers=workers)
    trainer = trainer_of(tiny_model())
    with pytest.raises(ValueError, match=r"different sizes, \[3, 16, 24\] and \[3, 24, 16\]; .* size=.*=1"):
        trainer.train_stage1(loader, 1) if stage == "train" else trainer.evaluate(loader)


@pytest.mark.slow
def test_holding_out_needs_a_loader_without_sampler():
    dataset = load("scenes", "train", size=SIZE, length=4)
    loader = DataLoader(dataset, batch_size=2, sampler=WeightedRandomSampler([1.0] * 4, 4))
    with pytest.raises(ValueError, match=r"WeightedRandomSampler has an order of its own.*or crf_loader="):
        trainer_of(tiny_model()).train_piecewise(loader, 1, 1, 0)


# ---------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained")).out


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_run_folder_is_not_changed(trained):
    before = content(trained)
    with pytest.raises(FileExistsError, match="holds a run already; resume it, or choose another folder"):
        run(trained)
    assert content(trained) == before


def test_resuming_under_other_settings_is_refused(trained):
    before = content(trained)
    for options, key in (({"learning_rate": 0.5}, "learning_rate"), ({"batch": 2}, "batches"), ({"seed": 9}, "seed")):
        with pytest.raises(ValueError, match=f"stage1-last.pt was made with {key} = .* it cannot be resumed"):
            run(trained, resume=True, **options)
    assert content(trained) == before


def test_a_checkpoint_of_another_model(trained):
    wider = PiecewiseTrainedModel(K, unary=DeepLabLargeFOV(K, width=1 / 8, batch_norm=True), crf=DenseCRF(K))
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"best\.pt holds another model: unary\.\S+ is \[4, 3, 3, 3\] there, \[8,"):
        checkpoints.load_model(trained / "stage1-best.pt", wider)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    plain = tiny_model(batch_norm=False)
    with pytest.raises(ValueError, match="holds another model"):
        checkpoints.load_model(trained / "stage1-best.pt", plain)


class Evil:
    def __reduce__(self):
        return (print, ("this code was run",))


@pytest.mark.parametrize("kind", ["text", "empty", "picture", "truncated", "foreign", "evil"])
def test_a_file_that_is_not_a_checkpoint(kind, trained, tmp_path, capsys):
    path = tmp_path / "stage1-best.pt"
    whole = (trained / "stage1-best.pt").read_bytes()
    if kind == "picture":
        Image.new("RGB", (4, 4)).save(path, format="png")
    elif kind == "foreign":
        torch.save({"state_dict": tiny_model().state_dict()}, path)
    elif kind == "evil":
        torch.save({"format": checkpoints.FORMAT, "model": Evil()}, path)
    else:
        path.write_bytes({"text": b"weights, honestly", "empty": b"", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(ValueError, match=r"stage1-best\.pt is (damaged or not a checkpoint|not a checkpoint of this)"):
        checkpoints.load_model(path, tiny_model())
    assert "this code was run" not in capsys.readouterr().out


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt is not there"):
        checkpoints.load(tmp_path / "none.pt")


# --------------------------------------------------------------------------------------------------------- command line


def fails(capsys, *arguments, code=2):
    """The last line on standard error of a command that ends with `code`."""
    try:
        assert main(list(map(str, arguments))) == code
    except SystemExit as stop:  # argparse
        assert stop.code == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: train | evaluate"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: --out"),
        (["train", "--out", "OUT"], "--data is missing"),
        (["train", "--data", "mnist", "--out", "OUT"], "invalid choice: 'mnist'"),
        (["train", "--data", "scenes", "--profile", "slow", "--out", "OUT"], "invalid choice: 'slow'"),
        (["train", "--data", "scenes", "--size", "90", "--out", "OUT"], "'90' is not a size; expected height x width"),
        (["train", "--data", "scenes", "--size", "0x9", "--out", "OUT"], "'0x9' is not a size"),
        (["train", "--data", "scenes", "--epochs", "1,2", "--out", "OUT"], "'1,2' is not three numbers of epochs"),
        (["train", "--data", "scenes", "--seed", "-1", "--out", "OUT"], "'-1' is not a whole number"),
        (["train", "--data", "scenes", "--seed", "x", "--out", "OUT"], "'x' is not a whole number"),
        (["train", "--data", "camvid", "--root", "MISSING", "--out", "OUT"], "camvid: neither"),
        (["train", "--data", "folder", "--root", "MISSING", "--out", "OUT"], "is not a folder"),
        (["train", "--data", "scenes", "--device", "cuda:99", "--out", "OUT"], "--device cuda:99 cannot be used here"),
        (["train", "--data", "scenes", "--device", "toaster", "--out", "OUT"], "--device toaster cannot be used here"),
        (["train", "--data", "scenes", "--batch", "0", "--out", "OUT"], "'0' is not a whole number of at least 1"),
        (["train", "--data", "scenes", "--learning-rate", "inf", "--out", "OUT"], "'inf' is not a positive number"),
        (["train", "--data", "scenes", "--weights", "MISSING", "--out", "OUT"], "no such file"),
        (["train", "--data", "scenes", "--classes", "a,b", "--out", "OUT"], "class_names belong to --data folder"),
        (["train", "--data", "folder", "--values", "0=x", "--out", "OUT"], "'0=x' is not a mapping of label values"),
        (["train", "--data", "folder", "--void", "all", "--out", "OUT"], "'all' is not a label value or none"),
        (["labels", "MISSING"], "is not a folder"),
        (["train", "--out", "MISSING", "--resume"], "is not a run folder"),
        (["evaluate", "MISSING"], "is not a run folder"),
        (["predict", "MISSING", "a.png", "--out", "OUT"], "is not a run folder"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    places = {"OUT": tmp_path / "out", "MISSING": tmp_path / "missing"}
    assert message in fails(capsys, *(places.get(a, a) for a in arguments))
    assert list(tmp_path.iterdir()) == [], "a file was created"


def test_training_into_a_folder_in_use(finished, pictures, tmp_path, capsys):
    before = content(finished[0])
    command = ["train", "--data", "folder", "--root", pictures, "--out"]
    assert "exists and is not empty" in fails(capsys, *command, finished[0])
    assert content(finished[0]) == before


WORK = {  # what each command does first that takes time
    "train": "pwlib.tools.training.train",
    "evaluate": "pwlib.tools.scoring.score_run",
    "predict": "pwlib.cli.commands.load_run",
}


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "bench"])
@pytest.mark.parametrize("place", ["a folder", "missing/scores.json", "a file/scores.json", "a file"])
def test_outputs_are_checked_before_the_work(command, place, tmp_path, capsys, monkeypatch):
    """--json must name a file in an existing folder; --out must name a folder, which may have to be made."""

    def work(*args, **options):
        raise AssertionError("the command began to work")

    if command in WORK:
        monkeypatch.setattr(WORK[command], work)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("mine")
    files = command in ("evaluate", "bench")
    given = {
        "train": ["train", "--data", "scenes", "--out"],
        "evaluate": ["evaluate", "run", "--json"],
        "predict": ["predict", "run", "a.png", "--out"],
        "bench": ["bench", "crf", "--sizes", "9000x9000", "--json"],
    }[command]
    if (files and place == "a file") or (not files and not place.startswith("a file")):
        if command != "bench":
            with pytest.raises(AssertionError, match="began to work"):
                main([*given, str(tmp_path / place)])
    else:
        line = fails(capsys, *given, tmp_path / place)
        assert given[-1] in line and str(tmp_path / place) in line
    assert (tmp_path / "a file").read_text() == "mine" and not (tmp_path / "missing").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "is not writable" in fails(capsys, "evaluate", "run", "--json", tmp_path / "scores.json")
    assert "is not writable" in fails(capsys, "train", "--data", "scenes", "--out", tmp_path / "new" / "run")


def test_resuming_with_other_arguments(finished, capsys):
    line = fails(capsys, "train", "--out", finished[0], "--resume", "--epochs", "9,9,9")
    assert "--epochs is (9, 9, 9) here and [1, 1, 1] in" in line


@pytest.mark.slow
def test_damaged_runs(finished, tmp_path, capsys):
    config = (finished[0] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert "has no checkpoint yet" in fails(capsys, "evaluate", tmp_path)
    (tmp_path / "stage1-best.pt").write_bytes(b"?")
    assert "is damaged or not a checkpoint" in fails(capsys, "evaluate", tmp_path)
    other = json.loads(config)
    other["settings"]["width"] = 0.125
    (tmp_path / "config.json").write_text(json.dumps(other))
    (tmp_path / "stage1-best.pt").write_bytes((finished[0] / "stage1-best.pt").read_bytes())
    assert "holds another model" in fails(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "is not a run's configuration" in fails(capsys, "evaluate", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "it is not JSON" in fails(capsys, "evaluate", tmp_path)


def test_evaluation_with_other_classes(finished, capsys, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "val" / kind).mkdir(parents=True)
        Image.new("L" if kind == "labels" else "RGB", (9, 9)).save(tmp_path / "val" / kind / "a.png")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    line = fails(capsys, "evaluate", finished[0], "--root", tmp_path)
    assert "has the classes cat, dog" in line and "was trained on sky, sea" in line
    assert "unknown split" in fails(capsys, "evaluate", finished[0], "--data", "scenes", "--split", "exam")


@pytest.mark.slow
def test_the_classes_of_another_folder_are_those_of_its_file(finished, pictures, tmp_path, capsys):
    """`train --classes` renames the classes of its own folder; it says nothing about the numbers in another one."""
    trained, home, other = (tmp_path / name for name in ("trained", "home", "other"))
    shutil.copytree(finished[0], trained)
    for root in (home, other):
        shutil.copytree(pictures / "val", root / "val")
    config = json.loads((trained / "config.json").read_text())
    names = config["classes"]
    config["data"] |= {"root": str(home), "labels": {"class_names": names}}
    (trained / "config.json").write_text(json.dumps(config))

    def scored(*options):
        assert main(["evaluate", str(trained), *options]) == 0
        return json.loads(capsys.readouterr().out)["stage1"]["unary"]["per_class_iou"]

    scores = scored("--root", str(other))
    swapped = "\n".join([names[1], names[0], *names[2:]])
    (home / "classes.txt").write_text(swapped)
    assert scored() == scores == scored("--root", str(home)), "names given in training replace those of its own folder"
    (other / "classes.txt").write_text("\n".join(names))
    assert scored("--root", str(other)) == scores
    (other / "classes.txt").write_text(swapped)
    line = fails(capsys, "evaluate", trained, "--root", other)
    assert "has the classes sea, sky, land" in line and "was trained on sky, sea, land" in line
    assert "expected the same classes in the same order" in line


def test_the_colours_of_another_folder_are_those_of_its_file(finished, tmp_path, capsys):
    """The run learned from colour masks with --palette; in the other folder the same classes have other colours."""
    shutil.copytree(finished[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    names, colours = config["classes"], [[20 * k, 100, 0] for k in range(11)]  # void last
    config["data"] |= {"root": str(tmp_path), "labels": {"class_names": names, "palette": colours}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for root, first in (("same", 0), ("reversed", 9)):  # all pixels are class 0, or all have class 9's colour here
        for kind in ("images", "labels"):
            (tmp_path / root / "val" / kind).mkdir(parents=True)
        Image.new("RGB", (36, 24), (90, 90, 90)).save(tmp_path / root / "val" / "images" / "a.png")
        Image.new("RGB", (36, 24), tuple(colours[first])).save(tmp_path / root / "val" / "labels" / "a.png")
    lines = [f"{name} {20 * (9 - k)} 100 0" for k, name in enumerate(names)]
    (tmp_path / "reversed" / "classes.txt").write_text("\n".join(lines))
    scores = []
    for root in ("same", "reversed"):
        assert main(["evaluate", str(tmp_path / "run"), "--root", str(tmp_path / root)]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1] and scores[0]["stage1"]["unary"]["per_class_iou"]["sky"] is not None


@pytest.mark.slow
def test_images_that_cannot_be_read(finished, photographs, tmp_path, capsys):
    out = tmp_path / "out"
    run_folder, good = finished[0], photographs / "rgb.png"
    assert "none.png is not there" in fails(capsys, "predict", run_folder, good, "none.png", "--out", out)
    assert not out.exists(), "an image was labelled before the missing one was noticed"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:500])
    assert "cut.png" in fails(capsys, "predict", run_folder, tmp_path / "cut.png", "--out", out, code=1)
    (tmp_path / "empty").mkdir()
    assert "empty contains no image" in fails(capsys, "predict", run_folder, tmp_path / "empty", "--out", out)
    (tmp_path / "rgb.jpg").write_bytes(good.read_bytes())
    assert "two images are called rgb" in fails(capsys, "predict", run_folder, good, tmp_path / "rgb.jpg", "--out", out)


@pytest.mark.slow
def test_a_full_disk_ends_training_with_1_and_a_run_to_resume(pictures, tmp_path):
    """With a limit on the file size, the checkpoint cannot be written, and the configuration can."""
    command = [sys.executable, "-m", "pwlib", "train", "--data", "folder", "--root", str(pictures), "--size", "16x24"]
    command += ["--epochs", "1,0,0", "--quiet", "--out", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *command]
    process = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr and "cannot be written" in process.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json"}
    again = subprocess.run(
        [*command[:4], *command[-2:], "--resume", "--quiet"], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr


def test_losses_reject_probabilities_in_training():
    trainer = trainer_of(tiny_model(), loss=lambda scores, label: cross_entropy(scores.softmax(1), label))
    with pytest.raises(ValueError, match="look like probabilities"):
        trainer.train_stage1(batches(), 1)
