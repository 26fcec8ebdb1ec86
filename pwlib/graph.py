"""CRFs on arbitrary graphs: exact inference by enumeration, mean field, and four likelihoods to learn from.

    P(x) = exp(-E(x)) / Z,    E(x) = sum_i psi_i(x_i) + sum_{e=(i,j)} psi_e(x_i, x_j)

The potentials are energies (penalties): unary [B, N, K]; edges int64 [E, 2], common to the batch; pair [B, E, K, K],
the label of the edge's first node first. Enumeration visits all K^N labellings and is exact by definition. Learning
maximises P(y) of the true labels y; four losses, in nats per node, differ in how they treat Z:

    exact_nll        -log P(y) / N                                     log Z by enumeration; a dozen nodes
    pseudo_nll       -mean_i log P(y_i | true labels of neighbours)    sums over K labels only (Besag 1975)
    mean_field_nll   -mean_i log q_i(y_i)                              q after T differentiated updates (Domke 2013)
    piecewise_nll    -mean_i log P_U(y_i) - mean_e log P_V(y_i, y_j)   no inference (Sutton & McCallum 2005)
                     P_U = softmax over K of -psi_i, P_V = softmax over K*K of -psi_e

All share one call: loss(unary, edges, pair, label) with label int64 [B, N], 255 = void.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.data import VOID
from pwlib.inputs import check_label
from pwlib.losses import cross_entropy, pairwise_nll
from pwlib.mean_field import mean_field as run_mean_field

LARGEST = 2**22  # labellings; enumerating them takes some seconds and a few hundred megabytes


def grid_edges(height: int, width: int) -> Tensor:
    """The 4-neighbour edges of a grid with row-major nodes: int64 [E, 2]."""
    node = torch.arange(height * width).reshape(height, width)
    across = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()], 1)
    down = torch.stack([node[:-1].flatten(), node[1:].flatten()], 1)
    return torch.cat([across, down])


def all_pairs(nodes: int) -> Tensor:
    """All pairs i < j, the graph of a dense CRF: int64 [N(N-1)/2, 2]."""
    return torch.combinations(torch.arange(nodes))


def check_graph(unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor | None = None) -> None:
    """Raise ValueError unless unary [..., N, K], edges [E, 2], pair [..., E, K, K] and label [B, N] fit together."""
    *batch, nodes, labels = unary.shape if unary.ndim > 1 else (0, 0)
    fits = edges.ndim == 2 and edges.shape[1] == 2 and pair.shape[-3:] == (len(edges), labels, labels)
    fits = fits and list(pair.shape[:-3]) in (batch, [1] * len(batch))
    if label is not None:
        fits = fits and len(batch) == 1 and label.shape == (*batch, nodes)
    if not fits:
        shapes = f"unary {tuple(unary.shape)}, edges {tuple(edges.shape)}, pair {tuple(pair.shape)}"
        shapes += "" if label is None else f", label {tuple(label.shape)}"
        expected = "[B, N, K], [E, 2], [B, E, K, K]" + ("" if label is None else " and [B, N]")
        raise ValueError(f"{shapes} are not the shapes of one graph; expected {expected}")
    check_label(edges, nodes, name="edges", void=False)
    if label is not None:
        check_label(label, labels)


@dataclass(frozen=True)
class Exact:
    """Results of exact inference."""

    log_z: Tensor  # [...]
    marginals: Tensor  # [..., N, K]
    pair_marginals: Tensor  # [..., E, K, K]
    map_labels: Tensor  # int64 [..., N], the first of equally good labellings
    map_energy: Tensor  # [...]


def labellings(nodes: int, labels: int) -> Tensor:
    """All labellings of `nodes` nodes: int64 [K^N, N], the last node varying fastest; at most `LARGEST`."""
    count = labels**nodes
    if count > LARGEST:
        raise ValueError(f"{labels} labels on {nodes} nodes have {count:.1e} labellings; expected at most {LARGEST}")
    digits = labels ** torch.arange(nodes - 1, -1, -1)
    return torch.arange(count)[:, None] // digits % labels


def energies(x: Tensor, unary: Tensor, edges: Tensor, pair: Tensor) -> Tensor:
    """E(x) [..., S] of the labellings x int64 [S, N], of unary [..., N, K], edges [E, 2] and pair [..., E, K, K]."""
    nodes = torch.arange(unary.shape[-2])
    total = unary[..., nodes, x].sum(-1)  # [..., S]
    first, second = edges.unbind(1)
    return total + pair[..., torch.arange(len(edges)), x[:, first], x[:, second]].sum(-1)


def infer(unary: Tensor, edges: Tensor, pair: Tensor) -> Exact:
    """Exact inference by enumeration; ValueError for more than `LARGEST` labellings.

    unary [N, K] or [B, N, K] and pair [E, K, K] or [B, E, K, K] are energies. log Z is differentiable, and its gradient
    is minus the marginals.
    """
    edges = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2)
    check_graph(unary, edges, pair)
    *batch, nodes, labels = unary.shape
    x = labellings(nodes, labels)  # [S, N]
    energy = energies(x, unary, edges, pair)  # [..., S]
    log_z = torch.logsumexp(-energy, -1)
    probability = torch.exp(-energy - log_z[..., None])  # [..., S]

    def table(index: Tensor, size: int) -> Tensor:
        return probability.new_zeros(*batch, size).index_add(-1, index, probability)

    singles = [table(x[:, i], labels) for i in range(nodes)]
    pairs = [table(x[:, i] * labels + x[:, j], labels**2) for i, j in edges.tolist()]
    pair_marginals = torch.stack(pairs, -2) if pairs else unary.new_zeros(*batch, 0, labels**2)
    best = torch.argmin(energy, -1)
    return Exact(
        log_z, torch.stack(singles, -2), pair_marginals.unflatten(-1, (labels, labels)), x[best], energy.amin(-1)
    )


def expected_energies(edges: Tensor, pair: Tensor, q: Tensor) -> Tensor:
    """Expected pairwise energies [B, N, K] that each node receives along its edges, given the marginals q [B, N, K].

    The first node i of an edge receives sum_b pair[a, b] q_j(b), the second node j receives sum_a pair[a, b] q_i(a).
    """
    first, second = edges.unbind(1)
    # einsum takes twice as long on a CPU for batches of such small matrices, above all in the backward pass.
    to_first = (pair * q[:, second, None, :]).sum(-1)  # [B, E, K]
    to_second = (pair * q[:, first, :, None]).sum(-2)
    return torch.zeros_like(q).index_add(1, torch.cat([first, second]), torch.cat([to_first, to_second], dim=1))


def mean_field(
    unary: Tensor, edges: Tensor, pair: Tensor, *, iterations: int = 3, initial: Tensor | None = None
) -> Tensor:
    """Log-marginals [B, N, K] after parallel mean-field updates, see `pwlib.mean_field`.

    initial: energies [B, N, K] of the first marginals; None: the unary energies. With strong pair energies the parallel
    updates need not converge.
    """
    check_graph(unary, edges, pair)
    return run_mean_field(unary, lambda q: expected_energies(edges, pair, q), iterations, initial=initial)


def exact_nll(unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor) -> Tensor:
    """-log P(labels of the labelled nodes) per node, summed over the labels of void nodes; computed on the CPU."""
    check_graph(unary, edges, pair, label)
    x, device, label = labellings(*unary.shape[1:]), unary.device, label.cpu()  # x [S, N]
    score = -energies(x, unary.cpu(), edges.cpu(), pair.cpu())  # [B, S]
    known = label != VOID
    agrees = ((x == label[:, None]) | ~known[:, None]).all(2)  # [B, S]
    log_p = score.masked_fill(~agrees, -torch.inf).logsumexp(1) - score.logsumexp(1)  # [B]
    return (-log_p.sum() / known.sum().clamp(min=1)).to(device)


def pseudo_nll(
    unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor, *, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over labelled nodes of -log P(y_i | true labels of its neighbours); void neighbours are left out."""
    check_graph(unary, edges, pair, label)
    known = label != VOID
    truth = F.one_hot(label.where(known, 0), unary.shape[-1]).to(unary) * known[..., None]  # [B, N, K]
    return _node_nll(unary + expected_energies(edges, pair, truth), label, class_weights)


