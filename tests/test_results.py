"""The stored results that notebooks read are found in a checkout and packaged for a wheel."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from notebook_rules import ROOT

from pwlib.course import results

BENCHMARKS = ROOT / "benchmarks"


def test_results_are_the_benchmarks_files():
    expected = json.loads((BENCHMARKS / "three_stages" / "result.json").read_text("utf-8"))
    assert results.stored_results("three_stages/result.json") == expected


def test_a_missing_file_is_named_with_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"'nothing.json' are stored; expected one of .*context/grid.json"):
        results.stored_results("nothing.json")


def test_a_build_holds_every_result_a_notebook_reads(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path, "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    names = {
        name
        for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")
        for name in re.findall(r'stored_results\(\\"([^"]+)\\"\)', path.read_text("utf-8"))
    }
    assert names
    for name in names:
        packaged = tmp_path / "pwlib" / "course" / "stored" / name
        assert packaged.read_bytes() == (BENCHMARKS / name).read_bytes()


@pytest.mark.slow
def test_bench_in_an_installed_package_asks_for_a_checkout(tmp_path):
    shutil.copytree(ROOT / "pwlib", tmp_path / "pwlib", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pwlib", "bench", "crf"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: bench needs a checkout of the project") and done.stderr.count("\n") == 1
