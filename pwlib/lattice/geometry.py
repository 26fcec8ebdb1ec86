"""The permutohedral lattice (Adams, Baek & Davis 2010): its simplices, and the vertices that a set of points touches.

The lattice lies in the hyperplane H = {x : x_0 + .. + x_d = 0} of R^(d+1). Its vertices are the integer points of H
whose coordinates all leave the same remainder k = 0 .. d when divided by d+1. They divide H into simplices of one
shape, each with d+1 corners, one of every remainder. Two steps find the simplex around a point x without a search:

Rounding (p. 4). Round each coordinate to the nearest multiple of d+1. If the result y sums to zero, it is the nearest
vertex of remainder 0. Otherwise its sum is s (d+1), and the s coordinates with the smallest residuals x - y are lowered
by d+1 (or the -s with the largest are raised).

Ranking (p. 5). Let rank_i = 0 for the largest residual and d for the smallest. The corner of remainder k is y + k at
the d+1-k coordinates with the largest residuals, and y + k - (d+1) at the other k. With the residuals in descending
order, r_0 >= .. >= r_d, the barycentric coordinates of x, which are the weights of the corners in an interpolation, are

    b_0 = 1 - (r_0 - r_d) / (d+1),    b_k = (r_(d-k) - r_(d-k+1)) / (d+1)  for k = 1 .. d

The filter splats (an interpolation), convolves along the d+1 axes u_j = (d+1) e_j - 1, and slices (an interpolation).
Its variance, 2/3 (d+1)^2 in every direction of H, is that of the kernel exp(-|f_i - f_j|^2 / 2) for features multiplied
by sqrt(2/3) (d+1). The taps are [1/2, 1, 1/2], as in the reference code. The axes sum to zero, so a value returns to
its vertex after one step along each of them: the filter divides by 1 + 2 (1/2)^(d+1). Notebook 03 derives all this.
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
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point [d+1, ...]: y / (d+1), whole numbers in the points' dtype, and int8 ranks."""
    axes = len(elevated)
    base = torch.round(elevated * (1 / axes))
    residual = torch.sub(elevated, base, alpha=axes)
    # Adding s to every rank makes those that leave 0 .. d the coordinates to correct. A corrected residual is then the
    # largest or the smallest, hence its rank continues at the other end.
    rank = base.sum(0).to(torch.int8).repeat(axes, *[1] * (base.ndim - 1))
    for i in range(axes - 1):
        below = residual[i] < residual[i + 1 :]  # of two equal residuals, the first has the smaller rank
        rank[i] += below.sum(0, dtype=torch.int8)
        rank[i + 1 :] += ~below
    shift = (rank < 0).to(torch.int8) - (rank >= axes).to(torch.int8)
    return base + shift, rank + axes * shift


def barycentric(elevated: Tensor, base: Tensor, rank: Tensor) -> Tensor:
    """Barycentric coordinates [..., d+1] of points in their simplices; differentiable in `elevated` [d+1, ...]."""
    axes = len(elevated)
    residual = torch.sub(elevated, base, alpha=axes) * (1 / axes)
    residual = torch.zeros_like(residual).scatter(0, rank.long(), residual)  # in descending order
    steps = (residual[:-1] - residual[1:]).flip(0)  # b_1 .. b_d
    return torch.cat([1 + residual[-1:] - residual[:1], steps]).movedim(0, -1).contiguous()


def place(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the simplex around each point with features [B, N, D], and choose keys for the vertices.

    Coordinate i of a vertex of remainder k is (d+1) c_i + k. The digits of its key are the image, c_(d-1), .., c_0 and
    k; the last coordinate follows from the others.

    Returns:
        weight: [B, N, D+1], the barycentric coordinates; differentiable in the features.
        key: int64 [B, N], of the corner of remainder 0. The next corner, of remainder k + 1, is lowered in the
            coordinate i of rank d - k: its key is larger by 1 - strides[i].
        rank: int8 [D+1, B, N].
        strides: int64 [D+1], the place values of c_0, .., c_(d-1), and 0 for the last coordinate.
        steps: int64 [D+2]. One step along axis j leads from a vertex to key + steps[j], and if the vertex has remainder
            0, which becomes D, to key + steps[j] + steps[D+1].
    """
    batch, _, d = features.shape
    elevated = elevate(features.movedim(-1, 0))
    base, rank = enclosing_simplex(elevated.detach())
    # The c_i of a corner is at most 1 lower than that of the corner 0. One value of each digit is spare: a step out of
    # the box of all vertices, on either side, leads to it and finds no vertex.
    low, high = torch.stack(base[:d].flatten(1).aminmax(dim=1)).long() + torch.tensor([[-1], [1]], device=base.device)
    spans = (high - low + 1).tolist()
    *strides, image = [(d + 1) * math.prod(spans[:i]) for i in range(d + 1)]
    if image * batch >= 2**62:
        raise ValueError(
            f"features spread over {' x '.join(map(str, spans))} lattice cells, too many to number in 64 bits; "
            "expected bandwidths that are not so small beside the features' range"
        )
    steps = low.new_tensor([*(stride - 1 for stride in strides), -1, d + 1 - sum(strides)])
    strides = low.new_tensor([*strides, 0])
    key = (strides[:d, None, None] * (base[:d].long() - low[:, None, None])).sum(0)  # [B, N]
    key = key + image * torch.arange(batch, device=key.device)[:, None]
    return barycentric(elevated, base, rank), key, rank, strides, steps


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
