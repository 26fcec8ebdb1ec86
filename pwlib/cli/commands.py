"""The commands of `python -m pwlib`: from parsed arguments to `pwlib.tools` and `pwlib.annotations`."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from pwlib import checkpoints
from pwlib.annotations.classes import label_arguments
from pwlib.cli.profiles import PROFILES, pretrained
from pwlib.pretrained import read_vgg
from pwlib.tools.runs import choose_device, load_run, read_config

# The arguments that decide a run; a resumed run must not contradict them.
DECIDING = ("data", "profile", "size", "epochs", "seed", "context", "weights", "learning_rate", "batch")
LABELS = ("classes", "palette", "values", "void")


def train(args: argparse.Namespace) -> None:
    """Train a new run, or resume one."""
    from pwlib.tools.training import train

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    out, given = Path(args.out), {key: getattr(args, key) for key in (*DECIDING, *LABELS)}
    resume = args.resume and any(out.glob("stage*.pt"))
    if args.resume:
        stored = read_config(out)
        for key, value in given.items():
            there = stored["arguments"].get(key)
            if value is not None and there != json.loads(json.dumps(value)):
                raise ValueError(
                    f"--{key.replace('_', '-')} is {value} here and {there} in {out / 'config.json'}: "
                    "resume with the settings the run was started with"
                )
        args.root, given = args.root or stored["data"]["root"], stored["arguments"]
        if not resume:
            print("this run has no checkpoint yet and starts from the beginning", file=sys.stderr)
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; choose another --out, or continue it with --resume")
    config = stored if resume else new_configuration(given, args.root or "data")
    config["data"]["root"] = str(Path(args.root or "data").resolve())
    options = {"download": args.download, "workers": args.workers, "quiet": args.quiet}
    train(config, out, device=choose_device(args.device), resume=resume, **options)


def new_configuration(given: dict[str, Any], root: str) -> dict[str, Any]:
    """The configuration of a new run, from the arguments in `DECIDING` and `LABELS`."""
    if given["data"] is None:
        raise ValueError("--data is missing; expected scenes, camvid, voc2012 or folder")
    given = given | {"profile": given["profile"] or "quick", "seed": given["seed"] or 0}
    settings = asdict(PROFILES[given["data"], given["profile"]])
    settings |= {"size": given["size"], "crop": None} if given["size"] else {}
    settings |= {} if given["context"] else {"context": None}
    if weights := given.get("weights"):
        weights = weights if weights == "imagenet" else str(Path(weights).resolve())
        norm = weights != "imagenet" and any(name.endswith("running_mean") for name in read_vgg(weights))
        settings |= pretrained(settings, weights, batch_norm=norm)
    settings |= {key: given[key] for key in ("epochs", "batch", "learning_rate") if given.get(key)}
    data = {"name": given["data"], "root": root}
    if labels := label_arguments(**{key: given.get(key) for key in LABELS}):
        if given["data"] != "folder":
            raise ValueError(f"{', '.join(labels)} belong to --data folder; {given['data']} has its own classes")
        data["labels"] = labels
    config = {"arguments": given, "data": data, "settings": settings, "seed": given["seed"]}
    return config | {"torch": torch.__version__}


def evaluate(args: argparse.Namespace) -> None:
    """Score a run; print JSON, or write it to args.json."""
    from pwlib.tools.scoring import score_run

    options = {"data": args.data, "root": args.root, "download": args.download, "workers": args.workers}
    result = score_run(Path(args.run), args.split, device=choose_device(args.device), **options)
    if args.json is None:
        print(json.dumps(result, indent=1))
    else:
        checkpoints.save_json(args.json, result)


def predict(args: argparse.Namespace) -> int:
    """Label images and print the files that are written; 1 if an image could not be labelled."""
    from pwlib.tools.predict import find_images, image_in_subfolder, label_files

    run = load_run(args.run, device=choose_device(args.device))
    images = find_images(args.images)
    for place in filter(os.path.isdir, args.images):
        if other := image_in_subfolder(place, {args.out, *(path.parent for path in images)}):
            text = f"note: {other} is not labelled, because subfolders are not searched"
            print(f"{text}; the pattern '{Path(glob.escape(place), '**', '*')}' includes them", file=sys.stderr)
    failed = []
    for path, files, reason in label_files(run, images, args.out, apply_crf=args.crf):
        print(*files, sep="\n", end="\n" if files else "")
        failed += [reason if str(path) in reason else f"{path}: {reason}"] if reason else []
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def labels(args: argparse.Namespace) -> int:
    """Check and summarise a folder of images and labels; 2 if there are errors."""
    from pwlib.annotations.check import check_folder
    from pwlib.tools.pictures import label_sheet

    options = label_arguments(args.classes, args.palette, args.values, args.void)
    report = check_folder(args.root, decode_images=True, **options)
    print(report)
    if args.sheet:
        label_sheet(report).save(args.sheet)
        print(f"\n{args.sheet} shows images with their labels")
    return 2 if report.errors else 0
