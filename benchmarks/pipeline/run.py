"""Train and evaluate with the command line: the scores of each stage in the quick profile.

    python benchmarks/pipeline/run.py --data scenes                      3 CPU minutes a seed
    python benchmarks/pipeline/run.py --data camvid --root data/camvid   6 to 12 minutes a seed
    python benchmarks/pipeline/run.py --table                            the table of the READMEs, and differences

Each seed is `python -m pwlib train` and `evaluate` with the options that main() below gives them. Writes DATA.json in
this folder after every seed and keeps the runs in runs/pipeline. A command that was stopped continues where it was.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, parser

from pwlib.cli.parser import main as command_line
from pwlib.cli.profiles import PROFILES

HERE = Path(__file__).parent
WORK = Path("runs/pipeline")
SPLIT = {"camvid": "val", "scenes": "test"}  # the scored split
NAMES = {"camvid": "CamVid", "scenes": "Scenes"}
ROWS = [
    ("stage 1: network", "stage1", "unary"),
    ("stage 1 + default CRF", "stage1", "default_crf"),
    ("stage 2: CRF learned", "stage2", "crf"),
    ("stage 3: both together", "stage3", "crf"),
]
SCORES = ("miou", "pixel_accuracy", "boundary_iou")


def run(data: str, root: str, seed: int) -> dict:
    """Train, or continue a run that was stopped, and return the scores that `evaluate` writes."""
    folder = WORK / f"{data}-{seed}"
    options = ["--data", data, "--root", root, "--profile", "quick", "--seed", str(seed), "--out", str(folder)]
    scores = folder.with_suffix(".json")
    begun = (folder / "config.json").is_file()
    for command in (
        ["train", "--out", str(folder), "--resume"] if begun else ["train", *options],
        ["evaluate", str(folder), "--split", SPLIT[data], "--json", str(scores)],
    ):
        if code := command_line([*command, "--device", "cpu"]):
            raise SystemExit(code)
    return {"seed": seed, "scores": json.loads(scores.read_text("utf-8"))}


def stored() -> dict[str, dict]:
    """{data set: its stored runs}"""
    return {data: json.loads((HERE / f"{data}.json").read_text("utf-8"))["runs"] for data in SPLIT}


def table(found: dict[str, dict]) -> str:
    lines = ["| | | mIoU | pixel accuracy | boundary IoU |", "|---|---|--:|--:|--:|"]
    for data, runs in found.items():
        title = f"{NAMES[data]}, {SPLIT[data]} (mean of {len(runs)} seeds)"
        for label, stage, part in ROWS:
            parts = [run["scores"][stage][part] for run in runs.values()]
            cells = [f"{100 * mean(scores[name] for scores in parts):.1f}" for name in SCORES]
            lines.append(f"| {title} | {label} | {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


def differences(found: dict[str, dict]) -> str:
    """What each row of the table adds to the row before it, paired by seed."""
    lines = ["| data | added by | mIoU | pixel accuracy | boundary IoU |", "|---|---|--:|--:|--:|"]
    for data, runs in found.items():
        for (_, *before), (label, *after) in itertools.pairwise(ROWS):
            pairs = [[run["scores"][stage][part] for stage, part in (before, after)] for run in runs.values()]
            cells = [cell([100 * (two[name] - one[name]) for one, two in pairs], sign=True) for name in SCORES]
            lines.append(f"| {NAMES[data]} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, None, seeds=range(3))
    arguments.add_argument("--data", choices=tuple(SPLIT), default="scenes")
    arguments.add_argument("--root", default="data")
    given = arguments.parse_args()
    if given.table:
        print(table(stored()), differences(stored()), sep="\n\n")
        return
    settings = {"data": given.data, "scored": SPLIT[given.data], "profile": asdict(PROFILES[given.data, "quick"])}
    study = Study(given.out or HERE / f"{given.data}.json", settings)
    for seed in given.seeds:
        study.measure(f"seed {seed}", lambda seed=seed: run(given.data, given.root, seed))
    print(table({given.data: study.runs}))


if __name__ == "__main__":
    main()
