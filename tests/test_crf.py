"""The dense CRF against brute force: float64 loops, enumeration, finite differences, planted faults."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from pwlib import graph
from pwlib.crf import DenseCRF, Kernel
from pwlib.tools.dense import probabilities_from_labels

HEIGHT, WIDTH, LABELS = 6, 7, 3


def problem(height=HEIGHT, width=WIDTH, labels=LABELS, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, labels, height, width, generator=generator)
    return logits, torch.rand(batch, 3, height, width, generator=generator)


def make(labels=LABELS, kind=DenseCRF, **options):
    settings = {"theta_alpha": 4.0, "theta_beta": 60.0, "theta_gamma": 1.5, "w_bilateral": 2.0, "w_spatial": 1.2}
    return kind(labels, **{"filtering": "exact", **settings, **options})


def asymmetric(labels=LABELS, seed=9):
    return torch.rand(labels, labels, generator=torch.Generator().manual_seed(seed))


# --- the oracle: mean field with loops and numpy, float64, written from Kraehenbuehl & Koltun's equations -------------


def pair_weights(crf, image):
    """sum_m w_m k_m, [N, N], with numpy, from the definition. image [3, H, W] in [0, 1]."""
    _, height, width = image.shape
    alpha, beta, gamma = (p.exp().item() for p in (crf.log_theta_alpha, crf.log_theta_beta, crf.log_theta_gamma))
    position = np.array([(y, x) for y in range(height) for x in range(width)], dtype=np.float64)
    colour = 255 * image.double().numpy().reshape(3, -1).T
    distance = ((position[:, None] - position[None]) ** 2).sum(-1)
    contrast = ((colour[:, None] - colour[None]) ** 2).sum(-1)
    kernels = [np.exp(-distance / (2 * gamma**2)), np.exp(-distance / (2 * alpha**2) - contrast / (2 * beta**2))]
    total = 0
    for weight, kernel in zip(crf.log_w.exp().tolist(), kernels, strict=True):
        n = kernel.sum(1)
        if not crf.self_message:
            kernel = kernel - np.eye(len(kernel))
        if crf.normalization == "symmetric":
            kernel = kernel / np.sqrt(n[:, None] * n[None])
        elif crf.normalization == "row":
            kernel = kernel / n[:, None]
        total = total + weight * kernel
    return total


def brute_force(crf, logits, image, iterations):
    """Marginals [N, K] after `iterations` parallel updates."""
    labels = logits.shape[0]
    unary = -torch.log_softmax(logits.double(), 0).numpy().reshape(labels, -1).T
    weights, mu = pair_weights(crf, image), crf.compatibility.detach().double().numpy()
    q = np.exp(-unary)
    for _ in range(iterations):
        energy = np.zeros_like(unary)
        for i in range(len(q)):
            for l in range(labels):
                energy[i, l] = sum(mu[l, other] * (weights[i] @ q[:, other]) for other in range(labels))
        q = np.exp(-unary - energy)
        q /= q.sum(1, keepdims=True)
    return q


def assert_is_mean_field(crf, iterations=5):
    logits, image = problem()
    want = brute_force(crf, logits[0], image[0], iterations)
    q = (
        crf(logits, image, iterations=iterations).exp()[0].detach(),
        crf.trace(logits, image, iterations=iterations).q[-1],
    )
    for found in q:
        np.testing.assert_allclose(found.reshape(LABELS, -1).T.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("self_message", [True, False])
@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
def test_mean_field_and_trace_are_the_loop(normalization, self_message):
    assert_is_mean_field(make(normalization=normalization, self_message=self_message, compatibility=asymmetric()))


@pytest.mark.parametrize("filtering", ["exact", "lattice"])
def test_filters_can_be_reused_for_the_same_image(filtering, monkeypatch):
    crf = make(filtering=filtering)
    logits, image = problem()
    expected = crf(logits, image)
    with torch.no_grad():
        filters = crf.filters(image)
    monkeypatch.setattr(crf, "filters", None)  # it must not be called again
    held = logits.clone().requires_grad_()
    found = crf(held, image, filters=filters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(crf.marginals(logits, image, filters=filters), expected.exp())
    for _ in range(2):
        held.grad = None
        crf(held, image, filters=filters).square().sum().backward()
        assert held.grad.abs().sum() > 0 and crf.log_theta_alpha.grad is None and crf.log_w.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"1 x \d+ pixels, the image has 1 x \d+; expected the result"):
        crf(logits[..., :-1, :], image[..., :-1, :], filters=filters)


class WrongSign(DenseCRF):
    def penalties(self):
        return -super().penalties()


class DoubleSoftmax(DenseCRF):
    def forward(self, logits, image, *, iterations=None):
        return torch.log_softmax(super().forward(logits, image, iterations=iterations).exp(), 1)


class TransposedCompatibility(DenseCRF):
    def penalties(self):
        return self.compatibility.T


class ColoursInUnitRange(DenseCRF):
    def features(self, image):
        return super().features(image / 255)


@pytest.mark.parametrize("fault", [WrongSign, DoubleSoftmax, TransposedCompatibility, ColoursInUnitRange])
def test_planted_faults_are_caught(fault):
    with pytest.raises(AssertionError):
        assert_is_mean_field(make(kind=fault, compatibility=asymmetric()))


@pytest.mark.parametrize("fault", [WrongSign, TransposedCompatibility])
def test_the_penalty_of_a_subclass_is_used_on_lattices(fault):
    logits, image = problem()
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            plain, other = (make(kind=k, compatibility=asymmetric(), filtering="lattice") for k in (DenseCRF, fault))
            assert (plain(logits, image) - other(logits, image)).abs().max() > 0.01


def test_a_wrong_sign_makes_labels_flip_and_the_right_one_does_not():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(24) >= 12).long().expand(24, 24)
    logits = nn.functional.one_hot(truth, 2).movedim(-1, 0)[None] * 2.0
    logits = logits + 1.2 * torch.randn(logits.shape, generator=generator)
    image = (truth * 0.6 + 0.2).expand(1, 3, 24, 24)

    def accuracy(crf):
        return [(step == truth).float().mean().item() for step in crf.trace(logits, image, iterations=4).labels]

    right, wrong = accuracy(make(2, w_bilateral=8.0)), accuracy(make(2, kind=WrongSign, w_bilateral=8.0))
    assert right[-1] > right[0] and right[-1] > 0.99
    assert wrong[1] < 0.5 < wrong[2]  # one step turns the picture inside out, the next turns it back


# --- energies and marginals: enumeration -----------------------------------------------------------------------------


def tiny(**options):
    logits, image = problem(2, 3, labels=2, seed=3)
    return make(2, **options).double(), logits.double(), image.double()


def dense_graph(crf, logits, image):
    """The dense CRF as a graph of `pwlib.graph`: every pair an edge, from the numpy oracle's weights."""
    weights = torch.as_tensor(pair_weights(crf, image[0]))
    edges = graph.all_pairs(weights.shape[0])
    unary = -torch.log_softmax(logits, 1)[0].reshape(logits.shape[1], -1).T
    return unary, edges, weights[edges[:, 0], edges[:, 1]][:, None, None] * crf.compatibility.detach()


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_energy_of_every_labelling(normalization):
    crf, logits, image = tiny(normalization=normalization)
    unary, edges, pair = dense_graph(crf, logits, image)
    for x in itertools.product(range(2), repeat=6):
        want = sum(unary[i, x[i]] for i in range(6)) + sum(
            pair[n, x[i], x[j]] for n, (i, j) in enumerate(edges.tolist())
        )
        got = crf.energy(torch.tensor(x).reshape(1, 2, 3), logits, image)
        assert got.item() == pytest.approx(want.item(), abs=1e-9)
    with pytest.raises(ValueError, match=r"labelling holds 255; expected 0\.\.1"):
        crf.energy(torch.full((1, 2, 3), 255), logits, image)


