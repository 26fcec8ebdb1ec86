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
    python benchmarks/three_stages/claims.py --table                the README's table, and longer ones

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
from study import Study, cell, mean_and_half, parser, settings_searched

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


def minus(a: list[float], b: list[float]) -> str:
    return cell([x - y for x, y in zip(a, b, strict=True)], sign=True)


def ratio_of_compute(ours: list[dict], joint: list[dict], margin: float) -> str:
    """Compute of joint / of piecewise training, to `margin` points below the best validation mIoU of the weaker one."""
    logs = []
    for pair in zip(ours, joint, strict=True):
        target = min(max(row[1] for curve in run["curves"].values() for row in curve) for run in pair) - margin
        logs.append(math.log(compute_to(pair[1], target) / compute_to(pair[0], target)))
    mean, half = mean_and_half(logs)
    low, ratio, high = (math.exp(mean + x) for x in (-half, 0, half))
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def comparisons(rows: dict[str, dict[str, str]]) -> list[str]:
    """A table of {network: {comparison: text}} with a column for each network."""
    names = list(dict.fromkeys(name for column in rows.values() for name in column))
    lines = [f"| comparison | {' | '.join(rows).replace('stride', 'stride ')} |", "|---|" + "--:|" * len(rows)]
    return lines + [f"| {name} | {' | '.join(column.get(name, '') for column in rows.values())} |" for name in names]


