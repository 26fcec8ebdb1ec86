"""The command line: the files it writes, its output, and its exit codes."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_fixtures import CLASSES, python
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.models import vgg

import pwlib
from pwlib.cli.parser import main
from pwlib.cli.profiles import PROFILES
from pwlib.crf import DenseCRF
from pwlib.data import load, read_image, voc_palette
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.tools.runs import build_model, load_run
from pwlib.tools.tiling import coarse_in_tiles, label_image, predict

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


@pytest.mark.slow
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


def offline(error):
    def urlopen(*args, **options):
        raise error

    return urlopen


@pytest.mark.parametrize("error", [OSError("no network"), KeyboardInterrupt()])
def test_a_run_that_failed_before_its_first_checkpoint_starts_again(error, pictures, tmp_path, capsys, monkeypatch):
    """`--resume` must not train from random weights when the download of the wanted ones failed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", offline(error))
    out, code = tmp_path / "run", 1 if isinstance(error, OSError) else 130
    command = ["train", "--data", "folder", "--root", str(pictures), "--size", "16x24", "--weights", "imagenet"]
    assert main([*command, "--epochs", "1,0,0", "--out", str(out)]) == code
    assert {path.name for path in out.iterdir()} == {"config.json"}
    assert main(["train", "--out", str(out), "--resume"]) == code
    assert "no checkpoint yet and starts from the beginning" in capsys.readouterr().err
    assert not list(out.glob("*.pt"))


