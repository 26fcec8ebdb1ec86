"""`make publish-config` writes the project's address everywhere, removes it without a trace, and accepts no other."""

import json
import shutil
import subprocess
import sys

import pytest
from notebook_rules import ROOT

from pwlib import __version__

FILES = [
    "pyproject.toml",
    "README.md",
    "CITATION.cff",
    "pwlib/__init__.py",
    "docs/publish.py",
    ".github/ISSUE_TEMPLATE",
]


@pytest.fixture
def project(tmp_path):
    """The files that hold the address, without one, in a repository of their own."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        shutil.copy(path, tmp_path / "notebooks")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert publish(tmp_path, "--none").returncode == 0
    return tmp_path


def publish(project, *arguments):
    command = [sys.executable, project / "docs" / "publish.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def contents(project):
    return {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and ".git/" not in str(path)}


def test_an_address_is_written_everywhere_and_removed_without_a_trace(project):
    before = contents(project)
    assert publish(project, "--check").returncode == 0
    done = publish(project, "some-lab/our-course")
    assert done.returncode == 0, done.stderr
    assert publish(project, "--check").returncode == 0
    notebooks = sorted((project / "notebooks").glob("*.ipynb"))
    assert len(notebooks) >= 9
    for path in notebooks:
        notebook = json.loads(path.read_text("utf-8"))
        title = "".join(notebook["cells"][0]["source"])
        link = f"https://colab.research.google.com/github/some-lab/our-course/blob/v{__version__}/notebooks/{path.name}"
        assert title.splitlines()[2].endswith(f"({link})")
        first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        install = "".join(first["source"])
        assert f"git+https://github.com/some-lab/our-course@v{__version__}" in install
        assert "[widgets]" in install and "jupyterlab" not in install and "restart the session" in install
    for name in ("pyproject.toml", "README.md", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"):
        assert "some-lab/our-course" in (project / name).read_text("utf-8"), name
    assert publish(project, "--none").returncode == 0
    assert contents(project) == before


@pytest.mark.parametrize(
    "line",
    [
        "%pip install git+https://github.com/somebody/else",
        "https://colab.research.google.com/github/somebody/else/blob/main/a.ipynb",
        "https://github.com/somebody/pwlib",
        "https://mybinder.org/v2/gh/somebody/else/HEAD",
        "pip install pwlib",
        'pip install -q "pwlib[notebooks]"',
    ],
)
def test_another_address_is_found(project, line):
    with (project / "README.md").open("a") as file:
        file.write(line + "\n")
    done = publish(project, "--check")
    assert done.returncode == 1 and "README.md, line" in done.stderr, done.stderr


def test_a_notebook_with_an_old_first_cell_is_found(project):
    path = project / "notebooks" / "00_why_structure.ipynb"
    path.write_text(path.read_text("utf-8").replace("not installed", "missing"), "utf-8")
    done = publish(project, "--check")
    assert done.returncode == 1 and "00_why_structure.ipynb disagrees" in done.stderr


def test_what_is_not_an_address_is_refused(project):
    done = publish(project, "https://github.com/some-lab/our-course")
    assert done.returncode == 2 and "expected owner/name" in done.stderr
