"""The measurements for a GPU machine, tried at a tiny size on the CPU, and the size of what travels there."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from notebook_rules import ROOT
from PIL import Image
from torchvision.models import vgg16

from pwlib import load

GPU = ROOT / "benchmarks" / "gpu"
BACKBONE_BYTES = 29.5e6  # VGG-16's convolutions in float16: 14.71 million parameters, and names


def run(which: str, out: Path, **variables: str) -> dict:
    """The results of run.sh: the content of each JSON file by its stem."""
    environment = os.environ | {"TINY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(["bash", GPU / "run.sh", which, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = sorted(out.iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) <= 16 * 2**20
    return {file.stem: json.loads(file.read_text()) for file in files if file.suffix == ".json"}


def collected(*arguments) -> str:
    command = [sys.executable, GPU / "collect.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def tiny_camvid(tmp_path_factory) -> Path:
    """A folder with camvid/ in SegNet's layout: eight training and two validation images, from Scenes."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 2)):
        data = load("scenes", split)
        for part in (split, f"{split}annot"):
            (root / "camvid" / part).mkdir(parents=True)
        for index in range(count):
            image, label = data[index]
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(root / "camvid" / split / f"0001TP_{index:06d}.png")
            ids = label.where(label != 255, 11).byte().numpy()  # CamVid's files have 11 for void
            Image.fromarray(ids).save(root / "camvid" / f"{split}annot" / f"0001TP_{index:06d}.png")
    return root


@pytest.mark.slow
def test_run_a_goes_on_after_failures_and_records_every_step(tmp_path):
    cells = [nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell("raise ValueError('planted')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "09_planted.ipynb")
    (tmp_path / "test_planted.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'planted'\n")
    paths = {"NOTEBOOKS": str(tmp_path / "09_planted.ipynb"), "TESTS": str(tmp_path), "CUDA_TESTS": ""}
    result = run("A", tmp_path / "out", PYTEST_ADDOPTS=f"--rootdir={tmp_path}", **paths)
    status = {step["name"]: step["status"] for step in result["run"]["steps"]}
    assert status == {"set-up": 0, "crf": 0, "notebooks-and-tests": 0}
    assert result["notebooks"]["exit_status"] == result["tests"]["exit_status"] == 1
    assert sum(step["limit"] for step in result["run"]["steps"]) + 50 <= 300  # 50 s: the CUDA tests, left out here
    rows = [row for row in result["crf"]["rows"] if row["contender"] != "pydensecrf2"]
    assert {row["task"] for row in rows} >= {"forward", "training"} and all(row["ms"] > 0 for row in rows)
    assert all(row["gradients_finite"] for row in rows if row["task"] == "training")
    assert result["crf"]["profile"]["most_entries_of_a_vertex"] > 1
    notebook = result["notebooks"]["files"]["09_planted.ipynb"]
    assert (notebook["passed"], notebook["failed"]) == (1, 1) and notebook["minutes"] > 0
    assert [failure["test"].split("::")[-1] for failure in result["tests"]["failures"]] == ["test_bad"]
    text = collected(tmp_path / "out")
    assert "| 09_planted.ipynb |" in text and "| lattice | training |" in text
    assert "test_bad: AssertionError: planted" in text


@pytest.mark.slow
def test_run_b_trains_all_stages_and_leaves_a_checkpoint(tmp_path, tiny_camvid):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "camvid").symlink_to(tiny_camvid / "camvid")
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items() if name.startswith("features.")}
    state = {name: (torch.randn(shape) / (9 * shape[-3:][0]) ** 0.5).half() for name, shape in shapes.items()}
    torch.save(state, tmp_path / "set" / "vgg16.pt")
    result = run("B", tmp_path / "out", SET=str(tmp_path / "set"))
    assert [step["status"] for step in result["run"]["steps"]] == [0, 0], (tmp_path / "out" / "log.txt").read_text()
    assert sum(step["limit"] for step in result["run"]["steps"]) <= 360
    history = result["camvid"]["history"]
    assert {"stage1", "stage2", "stage3"} <= set(history) and "stopped" not in result["camvid"]
    assert set(history["stage3"][-1]["val"]) == {"unary", "crf"}
    assert set(result["context"]["history"]["stage2"][-1]["val"]) == {"unary", "context", "crf"}
    assert len(result["camvid"]["trials"]) == 3
    curves, joined = tmp_path / "curves.svg", tmp_path / "camvid.pt"
    text = collected(tmp_path / "out", "--curves", curves, "--join", joined)
    assert "| stage3 crf | last |" in text and "<svg" in curves.read_text()
    found = torch.load(joined, weights_only=True)
    assert found["unary.classifier.weight"].shape == (11, 1024, 1, 1)
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float16}


def test_packing_keeps_names_and_labels(tmp_path, tiny_camvid):
    pack = runpy.run_path(str(GPU / "pack.py"))
    written = pack["pack"](tiny_camvid, tmp_path)
    assert written == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    for split, count in (("train", 8), ("val", 2)):
        ours, theirs = (load("camvid", split, root) for root in (tmp_path, tiny_camvid))
        assert len(ours) == count and ours.names == theirs.names
        for (image, label), (original, truth) in zip(ours, theirs, strict=True):
            assert torch.equal(label, truth)
            assert (image - original).abs().mean() < 0.05


def test_what_travels_with_run_b_fits():
    """Working tree, backbone and the 15 MB that CamVid may have: below 64 MiB."""
    pack = runpy.run_path(str(GPU / "pack.py"))
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout: the working tree cannot be listed")
    assert pack["working_tree"]() + BACKBONE_BYTES + 15e6 < 64 * 2**20


@pytest.mark.slow
def test_camvid_is_packed_into_15_megabytes(tmp_path, camvid_root):
    """Measured on every tenth image."""
    pack = runpy.run_path(str(GPU / "pack.py"))
    for split in ("train", "val"):
        for part in (split, f"{split}annot"):
            (tmp_path / "some" / "camvid" / part).mkdir(parents=True)
            for path in sorted((camvid_root / "camvid" / part).iterdir())[::10]:
                (tmp_path / "some" / "camvid" / part / path.name).symlink_to(path.resolve())
    some = len(list((tmp_path / "some" / "camvid").glob("*annot/*")))
    everything = len(list((camvid_root / "camvid").glob("[tv][ra]*annot/*")))  # trainannot and valannot
    assert pack["pack"](tmp_path / "some", tmp_path / "packed") * everything / some < 15e6


def test_numbers_have_three_significant_digits():
    number = runpy.run_path(str(GPU / "collect.py"))["number"]
    assert [number(v) for v in (0.012345, 1.2345, 123.45, 12345.6, 0, None)] == [
        "0.0123",
        "1.23",
        "123",
        "12346",
        "0",
        "-",
    ]
