"""CamVid at 360x480 from the pretrained backbone in a given time: three stages, then the contextual CRF.

    python benchmarks/gpu/camvid.py results --root FOLDER --weights vgg16.pt --seconds 320

The settings are those of the profile "camvid full", except that the number of epochs adapts to the time and that the
recipe of stage 1 (optimiser and learning rate) is the one of RECIPES that does best on the images held out for stage 2
after three epochs. Validation images choose nothing before stage 2, where the trainer keeps the best epoch by them; all
epochs' scores are in the result. The network computes in bfloat16 on a GPU, the CRF in float32. All images are on the
device, and so is their augmentation.

Written as soon as there is something to write: `camvid.json` after every epoch, `context.json` likewise, and after
every stage the model's parameters in float16, `camvid.pt.0`, `camvid.pt.1`, ... (one file in parts of at most 16 MiB).
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from pwlib import VOID, ContextualCRF, DeepLabLargeFOV, DenseCRF, PiecewiseTrainedModel, PiecewiseTrainer, load
from pwlib.cli.profiles import LARGE_CONTEXT, PROFILES
from pwlib.data import Augment, SegmentationDataset, hold_out
from pwlib.losses import balanced_weights

RECIPES = {
    "profile": {"optimizer": "sgd", "schedule": "poly", "learning_rate": 1e-3, "crf_learning_rate": 0.1},
    "sgd 1e-2": {"optimizer": "sgd", "schedule": "poly", "learning_rate": 1e-2, "crf_learning_rate": 0.1},
    "adamw 1e-4": {"optimizer": "adamw", "schedule": "onecycle", "learning_rate": 1e-4, "crf_learning_rate": 0.02},
}
CONTEXT = {"optimizer": "adamw", "schedule": "onecycle", "learning_rate": 1e-3, "crf_learning_rate": 0.02}
SHARES = {"trials": 0.15, "stage1": 0.5, "stage2": 0.25, "context": 0.2}  # of the time left (trials, context: of all)
PART = 16 * 2**20  # bytes


class OutOfTime(Exception):
    """The time for the stages is used up."""


class TimedTrainer(PiecewiseTrainer):
    """A trainer that calls `report(history)` at every validation and stops at a deadline (`time.monotonic`)."""

    def __init__(self, *args, report: Callable[[dict], None], deadline: float, **options):
        super().__init__(*args, **options)
        self.report, self.deadline = report, deadline

    def evaluate(self, *args, **options) -> dict:
        scores = super().evaluate(*args, **options)
        self.report(self.history | {"latest": scores})  # the epoch's record joins the history after this call
        if time.monotonic() > self.deadline:
            raise OutOfTime
        return scores


def on_device(dataset: SegmentationDataset, device: torch.device) -> SegmentationDataset:
    """The same items, decoded once by a pool of threads and kept on the device as uint8."""
    with ThreadPoolExecutor() as pool:
        items = list(pool.map(dataset.__getitem__, range(len(dataset))))
    items = [((255 * image).round().byte().to(device), label.byte().to(device)) for image, label in items]
    described = {key: getattr(dataset, key) for key in ("name", "split", "names", "class_names", "palette", "groups")}
    return SegmentationDataset(items.__getitem__, **described)


def class_weights(dataset: SegmentationDataset, power: float) -> torch.Tensor:
    """`balanced_weights` [K] of the pixel counts."""
    labels = torch.stack([label for _, label in dataset])  # [n, H, W]
    return balanced_weights(torch.bincount(labels[labels != VOID], minlength=dataset.num_classes).cpu(), power=power)


def save_parts(model: nn.Module, folder: Path, name: str = "camvid.pt") -> None:
    """Write the state dict in float16 as `name`.0, `name`.1, ..., each of at most `PART` bytes."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in state.items()}, buffer)
    data = buffer.getvalue()
    for number, start in enumerate(range(0, len(data), PART)):
        (folder / f"{name}.{number}").write_bytes(data[start : start + PART])


