"""Test four claims on training in stages: stability, efficiency, modularity and performance, with trained networks.

    independent   stage 1 on all training images; then a dense CRF, whose five parameters are the best of 24 settings on
                  the validation scenes, with and without the network's class weights undone
    piecewise     stage 1 on three quarters of the images, stage 2 on the last quarter, stage 3 on all
    joint         stage 3 from the start: equal compute is its best epoch within the compute of "piecewise"

Every stage has a constant learning rate and ends when the validation mIoU has not improved for ten epochs of 40 steps
(of the CRF's labels in stages 2 and 3); the best epoch is kept. Test scores of every epoch are recorded, and nothing is
selected on them. Compute is in stage-1 steps: a step of another stage counts as measured on this machine, once per
network. Training, held-out, validation and test scenes are the same for all seeds.

Behind the network that stage 2 of "piecewise" starts from, its CRF is compared with the best of the 24 settings and
with one that is learned in the same way while the Potts compatibility is kept ("kernels").

    python benchmarks/three_stages/claims.py --network stride8     about 16 CPU minutes a seed on one core
    python benchmarks/three_stages/claims.py --network stride2     about 11
    python benchmarks/three_stages/claims.py --table

"stride8" is DeepLab-LargeFOV at an eighth of VGG's width, "stride2" the network of notebook 07. claims.json is written
after every run; a command that was stopped continues where it was. The weights, which the exchange of CRFs between
seeds needs, are kept in runs/three_stages/claims.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import SETTINGS as COMMON
from run import Steps, Undone
from study import Study, cell, command, mean_and_half, parser, settings_searched

from pwlib import checkpoints
from pwlib.crf import DenseCRF
from pwlib.data import Augment, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
WORK = Path("runs/three_stages/claims")
# 97.5 % quantile of F with n - 1 and n - 1 degrees of freedom, by n
F_975 = {2: 647.789, 3: 39.0, 4: 15.439, 5: 9.605, 6: 7.146, 7: 5.820, 8: 4.995}
METHODS = ("independent", "piecewise", "joint")
SETTINGS = {
    **{key: COMMON[key] for key in ("size", "train_images", "test_images", "width", "batch", "iterations", "crf")},
    "held_images": 40,  # the last of the training images
    "val_images": 40,
    "crf_batch": 2,
    "learning_rate": 2e-3,
    "crf_learning_rate": 0.05,
    "stage3_factor": 0.2,
    "steps": 40,  # per epoch
    "patience": 10,
    "epochs": 100,  # at most
    "searched": {
        "theta_alpha": [4, 40],
        "theta_beta": [5, 40],
        "theta_gamma": [0.8, 4],
        "w_bilateral": [0.5, 12],
        "w_spatial": [0.1, 5],
    },
    "settings_searched": 24,
}


class Watched(PiecewiseTrainer):
    """A trainer that scores the test images whenever it scores the validation images."""

    def evaluate(self, loader, **options):
        self.tested = [*getattr(self, "tested", []), super().evaluate(batches("test"), **options)]
        return super().evaluate(loader, **options)


@functools.cache
def scenes(split: str):
    return load("scenes", split, size=SETTINGS["size"], length=SETTINGS[f"{split}_images"])


@functools.cache
def batches(split: str) -> list:
    return list(torch.utils.data.DataLoader(scenes(split), batch_size=20))


@functools.cache
def class_weights() -> torch.Tensor:
    return balanced_weights(sum(torch.bincount(y.flatten(), minlength=256)[:10] for _, y in scenes("train")))


def stride2(width: int = 16) -> torch.nn.Sequential:
    """Build the network of notebook 07, with stride 2 and dilations up to 8."""
    wide = 2 * width
    layers: list[torch.nn.Module] = []
    plan = [(3, width, 1, 1), (width, wide, 1, 2), *((wide, wide, d, 1) for d in (2, 4, 8, 1))]
    for inputs, outputs, dilation, stride in plan:
        convolution = torch.nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        layers += [convolution, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(wide, 10, 1))


def build(network: str, seed: int) -> PiecewiseTrainedModel:
    torch.manual_seed(seed)
    deep = network == "stride8"
    unary = DeepLabLargeFOV(10, width=SETTINGS["width"], batch_norm=True, dropout=0.1) if deep else stride2()
    crf = DenseCRF(10, filtering="lattice", **SETTINGS["crf"])
    return PiecewiseTrainedModel(10, SETTINGS["iterations"], unary=unary, crf=crf)


def build_trainer(model, seed: int, *, stage3_factor: float, patience: int | None = SETTINGS["patience"]) -> Watched:
    return Watched(
        model,
        num_classes=10,
        learning_rate=SETTINGS["learning_rate"],
        crf_learning_rate=SETTINGS["crf_learning_rate"],
        stage3_factor=stage3_factor,
        optimizer="adamw",
        schedule="constant",
        patience=patience,
        class_weights=class_weights(),
        train_iterations=SETTINGS["iterations"],
        test_iterations=SETTINGS["iterations"],
        seed=seed,
        progress=False,
    )


def calibrate(network: str, repeats: int = 5) -> dict[str, float]:
    """The cost of a step of each stage in stage-1 steps: medians of interleaved CPU times."""
    trainer, found = (
        build_trainer(build(network, 0), 0, stage3_factor=1.0, patience=None),
        {f"stage{i}": [] for i in (1, 2, 3)},
    )
    for repeat in range(repeats + 1):
        for stage, times in found.items():
            size = SETTINGS["crf_batch"] if stage == "stage2" else SETTINGS["batch"]
            start = time.process_time()
            getattr(trainer, f"train_{stage}")(Steps(scenes("train"), 4, size, repeat), 1)
            if repeat:  # the first round draws the scenes and warms the caches
                times.append((time.process_time() - start) / 4)
    return {name: round(statistics.median(t) / statistics.median(found["stage1"]), 2) for name, t in found.items()}


def train(method: str, network: str, seed: int, cost: dict[str, float]) -> dict:
    """Train once. Rows of a stage's curve: compute so far, validation mIoU, test mIoU and accuracy."""
    model, data = build(network, seed), scenes("train")
    held = SETTINGS["held_images"]
    fit = data if method == "independent" else data.subset(range(len(data) - held))
    augment = Augment(scale=(0.8, 1.2))
    sets = {
        "stage1": fit.with_transform(augment),
        "stage2": data.subset(range(len(data) - held, len(data))),
        "stage3": data.with_transform(augment),
    }
    stages = {"independent": ("stage1",), "piecewise": tuple(sets), "joint": ("stage3",)}[method]
    factor = 1.0 if method == "joint" else SETTINGS["stage3_factor"]
    trainer, start, spent, curves = build_trainer(model, seed, stage3_factor=factor), time.process_time(), 0.0, {}
    for stage in stages:
        trainer.tested = []
        size = SETTINGS["crf_batch"] if stage == "stage2" else SETTINGS["batch"]
        loader = Steps(sets[stage], SETTINGS["steps"], size, seed)
        records = getattr(trainer, f"train_{stage}")(loader, SETTINGS["epochs"], batches("val"))[stage]
        part, curves[stage] = "unary" if stage == "stage1" else "crf", []
        for record, tested in zip(records, trainer.tested, strict=True):
            compute = spent + record["epoch"] * SETTINGS["steps"] * cost[stage]
            values = (record["val"][part]["miou"], tested[part]["miou"], tested[part]["pixel_accuracy"])
            curves[stage].append([round(compute, 1), *(round(100 * value, 2) for value in values)])
        spent = curves[stage][-1][0]
        if stage != "stage1":
            checkpoints.save(WORK / f"{network}-{method}-{stage}-{seed}.pt", {"model": model.state_dict()})
    row = {"curves": curves, "default CRF": numbers(model)} if method == "independent" else {"curves": curves}
    if method == "independent":
        row |= search(model)
    row |= {"test": numbers(model), "compute": spent}
    return row | {"minutes": round((time.process_time() - start) / 60, 1)}


