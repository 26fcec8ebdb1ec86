"""`pwlib.exact` against a loop over itertools.product, which shares no code with it."""

import itertools
import math

import pytest
import torch

from pwlib import exact


def random_graph(nodes, labels, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unary = torch.randn(nodes, labels, generator=generator, dtype=torch.float64)
    pair = torch.randn(len(edges), labels, labels, generator=generator, dtype=torch.float64)
    return unary, torch.as_tensor(edges).reshape(-1, 2), pair


def loop(unary, edges, pair):
    nodes, labels = unary.shape
    energy = {}
    for x in itertools.product(range(labels), repeat=nodes):
        e = sum(unary[i, x[i]].item() for i in range(nodes))
        e += sum(pair[n, x[i], x[j]].item() for n, (i, j) in enumerate(edges.tolist()))
        energy[x] = e
    log_z = math.log(sum(math.exp(-e) for e in energy.values()))
    marginals = torch.zeros(nodes, labels, dtype=torch.float64)
    pairs = torch.zeros(len(edges), labels, labels, dtype=torch.float64)
    for x, e in energy.items():
        for i in range(nodes):
            marginals[i, x[i]] += math.exp(-e - log_z)
        for n, (i, j) in enumerate(edges.tolist()):
            pairs[n, x[i], x[j]] += math.exp(-e - log_z)
    best = min(energy, key=energy.get)
    return log_z, marginals, pairs, best, energy[best]


@pytest.mark.parametrize(
    ("nodes", "labels", "edges"),
    [(1, 3, []), (4, 2, [(0, 1), (1, 2), (2, 3), (3, 0)]), (5, 3, [(4, 0), (1, 3), (0, 2)]), (3, 4, [(0, 1), (0, 1)])],
)
def test_agrees_with_a_loop_over_every_labelling(nodes, labels, edges):
    unary, edges, pair = random_graph(nodes, labels, edges)
    log_z, marginals, pairs, best, energy = loop(unary, edges, pair)
    found = exact.infer(unary, edges, pair)
    assert found.log_z.item() == pytest.approx(log_z, abs=1e-10)
    torch.testing.assert_close(found.marginals, marginals)
    if len(edges):
        torch.testing.assert_close(found.pair_marginals, pairs)
    assert tuple(found.map_labels.tolist()) == best
    assert found.map_energy.item() == pytest.approx(energy)


def test_gradient_of_log_z_is_minus_the_marginals():
    unary, edges, pair = random_graph(6, 2, exact.grid_edges(2, 3).tolist())
    unary.requires_grad_(), pair.requires_grad_()
    found = exact.infer(unary, edges, pair)
    found.log_z.backward()
    torch.testing.assert_close(unary.grad, -found.marginals.detach())
    torch.testing.assert_close(pair.grad, -found.pair_marginals.detach())


def test_grid_edges_and_all_pairs_count():
    assert len(exact.grid_edges(3, 4)) == 3 * 3 + 2 * 4
    assert set(map(tuple, exact.grid_edges(2, 2).tolist())) == {(0, 1), (2, 3), (0, 2), (1, 3)}
    assert len(exact.all_pairs(9)) == 36


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: exact.labellings(40, 2), "at most"),
        (lambda: exact.infer(torch.zeros(2, 2), torch.tensor([[0, 1]]), torch.zeros(2, 2, 2)), r"expected \[1, 2, 2\]"),
        (lambda: exact.infer(torch.zeros(2, 2), torch.tensor([[0, 5]]), torch.zeros(1, 2, 2)), "node 5"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
