"""Losses: scores [B, K, H, W] and label [B, H, W] -> a scalar; void pixels (255) take no part in any.

Scores are logits or log-marginals alike, because log_softmax leaves log-probabilities as they are. Probabilities are
rejected: a softmax over a softmax still trains, badly, and a perfect prediction scores above 2 for 21 classes.

A batch without a single labelled pixel gives exactly 0 with zero gradients, not nan and not an error: with crops such
batches happen, and one of them must neither poison the weights nor end a night's training (or hang the other processes
of a distributed one).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pwlib.data import VOID


def cross_entropy(scores: Tensor, label: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Mean over labelled pixels of -log softmax(scores)[label]: the negative log-likelihood of independent pixels.

    class_weights [K]: the mean is weighted by the weight of each pixel's true class, as in torch's own.
    """
    log_p, target, weight = _pixels(scores, label, class_weights)
    return _mean(-_pick(log_p, target), weight)


def focal(scores: Tensor, label: Tensor, *, gamma: float = 2.0, class_weights: Tensor | None = None) -> Tensor:
    """Mean over labelled pixels of -(1 - p)^gamma log p, p the true class's probability (Lin et al., ICCV 2017, eq. 4).

    Pixels that are right already count little; gamma = 0 is cross-entropy. class_weights are that paper's alpha.
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; expected at least 0")
    log_p, target, weight = _pixels(scores, label, class_weights)
    log_p = _pick(log_p, target)
    miss = -torch.expm1(log_p)  # 1 - p, without cancellation where p is near 1
    if gamma == 0:
        return _mean(-log_p, weight)
    # For gamma < 1 the power's slope is infinite at 0, and 0 * inf is nan.
    return _mean(-(miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma) * log_p, weight)


def dice(scores: Tensor, label: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """1 - soft Dice, the mean over classes of 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i) (Milletari et al. 2016, there
    with squares in the denominator; Sudre et al. 2017 as here).

    Sums run over the labelled pixels of the whole batch, so that an image without a class does not count against it;
    classes that no label of the batch shows are left out of the mean. class_weights [K] weight the mean over classes.
    """
    log_p, target, weight = _pixels(scores, label, None)
    p = log_p.exp() * (weight > 0)[:, None]
    truth = torch.zeros_like(p).scatter_(1, target[:, None], weight[:, None])
    overlap, p_sum, truth_sum = ((x.transpose(0, 1).flatten(1).sum(1)) for x in (p * truth, p, truth))
    present = (truth_sum > 0).to(p.dtype)
    if class_weights is not None:
        present = present * check_class_weights(class_weights, scores.shape[1]).to(p)
    return _mean(1 - 2 * overlap / (p_sum + truth_sum).clamp(min=torch.finfo(p.dtype).tiny), present)


# ----------------------------------------------------------------------------------------------- piecewise likelihood


def structured(
    logits: Tensor,
    label: Tensor,
    image: Tensor,
    crf: nn.Module,
    *,
    pairs: int | tuple[Tensor, Tensor] = 2048,
    pair_weight: float = 1.0,
    class_weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Piecewise negative log-likelihood of a dense CRF (Sutton & McCallum 2005; Lin et al., CVPR 2016).

    The likelihood exp(-E(y)) / Z is replaced by a product of pieces, each normalised by itself, so no inference is run:

        loss = - mean_i log P_U(y_i) - pair_weight * mean_(i,j) log P_V(y_i, y_j)
        P_U(y_i) = softmax over K of logits_i,   P_V(y_i, y_j) = softmax over K*K of -V(y_i, y_j)

    with V = `crf.pair_energy(image, first, second)`. Each piece's gradient in its own scores is softmax - one-hot. The
    paper sums over nodes and edges where this takes means, so its loss has pair_weight = edges per node; its
    (lambda/2)|theta|^2 is the optimiser's weight decay. pairs: how many to sample in an image (`sample_pairs`), or
    (first, second), int64 [B, P], row-major pixel indices; a pair with a void end, or of a pixel and itself, takes no
    part.

    What to expect. In Lin's CRF V is a network's, and has K*K opinions on every pair. Here V(y_i, y_j) =
    mu(y_i, y_j) k(f_i, f_j): it knows two pixels' distance in space and colour, not what they are. Under Potts P_V
    depends on y only through "same or not", so a pairwise piece can teach only how strongly alike pixels agree (and k's
    bandwidths: how alike they must be), a full mu which classes meet at all. And each piece learns as if it were the
    only evidence: where many neighbours send the same message, their sum is over-confident. A normalised kernel makes
    that worse: a pair then has only w k / n of the strength, n its hundreds of neighbours, and its piece drives w up
    until this one pair explains their agreement by itself. To train a dense CRF, prefer the likelihood of its marginals
    (`cross_entropy` of log_q), which has every neighbour's message in it.
    """
    unary = cross_entropy(logits, label, class_weights=class_weights)
    label = class_indices("label", label)
    if isinstance(pairs, int):
        pairs = sample_pairs(label, pairs, generator=generator)
    first, second = (index.to(label.device) for index in pairs)
    ends = [label.flatten(1).gather(1, index).masked_fill(first == second, VOID) for index in (first, second)]
    return unary + pair_weight * pairwise_nll(crf.pair_energy(image, first, second), *ends)


