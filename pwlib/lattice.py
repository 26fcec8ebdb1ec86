"""Gaussian filtering on the permutohedral lattice: splat, blur and slice as sparse sums.

A filter sum_j exp(-|f_i - f_j|^2 / 2) v_j over N points costs N^2. The permutohedral lattice (Adams, Baek & Davis 2010)
tiles feature space by simplices. A point hands its value to the d + 1 corners of the simplex it lies in, by barycentric
coordinates (splat); the values spread along the lattice's d + 1 directions, by [1/2, 1, 1/2] in each (blur); and the
point reads them back (slice). The cost is linear in N, the result approximate, and everything is differentiable:

    out = slice @ blur_d ... blur_0 @ splat @ values

Each factor is a sparse matrix, applied as `embedding_bag`: a bag sums a few weighted rows of a table. A blur along one
direction is symmetric, so the adjoint is the same chain reversed. Barycentric coordinates are piecewise linear in the
features, hence the bandwidths have a gradient too: that of the lattice operator itself.

The conventions are those of Kraehenbuehl & Koltun's reference code, whose marginals these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.filters import FilterBank, GaussianFilter

EPS = 1e-20  # the reference code's guard against an empty row


@dataclass(frozen=True)
class Lattice:
    """Where P points of dimension d meet the lattice; integers only, nothing here has a gradient.

    corner [P, d+1] int32: vertex of each corner. order [P(d+1)]: positions in corner.flatten(), sorted by vertex.
    point, offsets int32: the points of vertex v are point[offsets[v]:offsets[v+1]].
    neighbours [d+1, M, 3] int32: the vertex itself and its two neighbours per direction, M the number of vertices;
    taps [d+1, M, 3]: 1, 1/2, 1/2, or 0 where the neighbour is not a vertex of the lattice.
    """

    corner: Tensor
    order: Tensor
    point: Tensor
    offsets: Tensor
    neighbours: Tensor
    taps: Tensor

    @property
    def size(self) -> int:
        return self.offsets.shape[0] - 1

    def repeat(self, copies: int, points: int) -> Lattice:
        """The same lattice of `points` points for every image of a batch."""
        if copies == 1:
            return self
        shift = torch.arange(copies, dtype=torch.int32, device=self.corner.device)

        def tile(index: Tensor, step: int) -> Tensor:
            return (index + shift.to(index.dtype).view(-1, *[1] * index.ndim) * step).flatten(0, 1)

        neighbours = [tile(axis, self.size) for axis in self.neighbours]
        offsets = torch.cat([tile(self.offsets[:-1], len(self.point)), self.offsets[-1:] * copies])
        return Lattice(
            tile(self.corner, self.size),
            tile(self.order, len(self.order)),
            tile(self.point, points),
            offsets,
            torch.stack(neighbours),
            self.taps.repeat(1, copies, 1),
        )


def elevate(features: Tensor) -> Tensor:
    """Map features [P, d] into the hyperplane sum = 0 of R^(d+1), scaled so that the blur has unit variance. [d+1, P].

    Adams, Baek & Davis 2010, p. 5; the blur's own standard deviation sqrt(2/3) (d+1) is on p. 6.
    """
    d = features.shape[1]
    total = torch.zeros_like(features[:, 0])
    rows = []
    for j in range(d, 0, -1):
        f = features[:, j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        rows.append(total - j * f)
        total = total + f
    return torch.stack([total, *reversed(rows)])


@torch.no_grad()
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point: base [d+1, P] int32 (remainder-0 vertex / (d+1)), rank [d+1, P] int64."""
    axes = elevated.shape[0]
    base = torch.round(elevated * (1 / axes))
    rest = elevated - base * axes
    rank = torch.zeros_like(elevated)
    for i in range(axes - 1):
        below = (rest[i] < rest[i + 1 :]).to(rank.dtype)
        rank[i] += below.sum(0)
        rank[i + 1 :] += 1 - below
    # Rounding may leave the plane by a few steps: move the coordinates that were rounded furthest back onto it.
    rank += base.sum(0)
    shift = (rank < 0).to(rank.dtype) - (rank >= axes).to(rank.dtype)
    return (base + shift).to(torch.int64), (rank + axes * shift).to(torch.int64)