def seconds(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def fitting(budget: float, epoch_seconds: float, most: int) -> int:
    """Number of epochs that fit into a budget, in seconds; at most `most`."""
    return max(0, min(most, int(budget / max(epoch_seconds, 1e-6))))


class Run:
    """One training run under the clock; `result` is what is written to camvid.json."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.start, self.total = args.out, time.monotonic(), args.seconds
        self.deadline = self.start + args.seconds
        self.device = torch.device(args.device)
        torch.backends.cudnn.benchmark = True
        self.profile = profile = PROFILES["camvid", "full"]
        self.batch, size, self.epochs, self.trial_epochs = profile.batch, profile.size, (*profile.epochs, 40), 3
        if args.tiny:
            self.batch, size, self.epochs, self.trial_epochs = 2, (24, 32), (2, 1, 1, 1), 1
        self.train, self.val = (
            on_device(load("camvid", split, args.root, size=size), self.device) for split in ("train", "val")
        )
        self.classes = self.train.num_classes
        self.fit, self.held = hold_out(self.train)
        self.augment = Augment(size, scale=tuple(profile.scale), colour=profile.colour)
        self.class_weights = class_weights(self.fit, profile.class_balance)
        torch.manual_seed(args.seed)
        network = DeepLabLargeFOV(self.classes, weights=str(args.weights), dropout=profile.dropout)
        crf = DenseCRF(self.classes, **profile.crf)
        self.model = PiecewiseTrainedModel(self.classes, unary=network, crf=crf).to(self.device)
        self.after_stage2 = self.model  # replaced by a copy when stage 2 is done
        self.seed = args.seed
        self.result: dict = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "size": size,
            "batch": self.batch,
            "seed": args.seed,
            "seconds": args.seconds,
            "images": {"train": len(self.train), "held out for stage 2": len(self.held), "val": len(self.val)},
            "set_up_seconds": time.monotonic() - self.start,
        }
        self.write()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self, **more) -> None:
        self.result |= more
        (self.out / "camvid.json").write_text(json.dumps(self.result, indent=1) + "\n")

    def loader(self, dataset: SegmentationDataset, *, augmented: bool = False, shuffle: bool = True) -> DataLoader:
        dataset = dataset.with_transform(self.augment) if augmented else dataset
        return DataLoader(dataset, batch_size=self.batch, shuffle=shuffle)

    def trainer(self, model: nn.Module, recipe: dict, deadline: float, report: Callable = lambda history: None):
        options = {"stage3_factor": self.profile.stage3_factor, "weight_decay": self.profile.weight_decay}
        options |= {"class_weights": self.class_weights, "stage1_keeps": "last", "seed": self.seed, "progress": None}
        return TimedTrainer(model, self.device, self.classes, **recipe, **options, report=report, deadline=deadline)

    def choose_recipe(self) -> tuple[str, float]:
        """The recipe with the highest mIoU on the held-out images after short trials, and an epoch's seconds."""
        loader, held = self.loader(self.fit, augmented=True), self.loader(self.held, shuffle=False)
        few = self.loader(self.fit.subset(range(2 * self.batch)), augmented=True)
        warm = self.trainer(copy.deepcopy(self.model), RECIPES["profile"], self.deadline)
        warm.train_stage1(few, 1)  # cuDNN tries its algorithms here, and no trial is charged with it
        trials, begun = {}, time.monotonic()
        for name, recipe in RECIPES.items():
            used = time.monotonic() - begun
            if trials and used + used / len(trials) > SHARES["trials"] * self.total:
                break
            trainer = self.trainer(copy.deepcopy(self.model), recipe, self.deadline)
            try:
                history = trainer.train_stage1(loader, self.trial_epochs)["stage1"]
            except FloatingPointError as error:  # diverged
                trials[name] = {"held_out_miou": 0.0, "error": str(error)}
                continue
            scores = trainer.evaluate(held, apply_crf=False)["unary"]
            epoch = min(record["seconds"] for record in history)
            trials[name] = {"held_out_miou": scores["miou"] or 0.0, "epoch_seconds": epoch, "history": history}
            self.write(trials=trials)
        best = max(trials, key=lambda name: trials[name]["held_out_miou"])
        self.write(recipe={"name": best, **RECIPES[best]})
        return best, min(trial["epoch_seconds"] for trial in trials.values() if "epoch_seconds" in trial)

    def rates(self, recipe: dict) -> dict[str, float]:
        """Seconds of a training batch of stages 2 and 3, and of validating one batch with the CRF."""
        few = self.loader(self.train.subset(range(min(3 * self.batch, len(self.train)))))
        trainer = self.trainer(copy.deepcopy(self.model), recipe, self.deadline)
        found = {}
        for name, step in (("stage2", trainer.train_stage2), ("stage3", trainer.train_stage3)):
            step(few, 1)
            found[name] = seconds(lambda step=step: step(few, 1)) / len(few)
        trainer.evaluate(few)
        return found | {"validation": seconds(lambda: trainer.evaluate(few)) / len(few)}

    def stages(self) -> None:
        """Train all three stages in what the context leaves of the time; OutOfTime in the middle of its share."""
        end = self.deadline - SHARES["context"] * self.total
        name, epoch_seconds = self.choose_recipe()
        recipe, val = RECIPES[name], self.loader(self.val, shuffle=False)
        latest = self.deadline - SHARES["context"] * self.total / 2
        trainer = self.trainer(self.model, recipe, latest, lambda history: self.write(history=history))
        trainer.evaluate(val, apply_crf=False)
        validation = seconds(lambda: trainer.evaluate(val, apply_crf=False))
        budget = SHARES["stage1"] * (end - time.monotonic())
        epochs = {"stage1": max(1, fitting(budget, epoch_seconds + validation, self.epochs[0]))}
        self.write(epochs=epochs)
        trainer.train_stage1(self.loader(self.fit, augmented=True), epochs["stage1"], val)
        save_parts(self.model, self.out)

        rates = self.rates(recipe)
        left = end - time.monotonic()
        held, everything = self.loader(self.held), self.train
        second = rates["stage2"] * len(held) + rates["validation"] * len(val)
        budget = SHARES["stage2"] * left - rates["validation"] * len(val)  # stage 2 begins with a validation
        epochs["stage2"] = max(1, fitting(budget, second, self.epochs[1]))
        self.write(rates=rates, epochs=epochs)
        trainer.train_stage2(held, epochs["stage2"], val)
        save_parts(self.model, self.out)
        self.after_stage2 = copy.deepcopy(self.model)

        left = end - time.monotonic() - rates["validation"] * len(val)
        # Where three epochs do not fit, stage 3 sees every n-th image only.
        third = rates["stage3"] * len(self.loader(everything)) + rates["validation"] * len(val)
        nth = 1
        while fitting(left, third, 3) < 3 and nth < 8:
            nth += 1
            everything = self.train.subset(range(0, len(self.train), nth))
            third = rates["stage3"] * len(self.loader(everything)) + rates["validation"] * len(val)
        epochs["stage3"] = fitting(left, third, self.epochs[2])
        self.write(epochs=epochs, stage3_every_nth_image=nth)
        self.write(history=trainer.train_stage3(self.loader(everything, augmented=True), epochs["stage3"], val))

    def context(self) -> None:
        """The contextual CRF on the features of stage 1 (frozen), learned piecewise on the held-out images.

        Stage 2 is its control: the same network, which was not fitted to these images, and the dense CRF alone.
        """
        unary = self.after_stage2.unary
        crf = ContextualCRF(self.classes, unary.feature_channels, **LARGE_CONTEXT["crf"])
        model = PiecewiseTrainedModel(self.classes, unary=unary, context=crf, crf=self.after_stage2.crf).to(self.device)
        result = {"crf": LARGE_CONTEXT["crf"], "parameters": sum(p.numel() for p in crf.parameters())}

        def write(history: dict, **more) -> None:
            result.update(history=history, **more)
            (self.out / "context.json").write_text(json.dumps(result, indent=1) + "\n")

        held, val = self.loader(self.held), self.loader(self.val, shuffle=False)
        few = self.loader(self.held.subset(range(min(3 * self.batch, len(self.held)))))
        trial = self.trainer(copy.deepcopy(model), CONTEXT, self.deadline)
        trial.train_stage2(few, 1)
        batch = seconds(lambda: trial.train_stage2(few, 1)) / len(few)
        trial.evaluate(few)
        validation = seconds(lambda: trial.evaluate(few)) / len(few) * len(val)
        epochs = max(1, fitting(self.left() - validation - 3, batch * len(held) + validation, self.epochs[3]))
        write({}, epochs=epochs, batch_seconds=batch, validation_seconds=validation)
        trainer = self.trainer(model, CONTEXT, self.deadline, lambda history: write(history))
        write(trainer.train_stage2(held, epochs, val))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds camvid/")
    parser.add_argument("--weights", type=Path, required=True, help="the backbone, see benchmarks/backbone")
    parser.add_argument("--seconds", type=float, default=320.0, help="time for everything (default: 320)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="images of 24x32 px in batches of 2, to try the script")
    args = parser.parse_args()
    run = Run(args)
    try:
        run.stages()
    except OutOfTime:
        run.write(stopped="the time for the three stages was used up")
    run.write(stages_seconds=time.monotonic() - run.start)
    save_parts(run.model, run.out)
    try:
        run.context()
    except OutOfTime:
        pass  # the result holds the epochs that were finished
    run.write(total_seconds=time.monotonic() - run.start)


if __name__ == "__main__":
    main()
