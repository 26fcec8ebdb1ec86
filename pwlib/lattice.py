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

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.filters import FilterBank, GaussianFilter, GridPositions

EPS = 1e-20  # the reference code's guard against an empty row
BLOCK = 2**14  # points, a power of 2: few enough that their values stay at hand while their bags are summed
CACHE = 2**21
LARGE = 2**12  # beyond it float32 has too few digits left to place a point inside its simplex


@dataclass(frozen=True)
class Lattice:
    """Where P points of dimension d meet the lattice; integers only, nothing here has a gradient.

    corner [P, d+1] int32: the vertex at each corner of each point's simplex. The other way round, in two steps: a bag
    holds what one vertex hears from one block of `BLOCK` points. order [P(d+1)] int32: the positions in
    corner.flatten(), sorted by bag; point = order // (d+1); bags [bags+1] int32: where each begins. heard [bags] int32:
    the bags, sorted by vertex; offsets [M+1] int32: where each vertex begins.

    neighbours [d+1, M, 3] int32: per direction the vertex itself and the two beside it. The last vertex stands for all
    that no point touches: it hears nothing, and is the neighbour of those at the border.
    """

    corner: Tensor
    order: Tensor
    point: Tensor
    bags: Tensor
    heard: Tensor
    offsets: Tensor
    neighbours: Tensor

    @property
    def size(self) -> int:
        """M, the number of vertices."""
        return len(self.offsets) - 1

    def repeat(self, copies: int) -> Lattice:
        """The same points once more for every image of a batch."""
        if copies == 1:
            return self
        shift = torch.arange(copies, device=self.corner.device)

        def tile(index: Tensor, step: int) -> Tensor:
            return (index + shift.to(index.dtype).view(-1, *[1] * index.ndim) * step).flatten(0, 1)

        return Lattice(
            tile(self.corner, self.size),
            tile(self.order, len(self.order)),
            tile(self.point, len(self.corner)),
            torch.cat([tile(self.bags[:-1], len(self.order)), self.bags[-1:] * copies]),
            tile(self.heard, len(self.heard)),
            torch.cat([tile(self.offsets[:-1], len(self.heard)), self.offsets[-1:] * copies]),
            torch.stack([tile(direction, self.size) for direction in self.neighbours]),
        )


def elevate(features: Tensor) -> Tensor:
    """Features [P, d] in the hyperplane sum = 0 of R^(d+1), [d+1, P], scaled so that the blur has unit variance.

    Adams, Baek & Davis 2010, p. 5; the standard deviation of the blur, sqrt(2/3) (d+1), is on p. 6.
    """
    d = features.shape[1]
    features = features.T
    total, rows = torch.zeros_like(features[0]), []
    for j in range(d, 0, -1):
        scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        rows.append(total - j * scaled)
        total = total + scaled
    return torch.stack([total, *reversed(rows)])


