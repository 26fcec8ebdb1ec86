"""Losses: scores [B, K, H, W] and label [B, H, W] -> a scalar; void pixels (255) are left out.

Scores are logits or log-marginals: log_softmax leaves log-probabilities as they are. Probabilities are rejected, since
a softmax of a softmax still trains, but badly: with 21 classes a perfect prediction would have a loss above 2. A batch
without a labelled pixel, which random crops produce, has a loss of exactly 0 and zero gradients, not nan.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pwlib.data import VOID
from pwlib.inputs import check_label

Weights = Tensor | Sequence[float] | None  # of the classes, [K]


def cross_entropy(scores: Tensor, label: Tensor, *, class_weights: Weights = None) -> Tensor:
    """Mean over labelled pixels of -log softmax(scores)[label]: the negative log-likelihood of independent pixels.

    class_weights [K] weight the pixels in the mean by their true class, as in torch's own loss.
    """
    check_scores(scores)
    batch, num_classes, height, width = scores.shape
    if label.shape != (batch, height, width):
        raise ValueError(f"label has shape {tuple(label.shape)}; expected [{batch}, {height}, {width}] as the scores")
    label = check_label(label, num_classes)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    known = label != VOID  # [B, H, W]
    target, weight = label.where(known, 0), known.to(scores.dtype)
    if class_weights is not None:
        weight = weight * check_class_weights(class_weights, num_classes).to(scores)[target]
    # Not nll_loss: on a GPU its sums depend on the order of threads, and its backward rejects non-contiguous views.
    log_p = torch.log_softmax(scores, dim=1).gather(1, target[:, None])[:, 0]  # [B, H, W]
    return _mean(-log_p, weight)


def pairwise_nll(energy: Tensor, first: Tensor, second: Tensor, *, class_weights: Weights = None) -> Tensor:
    """Mean over pairs of -log P_V(x_i, x_j), where P_V = softmax over K*K of -energy.

    Args:
        energy: [B, P, K, K], the first end's label first.
        first, second: integer [B, P], labels of the two ends; a pair with a void end (255) is left out.
        class_weights: [K], a pair has the weight w[x_i] w[x_j]. A unary trained with the same weights is biased in the
            same way, so that log P_V(a, b) - log P_U(a) - log P_U(b) does not depend on them.
    """
    if energy.ndim != 4 or energy.shape[2] != energy.shape[3] or not energy.shape[:2] == first.shape == second.shape:
        given = f"{tuple(energy.shape)} do not fit labels {tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"pair energies {given}; expected [B, P, K, K] and [B, P] twice")
    num_classes = energy.shape[-1]
    first, second = (check_label(ends, num_classes) for ends in (first, second))
    known = (first != VOID) & (second != VOID)
    first, second = first.where(known, 0), second.where(known, 0)
    log_p = torch.log_softmax(-energy.flatten(2), dim=-1)  # [B, P, K*K]
    weight = known.to(log_p.dtype)
    if class_weights is not None:
        class_weights = check_class_weights(class_weights, num_classes).to(log_p)
        weight = weight * class_weights[first] * class_weights[second]
    return _mean(-log_p.gather(2, (first * num_classes + second)[..., None])[..., 0], weight)


def balanced_weights(counts: Tensor | Sequence[int], *, power: float = 0.5) -> Tensor:
    """Class weights [K] from pixel counts [K]: (share of the pixels)^-power, scaled to a mean of 1 over the pixels.

    power 0 weights all pixels equally, 1 all classes, 0.5 lies between. A class without pixels gets weight 1.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() == 0:
        raise ValueError(f"pixel counts are {counts.tolist()}; expected [K], none negative, not all zero")
    share = counts / counts.sum()
    weights = torch.where(counts > 0, share.clamp(min=1e-12) ** -power, 0)
    weights = weights / (share * weights).sum()
    return torch.where(counts > 0, weights, 1).float()


def check_class_weights(class_weights: Tensor | Sequence[float], num_classes: int) -> Tensor:
    """Class weights as a float tensor [K]; ValueError unless there are K, finite and none negative."""
    weights = torch.as_tensor(class_weights)
    weights = weights if weights.is_floating_point() else weights.float()
    if weights.shape != (num_classes,) or not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"class_weights are {weights.tolist()}; expected {num_classes} finite numbers, none negative")
    return weights


def check_scores(scores: Tensor) -> None:
    """ValueError unless scores are logits or log-probabilities [B, K, H, W]: no nan, no probabilities, K at least 2."""
    if scores.ndim != 4 or scores.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected [B, K, H, W] with K at least 2")
    values = scores.detach()
    if not values.is_floating_point():
        raise ValueError(f"scores have dtype {values.dtype}; expected floating point logits or log-marginals")
    if values.numel() == 0:
        return
    low, high = values.aminmax()
    if torch.isnan(low) or high == math.inf:
        raise ValueError("scores hold nan or infinity; expected finite logits (has the training diverged?)")
    if low >= 0 and high <= 1 and (values.float().sum(1) - 1).abs().max() <= 1e-3:
        seen = "scores look like probabilities (all in [0, 1], summing to 1 over the classes)"
        raise ValueError(f"{seen}; expected logits or log-marginals: pass probabilities.log()")


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean; 0, and still part of the graph, if all weights are 0."""
    total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return (torch.where(weight > 0, values, 0) * weight).sum() / total
