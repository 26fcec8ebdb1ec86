"""A CRF on any graph: mean field, and four ways to tell it how well it explains a labelling.

    P(y) = exp(score(y)) / Z,    score(y) = sum_p unary[p, y_p] + sum_e pair[e, y_p(e), y_q(e)]

Scores, not energies: larger is likelier (the z of Lin et al., CVPR 2016; E = -score). The maximum of P(y) over the
parameters is wanted, and Z, a sum over all K^N labellings, is in the way. Four answers, each a loss in nats a node:

    exact         -log P(y) / N; log Z by enumeration                          the truth, where N is a dozen
    pseudo        -mean_p log P(y_p | the true labels of p's neighbours)        no Z but one of K terms (Besag 1975)
    mean_field    -mean_p log q_p(y_p); q after T updates, each differentiated  what one will use, trained as it is used
    piecewise     -mean_p log P_U(y_p) - mean_e log P_V(y_p, y_q)               no inference at all
                  P_U = softmax over K of unary[p], P_V = softmax over K*K of pair[e]

All share one call: loss(unary, edges, pair, label), with unary [B, N, K], edges int64 [E, 2] common to the batch, pair
[B, E, K, K] (the first end's label first) and label int64 [B, N], 255 = void.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pwlib import exact
from pwlib.data import VOID
from pwlib.losses import cross_entropy, pairwise_nll


def messages(edges: Tensor, pair: Tensor, q: Tensor) -> Tensor:
    """What each node's labels score with its neighbours' marginals q [B, N, K]: [B, N, K].

    An edge speaks both ways: its first end p hears sum_b pair[a, b] q_q(b), its second sum_a pair[a, b] q_p(a).
    """
    first, second = edges.unbind(1)
    # Products summed out, not einsum: batches of tiny matrices cost a CPU twice as much, backward above all.
    to_first = (pair * q[:, second, None, :]).sum(-1)
    to_second = (pair * q[:, first, :, None]).sum(-2)
    return torch.zeros_like(q).index_add(1, torch.cat([first, second]), torch.cat([to_first, to_second], dim=1))


def mean_field(
    unary: Tensor, edges: Tensor, pair: Tensor, *, iterations: int = 3, start: Tensor | None = None
) -> Tensor:
    """Log-marginals [B, N, K] after so many parallel updates q_p <- softmax(unary_p + messages(q)_p).

    start: scores [B, N, K] whose softmax is the first q; None: the unary's. If the updates settle, KL(q || P) is
    stationary there among products of marginals; with strong scores, all nodes updating at once, they need not settle.
    """
    check_graph(unary, edges, pair)
    log_q = torch.log_softmax(unary if start is None else start, dim=-1)
    for _ in range(iterations):
        log_q = torch.log_softmax(unary + messages(edges, pair, log_q.exp()), dim=-1)
    return log_q


# ---------------------------------------------------------------------------------------------------------- likelihoods


def exact_nll(unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor) -> Tensor:
    """-log P(the labelled nodes) per node, void ones summed out; on the CPU, up to `exact.LARGEST` labellings."""
    check_graph(unary, edges, pair, label)
    _, nodes, num_classes = unary.shape
    x, edges, label = exact.labellings(nodes, num_classes), edges.cpu(), label.cpu()
    energies = torch.vmap(lambda u, v: exact.energies(x, u, edges, v))
    score = -energies(-unary.cpu(), -pair.expand(len(unary), -1, -1, -1).cpu())
    known = label != VOID
    agrees = ((x == label[:, None]) | ~known[:, None]).all(2)
    log_p = score.masked_fill(~agrees, -torch.inf).logsumexp(1) - score.logsumexp(1)
    return (-log_p.sum() / known.sum().clamp(min=1)).to(unary.device)


def pseudo_nll(
    unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor, *, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over labelled nodes of -log P(y_p | its neighbours' labels): messages, once, from one-hot marginals.

    A void neighbour says nothing.
    """
    check_graph(unary, edges, pair, label)
    known = label != VOID
    truth = torch.nn.functional.one_hot(label.where(known, 0), unary.shape[-1]).to(unary) * known[..., None]
    return _nll(unary + messages(edges, pair, truth), label, class_weights)


def mean_field_nll(
    unary: Tensor,
    edges: Tensor,
    pair: Tensor,
    label: Tensor,
    *,
    iterations: int = 3,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over labelled nodes of -log q_p(y_p), the gradient taken through every update (Domke 2013)."""
    check_graph(unary, edges, pair, label)
    return _nll(mean_field(unary, edges, pair, iterations=iterations, start=start), label, class_weights)


def piecewise_nll(
    unary: Tensor,
    edges: Tensor,
    pair: Tensor,
    label: Tensor,
    *,
    class_weights: Tensor | None = None,
    pair_weight: float = 1.0,
) -> Tensor:
    """Every potential normalised by itself (Sutton & McCallum 2005): -mean_p log P_U - pair_weight * mean_e log P_V.

    The gradient in each piece's scores is softmax - one-hot. An edge with a void end takes no part. Lin et al. sum over
    nodes and edges; as means, their loss has pair_weight = edges per node. class_weights: see `losses.pairwise_nll`.
    """
    check_graph(unary, edges, pair, label)
    ends = (label[:, index] for index in edges.unbind(1))
    pieces = pairwise_nll(-pair.expand(len(unary), -1, -1, -1), *ends, class_weights=class_weights)
    return _nll(unary, label, class_weights) + pair_weight * pieces


LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "exact": exact_nll,
    "pseudo": pseudo_nll,
    "mean_field": mean_field_nll,
    "piecewise": piecewise_nll,
}


def _nll(scores: Tensor, label: Tensor, class_weights: Tensor | None) -> Tensor:
    return cross_entropy(scores.transpose(1, 2)[..., None], label[..., None], class_weights=class_weights)


def check_graph(unary: Tensor, edges: Tensor, pair: Tensor, label: Tensor | None = None) -> None:
    """ValueError unless the shapes are those of one graph."""
    if unary.ndim != 3 or edges.ndim != 2 or edges.shape[1] != 2:
        raise ValueError(
            f"unary scores {tuple(unary.shape)} and edges {tuple(edges.shape)}; expected [B, N, K] and [E, 2]"
        )
    batch, nodes, num_classes = unary.shape
    expected = (len(edges), num_classes, num_classes)
    if pair.ndim != 4 or pair.shape[0] not in (1, batch) or pair.shape[1:] != expected:
        raise ValueError(f"pair scores have shape {tuple(pair.shape)}; expected {[batch, *expected]}")
    if len(edges) and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
        raise ValueError(f"edges name node {int(edges.max())}; expected nodes 0 to {nodes - 1}")
    if label is not None and label.shape != (batch, nodes):
        raise ValueError(f"label has shape {tuple(label.shape)}; expected [{batch}, {nodes}]")
