"""Measure what each part of the paper's model contributes, one after the other (Lin et al., CVPR 2016, table 1).

    baseline        FeatMap-Net at one scale, without pooling
    + pooling       sliding pyramid pooling, 5x5 and 9x9
    + scales        scales 1.2, 0.8 and 0.4 instead of 1.0
    + dense CRF     a dense CRF after the network of "+ scales", learned in stage 2
    + context       a network trained jointly with a contextual CRF, mean field on that CRF, then a dense CRF; the terms
                    are counted as a tree, or each by its own marginals
    control         the mean probability of two networks as in "+ scales", then the dense CRF of "+ dense CRF"

All networks are trained on the same images (those that are not held out for stage 2, the same for all seeds), for the
same number of epochs. A seed decides initial weights, order and augmentation. Nothing is selected on the scored split:
every stage keeps its last epoch. Differences are paired by seed. The weight of the context's terms is chosen among 0,
0.1, 0.25, 0.5 and 1 on held-out images at the start of stage 2, and then learned.

    python benchmarks/ablation/run.py --data scenes                                    25 CPU minutes a seed
    python benchmarks/ablation/run.py --data camvid --root data/camvid --seeds 0 1 2   46 CPU minutes a seed
    python benchmarks/ablation/run.py --table

Writes DATA.json in this folder after every seed (DATA-full.json with --profile full, for a GPU) and keeps checkpoints
in runs/ablation. A command that was stopped continues where it was.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, mean_and_half, parser, split_of

from pwlib.cli.profiles import PROFILES, Profile
from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import FeatMapNet
from pwlib.objective import TrainerOptions
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
SPLIT = {"scenes": "test", "camvid": "val", "voc2012": "val"}  # the scored split
# Of stages 1 and 2 in the quick profile. On CamVid a long stage 2 may adapt to the held-out drive (see drives).
EPOCHS = {"scenes": (12, 16), "camvid": (20, 2)}
NETWORKS = {
    "baseline": {"scales": (1.0,), "pyramid": ()},
    "pooling": {"scales": (1.0,)},
    "scales": {},
    "second": {},  # the second network of the control
    "context": {},
    "reparametrised": {},  # the network of "context", each term counted by its own marginals; its own stage 2
}
LEARNED = ("scales", "context", "reparametrised")  # have a stage 2
# {rung: (network, output that is scored)}
RUNGS = {
    "baseline": ("baseline", "unary"),
    "+ pooling": ("pooling", "unary"),
    "+ scales": ("scales", "unary"),
    "+ dense CRF": ("scales", "crf"),
    "+ context": ("context", "crf"),
    "control": ("ensemble", "crf"),
}
# Further outputs of the same networks.
DETAILS = {
    "context's network, alone": ("context", "unary"),
    "context, no dense CRF": ("context", "context"),
    "reparametrised, both CRFs": ("reparametrised", "crf"),
    "reparametrised, no dense CRF": ("reparametrised", "context"),
    "the same, plain sum of terms": ("context, summed", "context"),
    "two networks, no dense CRF": ("ensemble", "unary"),
}
# The rows of the tables in words, each with the letter that the differences use.
WORDS = {
    "baseline": "A: network at one scale",
    "+ pooling": "B: A with sliding pyramid pooling",
    "+ scales": "C: B at three scales",
    "+ dense CRF": "D: C, then a dense CRF",
    "+ context": "E: C trained with a contextual CRF, then both CRFs",
    "control": "F: two networks C, averaged, then the dense CRF of D",
    "context's network, alone": "G: E without its CRFs",
    "context, no dense CRF": "H: E without its dense CRF",
    "reparametrised, both CRFs": "I: E, terms counted by their own marginals",
    "reparametrised, no dense CRF": "J: I without its dense CRF",
    "the same, plain sum of terms": "K: H, terms summed as in the paper",
    "two networks, no dense CRF": "L: F without its dense CRF",
}
# The differences that are reported: {(rung, the rung it is compared with): what differs}.
STEPS = {
    ("+ pooling", "baseline"): "pooling",
    ("+ scales", "+ pooling"): "three scales",
    ("+ scales", "baseline"): "three scales and pooling",
    ("+ dense CRF", "+ scales"): "dense CRF",
    ("+ context", "+ dense CRF"): "contextual CRF",
    ("reparametrised, both CRFs", "+ dense CRF"): "contextual CRF by its own marginals",
    ("control", "+ dense CRF"): "a second network",
    ("+ context", "control"): "contextual CRF or second network",
    ("context's network, alone", "+ scales"): "training with context, no CRF",
    ("context, no dense CRF", "context's network, alone"): "inference with context",
}


class Ensemble(nn.Module):
    """The logarithm of the mean probability of two networks."""

    cell_size = 1  # the output has the size of the image

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.members = nn.ModuleList([first, second])

    def forward(self, image):
        log_p = torch.stack([torch.log_softmax(member(image), dim=1) for member in self.members])
        return log_p.logsumexp(0) - math.log(len(self.members))


def parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def build(name: str, profile: Profile, classes: int) -> PiecewiseTrainedModel:
    options = {key: getattr(profile, key) for key in ("width", "batch_norm", "dropout")}
    options["weights"] = profile.weights
    unary = FeatMapNet(classes, **options, **profile.context["network"], **NETWORKS[name])
    context = None
    if name in ("context", "reparametrised"):
        context = ContextualCRF(classes, unary.feature_channels, **profile.context["crf"])
    crf = DenseCRF(classes, filtering="lattice", **profile.crf)
    return PiecewiseTrainedModel(classes, unary=unary, context=context, crf=crf)


def train(name: str, data: str, root: str, profile: Profile, epochs: tuple[int, int], seed: int, device: str):
    """Return the trained model, the splits by name, and the CPU seconds, or None if checkpoints were reused."""
    options = {"size": profile.size} | ({"cache": True} if profile.size else {})
    whole, scored = (load(data, split, root, **options) for split in ("train", SPLIT[data]))
    fit, held = hold_out(whole, profile.held_out)  # the same images for every seed
    augment = Augment(profile.crop or profile.size, scale=profile.scale, colour=profile.colour)
    torch.manual_seed(seed + (1000 if name == "second" else 0))
    model = build(name, profile, whole.num_classes)
    settings = ("crf_learning_rate", "stage3_factor", "optimizer", "schedule", "weight_decay", "held_out")
    stage1 = "context" if name == "reparametrised" else name  # whose checkpoint of stage 1 is used

    def trainer(run: str) -> PiecewiseTrainer:
        return PiecewiseTrainer(
            model,
            device,
            whole.num_classes,
            profile.learning_rate,
            **{key: getattr(profile, key) for key in settings},
            joint_pairwise=model.context is not None,
            class_weights=balanced_weights(fit.pixel_counts()[:-1], power=profile.class_balance)
            if profile.class_balance
            else None,
            out=folder / run,
            resume=True,
            seed=seed + (1000 if name == "second" else 0),
        )

    folder = Path("runs/ablation") / f"{data}-{'quick' if profile.width < 1 else 'full'}-{seed}"
    fresh, start = not any((folder / stage1).glob("stage*.pt")), time.process_time()
    trainer(stage1).train_stage1(DataLoader(fit.with_transform(augment), profile.batch, shuffle=True), epochs[0])
    if name == "reparametrised":
        model.context.counting = name
    if name in LEARNED:
        trainer(f"{name}-stage2").train_stage2(DataLoader(held, profile.batch, shuffle=True), epochs[1])
    return model, {"fit": fit, "held": held, "scored": scored}, round(time.process_time() - start) if fresh else None


def summary(scores: dict, classes: bool = True) -> dict:
    row = {key: round(100 * scores[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}
    return row | {"per_class_iou": {k: v and round(100 * v, 1) for k, v in scores["per_class_iou"].items()}}


def run(data: str, root: str, seed: int, profile: Profile, epochs: tuple[int, int], device: str) -> dict:
    """Train and score all networks of one seed."""
    models, row, start = {}, {}, time.process_time()
    for name in NETWORKS:
        models[name], splits, seconds = train(name, data, root, profile, epochs, seed, device)
        scored = splits["scored"]
        loader = DataLoader(scored, profile.batch if profile.size else 1)
        model = models[name]
        found = evaluate(model, loader, apply_crf=name in LEARNED)
        row[name] = {"parameters": parameters(model.unary) + parameters(model.context)}
        row[name] |= {part: summary(scores) for part, scores in found.items()}
        if seconds is not None:
            row[name]["cpu_seconds"] = seconds
        if model.context is not None:
            row[name]["weights"] = [round(w, 3) for w in model.context.weight.clamp(min=0).tolist()]
            row[name]["temperature"] = round(model.context.log_temperature.exp().item(), 3)
        took = "trained before" if seconds is None else f"{seconds} CPU seconds"
        print(f"{data}, seed {seed}, {name}: {took}", flush=True)
        if name == "context":
            model.context.counting = "sum"
            with torch.no_grad():  # the paper's plain sum of the same terms
                model.context.weight.fill_(1), model.context.log_temperature.zero_()
            row["context, summed"] = {"context": summary(evaluate(model, loader)["context"])}
        if name == "second":
            both = Ensemble(models["scales"].unary, models["second"].unary)
            control = PiecewiseTrainedModel(scored.num_classes, unary=both, crf=models["scales"].crf)
            found = evaluate(control, loader)
            row["ensemble"] = {"parameters": parameters(both)} | {part: summary(s) for part, s in found.items()}
    row |= {"splits": {part: split_of(images) for part, images in splits.items()}}
    return {"seed": seed, "device": device, "minutes": round((time.process_time() - start) / 60, 1), **row}


def values(runs: dict[str, dict], rung: str, key: str) -> list[float]:
    """A score of all seeds; [] if it was not stored."""
    network, part = (RUNGS | DETAILS)[rung]
    return [found[network][part][key] for found in runs.values() if network in found]


def differences(runs: dict[str, dict], rung: str, other: str, key: str) -> str:
    """The mean difference and its interval; "no difference found" if the interval contains 0."""
    (one, part), (two, part_two) = (RUNGS | DETAILS)[rung], (RUNGS | DETAILS)[other]
    both = [found for found in runs.values() if one in found and two in found]
    pairs = [found[one][part][key] - found[two][part_two][key] for found in both]
    if not pairs:
        return ""
    (mean, half), text = mean_and_half(pairs), cell(pairs, sign=True)
    return f"no difference found ({text})" if abs(mean) <= half else text


def table(studies: dict[str, dict[str, dict]], keys: tuple[str, ...] = ("miou",)) -> str:
    """Two Markdown tables of {data set: runs}: the scores of all rungs, and the paired differences."""
    named = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "boundary_iou": "boundary IoU"}
    columns = [(runs, key) for runs in studies.values() for key in keys]
    head = [f"{name}, {named[key]}" for name in studies for key in keys]
    lines = ["| | parameters | " + " | ".join(head) + " |", "|---|--:|" + "--:|" * len(head)]
    for rung, (network, _) in (RUNGS | DETAILS).items():
        rows = [found[network] for runs in studies.values() for found in runs.values() if network in found]
        counts = sorted({f"{row['parameters'] / 1e6:.2f} M" for row in rows if "parameters" in row})
        cells = [cell(found) if (found := values(runs, rung, key)) else "" for runs, key in columns]
        lines.append(f"| {WORDS[rung]} | {', '.join(counts)} | {' | '.join(cells)} |")
    lines += ["", "| difference, seed by seed | " + " | ".join(head) + " |", "|---|" + "--:|" * len(head)]
    for (rung, other), what in STEPS.items():
        cells = [differences(runs, rung, other, key) for runs, key in columns]
        lines.append(f"| {WORDS[rung][0]} - {WORDS[other][0]}: {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored() -> dict[str, dict[str, dict]]:
    """{data set: runs} of the result files."""
    names = {"scenes": "Scenes, test", "camvid": "CamVid, val"}
    paths = {names[name]: HERE / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8"))["runs"] for name, path in paths.items()}


def main() -> None:
    arguments = parser(__doc__, None, seeds=range(5))
    arguments.add_argument("--data", choices=tuple(SPLIT), default="scenes")
    arguments.add_argument("--root", default="data")
    arguments.add_argument("--profile", choices=("quick", "full"), default="quick")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = arguments.parse_args()
    if given.table:
        print(table(stored()))
        for name, runs in stored().items():
            print(f"\n{table({name: runs}, ('pixel_accuracy', 'boundary_iou'))}")
        return
    profile, quick = PROFILES[given.data, given.profile], given.profile == "quick"
    epochs = EPOCHS.get(given.data, profile.epochs[:2]) if quick else profile.epochs[:2]
    settings = {"data": given.data, "scored": SPLIT[given.data], "profile": asdict(profile), "epochs": epochs}
    settings["context_weights"] = TrainerOptions().context_weights
    study = Study(given.out or HERE / f"{given.data}{'' if quick else '-full'}.json", settings)
    for seed in given.seeds:
        key = f"seed {seed}"
        if key not in study.runs:
            study.add(key, run(given.data, given.root, seed, profile, epochs, given.device))
    print(table({given.data: study.runs}))


if __name__ == "__main__":
    main()
