"""Compare piecewise, joint and independent training of a CNN and a dense CRF at equal compute.

    piecewise     stage 1 (network), stage 2 (CRF, fixed network), stage 3 (both): 60, 20 and 20 % of the budget
    joint         network and CRF together from random weights, with the loss of stage 3, for the whole budget
    independent   the network alone for the whole budget; at test time a CRF with default parameters

All methods start from the same weights, use the same kind of batches and are scored on the same test images. The unit
of compute is one stage-1 step (8 images, forward and backward). The cost of a step of stages 2 and 3 in these units is
measured before the first run and stored in the result, so that a budget corresponds to a fixed number of steps. A
seed determines the training images, the initial weights and the order of the batches. Nothing is selected on the test
images: there is no early stopping, and each run is scored once, after its last step.

Class weights in the loss of stage 1 raise the probabilities of rare classes. A learned CRF can correct some of this.
A network without a learned CRF is therefore also scored with the class weights removed: log w is subtracted from
its logits ("undone" in the results).

    python benchmarks/three_stages/run.py                  about 25 minutes on one idle core; continues where it was
    python benchmarks/three_stages/run.py --seeds 2 --budgets 60 --rates 1 --long 0 --out small.json
    python benchmarks/three_stages/run.py --table          the table of the README

The network is DeepLab-LargeFOV at an eighth of its width. On images of this size its stride of 8 gives a map of 6x8,
and these budgets are too small to train it; claims.py trains until nothing improves.

The result is written after every run. Notebook 05 plots it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import cell, command, commit, machine

from pwlib import checkpoints
from pwlib.crf import DenseCRF
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import evaluate
from pwlib.losses import balanced_weights
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
METHODS = ("piecewise", "joint", "independent")
SETTINGS = {
    "size": [48, 64],
    "train_images": 160,
    "test_images": 64,
    "held_out": 0.25,
    "width": 0.125,
    "batch": 8,
    "crf_batch": 2,  # stage 2 has few parameters and takes many small steps
    "iterations": 5,  # of mean field, in training and in testing
    "learning_rate": 3e-3,  # of the network; --rates multiplies this and the next one
    "crf_learning_rate": 0.05,
    "stage3_factor": 0.2,
    "shares": [0.6, 0.2, 0.2],
    "crf": {"theta_alpha": 15.0, "theta_beta": 10.0, "theta_gamma": 1.2, "w_bilateral": 3.0, "w_spatial": 1.0},
}


class Steps:
    """An epoch with a given number of batches: images are drawn without repetition until all are used, then again."""

    def __init__(self, dataset, steps: int, batch: int, seed: int):
        self.dataset, self.steps, self.batch, self.seed = dataset, steps, batch, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for _ in range(self.steps):
            if len(order) < self.batch:
                order = torch.randperm(len(self.dataset), generator=generator).tolist()
            images, labels = zip(*(self.dataset[order.pop()] for _ in range(self.batch)), strict=True)
            yield torch.stack(images), torch.stack(labels)


def build(seed: int) -> PiecewiseTrainedModel:
    """Build the model from which every method starts."""
    torch.manual_seed(seed)
    unary = DeepLabLargeFOV(10, width=SETTINGS["width"], batch_norm=True, dropout=0.1)
    crf = DenseCRF(10, filtering="lattice", **SETTINGS["crf"])
    return PiecewiseTrainedModel(10, SETTINGS["iterations"], unary=unary, crf=crf)


def class_weights(data) -> torch.Tensor:
    return balanced_weights(sum(torch.bincount(label.flatten(), minlength=256)[:10] for _, label in data))


def build_trainer(model, data, rate: float, seed: int, *, stage3_factor: float) -> PiecewiseTrainer:
    """Build the trainer; the network's loss has square-root class weights, as in the command line's profiles."""
    return PiecewiseTrainer(
        model,
        num_classes=10,
        learning_rate=rate * SETTINGS["learning_rate"],
        crf_learning_rate=rate * SETTINGS["crf_learning_rate"],
        stage3_factor=stage3_factor,
        optimizer="adamw",
        schedule="onecycle",
        class_weights=class_weights(data),
        train_iterations=SETTINGS["iterations"],
        test_iterations=SETTINGS["iterations"],
        seed=seed,
        progress=False,
    )


@functools.cache
def training_set(seed: int):
    return load("scenes", "train", size=SETTINGS["size"], length=SETTINGS["train_images"], seed=seed)


def test_batches() -> list:
    dataset = load("scenes", "test", size=SETTINGS["size"], length=SETTINGS["test_images"])
    return list(torch.utils.data.DataLoader(dataset, batch_size=16))


def plan(method: str, budget: float, costs: dict[str, float]) -> dict[str, int]:
    """Return the number of steps of each stage for a budget."""
    if method == "independent":
        return {"stage1": round(budget)}
    if method == "joint":
        return {"stage3": max(1, round(budget / costs["stage3"]))}
    return {
        f"stage{i + 1}": max(1, round(s * budget / costs[f"stage{i + 1}"])) for i, s in enumerate(SETTINGS["shares"])
    }


def scores(model, batches) -> dict:
    """Return {"unary": scores, "crf": scores} with three numbers each."""
    kept = ("miou", "pixel_accuracy", "boundary_iou")
    result = evaluate(model, batches, iterations=SETTINGS["iterations"])
    return {part: {name: round(found[name], 5) for name in kept} for part, found in result.items()}


class Undone(torch.nn.Module):
    """A network without its class weights w: the weighted loss is minimal where softmax(logits) ~ w p."""

    def __init__(self, network: torch.nn.Module, weights: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("shift", weights.log().view(-1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image) - self.shift


def train(method: str, seed: int, steps: dict[str, int], rate: float, batches, keep=lambda name, model: None) -> dict:
    """Train once; return {"seconds": CPU seconds, "after": {stage: scores}}. `keep` gets the model of each stage."""
    model, data = build(seed), training_set(seed)
    augment = Augment(scale=(0.8, 1.2))
    fit, held = hold_out(data, SETTINGS["held_out"]) if method == "piecewise" else (data, None)
    sets = {"stage1": fit.with_transform(augment), "stage2": held, "stage3": data.with_transform(augment)}
    trainer = build_trainer(
        model, data, rate, seed, stage3_factor=1.0 if method == "joint" else SETTINGS["stage3_factor"]
    )
    seconds, after = 0.0, {}
    for stage, count in steps.items():
        for index in range(len(sets[stage])):
            sets[stage][index]  # scenes are drawn once and cached, outside the timing
        size = SETTINGS["crf_batch"] if stage == "stage2" else SETTINGS["batch"]
        start = time.process_time()
        getattr(trainer, f"train_{stage}")(Steps(sets[stage], count, size, seed), 1)
        seconds += time.process_time() - start
        after[stage] = scores(model, batches)
        if stage == "stage1":
            plain = Undone(model.unary, class_weights(data))
            plain = PiecewiseTrainedModel(10, SETTINGS["iterations"], unary=plain, crf=model.crf)
            after[stage] |= {f"{part}, undone": found for part, found in scores(plain, batches).items()}
        keep(stage, model)
    return {"seconds": round(seconds, 2), "after": after}


def calibrate(repeats: int = 5) -> dict[str, float]:
    """Measure the cost of a step of each stage in stage-1 steps: medians of interleaved CPU times."""
    data, found = training_set(0), {"stage1": [], "stage2": [], "stage3": []}
    model = build(0)
    trainer = build_trainer(model, data, 1e-3, 0, stage3_factor=1.0)
    for repeat in range(repeats + 1):
        for stage, times in found.items():
            size = SETTINGS["crf_batch"] if stage == "stage2" else SETTINGS["batch"]
            start = time.process_time()
            getattr(trainer, f"train_{stage}")(Steps(data, 4, size, repeat), 1)
            if repeat:  # the first round draws the scenes and warms the caches
                times.append((time.process_time() - start) / 4)
    unit = statistics.median(found["stage1"])
    costs = {stage: round(statistics.median(times) / unit, 1) for stage, times in found.items()}
    return {**costs, "unit_seconds": round(unit, 4)}


def swaps(seeds: list[int], work: Path, batches) -> list[dict]:
    """Score the network of each seed with the CRF of each seed, for CRFs learned in three ways."""
    found = []
    for family in ("piecewise-stage2", "piecewise-stage3", "joint-stage3"):
        models = {s: build(s) for s in seeds}
        for seed, model in models.items():
            checkpoints.load_model(work / f"{family}-{seed}.pt", model)
        for first, network in models.items():
            for second, other in models.items():
                pair = PiecewiseTrainedModel(10, SETTINGS["iterations"], unary=network.unary, crf=other.crf)
                found.append({"family": family, "network": first, "crf": second, **scores(pair, batches)["crf"]})
    return found


def digest(batches) -> str:
    """Return a hash of the test labels, to detect results of a different version of Scenes."""
    content = b"".join(label.numpy().astype("uint8").tobytes() for _, label in batches)
    return hashlib.sha256(content).hexdigest()[:16]


def jobs(
    seeds: int, budgets: list[float], rates: list[float], rates_at: float, long: int, long_at: float
) -> list[dict]:
    """Return the runs to do, the cheapest first."""
    plans = [
        *((rates_at, r) for r in rates if r != 1),
        *((b, 1.0) for b in sorted(budgets)),
    ]
    wanted = [
        {"method": method, "seed": seed, "budget": budget, "rate": rate}
        for budget, rate in plans
        for seed in range(seeds)
        for method in METHODS
    ]
    return wanted + [{"method": "joint, as many steps", "seed": s, "budget": long_at, "rate": 1.0} for s in range(long)]


def table(result: dict) -> str:
    """Markdown: test mIoU with the largest budget, and paired differences."""
    budget = max(run["budget"] for run in result["runs"])
    shown = {method: (method, "crf") for method in METHODS}
    shown |= {
        "independent, class weights removed": ("independent", "crf, undone"),
        "joint, as many steps": ("joint, as many steps", "crf"),
    }
    lines, ours = ["| method | seeds | compute | test mIoU | piecewise - it |", "|---|--:|--:|--:|--:|"], []
    for name, (method, part) in shown.items():
        rows = [r for r in result["runs"] if (r["method"], r["budget"], r["rate"]) == (method, budget, 1)]
        rows.sort(key=lambda run: run["seed"])
        if not rows:
            continue
        scores = [list(r["after"].values())[-1][part]["miou"] if r["after"] else 0.0 for r in rows]  # 0: it failed
        values = [100 * score for score in scores]
        ours = ours or values
        gains = [a - b for a, b in zip(ours, values, strict=False)]
        compute = sum(count * result["costs"][stage] for stage, count in rows[0]["steps"].items())
        if len(values) < 3:  # too few for an interval
            cells = [", ".join(f"{x:.1f}" for x in values), ", ".join(f"{x:+.1f}" for x in gains)]
        else:
            cells = [cell(values), cell(gains, sign=True)]
        gain = "" if name == "piecewise" else cells[1]
        lines.append(f"| {name} | {len(values)} | {compute:.0f} | {cells[0]} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--budgets", default="75,150,300", help="in stage-1 steps (default 75,150,300)")
    parser.add_argument("--rates", default="0.3,1,3", help="factors on the learning rates (default 0.3,1,3)")
    parser.add_argument("--rates-at", type=float, default=150, help="the budget rates are varied at (default 150)")
    parser.add_argument("--long", type=int, default=2, help="seeds of joint training at equal steps (default 2)")
    parser.add_argument("--long-at", type=float, default=300, help="the budget of that comparison (default 300)")
    parser.add_argument("--swaps-at", type=float, default=300, help="the budget whose CRFs are exchanged (default 300)")
    parser.add_argument("--out", type=Path, default=HERE / "result.json", help="the result, JSON (beside this script)")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results and stop")
    parser.add_argument("--work", type=Path, default=Path("runs/three_stages/largefov"), help="folder for weights")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.out.read_text())))
        return
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    code = commit()
    budgets, rates = ([float(x) for x in text.split(",")] for text in (given.budgets, given.rates))
    batches = test_batches()
    result = json.loads(given.out.read_text()) if given.out.exists() else {"runs": []}
    if result["runs"] and (result["settings"], result["scenes"]) != (SETTINGS, digest(batches)):
        parser.error(f"{given.out} was made with other settings or other scenes; move it away, or name another --out")
    result |= {
        "command": command(),
        "machine": machine(),
        "settings": SETTINGS,
        "scenes": digest(batches),
    }
    if "costs" not in result:
        result["costs"] = calibrate()
    print("one step costs", result["costs"], flush=True)

    def key(run: dict) -> tuple:
        return run["method"], run["seed"], run["budget"], run["rate"]

    done = {key(run) for run in result["runs"]}
    wanted = [
        job
        for job in jobs(given.seeds, budgets, rates, given.rates_at, given.long, given.long_at)
        if key(job) not in done
    ]
    with tqdm(wanted, unit="run") as bar:
        for job in bar:
            bar.set_postfix_str("{method}, seed {seed}, budget {budget:g}, rate {rate:g}".format(**job))
            steps = (
                plan(job["method"], job["budget"], result["costs"])
                if "," not in job["method"]
                else {"stage3": sum(plan("piecewise", job["budget"], result["costs"])[s] for s in ("stage1", "stage3"))}
            )
            names = {("piecewise", "stage2"), ("piecewise", "stage3"), ("joint", "stage3")}

            def keep(stage, model, job=job, names=names):
                if job["budget"] == given.swaps_at and job["rate"] == 1 and (job["method"], stage) in names:
                    checkpoints.save(
                        given.work / f"{job['method']}-{stage}-{job['seed']}.pt", {"model": model.state_dict()}
                    )

            method = job["method"].split(",")[0]
            try:
                outcome = train(method, job["seed"], steps, job["rate"], batches, keep)
            except FloatingPointError as error:  # a run that diverges is a result
                outcome = {"seconds": None, "after": {}, "failed": str(error)}
            result["runs"].append({**job, "steps": steps, **outcome, "commit": code})
            checkpoints.save_json(given.out, result)
    seeds = list(range(given.seeds))
    if len(seeds) > 1 and given.swaps_at in budgets and len(result.get("swaps", [])) != 3 * len(seeds) ** 2:
        result["swaps"] = swaps(seeds, given.work, batches)
        checkpoints.save_json(given.out, result)
    print(f"{len(result['runs'])} runs in {given.out}")


if __name__ == "__main__":
    main()
