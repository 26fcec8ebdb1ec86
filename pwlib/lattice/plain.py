"""The lattice filter in PyTorch operations: any device and precision, differentiable; the reference for `compiled`.

    out = slice(blur(splat(values)))

A splat adds each point's value to the corners of its simplex, weighted by barycentric coordinates. A blur convolves the
values on the vertices with [1/2, 1, 1/2] along each axis of the lattice. A slice interpolates the result at the points,
with the splat's weights. Splat and slice are sparse matrices, the transposes of each other, and a bag of an
`embedding_bag` is a row of such a matrix: out[b] = sum of weight[e] table[index[e]] over the entries e of bag b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.lattice import geometry
from pwlib.lattice.geometry import Lattice


def embed(features: Tensor) -> tuple[Tensor, Lattice]:
    """Place points with features [B, N, D] on the lattice.

    Returns:
        The weights [B, N, D+1] of the corners around each point, differentiable in the features, and the lattice.
    """
    weight, key, rank, strides, steps = geometry.place(features)
    axes = len(rank)
    # A corner of remainder k is lowered in the coordinates of the k last ranks.
    lowering = torch.zeros(rank.shape, dtype=torch.int64, device=rank.device)
    lowering = lowering.scatter(0, rank.long(), strides[:, None, None].expand(rank.shape)).flip(0).cumsum(0)
    keys = torch.stack([key, *(key + k - lowering[k - 1] for k in range(1, axes))], -1)  # [B, N, d+1]
    vertex, corner = keys.unique(return_inverse=True)  # [M], ascending, and [B, N, d+1]
    wanted = vertex + steps[:axes, None] + steps[axes] * (vertex % axes == 0)  # [d+1, M]
    at = torch.searchsorted(vertex, wanted).clamp_(max=len(vertex) - 1)
    ahead = F.pad(torch.where(vertex[at] == wanted, at + 1, 0), (1, 0))  # [d+1, M+1]
    rows = torch.arange(ahead.shape[1], device=keys.device).expand_as(ahead)
    behind = torch.zeros_like(ahead).scatter_(1, ahead, rows)
    behind[:, 0] = 0
    return weight, Lattice((corner + 1).int(), (torch.stack([ahead, behind], -1).int(),), (0,))


def splat(values: Tensor, weight: Tensor, lattice: Lattice) -> Tensor:
    """Values [B, N, C] at the points to values [M, C] on the vertices, by weights [B, N, A]."""
    order, begins, number, first = lattice.entries
    point, weight = order // weight.shape[-1], weight.flatten()[order]
    bags = {"mode": "sum", "include_last_offset": True}
    runs = F.embedding_bag(point, values.flatten(0, 1), begins, per_sample_weights=weight, **bags)  # [R, C]
    return F.embedding_bag(number, runs, first, **bags)


class _Convolve(torch.autograd.Function):
    """Add the neighbours of each vertex to twice its value, along one axis after the other.

    Along an axis this is a symmetric matrix, so that a gradient takes the same way in reverse order.
    """

    @staticmethod
    def forward(ctx, table: Tensor, axes: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(axes, starts)
        for vertices in axes:
            table = F.embedding_bag(vertices, table, starts, mode="sum")
        return table

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        axes, starts = ctx.saved_tensors
        return _Convolve.apply(gradient, axes.flip(0), starts), None, None


def blur(table: Tensor, lattice: Lattice) -> Tensor:
    """Blur the values [M, C] on the vertices along all axes."""
    parts = zip(table.split(lattice.sizes), lattice.stencils, strict=True)
    return torch.cat([_Convolve.apply(part, axes, starts) * 0.5 ** len(axes) for part, (axes, starts) in parts])


def slice_(table: Tensor, weight: Tensor, lattice: Lattice) -> Tensor:
    """Values [M, C] on the vertices to values [B, N, C] at the points."""
    out = F.embedding_bag(lattice.corner.flatten(0, 1), table, mode="sum", per_sample_weights=weight.flatten(0, 1))
    return out.view(*weight.shape[:2], -1)


def message(values: Tensor, weights: tuple[Tensor, Tensor], mixing: Tensor, lattice: Lattice) -> Tensor:
    """The messages of several kernels, summed.

    Args:
        values: [B, N, C].
        weights: those in the splat and those in the slice, [B, N, A], of the corners of all kernels.
        mixing: [M, C, C], by which the channels of kernel m are multiplied (from the right) on the vertices.
        lattice: the joined lattices of the kernels.

    Returns:
        [B, N, C].
    """
    table = blur(splat(values, weights[0], lattice), lattice)  # [M, C], M vertices
    parts = zip(table.split(lattice.sizes), lattice.kernel, strict=True)
    return slice_(torch.cat([part @ mixing[kernel] for part, kernel in parts]), weights[1], lattice)
