"""Train a run folder from its configuration, and format its scores."""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pwlib import checkpoints, loaders
from pwlib.annotations.check import Report, check_folder
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import best_record
from pwlib.losses import balanced_weights
from pwlib.tools.pictures import predictions
from pwlib.tools.runs import STAGES, build_model
from pwlib.trainer import PiecewiseTrainer

# Of the printed table; `evaluate` stores the same scores.
COLUMNS = (("miou", "mIoU"), ("pixel_accuracy", "pixel acc."), ("boundary_iou", "boundary IoU"))
TRAINER_SETTINGS = ("learning_rate", "crf_learning_rate", "stage3_factor", "optimizer", "schedule", "weight_decay")
TRAINER_SETTINGS += ("held_out", "stage1_keeps", "freeze_batch_norm", "average_stage3")


def train(
    config: dict[str, Any],
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    download: bool = False,
    workers: int = 0,
    quiet: bool = False,
) -> None:
    """Train all stages of a run, write its folder and print its table of scores.

    Args:
        config: the content of config.json; classes, palette and a digest of the training images are added.
        resume: continue with the checkpoints in `out`.
    """
    settings, epochs = config["settings"], config["settings"]["epochs"]
    main = loaders.rank_and_world_size()[0] == 0
    if config["data"]["name"] == "folder":
        report = _check_labels(config["data"], say=main)
        if settings["size"] and not resume and not config["arguments"]["size"]:
            settings["size"] = _fitted_size(settings["size"], sum(report.sizes.values(), Counter()), say=main)
    train_set = load_split(config, "train", download=download)
    val_set = load_split(config, "val")
    names = "\n".join(train_set.names).encode(errors="backslashreplace")  # a name on Linux may be no valid text
    digest = hashlib.sha256(names).hexdigest()[:16]
    content = {"classes": list(train_set.class_names), "images": f"{len(train_set)} images, {digest}"}
    for key, now in content.items():
        if resume and config.get(key, now) != now:
            raise ValueError(
                f"the {key} of the training set have changed: now {now}, in {out / 'config.json'} {config[key]}; "
                "restore them, or start a new run"
            )
    config |= content | {"palette": train_set.palette.tolist()}
    loaders.barrier()  # every process has found the folder empty before the first one writes into it
    if main and not resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.save_json(out / "config.json", config)

    torch.manual_seed(config["seed"])
    model = build_model(settings, train_set.num_classes, weights=None if resume else settings["weights"])
    fit_set, held_set = hold_out(train_set, settings["held_out"]) if epochs[1] else (train_set, train_set)
    power = settings["class_balance"]
    trainer = PiecewiseTrainer(
        model,
        device,
        train_set.num_classes,
        **{key: settings[key] for key in TRAINER_SETTINGS if key in settings},
        joint_pairwise=bool(settings.get("context")),
        class_weights=balanced_weights(fit_set.pixel_counts()[:-1], power=power) if power else None,
        out=out,
        resume=resume,
        seed=config["seed"],
        progress=False if quiet else None,
    )
    options = {"batch_size": settings["batch"], "num_workers": workers, "pin_memory": device.type == "cuda"}
    crop, size = settings["crop"] or settings["size"], settings["size"]
    augment = Augment(crop, scale=tuple(settings["scale"]), colour=settings["colour"])
    only_crop = None if size else Augment(crop, scale=(settings["scale"][1],) * 2, flip=0, colour=0)
    val_loader = DataLoader(val_set, **options | ({} if size else {"batch_size": 1}))
    fit_loader, held_loader, all_loader = (
        DataLoader(part.with_transform(transform), shuffle=True, **options)
        for part, transform in ((fit_set, augment), (held_set, only_crop), (train_set, augment))
    )
    trainer.train_stage1(fit_loader, epochs[0], val_loader)
    trainer.train_stage2(held_loader, epochs[1], val_loader)
    history = trainer.train_stage3(all_loader, epochs[2], val_loader)
    if main:
        if any(epochs):
            predictions(model, val_set).save(out / "predictions.png")
        print(f"\n{config['data']['name']}, validation split, {len(val_set)} images")
        print(table(history, settings["stage1_keeps"]))
        print(f"\n{out}/ holds config.json, history.json, checkpoints and predictions.png")


def load_split(config: dict[str, Any], split: str, *, root: str | None = None, download: bool = False):
    """Load a split of the run's data set at the run's size."""
    data, size = config["data"], config["settings"]["size"]
    options = data.get("labels", {}) | ({"cache": True} if size and size[0] * size[1] <= 128 * 192 else {})
    return load(data["name"], split, root or data["root"], download=download, size=size, **options)


def _check_labels(data: dict[str, Any], *, say: bool) -> Report:
    report = check_folder(data["root"], **data.get("labels", {}))
    report.raise_errors(data["root"])
    for place, text in report.warnings[:10] if say else ():
        print(f"warning: {place}: {text}", file=sys.stderr)
    if say and len(report.warnings) > 10:
        print(f"warning: {len(report.warnings) - 10} more: python -m pwlib labels {data['root']}", file=sys.stderr)
    return report


def _fitted_size(size: tuple[int, int], found: Counter, *, say: bool) -> tuple[int, int]:
    """About as many pixels as `size`, in the images' median shape; `found` counts the images of each (H, W)."""
    shapes = [height / width for height, width in found.elements()]
    shape = min(max(statistics.median(shapes), 0.5), 2.0)
    height, width = (8 * round((size[0] * size[1] * factor) ** 0.5 / 8) for factor in (shape, 1 / shape))
    if say:
        print(f"images are resized to {height}x{width} (height x width); --size chooses another size", file=sys.stderr)
        if distorted := sum(not 0.75 < one * width / height < 4 / 3 for one in shapes):
            print(f"warning: {distorted} of {len(shapes)} images have another shape and are distorted", file=sys.stderr)
    return height, width


def table(history: dict[str, list[dict[str, Any]]], stage1_keeps: str = "best") -> str:
    """Format the validation scores of the epoch that each stage keeps, in percent."""
    rows = []
    for stage in STAGES:
        if not (records := [record for record in history.get(stage, []) if "val" in record]):
            continue
        kept = best_record(records, stage1_keeps if stage == "stage1" else "best")
        if stage == "stage2":  # epoch 0: the CRF before it has learned anything
            rows.append(("stage1 + CRF, default parameters", "-", records[0]["val"]["crf"]))
        for part, scores in kept["val"].items():
            rows.append((f"{stage} {'CRF' if part == 'crf' else part}", kept["epoch"], scores))
    lines = [f"{'':32} {'epoch':>5}" + "".join(f" {title:>13}" for _, title in COLUMNS)]
    for name, epoch, scores in rows:
        cells = (f" {100 * scores[key]:13.2f}" if scores[key] is not None else f" {'-':>13}" for key, _ in COLUMNS)
        lines.append(f"{name:32} {epoch:>5}" + "".join(cells))
    return "\n".join(lines)
