"""What `python -m pwlib` does: train, evaluate, predict. Each takes parsed arguments and raises one-sentence errors.

A run folder holds config.json (all that is needed to build the model and its data again), history.json, the checkpoints
stage1-best.pt, stage1-last.pt, …, and predictions.png.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image
from torch.utils.data import DataLoader

from pwlib import checkpoints, loaders
from pwlib.cli.profiles import PROFILES, build_model
from pwlib.course import plots
from pwlib.data import VOID, Augment, SegmentationDataset, hold_out, load, read_image
from pwlib.evaluation import best_record, evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.trainer import PiecewiseTrainer

STAGES = ("stage1", "stage2", "stage3")
COLUMNS = (("miou", "mIoU"), ("pixel_accuracy", "pixel acc."), ("boundary_iou", "boundary IoU"))
CRF_LONG_SIDE = 1024


# ---------------------------------------------------------------------------------------------------------------- train


def train(args: argparse.Namespace) -> None:
    """Train all stages, print the table, leave everything in args.out."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    out = Path(args.out)
    config = _configuration(args, out)
    settings, data = config["settings"], config["data"]
    main = loaders.process()[0] == 0
    device = _device(args.device)

    train_set = load_split(config, "train", root=args.root, download=args.download)
    val_set = load_split(config, "val", root=args.root)
    config["classes"], config["palette"] = list(train_set.class_names), train_set.palette.tolist()
    loaders.wait()  # all have found the folder empty before the first writes into it
    if main and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.save_json(out / "config.json", config)

    torch.manual_seed(config["seed"])
    model = build_model(settings, train_set.num_classes, imagenet=settings["imagenet"] and not args.resume)
    epochs = tuple(settings["epochs"])
    fit_set, held_set = (
        hold_out(train_set, settings["held_out"], config["seed"]) if epochs[1] else (train_set, train_set)
    )
    crop = settings["crop"] or settings["size"]
    augment = Augment(crop, scale=tuple(settings["scale"]), colour=settings["colour"])
    only_crop = None if settings["size"] else Augment(crop, scale=(settings["scale"][1],) * 2, flip=0, colour=0)
    weights = class_weights(fit_set, settings["class_balance"]) if settings["class_balance"] else None
    options = {"batch_size": settings["batch"], "num_workers": args.workers, "pin_memory": device.type == "cuda"}
    trainer = PiecewiseTrainer(
        model,
        device,
        train_set.num_classes,
        settings["learning_rate"],
        **{
            key: settings[key]
            for key in (
                "crf_learning_rate",
                "stage3_factor",
                "optimizer",
                "schedule",
                "weight_decay",
                "held_out",
                "stage1_keeps",
            )
        },
        joint_pieces=bool(settings.get("context")),
        class_weights=weights,
        out=out,
        resume=args.resume,
        seed=config["seed"],
        progress=False if args.quiet else None,
    )
    val_loader = DataLoader(val_set, **options | ({} if settings["size"] else {"batch_size": 1}))
    fit_loader, all_loader = (
        DataLoader(part.with_transform(augment), shuffle=True, **options) for part in (fit_set, train_set)
    )
    trainer.train_stage1(fit_loader, epochs[0], val_loader)
    trainer.train_stage2(DataLoader(held_set.with_transform(only_crop), shuffle=True, **options), epochs[1], val_loader)
    history = trainer.train_stage3(all_loader, epochs[2], val_loader)
    if main:
        if any(epochs):
            picture(model, val_set, out / "predictions.png")
        print(f"\n{data['name']}, validation split, {len(val_set)} images\n{table(history)}")
        print(f"\n{out}/ holds config.json, history.json, checkpoints and predictions.png")


