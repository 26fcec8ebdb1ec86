"""The permutohedral lattice (Adams, Baek & Davis 2010): its simplices, and the vertices that a set of points touches.

The lattice lies in the hyperplane H = {x : x_0 + .. + x_d = 0} of R^(d+1). Its vertices are the integer points of H
whose coordinates all leave the same remainder k = 0 .. d when divided by d+1. They divide H into simplices of one
shape, each with d+1 corners, one of every remainder. Two steps find the simplex around a point x without a search:

Rounding (p. 4). Round each coordinate to the nearest multiple of d+1. If the result y sums to zero, it is the nearest
vertex of remainder 0. Otherwise its sum is s (d+1) for a small integer s, and the coordinates that were rounded
furthest are corrected: the s with the smallest rest x - y are lowered by d+1 (or the -s with the largest are raised).

Ranking (p. 5). Around y there is one simplex for every order of the rests. Let rank_i = 0 for the largest rest and d
for the smallest. The corner of remainder k is y + k at the d+1-k coordinates with the largest rests, and y + k - (d+1)
at the other k, so that it lies in H. With the rests in descending order, r_0 >= .. >= r_d, the barycentric coordinates
of x, which are the weights of the corners in a linear interpolation, are

    b_0 = 1 - (r_0 - r_d) / (d+1),    b_k = (r_(d-k) - r_(d-k+1)) / (d+1)  for k = 1 .. d

Scale. The filter splats (an interpolation), convolves with [1/4, 1/2, 1/4] along the d+1 axes u_j = (d+1) e_j - 1, and
slices (an interpolation). A convolution has a variance of 1/2 step along its axis; an interpolation, whose hat function
is a convolution of d+1 boxes of one step, has 1/12. On H, sum_j u_j u_j^T is (d+1)^2 times the identity. The variance
of the whole is therefore (1/12 + 1/2 + 1/12) (d+1)^2 = 2/3 (d+1)^2 in every direction, and features multiplied by
sqrt(2/3) (d+1) give the kernel exp(-|f_i - f_j|^2 / 2), approximately.

Gain. The taps used are [1/2, 1, 1/2], as in the reference code. The axes sum to zero, so a value returns to its vertex
after one step along each of them, forwards or backwards: 1 + 2 (1/2)^(d+1) = 1 + 2^-d, by which the filter divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SERIAL = 2**15  # numbers; PyTorch divides more than these among its threads


def elevate(features: Tensor) -> Tensor:
    """Embed features [d, ...] in H, by the basis (1, .., 1, -j, 0, .., 0) / sqrt(j (j+1)), and scale: [d+1, ...]."""
    # Sums in a fixed order, and no matrix product: on a pixel grid many coordinates are equal modulo d+1, and must
    # remain equal to the last digit, because such ties decide which vertices are touched.
    d, rows, total = len(features), [], torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        rows.append(torch.sub(total, scaled, alpha=j))
        total = total + scaled
    return torch.stack([total, *reversed(rows)])


@torch.no_grad()
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point [d+1, ...]: y / (d+1), whole numbers in the points' dtype, and int8 ranks."""
    axes = len(elevated)
    base = torch.round(elevated * (1 / axes))
    rest = torch.sub(elevated, base, alpha=axes)
    rank = torch.zeros(rest.shape, dtype=torch.int8, device=rest.device)
    for i, j in itertools.combinations(range(axes), 2):
        below = rest[i] < rest[j]
        rank[i] += below
        rank[j] += ~below
    # Adding s to every rank makes those that leave 0 .. d the coordinates to correct. A corrected rest is then the
    # largest or the smallest, hence its rank continues at the other end.
    rank += base.sum(0).to(torch.int8)
    shift = (rank < 0).to(torch.int8) - (rank >= axes).to(torch.int8)
    return base + shift, rank + axes * shift


def barycentric(elevated: Tensor, base: Tensor, rank: Tensor) -> Tensor:
    """Barycentric coordinates [..., d+1] of points in their simplices; differentiable in `elevated` [d+1, ...]."""
    axes = len(elevated)
    rest = torch.sub(elevated, base, alpha=axes) * (1 / axes)
    rest = torch.zeros_like(rest).scatter(0, rank.long(), rest)  # in descending order
    steps = (rest[:-1] - rest[1:]).flip(0)  # b_1 .. b_d
    return torch.cat([1 + rest[-1:] - rest[:1], steps]).movedim(0, -1).contiguous()


def gain(d: int) -> float:
    """The factor 1 / (1 + 2^-d) that the filter's taps require in d dimensions, see above."""
    return 1 / (1 + 2.0**-d)


def self_weight(weight: Tensor) -> Tensor:
    """K_ii before the gain, [..., 1], from barycentric weights [..., d+1], if all vertices around a point are touched.

    k steps lead from one corner of a simplex to the corner k places further, and d + 1 - k steps lead there in the
    opposite direction. Each step halves the value.
    """
    axes = weight.shape[-1]
    apart = (torch.arange(axes)[:, None] - torch.arange(axes)).abs().to(weight)
    response = 2.0**-apart + torch.where(apart == 0, 2.0 * 2.0**-axes, 2.0 ** (apart - axes))  # [d+1, d+1]
    return ((weight @ response) * weight).sum(-1, keepdim=True)


