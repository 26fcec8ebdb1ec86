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


@torch.no_grad()
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point [d+1, ...]: y / (d+1), whole numbers in the points' dtype, and int8 ranks."""
    axes = len(elevated)
    base = torch.round(elevated * (1 / axes))
    residual = torch.sub(elevated, base, alpha=axes)
    before = torch.ones(axes, axes, dtype=torch.bool, device=residual.device).triu(1)  # i < j, which decides ties
    before = before.view(axes, axes, *[1] * (residual.ndim - 1))
    rank = torch.where(before, residual <= residual[:, None], residual < residual[:, None]).sum(0, dtype=torch.int8)
    # Adding s to every rank makes those that leave 0 .. d the coordinates to correct. A corrected residual is then the
    # largest or the smallest, hence its rank continues at the other end.
    rank += base.sum(0).to(torch.int8)
    shift = (rank < 0).to(torch.int8) - (rank >= axes).to(torch.int8)
    return base + shift, rank + axes * shift


def barycentric(elevated: Tensor, base: Tensor, rank: Tensor) -> Tensor:
    """Barycentric coordinates [..., d+1] of points in their simplices; differentiable in `elevated` [d+1, ...]."""
    axes = len(elevated)
    residual = torch.sub(elevated, base, alpha=axes) * (1 / axes)
    residual = torch.zeros_like(residual).scatter(0, rank.long(), residual)  # in descending order
    steps = (residual[:-1] - residual[1:]).flip(0)  # b_1 .. b_d
    return torch.cat([1 + residual[-1:] - residual[:1], steps]).movedim(0, -1).contiguous()


def embed(features: Tensor) -> tuple[Tensor, Lattice]:
    """Place points with features [B, N, D] on the lattice.

    Returns:
        The weights [B, N, D+1] of the corners around each point, differentiable in the features, and the lattice.
    """
    elevated, low, strides, steps = geometry.place(features)
    base, rank = enclosing_simplex(elevated.detach())
    weight = barycentric(elevated, base, rank)
    axes, batch, _ = base.shape
    # A corner of remainder k is lowered in the coordinates of the k last ranks. The last coordinate is not in a key.
    lowering = F.pad(strides[:-1], (0, 1))[:, None, None].expand(base.shape)
    lowered = torch.zeros_like(lowering).scatter(0, rank.long(), lowering).flip(0).cumsum(0)  # [d+1, B, N]
    keys = (strides[:-1, None, None] * (base[:-1].long() - low[:, None, None])).sum(0)  # of the corner 0, [B, N]
    keys = keys + strides[-1] * torch.arange(batch, device=base.device)[:, None]
    keys = torch.stack([keys, *(keys + k - lowered[k - 1] for k in range(1, axes))], -1)  # [B, N, d+1]
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
