"""The functions of notebook 06 against the library, enumeration and brute force, on other problems."""

import itertools

import pytest
import torch

from pwlib import context, graph
from pwlib.context import ContextualCRF, PairwiseNet

GRID = graph.grid_edges(2, 2)


def random_crf(seed, nodes=4, labels=3, edges=GRID):
    generator = torch.Generator().manual_seed(seed)
    unary = torch.randn(nodes, labels, generator=generator, dtype=torch.float64)
    return unary, torch.randn(len(edges), labels, labels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_energy_and_log_partition_equal_the_librarys(pull, seed):
    unary, pair = random_crf(seed)
    wanted = graph.infer(unary, GRID, pair)
    torch.testing.assert_close(pull("06", "log_partition")(unary, GRID.tolist(), pair), wanted.log_z)
    energy = pull("06", "energy")
    energies = torch.stack([energy(x, unary, GRID.tolist(), pair) for x in itertools.product(range(3), repeat=4)])
    torch.testing.assert_close(energies, graph.energies(graph.labellings(4, 3), unary, GRID, pair))
    label = torch.tensor([[2, 0, 1, 1]])
    of_label = energy(tuple(label[0].tolist()), unary, GRID.tolist(), pair)
    nll = graph.exact_nll(unary[None], GRID, pair[None], label)
    torch.testing.assert_close((wanted.log_z + of_label) / 4, nll)


@pytest.mark.parametrize("counting", context.COUNTING)
def test_combine_gives_the_distribution_of_the_library(pull, counting):
    """On a 3x4 map of two labels: the same scores for all 4096 labellings, up to a constant."""
    torch.manual_seed(0)
    crf = ContextualCRF(2, 3, hidden=4, counting=counting).double()
    for network in crf.networks.values():
        torch.nn.init.normal_(network.scores.weight)
    logits, features = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 3, 3, 4).double()
    with torch.no_grad():
        terms = crf.pairwise_terms(logits, features)
        edges = torch.cat(list(crf.edges(3, 4).values()))
        log_u = logits[0].flatten(1).T.log_softmax(1)
        ours = pull("06", "combine")(log_u, torch.cat([p[0] for p in terms.values()]), edges, counting)
        library, _, pair = crf.potentials(logits, terms)
        x = graph.labellings(12, 2)
        energy = graph.energies(x, ours[0], edges, ours[1])
        wanted = graph.energies(x, library[0], edges, pair[0])
    torch.testing.assert_close((-energy).log_softmax(0), (-wanted).log_softmax(0))


@pytest.mark.parametrize("relation", context.RELATIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (10, 13)])
@pytest.mark.parametrize("reach", [0.4, 0.7])
def test_edges_of_equals_box_edges(pull, relation, size, reach):
    wanted = context.box_edges(relation, *size, reach=reach).tolist()
    assert pull("06", "edges_of")(relation, *size, reach) == list(map(tuple, wanted))


def test_pair_scores_by_loop_and_by_node_equal_pairwise_net(pull):
    torch.manual_seed(1)
    network = PairwiseNet(5, 3, 7).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    features, edges = torch.randn(6, 5).double(), torch.randint(0, 6, (15, 2))
    joint = torch.cat([network.of_first.weight, network.of_second.weight], 1)
    layers = joint, network.of_first.bias, network.scores.weight, network.scores.bias
    for name in ("pair_scores_by_loop", "pair_scores"):
        torch.testing.assert_close(pull("06", name)(features, edges, *layers), network(features[None], edges)[0])


@pytest.mark.parametrize("seed", range(2))
def test_messages_and_mean_field_equal_the_library(pull, seed):
    edges = torch.tensor([[0, 1], [1, 0], [1, 2], [3, 0], [3, 2], [0, 2]])
    unary, pair = random_crf(seed, edges=edges)
    q = torch.softmax(torch.randn(4, 3).double(), 1)
    wanted = graph.expected_energies(edges, pair[None], q[None])[0]
    torch.testing.assert_close(pull("06", "messages_of")(edges, pair, q), wanted)
    by_hand = torch.zeros(4, 3).double()
    for (first, second), table in zip(edges.tolist(), pair, strict=True):
        by_hand[first] += table @ q[second]
        by_hand[second] += table.T @ q[first]
    torch.testing.assert_close(wanted, by_hand)
    start = torch.randn(4, 3).double().log_softmax(1)
    ours = pull("06", "coarse_mean_field")(unary, edges, pair, start.exp(), 4)
    library = graph.mean_field(unary[None], edges, pair[None], iterations=4, initial=-start[None])
    torch.testing.assert_close(ours, library[0].exp())
