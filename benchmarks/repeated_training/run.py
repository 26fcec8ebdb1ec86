"""Repeat the training and the ablations of notebook 07 with several seeds.

    python benchmarks/repeated_training/run.py              half a CPU minute a seed, ten seeds
    python benchmarks/repeated_training/run.py --table

Executes the notebook's own cells up to the table of ablations, with another value of SEED, in the quick profile. The
seed decides the initial weights, the augmentation and the order of the images; training, held-out, validation and test
scenes and the bootstrap draws are the same in all runs. Writes result.json after every seed and continues where it was
stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, parser

HERE = Path(__file__).parent
NOTEBOOK = HERE.parents[1] / "notebooks" / "07_evaluation.ipynb"
SKIPPED = {"exercise", "check", "nbval-skip"}


def measure(seed: int) -> dict:
    """Train with a seed; return the scores of the learned CRF and the differences of its ablations, in points."""
    variables = {}
    for part in nbformat.read(NOTEBOOK, 4).cells:
        if part.cell_type == "code" and not SKIPPED & {*part.metadata.get("tags", [])}:
            source, found = re.subn(r"^SEED = 0\b", f"SEED = {seed}", part.source, flags=re.M)
            variables["seeded"] = variables.get("seeded", 0) + found
            exec(source, variables)
        if "results" in variables:
            break
    if variables["seeded"] != 1:
        raise ValueError(f"{NOTEBOOK.name} sets SEED = 0 {variables['seeded']} times; expected once")
    return {
        "seed": seed,
        "miou": round(variables["score"].item(), 3),
        "interval": [round(end, 3) for end in variables["interval"](variables["drawn"])],
        "variants": {
            title: {"difference": round(difference, 3), "paired": [round(end, 3) for end in paired]}
            for title, (difference, paired, _) in variables["results"].items()
        },
    }


def table(runs: dict[str, dict]) -> str:
    """Return a markdown table: over the seeds, mean and deviation of the differences, and signs of the intervals."""
    lines = [
        "| variant | mean difference | standard deviation | width over images | higher, lower | above 0, below 0 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for title in next(iter(runs.values()))["variants"]:
        found = [run["variants"][title] for run in runs.values()]
        values = [entry["difference"] for entry in found]
        width = statistics.mean(entry["paired"][1] - entry["paired"][0] for entry in found)
        cells = [cell(values, sign=True), f"{statistics.stdev(values):.1f}", f"{width:.1f}"]
        cells.append(f"{sum(v > 0 for v in values)}, {sum(v < 0 for v in values)}")
        low, high = zip(*(entry["paired"] for entry in found), strict=True)
        cells.append(f"{sum(end > 0 for end in low)}, {sum(end < 0 for end in high)}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    given = parser(__doc__, HERE / "result.json", seeds=range(10)).parse_args()
    os.environ["PWLIB_PROFILE"] = "quick"
    study = Study(given.out, {"notebook": NOTEBOOK.name, "profile": "quick"})
    for seed in () if given.table else given.seeds:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            study.measure(f"seed {seed}", lambda seed=seed: measure(seed))
        print(f"seed {seed}: mIoU {study.runs[f'seed {seed}']['miou']:.1f} %", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
