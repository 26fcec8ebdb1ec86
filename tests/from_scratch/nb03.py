"""The functions of notebook 03 against the library, on other problems than in the notebook."""

import torch

from pwlib.filters import ExactFilter, GridPositions, SeparableFilter
from pwlib.lattice import LatticeFilter


def problem(points, d, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(points, d, generator=generator), torch.rand(points, 4, generator=generator)


def test_attention_equals_the_exact_filter(pull):
    features, values = problem(80, 5)
    exact = ExactFilter(features[None], normalization="none")
    wanted, n = exact(values[None])[0], exact.n[0, :, 0]
    torch.testing.assert_close(pull("03", "brute_force")(features, values), wanted, rtol=1e-4, atol=1e-5)
    message, sums = pull("03", "attention_filter")(features, values)
    torch.testing.assert_close(message, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sums, n, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pull("03", "log_row_sums")(features).exp(), n, rtol=1e-4, atol=1e-5)
    rows = ExactFilter(features[None], normalization="row")(values[None])[0]
    torch.testing.assert_close(pull("03", "attend")(features, values), rows, rtol=1e-4, atol=1e-5)


def test_separable_filter_equals_the_library(pull):
    values = torch.rand(6, 9, 3, generator=torch.Generator().manual_seed(2))
    library = SeparableFilter(GridPositions(6, 9, torch.tensor(2.3)), normalization="none")
    wanted = library(values.reshape(1, -1, 3)).reshape(values.shape)
    torch.testing.assert_close(pull("03", "separable_filter")(values, 2.3), wanted, rtol=1e-4, atol=1e-5)


def test_lattice_filter_equals_the_library(pull):
    for d in (1, 2, 3, 4, 6):
        features, values = problem(150, d, seed=d)
        wanted = LatticeFilter(features[None], normalization="none")(values[None])[0]
        torch.testing.assert_close(pull("03", "lattice_filter")(features, values), wanted, rtol=1e-3, atol=1e-4)


def test_the_point_is_the_mean_of_the_corners_with_barycentric_weights(pull):
    for d in (1, 2, 5):
        features, _ = problem(200, d, seed=10 + d)
        elevated = pull("03", "elevate")(features)
        corner, weight = pull("03", "simplex")(elevated)
        assert (weight > -1e-5).all()
        assert (corner.sum(2) == 0).all()
        remainder = torch.arange(d + 1)[None, :, None]
        assert (corner % (d + 1) == remainder).all()
        torch.testing.assert_close(weight.sum(1), torch.ones(200))
        torch.testing.assert_close((weight[..., None] * corner).sum(1), elevated, rtol=1e-3, atol=1e-4)
