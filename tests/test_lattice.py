"""The permutohedral lattice against a dictionary in plain Python, dense matrices, finite differences and exact sums.

Filters of float64 features use the plain backend, those of float32 the compiled one.
"""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

from pwlib.crf import DenseCRF
from pwlib.filters import ExactFilter, FilterBank, GridPositions
from pwlib.lattice import LatticeBank, LatticeFilter, geometry, plain

SWITCHES = list(itertools.product(("symmetric", "row", "none"), (True, False)))


def features(points, dims, *, spread=2.0, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, points, dims, generator=generator, dtype=dtype)


def values(batch, points, channels, dtype=torch.float64, seed=1):
    return torch.rand(batch, points, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def portrait(height, width):
    """A photograph as bilateral features at the usual bandwidths, scaled to its size: [1, H*W, 5]."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        image = np.asarray(file.convert("RGB").resize((width, height)), dtype=np.float32)
    positions = GridPositions(height, width, torch.tensor(80.0 * height / 375)).features()
    return torch.cat([positions, torch.from_numpy(image.reshape(1, -1, 3)) / 13], -1)


def dictionary_matrix(points):
    """The lattice's K as a dense float64 matrix, point by point, from the paper's description and nothing of pwlib.

    Vertices are integer tuples in a dictionary; simplices are found by sorting, the blur walks tuples.
    """
    n, d = points.shape
    scale = np.sqrt(2 / 3) * (d + 1) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))
    # Columns of E: an orthogonal basis of the plane sum = 0, the j-th is (1, .., 1, -j, 0, .., 0).
    basis = np.array([[1.0] * j + [-j] + [0.0] * (d - j) for j in range(1, d + 1)])
    vertices, splat = {}, []
    for y in (points * scale) @ basis:
        base = np.round(y / (d + 1)) * (d + 1)
        excess = round(base.sum() / (d + 1))
        by_rest = np.argsort(-(y - base), kind="stable")
        if excess > 0:
            base[by_rest[len(y) - excess :]] -= d + 1
        else:
            base[by_rest[:-excess]] += d + 1
        rest = y - base
        by_rest = np.argsort(-rest, kind="stable")
        row = {}
        for k in range(d + 1):
            vertex = base + k
            vertex[by_rest[d + 1 - k :]] -= d + 1
            drop = rest[by_rest[d - k]] - rest[by_rest[d - k + 1]] if k else rest[by_rest[d]] - rest[by_rest[0]] + d + 1
            row[vertices.setdefault(tuple(vertex.astype(int)), len(vertices))] = drop / (d + 1)
        splat.append(row)
    matrix = np.zeros((n, len(vertices)))
    for i, row in enumerate(splat):
        for vertex, weight in row.items():
            matrix[i, vertex] = weight
    blurred = matrix.T
    for direction in range(d + 1):
        blur = np.eye(len(vertices))
        for vertex, here in vertices.items():
            step = np.full(d + 1, -1)
            step[direction] = d
            for sign in (1, -1):
                there = vertices.get(tuple(np.array(vertex) + sign * step))
                if there is not None:
                    blur[here, there] = 0.5
        blurred = blur @ blurred
    return torch.from_numpy(matrix @ blurred / (1 + 2.0**-d))


def normalised(k, normalization, self_message):
    n = k.sum(1, keepdim=True)
    if not self_message:
        k = k - torch.diag(k.diag())
    return {"none": k, "row": k / n, "symmetric": k / (n * n.T).sqrt()}[normalization]


@pytest.mark.parametrize(("dims", "spread"), [(1, 3.0), (2, 2.0), (3, 1.0), (5, 0.7), (6, 1.5)])
@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_dictionary_lattice(dims, spread, normalization, dtype, error):
    f = features(120, dims, spread=spread, dtype=dtype)
    v = values(1, 120, 4)
    expected = normalised(dictionary_matrix(f[0].double().numpy()), normalization, True) @ v[0]
    found = LatticeFilter(f, normalization=normalization)(v.to(dtype))[0].double()
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


def whole(points, dims, dtype=torch.float32):
    """Points on and near the borders of simplices: many ties in the order of the rests."""
    generator = torch.Generator().manual_seed(dims)
    return torch.randint(-4, 5, (2, points, dims), generator=generator).to(dtype)


def grid(theta, colours=0):
    """A pixel grid, with colours of whole numbers / 13 if wanted."""
    positions = GridPositions(40, 30, torch.tensor(theta)).features()
    generator = torch.Generator().manual_seed(0)
    return torch.cat([positions, torch.randint(0, 3, (1, 1200, colours), generator=generator) / 13], -1)


@pytest.mark.parametrize(
    "f",
    [
        *(features(3000, dims, batch=2, dtype=torch.float32) for dims in (1, 2, 3, 5, 6)),
        *(whole(500, dims) for dims in (1, 2, 3, 5, 6)),
        *(grid(theta, colours) for theta in (0.5, 1.0, 3.0, 80.0) for colours in (0, 3)),
        torch.full((1, 100, 5), 0.3),
    ],
    ids=lambda f: "x".join(map(str, f.shape)),
)
def test_the_compiled_embedding_has_the_bits_of_the_plain_one(f, monkeypatch):
    from pwlib.lattice import compiled

    monkeypatch.setattr("pwlib.lattice.compiled.CHUNK", 200)
    expected_weight, expected = plain.embed(f)
    weight, lattice = compiled.embed(f)
    assert torch.equal(weight, expected_weight)
    # The vertices may have other numbers: each vertex of one lattice is always the same vertex of the other.
    pairs = torch.stack([lattice.corner, expected.corner], -1).flatten(0, 2).unique(dim=0)
    assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_points_that_share_a_simplex_share_its_vertices(dtype, error):
    f, v = features(40, 3, spread=0.3, dtype=dtype).repeat(1, 3, 1), values(1, 120, 2)
    found = LatticeFilter(f, normalization="none")(v.to(dtype))[0].double()
    torch.testing.assert_close(found, dictionary_matrix(f[0].double().numpy()) @ v[0], rtol=error, atol=error)


def test_own_weight_is_the_lattice_s_diagonal_where_all_vertices_exist():
    # A fine grid of points fills the lattice: away from its border no vertex is missing.
    f = GridPositions(24, 24, torch.tensor(4.0, dtype=torch.float64)).features()
    eye = torch.eye(24 * 24, dtype=torch.float64)[None]
    others = LatticeFilter(f, normalization="none", self_message=False)(eye)[0]
    expected = dictionary_matrix(f[0].numpy()).fill_diagonal_(0)
    inside = torch.arange(24 * 24).view(24, 24)[8:16, 8:16].flatten()
    torch.testing.assert_close(others[inside], expected[inside], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("normalization", "self_message"), SWITCHES)
def test_gradients_match_finite_differences(normalization, self_message):
    f, shared = features(25, 3, batch=2).requires_grad_(), features(25, 2, seed=5).requires_grad_()
    v, w, mu = (
        values(2, 25, 3).requires_grad_(),
        values(1, 1, 2)[0, 0].requires_grad_(),
        values(1, 3, 3)[0].requires_grad_(),
    )

    def messages(f, shared, v, w, mu):
        bank = LatticeBank.of([shared, f], normalization=normalization, self_message=self_message)
        return bank(v, w, mu)

    # A step this small stays inside every simplex: the operator is smooth there.
    assert torch.autograd.gradcheck(messages, (f, shared, v, w, mu), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
def test_backward_is_the_adjoint(normalization):
    f = LatticeFilter(portrait(24, 32).double(), normalization=normalization)
    v, u = values(1, 768, 3).requires_grad_(), values(1, 768, 3, seed=2)
    eye = torch.eye(768, dtype=torch.float64)[None]
    transposed = f(eye)[0].T @ u[0]
    (f(v) * u).sum().backward()
    torch.testing.assert_close(v.grad[0], transposed, rtol=1e-6, atol=1e-6 * transposed.abs().max().item())


@pytest.mark.slow
def test_bandwidth_gradients_are_near_the_exact_filter_s():
    """A stated bound on a hard case, few pixels and high contrast; benchmarks/crf/gradients.json has photographs."""
    height, width = 96, 128
    f = portrait(height, width)
    # Regions of like brightness, seen through noise: bandwidths matter, and smoothing helps.
    grey = torch.nn.functional.avg_pool2d(f[..., 2:].sum(-1).view(1, 1, height, width), 5, 1, 2)
    label = (grey[0] / grey.max() * 3.99).long()
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.one_hot(label, 4).float()
    q = torch.softmax(2 * truth + torch.randn(truth.shape, generator=generator), -1).view(1, -1, 4)
    uphill = q - truth.view(1, -1, 4)
    gradients = []
    for kind in (ExactFilter, LatticeFilter):
        log_theta = torch.zeros(2, requires_grad=True)
        scaled = torch.cat([f[..., :2] / log_theta[0].exp(), f[..., 2:] / log_theta[1].exp()], -1)
        (kind(scaled)(q) * uphill).sum().backward()
        gradients.append(log_theta.grad)
    exact, approximate = gradients
    assert torch.nn.functional.cosine_similarity(exact, approximate, dim=0) > 0.9
    assert 1 / 3 < approximate.norm() / exact.norm() < 3


def test_a_batch_is_its_images_and_shared_features_serve_every_image():
    f, shared, v = features(60, 5, batch=3), features(60, 2, seed=3), values(3, 60, 4)
    w = torch.tensor([2.0, 3.0], dtype=torch.float64).log()
    together = LatticeBank.of([shared, f])(v, w)
    apart = torch.cat([LatticeBank.of([shared, f[i : i + 1]])(v[i : i + 1], w) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LatticeBank.of([shared])(v, w[:1])[1], 2 * LatticeFilter(shared)(v[1:2])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_that_do_not_fit_the_features_are_refused_in_words(dtype):
    shared = LatticeBank.of([features(50, 2, dtype=dtype)])
    own = LatticeBank.of([features(50, 2, batch=2, dtype=dtype)])
    for bank, shape in ((own, (3, 50, 3)), (own, (1, 50, 3)), (shared, (1, 49, 3)), (shared, (50, 3))):
        v = torch.zeros(shape, dtype=dtype)
        expected = r"values have shape .*; expected \[(B|2), 50, C\]"
        with pytest.raises(ValueError, match=expected):
            bank(v, torch.zeros(1, dtype=dtype))
        with pytest.raises(ValueError, match=expected):
            bank.mean_field(v, torch.zeros(1, dtype=dtype), torch.eye(3, dtype=dtype), 1)
        with pytest.raises(ValueError, match=expected):
            bank.filters[0](v)


@pytest.mark.parametrize(("normalization", "self_message"), SWITCHES)
def test_bank_is_the_weighted_sum_of_its_messages(normalization, self_message):
    f = [features(80, 2), features(80, 5, seed=4)]
    bank = LatticeBank.of(f, normalization=normalization, self_message=self_message)
    v, w, mu = values(1, 80, 3), torch.tensor([0.5, 2.0], dtype=torch.float64), values(1, 3, 3, seed=9)[0]
    one, two = bank.messages(v)
    torch.testing.assert_close(bank(v, w.log()), 0.5 * one + 2 * two)
    torch.testing.assert_close(bank(v, w.log(), mu), (0.5 * one + 2 * two) @ mu.T)


def penalties(labels, potts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.eye(labels) + 0.3 * (not potts) * torch.rand(labels, labels, generator=generator)


def close(found, expected, error):
    """Assert that two lists of tensors are equal up to `error`, relative to the largest number of each."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error * other.abs().max().item())


@pytest.mark.parametrize(("normalization", "self_message"), SWITCHES)
@pytest.mark.parametrize(("labels", "potts"), [(2, True), (3, False), (21, True), (21, False)])
@pytest.mark.parametrize("what", ["message", "mean field"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_backend_is_the_plain_one(normalization, self_message, labels, potts, what, threads, monkeypatch):
    """Values and the gradients with respect to values, log weights, penalties, features and bandwidths."""
    generator = torch.Generator().manual_seed(labels)
    position, colour = features(700, 2, dtype=torch.float32), features(700, 3, batch=2, dtype=torch.float32, seed=2)
    unary, slope = torch.randn(2, 2, 700, labels, generator=generator)
    inputs = [
        position.requires_grad_(),
        colour.requires_grad_(),
        torch.tensor([0.3, -0.2], requires_grad=True),  # log bandwidths
        torch.tensor([-4.0, -3.0] if normalization == "none" else [0.5, 1.0]).requires_grad_(),  # log weights
        unary.requires_grad_(),
        penalties(labels, potts).requires_grad_(),
    ]

    def run(mean_field):
        position, colour, log_theta, log_w, unary, mu = inputs
        bilateral = torch.cat([position.expand(2, -1, -1) / log_theta[0].exp(), colour / log_theta[1].exp()], -1)
        made = [position / log_theta[0].exp(), bilateral]
        bank = LatticeBank.of(made, normalization=normalization, self_message=self_message)
        if what == "message":
            out = bank(torch.softmax(unary, -1), log_w, mu)
        else:
            out = mean_field(bank, unary, log_w, mu, 3)
        return out, *torch.autograd.grad((out * slope).sum(), inputs)

    monkeypatch.setattr("pwlib.lattice.compiled.CHUNK", 200)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(LatticeBank.mean_field)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("pwlib.lattice.bank.backend", lambda features: plain)
    close(found, run(FilterBank.mean_field), 1e-3)
    close(found[:1], run(FilterBank.mean_field)[:1], 1e-5)


def test_mean_field_of_more_points_than_a_block():
    """Without a gradient the marginals of a block are overwritten by the next."""
    f, unary = features(5000, 3, dtype=torch.float32), values(1, 5000, 5, torch.float32)
    bank, arguments = LatticeBank.of([f]), (unary, torch.ones(1), penalties(5, False), 4)
    expected = FilterBank.mean_field(bank, *arguments)
    torch.testing.assert_close(bank.mean_field(*arguments), expected, rtol=1e-5, atol=1e-5)
    learned = bank.mean_field(unary.requires_grad_(), *arguments[1:])
    torch.testing.assert_close(learned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["message", "mean field"])
def test_gradients_can_be_computed_twice(what):
    f = features(60, 3, dtype=torch.float32).requires_grad_()
    unary, log_w = values(1, 60, 4, torch.float32).requires_grad_(), torch.zeros(1, requires_grad=True)
    bank, mu = LatticeBank.of([f]), penalties(4, False).requires_grad_()
    out = bank(unary, log_w, mu) if what == "message" else bank.mean_field(unary, log_w, mu, 2)
    inputs = (f, unary, log_w, mu)
    first = [g.clone() for g in torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)]
    close(torch.autograd.grad(out.square().sum(), inputs), first, 1e-6)


@pytest.mark.parametrize("log", [True, False])
def test_mean_field_s_gradients_match_finite_differences(log):
    f, shared = features(25, 3, batch=2).requires_grad_(), features(25, 2, seed=5).requires_grad_()
    unary = values(2, 25, 3).requires_grad_()
    w, mu = values(1, 1, 2)[0, 0].requires_grad_(), values(1, 3, 3)[0].requires_grad_()

    def update(f, shared, unary, w, mu):
        return LatticeBank.of([shared, f], self_message=False).mean_field(unary, w, mu, 2, log=log)

    assert torch.autograd.gradcheck(update, (f, shared, unary, w, mu), eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("frozen", ["log_theta", "log_w", "compatibility", "logits"])
def test_what_learns_in_mean_field_does_not_hang_on_what_does_not(frozen):
    generator = torch.Generator().manual_seed(0)
    crf = DenseCRF(4, filtering="lattice")
    logits, image = torch.randn(1, 4, 12, 15, generator=generator), torch.rand(1, 3, 12, 15, generator=generator)
    gradients = []
    for learning in (True, False):
        crf.requires_grad_().zero_grad()
        for name, parameter in crf.named_parameters():
            parameter.requires_grad_(learning or not name.startswith(frozen))
        held = logits.clone().requires_grad_(learning or frozen != "logits")
        crf(held, image, iterations=2)[:, 1].sum().backward()
        found = {name: p.grad for name, p in (*crf.named_parameters(), ("logits", held)) if not name.startswith(frozen)}
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_mean_field_returns_marginals_or_their_logarithm_and_leaves_logits_alone():
    generator = torch.Generator().manual_seed(0)
    crf = DenseCRF(5, filtering="lattice")
    logits, image = torch.randn(1, 5, 12, 15, generator=generator), torch.rand(1, 3, 12, 15, generator=generator)
    given = logits.clone()
    with torch.no_grad():
        torch.testing.assert_close(crf.marginals(logits, image), crf(logits, image).exp(), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, given)
    with torch.inference_mode():
        torch.testing.assert_close(crf(logits, image), crf(logits, image).clone())


def test_scores_beyond_the_reach_of_exp_are_still_probabilities():
    crf = DenseCRF(6, filtering="lattice", normalization="none", iterations=3)
    torch.nn.init.constant_(crf.log_w, 2.0)  # hundreds of like pixels at weight 7: exp of their sum overflows
    logits = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    image = torch.full((1, 3, 16, 16), 0.5)
    with torch.no_grad():
        fast = crf.marginals(logits, image)
    torch.testing.assert_close(fast, crf(logits, image).exp().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.sum(1), torch.ones(1, 16, 16))


def test_same_input_same_bits():
    f, v = portrait(60, 80), values(1, 4800, 7, dtype=torch.float32)
    torch.testing.assert_close(LatticeFilter(f)(v), LatticeFilter(f)(v), rtol=0, atol=0)


def test_positions_are_embedded_once_a_size_and_bandwidth():
    def embedded(theta, height=9):
        return LatticeBank.of([GridPositions(height, 11, theta)]).filters[0]

    first = embedded(torch.tensor(3.0))
    assert embedded(torch.tensor(3.0)) is first
    assert embedded(torch.tensor(3.5)) is not first
    for height in range(2, 12):
        embedded(torch.tensor(3.0), height)
    assert embedded(torch.tensor(3.0)) is not first  # only a few are kept
    learned = torch.tensor(3.0, requires_grad=True)
    LatticeBank([embedded(learned)])(values(1, 99, 2, torch.float32), torch.zeros(1))[0, 0, 0].backward()
    assert learned.grad.abs() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("self_message", [True, False])
def test_positions_first_seen_under_inference_mode_still_train(dtype, self_message):
    positions, v = GridPositions(7, 13, torch.tensor(2.0, dtype=dtype)), values(1, 91, 2, dtype)
    log_w = torch.zeros(1, dtype=dtype, requires_grad=True)
    with torch.inference_mode():
        LatticeBank.of([positions], self_message=self_message)(v, log_w)
    v.requires_grad_()
    LatticeBank.of([positions], self_message=self_message)(v, log_w).sum().backward()
    assert torch.isfinite(v.grad).all() and torch.isfinite(log_w.grad).all()


@pytest.mark.parametrize("self_message", [True, False])
@pytest.mark.parametrize("images", [1, 2])
def test_a_call_without_gradients_does_not_change_later_gradients(self_message, images):
    f, v, gradients = features(30, 3).requires_grad_(), values(images, 30, 2), []
    log_w = torch.zeros(1, dtype=torch.float64)
    for called_before in (True, False):
        bank = LatticeBank.of([f], self_message=self_message)
        if called_before:
            with torch.no_grad():
                bank(v, log_w)
        gradients += torch.autograd.grad(bank(v, log_w).square().sum(), f)
    torch.testing.assert_close(*gradients)


def usual(theta_alpha=80 * 48 / 375, theta_beta=13.0):
    f = portrait(48, 36)
    return torch.cat([f[..., :2] * (80 * 48 / 375) / theta_alpha, f[..., 2:] * 13 / theta_beta], -1)


DEGENERATE = {
    "photograph": usual(),
    "constant image": usual() * torch.tensor([1.0, 1, 0, 0, 0]),
    "two pixels": usual()[:, :2],
    "one pixel": usual()[:, :1],
    "one colour channel": usual()[..., :3],
    "one dimension": usual()[..., 2:3],
    "identical points": torch.full((1, 500, 5), 0.3),
    "identical points at 1e6": torch.full((1, 500, 5), 1e6),
    "positions at 1e6": usual()[..., :2] + 1e6,
    "everything at 1e6": usual() + 1e6,
    **{f"theta_beta {theta}": usual(theta_beta=theta) for theta in (0.1, 1.0, 10.0, 100.0, 1000.0)},
    **{f"theta_alpha {theta}": usual(theta_alpha=theta) for theta in (0.1, 1.0, 10.0, 100.0, 1000.0)},
    **{f"both {theta}": usual(theta, theta) for theta in (0.1, 1.0, 10.0, 100.0, 1000.0)},
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_degenerate_inputs_stay_within_bounds_of_the_exact_filter(name, normalization):
    """Values in [0, 1]: the mean error stays below 0.03, without self-messages below 0.08."""
    f = DEGENERATE[name]
    v = values(1, f.shape[1], 3, torch.float32)
    for self_message, bound in ((True, 0.03), (False, 0.08)):
        options = {"normalization": normalization, "self_message": self_message}
        approximate = LatticeFilter(f, **options)(v)
        assert torch.isfinite(approximate).all()
        assert (approximate - ExactFilter(f, **options)(v)).abs().mean() < bound


def test_gradients_of_degenerate_inputs_are_finite():
    for name, f in DEGENERATE.items():
        f = f.clone().requires_grad_()
        LatticeFilter(f)(values(1, f.shape[1], 2, torch.float32)).square().sum().backward()
        assert torch.isfinite(f.grad).all(), name


def test_clusters_far_apart_are_numbered_all_the_same():
    # The keys of the vertices reach 2^59.
    near, v = features(20, 3, dtype=torch.float64), values(1, 40, 2)
    f = torch.cat([near, near + torch.tensor([4e5, 3e5, 2e5], dtype=torch.float64)], 1)
    got = LatticeFilter(f, normalization="none")(v)[0]
    torch.testing.assert_close(got, dictionary_matrix(f[0].numpy()) @ v[0], rtol=1e-6, atol=1e-6)


def test_more_cells_than_keys_are_refused_in_words():
    with pytest.raises(ValueError, match=r"lattice cells, too many to number in 64 bits; expected bandwidths"):
        LatticeFilter(features(50, 5, spread=1e6))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 4, 2), float("nan")), "NaN or infinity"),
        (torch.full((1, 4, 2), float("inf")), "NaN or infinity"),
        (torch.zeros(4, 2), "expected \\[B, N, D\\]"),
        (torch.zeros(1, 0, 2), "expected \\[B, N, D\\]"),
    ],
)
def test_bad_features_are_refused_in_words(bad, message):
    with pytest.raises(ValueError, match=message):
        LatticeFilter(bad)


