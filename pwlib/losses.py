"""Losses: scores [B, K, H, W] and label [B, H, W] -> a scalar; void pixels (255) are left out.

Scores are logits or log-marginals: log_softmax leaves log-probabilities as they are. Probabilities are rejected, since
a softmax of a softmax still trains, but badly: with 21 classes a perfect prediction would have a loss above 2. A batch
without a labelled pixel, which random crops produce, has a loss of exactly 0 and zero gradients, not nan.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwlib.data import VOID
from pwlib.inputs import at_least, check_label

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


def structured(
    logits: Tensor,
    label: Tensor,
    image: Tensor,
    crf: nn.Module,
    *,
    pairs: int | tuple[Tensor, Tensor] = 2048,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Piecewise negative log-likelihood of a dense CRF (Sutton & McCallum 2005; Lin et al., CVPR 2016).

        loss = - mean_i log P_U(x_i) - mean_(i,j) log P_V(x_i, x_j)      (means here, sums in the paper)
        P_U(x_i) = softmax over K of logits_i,   P_V(x_i, x_j) = softmax over K*K of -V(x_i, x_j)

    Each term is fitted as if it were the only evidence, so that the sum of many messages becomes overconfident. With a
    normalised kernel a pair even has only w k / n of the strength, for n neighbours. To train a dense CRF, prefer the
    likelihood of its marginals, `cross_entropy(log_q, label)`.

    Args:
        logits, label, image: [B, K, H, W], integer [B, H, W], and [B, 3, H, W].
        crf: has V, [B, P, K, K], as `pair_energy(image, first, second)`.
        pairs: P, how many to sample in each image (see `sample_pairs`), or (first, second), int64 [B, P], row-major
            pixel indices; a pair with a void end, or of a pixel with itself, is left out.
    """
    unary = cross_entropy(logits, label)
    label = check_label(label)
    if isinstance(pairs, int):
        pairs = sample_pairs(label, pairs, generator=generator)
    first, second = (index.to(label.device) for index in pairs)  # [B, P] each
    ends = [label.flatten(1).gather(1, index).masked_fill(first == second, VOID) for index in (first, second)]
    return unary + pairwise_nll(crf.pair_energy(image, first, second), *ends)


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


def sample_pairs(label: Tensor, pairs: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Sample P = `pairs` pairs of labelled pixels at all distances, for the piecewise likelihood.

    Two pixels drawn uniformly are far apart, where k is 0 and nothing is learned. Here the first pixel is uniform over
    the labelled ones, and the second lies in a uniform direction at a distance that is log-uniform between 1 px and
    half the image's diagonal. Draws whose second pixel is void or outside are rejected; 4 P are drawn, on the
    generator's device (None: the CPU), and accepted ones are repeated if they are too few.

    Returns:
        (first, second), int64 [B, P], row-major indices; (0, 0) throughout for an image without a pair.
    """
    at_least(1, pairs=pairs)
    batch, height, width = label.shape
    source = generator.device if generator is not None else torch.device("cpu")
    reach = max(1.0, math.hypot(height, width) / 2)
    result = torch.zeros(2, batch, pairs, dtype=torch.int64, device=label.device)
    for b, known in enumerate((label != VOID).flatten(1)):  # [N]
        candidates = known.nonzero()[:, 0]
        position, angle, octave = torch.rand(3, 4 * pairs, generator=generator, device=source).to(label.device)
        if not len(candidates):
            continue
        first = candidates[(position * len(candidates)).long().clamp(max=len(candidates) - 1)]
        distance = reach**octave
        y = first // width + (distance * torch.sin(2 * math.pi * angle)).round().long()
        x = first % width + (distance * torch.cos(2 * math.pi * angle)).round().long()
        second = (y * width + x).where((y >= 0) & (y < height) & (x >= 0) & (x < width), first)
        accepted = (known[second] & (second != first)).nonzero()[:, 0]
        if len(accepted):
            chosen = accepted[torch.arange(pairs, device=label.device) % len(accepted)]
            result[:, b] = torch.stack([first[chosen], second[chosen]])
    return result[0], result[1]


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
