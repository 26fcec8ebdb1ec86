"""Measure what each stage is worth on a CamVid drive that took no part in training.

CamVid's training split holds three drives. One is left out and scored; the other two are the training set. Two ways to
hold out frames for stage 2 are compared:

    drive     one of the two drives, as `hold_out` does; stage 1 sees the other one
    end       the last quarter of each of the two drives; stage 1 sees the first three quarters of both

and on each stage 1 these CRFs, all on the same network:

    default   the profile's parameters
    searched  the best of 24 settings by mIoU on every second held-out frame
    learned   stage 2 of the profile
    kernels   the same, with the Potts compatibility kept: weights and bandwidths are learned
    fit       network and CRF after stage 3, which starts from "learned", on the images of stage 1
    all       the same on all images of the training set, those of stage 2 included
    fixed     as "all", with the batch-norm statistics of stage 1 (freeze_batch_norm)
    averaged  the mean of the parameters of "learned" and "fixed" ("all" without batch norm), as average_stage3: the
              quick profile's stage 3

The networks of stage 1, "all" and "fixed" are also scored alone with the batch-norm statistics of the scored images
("adapted"; Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016). This needs no labels,
and shows how much of an error is due to these statistics.

--network quick is the command line's quick profile, at 90x120 px. --network colour is the same with "colour": 0.5 in
place of 0.2, for stronger changes of colour in training. --network pretrained is VGG-16 at full width from the file of
--weights (see benchmarks/backbone), at 180x240 px: blocks 1 to 3 frozen, 10 epochs, the convolutions in bfloat16 on a
GPU and on a CPU that has instructions for it (another one is many times slower with it). --network pretrained-20 is
the same with 20 epochs. Their scores are for their own size and, with marginals averaged over the pixels, for 90x120.

With --drives none nothing is left out, as in `python -m pwlib train --data camvid`, and val is scored alone. Everything
is also scored on val, whose frames lie in a gap of drive 0016E5. Every stage keeps its last epoch: no epoch is
selected on a scored frame. freeze_batch_norm and average_stage3 were chosen from scores on these drives. A seed
decides initial weights, order and augmentation.

    python benchmarks/drives/run.py --root data/camvid --network quick
    python benchmarks/drives/run.py --root data/camvid --network pretrained --hold end --weights build/backbone/vgg16.pt
    python benchmarks/drives/run.py --table

A run of a drive and seed takes 2 to 12 minutes of one core with the quick profile, and 30 to 127 pretrained;
`--device cuda` uses a GPU, on which several commands with different seeds or drives can run side by side. result.json
is written after every run; a command that was stopped continues where it was. Checkpoints are kept in runs/drives. If
0001TP or 0006R0 is left out and held-out frames are whole drives, stage 1 sees the same frames of 0016E5. The second
of these runs then continues from the first one's stage 1, and its minutes are those of the later stages alone.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, parser, settings_searched, split_of

from pwlib.cli.profiles import PROFILES, pretrained
from pwlib.crf import DenseCRF
from pwlib.data import Augment, SegmentationDataset, hold_out, load
from pwlib.losses import balanced_weights
from pwlib.metrics import SegmentationScores
from pwlib.model import PiecewiseTrainedModel
from pwlib.tools.runs import build_model
from pwlib.tools.training import TRAINER_SETTINGS
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
WORK = Path("runs/drives")
DRIVES = ("0001TP", "0006R0", "0016E5")
HOLDS = ("drive", "end")
CRFS = ("default", "searched", "learned", "kernels")  # behind the network of stage 1
STAGE3 = ("fit", "all", "fixed", "averaged")
ADAPTED = ("network", "all, network", "fixed, network")
# Tables: {title: {column: (output, reference)}}; a difference to the reference, if there is one.
COLUMNS = {
    "and what each part adds": {
        "network": ("network", None),
        **{name: (name, "network") for name in CRFS},
        **{f"stage 3 ({name}), minus learned": (name, "learned") for name in STAGE3},
    },
    "of networks alone and of the same networks with the scored images' batch-norm statistics": {
        "network": ("network", None),
        "adapted, minus network": ("network, adapted", "network"),
        "stage 3 (all), minus network": ("all, network", "network"),
        "stage 3 (fixed), minus network": ("fixed, network", "network"),
        "all, adapted, minus network, adapted": ("all, network, adapted", "network, adapted"),
        "fixed, adapted, minus network, adapted": ("fixed, network, adapted", "network, adapted"),
    },
    "in other comparisons": {
        "network": ("network", None),
        **{f"{name}, minus default": (name, "default") for name in CRFS[1:]},
        "fixed, minus all: network": ("fixed, network", "all, network"),
        "fixed, minus all: with the CRF": ("fixed", "all"),
        "averaged, minus fixed: with the CRF": ("averaged", "fixed"),
    },
}
QUICK = asdict(PROFILES["camvid", "quick"]) | {"context": None, "average_stage3": False}  # "averaged" is computed here


def resized(crf: dict, scale: float) -> dict:
    """A CRF's parameters for images whose sides are `scale` times as long."""
    return {k: v * scale if k in ("theta_alpha", "theta_gamma") else v for k, v in crf.items()}


