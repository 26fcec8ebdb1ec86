"""Install the course into .venv; needs Python 3.10 or newer, and neither make nor anything installed.

    python install.py                    what the notebooks need
    python install.py --lab              the same, then open JupyterLab on the first notebook
    python install.py notebooks test     with further extras of pyproject.toml: test, site, bench, export, annotations

uv is used where it is installed (INSTALLER=pip: not). On Linux without an NVIDIA GPU a CPU build of PyTorch is
installed where the package index has one of torch and of torchvision; TORCH_INDEX=address names an index that has (see
"Start locally" on pytorch.org). LOCKED=1 installs the versions of constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCRIPTS = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
OPTIONAL = {"bench": "pydensecrf2 was not installed (it needs a C++ compiler); tests that compare with it are skipped."}
DEFAULT_BUILD = """\
The package index has no CPU build of torchvision that matches torch. PyTorch's default build for Linux is installed: a
download of about 3 GB with CUDA's libraries, 5 GB when installed. The CPU build avoids it: install uv, or name an
index, TORCH_INDEX=address python install.py --lab."""


def uv() -> str | None:
    return None if os.environ.get("INSTALLER") == "pip" else shutil.which("uv")


def run(*command: str | Path, quiet: bool = False) -> int:
    hidden = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if quiet else {}
    return subprocess.run([str(part) for part in command], cwd=ROOT, **hidden).returncode


def install(*packages: str) -> int:
    """Install into .venv, with a progress bar on a terminal and almost silently elsewhere."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    locked = ["--constraint", "constraints.txt"] if os.environ.get("LOCKED") else []
    if uv():
        return run(uv(), "pip", "install", "--python", PYTHON, "--torch-backend", "auto", *quiet, *locked, *packages)
    check = ["--disable-pip-version-check"]
    return run(PYTHON, "-m", "pip", "install", *check, *quiet, *locked, *packages)


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def cpu_builds(package: str) -> list[str]:
    """The versions of a package's CPU builds in the configured index, the newest first."""
    command = [PYTHON, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    listing = subprocess.run(command, capture_output=True, text=True).stdout
    return re.findall(r"(?<![\w.])[\d.]+\+cpu\b", listing.partition("Available versions:")[2])


def install_torch() -> None:
    """On Linux without a GPU, install matching CPU builds of torch and torchvision, if there are any that work."""
    index = os.environ.get("TORCH_INDEX")
    have = run(PYTHON, "-c", "import torch, torchvision", quiet=True) == 0
    if have or uv() or not (index or (sys.platform == "linux" and not has_gpu())):
        return
    if index:
        packages = ["--index-url", index, "torch", "torchvision"]
    elif versions := cpu_builds("torchvision"):
        packages = ["torch", f"torchvision=={versions[0]}"]
    else:
        print(DEFAULT_BUILD, flush=True)
        return
    if install(*packages) or run(PYTHON, "-c", "import torchvision", quiet=True):
        print("The CPU builds of torch and torchvision do not work together; the default builds replace them.")
        run(PYTHON, "-m", "pip", "uninstall", "--yes", "--quiet", "torch", "torchvision")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", default=["notebooks"], help="of pyproject.toml (default: notebooks)")
    parser.add_argument("--lab", action="store_true", help="open JupyterLab on the first notebook afterwards")
    options = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (whoever starts this may have an older one)
        found = sys.version.split()[0]
        sys.exit(f"pwlib needs Python 3.10 or newer; this is {found}. With make: make PYTHON=python3.12 lab")
    if not PYTHON.exists():
        print(f"Making {ROOT / '.venv'}", flush=True)
        make = [uv(), "venv", "--seed", "--python", sys.executable] if uv() else [sys.executable, "-m", "venv"]
        if failed := run(*make, ".venv"):
            return failed
    install_torch()
    needed = [extra for extra in options.extras if extra not in OPTIONAL]
    if failed := install("--editable", f".[{','.join(needed)}]" if needed else "."):
        return failed
    for extra in set(options.extras) & set(OPTIONAL):
        if install("--editable", f".[{extra}]"):
            print(OPTIONAL[extra])
    if options.lab:
        root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
        return run(PYTHON, "-m", "jupyter", "lab", *root, "notebooks/00_why_structure.ipynb")
    print(f"Installed. {PYTHON.relative_to(ROOT)} is the Python that has pwlib; --lab opens the notebooks.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
