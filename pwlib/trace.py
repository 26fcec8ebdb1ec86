"""A record of mean field on one image: every message, pairwise energy and marginal of every iteration.

In iteration t, each of the M kernels filters the marginals into messages; weights and compatibility turn the messages
into the pairwise energies that the update adds to the unary energies:

    messages[t, m] = K_m q[t],    pairwise[t] = sum_m w_m mu messages[t, m],    q[t + 1] = softmax(-unary - pairwise[t])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pwlib.mean_field import free_energy, mean_field


@dataclass(frozen=True)
class Trace:
    """All quantities of mean field on one image, over T iterations with M kernels, as CPU tensors.

    image [3, H, W]; unary [K, H, W] energies; kernels, M names; weights [M]; compatibility [K, K].
    messages [T, M, K, H, W]: the filtered marginals of q[t], normalised, without weights.
    pairwise [T, K, H, W]: expected pairwise energies, the messages after weights and compatibility.
    q [T + 1, K, H, W]: marginals; q[0] = softmax(-unary) and q[t + 1] = softmax(-unary - pairwise[t]).
    free_energy [T + 1]: F(q[t]) in nats, see `pwlib.mean_field`.

    `senders` also needs, where the kernels are Gaussian: features, one [N, D] per kernel, divided by the bandwidths;
    sums [M, N], the row sums K 1 of each kernel matrix; the normalisation, and whether self-messages are on.
    """

    image: Tensor
    unary: Tensor
    kernels: tuple[str, ...]
    weights: Tensor
    compatibility: Tensor
    messages: Tensor
    pairwise: Tensor
    q: Tensor
    free_energy: Tensor
    features: tuple[Tensor, ...] = ()
    sums: Tensor | None = None
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

    def senders(self, kernel: int, pixel: int) -> Tensor:
        """[H, W]: the weights with which `pixel` (row-major) receives the marginals of all pixels, a kernel matrix row.

        sum_j senders_j q[t]_j(l) is messages[t, kernel, l] at `pixel`, up to the lattice's approximation.
        """
        if not self.features or self.sums is None:
            raise ValueError("this trace has no kernel features; expected a trace of Gaussian kernels")
        features, sums = self.features[kernel], self.sums[kernel]  # [N, D], [N]
        weight = torch.exp(-(features - features[pixel]).square().sum(-1) / 2)  # [N]
        if not self.self_message:
            weight[pixel] = 0
        if self.normalization == "symmetric":
            weight = weight * (sums * sums[pixel]).rsqrt()
        elif self.normalization == "row":
            weight = weight / sums[pixel]
        return weight.reshape(self.q.shape[-2:])


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
    received, energies, marginals, free = [], [], [], []

    def expected(q: Tensor) -> Tensor:
        received.append(messages(q))
        return pairwise(received[-1])

    def observe(q: Tensor, energy: Tensor) -> None:
        marginals.append(q), energies.append(energy), free.append(free_energy(q, unary, energy))

    mean_field(unary, expected, iterations, initial=initial, observe=observe)

    def maps(rows: Tensor) -> Tensor:
        return rows.mT.unflatten(-1, size).cpu()  # [..., N, K] -> [..., K, H, W]

    return Trace(
        unary=maps(unary),
        messages=maps(torch.stack(received)[:-1]),
        pairwise=maps(torch.stack(energies)[:-1]),
        q=maps(torch.stack(marginals)),
        free_energy=torch.stack(free).cpu(),
        **fields,
    )
