"""The piecewise likelihood of a dense CRF, a loss for its parameters; notebooks 04 and 05 compare it with the default.

    loss = - mean_i log P_U(x_i) - mean_(i,j) log P_V(x_i, x_j)      (means here, sums in the paper)
    P_U(x_i) = softmax over K of logits_i,   P_V(x_i, x_j) = softmax over K*K of -V(x_i, x_j)

(Sutton & McCallum 2005; Lin et al., CVPR 2016.) Each term is fitted as if it were the only evidence, so that the sum of
many messages becomes overconfident. With a normalised kernel a pair even has only w k / n of the strength, for n
neighbours. To train a dense CRF, prefer the likelihood of its marginals, `pwlib.losses.cross_entropy(log_q, label)`.
"""

import math

import torch
from torch import Tensor, nn

from pwlib.data import VOID
from pwlib.inputs import at_least, check_label
from pwlib.losses import cross_entropy, pairwise_nll


def structured(
    logits: Tensor,
    label: Tensor,
    image: Tensor,
    crf: nn.Module,
    *,
    pairs: int | tuple[Tensor, Tensor] = 2048,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the piecewise negative log-likelihood, see the head of the module; the trainer takes it as `crf_loss`.

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
