"""Scoring a model over a data set: unary and CRF side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pwlib import loaders
from pwlib.loaders import Batches
from pwlib.metrics import SegmentationScores
from pwlib.model import PiecewiseTrainedModel, kept_modes


def best_record(records: list[dict[str, Any]], *, validated: bool = False) -> dict[str, Any]:
    """The epoch a stage hands on: the one marked "kept"; else the highest validation mIoU, of the CRF where it was
    scored (the first of equals); the last epoch where nothing was validated. validated: without regard to "kept"."""

    def key(record: dict[str, Any]) -> float:
        scores = record["val"].get("crf") or record["val"]["unary"]
        return -1.0 if scores["miou"] is None else scores["miou"]

    if kept := [record for record in records if record.get("kept") and not validated]:
        return kept[-1]
    scored = [record for record in records if "val" in record]
    return max(scored, key=key) if scored else records[-1]


@torch.no_grad()
def evaluate(
    model: PiecewiseTrainedModel,
    loader: Batches,
    *,
    apply_crf: bool = True,
    iterations: int | None = None,
    class_names: tuple[str, ...] | None = None,
    boundary_width: int = 3,
    bar: Callable[[Batches], Batches] = lambda batches: batches,
) -> dict[str, Any]:
    """{"unary": scores, "crf": scores} over all the loader's images, ready for JSON (`SegmentationScores.result`).

    "crf" is left out without `apply_crf`; a model with a context has "context" between the two. Classes are named by
    the loader's data set if it names them. In several processes each scores its share of the images, and all get the
    scores over all of them. The model is put into evaluation mode and back.
    """
    device = next(model.parameters()).device
    loader = loaders.rebuilt(loader, even=False)
    class_names = class_names or getattr(getattr(loader, "dataset", None), "class_names", None)
    context = ("context",) if model.context is not None else ()
    names = ("unary", *context, "crf") if apply_crf else ("unary",)
    scores = {n: SegmentationScores(model.num_classes, class_names, boundary_width, device=device) for n in names}
    with kept_modes(model):
        model.eval()
        for batch in bar(loader):
            image, label = loaders.read_batch(batch, device)
            outputs = model.outputs(image, iterations=iterations) if apply_crf else {"unary": model.unary_logits(image)}
            for name, part in scores.items():
                part.update(outputs[name].argmax(1), label)
    return {name: part.all_reduce().result() for name, part in scores.items()}