@torch.no_grad()
def search(model: PiecewiseTrainedModel) -> dict:
    """Give the model the best CRF of 24, and its network without class weights if that is better, on validation."""
    found, crfs = [], settings_searched(SETTINGS["crf"], SETTINGS["searched"], SETTINGS["settings_searched"])
    for undone, unary in enumerate((model.unary, Undone(model.unary, class_weights()))):
        for some in crfs:
            one = PiecewiseTrainedModel(10, unary=unary, crf=DenseCRF(10, filtering="lattice", **some))
            miou = evaluate(one, batches("val"), iterations=SETTINGS["iterations"])["crf"]["miou"]
            found.append((miou, one, {"parameters": some, "class weights undone": bool(undone)}))
    _, best, chosen = max(found, key=lambda entry: entry[0])
    model.unary, model.crf = best.unary, best.crf
    return chosen


def crfs_of_stage2(network: str, seed: int) -> dict[str, float]:
    """Test mIoU of three CRFs behind the network that stage 2 of "piecewise" started from.

    "learned" is that of stage 2; "kernels" is learned in the same way, with the Potts compatibility kept; "searched" is
    the best of the 24 settings.
    """
    learned, kernels, searched = (build(network, seed) for _ in range(3))
    checkpoints.load_model(WORK / f"{network}-piecewise-stage2-{seed}.pt", learned)
    kernels.unary, searched.unary = copy.deepcopy(learned.unary), copy.deepcopy(learned.unary)
    kernels.crf.compatibility.requires_grad_(False)
    data = scenes("train")
    held = data.subset(range(len(data) - SETTINGS["held_images"], len(data)))
    loader = Steps(held, SETTINGS["steps"], SETTINGS["crf_batch"], seed)
    trainer = build_trainer(kernels, seed, stage3_factor=SETTINGS["stage3_factor"])
    trainer.train_stage2(loader, SETTINGS["epochs"], batches("val"))
    chosen = search(searched)
    models = {"learned": learned, "kernels": kernels, "searched": searched}
    return {name: numbers(model)["crf"]["miou"] for name, model in models.items()} | {"chosen": chosen}