@torch.no_grad()
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point: its remainder-0 vertex over d+1, and the rank of each coordinate, largest first.

    Both [d+1, P]: base in the dtype of `elevated` (whole numbers), rank int8.
    """
    axes = len(elevated)
    base = torch.round(elevated * (1 / axes))
    rest = elevated - base * axes
    # Comparing pairs of rows is cheaper than sorting columns, and bytes are cheaper than words.
    rank = torch.arange(axes, dtype=torch.int8, device=base.device)[:, None].repeat(1, base.shape[1])
    for i in range(axes - 1):
        below = (rest[i] < rest[i + 1 :]).view(torch.int8)
        rank[i + 1 :] -= below
        for row in below:
            rank[i] += row
    # Rounding may leave the plane by a few steps: put the coordinates that were rounded furthest back onto it.
    rank += base.sum(0).to(torch.int8)
    shift = (rank < 0).view(torch.int8) - (rank >= axes).view(torch.int8)
    return base.add_(shift), rank.add_(shift, alpha=axes)


def barycentric(elevated: Tensor, base: Tensor) -> Tensor:
    """Barycentric coordinates [P, d+1] of the points in their simplices, differentiable in `elevated`."""
    axes = len(elevated)
    rest = list((elevated - base * axes) * (1 / axes))
    for i, j in itertools.combinations(range(axes), 2):  # sorted in descending order, by exchange
        rest[i], rest[j] = torch.maximum(rest[i], rest[j]), torch.minimum(rest[i], rest[j])
    return torch.stack([1 + rest[-1] - rest[0], *(a - b for a, b in reversed([*itertools.pairwise(rest)]))], 1)


@torch.no_grad()
def build(base: Tensor, rank: Tensor, images: int) -> Lattice:
    """Number the vertices that the simplices touch, and link them to their points and to their neighbours.

    A vertex of remainder k has coordinates (d+1) c_i + k, with c_i = base_i or base_i - 1, so c_0 .. c_{d-1} and k name
    it. They are the digits of one integer, its key: sorting keys finds equal vertices, adding a constant gives a
    neighbour. The points are those of `images` images in turn, each with a lattice of its own.
    """
    axes, points = rank.shape
    d, device = axes - 1, rank.device
    low = base[:d].amin(1) - 1
    # One spare value a digit: a step out of the box, on either side, lands on it and finds nothing.
    spans = [int(span) for span in (base[:d].amax(1) - low + 2).tolist()]
    strides = [axes * math.prod(spans[:i]) for i in range(axes)]
    bound = strides[d] * images
    if bound * (points // BLOCK + 1) >= 2**62:
        raise ValueError(
            f"features spread over {' x '.join(map(str, spans))} lattice cells, too many to number in 64 bits; "
            "expected bandwidths that are not so small beside the features' range"
        )
    key = torch.zeros(points, dtype=torch.int64, device=device)
    for i in range(d):
        key.add_((base[i] - low[i]).long(), alpha=strides[i])
    if images > 1:
        key += torch.arange(images, device=device).repeat_interleave(points // images) * strides[d]

    members, counts, simplex = _simplices(key, rank, bound)
    starts = counts.cumsum(0) - counts
    first, simplices = members.index_select(0, starts), len(starts)
    # From remainder k-1 to k: one more in every coordinate, d+1 less in the one whose turn it is by rank.
    stride = torch.tensor([*strides[:d], 0], device=device)
    ranks = torch.stack([row.index_select(0, first) for row in rank]).long()
    turn = torch.empty_like(ranks).scatter_(0, ranks, (1 - stride)[:, None].expand_as(ranks))
    keys = torch.cat([key.index_select(0, first)[None], turn.flip(0)[:-1]]).cumsum_(0)

    blocks = (points - 1) // BLOCK + 1
    keys += first // BLOCK * bound
    keys, corners = _sort(keys.flatten(), blocks * bound)  # corners: k * simplices + simplex
    keys, bag, shared = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    keys, heard = _sort(keys % bound, bound)
    keys, vertex, heard_from = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    vertex = torch.empty_like(vertex).scatter_(0, heard, vertex).index_select(0, bag)
    corner = torch.empty_like(vertex).scatter_(0, corners, vertex).view(axes, -1).int().T.contiguous()
    offsets = F.pad(heard_from.cumsum(0), (1, 1), value=0)
    offsets[-1] = offsets[-2]

    # The points of a simplex are neighbours in `members`: a bag is a few runs of it.
    k, home = corners // simplices, corners % simplices
    lengths = counts.index_select(0, home)
    bags = F.pad(lengths.cumsum(0).index_select(0, shared.cumsum(0) - 1), (1, 0))
    runs = _runs(k * points + starts.index_select(0, home), lengths, axes * points)
    members = members.int()
    order = members * axes + torch.arange(axes, dtype=torch.int32, device=device)[:, None]
    order, point = order.flatten().index_select(0, runs), members.repeat(axes).index_select(0, runs)

    # One step in direction j: one less in every coordinate, d+1 more in coordinate j.
    vertices = len(keys)
    wanted = keys + torch.where(keys % axes > 0, -1, d - sum(strides[:d])) + stride[:, None]
    if device.type == "cpu":  # the wanted keys are sorted too, which numpy's search makes use of
        ahead = torch.from_numpy(np.searchsorted(keys.numpy(), wanted.numpy())).clamp_(max=vertices - 1)
    else:
        ahead = torch.searchsorted(keys, wanted).clamp_(max=vertices - 1)
    ahead = ahead.where(keys.index_select(0, ahead.flatten()).view_as(ahead) == wanted, vertices)
    me = torch.arange(vertices, device=device).expand(axes, -1)
    behind = torch.full((axes, vertices + 1), vertices, device=device).scatter_(1, ahead, me)
    behind[:, vertices] = vertices
    me, ahead = (F.pad(index, (0, 1), value=vertices) for index in (me, ahead))
    neighbours = torch.stack([me, ahead, behind], 2)
    return Lattice(
        corner.index_select(0, simplex), order, point, bags.int(), heard.int(), offsets.int(), neighbours.int()
    )


def _simplices(key: Tensor, rank: Tensor, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which points of a block share a simplex, as neighbouring pixels do: the fewer corners there are to sort.

    members [P]: the points, simplex by simplex, block by block. counts [S]: how many each has. simplex [P]: of a point.
    """
    axes, points = rank.shape
    digit, low = (axes - 1).bit_length(), (BLOCK - 1).bit_length()
    bits = (bound // axes).bit_length() + digit * (axes - 1)  # of a name: the remainder-0 vertex, and the ranks
    members = torch.arange(points, device=key.device)
    if (points >> low).bit_length() + bits + low > 62:
        return members, torch.ones_like(members), members  # too wide to sort beside a place: each point its own
    name = key // axes << digit * (axes - 1)
    for i in range(axes - 1):
        name.add_(rank[i], alpha=1 << digit * i)
    # One integer: block, name, place within the block.
    name = ((members >> low << bits) + name << low) + (members & (BLOCK - 1))
    name = _sort_(name)
    members = (name >> bits + low << low) + (name & (BLOCK - 1))
    _, simplex, counts = torch.unique_consecutive(name >> low, return_inverse=True, return_counts=True)
    return members, counts, torch.empty_like(simplex).scatter_(0, members, simplex)


def _sort_(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort().values
    keys.numpy().sort()  # numpy has SIMD for this
    return keys


def _sort(keys: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Keys [P] below `bound`, sorted, and the place each had before."""
    bits = (len(keys) - 1).bit_length()
    if bound >= 2 ** (63 - bits):
        return keys.sort(stable=True)
    # Plain integers sort much faster than pairs: carry the place in the low bits.
    keys = _sort_((keys << bits) + torch.arange(len(keys), device=keys.device))
    return keys >> bits, keys & ((1 << bits) - 1)


def _runs(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """starts[0], starts[0] + 1, .. lengths[0] of them, then starts[1], ..: int32 [total]."""
    shift = (starts - lengths.cumsum(0) + lengths).int()
    if shift.is_cuda:
        shift = shift.repeat_interleave(lengths, output_size=total)
    else:
        shift = torch.from_numpy(np.repeat(shift.numpy(), lengths.numpy()))
    return shift.add_(torch.arange(total, dtype=torch.int32, device=shift.device))


def bag_sum(table: Tensor, index: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """out[b] = sum of weight[e] table[index[e]] over offsets[b] <= e < offsets[b+1]; no weight: 1."""
    options = {"mode": "sum", "per_sample_weights": weight, "include_last_offset": True}
    return F.embedding_bag(index, table, offsets, **options)


class Weights:
    """Weights [P, corners] of the corners of several lattices over the same points, as they are sliced and splatted."""

    def __init__(self, rows: Tensor, lattices: Sequence[Lattice]):
        self.rows, self.lattices = rows, lattices

    @cached_property
    def sorted(self) -> list[Tensor]:
        parts = self.rows.detach().split([lattice.corner.shape[1] for lattice in self.lattices], 1)
        pairs = zip(parts, self.lattices, strict=True)
        return [part.reshape(-1).index_select(0, lattice.order) for part, lattice in pairs]


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


class Joint:
    """Several lattices over the same points behind one slice: for that, their vertices are numbered through."""

    def __init__(self, lattices: Sequence[Lattice]):
        self.lattices, self.sizes = lattices, [lattice.size for lattice in lattices]
        starts = itertools.accumulate(self.sizes, initial=0)
        corners = [f.corner + start if start else f.corner for f, start in zip(lattices, starts, strict=False)]
        self.corner = _cat(corners, 1)
        self.points, self.corners = self.corner.shape

    def _steps(self, count: int, step: int) -> Tensor:
        return torch.arange(0, count * step + 1, step, dtype=torch.int32, device=self.corner.device)

    @cached_property
    def slice_offsets(self) -> Tensor:
        return self._steps(self.points, self.corners)

    @cached_property
    def blur_offsets(self) -> Tensor:
        return self._steps(max(self.sizes), 3)

    @cached_property
    def owner(self) -> Tensor:
        return self.slice_offsets.new_tensor(range(self.points)).repeat_interleave(self.corners)

    def splat(self, values: Tensor, weights: Weights) -> list[Tensor]:
        """[P, C] -> [M, C], a part a lattice"""
        pairs = zip(self.lattices, weights.sorted, strict=True)
        return [bag_sum(bag_sum(values, f.point, f.bags, weight), f.heard, f.offsets) for f, weight in pairs]

    def blur(self, parts: Sequence[Tensor], reverse: bool = False) -> list[Tensor]:
        """[M, C] -> [M, C], each part along its own lattice's directions"""
        taps, blurred = parts[0].new_tensor([1, 0.5, 0.5]).repeat(max(self.sizes)), []
        for lattice, part in zip(self.lattices, parts, strict=True):
            for neighbours in lattice.neighbours.flip(0) if reverse else lattice.neighbours:
                offsets = self.blur_offsets[: lattice.size + 1]
                part = bag_sum(part, neighbours.flatten(), offsets, taps[: 3 * lattice.size])
            blurred.append(part)
        return blurred

    def slice(self, table: Tensor, weights: Weights, first: int = 0, last: int | None = None) -> Tensor:
        """[M, C] -> [P, C], or those of the points first <= p < last only"""
        rows = weights.rows.detach()[first:last]
        corner = self.corner[first:last]
        return bag_sum(table, corner.flatten(), self.slice_offsets[: len(rows) + 1], rows.flatten())

    def dots(self, values: Tensor, table: Tensor) -> Tensor:
        """values[p] . table[corner[p, k]], [P, corners]: the gradient of a splat's and of a slice's weights."""
        backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return backward(values, table, self.corner.flatten(), self.slice_offsets, self.owner, 0).view(
            self.points, self.corners
        )


def _mix(part: Tensor, mixing: Tensor) -> Tensor:
    return part @ mixing if mixing.ndim else part * mixing


class _Apply(torch.autograd.Function):
    """slice @ mix @ blur @ splat @ values, with gradients to values [P, C], both weights [P, corners] and the mixing.

    mixing [M] scales each kernel's share, mixing [M, C, C'] also mixes its channels: on the lattice's vertices, which
    are fewer than the pixels.
    """

    @staticmethod
    def forward(ctx, values, splat_rows, slice_rows, mixing, joint, splat_weights, slice_weights):
        blurred = joint.blur(joint.splat(values, splat_weights))
        table = _cat([_mix(part, m) for part, m in zip(blurred, mixing, strict=True)])
        ctx.extras = joint, splat_weights, slice_weights
        ctx.save_for_backward(values, mixing, table, *blurred)
        return joint.slice(table, slice_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, mixing, table, *blurred = ctx.saved_tensors
        joint, splat_weights, slice_weights = ctx.extras
        grad = grad.contiguous()
        to_values = to_splat = to_slice = to_mixing = None
        if ctx.needs_input_grad[2]:
            to_slice = joint.dots(grad, table)
        parts = joint.splat(grad, slice_weights)
        if ctx.needs_input_grad[3]:
            pairs = zip(blurred, parts, strict=True)
            to_mixing = torch.stack([b.T @ p if mixing.ndim > 1 else (b * p).sum() for b, p in pairs])
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            mixed = [_mix(part, m.T if m.ndim else m) for part, m in zip(parts, mixing, strict=True)]
            back = _cat(joint.blur(mixed, reverse=True))
            if ctx.needs_input_grad[0]:
                to_values = joint.slice(back, splat_weights)
            if ctx.needs_input_grad[1]:
                to_splat = joint.dots(values, back)
        return to_values, to_splat, to_slice, to_mixing, None, None, None


class LatticeFilter(GaussianFilter):
    """One Gaussian kernel on the permutohedral lattice: filt(values [B, N, C]) -> [B, N, C].

    Args:
        features: [B, N, D] divided by their bandwidths, so that k(i, j) = exp(-|f_i - f_j|^2 / 2); [1, N, D] serves any
            batch of values.
        normalization, self_message: as for every `GaussianFilter`; n and k(i, i) are the lattice's own.

    Float32 or float64, any device, deterministic. Raises ValueError for features that are not finite, or that spread
    over more lattice cells than 62 bits can number.
    """

    def __init__(self, features: Tensor, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        if features.ndim != 3 or features.numel() == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D], none of them zero")
        largest = features.detach().abs().max()
        if not torch.isfinite(largest):
            raise ValueError("features hold NaN or infinity; expected finite numbers (is a bandwidth zero?)")
        self.batch, pixels, d = features.shape
        elevated = elevate((features.double() if largest > LARGE else features).reshape(-1, d))
        base, rank = enclosing_simplex(elevated)
        self.lattice = build(base, rank, self.batch)
        self.weight = barycentric(elevated, base).to(features.dtype)
        self.gain = 1 / (1 + 2.0**-d)  # the reference code's alpha: what an isolated vertex hears of itself is 1 + 2^-d
        weights, one = Weights(self.weight, [self.lattice]), torch.ones_like(self.weight[:, :1])
        n = _Apply.apply(one, weights.rows, weights.rows, one[0] * self.gain, Joint([self.lattice]), weights, weights)
        self.n = n.view(self.batch, pixels, 1)
        if not self_message:
            self.own = torch.minimum(_self_weight(self.weight) * self.gain, n).view_as(self.n)

    def ends(self, copies: int) -> tuple[Tensor, Tensor]:
        """Weights of the splat and of the slice, [copies B N, D+1], with the normalisation folded in."""
        n = self.n.reshape(-1, 1) + EPS
        read = write = self.weight
        if self.normalization == "symmetric":
            read = write = self.weight * n.rsqrt()
        elif self.normalization == "row":
            read = self.weight / n
        return (write, read) if copies == 1 else (write.repeat(copies, 1), read.repeat(copies, 1))

    def own_share(self) -> Tensor:
        """What of its own value a pixel's normalised message holds, [B, N, 1]."""
        return self.own if self.normalization == "none" else self.own / (self.n + EPS)

    def __call__(self, values: Tensor) -> Tensor:
        return LatticeBank.of([self])(values, values.new_ones(1))


class LatticeBank(FilterBank):
    """Several kernels over the same pixels, each on a lattice, all behind one splat and one slice.

    features: one [B, N, D] (or [1, N, D]) a kernel, or `GridPositions`, whose lattice is kept for the next image.
    """

    def __init__(
        self,
        features: Sequence[Tensor | GridPositions],
        *,
        normalization: str = "symmetric",
        self_message: bool = True,
    ):
        make = {"normalization": normalization, "self_message": self_message}
        super().__init__(
            [_grid(f, **make) if isinstance(f, GridPositions) else LatticeFilter(f, **make) for f in features]
        )
        self._join(max(f.batch for f in self.filters))

    @classmethod
    def of(cls, filters: Sequence[LatticeFilter]) -> LatticeBank:
        """The bank of filters that exist already."""
        bank = cls.__new__(cls)
        FilterBank.__init__(bank, filters)
        bank._join(max(f.batch for f in filters))
        return bank

    def _join(self, batch: int) -> None:
        self.batch = batch
        copies = [batch // f.batch for f in self.filters]
        lattices = [f.lattice.repeat(n) for f, n in zip(self.filters, copies, strict=True)]
        self.joint = Joint(lattices)
        write, read = zip(*(f.ends(n) for f, n in zip(self.filters, copies, strict=True)), strict=True)
        self.write = Weights(_cat(write, 1), lattices)
        self.read = self.write if read[0] is write[0] else Weights(_cat(read, 1), lattices)
        self.gain = self.write.rows.new_tensor([f.gain for f in self.filters])

    def __call__(self, values: Tensor, weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        """sum_m weights[m] message_m (@ compatibility [C, C'], where given): [B, N, C] -> [B, N, C]."""
        if len(values) != self.batch:
            self._join(len(values))
        mixing = weights * self.gain
        if compatibility is not None:
            mixing = mixing[:, None, None] * compatibility
        flat = values.reshape(-1, values.shape[-1])
        out = _Apply.apply(flat, self.write.rows, self.read.rows, mixing, self.joint, self.write, self.read)
        out = out.view(*values.shape[:2], -1)
        if self.filters[0].self_message:
            return out
        own = values * sum(w * f.own_share() for w, f in zip(weights, self.filters, strict=True))
        return out - (own if compatibility is None else own @ compatibility)

    @torch.no_grad()
    def mean_field(self, logits: Tensor, weights: Tensor, compatibility: Tensor, iterations: int) -> Tensor:
        """log_q [B, N, K] after `iterations` of q <- softmax(logits - (sum_m weights[m] message_m(q)) @ compatibility).

        What `__call__` does inside a loop, without a gradient and with fewer passes over memory.
        """
        batch, pixels, labels = logits.shape
        if batch != self.batch:
            self._join(batch)
        # Rows that fill whole vector registers: the added labels have probability zero.
        spare = -labels % 8 if logits.dtype == torch.float32 and labels > 4 else 0
        rows = F.pad(logits, (0, spare), value=-1e30)
        costs = F.pad(compatibility, (0, spare, 0, spare))
        mixing = -(weights * self.gain)[:, None, None] * costs
        own = None
        if not self.filters[0].self_message:
            own = sum(w * f.own_share() for w, f in zip(weights, self.filters, strict=True)).expand(batch, -1, -1)
        q, log_q = torch.softmax(rows, -1), logits.mT.contiguous()
        table = rows.new_empty(sum(self.joint.sizes), labels + spare)
        # On a CPU so many pixels at a time that what is done to them is done in its cache.
        chunk = pixels if logits.is_cuda else max(1, CACHE // (4 * (labels + spare)))
        for step in range(iterations):
            parts = self.joint.splat(q.view(-1, labels + spare), self.write)
            for part, matrix, out in zip(self.joint.blur(parts), mixing, table.split(self.joint.sizes), strict=True):
                torch.mm(part, matrix, out=out)
            for image, first in itertools.product(range(batch), range(0, pixels, chunk)):
                some = slice(first, min(first + chunk, pixels))
                energy = self.joint.slice(table, self.read, image * pixels + some.start, image * pixels + some.stop)
                score = energy.add_(rows[image, some])
                if own is not None:
                    score += (q[image, some] * own[image, some]) @ costs
                if step + 1 < iterations:
                    torch.softmax(score, -1, out=q[image, some])
                else:
                    log_q[image, :, some] = score[:, :labels].T
        return torch.log_softmax(log_q, 1).mT


def _self_weight(weight: Tensor) -> Tensor:
    """k(i, i) on the lattice, before the gain, [P, 1], where all vertices around a point exist; weight barycentric.

    Two corners k apart are joined by k steps, and by d + 1 - k steps the other way round; each step halves the value.
    """
    axes = weight.shape[1]
    apart = (torch.arange(axes)[:, None] - torch.arange(axes)).abs().to(weight)
    response = 2.0**-apart + torch.where(apart == 0, 2.0 * 2.0**-axes, 2.0 ** (apart - axes))
    return ((weight @ response) * weight).sum(1, keepdim=True)


_grids: OrderedDict[tuple, LatticeFilter] = OrderedDict()


def _grid(positions: GridPositions, **options) -> LatticeFilter:
    """The filter of a spatial kernel; the last four are kept, since images share their size and the bandwidth."""
    theta = positions.theta
    if theta.requires_grad and torch.is_grad_enabled():
        return LatticeFilter(positions.features(), **options)
    key = (positions.height, positions.width, theta.item(), theta.dtype, theta.device, *options.values())
    if key not in _grids:
        with torch.inference_mode(False), torch.no_grad():
            _grids[key] = LatticeFilter(GridPositions(*key[:2], theta.detach().clone()).features(), **options)
    _grids.move_to_end(key)
    while len(_grids) > 4:
        _grids.popitem(last=False)
    return _grids[key]
