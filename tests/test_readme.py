"""The Python example of the README runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_example_trains_and_predicts():
    """As printed, with fewer images and epochs."""
    code = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)[0]
    for printed, shorter in [
        ('load("scenes", "train")', 'load("scenes", "train", length=8, size=(24, 32))'),
        ('load("scenes", "val")', 'load("scenes", "val", length=2, size=(24, 32))'),
        ("stage1_epochs=20", "stage1_epochs=1"),
        ("stage2_epochs=5", "stage2_epochs=1"),
        ("stage3_epochs=10", "stage3_epochs=1"),
    ]:
        assert printed in code
        code = code.replace(printed, shorter)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["prediction"].shape == (1, 24, 32)
    assert set(names["history"]) == {"stage1", "stage2", "stage3"}


def test_the_readme_examples_of_dense_crf(tmp_path, monkeypatch):
    """As printed: strokes on a photograph of the course, and a network in the manner of torchvision."""
    import numpy as np
    import torch
    from PIL import Image

    strokes, network = (
        block for block in re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M) if "dense_crf(" in block
    )
    names = {}
    exec(compile(strokes, "README.md", "exec"), names)
    drawn = names["strokes"] < 4
    assert (names["labels"] == names["strokes"])[drawn].double().mean() > 0.9, "pixels below a stroke keep its class"
    assert names["labels"].unique().tolist() == [0, 1, 2, 3]

    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)).save("photo.jpg")
    names = {
        "pixels": torch.rand(1, 3, 48, 64),
        "network": lambda pixels: {"out": torch.zeros(len(pixels), 3, 6, 8)},
        "probabilities": np.full((3, 24, 32), 1 / 3, np.float32),
    }
    exec(compile(network, "README.md", "exec"), names)
    assert names["labels"].shape == (24, 32)