def mean_field_nll(
    unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor, *, class_weights: Tensor | None = None, **options
) -> Tensor:
    """Mean over labelled nodes of -log q_i(y_i), with the gradient through all updates; `options`: of `mean_field`."""
    check_graph(unary, edges, pair, label)
    return _node_nll(-mean_field(unary, edges, pair, **options), label, class_weights)


def piecewise_nll(
    unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor, *, class_weights: Tensor | None = None
) -> Tensor:
    """-mean_i log P_U(y_i) - mean_e log P_V(y_i, y_j); edges with a void node are left out.

    Lin et al. (CVPR 2016) sum over nodes and edges, so that the second mean is multiplied by the edges per node.
    class_weights: see `pwlib.losses.pairwise_nll`.
    """
    check_graph(unary, edges, pair, label)
    ends = (label[:, index] for index in edges.unbind(1))
    pairwise = pairwise_nll(pair.expand(len(unary), -1, -1, -1), *ends, class_weights=class_weights)
    return _node_nll(unary, label, class_weights) + pairwise


LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "exact": exact_nll,
    "pseudo": pseudo_nll,
    "mean_field": mean_field_nll,
    "piecewise": piecewise_nll,
}


def _node_nll(energy: Tensor, label: Tensor, class_weights: Tensor | None) -> Tensor:
    """Mean over labelled nodes of -log softmax(-energy)[label], from energies [B, N, K] and label [B, N]."""
    return cross_entropy(-energy.mT[..., None], label[..., None], class_weights=class_weights)
