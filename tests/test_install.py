"""`install.py` with stand-ins for pip and uv that record how they were called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_rules import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or Path("/proc/driver/nvidia/version").exists(), reason="for Linux without an NVIDIA GPU"
)

# Answers as .venv's Python and as uv: `index versions` from VERSIONS, imports of torch by what has been installed.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
arguments = sys.argv[1:]
with open(os.environ["LOG"], "a+") as file:
    file.seek(0)
    before = [json.loads(line) for line in file]
    file.write(json.dumps([os.path.basename(sys.argv[0]), *arguments]) + "\\n")
if "index" in arguments:
    versions = json.loads(os.environ["VERSIONS"])[arguments[arguments.index("versions") + 1]]
    print("a (1)\\nAvailable versions: " + ", ".join(versions))
if arguments[0] == "-c":
    installed = any("+cpu" in argument for call in before for argument in call)
    sys.exit(not (installed and os.environ.get("WORKS")))
"""


@pytest.fixture
def install(tmp_path):
    """Run install.py in a folder with a stand-in for its environment; return its calls, joined, and its output."""
    shutil.copy(ROOT / "install.py", tmp_path)
    tools = tmp_path / "tools"
    for path in (tmp_path / ".venv" / "bin" / "python", tools / "uv"):
        path.parent.mkdir(parents=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def run(*arguments, versions=None, path="", **environment):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment |= {"LOG": str(log), "VERSIONS": json.dumps(versions), "PATH": path}
        command = [sys.executable, tmp_path / "install.py", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [" ".join(json.loads(line)) for line in log.read_text().splitlines()], done.stdout

    run.uv = str(tools) + os.pathsep
    return run


BOTH = {"torchvision": ["0.29.1", "0.28.0+cpu", "0.28.0", "0.27.0+cpu"]}
NONE = {"torchvision": ["0.29.1", "0.28.0"]}


def test_cpu_builds_are_taken_where_the_index_has_both(install):
    calls, said = install(versions=BOTH, WORKS="1")
    (torch,) = (call for call in calls if "+cpu" in call)
    assert torch.endswith(" torch torchvision==0.28.0+cpu") and calls[-1].endswith(" --editable .[notebooks]")
    assert not any("uninstall" in call for call in calls) and "CUDA" not in said


def test_cpu_builds_that_do_not_work_are_replaced(install):
    calls, said = install(versions=BOTH)
    assert any(call.endswith("uninstall --yes --quiet torch torchvision") for call in calls)
    assert calls[-1].endswith(" --editable .[notebooks]") and "do not work together" in said


def test_the_default_build_is_announced(install):
    calls, said = install(versions=NONE)
    assert sum(" install " in call for call in calls) == 1 and "no CPU build" in said and "TORCH_INDEX" in said


def test_another_index_serves_torch_only(install):
    calls, _ = install(TORCH_INDEX="https://example.org/cpu", WORKS="1")
    first, last = (call for call in calls if " install " in call)
    assert first.endswith("--index-url https://example.org/cpu torch torchvision") and "example.org" not in last


def test_uv_is_used_where_it_is_installed(install):
    calls, _ = install("notebooks", "test", path=install.uv)
    assert "--torch-backend auto" in calls[-1] and calls[-1].endswith("--editable .[notebooks,test]")
    calls, _ = install(path=install.uv, versions=NONE, INSTALLER="pip")
    assert not any(call.startswith("uv") for call in calls)


def test_an_optional_extra_is_installed_by_itself(install):
    calls, _ = install("notebooks", "bench", versions=NONE)
    assert [call.split()[-1] for call in calls[-2:]] == [".[notebooks]", ".[bench]"]
    calls, _ = install("bench", versions=NONE)
    assert [call.split()[-1] for call in calls[-2:]] == [".", ".[bench]"]  # pip refuses ".[]"
