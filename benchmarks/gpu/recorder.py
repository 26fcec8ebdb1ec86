"""A pytest plugin that keeps a JSON file of what has run so far: seconds, outcomes and failures of every file.

    PYTHONPATH=benchmarks/gpu python -m pytest -p recorder --record tests.json tests

The file is rewritten at most once a second and at the end, so that a run that is stopped leaves what it knew.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path


def plain(text: str) -> str:
    """The end of a report, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)[-2000:]


class Recorder:
    def __init__(self, path: Path):
        self.path, self.start, self.written = path, time.time(), 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.outcomes: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report) -> None:
        name = Path(report.nodeid.split("::")[0]).name
        self.seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name][report.outcome] += 1
        if report.failed:
            self.failures.append({"test": report.nodeid, "when": report.when, "text": plain(report.longreprtext)})
        if time.time() - self.written > 1:
            self.write(None)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failures.append({"test": report.nodeid, "when": "collect", "text": plain(report.longreprtext)})

    def pytest_sessionfinish(self, exitstatus) -> None:
        self.write(int(exitstatus))

    def write(self, exit_status: int | None) -> None:
        """Write the file; an exit status of None means that the run is not finished."""
        self.written = time.time()
        files = {n: {"minutes": s / 60, **self.outcomes[n]} for n, s in sorted(self.seconds.items())}
        content = {"exit_status": exit_status, "wall_seconds": self.written - self.start, "files": files}
        self.path.write_text(json.dumps(content | {"failures": self.failures}, indent=1) + "\n")


def pytest_addoption(parser) -> None:
    parser.addoption("--record", metavar="FILE", help="JSON file to write")


def pytest_configure(config) -> None:
    path = config.getoption("--record")
    if path and not hasattr(config, "workerinput"):  # under xdist only the process that sees all reports writes
        config.pluginmanager.register(Recorder(Path(path)))
