"""A data set, a finished run and unusual photographs, shared by the tests of the command line."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pwlib.data import load

CLASSES = ("sky", "sea", "land", "plane", "boat", "wall", "roof", "tent", "tree", "pole")


def python(*arguments, **options):
    command = [sys.executable, "-m", "pwlib", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder data set of PNGs: ten scenes of 24x36 px for training, four for validation."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, length in (("train", 10), ("val", 4)):
        scenes = load("scenes", split, size=(24, 36), length=length)
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for (image, label), name in zip(scenes, scenes.names, strict=False):
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(root / split / "images" / f"{name}.png")
            Image.fromarray(label.byte().numpy()).save(root / split / "labels" / f"{name}.png")
    return root


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """A run with one epoch per stage, and its process."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command = ["train", "--data", "folder", "--root", str(pictures), "--size", "24x36", "--epochs", "1,1,1"]
    process = python(*command, "--out", str(out))
    assert process.returncode == 0, process.stderr
    return out, process


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Grey, RGBA with transparency, 16 bits, palette, rotated by EXIF, one pixel; sizes are no multiples of 8."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (31, 45, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "rgb.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels, "RGBA").save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) << 8).save(folder / "deep.png")
    Image.fromarray(pixels[..., :3]).convert("P").save(folder / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(pixels[..., :3]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[:1, :1, :3]).save(folder / "dot.png")
    return folder
