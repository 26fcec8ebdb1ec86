"""A pytest plugin that compares the minutes each notebook takes with notebooks/budget.json.

    python -m pytest -p tests.budgets --nbval-lax notebooks

Budgets are for two idle cores (cpu_minutes) or one GPU (gpu_minutes). The run fails if a notebook takes more than SLACK
times its budget plus GRACE seconds, which allows for a busy machine but not for a cell that is ten times slower.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import torch

FILE = Path(__file__).parents[1] / "notebooks" / "budget.json"
SLACK, GRACE = 4.0, 60.0


def over_budget(seconds: dict[str, float], budget: dict[str, dict], device: str) -> list[str]:
    """Return one sentence for each notebook (by stem) that took too long or has no budget."""
    late = []
    for name, took in seconds.items():
        if name not in budget:
            late.append(f"{name} has no budget in {FILE.name}")
        elif took > (limit := SLACK * 60 * budget[name][f"{device}_minutes"] + GRACE):
            late.append(f"{name} took {took:.0f} s; its budget allows at most {limit:.0f} s")
    return late


class Clock:
    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[Path(report.fspath).stem] += report.duration

    def pytest_sessionfinish(self, session):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.budget = json.loads(FILE.read_text())
        self.unit = "gpu" if device == "cuda" else "cpu"
        quick = os.environ.get("PWLIB_PROFILE", "quick") == "quick"
        self.late = over_budget(self.seconds, self.budget, self.unit) if quick else []
        if self.late and session.exitstatus == 0:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("notebook minutes")
        for name, took in sorted(self.seconds.items()):
            budget = self.budget.get(name, {}).get(f"{self.unit}_minutes", "none")
            terminalreporter.write_line(f"{name:28s} {took / 60:5.2f}   budget {budget} ({self.unit})")
        terminalreporter.write_line(f"{'sum':28s} {sum(self.seconds.values()) / 60:5.2f}")
        for sentence in self.late:
            terminalreporter.write_line(f"over budget: {sentence}", red=True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # under xdist the workers report to the main process
        config.pluginmanager.register(Clock())
