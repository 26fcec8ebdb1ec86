"""Measure what a longer stage 2 changes: `run.py`'s quick profile takes 24 to 39 steps.

Adam moves a logarithm by about the learning rate in a step, hence the kernels of the quick profile by a tenth at most.

    quick     3 epochs with the profile's rate
    long      at least 200 steps, in whole epochs, with four times the rate (0.02)

    learned   kernels and compatibility
    kernels   weights and bandwidths; the compatibility stays Potts
    balanced  as learned, with the class weights of stage 1 in the loss, whose temperature is fitted before the first
              step; quick only

All start from the networks that `run.py` trained with --network quick --hold drive: run it first, since its checkpoints
in runs/drives are loaded. Scored as in `run.py`.

    python benchmarks/drives/stage2.py --root data/camvid --seeds 0 --drives 0001TP 0006R0 0016E5     stage2.json
    python benchmarks/drives/stage2.py --table
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from run import DRIVES, NETWORKS, WORK, build_trainer, numbers, score, split, values
from study import Study, cell, parser, split_of

from pwlib import checkpoints
from pwlib.data import VOID, load
from pwlib.losses import balanced_weights, cross_entropy
from pwlib.objective import fit_temperature
from pwlib.tools.runs import build_model

HERE = Path(__file__).parent
QUICK = NETWORKS["quick"]
STEPS, FACTOR = 200, 4
LENGTHS, KINDS = ("quick", "long"), ("learned", "kernels")
SETTINGS = {"network": QUICK, "steps": STEPS, "rate": FACTOR * QUICK["crf_learning_rate"]}


def run(root: str, drive: str, seed: int) -> dict:
    whole, val = (load("camvid", name, root, size=QUICK["size"], cache=True) for name in ("train", "val"))
    of = {group: [i for i, name in enumerate(whole.groups) if name == group] for group in DRIVES}
    train = whole.subset(sorted(i for group in DRIVES if group != drive for i in of[group]))
    fit, held = split(train, "drive")
    torch.manual_seed(seed)
    network = build_model(QUICK, train.num_classes)
    folder = WORK / f"quick-{'+'.join(sorted(set(fit.groups)))}-drive-{seed}"
    load_stage1(folder, network, QUICK["epochs"][0])

    loader = DataLoader(held, batch_size=QUICK["batch"], shuffle=True)
    crfs, loss = {"default": network.crf}, {}
    for kind, length in (*itertools.product(KINDS, LENGTHS), ("balanced", "quick")):
        model = copy.deepcopy(network)
        model.crf.compatibility.requires_grad_(kind != "kernels")
        epochs, rate = QUICK["epochs"][1], QUICK["crf_learning_rate"]
        if length == "long":
            epochs, rate = math.ceil(STEPS / len(loader)), SETTINGS["rate"]
        options = {"crf_learning_rate": rate}
        if kind == "balanced":
            weights = balanced_weights(fit.pixel_counts()[:-1], power=QUICK["class_balance"])
            options["crf_loss"] = balanced_loss(model.crf, model.unary, loader, weights)
        trainer = build_trainer(model, "quick", fit, seed, **options)
        history = trainer.train_stage2(loader, epochs)["stage2"]
        crfs[f"{kind}, {length}"] = model.crf
        loss[f"{kind}, {length}"] = [round(record["loss"], 4) for record in history]
    left_out = {"left out": whole.subset(of[drive])} if drive != "none" else {}
    scores = {name: numbers(score(network.unary, crfs, data)[0]) for name, data in ({"val": val} | left_out).items()}
    splits = {name: split_of(data) for name, data in {"fit": fit, "held": held, "val": val, **left_out}.items()}
    found = {"splits": splits, "loss": loss, "kernels": {name: kernels(crf) for name, crf in crfs.items()}}
    return {"drive": drive, "seed": seed, **found, "scores": scores}


def load_stage1(folder: Path, model: torch.nn.Module, epochs: int) -> None:
    """Load the network of a finished stage 1."""
    last = folder / "stage1-last.pt"
    if not last.is_file() or checkpoints.load(last)["epoch"] < epochs:
        raise SystemExit(f"{folder} has no finished stage 1; run benchmarks/drives/run.py first")
    checkpoints.load_model(folder / "stage1-best.pt", model)


def balanced_loss(crf: torch.nn.Module, network: torch.nn.Module, loader: DataLoader, class_weights: torch.Tensor):
    """The likelihood of the marginals with class weights, at the temperature that suits four batches."""
    log_q, labels = [], []
    with torch.no_grad():
        for image, label in itertools.islice(loader, 4):
            scores = crf(network.eval()(image), image, iterations=5).movedim(1, -1)  # [B, H, W, K]
            log_q.append(scores[label != VOID])
            labels.append(label[label != VOID])
    temperature = fit_temperature(torch.cat(log_q), torch.cat(labels))

    def loss(logits, label, image, crf):
        return cross_entropy(crf(logits, image, iterations=5) / temperature, label, class_weights=class_weights)

    return loss


def kernels(crf: torch.nn.Module) -> dict[str, list[float] | float]:
    """What a dense CRF learns beside its compatibility: weights (spatial, bilateral) and bandwidths."""
    learned = {name.removeprefix("log_"): p for name, p in crf.named_parameters() if name.startswith("log_")}
    return {name: torch.round(p.detach().exp(), decimals=3).tolist() for name, p in learned.items()}


COLUMNS = {
    "default": ("default", "network"),
    "learned, quick": ("learned, quick", "network"),
    "learned, long": ("learned, long", "network"),
    "learned, long - quick": ("learned, long", "learned, quick"),
    "balanced, quick - learned, quick": ("balanced, quick", "learned, quick"),
    "kernels, quick - default": ("kernels, quick", "default"),
    "kernels, long - default": ("kernels, long", "default"),
}


def table(runs: dict[str, dict]) -> str:
    """Markdown: mIoU and accuracy of the network, and differences, by drive."""
    lines, groups = [], {}
    for row in runs.values():
        groups.setdefault(row["drive"], []).append(row)
    for key, metric in (("miou", "mIoU"), ("pixel_accuracy", "accuracy")):
        lines.append(f"| {metric} | seeds | network | " + " | ".join(COLUMNS) + " |")
        lines.append("|---|" + "--:|" * (2 + len(COLUMNS)))
        for drive, rows in sorted(groups.items()):
            val = "val, nothing left out" if drive == "none" else f"val, without {drive}"
            for name in sorted(rows[0]["scores"]):
                place = drive if name == "left out" else val
                network = [row["scores"][name]["network"][key] for row in rows]
                found = [values(rows, name, key, *pair) for pair in COLUMNS.values()]
                cells = [cell(some, sign=True) if some else "" for some in found]
                lines.append(f"| {place} | {len(rows)} | {cell(network)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "stage2.json", seeds=range(5))
    arguments.add_argument("--root", default="data/camvid")
    arguments.add_argument("--drives", nargs="+", default=[*DRIVES, "none"], choices=(*DRIVES, "none"))
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        for seed, drive in itertools.product(given.seeds, given.drives):
            study.measure(f"{drive}, seed {seed}", partial(run, given.root, drive, seed))
            print(f"{drive}, seed {seed}", flush=True)
    print(table(study.runs))


if __name__ == "__main__":
    main()
