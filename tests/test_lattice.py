"""The permutohedral lattice against a dictionary in plain Python, dense matrices, finite differences and exact sums."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

from pwlib import lattice, permutohedral
from pwlib.crf import DenseCRF
from pwlib.filters import ExactFilter, GridPositions
from pwlib.lattice import LatticeBank, LatticeFilter

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
def test_equals_the_dictionary_lattice(dims, spread, normalization):
    f = features(120, dims, spread=spread)
    v = values(1, 120, 4)
    expected = normalised(dictionary_matrix(f[0].numpy()), normalization, True) @ v[0]
    torch.testing.assert_close(LatticeFilter(f, normalization=normalization)(v)[0], expected, rtol=1e-9, atol=1e-9)


def work_in_blocks_of(points, monkeypatch):
    """So small that a small image takes several, and several threads."""
    monkeypatch.setattr("pwlib.permutohedral.BLOCK", points)
    monkeypatch.setattr("pwlib.crew.WORTH", points)


@pytest.mark.parametrize("dims", [2, 5])
def test_several_blocks_of_points_make_the_same_lattice(dims, monkeypatch):
    work_in_blocks_of(32, monkeypatch)
    f, v = features(150, dims, spread=0.7), values(1, 150, 4)
    built = LatticeFilter(f, normalization="none")
    assert len(built.lattice.heard) > built.lattice.size  # some vertex hears from more than one block
    torch.testing.assert_close(built(v)[0], dictionary_matrix(f[0].numpy()) @ v[0], rtol=1e-9, atol=1e-9)


def test_pixels_that_share_a_simplex_are_found_and_change_nothing(monkeypatch):
    f, v = features(40, 3, spread=0.3).repeat(1, 3, 1), values(1, 120, 2)
    expected = LatticeFilter(f, normalization="none")(v)
    torch.testing.assert_close(expected[0], dictionary_matrix(f[0].numpy()) @ v[0], rtol=1e-9, atol=1e-9)

    def apart(base, rank, place):
        points = torch.arange(base.shape[1])
        return points, torch.ones_like(points), points

    _, counts, _ = permutohedral._group(*permutohedral.enclosing_simplex(permutohedral.elevate(f[0].T)), 14)
    assert counts.sum() == 120 and len(counts) <= 40
    monkeypatch.setattr(permutohedral, "_group", apart)
    torch.testing.assert_close(LatticeFilter(f, normalization="none")(v), expected, rtol=1e-12, atol=1e-12)


def test_own_weight_is_the_lattice_s_diagonal_where_all_vertices_exist():
    # A fine grid of points fills the lattice: away from its border no vertex is missing.
    grid = GridPositions(24, 24, torch.tensor(4.0, dtype=torch.float64))
    f = LatticeFilter(grid.features(), normalization="none", self_message=False)
    own = f.own.view(24, 24)[8:16, 8:16]
    diagonal = dictionary_matrix(grid.features()[0].numpy()).diag().view(24, 24)[8:16, 8:16]
    torch.testing.assert_close(own, diagonal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("normalization", "self_message"), SWITCHES)
def test_gradients_match_finite_differences(normalization, self_message):
    f, shared = features(25, 3, batch=2).requires_grad_(), features(25, 2, seed=5).requires_grad_()
    v, w, mu = (
        values(2, 25, 3).requires_grad_(),
        values(1, 1, 2)[0, 0].requires_grad_(),
        values(1, 3, 3)[0].requires_grad_(),
    )

    def messages(f, shared, v, w, mu):
        return LatticeBank([shared, f], normalization=normalization, self_message=self_message)(v, w, mu)

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
    w = torch.tensor([2.0, 3.0], dtype=torch.float64)
    together = LatticeBank([shared, f])(v, w)
    apart = torch.cat([LatticeBank([shared, f[i : i + 1]])(v[i : i + 1], w) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(LatticeBank([shared])(v, w[:1].log())[1], 2 * LatticeFilter(shared)(v[1:2])[0])


def test_bank_is_the_weighted_sum_of_its_messages():
    bank = LatticeBank([features(80, 2), features(80, 5, seed=4)], self_message=False)
    v, w, mu = values(1, 80, 3), torch.tensor([0.5, 2.0], dtype=torch.float64), values(1, 3, 3, seed=9)[0]
    one, two = bank.messages(v)
    torch.testing.assert_close(bank(v, w.log()), 0.5 * one + 2 * two)
    torch.testing.assert_close(bank(v, w.log(), mu), (0.5 * one + 2 * two) @ mu.T)


def one_message_at_a_time(crf, logits, image, steps):
    """Mean field as its formula reads; every step is autograd's own business."""
    log_p = torch.log_softmax(logits, 1).flatten(2).mT
    filters, scores = crf.filters(image), log_p
    for _ in range(steps):
        scores = log_p - crf.pairwise(filters, torch.softmax(scores, -1))
    return torch.log_softmax(scores, -1).mT.reshape(logits.shape)


