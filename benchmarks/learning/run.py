"""Measure what a dense CRF learns behind a frozen network, until it has converged and for eight orders of the batches.

The code of notebook 04's stage 2: Adam with a constant rate of 0.1, three images of 32x48 px a step, five mean-field
iterations, exact filtering. The network is trained on 48 scenes ("fit") once and frozen. Four ways to learn:

    held, full matrix    likelihood of the marginals on 24 scenes that the network was not trained on
    held, Potts          the same with a fixed compatibility: only weights and bandwidths are learned
    fit, full matrix     on the scenes that the network was trained on
    held, piecewise      the piecewise likelihood of sampled pairs instead of that of the marginals

After 0 to 300 steps the CRF is scored on 20 scenes that nothing was trained on: accuracy, negative log-likelihood (NLL)
and expected calibration error (ECE, 15 bins). "calibrated" is the NLL after division of log q by a temperature that is
fitted to the held-out scenes. A seed decides the order of the batches and the sampled pairs.

    python benchmarks/learning/run.py            about 40 CPU minutes on one core; continues where it was stopped
    python benchmarks/learning/run.py --table    prints the tables from result.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, parser

from pwlib.course.piecewise import structured
from pwlib.crf import DenseCRF
from pwlib.data import VOID, load
from pwlib.objective import fit_temperature

HERE = Path(__file__).parent
WAYS = {
    "held, full matrix": {"on": "held"},
    "held, Potts": {"on": "held", "compatibility": False},
    "fit, full matrix": {"on": "fit"},
    "held, piecewise": {"on": "held", "loss": "piecewise"},
}
SETTINGS = {
    "size": [32, 48],
    "images": {"fit": 48, "held": 24, "test": 20},
    "network_steps": 350,
    "steps": 300,
    "scored_after": [0, 25, 50, 100, 150, 200, 250, 300],
    "batch": 3,
    "rate": 0.1,
    "iterations": 5,
    "pairs": 2048,
    "crf": {"theta_alpha": 8.0, "theta_beta": 10.0, "theta_gamma": 1.0, "w_bilateral": 3.0, "w_spatial": 1.0},
}
# Names in the tables: "new images" are the held-out ones, "training images" those that the network was trained on.
WORDS = {
    "held, full matrix": "new images, full matrix",
    "held, Potts": "new images, Potts",
    "fit, full matrix": "training images, full matrix",
    "held, piecewise": "new images, piecewise",
}
# Columns of the tables and their digits; the last two are weights of kernels times the strength of the compatibility
COLUMNS = {"accuracy": 1, "NLL": 3, "ECE": 1, "calibrated NLL": 3, "bilateral strength": 2, "spatial strength": 3}


def prepare() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Images, labels and the frozen network's logits of the three sets."""
    torch.manual_seed(0)
    counts, images, labels = SETTINGS["images"], {}, {}
    train, val = (load("scenes", split, size=tuple(SETTINGS["size"])) for split in ("train", "val"))
    sources = {
        "fit": (train, range(counts["fit"])),
        "held": (train, range(counts["fit"], counts["fit"] + counts["held"])),
        "test": (val, range(counts["test"])),
    }
    for name, (dataset, numbers) in sources.items():
        parts = zip(*(dataset[i] for i in numbers), strict=True)
        images[name], labels[name] = (torch.stack(part) for part in parts)
    layers = [(3, 24, 5, 2, 1), (24, 48, 3, 2, 1), (48, 64, 3, 1, 2), (64, 64, 3, 1, 4)]
    network = nn.Sequential(
        *(
            layer
            for a, b, kernel, stride, dilation in layers
            for layer in (nn.Conv2d(a, b, kernel, stride, dilation * (kernel // 2), dilation), nn.ReLU())
        ),
        nn.Conv2d(64, train.num_classes, 1),
    )

    def logits(image: Tensor) -> Tensor:
        return F.interpolate(network(image - 0.5), size=image.shape[-2:], mode="bilinear")

    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SETTINGS["network_steps"]):
        chosen = torch.randperm(counts["fit"], generator=generator)[:10]
        loss = F.cross_entropy(logits(images["fit"][chosen]), labels["fit"][chosen], ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return images, labels, {name: logits(batch) for name, batch in images.items()}


def quality(log_p: Tensor, label: Tensor) -> list[float]:
    """Accuracy, NLL in nats a pixel, and ECE over 15 bins of confidence, of log-probabilities [N, K]."""
    confidence, prediction = log_p.exp().max(1)
    right = (prediction == label).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add(0, bins, confidence.double() - right)
    nll = F.nll_loss(log_p, label).item()
    return [round(right.mean().item(), 5), round(nll, 5), round(gaps.abs().sum().item() / len(label), 5)]


class Judge:
    """Scores a CRF, or the network if it is None, on a set."""

    def __init__(self, images, labels, logits):
        self.images, self.labels, self.logits = images, labels, logits

    @torch.no_grad()
    def log_p(self, crf: DenseCRF | None, name: str) -> tuple[Tensor, Tensor]:
        z, x, y = self.logits[name], self.images[name], self.labels[name]
        log_p = (
            z.log_softmax(1) if crf is None else torch.cat([crf(a[None], b[None]) for a, b in zip(z, x, strict=True)])
        )
        known = y.flatten() != VOID
        return log_p.movedim(1, -1).flatten(0, 2)[known], y.flatten()[known]

    def __call__(self, crf: DenseCRF | None) -> list[float]:
        """Accuracy, NLL and ECE on the test images, and NLL with a temperature fitted on "held"."""
        temperature = fit_temperature(*self.log_p(crf, "held"))
        log_p, label = self.log_p(crf, "test")
        calibrated = F.nll_loss((log_p / temperature).log_softmax(1), label).item()
        return [*quality(log_p, label), round(calibrated, 5), round(temperature, 3)]


def new_crf(classes: int) -> DenseCRF:
    return DenseCRF(classes, **SETTINGS["crf"], iterations=SETTINGS["iterations"], filtering="exact")


def learn(way: dict, seed: int, judge: Judge) -> dict:
    """Train once. Rows of "curve": step, accuracy, NLL, ECE, calibrated NLL, temperature, and then the parameters: w
    spatial, w bilateral, theta alpha, beta, gamma, mean of mu off its diagonal less that on it.
    """
    images, labels, logits, on = judge.images, judge.labels, judge.logits, way["on"]
    crf = new_crf(logits["fit"].shape[1])
    crf.compatibility.requires_grad_(way.get("compatibility", True))
    optimizer = torch.optim.Adam([p for p in crf.parameters() if p.requires_grad], lr=SETTINGS["rate"])
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(SETTINGS["steps"] + 1):  # the last one is only scored
        if step in SETTINGS["scored_after"]:
            thetas = (crf.log_theta_alpha, crf.log_theta_beta, crf.log_theta_gamma)
            mu = crf.compatibility.detach()
            strength = (mu - mu.diag()[None]).sum().item() / (len(mu) ** 2 - len(mu))
            parameters = [*crf.log_w.exp().tolist(), *(t.exp().item() for t in thetas), strength]
            curve.append([step, *judge(crf), *(round(p, 3) for p in parameters)])
        chosen = torch.randperm(len(images[on]), generator=generator)[: SETTINGS["batch"]]
        z, x, y = logits[on][chosen], images[on][chosen], labels[on][chosen]
        if way.get("loss") == "piecewise":
            loss = structured(z, y, x, crf, pairs=SETTINGS["pairs"], generator=generator)
        else:
            loss = F.nll_loss(crf(z, x), y, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"curve": curve, "fit": quality(*judge.log_p(crf, "fit")), "held": quality(*judge.log_p(crf, "held"))}


def shown(row: list[float]) -> list[float]:
    """The values of COLUMNS from a row of a curve."""
    return [100 * row[1], row[2], 100 * row[3], row[4], row[7] * row[11], row[6] * row[11]]


def table(runs: dict[str, dict]) -> str:
    """Markdown: all ways after the last step; then after four numbers of steps, and differences."""
    last, head = SETTINGS["steps"], " | ".join(COLUMNS)
    weights = [SETTINGS["crf"][key] for key in ("w_spatial", "w_bilateral")]
    default = shown([0, *runs["default CRF"]["test"], *weights, 0, 0, 0, 1])
    curves: dict[str, dict] = {way: {} for way in WAYS}  # {way: {order: {step: values}}}
    for run in runs.values():
        if "way" in run:
            curves[run["way"]][run["seed"]] = {row[0]: shown(row) for row in run["curve"]}

    def line(name: str, rows: list[list[float]], sign: bool = False) -> str:
        columns = zip(map(list, zip(*rows, strict=True)), COLUMNS.values(), strict=False)  # a network has no kernels
        values = [cell(values, sign=sign, digits=d if max(map(abs, values)) < 100 else 0) for values, d in columns]
        return f"| {name} | {' | '.join(values + [''] * (len(COLUMNS) - len(values)))} |"

    lines = [f"| learned on | {head} |", "|---|" + "--:|" * len(COLUMNS)]
    accuracy, nll, ece, calibrated, _ = runs["network"]["test"]
    lines.append(line("network", [[100 * accuracy, nll, 100 * ece, calibrated]]))
    lines.append(line("default CRF", [default]))
    for way, orders in curves.items():
        if orders:
            lines.append(line(WORDS[way], [curve[last] for curve in orders.values()]))
    lines += ["", f"| learned on | orders | steps | {head} |", "|---|--:|--:|" + "--:|" * len(COLUMNS)]
    for way, orders in curves.items():
        for step in (25, 100, 200, last) if orders else ():
            lines.append(line(f"{WORDS[way]} | {len(orders)} | {step}", [curve[step] for curve in orders.values()]))
    lines += ["", f"| difference by order | steps | {head} |", "|---|--:|" + "--:|" * len(COLUMNS)]
    new, fit, potts = (curves[way] for way in ("held, full matrix", "fit, full matrix", "held, Potts"))
    initial = {order: dict.fromkeys(SETTINGS["scored_after"], default) for order in potts}
    pairs = {
        "training images - new images, full matrix": (fit, new),
        "Potts - full matrix, new images": (potts, new),
        "new images, Potts - default CRF": (potts, initial),
    }
    for name, (one, other) in pairs.items():
        for step in SETTINGS["scored_after"][1:] if one.keys() & other.keys() else ():
            both = [(one[order][step], other[order][step]) for order in one.keys() & other.keys()]
            rows = [[a - b for a, b in zip(*pair, strict=True)] for pair in both]
            lines.append(line(f"{name} | {step}", rows, sign=True))
    for way, orders in curves.items():
        for since in (100, 200) if orders else ():
            rows = [[a - b for a, b in zip(curve[last], curve[since], strict=True)] for curve in orders.values()]
            lines.append(line(f"{WORDS[way]}: change | {since} to {last}", rows, sign=True))
    return "\n".join(lines)


def main() -> None:
    given = parser(__doc__, HERE / "result.json", range(1, 9)).parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        judge = Judge(*prepare())
        for name, crf in (("network", None), ("default CRF", new_crf(judge.logits["fit"].shape[1]))):
            if name not in study.runs:
                sets = {split: quality(*judge.log_p(crf, split)) for split in ("fit", "held")}
                study.add(name, {**sets, "test": judge(crf)})
        for seed in given.seeds:
            for way, options in WAYS.items():
                key = f"{way}, order {seed}"
                if key not in study.runs:
                    start = time.process_time()
                    row = {"way": way, "seed": seed, **learn(options, seed, judge)}
                    row["minutes"] = round((time.process_time() - start) / 60, 2)
                    study.add(key, row)
                    print(key, row["curve"][-1], row["minutes"], "minutes", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