def barycentric(elevated: Tensor, base: Tensor, rank: Tensor) -> Tensor:
    """Barycentric coordinates [P, d+1] of the points in their simplices, differentiable in `elevated`."""
    axes = elevated.shape[0]
    rest = (elevated - (base * axes).to(elevated.dtype)) * (1 / axes)
    rest = torch.zeros_like(rest).scatter(0, rank, rest)  # descending along dim 0
    first = 1 + rest[-1] - rest[0]
    return torch.cat([first[None], (rest[:-1] - rest[1:]).flip(0)]).T.contiguous()


@torch.no_grad()
def build(base: Tensor, rank: Tensor, copies: int, dtype: torch.dtype) -> Lattice:
    """Number the vertices the simplices touch and link them to their points and neighbours.

    A vertex of remainder k has coordinates (d+1) c_i + k, with c_i = base_i or base_i - 1, so c_0 .. c_{d-1} and k name
    it. They are the digits of one integer: sorting integers finds equal vertices, adding a constant gives a neighbour.
    """
    axes, points = base.shape
    d = axes - 1
    device = base.device
    low = base[:d].amin(1) - 1
    # One spare value a digit: stepping outside the box in either direction lands on it and finds nothing.
    spans = (base[:d].amax(1) - low + 2).tolist()
    strides = [axes]
    for span in spans:
        strides.append(strides[-1] * span)
    slots = points * axes
    bits = max(1, (slots - 1).bit_length())
    if strides[-1] * copies >= 2**62:
        raise ValueError(
            f"features span {[s - 2 for s in spans]} lattice cells, too many to number in 63 bits: "
            "are they divided by their bandwidths?"
        )
    stride = torch.tensor([*strides[:d], 0], device=device)
    key = ((base[:d] - low[:, None]) * stride[:d, None]).sum(0)
    if copies > 1:
        key = key + torch.arange(copies, device=device).repeat_interleave(points // copies) * strides[-1]
    stride_of_rank = torch.zeros_like(rank).scatter_(0, rank, stride[:, None].expand_as(rank))
    keys = [key]
    for k in range(1, axes):
        keys.append(keys[-1] - stride_of_rank[axes - k] + 1)
    keys = torch.stack(keys, 1).flatten()

    if device.type == "cpu" and (strides[-1] * copies) << bits < 2**63:
        # numpy sorts plain integers with SIMD, much faster than any argsort: carry the position in the low bits.
        packed = keys << bits | torch.arange(slots)
        packed.numpy().sort()
        keys, order = packed >> bits, packed & ((1 << bits) - 1)
    else:
        keys, order = torch.sort(keys, stable=True)
    fresh = torch.ones(slots + 1, dtype=torch.bool, device=device)
    torch.ne(keys[1:], keys[:-1], out=fresh[1:-1])
    offsets = fresh.nonzero().squeeze(1)
    vertex = torch.cumsum(fresh[:-1], 0, dtype=torch.int32) - 1
    corner = torch.empty(slots, dtype=torch.int32, device=device)
    corner[order] = vertex

    # Neighbours: one step along direction j is -1 in every coordinate and d+1 more in coordinate j.
    keys = keys[offsets[:-1]]
    step = torch.where(keys % axes > 0, -1, axes - 1 - sum(strides[:d]))
    wanted = keys + step + stride[:, None]
    found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=len(keys) - 1)
    present = keys[found] == wanted
    me = torch.arange(len(keys), dtype=torch.int32, device=device).expand(axes, -1)
    neighbours = torch.stack([me, torch.where(present, found, me), me], 2)
    taps = torch.zeros(neighbours.shape, dtype=dtype, device=device)
    taps[..., 0] = 1
    taps[..., 1] = present * 0.5
    axis, here = present.nonzero(as_tuple=True)
    there = found[axis, here].long()
    neighbours[axis, there, 2] = here.int()
    taps[axis, there, 2] = 0.5
    point = (order // axes).int()
    return Lattice(corner.view(points, axes), order, point, offsets.int(), neighbours, taps)


def bag_sum(table: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """out[b] = sum of weight[e] * table[index[e]] over e in offsets[b] .. offsets[b+1]."""
    return F.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
    )  # fmt: skip


class Joint:
    """Several lattices over the same points behind one splat and one slice: their vertices are numbered through."""

    def __init__(self, lattices: list[Lattice]):
        self.lattices = lattices
        self.rows = [lattice.size for lattice in lattices]
        starts = [sum(self.rows[:m]) for m in range(len(lattices))]
        corner = torch.cat([x.corner + s for x, s in zip(lattices, starts, strict=True)], 1)
        self.points, self.corners = corner.shape
        self.corner = corner.flatten()
        self.slice_offsets = torch.arange(self.points + 1, dtype=torch.int32, device=corner.device) * self.corners
        self.point = torch.cat([x.point for x in lattices])
        ends = [sum(len(x.point) for x in lattices[:m]) for m in range(len(lattices))]
        offsets = [x.offsets[:-1] + e for x, e in zip(lattices, ends, strict=True)]
        self.splat_offsets = torch.cat([*offsets, offsets[0].new_tensor([len(self.point)])])
        # Position of every splat entry in the flattened [P, corners] weights.
        before = [sum(x.corner.shape[1] for x in lattices[:m]) for m in range(len(lattices))]
        self.order = torch.cat(
            [
                x.order + (x.order // x.corner.shape[1]) * (self.corners - x.corner.shape[1]) + b
                for x, b in zip(lattices, before, strict=True)
            ]
        )
        self.kernel_of_row = torch.repeat_interleave(torch.tensor(self.rows)).to(corner.device)
        self.blur_offsets = [torch.arange(n + 1, dtype=torch.int32, device=corner.device) * 3 for n in self.rows]

    def splat(self, values: Tensor, weight: Tensor) -> Tensor:
        return bag_sum(values, self.point, self.splat_offsets, weight.flatten()[self.order])

    def blur(self, table: Tensor, reverse: bool = False) -> Tensor:
        parts = []
        for lattice, offsets, part in zip(self.lattices, self.blur_offsets, table.split(self.rows), strict=True):
            axes = range(lattice.corner.shape[1])
            for j in reversed(axes) if reverse else axes:
                part = bag_sum(part, lattice.neighbours[j].flatten(), offsets, lattice.taps[j].flatten())
            parts.append(part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def slice(self, table: Tensor, weight: Tensor) -> Tensor:
        return bag_sum(table, self.corner, self.slice_offsets, weight.flatten())

    def dots(self, values: Tensor, table: Tensor) -> Tensor:
        """values[p] . table[corner[p, k]], [P, corners]: the gradient of a splat's or a slice's weights."""
        bag = torch.arange(self.points, dtype=torch.int32, device=values.device).repeat_interleave(self.corners)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            values, table, self.corner, self.slice_offsets, bag, 0
        ).view(self.points, self.corners)

    def mix(self, table: Tensor, mixing: Tensor) -> Tensor:
        """Scale each kernel's rows by its weight (mixing [M]) or mix their channels (mixing [M, C, C'])."""
        if mixing.dim() == 1:
            return table * mixing[self.kernel_of_row, None]
        parts = table.split(self.rows)
        return torch.cat([part @ matrix for part, matrix in zip(parts, mixing, strict=True)])


class _Apply(torch.autograd.Function):
    """slice @ mix @ blur @ splat @ values; gradients to values [P, C], both weights [P, corners] and mixing."""

    @staticmethod
    def forward(ctx, values, splat_weight, slice_weight, mixing, joint):
        blurred = joint.blur(joint.splat(values, splat_weight))
        mixed = joint.mix(blurred, mixing)
        ctx.joint = joint
        ctx.save_for_backward(values, splat_weight, slice_weight, mixing, blurred, mixed)
        return joint.slice(mixed, slice_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, splat_weight, slice_weight, mixing, blurred, mixed = ctx.saved_tensors
        joint, needs, out = ctx.joint, ctx.needs_input_grad, [None] * 5
        grad = grad.contiguous()
        if needs[2]:
            out[2] = joint.dots(grad, mixed)
        if needs[0] or needs[1] or needs[3]:
            table = joint.splat(grad, slice_weight)
            if needs[3]:
                pairs = list(zip(blurred.split(joint.rows), table.split(joint.rows), strict=True))
                out[3] = torch.stack([(b * t).sum() if mixing.dim() == 1 else b.T @ t for b, t in pairs])
            table = joint.blur(joint.mix(table, mixing if mixing.dim() == 1 else mixing.mT), reverse=True)
            if needs[0]:
                out[0] = joint.slice(table, splat_weight)
            if needs[1]:
                out[1] = joint.dots(values, table)
        return tuple(out)


class LatticeFilter(GaussianFilter):
    """One Gaussian kernel on the permutohedral lattice: filt(values [B, N, C]) -> [B, N, C].

    Args:
        features: [B, N, d] or [1, N, d] for any batch, divided by their bandwidths: k(i, j) = exp(-|f_i - f_j|^2 / 2).
        normalization, self_message: as for every `GaussianFilter`; n and k(i, i) are the lattice's own.

    Float32 or float64, any device, deterministic. Raises ValueError for features that are not finite or that spread
    over more lattice cells than 63 bits can number.
    """

    def __init__(self, features: Tensor, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        if features.ndim != 3 or features.numel() == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D], none of them zero")
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinity; expected finite numbers (is a bandwidth zero?)")
        self.batch, self.pixels, d = features.shape
        flat = features.reshape(-1, d)
        # Far from the origin float32 has too few digits left to place a point inside its simplex.
        elevated = elevate(flat.double() if flat.detach().abs().max() > 2**12 else flat)
        base, rank = enclosing_simplex(elevated)
        self.lattice = build(base, rank, self.batch, features.dtype)
        self.weight = barycentric(elevated, base, rank).to(features.dtype)
        self.gain = 1 / (1 + 2.0**-d)  # the reference code's alpha: an isolated vertex answers 1 + 2^-d to itself
        self.joint = Joint([self.lattice])
        one = torch.ones_like(self.weight[:, :1])
        n = _Apply.apply(one, self.weight, self.weight * self.gain, one[0], self.joint)
        self.n = n.view(self.batch, self.pixels, 1)
        if not self_message:
            self.own = torch.minimum(_self_weight(self.weight, self.gain), n).view_as(self.n)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Weights of the splat and the slice, [B N, d+1], with the normalisation folded in."""
        n = self.n.reshape(-1, 1) + EPS
        if self.normalization == "symmetric":
            scaled = self.weight * n.rsqrt()
            return scaled, scaled * self.gain
        read = self.weight * self.gain
        return self.weight, read / n if self.normalization == "row" else read

    def own_share(self) -> Tensor:
        """What a pixel's message holds of its own value, [B, N, 1], normalised."""
        return self.own if self.normalization == "none" else self.own / (self.n + EPS)

    def __call__(self, values: Tensor) -> Tensor:
        return LatticeBank.of([self])(values, values.new_ones(1))


class LatticeBank(FilterBank):
    """Several kernels over the same pixels, each on a lattice, all behind one splat and one slice."""

    def __init__(self, features: Sequence[Tensor], *, normalization: str = "symmetric", self_message: bool = True):
        options = {"normalization": normalization, "self_message": self_message}
        self._join([LatticeFilter(f, **options) for f in features])

    @classmethod
    def of(cls, filters: Sequence[LatticeFilter]) -> LatticeBank:
        bank = cls.__new__(cls)
        bank._join(list(filters))
        return bank

    def _join(self, filters: list[LatticeFilter], batch: int | None = None) -> None:
        self.filters = filters
        self.batch = batch or max(f.batch for f in filters)
        copies = [self.batch // f.batch for f in filters]
        self.joint = Joint([f.lattice.repeat(n, f.batch * f.pixels) for f, n in zip(filters, copies, strict=True)])
        scales = [[w.repeat(n, 1) for w in f.scales()] for f, n in zip(filters, copies, strict=True)]
        self.splat_weight, self.slice_weight = (torch.cat(w, 1) for w in zip(*scales, strict=True))

    def __call__(self, values: Tensor, weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        """sum_m weights[m] * message_m (@ compatibility [C, C'], where given): [B, N, C] -> [B, N, C]."""
        if len(values) != self.batch:
            self._join(self.filters, len(values))
        flat = values.reshape(-1, values.shape[-1])
        mixing = weights if compatibility is None else weights[:, None, None] * compatibility
        out = _Apply.apply(flat, self.splat_weight, self.slice_weight, mixing, self.joint).view(*values.shape[:2], -1)
        if not self.filters[0].self_message:
            own = values * sum(w * f.own_share() for w, f in zip(weights, self.filters, strict=True))
            out = out - (own if compatibility is None else own @ compatibility)
        return out


def _self_weight(weight: Tensor, gain: float) -> Tensor:
    """k(i, i) as the lattice has it, [P, 1], where all vertices around the point exist; weight [P, d+1] barycentric.

    Two corners k apart are joined by k steps, or by d + 1 - k steps the other way round, each halving the value.
    """
    axes = weight.shape[1]
    apart = (torch.arange(axes)[:, None] - torch.arange(axes)).abs().to(weight)
    response = 2.0**-apart + torch.where(apart == 0, 2.0 * 2.0**-axes, 2.0 ** (apart - axes))
    return ((weight @ response) * weight).sum(1, keepdim=True) * gain
