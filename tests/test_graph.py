"""`pwlib.graph` against loops over itertools.product, which share no code with it, and finite differences."""

import itertools
import math

import pytest
import torch

from pwlib import graph
from pwlib.graph import LIKELIHOODS, exact_nll, expected_energies, mean_field, mean_field_nll, piecewise_nll, pseudo_nll


def problem(nodes=5, labels=3, edges=((0, 1), (1, 2), (3, 1), (4, 0)), batch=2, strength=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    edges = torch.tensor(edges).reshape(-1, 2)
    unary = torch.randn(batch, nodes, labels, generator=g, dtype=torch.float64)
    pair = strength * torch.randn(batch, len(edges), labels, labels, generator=g, dtype=torch.float64)
    return unary, edges, pair, torch.randint(0, labels, (batch, nodes), generator=g)


def energy_of(unary, edges, pair, x):
    """E(x) of one labelling, from the definition, on nested lists."""
    total = sum(unary[i][x[i]] for i in range(len(unary)))
    return total + sum(pair[e][x[i]][x[j]] for e, (i, j) in enumerate(edges))


# ------------------------------------------------------------------------------------------------------- enumeration


@pytest.mark.parametrize(
    ("nodes", "labels", "edges"),
    [(1, 3, []), (4, 2, [(0, 1), (1, 2), (2, 3), (3, 0)]), (5, 3, [(4, 0), (1, 3), (0, 2)]), (3, 4, [(0, 1), (0, 1)])],
)
def test_enumeration_is_a_loop_over_all_labellings(nodes, labels, edges):
    unary, edges, pair, _ = problem(nodes, labels, edges)
    both = graph.infer(unary, edges, pair)
    for b in range(2):
        lists = unary[b].tolist(), edges.tolist(), pair[b].tolist()
        energy = {x: energy_of(*lists, x) for x in itertools.product(range(labels), repeat=nodes)}
        log_z = math.log(sum(math.exp(-e) for e in energy.values()))
        marginals, pairs = torch.zeros_like(unary[b]), torch.zeros_like(pair[b])
        for x, e in energy.items():
            for i in range(nodes):
                marginals[i, x[i]] += math.exp(-e - log_z)
            for n, (i, j) in enumerate(lists[1]):
                pairs[n, x[i], x[j]] += math.exp(-e - log_z)
        best = min(energy, key=energy.get)
        found = graph.infer(unary[b], edges, pair[b])
        assert found.log_z.item() == pytest.approx(log_z, abs=1e-10)
        torch.testing.assert_close(found.marginals, marginals)
        torch.testing.assert_close(found.pair_marginals, pairs)
        assert tuple(found.map_labels.tolist()) == best
        assert found.map_energy.item() == pytest.approx(energy[best])
        for name, value in vars(found).items():
            torch.testing.assert_close(getattr(both, name)[b], value)


def test_gradient_of_log_z_is_minus_the_marginals():
    unary, edges, pair, _ = problem(6, 2, graph.grid_edges(2, 3).tolist())
    unary.requires_grad_(), pair.requires_grad_()
    found = graph.infer(unary, edges, pair)
    found.log_z.sum().backward()
    torch.testing.assert_close(unary.grad, -found.marginals.detach())
    torch.testing.assert_close(pair.grad, -found.pair_marginals.detach())


def test_grid_edges_and_all_pairs():
    assert len(graph.grid_edges(3, 4)) == 3 * 3 + 2 * 4
    assert set(map(tuple, graph.grid_edges(2, 2).tolist())) == {(0, 1), (2, 3), (0, 2), (1, 3)}
    assert graph.all_pairs(9).tolist() == [list(pair) for pair in itertools.combinations(range(9), 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graph.labellings(40, 2), "at most"),
        (lambda: graph.infer(torch.zeros(2, 2), torch.tensor([[0, 1]]), torch.zeros(2, 2, 2)), r"pair \(2, 2, 2\)"),
        (
            lambda: graph.infer(torch.zeros(2, 2), torch.tensor([[0, 5]]), torch.zeros(1, 2, 2)),
            "edges holds 5; expected 0..1",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------------------- mean field


def naive_mean_field(unary, edges, pair, iterations, initial=None):
    """One image, one node, one label at a time, on lists of floats."""
    nodes, labels = len(unary), len(unary[0])

    def softmax(energy):
        z = [math.exp(-e) for e in energy]
        return [x / sum(z) for x in z]

    q = [softmax(row) for row in initial or unary]
    for _ in range(iterations):
        new = []
        for p in range(nodes):
            energy = list(unary[p])
            for e, (i, j) in enumerate(edges):
                for a, b in itertools.product(range(labels), repeat=2):
                    if i == p:
                        energy[a] += pair[e][a][b] * q[j][b]
                    if j == p:
                        energy[b] += pair[e][a][b] * q[i][a]
            new.append(softmax(energy))
        q = new
    return torch.tensor(q, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_mean_field_is_the_loop(iterations):
    """On a graph with cycles, parallel and opposed edges, from the unary energies or from others."""
    initial = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    unary, edges, pair, _ = problem(edges=((0, 1), (1, 0), (1, 2), (1, 2), (3, 1), (4, 0), (2, 4)))
    for start in (None, initial):
        found = mean_field(unary, edges, pair, iterations=iterations, initial=start).exp()
        for b in range(2):
            lists = unary[b].tolist(), edges.tolist(), pair[b].tolist()
            expected = naive_mean_field(*lists, iterations, None if start is None else start[b].tolist())
            torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)


def test_mean_field_approaches_enumeration_as_couplings_weaken():
    """On a tree the error falls with the square of the pair energies, from 2e-2 at 0.3 to 2e-4 at 0.03. If the nodes of
    an edge are mistaken for each other, it is as large as the energies themselves."""

    def error(strength, transposed=False):
        unary, edges, pair, _ = problem(strength=strength, batch=1)
        used = pair.transpose(2, 3) if transposed else pair
        q = mean_field(unary, edges, used, iterations=30).exp()[0]
        return (q - graph.infer(unary[0], edges, pair[0]).marginals).abs().max().item()

    assert error(0.3) < 2.5e-2 and error(0.03) < 2.5e-4
    assert error(0.3, transposed=True) > 3 * error(0.3) and error(0.03, transposed=True) > 20 * error(0.03)


def test_both_nodes_of_an_edge_receive_its_expected_energy():
    pair = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # node 0 has label 0, node 1 has label 1
    received = expected_energies(torch.tensor([[0, 1]]), pair, q)
    assert received.tolist() == [[[2.0, 4.0], [1.0, 2.0]]]  # column 1 for node 0, row 0 for node 1


# ------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("void", [(), (1,), (0, 4)])
def test_exact_likelihood_is_a_sum_over_all_labellings(void):
    unary, edges, pair, label = problem()
    label[:, list(void)] = 255
    total = 0.0
    for b in range(2):
        lists = unary[b].tolist(), edges.tolist(), pair[b].tolist()
        weights = {y: math.exp(-energy_of(*lists, y)) for y in itertools.product(range(3), repeat=5)}
        agree = sum(
            w for y, w in weights.items() if all(t in (255, a) for a, t in zip(y, label[b].tolist(), strict=True))
        )
        total -= math.log(agree / sum(weights.values()))
    assert exact_nll(unary, edges, pair, label).item() == pytest.approx(total / (2 * (5 - len(void))), rel=1e-10)


def test_gradient_of_the_exact_likelihood_is_one_hot_minus_marginals():
    unary, edges, pair, label = problem()
    unary.requires_grad_(), pair.requires_grad_()
    (10 * exact_nll(unary, edges, pair, label)).backward()  # 10 labelled nodes
    for b in range(2):
        truth = graph.infer(unary[b].detach(), edges, pair[b].detach())
        one_hot = torch.nn.functional.one_hot(label[b], 3)
        torch.testing.assert_close(unary.grad[b], one_hot - truth.marginals)
        pairs = one_hot[edges[:, 0], :, None] * one_hot[edges[:, 1], None, :]
        torch.testing.assert_close(pair.grad[b], pairs - truth.pair_marginals)


def test_pseudo_likelihood_is_the_conditional_of_the_joint():
    """P(y_p | all others), from the joint probabilities of the K labellings that differ in p only."""
    unary, edges, pair, label = problem(edges=((0, 1), (1, 0), (1, 2), (3, 1), (4, 0), (2, 4)))
    total = 0.0
    for b in range(2):
        lists = unary[b].tolist(), edges.tolist(), pair[b].tolist()
        for p in range(5):
            y = label[b].tolist()
            weights = [math.exp(-energy_of(*lists, [*y[:p], a, *y[p + 1 :]])) for a in range(3)]
            total -= math.log(weights[y[p]] / sum(weights))
    assert pseudo_nll(unary, edges, pair, label).item() == pytest.approx(total / 10, rel=1e-10)


def test_pseudo_likelihood_leaves_out_void_neighbours():
    unary, edges, pair, label = problem()
    label[:, 1] = 255
    touches = (edges == 1).any(1)
    kept = [0, 2, 3, 4]
    rest = pseudo_nll(unary, edges[~touches], pair[:, ~touches], label)
    torch.testing.assert_close(pseudo_nll(unary, edges, pair, label), rest)
    torch.testing.assert_close(rest, pseudo_nll(unary[:, kept], torch.tensor([[3, 0]]), pair[:, 3:], label[:, kept]))


def test_mean_field_likelihood_uses_the_marginals_of_the_loop():
    unary, edges, pair, label = problem()
    total = 0.0
    for b in range(2):
        q = naive_mean_field(unary[b].tolist(), edges.tolist(), pair[b].tolist(), 4)
        total -= sum(math.log(q[p, label[b, p]]) for p in range(5))
    assert mean_field_nll(unary, edges, pair, label, iterations=4).item() == pytest.approx(total / 10, rel=1e-10)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0]])