def test_a_restarted_run_reads_its_classes_again(pictures, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pictures, root)
    names = (root / "classes.txt").read_text()
    (root / "classes.txt").write_text(names.replace("boat", "bat"))
    command = ["train", "--data", "folder", "--root", str(root), "--size", "16x24", "--epochs", "1,0,0", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    for path in out.glob("stage*"):
        path.unlink()
    (root / "classes.txt").write_text(names)
    assert main(["train", "--out", str(out), "--resume", "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text())["classes"] == list(CLASSES)
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 0


@pytest.mark.parametrize("change", ["classes", "images"])
def test_a_resumed_run_needs_the_data_it_was_started_with(change, pictures, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pictures, root)
    command = ["train", "--data", "folder", "--root", str(root), "--size", "16x24", "--epochs", "1,1,0", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    (out / "stage2-last.pt").unlink()
    if change == "classes":
        (root / "classes.txt").write_text((root / "classes.txt").read_text().replace("boat", "bat"))
    else:
        for part in ("images", "labels"):
            first = min((root / "train" / part).iterdir())
            shutil.copy(first, first.with_name(f"new{first.suffix}"))
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--quiet"]) == 2
    assert f"the {change} of the training set have changed" in capsys.readouterr().err


def test_training_images_keep_the_shape_of_most_photographs(pictures, tmp_path, capsys):
    """24x36 and 36x24 px; without --size a folder is resized to about as many pixels as the profile's 96x128."""
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    paths = sorted(root.rglob("*.png"))
    for path in (path for path in paths if path.stem != paths[0].stem):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    command = ["train", "--data", "folder", "--root", str(root), "--epochs", "0,0,0", "--quiet"]
    for name, options in (("fitted", []), ("given", ["--size", "24x16"])):
        assert main([*command, *options, "--out", str(tmp_path / name)]) == 0
        height, width = json.loads((tmp_path / name / "config.json").read_text())["settings"]["size"]
        assert height / width == pytest.approx(1.5, rel=0.06)
        error = capsys.readouterr().err
        if options:
            assert (height, width) == (24, 16) and "another shape" not in error
        else:
            assert height * width == pytest.approx(96 * 128, rel=0.06) and f"resized to {height}x{width}" in error
            assert "another shape and are distorted" in error


@pytest.mark.slow
def test_weights_learning_rate_and_batch(pictures, tmp_path):
    """`--weights FILE` implies full width and the file's batch norm; a learning rate of almost 0 keeps the weights."""
    torch.manual_seed(0)
    state = vgg.make_layers(vgg.cfgs["D"]).state_dict()
    torch.save({f"features.{name}": value.half() for name, value in state.items()}, tmp_path / "vgg16.pt")
    command = ["train", "--data", "folder", "--root", str(pictures), "--size", "8x8", "--epochs", "1,0,0", "--quiet"]
    command += ["--weights", str(tmp_path / "vgg16.pt"), "--batch", "5", "--learning-rate", "1e-12"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["width"], settings["batch_norm"], settings["batch"]) == (1.0, False, 5)
    assert settings["learning_rate"] == 1e-12 and settings["weights"] == str(tmp_path / "vgg16.pt")
    model = torch.load(tmp_path / "run" / "stage1-best.pt", weights_only=True)["model"]
    torch.testing.assert_close(model["unary.blocks.0.0.weight"], state["0.weight"].half().float())


def test_help_shows_what_each_profile_sets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for (data, name), profile in PROFILES.items():
        (line,) = [line for line in lines if line.split()[:2] == [data, name]]
        assert ",".join(map(str, profile.epochs)) in line and f"{profile.learning_rate:g}" in line
        assert (profile.weights or "random") in line and str(profile.width) in line


# ------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_writes_the_format_of_the_readme(finished, pictures, tmp_path, capsys):
    out, _ = finished
    file = tmp_path / "scores.json"
    arguments = ["evaluate", str(out), "--data", "folder", "--root", str(pictures), "--split", "val"]
    assert main([*arguments, "--json", str(file)]) == 0
    assert capsys.readouterr().out == ""
    scores = json.loads(file.read_text())
    assert {stage: set(parts) for stage, parts in scores.items()} == {
        "stage1": {"unary", "default_crf"},
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
        assert label.size == confidence.size == size
        assert overlay.width == max(240, size[0]) and overlay.height >= size[1] + 20  # the legend is below
        pixel = np.array(overlay)[0, 0] - 0.45 * 255 * read_image(next(photographs.glob(f"{name}.*")))[:, 0, 0].numpy()
        assert np.abs(pixel - 0.55 * voc_palette(len(CLASSES))[np.array(label)[0, 0]]).max() <= 1
        assert (label.mode, overlay.mode, confidence.mode) == ("P", "RGB", "L")
        assert np.asarray(label).max() < len(CLASSES)
        assert np.asarray(confidence).min() >= 255 // len(CLASSES)
        palette = np.array(label.getpalette()).reshape(-1, 3)
        assert (palette[: len(CLASSES)] == voc_palette(len(CLASSES))[:-1]).all()
        assert (palette[255] == voc_palette(len(CLASSES))[-1]).all()


def test_predict_takes_folders_and_patterns_and_prints_every_file(finished, photographs, tmp_path, capsys):
    more = tmp_path / "more"
    for name in ("a.PNG", "b.png", "notes.txt", "._b.png"):
        more.mkdir(exist_ok=True)
        shutil.copy(photographs / "rgb.png", more / name)
    out = tmp_path / "out"
    places = [str(photographs), str(photographs / "r*.png"), str(more / "*"), str(photographs / "grey.png")]
    assert main(["predict", str(finished[0]), *places, "--out", str(out)]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, out.iterdir()))
    assert len(list(out.iterdir())) == 3 * (len(SIZES) + 2)


def test_predict_continues_after_broken_files_and_lists_them(finished, photographs, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photographs, folder)
    (folder / "cut.png").write_bytes((folder / "rgb.png").read_bytes()[:500])
    (folder / "text.jpg").write_text("no image")
    out = tmp_path / "out"
    assert main(["predict", str(finished[0]), str(folder), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith(f"failed: {folder}") for line in lines)
    assert "cut.png" in lines[0] and "text.jpg" in lines[1]
    assert len(list(out.iterdir())) == 3 * len(SIZES) and "cut" not in captured.out


@pytest.mark.slow
@pytest.mark.parametrize("apply_crf", [True, False])
def test_tiles_and_chunks_give_what_predict_gives(apply_crf):
    """A network of 412 px receptive field on 520x700 px, in tiles of 128 px and chunks of two classes."""
    torch.manual_seed(0)
    unary = DeepLabLargeFOV(5, width=1 / 32)
    torch.nn.init.normal_(unary.classifier.weight, std=1.0)
    crf = DenseCRF(5, theta_alpha=20.0, theta_gamma=2.0)
    model = PiecewiseTrainedModel(5, crf_iterations=2, unary=unary, crf=crf).eval()
    image = load("scenes", "val", size=(520, 700), length=1)[0][0]
    with torch.no_grad():
        whole = unary.coarse(image[None])
        torch.testing.assert_close(coarse_in_tiles(unary, image[None], 128), whole, rtol=1e-4, atol=1e-5)
    for short_side in (None, 64):
        options = {"short_side": short_side, "crf_long_side": 200, "apply_crf": apply_crf}
        confidence, label = predict(model, image, **options).max(0)
        found = label_image(model, image, tile=128, limit=2 * image[0].numel(), **options)
        assert (found[0] == label).float().mean() > 0.9999 and len(label.unique()) > 1
        torch.testing.assert_close(found[1], confidence, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_memory_of_large_images_with_many_classes(tmp_path):
    """150 classes at 12 megapixels add less than 2.2 GB to the process (all probabilities alone would take 7.2 GB)."""
    code = """
import resource, torch
from pwlib import DeepLabLargeFOV, PiecewiseTrainedModel
from pwlib.tools.tiling import label_image
model = PiecewiseTrainedModel(150, crf_iterations=1, unary=DeepLabLargeFOV(150, width=1 / 16)).eval()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
label_image(model, torch.rand(3, 3000, 4000), apply_crf=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 2.2e6  # kB


def test_predict_agrees_with_the_model_with_and_without_crf(finished, photographs, tmp_path):
    for flags, crf in (([], True), (["--no-crf"], False)):
        out = tmp_path / str(crf)
        command = ["predict", str(finished[0]), str(photographs / "rgb.png"), "--out", str(out), "--device", "cpu"]
        assert main([*command, *flags]) == 0
        config = json.loads((finished[0] / "config.json").read_text())
        model = build_model(config["settings"], len(CLASSES)).eval()
        model.load_state_dict(torch.load(finished[0] / "stage3-best.pt", weights_only=True)["model"])
        expected = predict(model, read_image(photographs / "rgb.png"), short_side=24, apply_crf=crf)
        assert (np.asarray(Image.open(out / "rgb-label.png")) == expected.argmax(0).numpy()).all()
    one, other = (np.asarray(Image.open(tmp_path / str(crf) / "rgb-confidence.png")) for crf in (True, False))
    assert (one != other).any()


def test_predict_replaces_only_what_it_wrote(finished, photographs, tmp_path, capsys):
    """An annotation of the user, a corrected label and a file that is no image stay; earlier predictions do not."""
    for name in ("a", "b"):
        shutil.copy(photographs / "rgb.png", tmp_path / f"{name}.jpg")
    command = ["predict", str(finished[0]), str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"), "--out", str(tmp_path)]
    label = tmp_path / "b-label.png"

    def refuses(expected):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert main(command) == 2
        assert f"{expected} was not written by predict, or was changed since" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    Image.fromarray(np.full((31, 45), 1, np.uint8)).save(label)
    refuses(label)
    label.unlink()
    assert main(command) == 0
    written = label.read_bytes()
    assert main([*command, "--no-crf"]) == 0 and main(command) == 0
    assert label.read_bytes() == written
    with Image.open(label) as picture:  # corrected by a program that keeps the texts in a PNG
        text = PngInfo()
        for key, value in picture.info.items():
            text.add_text(key, str(value))
        picture.putpixel((3, 4), (picture.getpixel((3, 4)) + 1) % len(CLASSES))
        picture.save(label, pnginfo=text)
    refuses(label)
    label.write_bytes(written)
    (tmp_path / "a-overlay.png").write_text("mine")
    refuses(tmp_path / "a-overlay.png")


linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")


@pytest.mark.parametrize(
    ("encoding", "names"),  # {name: as it is printed}
    [
        ("cp1252", {"łódź": r"\u0142ód\u017a", "źle": r"\u017ale"}),
        pytest.param("utf-8", {"caf\udce9": r"caf\udce9"}, marks=linux),
    ],
)
def test_names_that_the_output_cannot_encode_are_escaped(encoding, names, finished, photographs, tmp_path, monkeypatch):
    """On Windows, output that is redirected to a file has such an encoding; on Linux a name may be no valid UTF-8."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a", *names):
        shutil.copy(photographs / "rgb.png", folder / f"{name}.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["predict", str(finished[0]), str(folder), "--out", str(out)]) == 0
    stdout.flush()
    printed = stdout.buffer.getvalue().decode(encoding).split()
    kinds = ("label", "overlay", "confidence")
    assert {path.name for path in out.iterdir()} == {f"{name}-{kind}.png" for name in ("a", *names) for kind in kinds}
    stems = ["a", *names.values()]
    assert sorted(printed) == sorted(str(out / f"{stem}-{kind}.png") for stem in stems for kind in kinds)


@pytest.mark.slow
@linux
def test_training_on_names_that_are_no_utf8(pictures, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    for part in ("images", "labels"):
        first = min((root / "train" / part).iterdir())
        first.rename(first.with_name(f"caf\udce9{first.suffix}"))
    command = ["train", "--data", "folder", "--root", str(root), "--size", "16x24", "--epochs", "1,0,0", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--quiet"]) == 0


def test_predict_says_that_subfolders_are_not_searched(finished, photographs, tmp_path, capsys):
    folder, out = tmp_path / "photos[1]", tmp_path / "photos[1]" / "out"
    for place in ("a.png", "sub/c.png", "sub/deeper/d.png", "notes/text.txt"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / "dot.png", folder / place)
    command, kinds = ["predict", str(finished[0]), "--out", str(out)], ("label", "overlay", "confidence")
    assert main([*command, str(folder)]) == 0
    note = f"note: {folder / 'sub' / 'c.png'} is not labelled, because subfolders are not searched; the pattern "
    assert capsys.readouterr().err == f"{note}'{tmp_path / 'photos[[]1]' / '**' / '*'}' includes them\n"
    assert {path.name for path in out.iterdir()} == {f"a-{kind}.png" for kind in kinds}
    assert main([*command, str(folder), str(folder / "sub")]) == 0  # `out` is a subfolder with images now, too
    deeper = capsys.readouterr().err.splitlines()
    assert len(deeper) == 1 and f"{folder / 'sub' / 'deeper' / 'd.png'} is not labelled" in deeper[0]


def test_load_run_is_ready_to_predict(finished, photographs, tmp_path):
    run = pwlib.load_run(finished[0])
    assert run.class_names == CLASSES and np.array_equal(run.palette, voc_palette(len(CLASSES)))
    assert not run.model.training
    image = read_image(photographs / "rgb.png")
    probability = run.predict(image)
    assert probability.shape == (len(CLASSES), 31, 45)
    torch.testing.assert_close(probability.sum(0), torch.ones(31, 45))
    assert main(["predict", str(finished[0]), str(photographs / "rgb.png"), "--out", str(tmp_path)]) == 0
    assert np.array_equal(Image.open(tmp_path / "rgb-label.png"), probability.argmax(0))
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load_run(tmp_path)


# --------------------------------------------------------------------------------------------------------------- labels


def binary_masks(root, count=6):
    """Photographs of a bright disc on a dark background, and masks with the values 0 and 255."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:24, :32]
    for index in range(count):
        disc = (y - random.integers(8, 16)) ** 2 + (x - random.integers(8, 24)) ** 2 < 36
        photo = (60 + 120 * disc[..., None] + random.integers(0, 30, (24, 32, 3))).astype(np.uint8)
        for part, pixels in (("images", photo), ("labels", (255 * disc).astype(np.uint8))):
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / f"{index}.png")
    return root


def test_labels_summarises_a_data_set(pictures, tmp_path, capsys):
    sheet = tmp_path / "labels.png"
    assert main(["labels", str(pictures), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "train: 10 images, 24x36 (10)" in out and "val: 4 images" in out
    counts = load("folder", "train", pictures).pixel_counts()
    (line,) = [line for line in out.splitlines() if line.startswith("sea ")]
    assert float(line.split()[1]) == pytest.approx(100 * float(counts[1] / counts.sum()), abs=0.006)
    assert Image.open(sheet).size[1] > 8 * 100


@pytest.mark.slow
def test_binary_masks_are_rejected_until_their_values_are_mapped(tmp_path, capsys):
    root, out = binary_masks(tmp_path / "data"), tmp_path / "run"
    assert main(["labels", str(root)]) == 2
    assert "--values 0=0,255=1" in capsys.readouterr().out
    command = ["train", "--data", "folder", "--root", str(root), "--size", "24x32", "--quiet", "--out", str(out)]
    assert main(command) == 2
    assert "--values 0=0,255=1" in capsys.readouterr().err and not out.exists()
    mapping = ["--values", "0=0,255=1", "--classes", "ground,disc"]
    assert main(["labels", str(root), *mapping]) == 0
    training = ["--epochs", "12,1,0", "--batch", "2", "--device", "cpu"]  # as far as this seed comes on a CPU
    assert main([*command, *mapping, *training]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 0
    scores = json.loads(capsys.readouterr().out)["stage1"]["unary"]
    assert scores["per_class_iou"].keys() == {"ground", "disc"} and scores["per_class_iou"]["disc"] > 0.3
    assert main(["predict", str(out), str(root / "images" / "0.png"), "--out", str(tmp_path / "labels")]) == 0
    assert set(np.unique(Image.open(tmp_path / "labels" / "0-label.png"))) == {0, 1}


@pytest.mark.parametrize("where", ["classes.txt", "--palette", "--classes"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_masks(where, mode, tmp_path, capsys):
    root = binary_masks(tmp_path / "data")
    for path in (root / "labels").iterdir():
        index = np.asarray(Image.open(path)) // 255
        Image.fromarray(np.array([[0, 0, 0], [250, 50, 83]], np.uint8)[index]).convert(mode).save(path)
    assert main(["labels", str(root)]) == 2
    assert "list them with their names in classes.txt" in capsys.readouterr().out
    colours = (root if where == "classes.txt" else tmp_path) / "classes.txt"
    colours.write_text("background:0,0,0::\ndisc:250,50,83::\n")
    options = [] if where == "classes.txt" else [where, str(colours)]
    assert main(["labels", str(root), *options]) == 0
    command = ["train", "--data", "folder", "--root", str(root), "--size", "24x32", "--epochs", "1,0,0", "--quiet"]
    assert main([*command, *options, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["stage1"]["unary"]["per_class_iou"].keys() == {"background", "disc"}
    palette = json.loads((tmp_path / "run" / "config.json").read_text())["palette"]
    assert palette[:2] == [[0, 0, 0], [250, 50, 83]]


def test_a_split_with_fewer_classes_is_scored_with_the_classes_of_the_run(pictures, tmp_path, capsys):
    """Without classes.txt the number of classes is that of the labels, which may be fewer in another folder."""
    root, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(pictures, root)
    (root / "classes.txt").unlink()
    command = ["train", "--data", "folder", "--root", str(root), "--size", "16x24", "--epochs", "1,0,0", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    shutil.copytree(root / "val", other / "val")
    for path in (other / "val" / "labels").iterdir():
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 3)).save(path)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--root", str(other)]) == 0
    scores = json.loads(capsys.readouterr().out)["stage1"]["unary"]["per_class_iou"]
    assert len(scores) == 10 and scores["class 9"] in (None, 0.0)


# ------------------------------------------------------------------------------------------------------------ the rest


def test_help_shows_examples_and_exit_codes(capsys):
    for command in ("train", "evaluate", "predict", "labels"):
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
