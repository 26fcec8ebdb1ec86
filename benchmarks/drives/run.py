"""Measure what each stage of CamVid's quick profile is worth on a drive that took no part in training.

CamVid's training split holds three drives. One is left out and scored; the other two are the training set. Two ways to
hold out frames for stage 2 are compared:

    drive     one of the two drives, as `hold_out` does; stage 1 sees the other one
    end       the last quarter of each of the two drives; stage 1 sees the first three quarters of both

and on each stage 1 these CRFs, all on the same network:

    default   the profile's parameters
    searched  the best of 24 settings by mIoU on the held-out frames
    learned   stage 2 of the profile
    kernels   the same, with the Potts compatibility kept: weights and bandwidths are learned
    stage 3   network and CRF after the profile's stage 3, which starts from "learned"

With --drives none nothing is left out, as in `python -m pwlib train --data camvid`, and val is scored alone. Everything
is also scored on val, whose frames lie in a gap of drive 0016E5. Every stage keeps its last epoch: nothing is selected
on a scored frame. A seed decides initial weights, order and augmentation.

    python benchmarks/drives/run.py --root data/camvid     about 10 CPU minutes a drive and seed on one core
    python benchmarks/drives/run.py --table                prints the tables from result.json

result.json is written after every run; a command that was stopped continues where it was. The networks of stage 1 are
kept in runs/drives.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, command, parser, settings_searched

from pwlib.cli.profiles import PROFILES
from pwlib.crf import DenseCRF
from pwlib.data import Augment, SegmentationDataset, hold_out, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.tools.runs import build_model
from pwlib.tools.training import TRAINER_SETTINGS
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
WORK = Path("runs/drives")
DRIVES = ("0001TP", "0006R0", "0016E5")
HOLDS = ("drive", "end")
CRFS = ("default", "searched", "learned", "kernels")
PROFILE = asdict(PROFILES["camvid", "quick"]) | {"context": None}
SETTINGS = {
    "profile": PROFILE,
    "searched": {
        "theta_alpha": [5, 60],
        "theta_beta": [4, 30],
        "theta_gamma": [0.7, 4],
        "w_bilateral": [0.5, 10],
        "w_spatial": [0.1, 4],
    },
    "settings_searched": 24,
}


def split(data: SegmentationDataset, hold: str) -> tuple[SegmentationDataset, SegmentationDataset]:
    """(fit, held) for stages 1 and 2; whole drives, or the last frames of each."""
    share = PROFILE["held_out"]
    if hold == "drive":
        return hold_out(data, share)
    held = []
    for drive in sorted(set(data.groups)):
        frames = sorted((i for i in range(len(data)) if data.groups[i] == drive), key=data.names.__getitem__)
        held += frames[-round(share * len(frames)) :]
    return data.subset(sorted({*range(len(data))} - {*held})), data.subset(sorted(held))


def loader(data: SegmentationDataset, augment: bool, shuffle: bool = True) -> DataLoader:
    transform = Augment(PROFILE["size"], scale=PROFILE["scale"], colour=PROFILE["colour"]) if augment else None
    return DataLoader(data.with_transform(transform), batch_size=PROFILE["batch"], shuffle=shuffle)


def numbers(model: PiecewiseTrainedModel, scored: dict[str, SegmentationDataset]) -> dict:
    """{split: {part: scores in per cent}} of the network and the dense CRF."""
    keys = ("miou", "pixel_accuracy", "boundary_iou")
    result = {}
    for name, data in scored.items():
        found = evaluate(model, loader(data, augment=False, shuffle=False))
        result[name] = {part: {key: round(100 * scores[key], 2) for key in keys} for part, scores in found.items()}
        for part, scores in found.items():
            values = scores["per_class_iou"].items()
            result[name][part]["iou"] = {c: None if v is None else round(100 * v, 1) for c, v in values}
    return result


def search(model: PiecewiseTrainedModel, held: SegmentationDataset) -> dict[str, float]:
    """The CRF with the highest mIoU on every second held-out frame."""
    found, some = [], held.subset(range(0, len(held), 2))
    for options in settings_searched(PROFILE["crf"], SETTINGS["searched"], SETTINGS["settings_searched"]):
        one = PiecewiseTrainedModel(model.num_classes, unary=model.unary, crf=DenseCRF(model.num_classes, **options))
        found.append((evaluate(one, loader(some, augment=False, shuffle=False))["crf"]["miou"], options))
    return max(found, key=lambda entry: entry[0])[1]


def build_trainer(model: PiecewiseTrainedModel, fit: SegmentationDataset, seed: int, **options) -> PiecewiseTrainer:
    weights = balanced_weights(fit.pixel_counts()[:-1], power=PROFILE["class_balance"])
    settings = {key: PROFILE[key] for key in TRAINER_SETTINGS}
    return PiecewiseTrainer(
        model,
        num_classes=model.num_classes,
        class_weights=weights,
        seed=seed,
        progress=False,
        **settings,
        **options,
    )


def run(root: str, drive: str, hold: str, seed: int) -> dict:
    whole, val = (load("camvid", name, root, size=PROFILE["size"], cache=True) for name in ("train", "val"))
    train = whole.subset([i for i in range(len(whole)) if whole.groups[i] != drive])
    scored = {"val": val}
    if drive != "none":
        scored["left out"] = whole.subset([i for i in range(len(whole)) if whole.groups[i] == drive])
    fit, held = split(train, hold)
    start, epochs = time.process_time(), PROFILE["epochs"]
    torch.manual_seed(seed)
    network = build_model(PROFILE, train.num_classes)
    folder = WORK / f"{drive}-{hold}-{seed}"
    record = build_trainer(network, fit, seed, out=folder, resume=True).train_stage1(loader(fit, True), epochs[0])
    models = {"default": copy.deepcopy(network), "searched": copy.deepcopy(network)}
    chosen = search(network, held)
    models["searched"].crf = DenseCRF(network.num_classes, **chosen)
    for name in ("learned", "kernels"):
        models[name] = copy.deepcopy(network)
        models[name].crf.compatibility.requires_grad_(name == "learned")
        build_trainer(models[name], fit, seed).train_stage2(loader(held, False), epochs[1])
    models["stage 3"] = copy.deepcopy(models["learned"])
    build_trainer(models["stage 3"], fit, seed).train_stage3(loader(train, True), epochs[2])
    scores = {name: numbers(model, scored) for name, model in models.items()}
    return {
        "drive": drive,
        "hold": hold,
        "seed": seed,
        "frames": {"fit": len(fit), "held": len(held), **{name: len(data) for name, data in scored.items()}},
        "loss": [round(epoch["loss"], 4) for epoch in record["stage1"]],
        "searched": chosen,
        "scores": scores,
        "minutes": round((time.process_time() - start) / 60, 1),
    }


def gains(rows: list[dict], split_name: str, key: str) -> dict[str, list[float]]:
    """Points over the network of stage 1, one value a seed; of stage 3 also its network and over "learned"."""
    of = {name: [row["scores"][name][split_name] for row in rows] for name in (*CRFS, "stage 3")}
    network = [scores["unary"][key] for scores in of["default"]]
    result = {name: [s["crf"][key] - n for s, n in zip(of[name], network, strict=True)] for name in of}
    result["stage 3 less learned"] = [
        a["crf"][key] - b["crf"][key] for a, b in zip(of["stage 3"], of["learned"], strict=True)
    ]
    return {"network": network} | result


def table(runs: dict[str, dict]) -> str:
    """Markdown: scores of the network and the points that each CRF adds, by left-out drive and way of holding out."""
    lines = []
    for key, title in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        heads = ("network", *CRFS, "stage 3", "stage 3 less learned")
        lines += [f"| scored on | held out | seeds | {title}: " + " | ".join(heads) + " |"]
        lines.append("|---|---|--:|" + "--:|" * len(heads))
        for split_name in ("left out", "val"):
            for drive in (*DRIVES, "none"):
                for hold in HOLDS:
                    rows = [r for r in runs.values() if (r["drive"], r["hold"]) == (drive, hold)]
                    if not rows or split_name not in rows[0]["scores"]["default"]:
                        continue
                    found = gains(rows, split_name, key)
                    name = f"drive {drive}" if split_name == "left out" else f"val, without {drive}"
                    cells = [cell(found[head], sign=head != "network") for head in heads]
                    name = "val, all drives" if drive == "none" else name
                    lines.append(f"| {name} | {hold} | {len(rows)} | " + " | ".join(cells) + " |")
        lines.append("")
    for hold in HOLDS:
        rows = [r for r in runs.values() if (r["drive"], r["hold"]) == ("none", hold)]
        values = [r["scores"]["stage 3"]["val"]["crf"]["miou"] for r in rows]
        if len(values) > 1:
            spread = f"{min(values):.1f} to {max(values):.1f}, standard deviation {statistics.stdev(values):.1f}"
            lines.append(f"val after stage 3, held out by {hold}, {len(values)} seeds: {spread}")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "result.json", seeds=range(5))
    arguments.add_argument("--root", default="data/camvid")
    arguments.add_argument("--drives", nargs="+", default=[*DRIVES, "none"], choices=(*DRIVES, "none"))
    arguments.add_argument("--hold", nargs="+", default=list(HOLDS), choices=HOLDS)
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        for seed in given.seeds:
            for drive in given.drives:
                for hold in given.hold:
                    key = f"{drive}, {hold}, seed {seed}"
                    if key not in study.runs:
                        row = run(given.root, drive, hold, seed)
                        study.add(key, row, command=command())
                        print(key, row["minutes"], "minutes", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
