"""Mean-field inference: the product of independent marginals that approximates a CRF.

    P(x) = exp(-E(x)) / Z,    E(x) = sum_i psi_u(x_i) + sum_{i<j} psi_p(x_i, x_j)

Energies are penalties: lower is better. Among all products Q(x) = prod_i q_i(x_i), mean field looks for one that
minimises KL(Q || P). At a minimum, each marginal depends on the others through its expected pairwise energy e_i:

    q_i(l) = softmax_l( -psi_u(l) - e_i(l) ),    e_i(l) = sum_{j != i} sum_l' psi_p(l, l') q_j(l')

The parallel update applies this equation to all nodes at once and repeats. The quantity it should decrease is the
free energy, which differs from the KL divergence by the unknown constant log Z:

    F(Q) = E_Q[E(x)] - H(Q) = KL(Q || P) - log Z = sum_i sum_l q_i(l) (psi_u(l) + e_i(l) / 2) - H(Q)

A KL divergence is never negative. F can be: it is negative whenever log Z exceeds the divergence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mean_field(
    unary: Tensor,
    pairwise: Callable[[Tensor], Tensor],
    iterations: int,
    *,
    initial: Tensor | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
    log: bool = True,
) -> Tensor:
    """Run parallel mean-field updates; differentiable through every iteration.

    Args:
        unary: energies psi_u [..., N, K].
        pairwise: marginals q [..., N, K] -> expected pairwise energies [..., N, K].
        iterations: number of updates, 0 or more.
        initial: energies [..., N, K] whose softmax(-initial) is the first q; None: the unary energies.
        observe: called as observe(q, pairwise(q)) before every update and after the last, `iterations` + 1 times.
        log: whether to return log-marginals; False returns the marginals, which is cheaper than exp(log q).

    Returns:
        log q (or q) [..., N, K] after the last update.
    """
    log_p = (-unary).contiguous()  # [..., N, K]
    log_q = log_p if initial is None else -initial  # up to a constant per node
    for _ in range(iterations):
        q = torch.softmax(log_q, -1)
        energy = pairwise(q)  # [..., N, K]
        if observe is not None:
            observe(q, energy)
        log_q = log_p - energy
    if observe is not None:
        q = torch.softmax(log_q, -1)
        observe(q, pairwise(q))
    return normalise(log_q, log=log)


def normalise(scores: Tensor, *, log: bool) -> Tensor:
    """log_softmax (or softmax) over the labels of [..., N, K]."""
    # [..., K, N] in memory: with few labels, a softmax over rows of K numbers is slower.
    return (torch.log_softmax if log else torch.softmax)(scores.mT.contiguous(), dim=-2).mT


def free_energy(q: Tensor, unary: Tensor, pairwise: Tensor) -> Tensor:
    """F(Q) in nats, a float64 scalar, from marginals, unary and expected pairwise energies, all [..., N, K]."""
    expected = (q * (unary + pairwise / 2)).sum(dtype=torch.float64)
    return expected - torch.special.entr(q).sum(dtype=torch.float64)
