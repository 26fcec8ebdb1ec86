"""The permutohedral lattice (Adams, Baek & Davis 2010): its simplices, and the vertices that a set of points touches.

The lattice lies in the hyperplane H = {x : x_0 + .. + x_d = 0} of R^(d+1). Its vertices are the integer points of H
whose coordinates all leave the same remainder k = 0 .. d when divided by d+1. They divide H into simplices of one
shape, each with d+1 corners, one of every remainder. Two steps find the simplex around a point x without a search:

Rounding (p. 4). Round each coordinate to the nearest multiple of d+1. If the result y sums to zero, it is the nearest
vertex of remainder 0. Otherwise its sum is s (d+1) for a small integer s, and the coordinates that were rounded
furthest are corrected: the s with the smallest residual x - y are lowered by d+1 (or the -s with the largest are
raised).

Ranking (p. 5). Around y there is one simplex for every order of the residuals. Let rank_i = 0 for the largest residual
and d for the smallest. The corner of remainder k is y + k at the d+1-k coordinates with the largest residuals, and y +
k - (d+1) at the other k, so that it lies in H. With the residuals in descending order, r_0 >= .. >= r_d, the
barycentric coordinates of x, which are the weights of the corners in a linear interpolation, are

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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


def place(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embed points with features [B, N, D] in H, and choose keys for the vertices around them.

    Coordinate i of a vertex of remainder k is (d+1) c_i + k. The digits of its key are the image, c_(d-1), .., c_0 and
    k, with the place values strides[d], .., strides[0] and 1.

    Returns:
        elevated: [D+1, B, N], contiguous; differentiable in the features.
        low: int64 [D], less than the c_i of any vertex around a point.
        strides: int64 [D+1].
        steps: int64 [D+2]. One step along axis j leads from a vertex to key + steps[j], and if the vertex has remainder
            0, which becomes D, to key + steps[j] + steps[D+1].
    """
    batch, _, d = features.shape
    elevated = elevate(features.movedim(-1, 0))
    ends = torch.stack(elevated.detach()[:d].flatten(1).aminmax(dim=1))
    # Rounding is corrected by at most 1, and c_i of a corner is at most 1 lower than that of the corner 0. One value of
    # each digit is spare: a step out of the box of all vertices, on either side, leads to it and finds no vertex.
    low, high = torch.round(ends * (1 / (d + 1))).long() + torch.tensor([[-2], [2]], device=ends.device)
    spans = (high - low + 1).tolist()
    strides = [(d + 1) * math.prod(spans[:i]) for i in range(d + 1)]
    if strides[d] * batch >= 2**62:
        raise ValueError(
            f"features spread over {' x '.join(map(str, spans))} lattice cells, too many to number in 64 bits; "
            "expected bandwidths that are not so small beside the features' range"
        )
    steps = [*(stride - 1 for stride in strides[:d]), -1, d + 1 - sum(strides[:d])]
    return elevated, low, low.new_tensor(strides), low.new_tensor(steps)


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
    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The entries of `corner`, flat, in the order of their vertices, and how they are divided.

        Flat colours put thousands of points around one vertex, and a GPU adds up the entries of one vertex one after
        the other. They are therefore added in runs of at most 64, and then the runs of each vertex.

        Returns:
            order int64 [E], where each run begins int64 [R+1], the numbers of the runs int64 [R], and the first run of
            each vertex int64 [M+1].
        """
        vertex, order = self.corner.flatten().sort(stable=True)
        rows = torch.arange(sum(self.sizes) + 1, device=vertex.device, dtype=vertex.dtype)
        starts = torch.searchsorted(vertex, rows)
        runs = (starts.diff() + 63) // 64  # [M]
        first = torch.cat([runs.new_zeros(1), runs.cumsum(0)])  # [M+1]
        number = torch.arange(int(first[-1]), device=runs.device)
        of = rows[:-1].repeat_interleave(runs, output_size=len(number)).long()  # the vertex of each run
        begins = starts[of] + 64 * (number - first[of])
        return order, torch.cat([begins, starts[-1:]]), number, first

    @cached_property
    def stencils(self) -> list[tuple[Tensor, Tensor]]:
        """For each part, int32: along each axis, every vertex twice and the two beside it [d+1, 4 M_part], whose values
        are added, and where the four of each vertex begin [M_part]."""
        stencils = []
        for part in self.neighbours:
            rows = torch.arange(part.shape[1], dtype=part.dtype, device=part.device)
            four = torch.cat([rows[:, None].expand(len(part), -1, 2), part], -1)
            stencils.append((four.flatten(1), 4 * rows))
        return stencils

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
