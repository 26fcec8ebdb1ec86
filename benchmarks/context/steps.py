"""Measure how many steps stage 2 needs until the weights of the pairwise terms have settled.

The network is DeepLab-LargeFOV of grid.py ("whole"), trained once, with and without a contextual CRF. Stage 2 learns
the dense CRF, and with a context its weights and temperature, in 2, 5, 20 and 60 epochs of 10 steps on the validation
scenes. Adam moves a parameter by about its learning rate per step, so that after few steps a weight depends more on the
number of steps than on the data.

    python benchmarks/context/steps.py --seeds 0 1 2      about eight CPU minutes a seed; writes steps.json
    python benchmarks/context/steps.py --table
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from grid import SETTINGS, Scored, build, train
from study import Study, cell, parser  # grid has added its folder to the path

from pwlib.data import Augment, load

HERE = Path(__file__).parent
OURS = SETTINGS | {"stage2_epochs": [2, 5, 20, 60], "crf_learning_rate": 0.02}
MODELS = ("plain", "tree", "reparametrised")


def run(seed: int, keep) -> None:
    data = load("scenes", "train", length=SETTINGS["train_images"])
    held = load("scenes", "val", length=SETTINGS["val_images"])
    counts = sum(torch.bincount(data[i][1].flatten(), minlength=256)[: data.num_classes] for i in range(len(data)))
    test = Scored("test", SETTINGS["test_images"])
    for name in ("plain", "context"):
        torch.manual_seed(seed)
        model = build("whole", name, data.num_classes)
        train(model, seed, 1, counts, data.with_transform(Augment(scale=(1.0, 1.0), colour=0.0)))
        for counting in MODELS[1:] if name == "context" else ("plain",):
            for epochs in OURS["stage2_epochs"]:
                start, one = time.process_time(), copy.deepcopy(model)
                SETTINGS.update(stage2_epochs=epochs, crf_learning_rate=OURS["crf_learning_rate"])
                row = {"model": counting, "seed": seed, "steps": epochs * SETTINGS["val_images"] // SETTINGS["batch"]}
                if name == "context":
                    one.context.counting = counting
                history = train(one, seed, 2, counts, held).history["stage2"]
                row |= {"loss": [round(record["loss"], 4) for record in history]}
                pixels = test.pixels(one)
                row |= {"without": test.score(pixels)["miou"], "with": test.score(pixels, one.crf)["miou"]}
                if name == "context":
                    row["weights"] = [round(w, 3) for w in one.context.weight.tolist()]
                keep(counting, epochs, row | {"minutes": round((time.process_time() - start) / 60, 2)})


def table(runs: dict[str, dict]) -> str:
    """Markdown; a weight below 0 counts as 0."""
    lines = ["| model | steps | seeds | weights | mIoU, no dense CRF | mIoU, learned dense CRF |"]
    lines.append("|---|--:|--:|---|--:|--:|")
    for model in MODELS:
        for steps in sorted({row["steps"] for row in runs.values()}):
            rows = [row for row in runs.values() if (row["model"], row["steps"]) == (model, steps)]
            if rows:
                found = [[f"{max(0.0, w):.2f}" for w in row["weights"]] for row in rows if "weights" in row]
                weights = ", ".join("/".join(one) for one in found)
                scores = (cell([row[key] for row in rows]) for key in ("without", "with"))
                lines.append(f"| {model} | {steps} | {len(rows)} | {weights} | {' | '.join(scores)} |")
    return "\n".join(lines)


def main() -> None:
    given = parser(__doc__, HERE / "steps.json", range(3)).parse_args()
    study = Study(given.out, OURS)
    for seed in () if given.table else given.seeds:
        if f"reparametrised, {OURS['stage2_epochs'][-1]} epochs, seed {seed}" not in study.runs:
            run(seed, lambda m, e, row, s=seed: study.add(f"{m}, {e} epochs, seed {s}", row))
    print(table(study.runs))


if __name__ == "__main__":
    main()
