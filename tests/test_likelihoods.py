"""Mean field and the four likelihoods on a graph, against loops, enumeration and finite differences."""

import itertools
import math

import pytest
import torch

from pwlib import exact
from pwlib.likelihoods import LIKELIHOODS, exact_nll, mean_field, mean_field_nll, messages, piecewise_nll, pseudo_nll


def problem(nodes=5, labels=3, edges=((0, 1), (1, 2), (3, 1), (4, 0)), batch=2, strength=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    edges = torch.tensor(edges).reshape(-1, 2)
    unary = torch.randn(batch, nodes, labels, generator=g, dtype=torch.float64)
    pair = strength * torch.randn(batch, len(edges), labels, labels, generator=g, dtype=torch.float64)
    return unary, edges, pair, torch.randint(0, labels, (batch, nodes), generator=g)


def naive_mean_field(unary, edges, pair, iterations):
    """One image, one node, one label at a time, on lists of floats."""
    nodes, labels = len(unary), len(unary[0])

    def softmax(scores):
        z = [math.exp(s) for s in scores]
        return [x / sum(z) for x in z]

    q = [softmax(row) for row in unary]
    for _ in range(iterations):
        new = []
        for p in range(nodes):
            scores = list(unary[p])
            for e, (i, j) in enumerate(edges):
                for a, b in itertools.product(range(labels), repeat=2):
                    if i == p:
                        scores[a] += pair[e][a][b] * q[j][b]
                    if j == p:
                        scores[b] += pair[e][a][b] * q[i][a]
            new.append(softmax(scores))
        q = new
    return torch.tensor(q, dtype=torch.float64)


def score(unary, edges, pair, y):
    """score(y) of one labelling, by the definition."""
    total = sum(unary[p][y[p]] for p in range(len(unary)))
    return total + sum(pair[e][y[i]][y[j]] for e, (i, j) in enumerate(edges))


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_mean_field_is_the_loop(iterations):
    """Cycles, parallel and opposed edges included."""
    unary, edges, pair, _ = problem(edges=((0, 1), (1, 0), (1, 2), (1, 2), (3, 1), (4, 0), (2, 4)))
    found = mean_field(unary, edges, pair, iterations=iterations).exp()
    for b in range(2):
        expected = naive_mean_field(unary[b].tolist(), edges.tolist(), pair[b].tolist(), iterations)
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)


def test_mean_field_approaches_enumeration_as_couplings_weaken():
    """On a tree: its error falls with the square of the couplings, from 2e-2 at 0.3 to 2e-4 at 0.03. Messages that
    mistake an edge's ends are off by as much as the couplings themselves."""

    def error(strength, transposed=False):
        unary, edges, pair, _ = problem(strength=strength, batch=1)
        heard = pair.transpose(2, 3) if transposed else pair
        q = mean_field(unary, edges, heard, iterations=30).exp()[0]
        return (q - exact.infer(-unary[0], edges, -pair[0]).marginals).abs().max().item()

    assert error(0.3) < 2.5e-2 and error(0.03) < 2.5e-4
    assert error(0.3, transposed=True) > 3 * error(0.3) and error(0.03, transposed=True) > 20 * error(0.03)


def test_an_edge_speaks_both_ways():
    pair = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # node 0 is 0, node 1 is 1
    heard = messages(torch.tensor([[0, 1]]), pair, q)
    assert heard.tolist() == [[[2.0, 4.0], [1.0, 2.0]]]  # column 1 for node 0, row 0 for node 1


# ---------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("void", [(), (1,), (0, 4)])
def test_exact_is_the_sum_over_every_labelling(void):
    unary, edges, pair, label = problem()
    label[:, list(void)] = 255
    total = 0.0
    for b in range(2):
        graph = (unary[b].tolist(), edges.tolist(), pair[b].tolist())
        weights = {y: math.exp(score(*graph, y)) for y in itertools.product(range(3), repeat=5)}
        agree = sum(
            w for y, w in weights.items() if all(t in (255, a) for a, t in zip(y, label[b].tolist(), strict=True))
        )
        total -= math.log(agree / sum(weights.values()))
    assert exact_nll(unary, edges, pair, label).item() == pytest.approx(total / (2 * (5 - len(void))), rel=1e-10)


def test_gradient_of_the_exact_likelihood_is_marginals_minus_one_hot():
    unary, edges, pair, label = problem()
    unary.requires_grad_(), pair.requires_grad_()
    (10 * exact_nll(unary, edges, pair, label)).backward()  # 10 labelled nodes
    for b in range(2):
        truth = exact.infer(-unary[b].detach(), edges, -pair[b].detach())
        one_hot = torch.nn.functional.one_hot(label[b], 3)
        torch.testing.assert_close(unary.grad[b], truth.marginals - one_hot)
        pairs = one_hot[edges[:, 0], :, None] * one_hot[edges[:, 1], None, :]
        torch.testing.assert_close(pair.grad[b], truth.pair_marginals - pairs)


