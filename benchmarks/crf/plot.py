"""Draw cost against pixels and against labels from the results of `python -m pwlib bench crf`.

    python -m pwlib bench crf --peers --sizes 64x96 96x144 192x288 375x500 512x1024 1024x2048 --repeats 3 \\
        --json benchmarks/crf/pixels.json
    python -m pwlib bench crf --peers --sizes 240x320 --labels 2 11 21 50 150 --repeats 3 \\
        --json benchmarks/crf/labels.json
    python benchmarks/crf/plot.py                 writes cost.svg beside itself
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# Okabe & Ito's palette, and a marker each, so that colour is not alone in telling them apart.
STYLE = {"lattice": ("#0072B2", "o"), "exact": ("#D55E00", "s"), "pydensecrf2": ("#000000", "^")}


def draw(axes, rows: list[dict], x: str) -> None:
    for name, (colour, marker) in STYLE.items():
        points = sorted((row["height"] * row["width"] if x == "pixels" else row[x], row) for row in _of(rows, name))
        if points:
            xs, ys = [p for p, _ in points], [row["total_ms"] / 1000 for _, row in points]
            axes.loglog(xs, ys, marker=marker, color=colour, label=name)
    axes.set(xlabel=x, ylabel="seconds, 10 iterations")
    axes.grid(alpha=0.3)


def _of(rows: list[dict], name: str) -> list[dict]:
    # Ties in x would compare dictionaries; there is one row a contender and x.
    return [row for row in rows if row["contender"] == name]


def main() -> None:
    # A panel for each result that is there.
    panels = [("pixels", "21 labels"), ("labels", "240 x 320 pixels")]
    panels = [(x, title) for x, title in panels if (HERE / f"{x}.json").exists()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, (x, title) in zip(axes[0], panels, strict=True):
        draw(panel, json.loads((HERE / f"{x}.json").read_text())["rows"], x)
        panel.set_title(title)
    axes[0, 0].legend()
    plt.rcParams["svg.hashsalt"] = "pwlib"
    figure.savefig(HERE / "cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
