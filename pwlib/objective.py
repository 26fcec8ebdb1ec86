"""What each stage minimises, and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pwlib.loaders import summed
from pwlib.losses import cross_entropy, structured
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import cell_labels

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


def calibrated(log_q: Tensor, label: Tensor, steps: int = 20) -> float:
    """The temperature under which log-marginals [N, K] make the labels [N] likeliest; one number over all processes.

    Temperature scaling (Guo et al., ICML 2017): -log softmax(log_q / T) is convex in 1 / T, so Newton's steps find it.
    Kept between 1/20 and 20: where every label is right, the best T would be 0. 1 where there is no label.
    """
    sharpness = 1.0
    for _ in range(steps):
        p = torch.softmax(sharpness * log_q, dim=-1)
        mean = (p * log_q).sum(-1)
        slope = (mean - log_q.gather(-1, label[:, None])[:, 0]).sum()
        curvature = (p * (log_q - mean[:, None]).square()).sum()
        slope, curvature = summed(torch.stack([slope, curvature])).tolist()
        if curvature <= 0:
            break
        before, step = sharpness, sharpness - slope / curvature
        sharpness = min(max(step, sharpness / 2, 1 / 20), sharpness * 2, 20.0)
        if abs(sharpness - before) < 1e-5:
            break
    return 1 / sharpness


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """Sub-modules that were frozen on purpose: in evaluation mode, with parameters, none of which wants a gradient."""
    return [
        part
        for part in module.modules()
        if not part.training and any(True for _ in part.parameters())
        if not any(parameter.requires_grad for parameter in part.parameters())
    ]


class Objective(nn.Module):
    """What a stage minimises: (image, label) -> (loss, scores). One module, so that it can be wrapped for several GPUs.

    stage 1   loss(logits)
    stage 2   -log softmax(log q / T)(label), or the piecewise likelihood; no gradient reaches the network
    stage 3   -log q(label) + loss(logits): the second term keeps the unary a classifier in its own right

    `temperature`, T, is `calibrated`'s. Mean field's marginals are surer than they are right, since nothing in them
    knows that pixels err together, and where the network is frozen a likelihood could mend that only by weakening the
    kernels. T changes no label and is no part of the model; in stage 3 the network can learn to be less sure itself.

    Where the model has a context, its pieces' likelihood is added in stages 2 and 3. In stage 2 the dense CRF refines
    what inference makes of the pieces as they are: -log q(label) then teaches the pieces nothing, only how much they
    count. With `joint_pieces` the pieces' likelihood is added in stage 1 instead of stage 2, which leaves the pieces as
    they are. More steps on the held-out images changed a point of mIoU on Scenes, up with one network and down with
    another, and cost five to eight on CamVid, where these are other stretches of road.
    """

    def __init__(
        self,
        model: PiecewiseTrainedModel,
        stage: int,
        loss: Callable,
        crf_loss: str,
        iterations: int,
        amp: torch.dtype | None,
        class_weights: Tensor | None = None,
        joint_pieces: bool = False,
    ):
        super().__init__()
        self.model, self.stage, self.loss, self.crf_loss = model, stage, loss, crf_loss
        self.iterations, self.amp, self.class_weights = iterations, amp, class_weights
        self.temperature = 1.0
        self.frozen: list[nn.Module] = []  # the user's: see `frozen_modules`
        self.pieces = model.context is not None and (stage > 1 or joint_pieces)
        self.learn_pieces = self.pieces and not (stage == 2 and joint_pieces)

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.stage == 2:
            self.model.unary.eval()  # frozen means batch norm's running statistics, too
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, dtype=self.amp, enabled=self.amp is not None):
            with torch.set_grad_enabled(self.stage != 2):
                if self.pieces:
                    features, coarse = self.model.maps(image)
                    logits = self.model.to_pixels(coarse, image.shape[-2:])
                else:
                    logits = self.model.unary_logits(image)
        logits = logits.float()
        pieces = self._pair_loss(features, coarse, label) if self.learn_pieces else 0.0
        if self.stage == 1:
            return self.loss(logits, label) + pieces, logits
        if self.stage == 2 and self.crf_loss == "piecewise":
            return structured(logits, label, image, self.model.crf) + pieces + self._untouched(), logits
        evidence = logits
        if self.pieces:
            marginals = self.model.contextual(coarse, features, frozen=self.stage == 2)
            evidence = self.model.to_pixels(marginals, image.shape[-2:])
        log_q = self.model.refine(evidence, image, iterations=self.iterations)
        likelihood = cross_entropy(log_q / self.temperature, label) + pieces
        return (likelihood if self.stage == 2 else likelihood + self.loss(logits, label)), log_q

    def _pair_loss(self, features: Tensor, coarse: Tensor, label: Tensor) -> Tensor:
        context = self.model.context
        label = cell_labels(label, coarse.shape[-2:], cell_size=self.model.unary.cell_size)
        return context.pair_loss(coarse, features, label, class_weights=self.class_weights) + self._untouched()

    def _untouched(self) -> Tensor | float:
        """Nothing, but part of the graph: DistributedDataParallel wants a gradient for every parameter."""
        context = self.model.context
        return 0.0 if context is None else 0 * (context.log_weight.sum() + context.log_temperature)
