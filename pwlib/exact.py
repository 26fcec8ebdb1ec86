"""The truth, by enumeration, for graphs small enough to enumerate.

    E(x) = sum_i unary[i, x_i] + sum_e pair[e, x_i(e), x_j(e)],        P(x) = exp(-E(x)) / Z

Every labelling is visited, so log Z, marginals and the minimum are what they are by definition. It is the oracle the
approximations are compared with, in the tests and in the notebooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 2**22  # labellings; some seconds and a few hundred megabytes


@dataclass(frozen=True)
class Exact:
    """Exact inference's answers: `log_z` and `map_energy` scalars, `marginals` [N, K], `pair_marginals` [E, K, K],
    `map_labels` [N] (the first of equals)."""

    log_z: Tensor
    marginals: Tensor
    pair_marginals: Tensor
    map_labels: Tensor
    map_energy: Tensor


def labellings(nodes: int, labels: int) -> Tensor:
    """Every labelling of `nodes` with `labels`: int64 [K^N, N], the last node varying fastest."""
    count = labels**nodes
    if count > LARGEST:
        raise ValueError(
            f"{labels} labels on {nodes} nodes make {count:.1e} labellings; at most {LARGEST} are enumerated"
        )
    digits = labels ** torch.arange(nodes - 1, -1, -1)
    return torch.arange(count)[:, None] // digits % labels


def energies(x: Tensor, unary: Tensor, edges: Tensor, pair: Tensor) -> Tensor:
    """Energies [S] of the labellings x [S, N]; unary [N, K], edges int64 [E, 2], pair [E, K, K]. Differentiable."""
    nodes = torch.arange(unary.shape[0])
    total = unary[nodes, x].sum(1)
    if len(edges):
        total = total + pair[torch.arange(len(edges)), x[:, edges[:, 0]], x[:, edges[:, 1]]].sum(1)
    return total


def infer(unary: Tensor, edges: Tensor, pair: Tensor) -> Exact:
    """Enumerate: unary energies [N, K], edges int64 [E, 2], pair energies [E, K, K] -> `Exact`.

    log Z is differentiable in the energies, and its gradient is minus the marginals (a fact worth testing).
    Raises ValueError where shapes do not fit or there are more than `LARGEST` labellings.
    """
    nodes, labels = unary.shape
    edges = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2)
    if pair.shape != (len(edges), labels, labels):
        raise ValueError(f"pair has shape {tuple(pair.shape)}; expected [{len(edges)}, {labels}, {labels}]")
    if len(edges) and not (0 <= int(edges.min()) and int(edges.max()) < nodes):
        raise ValueError(f"edges name node {int(edges.max())}; expected nodes 0 to {nodes - 1}")
    x = labellings(nodes, labels)
    energy = energies(x, unary, edges, pair)
    log_z = torch.logsumexp(-energy, 0)
    probability = torch.exp(-energy - log_z)
    marginals = torch.stack([torch.zeros(labels).to(unary).index_add(0, x[:, i], probability) for i in range(nodes)])
    tables = [
        torch.zeros(labels * labels)
        .to(unary)
        .index_add(0, x[:, i] * labels + x[:, j], probability)
        .reshape(labels, labels)
        for i, j in edges.tolist()
    ]
    best = torch.argmin(energy)
    return Exact(log_z, marginals, torch.stack(tables) if tables else pair.clone(), x[best], energy[best])


def grid_edges(height: int, width: int) -> Tensor:
    """The 4-neighbour edges of a grid, row-major nodes: int64 [E, 2]."""
    node = torch.arange(height * width).reshape(height, width)
    across = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()], 1)
    down = torch.stack([node[:-1].flatten(), node[1:].flatten()], 1)
    return torch.cat([across, down])


def all_pairs(nodes: int) -> Tensor:
    """Every pair i < j: int64 [N(N-1)/2, 2], the graph of a dense CRF."""
    return torch.combinations(torch.arange(nodes))
