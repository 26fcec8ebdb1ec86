"""Measure a contextual CRF on the features of a pretrained network, on CamVid drives that took no part in training.

The network is that of stage 1 of benchmarks/drives (DeepLab-LargeFOV from ImageNet features, 180x240 px) and stays
fixed. Its frames, without augmentation, train the pairwise terms (piecewise, 10 epochs of AdamW). Inference counts them
as a tree or reparametrised, with the weights 0 (the network), 0.1, 0.25, 0.5 and 1, without and with the default dense
CRF. The weight is chosen on every second frame of the drive that is held out for stage 2; the left-out drive and val
are scored.

    python benchmarks/drives/run.py --root data/camvid --network pretrained --hold drive --drives 0001TP --seeds 0
    python benchmarks/context/pretrained.py --root data/camvid --drives 0001TP --seeds 0    20 CPU minutes a run
    python benchmarks/context/pretrained.py --table

The first command leaves the network in runs/drives. Results are stored in pretrained.json after every run.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "drives"))
from run import DRIVES, NETWORKS, WORK, split
from stage2 import load_stage1
from study import Study, cell, parser, split_of

from pwlib.context import ContextualCRF
from pwlib.data import SegmentationDataset, load
from pwlib.losses import balanced_weights
from pwlib.metrics import SegmentationScores
from pwlib.networks import cell_labels
from pwlib.tools.runs import build_model

HERE = Path(__file__).parent
PROFILE = NETWORKS["pretrained"]
WEIGHTS, COUNTINGS = (0.1, 0.25, 0.5, 1.0), ("tree", "reparametrised")
SETTINGS = {
    "network": PROFILE,
    "context": {"hidden": 64, "neighbours": 24},
    "weights": [0, *WEIGHTS],
    "epochs": 10,
    "batch": 4,
    "learning_rate": 1e-3,
}


class Maps:
    """Images, labels and the network's coarse maps of a data set, computed once."""

    @torch.no_grad()
    def __init__(self, unary: torch.nn.Module, data: SegmentationDataset):
        unary.eval()
        self.image, self.label = (torch.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
        self.features = torch.cat([unary.features(x) for x in self.image.split(4)])  # [N, C, h, w]
        self.logits = torch.cat([unary.head(f) for f in self.features.split(4)])  # [N, K, h, w]

    def batches(self, size: int, order: Tensor | None = None):
        parts = (self.image, self.label, self.features, self.logits)
        order = torch.arange(len(self.image)) if order is None else order
        return ([part[rows] for part in parts] for rows in order.split(size))


def train(context: ContextualCRF, maps: Maps, cell_size: int, class_weights: Tensor) -> list[float]:
    """Train the pairwise terms piecewise; returns the mean loss of each epoch."""
    steps = SETTINGS["epochs"] * -(-len(maps.image) // SETTINGS["batch"])
    optimizer = torch.optim.AdamW(context.networks.parameters(), SETTINGS["learning_rate"], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SETTINGS["learning_rate"], total_steps=steps)
    history = []
    for _ in range(SETTINGS["epochs"]):
        losses = []
        for _, label, features, logits in maps.batches(SETTINGS["batch"], torch.randperm(len(maps.image))):
            cells = cell_labels(label, logits.shape[-2:], cell_size=cell_size)  # [B, h, w]
            loss = context.pair_loss(logits, features, cells, class_weights=class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        history.append(round(sum(losses) / len(losses), 4))
    return history


@torch.no_grad()
def score(model: torch.nn.Module, maps: Maps, names: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """{counting, weight: {dense CRF: {"miou", "pixel_accuracy"}}}, in per cent."""
    variants = {"network": None} | {f"{c}, {w:g}": (c, w) for c, w in itertools.product(COUNTINGS, WEIGHTS)}
    found = {name: {dense: SegmentationScores(len(names), names) for dense in ("none", "default")} for name in variants}
    for image, label, features, logits in maps.batches(4):
        for name, variant in variants.items():
            scores = logits
            if variant:
                model.context.counting = variant[0]
                model.context.weight.fill_(variant[1])
                scores = model.context(logits, features)
            pixels = model.to_pixels(scores, image.shape[-2:])
            found[name]["none"].update(pixels.argmax(1), label)
            found[name]["default"].update(model.crf(pixels, image).argmax(1), label)
    keys = ("miou", "pixel_accuracy")
    results = {name: {dense: s.result() for dense, s in dense_scores.items()} for name, dense_scores in found.items()}
    return {n: {d: {k: round(100 * s[k], 2) for k in keys} for d, s in by.items()} for n, by in results.items()}


def run(root: str, drive: str, seed: int) -> dict:
    whole, val = (load("camvid", name, root, size=PROFILE["size"], cache=True) for name in ("train", "val"))
    train_set = whole.subset([i for i, group in enumerate(whole.groups) if group != drive])
    left_out = whole.subset([i for i, group in enumerate(whole.groups) if group == drive])
    fit, held = split(train_set, "drive")
    torch.manual_seed(seed)
    model = build_model(PROFILE, whole.num_classes)
    folder = WORK / f"pretrained-{'+'.join(sorted(set(fit.groups)))}-drive-{seed}"
    load_stage1(folder, model, PROFILE["epochs"][0])
    model.requires_grad_(False)
    model.context = ContextualCRF(whole.num_classes, model.unary.feature_channels, **SETTINGS["context"])
    weights = balanced_weights(fit.pixel_counts()[:-1], power=PROFILE["class_balance"])
    loss = train(model.context, Maps(model.unary, fit), model.unary.cell_size, weights)
    sets = {"held": held.subset(range(0, len(held), 2)), "left out": left_out, "val": val}
    scores = {name: score(model, Maps(model.unary, data), whole.class_names) for name, data in sets.items()}
    splits = {name: split_of(data) for name, data in ({"fit": fit} | sets).items()}
    return {"drive": drive, "seed": seed, "splits": splits, "loss": loss, "scores": scores}


def chosen(row: dict, counting: str, dense: str) -> str:
    """The variant of a counting with the best mIoU on held-out frames; the network, if none is better."""
    names = ["network", *(f"{counting}, {weight:g}" for weight in WEIGHTS)]
    return max(names, key=lambda name: row["scores"]["held"][name][dense]["miou"])


def table(runs: dict[str, dict]) -> str:
    """Markdown: the network's scores, and differences to it with weight 1 and with the chosen weight."""
    head = ("tree, weight 1", "reparametrised, weight 1", "tree, chosen", "reparametrised, chosen")
    lines = [f"| scored | dense CRF | seeds | network | {' | '.join(head)} | chosen weights |"]
    lines.append("|---|---|--:|--:|" + "--:|" * len(head) + "---|")
    for drive, place, dense in itertools.product(DRIVES, ("left out", "val"), ("none", "default")):
        rows = [row for row in runs.values() if row["drive"] == drive]
        if not rows:
            continue

        def values(names: list[str], rows=rows, place=place, dense=dense) -> list[float]:
            scores = [row["scores"][place] for row in rows]
            return [s[name][dense]["miou"] - s["network"][dense]["miou"] for s, name in zip(scores, names, strict=True)]

        best = {counting: [chosen(row, counting, dense) for row in rows] for counting in COUNTINGS}
        network = cell([row["scores"][place]["network"][dense]["miou"] for row in rows])
        cells = [cell(values([f"{counting}, 1"] * len(rows)), sign=True) for counting in COUNTINGS]
        cells += [cell(values(best[counting]), sign=True) for counting in COUNTINGS]
        weights = "; ".join(
            ", ".join(name.split(", ")[-1].replace("network", "0") for name in best[c]) for c in COUNTINGS
        )
        name = f"drive {drive}" if place == "left out" else f"val, without {drive}"
        lines.append(f"| {name} | {dense} | {len(rows)} | {network} | {' | '.join(cells)} | {weights} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "pretrained.json", seeds=range(1))
    arguments.add_argument("--root", default="data/camvid")
    arguments.add_argument("--drives", nargs="+", default=list(DRIVES), choices=DRIVES)
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    for seed, drive in () if given.table else itertools.product(given.seeds, given.drives):
        study.measure(f"{drive}, seed {seed}", partial(run, given.root, drive, seed))
        print(f"{drive}, seed {seed}", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