def test_free_energy_bounds_minus_log_z_and_differs_by_the_divergence():
    crf, logits, image = tiny(self_message=False, normalization="none", w_bilateral=0.3, w_spatial=0.2)
    truth = graph.infer(*dense_graph(crf, logits, image))
    unary, edges, pair = dense_graph(crf, logits, image)
    trace = crf.trace(logits, image, iterations=8)
    states = graph.labellings(6, 2)
    log_p = -graph.energies(states, unary, edges, pair) - truth.log_z
    for q, free in zip(trace.q, trace.free_energy, strict=True):
        log_q = q.reshape(2, 6).log().T[torch.arange(6), states].sum(1)
        divergence = (log_q.exp() * (log_q - log_p)).sum()
        assert (free + truth.log_z).item() == pytest.approx(divergence.item(), abs=1e-9)
    assert -truth.log_z <= trace.free_energy[-1] <= trace.free_energy[0]
    error = (trace.q[-1].reshape(2, 6).T - truth.marginals).abs().max()
    assert error < 0.05, "weak pairs: mean field is close to the exact marginals"


def test_with_self_messages_the_parallel_update_descends():
    for seed in range(5):
        logits, image = problem(12, 12, seed=seed)
        free = (
            make(w_bilateral=20.0, w_spatial=10.0)
            .double()
            .trace(logits.double(), image.double(), iterations=15)
            .free_energy
        )
        assert (free.diff() < 1e-9).all()