@pytest.mark.parametrize("fault", [False, True])
def test_ties_of_the_pixel_grid_are_not_broken_by_rounding(fault, monkeypatch):
    """At x = 0 and y a multiple of theta, coordinates are equal modulo the simplex. Which vertices are touched must not
    depend on another feature's last digit. The planted fault is a matrix product, which rounds the two differently."""
    if fault:
        basis = geometry.elevate(torch.eye(5, dtype=torch.float64))
        monkeypatch.setattr("pwlib.lattice.geometry.elevate", lambda features: torch.tensordot(basis, features, 1))
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(36.0), indexing="ij")
    position = torch.stack([x, y], -1).reshape(1, -1, 2).double() / 5
    jumps = []
    for _ in range(4):
        colour = 1 + 250 * torch.rand(1, 24 * 36, 3, generator=generator, dtype=torch.float64)
        values = torch.rand(1, 24 * 36, 4, generator=generator, dtype=torch.float64)
        at = [torch.cat([position, colour / (16.3 + nudge)], -1) for nudge in (0, 1e-12, 1e-10)]
        there, *beside = (LatticeFilter(features, normalization="row")(values) for features in at)
        jumps += [(one - there).abs().max().item() for one in beside]
    assert (max(jumps) > 1e-6) == fault, jumps


