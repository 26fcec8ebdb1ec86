"""Measure whether a contextual CRF separates visually similar classes that a local network confuses.

In Scenes, plane and boat have the same shape and colours, and so have roof and tent; only their surroundings differ.
The network here sees 10 px and an object has 10 to 28 px, so inside an object it sees no surroundings.

    stage 1   network and contextual CRF, by the piecewise likelihood, on three quarters of the images
    stage 2   the dense CRF and the weights of the pairwise terms, on the other quarter, with a fixed network

For comparison the same network gets a dense CRF without context, trained in the same stage 2 on the same images. All
are scored on test scenes; nothing is selected on them.

`--network largefov` repeats this with DeepLab-LargeFOV at a quarter of VGG's width, one cell per 8 px. The receptive
field of each cell is larger than the image.

    python benchmarks/context/run.py                  about two minutes a seed on one core; writes result.json
    python benchmarks/context/run.py --network largefov
    python benchmarks/context/run.py --data camvid --root data/camvid --seeds 0 1 2     the same on photographs
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF
from pwlib.data import Augment, SegmentationDataset, hold_out, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, Normalize, convolution, receptive_field, resize_logits
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
LOOK_ALIKES = ("plane", "boat", "roof", "tent")
SETTINGS = {
    "train_images": 160,
    "test_images": 60,
    "epochs": {"scenes, local": [8, 2], "scenes, largefov": [24, 2], "camvid, local": [12, 2]},
    "camvid_size": [90, 120],
    "batch": 4,
    "channels": 48,
    "hidden": 32,
    "neighbours": 24,
    "learning_rate": 4e-3,
    "crf": {
        "scenes": {"theta_alpha": 20.0, "theta_beta": 20.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0},
        "camvid": {"theta_alpha": 20.0, "theta_beta": 10.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0},
    },
}


class LocalNet(nn.Module):
    """A network with a receptive field of 10 px and one cell per 4 px."""

    cell_size = 4

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.feature_channels = channels
        self.layers = nn.Sequential(
            Normalize(),
            *convolution(3, channels // 2, batch_norm=True),
            nn.MaxPool2d(2, ceil_mode=True),
            *convolution(channels // 2, channels, batch_norm=True),
            nn.MaxPool2d(2, ceil_mode=True),
            *convolution(channels, channels, 1, batch_norm=True),
            *convolution(channels, channels, 1, batch_norm=True),
        )
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.receptive_field = receptive_field(self.layers)

    def features(self, image: Tensor) -> Tensor:
        return self.layers(image)

    def forward(self, image: Tensor) -> Tensor:
        return resize_logits(self.head(self.features(image)), image.shape[-2:], stride=self.cell_size)


def build_network(name: str, classes: int) -> nn.Module:
    if name == "local":
        return LocalNet(classes, SETTINGS["channels"])
    return DeepLabLargeFOV(classes, width=0.25, batch_norm=True, dropout=0.1)


def splits(name: str, root: str, seed: int) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Return the training set and the scored set."""
    if name == "scenes":
        scored = load("scenes", "test", length=SETTINGS["test_images"])
        return load("scenes", "train", length=SETTINGS["train_images"], seed=seed), scored
    size = tuple(SETTINGS["camvid_size"])
    return load(name, "train", root, size=size, cache=True), load(name, "val", root, size=size, cache=True)