@torch.no_grad()
def corner_keys(base: Tensor, rank: Tensor, low: Tensor, strides: Tensor) -> Tensor:
    """One integer for each corner of the simplices [d+1, B, N]: int64 [B, N, d+1].

    Coordinate i of a vertex of remainder k is (d+1) c_i + k. The digits of its key are the image, c_(d-1), .., c_0 and
    k, with the place values strides[d], .., strides[0] and 1; low is the least of each c_i.
    """
    d, batch = len(base) - 1, base.shape[1]
    key = (strides[d] * torch.arange(batch, device=base.device))[:, None].repeat(1, base.shape[2])
    for row, smallest, stride in zip(base[:d], low, strides, strict=False):
        key += (row - smallest).long() * stride
    # From corner k-1 to corner k, the coordinate of rank d+1-k is lowered; the last one has no digit.
    place = torch.cat([strides[:d], strides.new_zeros(1)])[:, None, None].expand(rank.shape)
    lowered = torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(0, rank.long(), place)
    keys = [key]
    for k in range(1, d + 1):
        keys.append(keys[-1] + 1 - lowered[d + 1 - k])
    return torch.stack(keys, -1)


def embed(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place points with features [B, N, D] on the lattice.

    Returns:
        weight: [B, N, D+1], of the corners around each point; differentiable in the features.
        keys: int64 [B, N, D+1], of the corners.
        steps: int64 [D+2]. One step along axis j leads from a vertex to key + steps[j], and if the vertex has remainder
            0, which becomes D, to key + steps[j] + steps[D+1].
    """
    batch, points, d = features.shape
    # Blocks of points that stay in the cache, and are so few that PyTorch does not divide them among threads.
    block = max(1, SERIAL // (batch * (d + 1))) if features.device.type == "cpu" else points
    weight, simplices = [], []
    for part in features.movedim(-1, 0).split(block, -1):
        elevated = elevate(part)
        base, rank = enclosing_simplex(elevated.detach())
        weight.append(barycentric(elevated, base, rank))
        simplices.append((base, rank))
    # One spare value per digit: a step out of the box of all vertices, on either side, leads to it and finds no vertex.
    low = torch.stack([base[:d].amin((1, 2)) for base, _ in simplices]).amin(0) - 1
    high = torch.stack([base[:d].amax((1, 2)) for base, _ in simplices]).amax(0) + 1
    spans = [int(span) for span in (high - low + 1).tolist()]
    strides = [(d + 1) * math.prod(spans[:i]) for i in range(d + 1)]
    if strides[d] * batch >= 2**62:
        raise ValueError(
            f"features spread over {' x '.join(map(str, spans))} lattice cells, too many to number in 64 bits; "
            "expected bandwidths that are not so small beside the features' range"
        )
    places = torch.tensor(strides, device=features.device)
    keys = torch.cat([corner_keys(base, rank, low, places) for base, rank in simplices], 1)
    steps = torch.tensor([*(stride - 1 for stride in strides[:d]), -1, d + 1 - sum(strides[:d])], device=keys.device)
    return torch.cat(weight, 1), keys, steps


@dataclass(frozen=True)
class Lattice:
    """The touched vertices of B images of N points, and how points and vertices are connected; constant integers.

    Vertices are numbered in parts, one after the other: a table [M, C] of values on the vertices has the rows of the
    first part, then those of the second, and so on. The first row of each part stands for all vertices that no point
    touches; its value is always zero.

    corner: int32 [B, N, A], rows of the vertices at the corners of each point's simplex.
    neighbours: for each part, int32 [d+1, M_part, 2], rows within the part of the vertices beside each vertex.
    kernel: for each part, the kernel that it belongs to.
    """

    corner: Tensor
    neighbours: tuple[Tensor, ...]
    kernel: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """M_part, the number of rows of each part."""
        return [part.shape[1] for part in self.neighbours]

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries of `corner`, flat, in the order of their vertices, and where each vertex begins, int64 [M+1]."""
        vertex, order = self.corner.flatten().sort(stable=True)
        rows = torch.arange(sum(self.sizes) + 1, device=vertex.device, dtype=vertex.dtype)
        return order, torch.searchsorted(vertex, rows)

    @staticmethod
    def join(lattices: Sequence[Lattice], batch: int) -> Lattice:
        """The lattices of several kernels as one for B = `batch` images; a lattice of one image serves them all."""
        if len(lattices) == 1 and len(lattices[0].corner) == batch:
            return lattices[0]
        corner, neighbours, kernel, start = [], [], [], 0
        for number, lattice in enumerate(lattices):
            copies, size = batch // len(lattice.corner), sum(lattice.sizes)
            images = torch.arange(copies, dtype=torch.int32, device=lattice.corner.device)
            corner.append(lattice.corner + (start + size * images)[:, None, None])
            neighbours += lattice.neighbours * copies
            kernel += [number] * len(lattice.neighbours) * copies
            start += size * copies
        return Lattice(torch.cat(corner, -1), tuple(neighbours), tuple(kernel))