def numbers(model: PiecewiseTrainedModel) -> dict:
    """Test scores of network and CRF, in per cent."""
    keys = ("miou", "pixel_accuracy", "boundary_iou")
    found = evaluate(model, batches("test"), iterations=SETTINGS["iterations"])
    return {part: {key: round(100 * scores[key], 2) for key in keys} for part, scores in found.items()}


def exchange(network: str, seeds: list[int]) -> dict[str, list[float]]:
    """For each seed, test mIoU with its own CRF less the mean with the CRFs of the other seeds."""
    result = {}
    for family in ("piecewise-stage2", "piecewise-stage3", "joint-stage3"):
        models = {seed: build(network, seed) for seed in seeds}
        for seed, model in models.items():
            checkpoints.load_model(WORK / f"{network}-{family}-{seed}.pt", model)
        scores = {
            (a, b): numbers(PiecewiseTrainedModel(10, unary=models[a].unary, crf=models[b].crf))["crf"]["miou"]
            for a in seeds
            for b in seeds
        }
        others = {a: statistics.fmean(scores[a, b] for b in seeds if b != a) for a in seeds}
        result[family] = [round(scores[a, a] - others[a], 2) for a in seeds]
    return result


def at_equal_compute(run: dict, compute: float) -> list[float]:
    """Test mIoU and accuracy at the epoch with the best validation mIoU within `compute`."""
    rows = [row for curve in run["curves"].values() for row in curve if row[0] <= compute]
    return max(rows, key=lambda row: row[1])[2:]


def compute_to(run: dict, target: float) -> float:
    """Compute until the validation mIoU first reaches `target`; the whole run's, if it does not."""
    return next((row[0] for curve in run["curves"].values() for row in curve if row[1] >= target), run["compute"])


def interval_of_ratio(a: list[float], b: list[float]) -> str:
    """The ratio of two standard deviations and its 95 % interval, from the F distribution (independent samples)."""
    ratio, factor = statistics.stdev(a) / statistics.stdev(b), math.sqrt(F_975[len(a)])
    return f"{ratio:.2f} [{ratio / factor:.2f}, {ratio * factor:.2f}]"


