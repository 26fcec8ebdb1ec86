"""What decides a training run: its options, the loss of each stage, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from pwlib.inputs import at_least, one_of
from pwlib.loaders import all_reduce_sum
from pwlib.losses import check_class_weights, cross_entropy
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import cell_labels


@dataclass
class TrainerOptions:
    """The options of a run: validated, stored in every checkpoint, and compared when a run is resumed."""

    num_classes: int = 21
    learning_rate: float = 1e-3  # of the network in stage 1; in stage 3 times stage3_factor
    crf_learning_rate: float | None = None  # of the CRF in stage 2, likewise; None: 0.1 for "sgd", 0.02 for "adamw"
    stage3_factor: float = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with a momentum of 0.9
    schedule: Literal["poly", "onecycle", "constant"] = "poly"  # over each stage; see `schedule_factor`
    weight_decay: float = 5e-4  # of the network's weights; never of biases, norms or the CRF
    loss: str | Callable = "cross_entropy"  # of the network; or a function (logits, label) -> scalar
    crf_loss: str | Callable = "marginal"  # of stage 2; or a function (logits, label, image, crf) -> scalar
    joint_pairwise: bool = False  # train the context's pairwise networks with the network in stage 1, not in stage 2
    context_weights: Sequence[float] = (1.0, 0.5, 0.25, 0.1, 0.0)  # tried at the start of stage 2, with joint_pairwise
    class_weights: Tensor | Sequence[float] | None = None  # [K], of the network's loss and the context's pair loss
    clip: float | None = 5.0  # largest norm of the gradient; None: any
    train_iterations: int = 5  # of mean field, in training
    test_iterations: int | None = None  # of mean field, in evaluation; None: the CRF's own number
    held_out: float = 0.25  # share of the training set that `train_piecewise` keeps for stage 2
    stage1_keeps: Literal["best", "last"] = "best"  # by validation mIoU, or the last epoch, at the smallest rate
    freeze_batch_norm: bool = False  # in stage 3, which then normalises by the statistics of stage 1
    average_stage3: bool = False  # stage 3 keeps the mean of its parameters and those it started from
    patience: int | None = None  # stop a stage after so many epochs without a better validation mIoU; None: never
    seed: int = 0  # of order, dropout and augmentation

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                one_of(get_args(hint), **{name: getattr(self, name)})
        if self.crf_learning_rate is None:
            self.crf_learning_rate = {"sgd": 0.1, "adamw": 0.02}[self.optimizer]
        for name in ("learning_rate", "crf_learning_rate", "stage3_factor", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected a positive number")
        at_least(0, weight_decay=self.weight_decay, train_iterations=self.train_iterations)
        at_least(0, test_iterations=self.test_iterations or 0)
        self.context_weights = tuple(map(float, self.context_weights))
        if not all(0 <= weight < math.inf for weight in self.context_weights):
            raise ValueError(f"context_weights are {self.context_weights}; expected finite numbers of at least 0")
        at_least(1, patience=1 if self.patience is None else self.patience)
        if self.class_weights is not None:
            self.class_weights = check_class_weights(self.class_weights, self.num_classes)
        losses = {"loss": ("cross_entropy", "logits, label"), "crf_loss": ("marginal", "logits, label, image, crf")}
        for name, (default, arguments) in losses.items():
            if not callable(given := getattr(self, name)) and given != default:
                raise ValueError(f"{name} is {given!r}; expected {default!r} or a function ({arguments}) -> scalar")

    def as_dict(self) -> dict[str, Any]:
        """The options as plain numbers, strings and lists; a loss function as its name."""
        options = vars(self).copy()
        for name, value in options.items():
            if callable(value):
                named = value if hasattr(value, "__qualname__") else type(value)
                options[name] = f"{named.__module__}.{named.__qualname__}"
        if self.class_weights is not None:
            options["class_weights"] = self.class_weights.tolist()
        return options


def schedule_factor(schedule: str, progress: float) -> float:
    """The learning rate as a share of its peak; `progress` goes from 0 to 1 over the steps of a stage.

    "poly" is DeepLab's (1 - t)^0.9. "onecycle" rises from 1/25 to 1 in the first 30 % and then falls to almost 0, along
    half a cosine each (Smith & Topin 2018, as torch's OneCycleLR). There is no state that a resumed run would need.
    """
    if schedule == "poly":
        return (1 - progress) ** 0.9
    if schedule == "onecycle":
        low, high, t = (1 / 25, 1, progress / 0.3) if progress < 0.3 else (1, 4e-7, (progress - 0.3) / 0.7)
        return high + (low - high) * (1 + math.cos(math.pi * t)) / 2
    return 1.0


def fit_temperature(log_q: Tensor, label: Tensor, steps: int = 20) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(log_q / T), over all processes.

    log_q are log-marginals [N, K], label is int64 [N]. In temperature scaling (Guo et al., ICML 2017) the objective is
    convex in 1 / T, so that Newton's method finds it. T is kept between 1/20 and 20, and is 1 without labels.
    """
    inverse = 1.0
    for _ in range(steps):
        p = torch.softmax(inverse * log_q, dim=-1)  # [N, K]
        mean = (p * log_q).sum(-1)
        slope = (mean - log_q.gather(-1, label[:, None])[:, 0]).sum()
        curvature = (p * (log_q - mean[:, None]).square()).sum()
        slope, curvature = all_reduce_sum(torch.stack([slope, curvature])).tolist()
        if curvature <= 0:
            break
        before, newton = inverse, inverse - slope / curvature
        inverse = min(max(newton, inverse / 2, 1 / 20), inverse * 2, 20.0)
        if abs(inverse - before) < 1e-5:
            break
    return 1 / inverse


class Objective(nn.Module):
    """The loss of a stage: (image, label) -> (loss, scores), a module that DistributedDataParallel can wrap.

        stage 1   loss(logits)
        stage 2   -log softmax(log_q / T)(label), or `crf_loss`, a function; the network gets no gradient
        stage 3   -log q(label) + loss(logits), so that the network alone stays a good classifier

    T is the attribute `temperature`, see `fit_temperature`. Mean-field marginals are overconfident, because the errors
    of neighbouring pixels are correlated and the model treats them as independent. With a frozen network the likelihood
    could correct this only by weakening the kernels. T changes no label and is not part of the model.

    With a contextual CRF its pair loss is added in stages 2 and 3, or with `joint_pairwise` in stages 1 and 3. The
    gradient of -log q(label) does not reach its pairwise networks in stage 2, only `weight` and `log_temperature`. A
    function `crf_loss` receives the network's own logits, so that it does not train these two parameters.
    """

    def __init__(
        self, model: PiecewiseTrainedModel, stage: int, options: TrainerOptions, amp: torch.dtype | None = None
    ):
        super().__init__()
        self.model, self.stage, self.options, self.amp = model, stage, options, amp
        self.temperature = 1.0
        self.has_pairs = model.context is not None and (stage > 1 or options.joint_pairwise)
        self.learns_pairs = self.has_pairs and not (stage == 2 and options.joint_pairwise)
        # Modules with fixed batch-norm statistics: the network in stage 2, and those that the user froze, which means
        # put into evaluation mode, unlike the model, and without a parameter that needs a gradient.
        needs = {m: [p.requires_grad for p in m.parameters()] for m in model.modules() if not m.training}
        self.fixed = [m for m, gradients in needs.items() if model.training and gradients and not any(gradients)]
        if stage == 2:
            self.fixed.append(model.unary)
        if stage == 3 and options.freeze_batch_norm:
            self.fixed += [m for m in model.unary.modules() if hasattr(m, "running_mean")]

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W] and label int64 [B, H, W] -> the loss, and the scores [B, K, H, W] of the stage."""
        model, options, size = self.model, self.options, image.shape[-2:]
        autocast = torch.autocast(image.device.type, dtype=self.amp, enabled=self.amp is not None)
        with autocast, torch.set_grad_enabled(self.stage != 2):
            if self.has_pairs:
                features, coarse = model.maps(image)  # [B, C, h, w], [B, K, h, w]
                logits = model.to_pixels(coarse, size)  # [B, K, H, W]
            else:
                logits = model.unary_logits(image)  # [B, K, H, W]
        logits = logits.float()
        pair_loss = self._pair_loss(features, coarse, label) if self.learns_pairs else 0.0
        if self.stage == 1:
            return self._network_loss(logits, label) + pair_loss, logits
        if self.stage == 2 and callable(options.crf_loss):
            return options.crf_loss(logits, label, image, model.crf) + pair_loss + self._unused(), logits
        scores = logits
        if self.has_pairs:
            marginals = model.contextual(coarse, features, frozen=self.stage == 2)  # [B, K, h, w]
            scores = model.to_pixels(marginals, size)
        log_q = model.refine(scores, image, iterations=options.train_iterations)  # [B, K, H, W]
        loss = cross_entropy(log_q / self.temperature, label) + pair_loss
        return (loss if self.stage == 2 else loss + self._network_loss(logits, label)), log_q

    def _network_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if callable(self.options.loss):
            return self.options.loss(logits, label)
        return cross_entropy(logits, label, class_weights=self.options.class_weights)

    def _pair_loss(self, features: Tensor, coarse: Tensor, label: Tensor) -> Tensor:
        cells = cell_labels(label, coarse.shape[-2:], cell_size=self.model.unary.cell_size)  # [B, h, w]
        weights = self.options.class_weights
        return self.model.context.pair_loss(coarse, features, cells, class_weights=weights) + self._unused()

    def _unused(self) -> Tensor | float:
        """0, as a function of parameters that the loss may not use: DistributedDataParallel needs all gradients."""
        context = self.model.context
        return 0.0 if context is None else 0 * (context.weight.sum() + context.log_temperature)