PRETRAINED = QUICK | pretrained(QUICK, "", batch_norm=False)
PRETRAINED |= {"size": (180, 240), "crf": resized(QUICK["crf"], 2), "epochs": (10, 3, 1), "batch": 4}
PRETRAINED |= {"scale": (0.6, 1.6), "learning_rate": 2e-4}
NETWORKS = {
    "quick": QUICK,
    "colour": QUICK | {"colour": 0.5},
    "pretrained": PRETRAINED,
    "pretrained-20": PRETRAINED | {"epochs": (20, 3, 1)},
}
SETTINGS = {
    "networks": NETWORKS,
    "searched": {  # px at 90x120, grey levels, weights
        "theta_alpha": [5, 60],
        "theta_beta": [4, 30],
        "theta_gamma": [0.7, 4],
        "w_bilateral": [0.5, 10],
        "w_spatial": [0.1, 4],
    },
    "settings_searched": 24,
}


def split(data: SegmentationDataset, hold: str, share: float = QUICK["held_out"]):
    """(fit, held) for stages 1 and 2; whole drives, or the last frames of each."""
    if hold == "drive":
        return hold_out(data, share)
    held = []
    for drive in sorted(set(data.groups)):
        frames = sorted((i for i in range(len(data)) if data.groups[i] == drive), key=data.names.__getitem__)
        held += frames[-round(share * len(frames)) :]
    return data.subset(sorted({*range(len(data))} - {*held})), data.subset(sorted(held))


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


@torch.no_grad()
def score(network: nn.Module, crfs: dict[str, DenseCRF], data: SegmentationDataset, *smaller: SegmentationDataset):
    """{output: scores} of a network and of CRFs on its logits, for `data` and for each smaller copy of it."""
    names, device = ("network", *crfs), device_of(network)
    found = [
        {n: SegmentationScores(data.num_classes, data.class_names, device=device) for n in names}
        for _ in (data, *smaller)
    ]
    network.eval()
    for (image, label), *others in zip(*(DataLoader(some, batch_size=8) for some in (data, *smaller)), strict=True):
        image, label = image.to(device), label.to(device)
        logits = network(image)  # [B, K, H, W]
        for name in names:
            q = logits.softmax(1) if name == "network" else crfs[name](logits, image).exp()  # [B, K, H, W]
            for scores, target in zip(found, (label, *(other[1] for other in others)), strict=True):
                mean = nn.functional.interpolate(q, size=target.shape[-2:], mode="area")  # [B, K, h, w]
                scores[name].update(mean.argmax(1), target.to(device))
    return [{name: scores.result() for name, scores in some.items()} for some in found]


def numbers(found: dict[str, dict]) -> dict:
    """The stored scores, in per cent."""
    result = {}
    for name, scores in found.items():
        result[name] = {k: round(100 * scores[k], 2) for k in ("miou", "pixel_accuracy", "boundary_iou")}
        values = scores["per_class_iou"].items()
        result[name]["iou"] = {c: None if v is None else round(100 * v, 1) for c, v in values}
    return result


@torch.no_grad()
def adapted(network: nn.Module, data: SegmentationDataset) -> nn.Module:
    """A copy of the network whose batch norm has the mean statistics of the batches of `data`."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
            module.train()
    for image, _ in DataLoader(data, batch_size=8, shuffle=True):
        network(image.to(device_of(network)))
    return network


@torch.no_grad()
def averaged(one: nn.Module, other: nn.Module) -> nn.Module:
    """A copy of the first model with the means of both models' parameters; its buffers are those of the first."""
    result = copy.deepcopy(one)
    for parameter, value in zip(result.parameters(), other.parameters(), strict=True):
        parameter.lerp_(value, 0.5)
    return result


