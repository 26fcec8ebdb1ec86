"""Measure how soon a contextual CRF reaches a target score: piecewise, and through 1, 3, 5, 10 mean-field iterations.

The network of `benchmarks/context` with a receptive field of 10 px is trained on Scenes and then fixed; its features
are pooled to the size of the map. Each method trains its own `ContextualCRF` on them, from the same initial values and
with the same batches in the same order. The methods take turns step by step, so that other load on the machine affects
all of them. Time is each method's own CPU time without scoring. Every few steps the mean IoU of the marginals, after 3
mean-field iterations for all methods, is computed over the cells of held-out scenes. The target is the lowest of the
methods' best scores, less 1 point, so that all of them reach it. Each method is run with all learning rates; the one
with which it reaches the target first counts.

    python benchmarks/piecewise/target.py --pools 2             CPU minutes on one core: 8; maps of 8x12 cells
    python benchmarks/piecewise/target.py --pools 1 --seeds 0   likewise 10; maps of 16x24 cells

target.json is written after every seed, target.svg at the end; --table prints the table of the stored results only.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, parser

from pwlib.context import ContextualCRF
from pwlib.data import load
from pwlib.metrics import ConfusionMatrix
from pwlib.networks import cell_labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SETTINGS = {
    "train_images": 96,
    "scored_images": 48,
    "batch": 4,
    "hidden": 32,
    "neighbours": 24,
    "network_epochs": 8,
    "learning_rates": [3e-3, 1e-2],
    "score_every": 3,
    "steps": 60,
}
CONTENDERS = {"piecewise": None, **{f"mean field, {n}": n for n in (1, 3, 5, 10)}}


def build_network(seed: int) -> torch.nn.Module:
    """The network of `benchmarks/context` with a receptive field of 10 px, with random weights."""
    spec = importlib.util.spec_from_file_location("context_benchmark", HERE.parent / "context" / "grid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    return module.LocalNet(10, module.SETTINGS["channels"], module.FIELDS["10"])


def local_network(seed: int) -> torch.nn.Module:
    """Train that network for a few epochs by cross-entropy."""
    network = build_network(seed)
    data = load("scenes", "train", length=SETTINGS["train_images"], seed=seed)
    images, labels = (torch.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for _ in range(SETTINGS["network_epochs"]):
        for chosen in torch.randperm(len(data)).split(8):
            optimizer.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen], ignore_index=255).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def maps(network: torch.nn.Module, split: str, length: int, seed: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, logits and labels of all cells; `pool` x `pool` cells of the network are averaged into one."""
    data = load("scenes", split, length=length, seed=seed)
    features, logits, labels = [], [], []
    for i in range(len(data)):
        image, label = data[i]
        one = F.avg_pool2d(network.features(image[None]), pool)
        features.append(one)
        logits.append(network.head(one))
        labels.append(cell_labels(label[None], one.shape[-2:]))
    return torch.cat(features), torch.cat(logits), torch.cat(labels)


@torch.no_grad()
def score(crf: ContextualCRF, features: Tensor, logits: Tensor, label: Tensor) -> float:
    confusion = ConfusionMatrix(10)
    for part in torch.arange(len(label)).split(16):
        confusion.update(crf(logits[part], features[part], iterations=3).argmax(1), label[part])
    return 100 * float(confusion.scores()["miou"])


