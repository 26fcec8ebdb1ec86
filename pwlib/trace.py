"""A record of mean field on one image: every message, pairwise energy and marginal of every iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pwlib.mean_field import free_energy, mean_field


@dataclass(frozen=True)
class Trace:
    """All quantities of mean field on one image, over T iterations with M kernels, as CPU tensors."""

    image: Tensor  # [3, H, W]
    unary: Tensor  # [K, H, W], energies
    kernels: tuple[str, ...]  # M names
    weights: Tensor  # [M]
    compatibility: Tensor  # mu [K, K]
    messages: Tensor  # [T, M, K, H, W], K_m q[t]: normalised, without weights
    pairwise: Tensor  # [T, K, H, W], expected pairwise energies, sum_m w_m mu messages[t, m]
    q: Tensor  # [T + 1, K, H, W], marginals: q[0] = softmax(-unary), q[t + 1] = softmax(-unary - pairwise[t])
    free_energy: Tensor  # [T + 1], F(q[t]) in nats, see `pwlib.mean_field`
    # Of Gaussian kernels; they determine the weight of every pixel in a message:
    features: tuple[Tensor, ...] = ()  # [N, D] for each kernel, divided by the bandwidths
    sums: Tensor | None = None  # [M, N], the row sums K 1 of each kernel matrix
    normalization: str = "symmetric"
    self_message: bool = True

    @property
    def iterations(self) -> int:
        return len(self.pairwise)

    @property
    def labels(self) -> Tensor:
        """[T + 1, H, W]: the most probable label of each pixel after each iteration."""
        return self.q.argmax(1)

    @property
    def entropy(self) -> Tensor:
        """[T + 1, H, W] in nats."""
        return torch.special.entr(self.q).sum(1)


@torch.no_grad()
def record(
    unary: Tensor,
    size: tuple[int, int],
    messages: Callable[[Tensor], Tensor],
    pairwise: Callable[[Tensor], Tensor],
    iterations: int,
    *,
    initial: Tensor | None = None,
    **fields,
) -> Trace:
    """Run `mean_field` on one image and keep all quantities.

    Args:
        unary, initial: energies [N, K], as for `mean_field`; N = H * W.
        size: (H, W).
        messages: q [N, K] -> the messages of all kernels [M, N, K].
        pairwise: messages [M, N, K] -> expected pairwise energies [N, K].
        fields: the trace's other fields.
    """
    received, energies, marginals = [], [], []

    def expected(q: Tensor) -> Tensor:
        received.append(messages(q))
        return pairwise(received[-1])

    def observe(q: Tensor, energy: Tensor) -> None:
        marginals.append(q), energies.append(energy)

    mean_field(unary, expected, iterations, initial=initial, observe=observe)

    def maps(rows: Tensor) -> Tensor:
        return rows.mT.unflatten(-1, size).cpu()  # [..., N, K] -> [..., K, H, W]

    return Trace(
        unary=maps(unary),
        messages=maps(torch.stack(received)[:-1]),
        pairwise=maps(torch.stack(energies)[:-1]),
        q=maps(torch.stack(marginals)),
        free_energy=torch.stack([free_energy(q, unary, e) for q, e in zip(marginals, energies, strict=True)]).cpu(),
        **fields,
    )
