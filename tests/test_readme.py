"""The Python example of the README runs."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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