def has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def build_trainer(model: PiecewiseTrainedModel, kind: str, fit: SegmentationDataset, seed: int, **options):
    profile = NETWORKS[kind]
    settings = {key: profile[key] for key in TRAINER_SETTINGS} | {"freeze_batch_norm": False}
    return PiecewiseTrainer(
        model,
        num_classes=model.num_classes,
        class_weights=balanced_weights(fit.pixel_counts()[:-1], power=profile["class_balance"]),
        seed=seed,
        amp=kind.startswith("pretrained") and has_bfloat16(device_of(model)),
        progress=False,
        device=device_of(model),
        **settings | options,
    )


def run(root: str, kind: str, weights: str, drive: str, hold: str, seed: int, device: str) -> dict:
    profile, start, starts = NETWORKS[kind], time.process_time(), kind.startswith("pretrained")

    def load_at(size):
        whole, val = (load("camvid", name, root, size=size, cache=True) for name in ("train", "val"))
        scored = {"val": val, "left out": whole.subset([i for i, group in enumerate(whole.groups) if group == drive])}
        train = whole.subset([i for i, group in enumerate(whole.groups) if group != drive])
        return train, {name: data for name, data in scored.items() if len(data)}

    def batches(data, augmented):
        transform = Augment(profile["size"], scale=profile["scale"], colour=profile["colour"]) if augmented else None
        return DataLoader(data.with_transform(transform), batch_size=profile["batch"], shuffle=True)

    train, scored = load_at(profile["size"])
    smaller = load_at(QUICK["size"])[1] if starts else {}
    fit, held = split(train, hold)
    torch.manual_seed(seed)
    network = build_model(profile, train.num_classes, weights=weights if starts else None).to(device)
    if starts:
        network.unary.blocks[:3].requires_grad_(False).eval()
    folder = WORK / f"{kind}-{'+'.join(sorted(set(fit.groups)))}-{hold}-{seed}"  # the same for two left-out drives
    trainer = build_trainer(network, kind, fit, seed, out=folder, resume=True)
    record = trainer.train_stage1(batches(fit, True), profile["epochs"][0])

    scale = profile["size"][0] / QUICK["size"][0]
    options = settings_searched(QUICK["crf"], SETTINGS["searched"], SETTINGS["settings_searched"])
    options = [resized(some, scale) for some in options]
    every_second = held.subset(range(0, len(held), 2))
    crfs = {str(i): DenseCRF(train.num_classes, **some).to(device) for i, some in enumerate(options)}
    found = score(network.unary, crfs, every_second)[0]
    chosen = options[int(max(crfs, key=lambda name: found[name]["miou"]))]

    models = {}
    for name in ("learned", "kernels"):
        models[name] = copy.deepcopy(network)
        models[name].crf.compatibility.requires_grad_(name == "learned")
        build_trainer(models[name], kind, fit, seed).train_stage2(batches(held, False), profile["epochs"][1])
    crfs = {"default": network.crf, "searched": DenseCRF(train.num_classes, **chosen).to(device)}
    crfs |= {name: model.crf for name, model in models.items()}
    trained = ("fit", "all", "fixed") if profile["batch_norm"] else ("fit", "all")
    last = {name: copy.deepcopy(models["learned"]) for name in trained}
    for name, model in last.items():
        trainer = build_trainer(model, kind, fit, seed, freeze_batch_norm=name == "fixed")
        trainer.train_stage3(batches(fit if name == "fit" else train, True), profile["epochs"][2])
    last["averaged"] = averaged(models["learned"], last[trained[-1]])

    scores = {}
    for name, data in scored.items():
        others = [smaller[name]] if smaller else []
        found = score(network.unary, crfs, data, *others)
        for stage, model in last.items():
            for one, two in zip(found, score(model.unary, {stage: model.crf}, data, *others), strict=True):
                one |= {f"{stage}, network": two["network"], stage: two[stage]}
        if profile["batch_norm"]:
            networks = {"network": network.unary} | {f"{stage}, network": m.unary for stage, m in last.items()}
            for output in ADAPTED:
                found[0][f"{output}, adapted"] = score(adapted(networks[output], data), {}, data)[0]["network"]
        for title, one in zip((name, f"{name}, 90x120"), found, strict=False):
            scores[title] = numbers(one)
    return {
        "network": kind,
        "drive": drive,
        "hold": hold,
        "seed": seed,
        "device": device,
        "splits": {name: split_of(data) for name, data in {"fit": fit, "held": held, **scored}.items()},
        "loss": [round(epoch["loss"], 4) for epoch in record["stage1"]],
        "searched": chosen,
        "scores": scores,
        "minutes": round((time.process_time() - start) / 60, 1),
    }


