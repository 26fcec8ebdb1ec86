"""Measure what a training step of the contextual CRF costs: piecewise, and through 1, 3, 5, 10 mean-field iterations.

    python benchmarks/piecewise/run.py                                 about a minute; writes result.json and cost.svg
    python benchmarks/piecewise/run.py --sizes 8x12 --repeats 3 --out small.json
    python benchmarks/piecewise/run.py --table                         prints the tables of the stored result

A step computes the pairwise terms from given features, the loss, and its gradient with respect to the pairwise
networks, the logits and the features. All methods use the same graph, features, labels and networks and take turns; the
result is the median over the repeats. "network" is the part that all of them have in common: FeatMap-Net, forward and
backward, for one image that gives a map of this size. Memory is the number of bytes that autograd saves for the
backward pass, each storage counted once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import command, commit, machine

from pwlib.context import ContextualCRF
from pwlib.networks import FeatMapNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CLASSES, HIDDEN, NEIGHBOURS, BATCH = 11, 64, 24, 1
NETWORK = {"width": 0.25, "batch_norm": True, "output_stride": 8, "dilation": 1}
ITERATIONS = (1, 3, 5, 10)


def contenders(height: int, width: int) -> dict:
    """Return {name: a function that computes the loss of one step}."""
    torch.manual_seed(0)
    network = FeatMapNet(CLASSES, **NETWORK)
    crf = ContextualCRF(CLASSES, network.feature_channels, hidden=HIDDEN, neighbours=NEIGHBOURS)
    features = torch.rand(BATCH, crf.in_channels, height, width, requires_grad=True)
    logits = torch.randn(BATCH, CLASSES, height, width, requires_grad=True)
    label = torch.randint(0, CLASSES, (BATCH, height, width))
    image = torch.rand(BATCH, 3, *(round(cells * 8 / 1.2) for cells in (height, width)))
    assert network.cells(image.shape[-2:], 1.2) == (height, width)

    def through(iterations: int):
        return lambda: crf.loss(logits, features, label, "mean_field", iterations=iterations)

    steps = {"network": lambda: F.cross_entropy(network.coarse(image), label)}
    steps["piecewise"] = lambda: crf.loss(logits, features, label)
    return steps | {f"mean field, {n}": through(n) for n in ITERATIONS}


def saved_bytes(step) -> int:
    """Return the bytes that autograd saves in the forward pass of a step for its backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def seconds(step) -> float:
    start = time.perf_counter()
    step().backward()
    return time.perf_counter() - start


def measure(sizes: list[tuple[int, int]], repeats: int) -> list[dict]:
    rows = []
    for height, width in tqdm(sizes, unit="size"):
        steps = contenders(height, width)
        times = {name: [] for name in steps}
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                took = seconds(step)
                if repeat:  # the first round warms up
                    times[name].append(took)
        crf = ContextualCRF(CLASSES, 1, neighbours=NEIGHBOURS)
        for name, step in steps.items():
            milliseconds = [1000 * t for t in times[name]]
            rows.append(
                {
                    "height": height,
                    "width": width,
                    "edges": sum(len(e) for e in crf.edges(height, width).values()),
                    "contender": name,
                    "ms": round(statistics.median(milliseconds), 2),
                    "fastest_ms": round(min(milliseconds), 2),
                    "slowest_ms": round(max(milliseconds), 2),
                    "saved_mb": round(saved_bytes(step) / 1e6, 2),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: milliseconds of a piecewise step and multiples of it, then time and memory of every method."""
    lines = ["| map | piecewise | 1 iteration | 10 iterations | 10, with the network | memory, 10 iterations |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for size in dict.fromkeys((row["height"], row["width"]) for row in rows):
        here = {row["contender"]: row for row in rows if (row["height"], row["width"]) == size}
        network, unit, one, ten = (here[n] for n in ("network", "piecewise", "mean field, 1", "mean field, 10"))
        whole = (network["ms"] + ten["ms"]) / (network["ms"] + unit["ms"])
        ratios = (one["ms"] / unit["ms"], ten["ms"] / unit["ms"], whole, ten["saved_mb"] / unit["saved_mb"])
        cells = [f"{size[0]}x{size[1]}, {unit['edges']} edges", f"{unit['ms']:.0f} ms", *(f"{r:.1f} x" for r in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| map | step | median, ms | fastest to slowest, ms | kept for backward, MB |"]
    lines.append("|---|---|--:|--:|--:|")
    for row in rows:
        cells = [f"{row['height']}x{row['width']}", row["contender"], f"{row['ms']:.1f}"]
        cells += [f"{row['fastest_ms']:.1f} to {row['slowest_ms']:.1f}", f"{row['saved_mb']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    # Okabe & Ito's palette; curves differ in marker and colour.
    styles = zip(("#000000", "#56B4E9", "#009E73", "#E69F00", "#D55E00"), "os^vD", strict=True)
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != "network"]
    for (colour, marker), name in zip(styles, names, strict=True):
        mine = [row for row in rows if row["contender"] == name]
        edges = [row["edges"] for row in mine]
        for axis, key in zip(axes, ("ms", "saved_mb"), strict=True):
            axis.loglog(edges, [row[key] for row in mine], color=colour, marker=marker, label=name)
    for axis, title in zip(axes, ("milliseconds", "megabytes kept for the backward pass"), strict=True):
        axis.set(xlabel="edges", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    plt.rcParams["svg.hashsalt"] = "pwlib"
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8x12", "10x14", "15x20", "20x28"], metavar="HxW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored result and stop")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.out.read_text("utf-8"))["rows"]))
        return
    start = time.perf_counter()
    rows = measure([tuple(int(side) for side in size.split("x")) for size in given.sizes], given.repeats)
    result = {
        "machine": machine(),
        "commit": commit(),
        "command": command(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "settings": {
            "classes": CLASSES,
            "hidden": HIDDEN,
            "neighbours": NEIGHBOURS,
            "batch": BATCH,
            "network": NETWORK,
        },
        "repeats": given.repeats,
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, given.out.parent / "cost.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
