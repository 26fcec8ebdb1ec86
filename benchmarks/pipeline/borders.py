"""Analyse stage 2 at CamVid's borders: the gain of each class, and transfer to other drives.

    python benchmarks/pipeline/borders.py runs/camvid --json benchmarks/pipeline/borders.json

runs/camvid is a run of `python -m pwlib train --data camvid --profile quick`. The first table shows the IoU of each
class on the validation split, in the band of 3 px on either side of a border, for the network, the default CRF and the
CRF of stage 2, with a 95 % bootstrap interval of the difference over runs of 10 consecutive frames. The second
table repeats stage 2 in four ways on cached logits of the held-out training frames: it learns from two drives and
scores the third, then learns from all three and scores the validation frames. The bandwidths are fixed, so that the
filters of each image can be reused.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pwlib import checkpoints
from pwlib.crf import DenseCRF
from pwlib.data import VOID, hold_out
from pwlib.metrics import ConfusionMatrix, boundary_mask
from pwlib.objective import schedule_factor
from pwlib.tools.runs import build_model, read_config
from pwlib.tools.training import load_split

# (optimizer, learning rate, whether class biases b are fitted besides the temperature: -log softmax(log q / T + b))
WAYS = {
    "adamw .005, T (the profile)": (torch.optim.AdamW, 0.005, False),
    "adamw .005, T and b": (torch.optim.AdamW, 0.005, True),
    "sgd .3, T": (partial(torch.optim.SGD, momentum=0.9), 0.3, False),
    "sgd .3, T and b": (partial(torch.optim.SGD, momentum=0.9), 0.3, True),
}
EPOCHS, BATCH, ITERATIONS = 3, 8, (5, 10)  # of stage 2 in the profile; mean field's in training and in testing


class Frames:
    """Labels, log-probabilities and filters of a data set, kept in memory."""

    def __init__(self, dataset, model, crf: DenseCRF):
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        self.label, self.groups = torch.stack(labels), dataset.groups
        with torch.no_grad():
            self.log_p = torch.cat([model.unary_logits(image[None]) for image in images]).log_softmax(1)
            self.filters = [crf.filters(image[None]) for image in images]
        self.rows = self.log_p.flatten(2).mT

    def log_q(self, crf: DenseCRF, i: int, iterations: int) -> Tensor:
        """Return the log-marginals of image i, [N, K]."""
        return self.filters[i].mean_field(-self.rows[i : i + 1], crf.log_w, crf.compatibility, iterations)[0]

    @torch.no_grad()
    def predict(self, crf: DenseCRF, which) -> Tensor:
        return torch.stack([self.log_q(crf, i, ITERATIONS[1]).argmax(-1).view_as(self.label[0]) for i in which])


def scale(log_q: Tensor, label: Tensor, biases: bool) -> tuple[Tensor, Tensor]:
    """Return 1 / T and b (zeros without `biases`) that maximise the likelihood of log_q / T + b; a convex problem."""
    sharpness, b = torch.ones((), requires_grad=True), torch.zeros(log_q.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([sharpness, b][: 1 + biases], max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(log_q * sharpness + b, label)
        value.backward()
        return value

    optimizer.step(loss)
    return sharpness.detach(), b.detach() - b.detach().mean()


def learn(crf: DenseCRF, frames: Frames, which: list[int], make, peak: float, biases: bool) -> None:
    """Learn the kernel weights and compatibility on some of the frames, as stage 2 of the trainer does."""
    generator = torch.Generator().manual_seed(0)
    parameters = [crf.log_w, crf.compatibility]
    optimizer = make(parameters, lr=peak, weight_decay=0.0)
    label, steps, step = frames.label.flatten(1), math.ceil(len(which) / BATCH), 0
    for _ in range(EPOCHS):
        order = [which[i] for i in torch.randperm(len(which), generator=generator)]
        with torch.no_grad():
            sample = [(frames.log_q(crf, i, ITERATIONS[0])[::7], label[i, ::7]) for i in order[: 4 * BATCH]]
        log_q, y = (torch.cat(part) for part in zip(*sample, strict=True))
        sharpness, b = scale(log_q[y != VOID], y[y != VOID], biases)
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule_factor("onecycle", step / (EPOCHS * steps))
            step += 1
            optimizer.zero_grad()
            for i in part:
                scores = frames.log_q(crf, i, ITERATIONS[0]) * sharpness + b
                loss = nn.functional.cross_entropy(scores, label[i], ignore_index=VOID, reduction="sum")
                (loss / (label[part] != VOID).sum()).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()


def band_counts(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Return one confusion matrix per image over the band: [B, K, K]."""
    label = label.masked_fill(~boundary_mask(label, 3), VOID)
    counts = []
    for guess, truth in zip(prediction, label, strict=True):
        matrix = ConfusionMatrix(classes)
        matrix.update(guess[None], truth[None])
        counts.append(matrix.matrix)
    return torch.stack(counts)


