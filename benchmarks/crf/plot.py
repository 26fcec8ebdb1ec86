"""Draw cost against pixels and against labels from the results of `python -m pwlib bench crf`.

    python -m pwlib bench crf --peers --sizes 64x96 96x144 192x288 375x500 512x1024 1024x2048 --repeats 1 \\
        --json benchmarks/crf/pixels.json
    python -m pwlib bench crf --peers --sizes 240x320 --labels 2 11 21 50 150 --repeats 1 \\
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw(left, json.loads((HERE / "pixels.json").read_text())["rows"], "pixels")
    draw(right, json.loads((HERE / "labels.json").read_text())["rows"], "labels")
    left.set_title("21 labels")
    right.set_title("240 x 320 pixels")
    left.legend()
    plt.rcParams["svg.hashsalt"] = "pwlib"
    figure.savefig(HERE / "cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