def pairwise_nll(energy: Tensor, first: Tensor, second: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Mean of -log P_V(y_i, y_j), P_V = softmax over K*K of -energy; pairs with a void end are skipped.

    energy [B, P, K, K], the first end's label first; first, second: labels of both ends, int64 [B, P]. class_weights
    [K]: a pair counts w[y_i] w[y_j], so that P_V leans to rare classes just as a unary with these weights does, at both
    ends: log P_V(a, b) - log P_U(a) - log P_U(b) is then what it is without any weights.
    """
    if energy.ndim != 4 or energy.shape[2] != energy.shape[3] or not energy.shape[:2] == first.shape == second.shape:
        raise ValueError(
            f"pair energies {tuple(energy.shape)} do not fit labels {tuple(first.shape)} and {tuple(second.shape)}; "
            "expected [B, P, K, K] and [B, P] twice"
        )
    first, second = class_indices("first", first), class_indices("second", second)
    num_classes = energy.shape[-1]
    log_p = torch.log_softmax(-energy.flatten(2), dim=-1)
    known = (first != VOID) & (second != VOID)
    first, second = first.where(known, 0), second.where(known, 0)
    weight = known.to(log_p.dtype)
    if class_weights is not None:
        class_weights = check_class_weights(class_weights, num_classes).to(log_p)
        weight = weight * class_weights[first] * class_weights[second]
    return _mean(-log_p.gather(2, (first * num_classes + second)[..., None])[..., 0], weight)


def sample_pairs(label: Tensor, pairs: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Pairs of pixels for the piecewise likelihood: (first, second), int64 [B, P], row-major indices.

    Two pixels drawn at random from an image are far apart, where k is 0 and nothing is learned. So every octave of
    distance gets its share: the first pixel is uniform over the labelled ones, the second lies in a uniform direction
    at a distance log-uniform between 1 px and half the image's diagonal, rounded to the pixel. That depends neither on
    the bandwidths, which are being learned, nor on the resolution. A draw whose second pixel is void or outside is
    thrown away; four times `pairs` are drawn, and what is left repeats should it be too few. An image without a pair of
    labelled pixels gives (0, 0) throughout, which is no pair.

    generator: on any device; the pairs are drawn there (by default on the CPU) and moved to the label's.
    """
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; expected at least 1 an image")
    batch, height, width = label.shape
    source = generator.device if generator is not None else torch.device("cpu")
    reach = max(1.0, math.hypot(height, width) / 2)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=source).to(label.device)

    result = torch.zeros(2, batch, pairs, dtype=torch.int64, device=label.device)
    for b in range(batch):
        known = (label[b] != VOID).flatten()
        candidates = known.nonzero()[:, 0]
        spot, angle, octave = uniform(3, 4 * pairs)
        if not len(candidates):
            continue
        first = candidates[(spot * len(candidates)).long().clamp(max=len(candidates) - 1)]
        distance = reach**octave
        y = first // width + (distance * torch.sin(2 * math.pi * angle)).round().long()
        x = first % width + (distance * torch.cos(2 * math.pi * angle)).round().long()
        second = (y * width + x).where((y >= 0) & (y < height) & (x >= 0) & (x < width), first)
        serves = known[second] & (second != first)
        good = serves.nonzero()[:, 0]
        if len(good):
            chosen = good[torch.arange(pairs, device=label.device) % len(good)]
            result[:, b] = torch.stack([first[chosen], second[chosen]])
    return result[0], result[1]