def scores(counts: Tensor) -> dict[str, Tensor]:
    matrix = ConfusionMatrix(counts.shape[-1])
    matrix.matrix = counts.sum(0)
    return matrix.scores()


def interval(one: Tensor, other: Tensor, run: int = 10, draws: int = 1000) -> list[float]:
    """Return the 95 % interval of a difference in boundary IoU, in points, by bootstrap over runs of frames."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(one) - run + 1, (draws, len(one) // run), generator=generator)
    chosen = (starts[..., None] + torch.arange(run)).flatten(1)
    difference = torch.tensor([float(scores(one[c])["miou"] - scores(other[c])["miou"]) for c in chosen])
    return [100 * float(q) for q in difference.quantile(torch.tensor([0.025, 0.975]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--root", help="where CamVid lies, if it has moved")
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    args = parser.parse_args()
    config = read_config(args.run)
    train, val = (load_split(config, split, root=args.root) for split in ("train", "val"))
    held = hold_out(train, config["settings"]["held_out"])[1]
    classes = train.num_classes
    model = build_model(config["settings"], classes).eval()
    checkpoints.load_model(args.run / "stage1-best.pt", model)
    default = partial(DenseCRF, classes, **config["settings"]["crf"])
    images = val
    held, val = (Frames(split, model, default()) for split in (held, val))
    everything = range(len(val.label))
    before = band_counts(val.predict(default(), everything), val.label, classes)

    # Stage 2 learned its own bandwidths, so its filters differ.
    checkpoints.load_model(args.run / "stage2-best.pt", model)
    with torch.no_grad():
        logits = val.log_p.split(1)
        learned = [model.refine(x, images[i][0][None], iterations=ITERATIONS[1]) for i, x in enumerate(logits)]
    after = band_counts(torch.cat(learned).argmax(1), val.label, classes)
    parts = {"network": band_counts(val.log_p.argmax(1), val.label, classes), "default": before, "stage 2": after}
    iou = {name: 100 * scores(counts)["per_class_iou"] for name, counts in parts.items()}
    print(f"IoU in the band, validation{'':3s}" + "".join(f"{name:>9s}" for name in iou))
    for k, name in enumerate(train.class_names):
        print(f"{name:30s}" + "".join(f"{column[k]:9.1f}" for column in iou.values()))
    print(f"{'mean':30s}" + "".join(f"{column.nanmean():9.2f}" for column in iou.values()))
    low, high = interval(after, before)
    print(f"stage 2 minus default: 95 % of resampled validation splits in [{low:+.2f}, {high:+.2f}]\n")

    result = {"band_iou": {n: dict(zip(train.class_names, c.tolist(), strict=True)) for n, c in iou.items()}}
    result |= {"stage2_minus_default": [low, high], "ways": {}}
    drives = sorted(set(held.groups))
    print(f"{'minus the default CRF':30s}" + "".join(f"{'to ' + d:>14s}" for d in drives) + f"{'to val':>14s}")
    for name, way in WAYS.items():
        row = {}
        for target in [*drives, "val"]:
            crf = default()
            learn(crf, held, [i for i, group in enumerate(held.groups) if group != target], *way)
            frames = val if target == "val" else held
            which = [i for i in range(len(frames.label)) if target in ("val", frames.groups[i])]
            label = frames.label[which]
            old, new = (scores(band_counts(frames.predict(c, which), label, classes)) for c in (default(), crf))
            row[target] = {key: 100 * float(new[key] - old[key]) for key in ("miou", "pixel_accuracy")}
        result["ways"][name] = row
        cells = "".join(f"{cell['miou']:+8.2f}{cell['pixel_accuracy']:+6.2f}" for cell in row.values())
        print(f"{name:30s}{cells}   (IoU, accuracy in the band)", flush=True)
    if args.json:
        checkpoints.save_json(args.json, result)


if __name__ == "__main__":
    main()