def test_pseudo_likelihood_is_the_conditional_of_the_joint():
    """P(y_p | all others), from the joint probabilities of the K labellings that differ in p only."""
    unary, edges, pair, label = problem(edges=((0, 1), (1, 0), (1, 2), (3, 1), (4, 0), (2, 4)))
    total = 0.0
    for b in range(2):
        graph = (unary[b].tolist(), edges.tolist(), pair[b].tolist())
        for p in range(5):
            y = label[b].tolist()
            weights = [math.exp(score(*graph, [*y[:p], a, *y[p + 1 :]])) for a in range(3)]
            total -= math.log(weights[y[p]] / sum(weights))
    assert pseudo_nll(unary, edges, pair, label).item() == pytest.approx(total / 10, rel=1e-10)


def test_for_pseudo_likelihood_a_void_neighbour_is_not_there():
    unary, edges, pair, label = problem()
    label[:, 1] = 255
    touches = (edges == 1).any(1)
    kept = [0, 2, 3, 4]
    rest = pseudo_nll(unary, edges[~touches], pair[:, ~touches], label)
    torch.testing.assert_close(pseudo_nll(unary, edges, pair, label), rest)
    torch.testing.assert_close(rest, pseudo_nll(unary[:, kept], torch.tensor([[3, 0]]), pair[:, 3:], label[:, kept]))


def test_mean_field_likelihood_is_that_of_the_loops_marginals():
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
    nodes, pieces = [], []
    for b in range(2):
        y = label[b].tolist()
        for p in range(5):
            if y[p] != 255:
                z = sum(math.exp(s) for s in unary[b, p].tolist())
                nodes.append((w[y[p]], math.log(z) - unary[b, p, y[p]].item()))
        for e, (i, j) in enumerate(edges.tolist()):
            if 255 not in (y[i], y[j]):
                z = sum(math.exp(s) for s in pair[b, e].flatten().tolist())
                pieces.append((w[y[i]] * w[y[j]], math.log(z) - pair[b, e, y[i], y[j]].item()))
    assert len(nodes) == 9 and len(pieces) == 5
    mean = [sum(a * x for a, x in part) / sum(a for a, _ in part) for part in (nodes, pieces)]
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    found = piecewise_nll(unary, edges, pair, label, pair_weight=0.7, class_weights=given)
    assert found.item() == pytest.approx(mean[0] + 0.7 * mean[1], rel=1e-10)


def test_each_pieces_gradient_is_softmax_minus_one_hot():
    unary, edges, pair, label = problem()
    unary.requires_grad_(), pair.requires_grad_()
    piecewise_nll(unary, edges, pair, label).backward()
    one_hot = torch.nn.functional.one_hot(label, 3).double()
    torch.testing.assert_close(unary.grad, (unary.detach().softmax(-1) - one_hot) / 10)
    p = pair.detach().flatten(2).softmax(-1).unflatten(-1, (3, 3))
    pairs = one_hot[:, edges[:, 0], :, None] * one_hot[:, edges[:, 1], None, :]
    torch.testing.assert_close(pair.grad, (p - pairs) / 8)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_by_finite_differences(name):
    unary, edges, pair, label = problem(nodes=4, labels=2, edges=((0, 1), (2, 1), (3, 2), (3, 0)))
    label[1, 2] = 255
    inputs = (unary.requires_grad_(), pair.requires_grad_())
    assert torch.autograd.gradcheck(lambda u, v: LIKELIHOODS[name](u, edges, v, label), inputs)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_with_nothing_labelled_the_loss_is_zero_and_so_is_its_gradient(name):
    unary, edges, pair, label = problem()
    pair.requires_grad_()
    loss = LIKELIHOODS[name](unary, edges, pair, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0 and pair.grad.abs().max() == 0


@pytest.mark.parametrize("name", ["exact", "pseudo"])
def test_consistent_learners_find_the_truth_and_pieces_do_not(name):
    """All labels of one chain, each as often as its probability says: exact and pseudo-likelihood have their minimum at
    the true scores. Pieces have theirs at the pair marginals, which hold the neighbours' influence as well."""
    unary, edges, pair, _ = problem(nodes=3, labels=2, edges=((0, 1), (1, 2)), batch=1)
    x = exact.labellings(3, 2)
    energy = exact.energies(x, -unary[0], edges, -pair[0])
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
        (lambda u, e, v, y: (u[0], e, v, y), r"expected \[B, N, K\]"),
        (lambda u, e, v, y: (u, e, v[:, 1:], y), r"pair scores have shape"),
        (lambda u, e, v, y: (u, e + 3, v, y), r"node 7; expected nodes 0 to 4"),
        (lambda u, e, v, y: (u, e, v, y[:, 1:]), r"label has shape \(2, 4\)"),
    ],
)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_graphs_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        LIKELIHOODS[name](*change(*problem()))