# --------------------------------------------------------------------------------------------------------- combination

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "dice": dice,
    "focal": focal,
}


def make_loss(loss: str | Mapping[str, float] | Callable = "cross_entropy", **options) -> Callable[..., Tensor]:
    """Make a network's loss, (scores, label) -> scalar, from its name, from names and weights, or from a function.

    Args:
        loss: one of `LOSSES`; a dict of names and positive weights, for their weighted sum; or a function, returned as
            it is.
        options: class_weights, gamma; each is passed to the losses that have it.

    Raises:
        ValueError: an unknown name or option, or a weight that is not a positive number.
    """
    if callable(loss):
        return loss
    weights = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    if not weights:
        raise ValueError(f"no loss is named; expected some of {', '.join(LOSSES)}")
    terms = []
    for name, weight in weights.items():
        if name == "structured":
            raise ValueError("loss 'structured' needs a CRF; train the CRF with it by crf_loss='piecewise'")
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"loss {name!r} has weight {weight}; expected a positive number")
        known = {key: value for key, value in options.items() if key in LOSSES[name].__kwdefaults__}
        terms.append((weight, functools.partial(LOSSES[name], **known)))
    if unknown := set(options) - {key for one in LOSSES.values() for key in one.__kwdefaults__}:
        raise ValueError(f"no loss has the option {sorted(unknown)[0]!r}")
    return lambda scores, label: sum(weight * term(scores, label) for weight, term in terms)


def balanced_weights(counts: Tensor, *, power: float = 0.5) -> Tensor:
    """Class weights [K] from pixel counts [K]: (share of the pixels)^-power, scaled so that a pixel's mean weight is 1.

    power 0 gives every pixel the same say, 1 every class; 0.5 lies between. A class without pixels gets weight 1.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() == 0:
        raise ValueError(f"pixel counts are {counts.tolist()}; expected [K], none negative, not all zero")
    share = counts / counts.sum()
    weights = torch.where(counts > 0, share.clamp(min=1e-12) ** -power, 0)
    weights = weights / (share * weights).sum()
    return torch.where(counts > 0, weights, 1).float()


# -------------------------------------------------------------------------------------------------------------- checks


def _pixels(scores: Tensor, label: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """log_p [B, K, H, W], target [B, H, W] (0 where void), weight [B, H, W] (0 where void), all checked."""
    check_scores(scores)
    batch, num_classes, height, width = scores.shape
    if label.shape != (batch, height, width):
        raise ValueError(f"label has shape {tuple(label.shape)}; expected [{batch}, {height}, {width}] as the scores")
    label = class_indices("label", label)
    known = label != VOID
    wrong = known & ((label < 0) | (label >= num_classes))
    if wrong.any():
        raise ValueError(f"label holds {label[wrong][0].item()}; expected 0..{num_classes - 1} or {VOID} for void")
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    target = label.masked_fill(~known, 0)
    weight = known.to(scores.dtype)
    if class_weights is not None:
        weight = weight * check_class_weights(class_weights, num_classes).to(scores)[target]
    return torch.log_softmax(scores, dim=1), target, weight


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
        raise ValueError(
            "scores look like probabilities (all in [0, 1], summing to 1 over the classes); expected logits or "
            "log-marginals: pass probabilities.log(), or the softmax is taken twice"
        )


def check_class_weights(class_weights: Tensor | Sequence[float], num_classes: int) -> Tensor:
    """Class weights as a float tensor [K]; ValueError unless there are K, finite and none negative."""
    weights = torch.as_tensor(class_weights)
    weights = weights if weights.is_floating_point() else weights.float()
    if weights.shape != (num_classes,) or not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"class_weights are {weights.tolist()}; expected {num_classes} finite numbers, none negative")
    return weights


def class_indices(name: str, values: Tensor) -> Tensor:
    """Class indices of any integer type as int64: with fewer bits their sums and products would wrap around."""
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} has dtype {values.dtype}; expected class indices, an integer type")
    return values.long()


def _pick(log_p: Tensor, target: Tensor) -> Tensor:
    # Not nll_loss: on a GPU its sums depend on the order of threads, and its backward rejects non-contiguous views.
    return log_p.gather(1, target[:, None])[:, 0]


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean; 0, still part of the graph, where there is no weight at all."""
    total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return (torch.where(weight > 0, values, 0) * weight).sum() / total
