"""What the studies of this folder share: a result file that is written after every run, and intervals over seeds."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pwlib import checkpoints
from pwlib.data import SegmentationDataset

# 97.5 % quantile of Student's t with n - 1 degrees of freedom, by n
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201}
T_975 |= {20: 2.093}


def parser(description: str, out: Path | None, seeds: Sequence[int] = range(8)) -> argparse.ArgumentParser:
    """The arguments of every study; the study itself takes one thread, so that several can run side by side."""
    torch.set_num_threads(1)
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--seeds", type=int, nargs="*", default=list(seeds))
    result.add_argument("--out", type=Path, default=out)
    result.add_argument("--table", action="store_true", help="print the tables of the stored results and stop")
    return result


class Study:
    """A JSON file with one entry under "runs" for every finished run; several processes may add to it.

    Args:
        path: of the file. If it exists, its settings must be equal.
        settings: everything that decides the results, ready for JSON.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.about = {"commit": commit(), "machine": machine(), "command": command()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._content()

    def _content(self) -> dict[str, Any]:
        content = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {"settings": self.settings}
        if content["settings"] != self.settings:
            raise SystemExit(f"{self.path} was made with other settings; move it away, or name another --out")
        return {"runs": {}} | content

    @property
    def runs(self) -> dict[str, Any]:
        return self._content()["runs"]

    def measure(self, key: str, run: Callable[[], dict[str, Any]]) -> None:
        """Store what `run` returns, with the minutes of CPU time that it took, unless `key` is already stored."""
        if key not in self.runs:
            start = time.process_time()
            row = run()
            self.add(key, row | {"minutes": round((time.process_time() - start) / 60, 2)})

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Store a run with the commit, machine and command that it was made with."""
        import fcntl  # not on Windows

        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self._content()
            content["runs"][key] = row | self.about
            checkpoints.save_json(self.path, content)


def machine() -> str:
    """The processor's architecture and vector instructions, threads and the version of PyTorch."""
    bfloat16 = ", bfloat16" * torch.cpu.get_capabilities().get("avx512_bf16", False)
    vectors = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{bfloat16}"
    return f"{vectors}, {torch.get_num_threads()} thread(s), torch {torch.__version__.split('+')[0]}"


def commit() -> str:
    """The commit of the code, with "+" if tracked Python files differ from it; "" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno", "--", ":/*.py"))


def split_of(data: SegmentationDataset) -> str:
    """The number of images, and a digest of their names by which the split can be recognised."""
    digest = hashlib.sha256("\n".join(data.names).encode()).hexdigest()[:8]
    return f"{len(data)} images, {digest}"


def command() -> str:
    """The command line, as a reader would type it in the repository's root."""
    root, script = Path(__file__).parents[1], Path(sys.argv[0]).resolve()
    script = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(script), *sys.argv[1:]])


def settings_searched(default: dict[str, float], ranges: dict[str, list[float]], count: int) -> list[dict[str, float]]:
    """`count` settings of a CRF: the default one, and others drawn uniformly in the logarithm of each parameter."""
    draw, found = random.Random(0), [default]
    while len(found) < count:
        found.append({k: round(math.exp(draw.uniform(math.log(a), math.log(b))), 3) for k, (a, b) in ranges.items()})
    return found


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (Student's t); nan for one value."""
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), half


def cell(values: list[float], *, sign: bool = False, digits: int = 1) -> str:
    """Format `mean_and_half` for a table; the mean alone for one value."""
    mean, half = mean_and_half(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"
