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

from pwlib.lattice.geometry import Lattice


def number(keys: Tensor, steps: Tensor) -> Lattice:
    """Number the vertices with these keys [B, N, d+1] and find their neighbours; see `geometry.corner_keys`."""
    axes = keys.shape[-1]
    vertex, corner = keys.unique(return_inverse=True)  # [M], ascending, and [B, N, d+1]
    wanted = vertex + steps[:axes, None] + steps[axes] * (vertex % axes == 0)  # [d+1, M]
    at = torch.searchsorted(vertex, wanted).clamp_(max=len(vertex) - 1)
    ahead = F.pad(torch.where(vertex[at] == wanted, at + 1, 0), (1, 0))  # [d+1, M+1]
    rows = torch.arange(ahead.shape[1], device=keys.device).expand_as(ahead)
    behind = torch.zeros_like(ahead).scatter_(1, ahead, rows)
    behind[:, 0] = 0
    return Lattice((corner + 1).int(), (torch.stack([ahead, behind], -1).int(),), (0,))


def splat(values: Tensor, weight: Tensor, lattice: Lattice) -> Tensor:
    """Values [B, N, C] at the points to values [M, C] on the vertices, by weights [B, N, A]."""
    order, starts = lattice.entries
    point, weight = order // weight.shape[-1], weight.flatten()[order]
    bags = {"mode": "sum", "per_sample_weights": weight, "include_last_offset": True}
    return F.embedding_bag(point, values.flatten(0, 1), starts, **bags)


def blur(table: Tensor, lattice: Lattice) -> Tensor:
    """Blur the values [M, C] on the vertices along all axes."""
    parts = []
    for part, neighbours in zip(table.split(lattice.sizes), lattice.neighbours, strict=True):
        for ahead, behind in neighbours.transpose(1, 2):
            part = part + (F.embedding(ahead, part) + F.embedding(behind, part)) / 2
        parts.append(part)
    return torch.cat(parts)


def slice_(table: Tensor, weight: Tensor, lattice: Lattice) -> Tensor:
    """Values [M, C] on the vertices to values [B, N, C] at the points."""
    out = F.embedding_bag(lattice.corner.flatten(0, 1), table, mode="sum", per_sample_weights=weight.flatten(0, 1))
    return out.view(*weight.shape[:2], -1)


def message(values: Tensor, splat_weight: Tensor, slice_weight: Tensor, mixing: Tensor, lattice: Lattice) -> Tensor:
    """The messages of several kernels, summed.

    Args:
        values: [B, N, C].
        splat_weight, slice_weight: [B, N, A], of the corners of all kernels.
        mixing: [M, C, C], by which the channels of kernel m are multiplied (from the right) on the vertices.
        lattice: the joined lattices of the kernels.

    Returns:
        [B, N, C].
    """
    table = blur(splat(values, splat_weight, lattice), lattice)  # [M, C], M vertices
    parts = zip(table.split(lattice.sizes), lattice.kernel, strict=True)
    return slice_(torch.cat([part @ mixing[kernel] for part, kernel in parts]), slice_weight, lattice)