def run(seed: int, counting: str, network: str, data_name: str, root: str) -> dict:
    data, scored = splits(data_name, root, seed)
    test, classes = DataLoader(scored, batch_size=8), data.num_classes
    fit, held = hold_out(data, 0.25)
    counts = sum(torch.bincount(data[i][1].flatten(), minlength=256)[:classes] for i in range(len(data)))
    torch.manual_seed(seed)
    unary, epochs = build_network(network, classes), SETTINGS["epochs"][f"{data_name}, {network}"]
    options = {"hidden": SETTINGS["hidden"], "neighbours": SETTINGS["neighbours"], "counting": counting}
    context = ContextualCRF(classes, unary.feature_channels, **options)
    crf = DenseCRF(classes, filtering="lattice", **SETTINGS["crf"][data_name])
    model = PiecewiseTrainedModel(classes, 5, unary=unary, context=context, crf=crf)

    def trainer(model: nn.Module) -> PiecewiseTrainer:
        return PiecewiseTrainer(
            model,
            num_classes=classes,
            learning_rate=SETTINGS["learning_rate"],
            optimizer="adamw",
            schedule="onecycle",
            joint_pieces=True,
            class_weights=balanced_weights(counts),
            train_iterations=5,
            test_iterations=5,
            seed=seed,
        )

    start = time.process_time()
    augment = Augment(scale=(1.0, 1.0), colour=0.0)  # flips only
    loader = DataLoader(fit.with_transform(augment), batch_size=SETTINGS["batch"], shuffle=True)
    trainer(model).train_stage1(loader, epochs[0])
    print("stage 1:", round(time.process_time() - start), "CPU seconds", flush=True)
    scores = {"untuned": evaluate(model, test, iterations=5)}
    alone = PiecewiseTrainedModel(classes, 5, unary=copy.deepcopy(unary), crf=copy.deepcopy(model.crf))
    loader = DataLoader(held, batch_size=SETTINGS["batch"], shuffle=True)
    for name, one in (("context", model), ("alone", alone)):
        trainer(one).train_stage2(loader, epochs[1])
        scores[name] = evaluate(one, test, iterations=5)
    rows = {
        "unary": scores["alone"]["unary"],
        "unary + dense CRF": scores["alone"]["crf"],
        "context, pieces as learned": scores["untuned"]["context"],
        "context, weights learned": scores["context"]["context"],
        "context + dense CRF": scores["context"]["crf"],
    }
    return {
        "seed": seed,
        "data": data_name,
        "network": network,
        "counting": counting,
        "cpu_seconds": round(time.process_time() - start),
        "weights": [round(w, 3) for w in context.weight.clamp(min=0).tolist()],
        "temperature": round(context.log_temperature.exp().item(), 3),
        "rows": {name: summary(found) for name, found in rows.items()},
    }


def summary(scores: dict) -> dict:
    row = {key: round(100 * scores[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}
    if not set(LOOK_ALIKES) <= set(scores["per_class_iou"]):
        return row
    ious = {name: round(100 * scores["per_class_iou"][name], 1) for name in LOOK_ALIKES}
    return row | {"look_alikes": round(sum(ious.values()) / len(ious), 2), **ious}


def interval(values: list[float]) -> str:
    """Format the mean and half the width of its 95 % interval (Student's t)."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return f"{mean:5.1f}"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}[n]
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return f"{mean:5.1f} ± {t * deviation / math.sqrt(n):.1f}"


def table(runs: list[dict]) -> str:
    lines = []
    for kind in dict.fromkeys((run["data"], run["network"], run["counting"]) for run in runs):
        mine = [run for run in runs if (run["data"], run["network"], run["counting"]) == kind]
        columns = list(mine[0]["rows"]["unary"])
        lines.append("{}, network: {}, counting: {}, {} seeds".format(*kind, len(mine)))
        lines.append(f"{'':28}" + "".join(f"{column:>16}" for column in columns))
        for name in mine[0]["rows"]:
            cells = [interval([run["rows"][name][column] for run in mine]) for column in columns]
            lines.append(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
        for key, other in (
            ("context, pieces as learned", "unary"),
            ("context, weights learned", "unary"),
            ("context + dense CRF", "unary + dense CRF"),
        ):
            gains = {c: interval([r["rows"][key][c] - r["rows"][other][c] for r in mine]) for c in columns[:4]}
            lines.append(f"{key} over {other}, paired: " + ", ".join(f"{c} {gain}" for c, gain in gains.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", default="scenes", choices=("scenes", "camvid"))
    parser.add_argument("--root", default="data")
    parser.add_argument("--network", default="local", choices=("local", "largefov"))
    parser.add_argument("--counting", nargs="+", default=["tree"], choices=("tree", "sum"))
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    given = parser.parse_args()
    runs = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    for counting in given.counting:
        for seed in given.seeds:
            kind = (seed, given.data, given.network, counting)
            if not any((r["seed"], r["data"], r["network"], r["counting"]) == kind for r in runs):
                runs.append(run(seed, counting, given.network, given.data, given.root))
                content = {"settings": SETTINGS, "torch": torch.__version__.split("+")[0], "runs": runs}
                given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