def test_piecewise_by_hand(weights):
    unary, edges, pair, label = problem()
    label[0, 1] = 255
    w = weights or [1.0] * 3
    nodes, pairs = [], []
    for b in range(2):
        y = label[b].tolist()
        for p in range(5):
            if y[p] != 255:
                z = sum(math.exp(-e) for e in unary[b, p].tolist())
                nodes.append((w[y[p]], math.log(z) + unary[b, p, y[p]].item()))
        for e, (i, j) in enumerate(edges.tolist()):
            if 255 not in (y[i], y[j]):
                z = sum(math.exp(-v) for v in pair[b, e].flatten().tolist())
                pairs.append((w[y[i]] * w[y[j]], math.log(z) + pair[b, e, y[i], y[j]].item()))
    assert len(nodes) == 9 and len(pairs) == 5
    mean = [sum(a * x for a, x in part) / sum(a for a, _ in part) for part in (nodes, pairs)]
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = piecewise_nll(unary, edges, pair, label, class_weights=given)
    assert found.item() == pytest.approx(mean[0] + mean[1], rel=1e-10)


def test_piecewise_gradients_are_one_hot_minus_softmax():
    unary, edges, pair, label = problem()
    unary.requires_grad_(), pair.requires_grad_()
    piecewise_nll(unary, edges, pair, label).backward()
    one_hot = torch.nn.functional.one_hot(label, 3).double()
    torch.testing.assert_close(unary.grad, (one_hot - (-unary.detach()).softmax(-1)) / 10)
    p = (-pair.detach()).flatten(2).softmax(-1).unflatten(-1, (3, 3))
    pairs = one_hot[:, edges[:, 0], :, None] * one_hot[:, edges[:, 1], None, :]
    torch.testing.assert_close(pair.grad, (pairs - p) / 8)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_by_finite_differences(name):
    unary, edges, pair, label = problem(nodes=4, labels=2, edges=((0, 1), (2, 1), (3, 2), (3, 0)))
    label[1, 2] = 255
    inputs = (unary.requires_grad_(), pair.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, v: LIKELIHOODS[name](u, edges, v, label), inputs)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_without_labelled_nodes_loss_and_gradient_are_zero(name):
    unary, edges, pair, label = problem()
    pair.requires_grad_()
    loss = LIKELIHOODS[name](unary, edges, pair, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0 and pair.grad.abs().max() == 0


@pytest.mark.parametrize("name", ["exact", "pseudo"])
def test_consistent_losses_have_their_minimum_at_the_truth_and_piecewise_has_not(name):
    """The expected loss over all labellings of one chain. Exact and pseudo-likelihood have their minimum at the true
    energies; the piecewise likelihood has it at the pair marginals, which also contain the neighbours' influence."""
    unary, edges, pair, _ = problem(nodes=3, labels=2, edges=((0, 1), (1, 2)), batch=1)
    x = graph.labellings(3, 2)
    energy = graph.energies(x, unary[0], edges, pair[0])
    p = torch.softmax(-energy, 0)
    gradients = {}
    for learner in (name, "piecewise"):
        v = pair.clone().requires_grad_()
        losses = torch.stack([LIKELIHOODS[learner](unary, edges, v, y[None]) for y in x])
        gradients[learner] = torch.autograd.grad((p * losses).sum(), v)[0].abs().max().item()
    assert gradients[name] < 1e-12 and gradients["piecewise"] > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, e, v, y: (u[0], e, v, y), r"unary \(5, 3\).*expected \[B, N, K\]"),
        (lambda u, e, v, y: (u, e, v[:, 1:], y), r"pair \(2, 3, 3, 3\)"),
        (lambda u, e, v, y: (u, e + 3, v, y), r"edges holds 5; expected 0\.\.4"),
        (lambda u, e, v, y: (u, e, v, y[:, 1:]), r"label \(2, 4\)"),
        (lambda u, e, v, y: (u, e, v, y + 3), r"label holds \d; expected 0..2 or 255"),
    ],
)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_graphs_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        LIKELIHOODS[name](*change(*problem()))


def test_the_node_that_is_outside_the_graph_is_named():
    with pytest.raises(ValueError, match="edges holds -1"):
        graph.infer(torch.zeros(4, 2), torch.tensor([[-1, 3]]), torch.zeros(1, 2, 2))