# --- gradients: finite differences -----------------------------------------------------------------------------------


def loss_of(crf, iterations=3):
    logits, image = (t.double() for t in problem(batch=2))
    label = torch.arange(2 * HEIGHT * WIDTH).reshape(2, HEIGHT, WIDTH) % LABELS
    return nn.functional.nll_loss(crf(logits, image, iterations=iterations), label)


def assert_learnable(crf):
    loss = loss_of(crf)
    gradients = torch.autograd.grad(loss, list(crf.parameters()), allow_unused=True)
    for (name, parameter), gradient in zip(crf.named_parameters(), gradients, strict=True):
        assert gradient is not None, f"{name} has no gradient"
        flat = parameter.data.view(-1)
        for index in range(flat.numel()):
            kept, step, sides = flat[index].item(), 1e-5, []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                sides.append(loss_of(crf).item())
            flat[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert gradient.reshape(-1)[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name
            assert slope != 0, f"{name} does nothing"


@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
def test_every_learnable_parameter_has_the_gradient_finite_differences_find(normalization):
    weight = 0.02 if normalization == "none" else 1.0
    crf = make(normalization=normalization, compatibility=asymmetric(), w_bilateral=2 * weight, w_spatial=weight)
    assert_learnable(crf.double())


class FrozenBandwidth(DenseCRF):
    """A common mistake: a "learnable" bandwidth that passes through .item()."""

    def features(self, image):
        kept = self.log_theta_beta
        del self.log_theta_beta
        self.log_theta_beta = torch.tensor(kept.item(), dtype=kept.dtype)
        try:
            return super().features(image)
        finally:
            del self.log_theta_beta
            self.log_theta_beta = kept


def test_a_frozen_bandwidth_is_caught():
    with pytest.raises(AssertionError, match="log_theta_beta"):
        assert_learnable(make(kind=FrozenBandwidth, compatibility=asymmetric()).double())


def test_gradients_reach_the_unary_through_mean_field():
    logits, image = (t.double() for t in problem(4, 4))
    logits.requires_grad_()
    crf = make().double()
    assert torch.autograd.gradcheck(lambda z: crf(z, image, iterations=3), logits, atol=1e-6)


# --- properties ------------------------------------------------------------------------------------------------------


def test_a_pixel_receives_messages_from_all_others():
    logits, image = (t.double() for t in problem(8, 9))
    crf = make(theta_alpha=6.0, theta_beta=200.0).double()
    q = torch.softmax(logits, 1).flatten(2).transpose(1, 2).requires_grad_()
    energies = crf.filters(image)(q, crf.log_w, crf.penalties())  # [1, N, K]
    for pixel in (0, 40, 71):
        received = torch.autograd.grad(energies[0, pixel, 0], q, retain_graph=True)[0][0, :, 1]
        assert (received != 0).all()


def test_trace_agrees_with_forward():
    logits, image = problem(labels=4)
    crf = make(4, compatibility=asymmetric(4))
    trace = crf.trace(logits, image, iterations=6)
    assert trace.iterations == 6 and trace.messages.shape == (6, 2, 4, HEIGHT, WIDTH)
    for step in range(7):
        got = crf(logits, image, iterations=step).exp()[0].detach()
        torch.testing.assert_close(trace.q[step], got, atol=1e-6, rtol=1e-5)
    weighted = torch.einsum("m,tmkhw->tkhw", trace.weights, trace.messages)
    torch.testing.assert_close(trace.pairwise, torch.einsum("kl,tlhw->tkhw", trace.compatibility, weighted))
    torch.testing.assert_close(trace.q[1:], torch.softmax(-trace.unary - trace.pairwise, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trace.entropy, -(trace.q * trace.q.log()).sum(1), atol=1e-5, rtol=1e-5)
    none = crf.trace(logits[0], image[0], iterations=0)
    assert none.messages.shape == (0, 2, 4, HEIGHT, WIDTH) and len(none.q) == 1


@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
def test_pair_energy_is_the_energy_of_the_given_pairs(normalization):
    crf = make(normalization=normalization, compatibility=asymmetric()).double()
    _, image = problem(batch=2)
    image = image.double()
    first, second = torch.tensor([[0, 5, 41], [7, 8, 9]]), torch.tensor([[3, 6, 0], [11, 30, 2]])
    got = crf.pair_energy(image, first, second)
    for b in range(2):
        weights = pair_weights(crf, image[b])
        for p in range(3):
            want = weights[first[b, p], second[b, p]] * crf.compatibility.detach().numpy()
            np.testing.assert_allclose(got[b, p].detach().numpy(), want, atol=1e-10)
    assert all(g is not None for g in torch.autograd.grad(got.sum(), list(crf.parameters())))


def test_an_extra_kernel_is_used_and_learns():
    def brightness(image):
        return 255 * image.mean(1).flatten(1)[..., None]

    crf = make(extra_kernels=[Kernel("brightness", brightness, theta=20.0, weight=1.5)])
    logits, image = problem()
    assert crf.trace(logits, image).kernels == ("spatial", "bilateral", "brightness")
    with_it, without = crf(logits, image), make()(logits, image)
    assert (with_it - without).abs().max() > 1e-3
    with_it.square().sum().backward()
    assert crf.extra_kernels[0].log_theta.grad.abs() > 0 and crf.log_w.grad[2].abs() > 0


def test_half_precision_logits_are_computed_in_float32():
    logits, image = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_q = make()(logits.bfloat16(), image)
    assert log_q.dtype == torch.float32
    torch.testing.assert_close(log_q, make()(logits.bfloat16().float(), image))


def test_backward_of_nll_loss_works_for_one_image_of_two_labels():
    logits, image = problem(labels=2)
    nn.functional.nll_loss(make(2)(logits, image), torch.zeros(1, HEIGHT, WIDTH, dtype=torch.int64)).backward()


def test_an_image_of_one_pixel():
    logits, image = problem(1, 1)
    assert torch.isfinite(make()(logits, image)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseCRF(1), "num_classes is 1; expected at least 2"),
        (lambda: DenseCRF(3, theta_beta=0.0), "theta_beta is 0.0; expected positive"),
        (lambda: DenseCRF(3, w_spatial=-1.0), "expected positive numbers"),
        (lambda: DenseCRF(3, iterations=-1), "iterations is -1"),
        (lambda: DenseCRF(3, compatibility=torch.zeros(2, 2)), r"expected \[3, 3\]"),
        (lambda: DenseCRF(3, compatibility="pots"), "'pots'; expected 'potts'"),
        (lambda: DenseCRF(3, filtering="fast"), "'fast'; expected one of auto, exact, lattice"),
        (lambda: make()(torch.zeros(1, 4, 6, 7), torch.zeros(1, 3, 6, 7)), r"expected \[B, 3, H, W\]"),
        (lambda: make()(torch.zeros(1, 3, 6, 7), torch.zeros(1, 3, 7, 7)), "the size of the logits"),
        (lambda: make()(torch.full((1, 3, 6, 7), math.nan), torch.zeros(1, 3, 6, 7)), "logits contain NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("filtering", ["exact", "lattice"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.index_fill(3, torch.tensor([2]), math.nan), "image contains NaN or infinity"),
        (lambda image: image / 0, "image contains NaN or infinity"),
        (lambda image: 255 * image, r"expected RGB in \[0, 1\] \(divide 0..255 by 255\)"),
        (lambda image: image - 1, "image has values -"),
        (
            lambda image: (255 * image).to(torch.uint8),
            r"torch.uint8; expected float RGB in \[0, 1\] \(divide uint8 by 255\)",
        ),
    ],
)
def test_images_that_are_not_rgb_in_0_to_1_are_refused(filtering, change, message):
    crf, (logits, image) = make(filtering=filtering), problem()
    pairs = torch.zeros(2, 1, 4, dtype=torch.int64)
    for call in (
        lambda bad: crf(logits, bad),
        lambda bad: crf.marginals(logits, bad),
        lambda bad: crf.trace(logits, bad),
        lambda bad: crf.filters(bad),
        lambda bad: crf.pair_energy(bad, *pairs),
    ):
        with pytest.raises(ValueError, match=message):
            call(change(image))


def test_images_may_leave_0_to_1_by_rounding():
    logits, image = problem()
    image[0, :, 0, 0] = torch.tensor([-1e-4, 1 + 1e-4, 1.0])
    assert torch.isfinite(make()(logits, image)).all()


# --- labels of another method -----------------------------------------------------------------------------------------


def test_probabilities_from_labels_leaves_room_for_doubt():
    labels = np.array([[0, 2], [255, 1]])
    p = probabilities_from_labels(labels, 3, confidence=0.8)
    assert p.shape == (3, 2, 2) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(p[:, 0, 0], [0.8, 0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(p[:, 1, 0], [1 / 3] * 3, atol=1e-6)
    assert torch.is_tensor(probabilities_from_labels(torch.tensor(labels), 3))
    with pytest.raises(ValueError, match=r"label map \(void: 255\) holds 7; expected 0\.\.2"):
        probabilities_from_labels(np.array([[7]]), 3)
    with pytest.raises(ValueError, match="more than chance"):
        probabilities_from_labels(labels, 3, confidence=0.2)
    for soft in (np.array([[0.2, 0.9, 0.99]]), torch.tensor([[0.2, 0.9, 0.99]])):  # would all become class 0
        with pytest.raises(ValueError, match=r"label map has dtype torch.float\d\d; expected class indices"):
            probabilities_from_labels(soft, 2)


def test_pair_energies_follow_a_subclass_s_penalties():
    class Doubled(DenseCRF):
        def penalties(self):
            return 2 * super().penalties()

    image, first, second = torch.rand(1, 3, 3, 4), torch.tensor([[0, 5]]), torch.tensor([[3, 11]])
    plain, doubled = (crf(3).pair_energy(image, first, second) for crf in (DenseCRF, Doubled))
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.parametrize("filtering", ["exact", "lattice"])
def test_a_second_backward_pass_gives_the_same_gradients(filtering):
    generator = torch.Generator().manual_seed(0)
    crf = DenseCRF(3, filtering=filtering, iterations=3)
    logits, image = (torch.rand(1, 3, 12, 16, generator=generator) for _ in range(2))
    score = crf(logits, image)[0, 0].sum()
    parameters = [p for p in crf.parameters() if p.requires_grad]
    first = torch.autograd.grad(score, parameters, retain_graph=True)
    for once, twice in zip(first, torch.autograd.grad(score, parameters), strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-6)
