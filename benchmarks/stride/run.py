"""Measure what a coarse map of logits costs: two bounds, and a trained network, at output strides 4, 8, 16 and 32.

    shares     each cell has the true shares of the classes among its pixels. This is what a network predicts whose
               cells are independent estimates; it does not bound what other logits on the same map achieve.
    fitted     any logits: those of each image are fitted to its labels through the upsampling (cross-entropy, Adam).
               They show what the map can represent: no less than this, since the loss is not the score.
    network    VGG's blocks at an eighth of the width, with fc6 and fc7, trained on 240 scenes. The poolings end at the
               stride; dilations replace those behind it, so that the layers and parameters are the same at all strides.
    longer     the same network trained for 80 epochs instead of 20; seeds 0, 1 and 2 only

All are upsampled bilinearly (`resize_logits`) and scored on the same 50 validation scenes of 64x96 px. The fit doubles
its steps until mIoU gains less than 0.2 points. A seed decides initial weights, order and augmentation.

    python benchmarks/stride/run.py --seeds 0 1 2 3 4 5 6 7    CPU minutes: bounds 3, a seed 3, and 12 with "longer"
    python benchmarks/stride/run.py --table                    prints the tables from result.json

result.json is written after every run; a command that was stopped continues where it was.
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

from pwlib.data import VOID, Augment, load
from pwlib.losses import balanced_weights
from pwlib.metrics import SegmentationScores
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, resize_logits
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
STRIDES = (4, 8, 16, 32)
# Kinds of logits in result.json and their names in the tables
KINDS = {
    "shares": "class shares",
    "fitted": "fitted",
    "network": "network, 20 epochs",
    "longer": "network, 80 epochs",
}
SETTINGS = {
    "train_images": 240,
    "val_images": 50,
    "width": 0.125,
    "epochs": 20,
    "longer": {"epochs": 80, "seeds": [0, 1, 2]},
    "batch": 8,
    "learning_rate": 5e-3,
    "fit_rate": 0.3,
    "fit_steps": [100, 1600],  # the first number, doubled up to the second
    "gain": 0.2,
}


def stack(dataset) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.stack(labels)


def score(prediction: Tensor, label: Tensor, names) -> dict:
    found = SegmentationScores(len(names), names)
    found.update(prediction, label)
    found = found.result()
    row = {key: round(100 * found[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}
    return row | {"per_class_iou": {name: round(100 * iou, 1) for name, iou in found["per_class_iou"].items()}}


def shares(label: Tensor, stride: int, classes: int) -> Tensor:
    """Shares of the classes among the labelled pixels of each cell: [B, H, W] -> [B, K, H / stride, W / stride]."""
    known = (label != VOID)[:, None].float()  # [B, 1, H, W]
    one_hot = F.one_hot(label.where(label != VOID, 0), classes).movedim(-1, 1).float() * known  # [B, K, H, W]
    return F.avg_pool2d(one_hot, stride) / F.avg_pool2d(known, stride).clamp(min=1e-6)


def fitted(label: Tensor, stride: int, names) -> dict:
    """Scores of logits fitted to each image; the curve has (steps, loss in nats, mIoU)."""
    size, known = label.shape[-2:], (label != VOID).sum((1, 2))
    logits = shares(label, stride, len(names)).clamp(min=0.01).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], SETTINGS["fit_rate"])
    curve, steps = [], 0
    until, last = SETTINGS["fit_steps"]
    while True:
        for _ in range(until - steps):
            losses = F.cross_entropy(
                resize_logits(logits, size, stride=stride), label, ignore_index=VOID, reduction="none"
            )
            loss = (losses.sum((1, 2)) / known).sum()  # a mean per image: the images are independent
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps = until
        with torch.no_grad():
            row = score(resize_logits(logits, size, stride=stride).argmax(1), label, names)
        curve.append([steps, round(loss.item() / len(label), 4), row["miou"]])
        gained = curve[-1][2] - curve[-2][2] if len(curve) > 1 else 100.0
        if gained < SETTINGS["gain"] or steps == last:
            return row | {"curve": curve}
        until = 2 * steps


def network(stride: int, classes: int) -> nn.Module:
    """DeepLab-LargeFOV with another stride; fc6 reads taps 96 px apart at each of them."""
    net = DeepLabLargeFOV(classes, width=SETTINGS["width"], batch_norm=True, dropout=0.1)
    dilation, reached = 1, 1
    for block in net.blocks:
        for layer in block:
            if isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (dilation, dilation)
        halve = reached < stride
        block[-1] = nn.MaxPool2d(2, 2, ceil_mode=True) if halve else nn.MaxPool2d(3, 1, padding=1)
        reached, dilation = (2 * reached, dilation) if halve else (reached, 2 * dilation)
    net.fc6[0].dilation = net.fc6[0].padding = (96 // stride, 96 // stride)
    net.cell_size = stride
    return net


def trained(stride: int, seed: int, epochs: int, label: Tensor, image: Tensor, names) -> dict:
    data = load("scenes", "train", length=SETTINGS["train_images"])
    counts = sum(torch.bincount(data[i][1].flatten(), minlength=256)[: len(names)] for i in range(len(data)))
    torch.manual_seed(seed)
    model = PiecewiseTrainedModel(len(names), unary=network(stride, len(names)))
    trainer = PiecewiseTrainer(
        model,
        num_classes=len(names),
        learning_rate=SETTINGS["learning_rate"],
        optimizer="adamw",
        schedule="onecycle",
        class_weights=balanced_weights(counts),
        seed=seed,
        progress=False,
    )
    data = data.with_transform(Augment(scale=(0.8, 1.2)))
    loader = torch.utils.data.DataLoader(data, SETTINGS["batch"], shuffle=True, drop_last=True)
    history = trainer.train_stage1(loader, epochs)["stage1"]
    model.eval()
    with torch.no_grad():
        prediction = torch.cat([model.unary_logits(x).argmax(1) for x in image.split(10)])
    return score(prediction, label, names) | {"loss": [round(record["loss"], 3) for record in history]}


def table(runs: dict[str, dict]) -> str:
    """Markdown: what the map and the networks lose; then the scores of all kinds of logits."""

    def rows_of(stride: int, kind: str) -> list[dict]:
        return [run for run in runs.values() if (run["stride"], run["kind"]) == (stride, kind)]

    head = ["fitted", "gain of the last doubling", "100 - fitted"]
    head += [f"fitted - {KINDS[kind]}" for kind in ("network", "longer")]
    lines = ["| stride | " + " | ".join(head) + " |", "|--:|" + "--:|" * len(head)]
    for stride in STRIDES:
        for fit in rows_of(stride, "fitted"):
            gain = fit["curve"][-1][2] - fit["curve"][-2][2]
            values = [f"{fit['miou']:.1f}", f"{gain:+.1f}", f"{100 - fit['miou']:.1f}"]
            for kind in ("network", "longer"):
                below = [fit["miou"] - row["miou"] for row in rows_of(stride, kind)]
                values.append(cell(below) if below else "")
            lines.append(f"| {stride} | {' | '.join(values)} |")
    classes = ("sky", "boat", "tree", "pole")
    head = ["mIoU", "accuracy", "mIoU within 3 px of a border", *(f"IoU {name}" for name in classes)]
    lines += ["", "| stride | logits | seeds | " + " | ".join(head) + " |", "|--:|---|--:|" + "--:|" * len(head)]
    for stride in STRIDES:
        for kind, words in KINDS.items():
            rows = rows_of(stride, kind)
            if rows:
                values = [[row[key] for row in rows] for key in ("miou", "pixel_accuracy", "boundary_iou")]
                values += [[row["per_class_iou"][name] for row in rows] for name in classes]
                seeds = len(rows) if rows[0]["seed"] is not None else ""
                lines.append(f"| {stride} | {words} | {seeds} | {' | '.join(map(cell, values))} |")
    return "\n".join(lines)


def main() -> None:
    given = parser(__doc__, HERE / "result.json").parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        dataset = load("scenes", "val", length=SETTINGS["val_images"])
        names, (image, label) = dataset.class_names, stack(dataset)
        jobs = [(stride, kind, None) for stride in STRIDES for kind in ("shares", "fitted")]
        jobs += [(stride, "network", seed) for seed in given.seeds for stride in STRIDES]
        longer = [seed for seed in SETTINGS["longer"]["seeds"] if seed in given.seeds]
        jobs += [(stride, "longer", seed) for seed in longer for stride in STRIDES]
        for stride, kind, seed in jobs:
            key = f"stride {stride}, {kind}" + ("" if seed is None else f", seed {seed}")
            if key in study.runs:
                continue
            start = time.process_time()
            if kind == "shares":
                enlarged = resize_logits(shares(label, stride, len(names)), label.shape[-2:], stride=stride)
                row = score(enlarged.argmax(1), label, names)
            elif kind == "fitted":
                row = fitted(label, stride, names)
            else:
                epochs = SETTINGS["epochs"] if kind == "network" else SETTINGS["longer"]["epochs"]
                row = trained(stride, seed, epochs, label, image, names)
            row = {"stride": stride, "kind": kind, "seed": seed, **row}
            study.add(key, row | {"minutes": round((time.process_time() - start) / 60, 2)})
            print(key, row["miou"], flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
