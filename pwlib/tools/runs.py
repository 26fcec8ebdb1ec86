"""Run folders: their configuration, the model it describes, and the trained model.

`python -m pwlib train` makes a run folder. It holds config.json (everything that is needed to build the model and its
data again), history.json, the checkpoints stage1-best.pt, stage1-last.pt, ..., and predictions.png.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwlib import checkpoints
from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, FeatMapNet
from pwlib.tools.tiling import predict

STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Run:
    """A trained model with what is needed to use it.

    Attributes:
        model: in evaluation mode, with the weights of the last stage that was trained.
        class_names: K names. palette: uint8 [K + 1, 3], the last row is the colour of void.
        short_side: length in px of the shorter side of the images it was trained on; None: images of any size.
    """

    model: PiecewiseTrainedModel
    class_names: tuple[str, ...]
    palette: np.ndarray
    short_side: int | None

    def predict(self, image: Tensor, *, apply_crf: bool = True) -> Tensor:
        """Label probabilities [K, H, W] of an image [3, H, W] of any size, RGB in [0, 1]; see `tiling.predict`."""
        return predict(self.model, image, short_side=self.short_side, apply_crf=apply_crf)


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`, or a GPU if there is one; ValueError if it cannot be used."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here; expected cpu, or cuda where there is a GPU") from error


def load_run(folder: str | Path, *, device: str | torch.device = "cpu") -> Run:
    """Load the model of a run folder, ready to predict.

    Raises:
        FileNotFoundError: the folder is not a run, or has no checkpoint yet.
        ValueError: its configuration or its checkpoint is damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = build_model(config["settings"], len(config["classes"]))
    checkpoints.load_model(folder / f"{trained_stages(folder)[-1]}-best.pt", model)
    size = config["settings"]["size"]
    palette = np.array(config["palette"], dtype=np.uint8)
    return Run(model.to(device).eval(), tuple(config["classes"]), palette, min(size) if size else None)


def build_model(settings: dict[str, Any], num_classes: int, *, weights: str | None = None) -> PiecewiseTrainedModel:
    """Build the model that a run's settings describe, with random weights or those of `pwlib.pretrained.read_vgg`."""
    options = {key: settings[key] for key in ("width", "batch_norm", "dropout")} | {"weights": weights}
    crf = DenseCRF(num_classes, **settings["crf"])
    if not settings.get("context"):
        return PiecewiseTrainedModel(num_classes, unary=DeepLabLargeFOV(num_classes, **options), crf=crf)
    unary = FeatMapNet(num_classes, **options, **settings["context"]["network"])
    context = ContextualCRF(num_classes, unary.feature_channels, **settings["context"]["crf"])
    return PiecewiseTrainedModel(num_classes, unary=unary, context=context, crf=crf)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a run folder; FileNotFoundError or ValueError if it is missing, damaged or incomplete."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if missing := {"arguments", "data", "settings", "seed", "classes", "palette"} - set(config):
        raise ValueError(f"{path} is not a run's configuration: it has no {min(missing)!r}")
    return config


def trained_stages(folder: Path) -> list[str]:
    """The stages that have a checkpoint in a run folder, in order; FileNotFoundError if there is none."""
    stages = [stage for stage in STAGES if (folder / f"{stage}-best.pt").is_file()]
    if not stages:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; expected stage1-best.pt")
    return stages