def table(runs: dict[str, dict]) -> str:
    """Markdown: the main comparisons and further ones, with a column per network; then the methods of each network."""
    main, more, methods = {}, {}, []
    for network in ("stride8", "stride2"):
        here = [run for run in runs.values() if run["network"] == network]
        found = {method: {run["seed"]: run for run in here if run.get("method") == method} for method in METHODS}
        seeds = sorted(set.intersection(*map(set, found.values())))
        if not seeds:
            continue
        alone, ours, joint = ([found[method][seed] for seed in seeds] for method in METHODS)
        default = [run["default CRF"]["crf"]["miou"] for run in alone]
        searched, own, last = ([run["test"]["crf"]["miou"] for run in some] for some in (alone, ours, joint))
        equal = [at_equal_compute(run, one["compute"])[0] for run, one in zip(joint, ours, strict=True)]
        start, after = {}, {}  # test mIoU; the curve of stage 2 or 3 begins with the model that the stage started from
        for stage in ("stage2", "stage3"):
            start[stage] = [run["curves"][stage][0][2] for run in ours]
            after[stage] = [max(run["curves"][stage], key=lambda row: row[1])[2] for run in ours]
        of_alone, of_ours, of_joint = ([run["compute"] for run in some] for some in (alone, ours, joint))

        rows = main[network] = {
            "test mIoU of piecewise": cell(own),
            "piecewise - independent, default CRF": minus(own, default),
            "piecewise - independent, searched CRF": minus(own, searched),
            "piecewise - joint, equal compute": minus(own, equal),
            "piecewise - joint, at its own end": minus(own, last),
            "piecewise, after stage 2 - independent, searched CRF": minus(after["stage2"], searched),
            "stage 2 - default CRF, same network": minus(after["stage2"], start["stage2"]),
        }
        crfs = [run["CRFs of stage 2"] for run in here if "CRFs of stage 2" in run]
        for name, words in {"searched": "searched CRF", "kernels": "learned kernels, Potts"}.items() if crfs else ():
            rows[f"stage 2 - {words}, same network"] = minus([r["learned"] for r in crfs], [r[name] for r in crfs])
        rows["stage 3 - stage 2"] = minus(after["stage3"], start["stage3"])
        exchanged = runs.get(f"{network}, exchange", {}).get("own minus others", {})
        others = more[network] = {"joint, at its own end - independent, searched CRF": minus(last, searched)}
        for family, values in exchanged.items():
            where, when = (others, "joint training") if "joint" in family else (rows, f"stage {family[-1]}")
            where[f"own CRF - CRFs of other seeds, after {when}"] = cell(values, sign=True)
        rows["compute of piecewise / of independent"] = f"{statistics.fmean(of_ours) / statistics.fmean(of_alone):.1f}"
        for margin in (1, 0, 2, 5) if len(seeds) > 1 else ():
            name = f"compute of joint / of piecewise, to the target - {margin}"
            (others if margin != 1 else rows)[name] = ratio_of_compute(ours, joint, margin)
        ended = [a < b for a, b in zip(of_joint, of_ours, strict=True)]
        others["joint runs that end within the compute of piecewise"] = f"{sum(ended)} of {len(ended)}"
        ends = [  # the number of epochs of each stage; stage 1 has no epoch 0
            [len(curve) - (stage != "stage1") for run in some for stage, curve in run["curves"].items()]
            for some in (alone, ours, joint)
        ]
        limited = ", ".join(str(sum(epochs == SETTINGS["epochs"] for epochs in stages)) for stages in ends)
        others["runs that reached the limit of epochs: independent, piecewise, joint"] = limited
        if f"{network}, costs" in runs:
            others["steps of stage 1 that a joint step costs"] = f"{runs[f'{network}, costs']['cost']['stage3']:.1f}"
        if len(seeds) > 2:  # does one run decide a result?
            kept = [i for i in range(len(seeds)) if min(own[i], last[i]) > min(own + last)]
            own_, equal_, last_ = ([values[i] for i in kept] for values in (own, equal, last))
            without = "without the seed of the lowest run"
            others[f"piecewise - joint, equal compute, {without}"] = minus(own_, equal_)
            others[f"SD of piecewise / joint at its own end, {without}"] = interval_of_ratio(own_, last_)

        arms = {  # {name: (test mIoU, compute)}
            "independent, default CRF": (default, of_alone),
            "independent, searched CRF": (searched, of_alone),
            "piecewise": (own, of_ours),
            "piecewise, after stage 2": (after["stage2"], [run["curves"]["stage2"][-1][0] for run in ours]),
            "joint, equal compute": (equal, list(map(min, of_joint, of_ours))),
            "joint, at its own end": (last, of_joint),
        }
        methods += ["", f"{network}, {len(seeds)} seeds", ""]
        methods.append("| method | test mIoU | lowest run | piecewise is above | SD | SD of piecewise / it | compute |")
        methods.append("|---|--:|--:|--:|--:|--:|--:|")
        for name, (values, compute) in arms.items():
            above = deviation = ratio = ""
            if name != "piecewise":
                above = f"{sum(p > v for p, v in zip(own, values, strict=True))} of {len(seeds)}"
            if len(seeds) > 1:
                deviation = f"{statistics.stdev(values):.1f}"
                ratio = "" if name == "piecewise" else interval_of_ratio(own, values)
            cells = (name, cell(values), f"{min(values):.1f}", above, deviation, ratio, cell(compute, digits=0))
            methods.append(f"| {' | '.join(cells)} |")
    return "\n".join([*comparisons(main), "", *comparisons(more), *methods])


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
            study.add(costs, {**about, "cost": calibrate(given.network)})
        for seed in given.seeds:
            for method in METHODS:
                key = f"{given.network}, {method}, seed {seed}"
                if key not in study.runs:
                    row = train(method, given.network, seed, study.runs[costs]["cost"])
                    study.add(key, {**about, "method": method, "seed": seed, **row})
                    print(key, row["test"], row["compute"], row["minutes"], "minutes", flush=True)
            key = f"{given.network}, CRFs of stage 2, seed {seed}"
            if key not in study.runs:
                study.add(key, {**about, "CRFs of stage 2": crfs_of_stage2(given.network, seed)})
        if len(given.seeds) > 1 and f"{given.network}, exchange" not in study.runs:
            own = exchange(given.network, given.seeds)
            study.add(f"{given.network}, exchange", {**about, "own minus others": own})
    print(table(study.runs))


if __name__ == "__main__":
    main()
