"""The photographs of the course: their format, their strokes, their licences, and their place in the wheel."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from notebook_rules import ROOT
from PIL import Image

from pwlib.course import photos

FOLDER = ROOT / "pwlib" / "course" / "photos"


@pytest.mark.parametrize("name", photos.NAMES)
def test_a_photograph_is_the_image_in_its_file_and_small(name):
    with Image.open(FOLDER / f"{name}.jpg") as file:
        expected = np.asarray(file.convert("RGB"))
    image = photos.load(name)
    assert image.dtype == torch.float32
    assert np.array_equal((255 * image.permute(1, 2, 0).numpy()).round(), expected)
    assert max(image.shape) == 320 and (FOLDER / f"{name}.jpg").stat().st_size <= 40_000


def test_every_photograph_has_a_line_on_its_licence():
    listed = re.findall(
        r"^\| `(\w+)\.jpg` .*(?:public domain|CC0).*\|$", (FOLDER / "README.md").read_text("utf-8"), re.M
    )
    assert sorted(listed) == sorted(photos.NAMES) and len(listed) == len(list(FOLDER.glob("*.jpg")))


def test_a_smaller_copy_is_the_mean_of_blocks_where_the_image_is_smooth():
    large, small = photos.load("portrait"), photos.load("portrait", (160, 137))
    assert small.shape == (3, 160, 137) and small.min() >= 0 and small.max() <= 1
    blocks = torch.nn.functional.avg_pool2d(large[None], 2)[0]  # [3, 160, 136]; 273 columns become 137
    sky = (slice(None), slice(10, 60), slice(115, 130))
    assert (small[sky].mean((1, 2)) - blocks[sky].mean((1, 2))).abs().max() < 0.01


@pytest.mark.parametrize("size", [None, (61, 52)])
def test_strokes_touch_every_class_at_the_place_of_their_lines(size):
    image, strokes = photos.load("portrait", size), photos.strokes("portrait", size)
    assert strokes.shape == image.shape[1:] and strokes.dtype == torch.int64
    height, width = strokes.shape
    for label, lines in enumerate(photos.REGIONS["portrait"].values()):
        for x, y in (point for line in lines for point in line):
            near = strokes[
                max(0, int(y * height / 320) - 1) : int(y * height / 320) + 2,
                max(0, int(x * width / 273) - 1) : int(x * width / 273) + 2,
            ]
            assert (near == label).any(), (label, x, y)
    assert 0.02 < (strokes != 255).float().mean() < 0.12
    assert set(strokes.unique().tolist()) == {0, 1, 2, 3, 255}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown photograph 'nobody'; expected one of astronaut, cat"):
        photos.load("nobody")
    with pytest.raises(ValueError, match="no strokes are stored for 'cat'; expected one of portrait"):
        photos.strokes("cat")


def test_a_build_contains_the_photographs_and_their_licences(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packaged = tmp_path / "pwlib" / "course" / "photos"
    for path in (*FOLDER.glob("*.jpg"), FOLDER / "README.md"):
        assert (packaged / path.name).read_bytes() == path.read_bytes()
