"""Print the table of results in the repository's README from the JSON files in this folder.

`python -m pwlib evaluate` writes these files; README.md in this folder has the commands.

    python benchmarks/pipeline/table.py
"""

import json
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
RUNS = {
    "CamVid, val (mean of 3 seeds)": ["camvid-0", "camvid-1", "camvid-2"],
    "Scenes, test (mean of 3 seeds)": ["scenes-0", "scenes-1", "scenes-2"],
}
ROWS = [
    ("stage 1: network", "stage1", "unary"),
    ("stage 1 + default CRF", "stage1", "default_crf"),
    ("stage 2: CRF learned", "stage2", "crf"),
    ("stage 3: both together", "stage3", "crf"),
]
SCORES = ("miou", "pixel_accuracy", "boundary_iou")


def load(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    lines = ["| | | mIoU | pixel accuracy | boundary IoU |", "|---|---|--:|--:|--:|"]
    for title, names in RUNS.items():
        runs = [load(name) for name in names]
        for label, stage, part in ROWS:
            cells = [f"{100 * mean(run[stage][part][score] for run in runs):.1f}" for score in SCORES]
            lines.append(f"| {title} | {label} | {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
