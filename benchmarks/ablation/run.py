"""Measure what each part of the paper's model contributes, one after the other (Lin et al., CVPR 2016, table 1).

    baseline        FeatMap-Net at one scale, without pooling
    + pooling       sliding pyramid pooling, 5x5 and 9x9
    + scales        scales 1.2, 0.8 and 0.4 instead of 1.0
    + dense CRF     a dense CRF after the network of "+ scales", learned in stage 2
    + context       a network trained jointly with a contextual CRF, mean field on that CRF, then a dense CRF
    control         the mean probability of two networks as in "+ scales", then the dense CRF of "+ dense CRF"

All networks of a seed are trained on the same images (those that are not held out for stage 2), for the same number of
epochs, with the same order and augmentation. Nothing is selected on the scored split: every stage keeps its last epoch.
Differences are paired by seed.

    python benchmarks/ablation/run.py --data scenes --seeds 0 1 2 3 4             7 to 13 CPU minutes a seed
    python benchmarks/ablation/run.py --data camvid --root data/camvid --seeds 0 1 2   twenty CPU minutes a seed
    python benchmarks/ablation/run.py --table

Writes DATA.json in this folder after every network (DATA-full.json with --profile full, for a GPU) and keeps
checkpoints in runs/ablation. A command that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from pwlib import checkpoints
from pwlib.cli.profiles import PROFILES, Profile
from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import FeatMapNet
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
SPLIT = {"scenes": "test", "camvid": "val", "voc2012": "val"}  # the scored split
EPOCHS = {"scenes": (12, 2), "camvid": (20, 2)}  # of stages 1 and 2 in the quick profile; full: the profile's own
NETWORKS = {
    "baseline": {"scales": (1.0,), "pyramid": ()},
    "pooling": {"scales": (1.0,)},
    "scales": {},
    "second": {},  # the second network of the control
    "context": {},
}
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
    "the same, plain sum of terms": ("context, summed", "context"),
    "two networks, no dense CRF": ("ensemble", "unary"),
}
# The rows of the tables in words.
WORDS = {
    "baseline": "network at one scale",
    "+ pooling": "the same with pyramid pooling",
    "+ scales": "three scales, with pooling",
    "+ dense CRF": "three scales, then a dense CRF",
    "+ context": "network trained with a contextual CRF, both CRFs",
    "control": "two networks averaged, then a dense CRF",
    "context's network, alone": "network trained with a contextual CRF, no CRF",
    "context, no dense CRF": "network trained with a contextual CRF, that CRF only",
    "the same, plain sum of terms": "the same, terms summed as in the paper",
    "two networks, no dense CRF": "two networks averaged, no CRF",
}
# The differences that are reported: (rung, the rung it is compared with).
STEPS = (
    ("+ pooling", "baseline"),
    ("+ scales", "+ pooling"),
    ("+ dense CRF", "+ scales"),
    ("+ context", "+ dense CRF"),
    ("control", "+ dense CRF"),
    ("+ context", "control"),
    ("context's network, alone", "+ scales"),
    ("context, no dense CRF", "context's network, alone"),
)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


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
    if name == "context":
        context = ContextualCRF(classes, unary.feature_channels, **profile.context["crf"])
    crf = DenseCRF(classes, filtering="lattice", **profile.crf)
    return PiecewiseTrainedModel(classes, unary=unary, context=context, crf=crf)


def train(name: str, data: str, root: str, profile: Profile, epochs: tuple[int, int], seed: int, device: str):
    """Return the trained model, the scored split, and the CPU seconds, or None if checkpoints were reused."""
    options = {"size": profile.size} | ({"cache": True} if profile.size else {})
    whole, scored = (load(data, split, root, **options) for split in ("train", SPLIT[data]))
    fit, held = hold_out(whole, profile.held_out)  # the same images for every seed
    augment = Augment(profile.crop or profile.size, scale=profile.scale, colour=profile.colour)
    torch.manual_seed(seed + (1000 if name == "second" else 0))
    model = build(name, profile, whole.num_classes)
    settings = ("crf_learning_rate", "stage3_factor", "optimizer", "schedule", "weight_decay", "held_out")
    out = Path("runs/ablation") / f"{data}-{'quick' if profile.width < 1 else 'full'}-{seed}-{name}"
    fresh, start = not any(out.glob("stage*.pt")), time.process_time()
    trainer = PiecewiseTrainer(
        model,
        device,
        whole.num_classes,
        profile.learning_rate,
        **{key: getattr(profile, key) for key in settings},
        joint_pairwise=model.context is not None,
        class_weights=balanced_weights(fit.pixel_counts()[:-1], power=profile.class_balance)
        if profile.class_balance
        else None,
        out=out,
        resume=True,
        seed=seed + (1000 if name == "second" else 0),
    )
    trainer.train_stage1(DataLoader(fit.with_transform(augment), profile.batch, shuffle=True), epochs[0])
    if name in ("scales", "context"):
        trainer.train_stage2(DataLoader(held, profile.batch, shuffle=True), epochs[1])
    return model, scored, round(time.process_time() - start) if fresh else None


def summary(scores: dict, classes: bool = True) -> dict:
    row = {key: round(100 * scores[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}
    return row | {"per_class_iou": {k: v and round(100 * v, 1) for k, v in scores["per_class_iou"].items()}}


def run(data: str, root: str, seed: int, profile: Profile, epochs: tuple[int, int], device: str, keep) -> None:
    """Train and score all networks of one seed; `keep(name, row)` stores each result."""
    models = {}
    for name in NETWORKS:
        models[name], scored, seconds = train(name, data, root, profile, epochs, seed, device)
        loader = DataLoader(scored, profile.batch if profile.size else 1)
        model = models[name]
        with_crf = name in ("scales", "context")
        found = evaluate(model, loader, apply_crf=with_crf)
        row = {"parameters": parameters(model.unary) + parameters(model.context)}
        if seconds is not None:
            row["cpu_seconds"] = seconds
        if model.context is not None:
            row["weights"] = [round(w, 3) for w in model.context.weight.clamp(min=0).tolist()]
            row["temperature"] = round(model.context.log_temperature.exp().item(), 3)
        keep(name, row | {part: summary(scores) for part, scores in found.items()})
        took = "trained before" if seconds is None else f"{seconds} CPU seconds"
        print(f"{data}, seed {seed}, {name}: {took}", flush=True)
        if name == "context":
            model.context.counting = "sum"
            with torch.no_grad():  # the paper's plain sum of the same terms
                model.context.weight.fill_(1), model.context.log_temperature.zero_()
            keep("context, summed", {"context": summary(evaluate(model, loader)["context"])})
        if name == "second":
            both = Ensemble(models["scales"].unary, models["second"].unary)
            control = PiecewiseTrainedModel(scored.num_classes, unary=both, crf=models["scales"].crf)
            found = evaluate(control, loader)
            keep("ensemble", {"parameters": parameters(both)} | {part: summary(s) for part, s in found.items()})


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t); nan for one value."""
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), half