def values(rows: list[dict], name: str, key: str, output: str, reference: str | None) -> list[float]:
    """One score of an output for each seed, or its difference to that of a reference; [] if it was not stored."""
    found = [row["scores"][name] for row in rows if {output, reference or output} <= row["scores"][name].keys()]
    return [scores[output][key] - (scores[reference][key] if reference else 0) for scores in found]


def grouped(runs: dict[str, dict]) -> dict[tuple[str, str, str], list[dict]]:
    """The rows of all seeds, by network, way of holding out and left-out drive."""
    groups: dict[tuple, list[dict]] = {}
    for row in runs.values():
        groups.setdefault((row["network"], row["hold"], row["drive"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: [item[0][0] != "quick", item[0]]))


def summary(runs: dict[str, dict]) -> str:
    """Markdown: what network, CRF and stage 3 reach on left-out drives, with a whole drive held out."""
    head = ("scored", "seeds", "network", "default CRF", "learned CRF", "end of stage 3", "averaged")
    lines = []
    for key, metric in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        lines += [f"| {metric} of | {' | '.join(head)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
        for (kind, hold, drive), rows in grouped(runs).items():
            if hold != "drive" or kind == "colour":
                continue
            name, place = ("val", "val") if drive == "none" else ("left out", drive)
            last = "fixed" if NETWORKS[kind]["batch_norm"] else "all"
            pairs = (
                ("network", None),
                ("default", "network"),
                ("learned", "network"),
                (last, "learned"),
                ("averaged", "learned"),
            )
            found = [(values(rows, name, key, *pair), pair[1] is not None) for pair in pairs]
            cells = [cell(some, sign=sign) if some else "" for some, sign in found]
            lines.append(f"| {kind} | {place} | {len(rows)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def table(runs: dict[str, dict]) -> str:
    """Markdown: tables by left-out drive and way of holding out, of the stages and of batch norm's statistics."""
    lines, groups = [summary(runs)], grouped(runs)
    for (title, columns), (key, metric) in itertools.product(
        COLUMNS.items(), (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"))
    ):
        lines += [f"{metric}, {title}", "", "| profile | held out | scored | seeds | " + " | ".join(columns) + " |"]
        lines.append("|---|---|---|--:|" + "--:|" * len(columns))
        for (kind, hold, drive), rows in groups.items():
            for name in rows[0]["scores"]:
                place = name.replace("left out", f"drive {drive}")
                place = place.replace("val", "val, nothing left out" if drive == "none" else f"val, without {drive}")
                found = [(values(rows, name, key, *pair), pair[1] is not None) for pair in columns.values()]
                cells = [cell(some, sign=sign) if some else "" for some, sign in found]
                if any(cells[1:]):
                    lines.append(f"| {kind} | {hold} | {place} | {len(rows)} | " + " | ".join(cells) + " |")
        lines.append("")
    for (kind, hold, drive), rows in groups.items():
        for stage in STAGE3:
            found = values(rows, "val", "miou", stage, None) if drive == "none" else []
            if len(found) > 1:
                spread = f"{min(found):.1f} to {max(found):.1f}, standard deviation {statistics.stdev(found):.1f}"
                about = f"{kind}, held out by {hold}, {len(found)} seeds"
                lines.append(f"val after stage 3 ({stage}), {about}: {spread}")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "result.json", seeds=range(5))
    arguments.add_argument("--root", default="data/camvid")
    arguments.add_argument("--network", choices=tuple(NETWORKS), default="quick")
    arguments.add_argument("--weights", default="build/backbone/vgg16.pt", help="the file of benchmarks/backbone")
    arguments.add_argument("--drives", nargs="+", default=[*DRIVES, "none"], choices=(*DRIVES, "none"))
    arguments.add_argument("--hold", nargs="+", default=list(HOLDS), choices=HOLDS)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        for seed, drive, hold in itertools.product(given.seeds, given.drives, given.hold):
            key = f"{given.network}, {drive}, {hold}, seed {seed}"
            if key not in study.runs:
                row = run(given.root, given.network, given.weights, drive, hold, seed, given.device)
                study.add(key, row)
                print(key, row["minutes"], "minutes", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
