"""The functions of notebook 05 against the library, enumeration and scipy."""

import itertools

import pytest
import torch
from scipy import stats

from pwlib import losses

EDGES = torch.tensor([[0, 1], [1, 2], [3, 4], [4, 5], [0, 3], [1, 4], [2, 5]])


def random_crf(seed):
    generator = torch.Generator().manual_seed(seed)
    unary = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    pair = 2 * torch.randn(7, 3, 3, generator=generator, dtype=torch.float64)
    return unary, pair, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_piecewise_nll_equals_the_library(pull, seed):
    unary, pair, labels = random_crf(seed)
    logits = -unary.T[None, :, None, :]
    ends = [labels[EDGES[:, side]][None] for side in (0, 1)]
    library = 6 * losses.cross_entropy(logits, labels[None, None]) + 7 * losses.pairwise_nll(pair[None], *ends)
    torch.testing.assert_close(pull("05", "piecewise_nll")(unary, EDGES, pair, labels), library)


@pytest.mark.parametrize("seed", range(3))
def test_piecewise_nll_bounds_the_true_one(pull, seed):
    unary, pair, labels = random_crf(seed)

    def energy(x):
        pairs = sum(pair[e, x[i], x[j]] for e, (i, j) in enumerate(EDGES.tolist()))
        return sum(unary[i, x[i]] for i in range(6)) + pairs

    log_z = torch.logsumexp(torch.stack([-energy(x) for x in itertools.product(range(3), repeat=6)]), 0)
    true = energy(labels.tolist()) + log_z
    assert pull("05", "piecewise_nll")(unary, EDGES, pair, labels) > true > 0


@pytest.mark.parametrize("n", [2, 5, 8])
def test_paired_interval_agrees_with_scipy(pull, n):
    generator = torch.Generator().manual_seed(n)
    a, b = torch.randn(2, n, generator=generator, dtype=torch.float64)
    mean, half = pull("05", "paired_interval")(a, b)
    wanted = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((wanted.low, wanted.high), rel=1e-3)