def photograph(height=72, width=64, labels=5):
    """A noise image uint8 [H, W, 3] with more pixels than are filtered exactly, and probabilities [K, H, W]."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return image, generator.dirichlet(np.ones(labels), (height, width)).transpose(2, 0, 1).astype(np.float32)


def in_a_new_process(code, *, folder=None, seconds=120):
    """The standard output of Python code, with `folder` first on its path; fails if it takes longer than `seconds`."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join(str(p) for p in (folder, root, root / "tests", os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_threads_at_once_give_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr("pwlib.lattice.compiled.CHUNK", 1000)
    crf = DenseCRF(5, filtering="lattice", iterations=3)
    generator = torch.Generator().manual_seed(0)
    problems = [
        (torch.randn(1, 5, side, 60, generator=generator), torch.rand(1, 3, side, 60, generator=generator))
        for side in (40, 50, 60, 70)
    ]

    def solve(problem):
        logits = problem[0].clone().requires_grad_()
        out = crf(logits, problem[1])
        return out.detach(), *torch.autograd.grad(out[:, 0].sum(), [logits, crf.log_w, crf.log_theta_alpha])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [solve(problem) for problem in problems]
        with ThreadPoolExecutor(4) as pool:
            together = [list(pool.map(solve, problems)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for found in together:
        for one, other in zip(found, alone, strict=True):
            assert all(map(torch.equal, one, other))


# PyTorch's OpenMP threads do not survive a fork; a forked process therefore uses one thread.
FORKED = """
import multiprocessing, numpy as np, torch
from pwlib import dense_crf
from test_lattice import photograph
expected = dense_crf(*photograph(144, 128))
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.starmap(dense_crf, [photograph(144, 128)] * 4)
assert all(np.abs(q - expected).max() < 1e-5 for q in found)
"""
FORKED_THREADS = """
import multiprocessing, torch
from pwlib.lattice.compiled import parallel
torch.set_num_threads(2)
def work(_=None):
    return parallel(divmod, [(7, 2), (9, 4), (5, 5)])
expected = work()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(4)) == [expected] * 4
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("code", [FORKED, FORKED_THREADS], ids=["dense_crf", "threads"])
def test_forked_processes_finish_after_their_parent_used_the_lattice(code):
    in_a_new_process(code, seconds=60)


WITHOUT_NUMBA = """
import sys, warnings
from pwlib import dense_crf
from test_lattice import photograph
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    labels = [dense_crf(*photograph()).argmax(0) for _ in range(2)]
assert (labels[0] == labels[1]).all()
print([str(w.message) for w in caught if "numba" in str(w.message)])
print(labels[0].tolist())
"""


@pytest.mark.slow
def test_without_numba_one_warning_and_the_same_labels(tmp_path):
    from pwlib import dense_crf

    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("numba is not here")')
    warned, labels = in_a_new_process(WITHOUT_NUMBA, folder=tmp_path).splitlines()
    assert warned.count("numba is not installed") == 1
    assert labels == str(dense_crf(*photograph()).argmax(0).tolist())


COUNT = """
from pwlib.lattice import compiled
stats = [f.stats for f in vars(compiled).values() if hasattr(f, "stats")]
print(len(stats), sum(bool(s.cache_hits) for s in stats), sum(bool(s.cache_misses) for s in stats))
"""


@pytest.mark.slow
def test_a_second_process_does_not_compile_again():
    LatticeFilter(features(5, 2, dtype=torch.float32))  # compiles, unless that was done before
    functions, hits, misses = map(int, in_a_new_process(COUNT).split())
    assert functions == hits > 5 and misses == 0


WITHOUT_CACHE = """
import sys, types, warnings
class Numba(types.ModuleType):
    def njit(self, *args, **kwargs):
        raise RuntimeError("cannot cache function: no locator available")
sys.modules["numba"] = Numba("numba")
from pwlib import dense_crf
from test_lattice import photograph
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dense_crf(*photograph())
assert any("numba cannot be used" in str(w.message) for w in caught)
"""


@pytest.mark.slow
def test_without_a_place_for_the_cache_the_plain_version_is_used():
    in_a_new_process(WITHOUT_CACHE)


def test_values_changed_before_the_backward_pass_are_an_error():
    values = torch.rand(1, 40, 2)
    bank = LatticeBank([LatticeFilter(features(40, 2, dtype=torch.float32))])
    out = bank(values, torch.zeros(1, requires_grad=True)).sum()
    values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("points", [1, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_at_one_place_add_up(points, dtype):
    """A flat region puts many points around the same vertices: each receives the response to one, times their sum."""
    place = torch.tensor([[[0.3, -0.7, 1.1]]], dtype=dtype)  # [1, 1, D]
    values = torch.rand(1, points, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    response = LatticeFilter(place, normalization="none")(torch.ones(1, 1, 1, dtype=dtype))
    message = LatticeFilter(place.repeat(1, points, 1), normalization="none")(values)
    torch.testing.assert_close(message, (response * values.sum(1)).expand_as(message), rtol=1e-5, atol=0)