@pytest.mark.parametrize(("normalization", "self_message"), SWITCHES)
@pytest.mark.parametrize(("labels", "potts"), [(2, True), (5, False), (8, True), (21, False)])
def test_mean_field_and_its_gradients_are_those_of_its_formula(normalization, self_message, labels, potts, monkeypatch):
    work_in_blocks_of(64, monkeypatch)
    generator = torch.Generator().manual_seed(labels)
    mu = 1 - torch.eye(labels) + 0.1 * (not potts) * torch.rand(labels, labels, generator=generator)
    crf = DenseCRF(
        labels, compatibility=mu, filtering="lattice", normalization=normalization, self_message=self_message
    )
    if normalization == "none":
        torch.nn.init.constant_(crf.log_w, -4.0)
    crf.double()
    logits = torch.randn(2, labels, 12, 15, generator=generator).double().requires_grad_()
    image = (torch.rand(2, 3, 12, 15, generator=generator).double() / 4).requires_grad_()
    uphill = torch.randn(logits.shape, generator=generator).double()
    inputs = [logits, image, *crf.parameters()]
    expected = one_message_at_a_time(crf, logits, image, 3)
    found = crf(logits, image, iterations=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad((out * uphill).sum(), inputs) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * theirs.abs().max().item())
    # Float32 pads its rows. (Its bandwidth gradients are not float64's: features round to other sides of a simplex.)
    crf, logits, image = crf.float(), logits.float(), image.float()
    expected, found = one_message_at_a_time(crf, logits, image, 3), crf(logits, image, iterations=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad((out * uphill).sum(), inputs[2:]) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(crf(logits, image, iterations=3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("log", [True, False])
def test_mean_field_s_gradients_match_finite_differences(log):
    f, shared = features(25, 3, batch=2).requires_grad_(), features(25, 2, seed=5).requires_grad_()
    unary = values(2, 25, 3).requires_grad_()
    w, mu = values(1, 1, 2)[0, 0].requires_grad_(), values(1, 3, 3)[0].requires_grad_()

    def update(f, shared, unary, w, mu):
        return LatticeBank([shared, f], self_message=False).mean_field(unary, w, mu, 2, log=log)

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


@pytest.mark.parametrize("count", [1, 2, 30_000])
def test_every_key_is_located_whoever_shares_its_slot(count):
    numbers = np.random.default_rng(0).choice(2**20, (2, count))
    keys = torch.from_numpy(np.unique(numbers[0] * 6 - 2**40))
    wanted = torch.cat([keys, keys + 6, keys - 1, torch.from_numpy(numbers[1]) * 6 - 2**40]).view(2, -1)
    place = {key: at for at, key in enumerate(keys.tolist())}
    expected = [place.get(key, len(keys)) for key in wanted.flatten().tolist()]
    assert permutohedral._locate(keys, wanted).flatten().tolist() == expected


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_rounding_only(threads, monkeypatch):
    work_in_blocks_of(256, monkeypatch)
    f, v = portrait(40, 50), values(1, 2000, 7, dtype=torch.float32)
    expected, before = LatticeFilter(f)(v), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(LatticeFilter(f)(v), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_same_input_same_bits():
    f, v = portrait(60, 80), values(1, 4800, 7, dtype=torch.float32)
    torch.testing.assert_close(LatticeFilter(f)(v), LatticeFilter(f)(v), rtol=0, atol=0)


def test_positions_are_embedded_once_a_size_and_bandwidth():
    positions = GridPositions(9, 11, torch.tensor(3.0))
    first, second = (LatticeBank([positions]).filters[0] for _ in range(2))
    assert first is second
    other = LatticeBank([GridPositions(9, 11, torch.tensor(3.5))]).filters[0]
    assert other is not first
    learned = torch.tensor(3.0, requires_grad=True)
    filtered = LatticeBank([GridPositions(9, 11, learned)])(values(1, 99, 2, torch.float32), torch.zeros(1))
    filtered[0, 0, 0].backward()
    assert learned.grad.abs() > 0
    for size in range(2, 12):
        LatticeBank([GridPositions(size, 5, torch.tensor(3.0))])
    assert len(lattice._grids) <= 4


def test_positions_first_seen_under_inference_mode_still_train():
    positions = GridPositions(7, 13, torch.tensor(2.0))
    with torch.inference_mode():
        LatticeBank([positions])
    v = values(1, 91, 2, torch.float32).requires_grad_()
    LatticeBank([positions])(v, torch.zeros(1)).sum().backward()
    assert torch.isfinite(v.grad).all()


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


def test_keys_too_wide_to_carry_a_position_sort_all_the_same():
    # Two far clusters: 2^59 keys and 200 corners do not fit 63 bits together, the keys alone do.
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
    """At x = 0 and y a multiple of theta coordinates are equal, modulo the simplex; which vertices there are must not
    hang on another feature's last digit. The fault is a product of matrices, which rounds the two apart."""
    if fault:
        basis = permutohedral.elevate(torch.eye(5, dtype=torch.float64))
        monkeypatch.setattr(lattice, "elevate", lambda features: basis @ features)
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
