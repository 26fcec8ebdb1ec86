"""The stored results that notebooks read are found in a checkout and packaged for a wheel."""

import json
import re
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
    with pytest.raises(FileNotFoundError, match=r"'nothing.json' are stored; expected one of .*context/result.json"):
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