def table(runs: dict[str, dict]) -> str:
    """Markdown: one table per network with what the four claims need."""
    lines = []
    for network in ("stride8", "stride2"):
        ran = [run for run in runs.values() if run["network"] == network and "method" in run]
        found = {method: {run["seed"]: run for run in ran if run["method"] == method} for method in METHODS}
        seeds = sorted(set.intersection(*map(set, found.values())))
        if not seeds:
            continue
        alone, ours, joint = ([found[method][seed] for seed in seeds] for method in METHODS)
        arms = {  # {name: (test mIoU, compute)}
            "independent, default CRF": (
                [r["default CRF"]["crf"]["miou"] for r in alone],
                [r["compute"] for r in alone],
            ),
            "independent, searched CRF": ([r["test"]["crf"]["miou"] for r in alone], [r["compute"] for r in alone]),
            "piecewise": ([r["test"]["crf"]["miou"] for r in ours], [r["compute"] for r in ours]),
            "piecewise, after stage 2": (
                [max(r["curves"]["stage2"], key=lambda row: row[1])[2] for r in ours],
                [r["curves"]["stage2"][-1][0] for r in ours],
            ),
            "joint, equal compute": (
                [at_equal_compute(r, one["compute"])[0] for r, one in zip(joint, ours, strict=True)],
                [min(r["compute"], one["compute"]) for r, one in zip(joint, ours, strict=True)],
            ),
            "joint, until it stops improving": (
                [r["test"]["crf"]["miou"] for r in joint],
                [r["compute"] for r in joint],
            ),
        }
        lines += [f"{network}, {len(seeds)} seeds", ""]
        lines.append(
            "| method | test mIoU | piecewise minus it | above it | SD over seeds | SD of piecewise / it | compute |"
        )
        lines.append("|---|--:|--:|--:|--:|--:|--:|")
        own = arms["piecewise"][0]
        for name, (values, compute) in arms.items():
            gain = above = deviation = ratio = ""
            if name != "piecewise":
                gains = [p - v for p, v in zip(own, values, strict=True)]
                gain, above = cell(gains, sign=True), f"{sum(g > 0 for g in gains)} of {len(gains)}"
            if len(seeds) > 1:
                deviation = f"{statistics.stdev(values):.1f}"
                ratio = "" if name == "piecewise" else interval_of_ratio(own, values)
            cells = (name, cell(values), gain, above, deviation, ratio, cell(compute, digits=0))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| question | result |", "|---|--:|"]
        for stage in ("stage2", "stage3"):  # a curve begins with the model that the stage started from
            gains = [max(r["curves"][stage], key=lambda row: row[1])[2] - r["curves"][stage][0][2] for r in ours]
            lines.append(f"| points that {stage} adds | {cell(gains, sign=True)} |")
        for name in ("piecewise, after stage 2", "joint, until it stops improving"):
            gains = [a - b for a, b in zip(arms[name][0], arms["independent, searched CRF"][0], strict=True)]
            lines.append(f"| {name}, minus: independent, searched CRF | {cell(gains, sign=True)} |")
        best = [
            [max(row[1] for curve in r["curves"].values() for row in curve) for r in some] for some in (ours, joint)
        ]
        for margin in (0, 1, 2, 5) if len(seeds) > 1 else ():  # points below the best score of the weaker method
            logs = []
            for a, b, pair in zip(ours, joint, zip(*best, strict=True), strict=True):
                logs.append(math.log(compute_to(b, min(pair) - margin) / compute_to(a, min(pair) - margin)))
            mean, half = mean_and_half(logs)
            low, ratio, high = (math.exp(mean + x) for x in (-half, 0, half))
            title = f"compute of joint / of piecewise to {margin} points below the weaker one's best validation score"
            lines.append(f"| {title} | {ratio:.2f} [{low:.2f}, {high:.2f}] |")
        found = [
            run["CRFs of stage 2"] for run in runs.values() if run["network"] == network and "CRFs of stage 2" in run
        ]
        for name in ("kernels", "searched") if found else ():
            gains = [row["learned"] - row[name] for row in found]
            lines.append(f"| network of stage 1: CRF of stage 2 minus {name} | {cell(gains, sign=True)} |")
        for family, values in runs.get(f"{network}, exchange", {}).get("own minus others", {}).items():
            lines.append(f"| {family}: own CRF minus those of other seeds | {cell(values, sign=True)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "claims.json")
    arguments.add_argument("--network", choices=("stride8", "stride2"), default="stride8")
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        WORK.mkdir(parents=True, exist_ok=True)
        about = {"network": given.network}
        costs = f"{given.network}, costs"
        if costs not in study.runs:
            study.add(costs, {**about, "cost": calibrate(given.network)}, command=command())
        for seed in given.seeds:
            for method in METHODS:
                key = f"{given.network}, {method}, seed {seed}"
                if key not in study.runs:
                    row = train(method, given.network, seed, study.runs[costs]["cost"])
                    study.add(key, {**about, "method": method, "seed": seed, **row}, command=command())
                    print(key, row["test"], row["compute"], row["minutes"], "minutes", flush=True)
            key = f"{given.network}, CRFs of stage 2, seed {seed}"
            if key not in study.runs:
                study.add(key, {**about, "CRFs of stage 2": crfs_of_stage2(given.network, seed)}, command=command())
        if len(given.seeds) > 1 and f"{given.network}, exchange" not in study.runs:
            own = exchange(given.network, given.seeds)
            study.add(f"{given.network}, exchange", {**about, "own minus others": own}, command=command())
    print(table(study.runs))


if __name__ == "__main__":
    main()