def _configuration(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The run's configuration: from the arguments; when resuming, from config.json, which they must not contradict."""
    given = {key: getattr(args, key) for key in ("data", "profile", "size", "epochs", "seed", "context")}
    if args.resume:
        stored = read_config(out)
        for key, value in given.items():
            if value is not None and stored["arguments"].get(key) != (
                list(value) if isinstance(value, tuple) else value
            ):
                raise ValueError(
                    f"--{key} is {value} here and {stored['arguments'].get(key)} in {out / 'config.json'}: "
                    "resume with the settings the run was started with"
                )
        args.root = args.root or stored["data"]["root"]
        return stored
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another --out, or continue it with --resume")
    if args.data is None:
        raise ValueError("--data is missing; expected scenes, camvid, voc2012 or folder")
    profile, seed = args.profile or "quick", args.seed or 0
    settings = asdict(PROFILES[args.data, profile])
    if args.size is not None:
        settings |= {"size": args.size, "crop": None}
    if args.epochs is not None:
        settings["epochs"] = args.epochs
    if not args.context:
        settings["context"] = None
    args.root = args.root or "data"
    arguments = {"data": args.data, "profile": profile, "size": args.size, "epochs": args.epochs, "seed": seed}
    arguments["context"] = args.context
    return {
        "arguments": arguments,
        "data": {"name": args.data, "root": str(Path(args.root).resolve())},
        "settings": settings,
        "seed": seed,
        "torch": torch.__version__,
    }


def load_split(config: dict[str, Any], split: str, *, root: str | None = None, download: bool = False):
    """A split of the run's data set, at the run's size."""
    data, size = config["data"], config["settings"]["size"]
    options = {"cache": True} if size and size[0] * size[1] <= 128 * 192 else {}
    return load(data["name"], split, root or data["root"], download=download, size=size, **options)


def class_weights(dataset: SegmentationDataset, power: float) -> torch.Tensor:
    """`balanced_weights` of the data set's pixel counts: reads every label once."""
    counts = torch.zeros(dataset.num_classes + 1, dtype=torch.int64)
    for index in range(len(dataset)):
        label = dataset[index][1]
        counts += torch.bincount(label.masked_fill(label == VOID, dataset.num_classes).flatten(), minlength=len(counts))
    return balanced_weights(counts[:-1], power=power)


def table(history: dict[str, list[dict[str, Any]]]) -> str:
    """Per stage the best epoch's validation scores, in percent."""
    rows = []
    for stage in STAGES:
        records = [record for record in history.get(stage, []) if "val" in record]
        if not records:
            continue
        best = best_record(records)
        for part, scores in best["val"].items():
            rows.append((f"{stage} {'CRF' if part == 'crf' else part}", best["epoch"], scores))
        if stage == "stage2":
            rows.insert(len(rows) - len(best["val"]), ("stage1 CRF, untuned", "-", records[0]["val"]["crf"]))
    lines = [f"{'':20} {'epoch':>5}" + "".join(f" {title:>13}" for _, title in COLUMNS)]
    for name, epoch, scores in rows:
        cells = (f" {100 * scores[key]:13.2f}" if scores[key] is not None else f" {'-':>13}" for key, _ in COLUMNS)
        lines.append(f"{name:20} {epoch:>5}" + "".join(cells))
    return "\n".join(lines)


def picture(model: PiecewiseTrainedModel, dataset: SegmentationDataset, path: Path, count: int = 4) -> None:
    """A picture of predictions on images spread over `dataset`."""
    device = next(model.parameters()).device
    model.eval()
    rows = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        image, label = dataset[index]
        with torch.no_grad():
            unary, crf = (part[0].argmax(0).cpu() for part in model(image[None].to(device)))
        rows.append((image, {"truth": label, "unary": unary, "CRF": crf}))
    plots.predictions(rows, dataset.palette, dataset.class_names).savefig(path, dpi=150)


# -------------------------------------------------------------------------------------------------- evaluate, predict


def evaluate_run(args: argparse.Namespace) -> None:
    """Score every stage whose checkpoint is in the run folder; print JSON, or write it to args.json."""
    run = Path(args.run)
    config = read_config(run)
    stages = _stages(run)
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
    result = {}
    for stage in stages:
        checkpoints.load_model(run / f"{stage}-best.pt", model)
        scores = evaluate(model, loader)
        if stage == "stage1":  # its CRF is the one the run started with: what learning has to beat
            scores["untuned_crf"] = scores.pop("crf")
        keys = [key for key, _ in COLUMNS] + ["per_class_iou"]
        result[stage] = {part: {key: values[key] for key in keys} for part, values in scores.items()}
    if args.json is None:
        print(json.dumps(result, indent=1))
    else:
        checkpoints.save_json(args.json, result)


def predict(args: argparse.Namespace) -> None:
    """Label each image: NAME-label.png (palette), NAME-overlay.png and NAME-confidence.png in args.out."""
    run, out = Path(args.run), Path(args.out)
    config = read_config(run)
    names = [Path(path).stem for path in args.images]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two images are called {name}; their predictions would overwrite each other")
    if missing := [path for path in args.images if not Path(path).is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not there; expected an image")
    model = build_model(config["settings"], len(config["classes"]))
    checkpoints.load_model(run / f"{_stages(run)[-1]}-best.pt", model)
    model.to(_device(args.device)).eval()
    out.mkdir(parents=True, exist_ok=True)
    size = config["settings"]["size"]
    palette = np.array(config["palette"], dtype=np.uint8)
    for path, name in zip(args.images, names, strict=True):
        image = read_image(path)
        probability = model.predict(
            image, short_side=min(size) if size else None, crf_long_side=CRF_LONG_SIDE, apply_crf=args.crf
        )
        confidence, label = (part.cpu() for part in probability.max(0))
        labels = Image.fromarray(label.numpy().astype(np.uint8))
        labels.putpalette(_palette_256(palette))
        labels.save(out / f"{name}-label.png")
        Image.fromarray(plots.overlay(image, label, palette)).save(out / f"{name}-overlay.png")
        Image.fromarray((255 * confidence).round().byte().numpy()).save(out / f"{name}-confidence.png")
        print(out / f"{name}-label.png")


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run folder; a clear error for anything else."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if missing := {"arguments", "data", "settings", "seed", "classes", "palette"} - set(config):
        raise ValueError(f"{path} is not a run's configuration: it has no {min(missing)!r}")
    return config


def _stages(run: Path) -> list[str]:
    stages = [stage for stage in STAGES if (run / f"{stage}-best.pt").is_file()]
    if not stages:
        raise FileNotFoundError(f"{run} has no checkpoint yet; expected stage1-best.pt")
    return stages


def _palette_256(palette: np.ndarray) -> list[int]:
    """256 RGB entries for a palette PNG: the classes first, void's colour at 255 (and in between)."""
    entries = np.tile(palette[-1], (256, 1))
    entries[: len(palette) - 1] = palette[:-1]
    return entries.flatten().tolist()


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