def table(runs: dict[str, dict]) -> str:
    """Return two Markdown tables: the scores of all rungs, and the paired differences.

    A difference whose interval contains 0 is reported as "no difference found".
    """
    complete = [found for found in runs.values() if set(NETWORKS) <= set(found)]
    keys = ("miou", "pixel_accuracy", "boundary_iou")
    head = ("mIoU", "pixel accuracy", "boundary IoU")
    all_rows = RUNGS | DETAILS

    def values(rung: str, key: str) -> list[float]:
        network, part = all_rows[rung]
        return [found[network][part][key] for found in complete]

    lines = [f"| {len(complete)} seeds | parameters | " + " | ".join(head) + " |", "|---|--:|" + "--:|" * len(keys)]
    for rung, (network, _) in all_rows.items():
        count = complete[0][network].get("parameters")
        cells = ["{:.1f} ± {:.1f}".format(*interval(values(rung, key))) for key in keys]
        lines.append(f"| {WORDS[rung]} | {f'{count / 1e6:.2f} M' if count else ''} | " + " | ".join(cells) + " |")
    lines += ["", "| difference, seed by seed | " + " | ".join(head) + " |", "|---|" + "--:|" * len(keys)]
    for rung, other in STEPS:
        pairs = {key: [a - b for a, b in zip(values(rung, key), values(other, key), strict=True)] for key in keys}
        cells = []
        for key in keys:
            mean, half = interval(pairs[key])
            cells.append(
                f"{mean:+.1f} ± {half:.1f}" if abs(mean) > half else f"no difference found ({mean:+.1f} ± {half:.1f})"
            )
        lines.append(f"| {WORDS[rung]}, minus: {WORDS[other]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SPLIT), default="scenes")
    parser.add_argument("--root", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="print the stored results' tables and stop")
    parser.add_argument("--out", type=Path, help="the result, JSON (default DATA.json or DATA-full.json, beside this)")
    given = parser.parse_args()
    path = given.out or HERE / f"{given.data}{'-full' if given.profile == 'full' else ''}.json"
    if given.table:
        for path in sorted(HERE.glob("*.json")):
            print(f"{path.stem}\n\n{table(json.loads(path.read_text(encoding='utf-8'))['runs'])}\n")
        return
    profile = PROFILES[given.data, given.profile]
    epochs = tuple(given.epochs or (EPOCHS if given.profile == "quick" else {}).get(given.data, profile.epochs[:2]))
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"epochs": epochs, "runs": {}}
    if tuple(content["epochs"]) != epochs:
        parser.error(
            f"{path} was made with {content['epochs']} epochs, this run has {list(epochs)}: move it away first"
        )
    if content["runs"] and content.get("held_out") != "fixed":
        parser.error(f"{path} was made when the seed decided which images are held out: name another --out")
    content["held_out"] = "fixed"
    content |= {"torch": torch.__version__.split("+")[0], "device": given.device, "scored_on": SPLIT[given.data]}
    for seed in given.seeds:
        found = content["runs"].setdefault(str(seed), {})
        if {*NETWORKS, "ensemble", "context, summed"} <= set(found):
            continue

        def keep(name: str, row: dict, found: dict = found) -> None:
            found[name] = found.get(name, {}) | row
            checkpoints.save_json(path, content)

        run(given.data, given.root, seed, profile, epochs, given.device, keep)
    print(table(content["runs"]))


if __name__ == "__main__":
    main()
