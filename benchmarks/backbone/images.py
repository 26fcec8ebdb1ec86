"""Measure how the scores depend on the number of labelled photographs, from scratch and from a pretrained backbone.

CamVid takes the part of a user's photographs. N frames, evenly spaced over two of the three training drives, are used
to train stage 1 with the settings of `train --data folder --profile quick`. Two networks are compared:

    scratch       VGG at a quarter of its width, from random weights
    pretrained    VGG at full width, whose convolutions come from a file (`--weights FILE`; see convert.py)
    scratch, long the first one, trained for about as many minutes as the second

Every run of a network sees equally many images, whatever N is. Both are scored on every second frame of two sets that
took no part in training: CamVid's val, which lies in a gap of one of the two drives (streets that were trained on), and
the third drive (streets that were not). Nothing is selected on them: the weights are those of the last epoch, and the
dense CRF has its default parameters.

    python benchmarks/backbone/images.py --root data/camvid --weights build/backbone/vgg16.pt
    python benchmarks/backbone/images.py --table

One hour on one core; images.json is written after every run, and a stopped benchmark continues where it was.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, parser

from pwlib.cli.profiles import PROFILES, pretrained
from pwlib.data import Augment, SegmentationDataset, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.tools.runs import build_model
from pwlib.tools.training import TRAINER_SETTINGS
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
UNSEEN = "0006R0"  # the drive that is left out: by day, as val
SIZE = (72, 96)
SEEN_IMAGES = {"scratch": 3200, "pretrained": 960, "scratch, long": 9600}  # image presentations of one run
COUNTS = {"scratch": (10, 20, 40, 80, 160), "pretrained": (10, 20, 40, 80), "scratch, long": (40,)}


def splits(root: str) -> tuple[SegmentationDataset, dict[str, SegmentationDataset]]:
    """The frames to train on, in order of drive and time, and the two scored sets."""
    train, val = (load("camvid", split, root, size=SIZE, cache=True) for split in ("train", "val"))
    order = sorted(range(len(train)), key=train.names.__getitem__)
    unseen = [i for i in order if train.groups[i] == UNSEEN]
    scored = {"val": val.subset(range(0, len(val), 2)), "unseen drive": train.subset(unseen[::2])}
    return train.subset([i for i in order if train.groups[i] != UNSEEN]), scored


def run(network: str, count: int, seed: int, data: SegmentationDataset, scored: dict, weights: str) -> dict:
    settings = asdict(replace(PROFILES["folder", "quick"], size=SIZE, stage1_keeps="last", context=None))
    if network == "pretrained":
        settings |= pretrained(settings, weights, batch_norm=False)
    chosen = data.subset([round((i + 0.5) * len(data) / count - 0.5) for i in range(count)])
    augment = Augment(SIZE, scale=settings["scale"], colour=settings["colour"])
    loader = DataLoader(chosen.with_transform(augment), batch_size=settings["batch"], shuffle=True)
    epochs = SEEN_IMAGES[network] // count
    torch.manual_seed(seed)
    model = build_model(settings, data.num_classes, weights=settings["weights"])
    trainer = PiecewiseTrainer(
        model,
        num_classes=data.num_classes,
        **{key: settings[key] for key in TRAINER_SETTINGS},
        class_weights=balanced_weights(chosen.pixel_counts()[:-1], power=settings["class_balance"]),
        seed=seed,
        progress=False,
    )
    start = time.process_time()
    history = trainer.train_stage1(loader, epochs)
    minutes = (time.process_time() - start) / 60
    found = {name: evaluate(model, DataLoader(part, batch_size=8)) for name, part in scored.items()}
    return {
        "network": network,
        "images": count,
        "seed": seed,
        "epochs": epochs,
        "cpu_minutes": round(minutes, 2),
        "loss": [round(record["loss"], 4) for record in history["stage1"]],
        "scores": {name: {part: summary(scores) for part, scores in parts.items()} for name, parts in found.items()},
    }


def summary(scores: dict) -> dict:
    return {key: round(100 * scores[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}


def mean(values: list[float], digits: int = 1) -> str:
    """Format a mean and, if there are several values, the smallest and the largest in parentheses."""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


def table(runs: list[dict], part: str = "unary") -> str:
    """The mean over seeds and the range, as Markdown; mIoU of the network ("unary") or with the default CRF ("crf")."""
    lines = ["| network | frames | CPU minutes | training loss | mIoU, val | mIoU, unseen drive |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for network, counts in COUNTS.items():
        for count in counts:
            if mine := [r for r in runs if (r["network"], r["images"]) == (network, count)]:
                minutes = sum(r["cpu_minutes"] for r in mine) / len(mine)
                cells = [f"{minutes:.1f}", mean([r["loss"][-1] for r in mine], digits=2)]
                cells += [mean([r["scores"][name][part]["miou"] for r in mine]) for name in ("val", "unseen drive")]
                lines.append(f"| {network} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "images.json", seeds=range(3))
    arguments.add_argument("--root", default="data")
    arguments.add_argument("--weights", default="build/backbone/vgg16.pt", help="the file that convert.py writes")
    arguments.add_argument("--networks", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    given = arguments.parse_args()
    study = Study(given.out, {"size": SIZE, "unseen": UNSEEN, "seen_images": SEEN_IMAGES})
    if not given.table:
        data, scored = splits(given.root)
        for seed, network in itertools.product(given.seeds, given.networks):
            for count in COUNTS[network]:
                key = f"{network}, {count} images, seed {seed}"
                study.measure(key, partial(run, network, count, seed, data, scored, given.weights))
                print(table([study.runs[key]]).splitlines()[-1], flush=True)
    runs = list(study.runs.values())
    print(table(runs), "With the default CRF:", table(runs, "crf"), sep="\n\n")


if __name__ == "__main__":
    main()
