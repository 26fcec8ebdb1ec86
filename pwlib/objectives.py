"""What each stage minimises, and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pwlib.losses import cross_entropy, structured
from pwlib.model import PiecewiseTrainedModel

SCHEDULES = ("poly", "onecycle", "constant")
CRF_LOSSES = ("marginal", "piecewise")


def rate(schedule: str, progress: float) -> float:
    """The learning rate as a share of its peak; `progress` runs from 0 to 1 over a stage's steps.

    "poly" is DeepLab's (1 - t)^0.9. "onecycle" rises from 1/25 to 1 in the first 30 %, then falls to nothing, along
    half a cosine each (Smith & Topin 2018, as in torch's OneCycleLR). No state: a resumed run needs none.
    """
    if schedule == "poly":
        return (1 - progress) ** 0.9
    if schedule == "onecycle":
        low, high, t = (1 / 25, 1, progress / 0.3) if progress < 0.3 else (1, 4e-7, (progress - 0.3) / 0.7)
        return high + (low - high) * (1 + math.cos(math.pi * t)) / 2
    return 1.0


class Objective(nn.Module):
    """What a stage minimises: (image, label) -> (loss, scores). One module, so that it can be wrapped for several GPUs.

    stage 1   loss(logits)
    stage 2   -log q(label), or the piecewise likelihood; no gradient reaches the network
    stage 3   -log q(label) + loss(logits): the second term keeps the unary a classifier in its own right
    """

    def __init__(self, model: PiecewiseTrainedModel, stage: int, loss: Callable, crf_loss: str, iterations: int, amp):
        super().__init__()
        self.model, self.stage, self.loss, self.crf_loss = model, stage, loss, crf_loss
        self.iterations, self.amp = iterations, amp

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.stage == 2:
            self.model.unary.eval()  # frozen means batch norm's running statistics, too
        return self

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, dtype=self.amp, enabled=self.amp is not None):
            with torch.set_grad_enabled(self.stage != 2):
                logits = self.model.unary_logits(image)
        logits = logits.float()
        if self.stage == 1:
            return self.loss(logits, label), logits
        if self.stage == 2 and self.crf_loss == "piecewise":
            return structured(logits, label, image, self.model.crf), logits
        log_q = self.model.refine(logits, image, iterations=self.iterations)
        likelihood = cross_entropy(log_q, label)
        return (likelihood if self.stage == 2 else likelihood + self.loss(logits, label)), log_q