def curves(seed: int, pool: int, steps: int) -> list[dict]:
    """Train every method with every learning rate; return its scores and CPU seconds."""
    network = local_network(seed)
    train = maps(network, "train", SETTINGS["train_images"], seed, pool)
    held = maps(network, "test", SETTINGS["scored_images"], seed, pool)
    torch.manual_seed(seed)
    options = {"hidden": SETTINGS["hidden"], "neighbours": SETTINGS["neighbours"]}
    first = ContextualCRF(10, train[0].shape[1], **options)
    runs = []
    for name, iterations in CONTENDERS.items():
        for rate in SETTINGS["learning_rates"]:
            crf = copy.deepcopy(first)
            optimizer = torch.optim.AdamW(crf.parameters(), lr=rate)
            runs.append((name, iterations, rate, crf, optimizer, [0.0], [round(score(crf, *held), 2)]))
    order = torch.cat([torch.randperm(len(train[2])) for _ in range(steps * SETTINGS["batch"] // len(train[2]) + 1)])
    bar = tqdm(order.split(SETTINGS["batch"])[:steps], desc=f"seed {seed}, {pool}x{pool}", unit="step", disable=None)
    for step, chosen in enumerate(bar):
        features, logits, label = (part[chosen] for part in train)
        for _, iterations, _, crf, optimizer, seconds, scores in runs:
            start = time.process_time()
            optimizer.zero_grad()
            likelihood = {"likelihood": "mean_field", "iterations": iterations} if iterations else {}
            crf.loss(logits, features, label, **likelihood).backward()
            optimizer.step()
            seconds[-1] += time.process_time() - start
            if (step + 1) % SETTINGS["score_every"] == 0 or step + 1 == steps:
                scores.append(round(score(crf, *held), 2))
                seconds.append(seconds[-1])
    height, width = train[0].shape[-2:]
    return [
        {
            "seed": seed,
            "map": f"{height}x{width}",
            "contender": name,
            "rate": rate,
            "seconds": [0.0, *(round(s, 3) for s in seconds[:-1])],
            "miou": scores,
        }
        for name, _, rate, _, _, seconds, scores in runs
    ]


def arrival(row: dict, target: float) -> float:
    """Return the CPU seconds until a run reached the target; infinity if it did not."""
    return next((s for s, m in zip(row["seconds"], row["miou"], strict=True) if m >= target), float("inf"))


def to_target(rows: list[dict]) -> tuple[float, dict[str, float]]:
    """Return the target of one seed and map, and the CPU seconds of each method with its better learning rate."""
    best = {name: max(max(r["miou"]) for r in rows if r["contender"] == name) for name in CONTENDERS}
    target = min(best.values()) - 1
    return target, {name: min(arrival(r, target) for r in rows if r["contender"] == name) for name in CONTENDERS}


def table(rows: list[dict]) -> str:
    """Markdown: time to the target and best score, as medians over the seeds; the ranges are in parentheses."""

    def over_seeds(values: list[float], sign: str = "", end: str = "") -> str:
        spread = f" ({min(values):{sign}.1f} to {max(values):{sign}.1f})" if len(values) > 1 else ""
        return f"{statistics.median(values):{sign}.1f}{end}{spread}"

    sizes = list(dict.fromkeys(row["map"] for row in rows))
    cells = {name: [] for name in ("network alone", "target", *CONTENDERS)}
    for size in sizes:
        mine = [row for row in rows if row["map"] == size]
        seeds = [[row for row in mine if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in mine)]
        found = [to_target(one) for one in seeds]
        best = [{n: max(max(r["miou"]) for r in one if r["contender"] == n) for n in CONTENDERS} for one in seeds]
        cells["network alone"] += ["", over_seeds([one[0]["miou"][0] for one in seeds])]
        cells["target"] += ["", over_seeds([target for target, _ in found])]
        cells["piecewise"].append(over_seeds([times["piecewise"] for _, times in found], end=" s"))
        cells["piecewise"].append(over_seeds([scores["piecewise"] for scores in best]))
        for name in list(CONTENDERS)[1:]:
            cells[name].append(over_seeds([times[name] / times["piecewise"] for _, times in found], end=" x"))
            cells[name].append(over_seeds([scores[name] - scores["piecewise"] for scores in best], "+"))
    titles = [f"{size}: {column}" for size in sizes for column in ("time to target", "best mIoU")]
    lines = [f"| training | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()])


def plot(rows: list[dict], path: Path) -> None:
    """Plot the curves of the first seed, each method with the learning rate that reaches the target first."""
    sizes = list(dict.fromkeys(row["map"] for row in rows))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.6 * len(sizes), 3.4), layout="constrained", squeeze=False)
    styles = zip(("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"), "os^vD", strict=True)
    styles = dict(zip(CONTENDERS, styles, strict=True))
    for axis, size in zip(axes[0], sizes, strict=True):
        mine = [row for row in rows if row["map"] == size and row["seed"] == rows[0]["seed"]]
        target, _ = to_target(mine)
        for name, (colour, marker) in styles.items():
            row = min((r for r in mine if r["contender"] == name), key=lambda r: arrival(r, target))
            axis.plot(row["seconds"], row["miou"], color=colour, marker=marker, markersize=3, label=name)
        axis.axhline(target, color="0.5", linestyle=":", label="target")
        axis.set(xlabel="CPU seconds of learning", ylabel="mIoU of cells, %", title=f"map {size}")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    plt.rcParams["svg.hashsalt"] = "pwlib"
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    arguments = parser(__doc__, HERE / "target.json", seeds=range(3))
    arguments.add_argument("--pools", type=int, nargs="+", default=[2, 1], help="2: maps of 8x12 cells; 1: of 16x24")
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    for pool, seed in () if given.table else itertools.product(given.pools, given.seeds):
        key = f"{16 // pool}x{24 // pool}, seed {seed}"
        study.measure(key, lambda seed=seed, pool=pool: {"curves": curves(seed, pool, SETTINGS["steps"])})
    rows = [row for run in study.runs.values() for row in run["curves"]]
    if not given.table:
        plot(rows, given.out.with_suffix(".svg"))
    print(table(rows))


if __name__ == "__main__":
    main()
