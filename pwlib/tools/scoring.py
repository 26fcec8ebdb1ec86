"""Score the checkpoints of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from pwlib import checkpoints
from pwlib.annotations.classes import read_classes
from pwlib.evaluation import evaluate
from pwlib.tools.runs import build_model, read_config, trained_stages
from pwlib.tools.training import COLUMNS, load_split


def score_run(
    run: Path,
    split: str = "val",
    *,
    data: str | None = None,
    root: str | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    workers: int = 0,
) -> dict[str, Any]:
    """Score every stage that has a checkpoint: {stage: {part: scores}}, ready for JSON.

    Parts are "unary", "context" if the model has one, and "crf" ("default_crf" after stage 1). Scores are those of
    `COLUMNS`, and the IoU of each class.

    Args:
        data, root: another data set or folder than the run's. Its classes must be those of the run. In another folder
            classes.txt states them, also for a run that was given other names (`train --classes`); a folder without
            it may contain fewer.

    Raises:
        ValueError: the data set has other classes than the run, or the same in another order.
    """
    config = read_config(run)
    stages = trained_stages(run)
    stored = config["data"]
    name, root = data or stored["name"], root or stored["root"]
    labels = dict(stored.get("labels", {})) if name == stored["name"] else {}
    if name == "folder":
        names = Path(root) / "classes.txt"
        if not names.is_file():
            labels.setdefault("class_names", config["classes"])
        elif Path(root).resolve() != Path(stored["root"]).resolve():
            # `train --classes` says nothing about labels of another folder.
            class_names, colours = read_classes(names)
            labels |= {"class_names": class_names} | ({} if colours is None else {"palette": colours})
    config["data"] = {"name": name, "root": root, "labels": labels}
    dataset = load_split(config, split, download=download)
    if list(dataset.class_names) != config["classes"]:
        raise ValueError(
            f"{name} has the classes {', '.join(dataset.class_names)}; "
            f"{run} was trained on {', '.join(config['classes'])}; expected the same classes in the same order"
        )
    model = build_model(config["settings"], dataset.num_classes).to(device)
    batch = config["settings"]["batch"] if config["settings"]["size"] else 1
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers)
    keys = [key for key, _ in COLUMNS] + ["per_class_iou"]
    result = {}
    for stage in stages:
        checkpoints.load_model(run / f"{stage}-best.pt", model)
        scores = evaluate(model, loader)
        if stage == "stage1":  # its CRF still has the parameters that the run started with
            scores["default_crf"] = scores.pop("crf")
        result[stage] = {part: {key: values[key] for key in keys} for part, values in scores.items()}
    return result
