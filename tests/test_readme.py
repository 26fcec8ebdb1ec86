"""The README keeps its word: its Python runs, its table agrees with the stored results, links and commands exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from pwlib.cli.parser import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.S | re.M)


def test_the_dozen_lines_train_and_infer():
    """As printed, but for fewer images and epochs."""
    code = blocks("python")[0]
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


def test_pipeline_table_is_what_the_results_say():
    assert runpy.run_path(str(ROOT / "benchmarks/pipeline/table.py"))["table"]() in README


def test_its_commands_parse():
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("python -m pwlib")]
    assert {command[0] for command in commands} == {"train", "evaluate", "predict", "bench"}
    for command in commands:
        parser(command).parse_args(command)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^):]+)\)", README))))
def test_its_links_lead_somewhere(path):
    assert (ROOT / path).exists()
