"""Evaluation of a model on a data set: scores of the network and of the CRF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pwlib.loaders import Batches, explained_errors, rank_and_world_size, read_batch, rebuilt
from pwlib.metrics import SegmentationScores
from pwlib.model import PiecewiseTrainedModel, kept_modes


def best_record(records: list[dict[str, Any]], keeps: str = "best") -> dict[str, Any]:
    """The record of the epoch whose weights a stage keeps.

    With keeps="best" that is the first one with the highest validation mIoU (of the CRF, if it was scored). With
    keeps="last", or without validation, it is the last one.
    """

    def miou(record: dict[str, Any]) -> float:
        scores = record["val"].get("crf") or record["val"]["unary"]
        return -1.0 if scores["miou"] is None else scores["miou"]

    scored = [record for record in records if "val" in record]
    return max(scored, key=miou) if scored and keeps == "best" else records[-1]


@torch.no_grad()
def evaluate(
    model: PiecewiseTrainedModel,
    loader: Batches,
    *,
    apply_crf: bool = True,
    iterations: int | None = None,
    bar: Callable[[Batches], Batches] = lambda batches: batches,
) -> dict[str, Any]:
    """Score the outputs of a model, in evaluation mode, over all images of a loader.

    Args:
        loader: of batches (image [B, 3, H, W], label [B, H, W]); several processes score a part each.
        apply_crf: whether to score the CRFs, too; iterations: of the dense CRF (None: its own number).
        bar: wraps the loader, to show progress.

    Returns:
        {"unary": scores, "context": scores (if the model has one), "crf": scores}, ready for JSON, the same in every
        process; see `SegmentationScores.result`.
    """
    device = next(model.parameters()).device
    class_names = getattr(getattr(loader, "dataset", None), "class_names", None)
    if rank_and_world_size()[1] > 1:
        loader = rebuilt(loader, even=False)
    names = ("unary", *(("context",) if model.context else ()), "crf") if apply_crf else ("unary",)
    scores = {name: SegmentationScores(model.num_classes, class_names, device=device) for name in names}
    with kept_modes(model), explained_errors():
        model.eval()
        for batch in bar(loader):
            image, label = read_batch(batch, device)
            outputs = model.outputs(image, iterations=iterations) if apply_crf else {"unary": model.unary_logits(image)}
            for name, table in scores.items():
                table.update(outputs[name].argmax(1), label)  # [B, H, W] both
    return {name: table.all_reduce().result() for name, table in scores.items()}
