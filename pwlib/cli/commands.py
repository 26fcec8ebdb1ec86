"""The commands train, evaluate and predict. Each takes the parsed arguments; errors are one sentence."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader

from pwlib import checkpoints, loaders
from pwlib.cli.profiles import PROFILES
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import best_record, evaluate
from pwlib.losses import balanced_weights
from pwlib.runs import STAGES, build_model, load_run, read_config, trained_stages
from pwlib.tools.pictures import predictions
from pwlib.tools.predict import label_files
from pwlib.trainer import PiecewiseTrainer

COLUMNS = (("miou", "mIoU"), ("pixel_accuracy", "pixel acc."), ("boundary_iou", "boundary IoU"))
TRAINER_SETTINGS = ("learning_rate", "crf_learning_rate", "stage3_factor", "optimizer", "schedule", "weight_decay")
TRAINER_SETTINGS += ("held_out", "stage1_keeps")


# ---------------------------------------------------------------------------------------------------------------- train


def train(args: argparse.Namespace) -> None:
    """Train all stages, print the table of scores, and write the run folder args.out."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    out = Path(args.out)
    config = _configuration(args, out)
    settings, epochs = config["settings"], config["settings"]["epochs"]
    main = loaders.rank_and_world_size()[0] == 0
    device = _device(args.device)

    train_set = load_split(config, "train", root=args.root, download=args.download)
    val_set = load_split(config, "val", root=args.root)
    config["classes"], config["palette"] = list(train_set.class_names), train_set.palette.tolist()
    loaders.barrier()  # every process has found the folder empty before the first one writes into it
    if main and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.save_json(out / "config.json", config)

    torch.manual_seed(config["seed"])
    model = build_model(settings, train_set.num_classes, imagenet=settings["imagenet"] and not args.resume)
    fit_set, held_set = (
        hold_out(train_set, settings["held_out"], config["seed"]) if epochs[1] else (train_set, train_set)
    )
    weights = (
        balanced_weights(fit_set.pixel_counts()[:-1], power=power) if (power := settings["class_balance"]) else None
    )
    trainer = PiecewiseTrainer(
        model,
        device,
        train_set.num_classes,
        **{key: settings[key] for key in TRAINER_SETTINGS},
        joint_pieces=bool(settings.get("context")),
        class_weights=weights,
        out=out,
        resume=args.resume,
        seed=config["seed"],
        progress=False if args.quiet else None,
    )
    options = {"batch_size": settings["batch"], "num_workers": args.workers, "pin_memory": device.type == "cuda"}
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
        print(f"\n{config['data']['name']}, validation split, {len(val_set)} images\n{table(history)}")
        print(f"\n{out}/ holds config.json, history.json, checkpoints and predictions.png")


def _configuration(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The configuration of a new run from the arguments, or of a resumed run from its config.json."""
    given = {key: getattr(args, key) for key in ("data", "profile", "size", "epochs", "seed", "context")}
    if args.resume:
        stored = read_config(out)
        for key, value in given.items():
            there = stored["arguments"].get(key)
            if value is not None and there != (list(value) if isinstance(value, tuple) else value):
                raise ValueError(
                    f"--{key} is {value} here and {there} in {out / 'config.json'}: "
                    "resume with the settings the run was started with"
                )
        args.root = args.root or stored["data"]["root"]
        return stored
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; choose another --out, or continue it with --resume")
    if args.data is None:
        raise ValueError("--data is missing; expected scenes, camvid, voc2012 or folder")
    given |= {"profile": args.profile or "quick", "seed": args.seed or 0}
    settings = asdict(PROFILES[args.data, given["profile"]])
    settings |= {"size": args.size, "crop": None} if args.size else {}
    settings |= {"epochs": args.epochs} if args.epochs else {}
    settings |= {} if args.context else {"context": None}
    args.root = args.root or "data"
    data = {"name": args.data, "root": str(Path(args.root).resolve())}
    config = {"arguments": given, "data": data, "settings": settings, "seed": given["seed"]}
    return config | {"torch": torch.__version__}


def load_split(config: dict[str, Any], split: str, *, root: str | None = None, download: bool = False):
    """Load a split of the run's data set at the run's size."""
    data, size = config["data"], config["settings"]["size"]
    options = {"cache": True} if size and size[0] * size[1] <= 128 * 192 else {}
    return load(data["name"], split, root or data["root"], download=download, size=size, **options)


def table(history: dict[str, list[dict[str, Any]]]) -> str:
    """Format the validation scores of each stage's best epoch, in percent."""
    rows = []
    for stage in STAGES:
        records = [record for record in history.get(stage, []) if "val" in record]
        if not records:
            continue
        best = best_record(records)
        if stage == "stage2":  # epoch 0: the CRF before it has learned anything
            rows.append(("stage1 + CRF, default parameters", "-", records[0]["val"]["crf"]))
        for part, scores in best["val"].items():
            rows.append((f"{stage} {'CRF' if part == 'crf' else part}", best["epoch"], scores))
    lines = [f"{'':32} {'epoch':>5}" + "".join(f" {title:>13}" for _, title in COLUMNS)]
    for name, epoch, scores in rows:
        cells = (f" {100 * scores[key]:13.2f}" if scores[key] is not None else f" {'-':>13}" for key, _ in COLUMNS)
        lines.append(f"{name:32} {epoch:>5}" + "".join(cells))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- evaluate, predict


def evaluate_run(args: argparse.Namespace) -> None:
    """Score every stage that has a checkpoint in the run folder; print JSON, or write it to args.json."""
    run = Path(args.run)
    config = read_config(run)
    stages = trained_stages(run)
    config["data"] = {"name": args.data or config["data"]["name"], "root": args.root or config["data"]["root"]}
    dataset = load_split(config, args.split, download=args.download)
    if list(dataset.class_names) != config["classes"]:
        raise ValueError(
            f"{config['data']['name']} has the classes {', '.join(dataset.class_names)}; "
            f"{run} was trained on {', '.join(config['classes'])}"
        )
    model = build_model(config["settings"], dataset.num_classes).to(_device(args.device))
    batch = config["settings"]["batch"] if config["settings"]["size"] else 1
    loader = DataLoader(dataset, batch_size=batch, num_workers=args.workers)
    keys = [key for key, _ in COLUMNS] + ["per_class_iou"]
    result = {}
    for stage in stages:
        checkpoints.load_model(run / f"{stage}-best.pt", model)
        scores = evaluate(model, loader)
        if stage == "stage1":  # its CRF still has the parameters that the run started with
            scores["untuned_crf"] = scores.pop("crf")
        result[stage] = {part: {key: values[key] for key in keys} for part, values in scores.items()}
    if args.json is None:
        print(json.dumps(result, indent=1))
    else:
        checkpoints.save_json(args.json, result)


def predict(args: argparse.Namespace) -> None:
    """Label images: NAME-label.png, NAME-overlay.png and NAME-confidence.png for each in args.out."""
    run = load_run(args.run, device=_device(args.device))
    for path in label_files(run, args.images, args.out, apply_crf=args.crf):
        print(path)


def _device(name: str | None) -> torch.device:
    if name is None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here; expected cpu, or cuda where there is a GPU") from error
    return device
