"""Filters against the N x N matrix itself, in float64."""

import pytest
import torch

from pwlib.crf import make_filters
from pwlib.filters import NORMALIZATIONS, ExactFilter, FilterBank, GridPositions, SeparableFilter


def dense(features, normalization, self_message):
    """The kernel matrix of a filter, float64 [B, N, N], from the definition."""
    f = features.double()
    kernel = torch.exp(-(f[:, :, None] - f[:, None]).square().sum(-1) / 2)
    n = kernel.sum(-1)
    if not self_message:
        kernel = kernel - torch.eye(kernel.shape[-1], dtype=torch.float64)
    if normalization == "row":
        return kernel / n[..., None]
    if normalization == "symmetric":
        return kernel / (n[:, :, None] * n[:, None]).sqrt()
    return kernel


@pytest.fixture
def features():
    return torch.randn(2, 130, 5, generator=torch.Generator().manual_seed(1)) * 1.5 + 3


@pytest.fixture
def values():
    return torch.rand(2, 130, 7, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("self_message", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exact_filter_is_the_dense_matrix(features, values, normalization, self_message):
    want = dense(features, normalization, self_message) @ values.double()
    filt = ExactFilter(features, normalization=normalization, self_message=self_message)
    assert (filt(values) - want).abs().max() < 1e-5 * max(1.0, want.abs().max())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_attention_in_16_bits_is_the_dense_matrix(features, values, normalization):
    """Weights, values, outputs and row sums are rounded to 11 binary digits each: four relative errors of 2^-11."""
    want = dense(features, normalization, True)
    values = values.requires_grad_()
    message = ExactFilter(features, normalization=normalization, half=True)(values)
    torch.testing.assert_close(message.detach().double(), want @ values.detach().double(), rtol=2e-3, atol=0)
    gradient = 1e-9 * torch.rand_like(values)  # below the range of 16 bits
    message.backward(gradient)
    torch.testing.assert_close(values.grad.double(), want.mT @ gradient.double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("self_message", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_separable_filter_is_the_dense_matrix(normalization, self_message):
    positions = GridPositions(9, 14, torch.tensor(2.3))
    values = torch.rand(3, 9 * 14, 4, generator=torch.Generator().manual_seed(3))
    want = dense(positions.features(), normalization, self_message) @ values.double()
    got = SeparableFilter(positions, normalization=normalization, self_message=self_message)(values)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("make", [ExactFilter, lambda f, **options: SeparableFilter(GridPositions(4, 5, f), **options)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_reach_values_and_features(make, normalization):
    generator = torch.Generator().manual_seed(4)
    separable = make is not ExactFilter
    start = torch.tensor(1.7, dtype=torch.float64) if separable else torch.randn(1, 20, 3, generator=generator).double()
    values = torch.rand(1, 20, 3, generator=generator, dtype=torch.float64)
    start.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, v: make(f, normalization=normalization)(v), (start, values), atol=1e-6)


def test_large_coordinates_lose_no_accuracy():
    """With |f|^2 eps near 1, float32 loses the exponent; the filter then computes in float64."""
    features = 1e4 + 300 * torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(5))
    values = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(6))
    want = dense(features, "none", True) @ values.double()
    assert (ExactFilter(features, normalization="none")(values) - want).abs().max() < 1e-4 * want.abs().max()


def test_an_isolated_pixel_receives_zero_and_not_nan():
    features = torch.tensor([[[0.0], [100.0]]])
    for normalization in NORMALIZATIONS:
        message = ExactFilter(features, normalization=normalization, self_message=False)(torch.ones(1, 2, 1))
        torch.testing.assert_close(message, torch.zeros(1, 2, 1), atol=1e-6, rtol=0)


def test_bank_is_the_weighted_sum_of_its_messages(features, values):
    bank = make_filters([features, features / 2], method="exact")
    weights = torch.tensor([0.5, 2.0])
    first, second = bank.messages(values)
    torch.testing.assert_close(bank(values, weights.log()), 0.5 * first + 2 * second)
    assert isinstance(bank, FilterBank) and bank.shape == (2, 130)
    mu = torch.rand(7, 7, generator=torch.Generator().manual_seed(3))
    penalties = torch.einsum("lk,bnk->bnl", mu, 0.5 * first + 2 * second)  # row: the pixel's own label
    torch.testing.assert_close(bank(values, weights.log(), mu), penalties)


def test_mean_field_of_a_bank_is_a_loop_over_dense_matrices(features):
    generator = torch.Generator().manual_seed(4)
    unary, mu = torch.randn(2, 130, 3, generator=generator), torch.rand(3, 3, generator=generator)
    weights = torch.tensor([0.5, 2.0])
    kernel = 0.5 * dense(features, "symmetric", True) + 2 * dense(features / 2, "symmetric", True)
    q = torch.softmax(-unary.double(), -1)
    for _ in range(4):
        q = torch.softmax(-unary - torch.einsum("lk,bij,bjk->bil", mu.double(), kernel, q), -1)
    bank = make_filters([features, features / 2], method="exact")
    for log in (True, False):
        found = bank.mean_field(unary, weights.log(), mu, 4, log=log)
        torch.testing.assert_close(found.exp() if log else found, q.float(), atol=1e-5, rtol=1e-5)


def test_auto_is_exact_for_small_images_and_unknown_options_are_named():
    small = make_filters([GridPositions(8, 8, torch.tensor(2.0)), torch.rand(1, 64, 5)])
    assert [type(f) for f in small.filters] == [SeparableFilter, ExactFilter]
    with pytest.raises(ValueError, match="'gauss'; expected one of auto, exact, lattice"):
        make_filters([torch.rand(1, 64, 5)], method="gauss")
    with pytest.raises(ValueError, match="'rows'; expected one of symmetric, row, none"):
        make_filters([torch.rand(1, 64, 5)], normalization="rows")
    with pytest.raises(ValueError, match=r"expected \[B, N, D\]"):
        ExactFilter(torch.rand(64, 5))
