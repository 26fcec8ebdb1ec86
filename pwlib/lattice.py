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
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.crew import crew
from pwlib.filters import FilterBank, GaussianFilter, GridPositions

warnings.filterwarnings(
    "ignore", "Sparse CSR tensor support is in beta"
)  # what is used of it, in `Joint.dots`, is tested

EPS = 1e-20  # the reference code's guard against an empty row
BLOCK = 2**14  # points, a power of 2: few enough that their values stay at hand while their bags are summed
LEAST = -1e30  # in place of minus infinity
FLOOR = -30.0  # of a score: exp(-30) is nothing beside a probability in float32, and far from its underflow
MULTIPLIER = 0x2545F4914F6CDD1D  # of xorshift64*: spreads keys well (the golden ratio's multiples do not)
LARGE = 2**12  # beyond it float32 has too few digits left to place a point inside its simplex


@dataclass(frozen=True)
class Lattice:
    """Where P points of dimension d meet the lattice; integers only, nothing here has a gradient.

    corner [P, d+1] int32: the vertex at each corner of each point's simplex. The other way round, in two steps: a bag
    holds what one vertex hears from one block of points. blocks: the points of each block; parts: of each block in
    turn, order, point and bags. order [points (d+1)] int32: bag by bag, the entries of a bag, each the point's place in
    the block << bits | the corner, with bits = (d+1).bit_length(); point = order >> bits; bags [bags+1] int32: where
    each begins. heard [all blocks' bags] int32: the bags, sorted by vertex; offsets [M+1] int32: where each vertex
    begins.

    neighbours [d+1, M, 3] int32: per direction the vertex itself and the two beside it. The last vertex stands for all
    that no point touches: it hears nothing, and is the neighbour of those at the border.
    """

    corner: Tensor
    blocks: list[slice]
    parts: list[tuple[Tensor, Tensor, Tensor]]
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

        def tile(index: Tensor, step: int, dim: int = 0) -> Tensor:
            return torch.cat([index + copy * step for copy in range(copies)], dim)

        points, heard = len(self.corner), len(self.heard)
        blocks = [(block, copy * points) for copy in range(copies) for block in self.blocks]
        return Lattice(
            tile(self.corner, self.size),
            [slice(block.start + start, block.stop + start) for block, start in blocks],
            self.parts * copies,
            tile(self.heard, heard),
            torch.cat([tile(self.offsets[:-1], heard), self.offsets[-1:] * copies]),
            tile(self.neighbours, self.size, 1),
        )


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of one image's points, which one thread embeds at a time.

    Blocks, of `block` points (the last may have fewer), are for a processor's cache when messages pass. Here a part has
    several: operations on few points cost threads more than they do.
    """

    image: int
    points: slice
    block: int

    @property
    def blocks(self) -> list[slice]:
        starts = range(self.points.start, self.points.stop, self.block)
        return [slice(start, min(start + self.block, self.points.stop)) for start in starts]

    @staticmethod
    def of(images: int, pixels: int, device: torch.device, count: int) -> list[Part]:
        if device.type == "cuda":  # a GPU sums all points at once
            block = step = 1 << (pixels - 1).bit_length()
        else:
            block = BLOCK
            step = block * math.ceil(math.ceil(pixels / block) / math.ceil(count / images))
        starts = [(image, start) for image in range(images) for start in range(0, pixels, step)]
        return [
            Part(image, slice(image * pixels + start, image * pixels + min(start + step, pixels)), block)
            for image, start in starts
        ]


def elevate(features: Tensor) -> Tensor:
    """Features [d, P] in the hyperplane sum = 0 of R^(d+1), [d+1, P], scaled so that the blur has unit variance.

    Adams, Baek & Davis 2010, p. 5; the standard deviation of the blur, sqrt(2/3) (d+1), is on p. 6.
    """
    # One sum after the other, and no product of matrices: on a pixel grid coordinates are equal, modulo the simplex, at
    # many points (x = 0, y a multiple of the bandwidth), and have to stay so to the last digit. Which vertices there
    # are hangs on such ties.
    d, rows, total = len(features), [], torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        scaled = features[j - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        rows.append(torch.sub(total, scaled, alpha=j))
        total = total + scaled
    return torch.stack([total, *reversed(rows)])


@torch.no_grad()
def enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor]:
    """The simplex around each point: its remainder-0 vertex over d+1, and the rank of each coordinate, largest first.

    Both [d+1, P]: base in the dtype of `elevated` (whole numbers), rank int8.
    """
    axes = len(elevated)
    base = torch.round(elevated * (1 / axes))
    rest = torch.sub(elevated, base, alpha=axes)
    # Comparing pairs of rows is cheaper than sorting columns, and bytes are cheaper than words.
    rank = torch.arange(axes, dtype=torch.int8, device=base.device)[:, None].repeat(1, base.shape[1])
    for apart in range(1, axes):
        below = _less(rest[:-apart], rest[apart:])
        rank[apart:].sub_(below)
        rank[:-apart].add_(below)
    # Rounding may leave the plane by a few steps: put the coordinates that were rounded furthest back onto it.
    rank += base.sum(0).to(torch.int8)
    zero = torch.zeros_like(rank[0])
    shift = _less(rank, zero) - _less(zero + (axes - 1), rank)
    return base.add_(shift), rank.add_(shift, alpha=axes)


def _less(one: Tensor, other: Tensor) -> Tensor:
    """one < other, int8."""
    if one.is_cuda:
        return (one < other).view(torch.int8)
    return torch.from_numpy(np.less(one.numpy(), other.numpy()).view(np.int8))  # three times faster than torch


def barycentric(elevated: Tensor, base: Tensor) -> Tensor:
    """Barycentric coordinates [P, d+1] of the points in their simplices; transposed in memory."""
    axes = len(elevated)
    rest = list(torch.sub(elevated, base, alpha=axes) * (1 / axes))
    for i, j in itertools.combinations(range(axes), 2):  # sorted in descending order, by exchange
        rest[i], rest[j] = torch.maximum(rest[i], rest[j]), torch.minimum(rest[i], rest[j])
    return torch.stack([1 + rest[-1] - rest[0], *(a - b for a, b in reversed([*itertools.pairwise(rest)]))]).T


class _Barycentric(torch.autograd.Function):
    """Barycentric coordinates [B N, d+1], which are there already, with their gradient to the features [B, N, d]."""

    @staticmethod
    def forward(ctx, features, weight, parts, ranks):
        ctx.shape, ctx.parts, ctx.ranks = features.shape, parts, ranks
        return weight.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        batch, pixels, d = ctx.shape
        out = grad.new_empty(batch, d, pixels)
        back = elevate(torch.eye(d, dtype=grad.dtype, device=grad.device)).T / (d + 1)

        def one(turn: int) -> None:
            part, rank = ctx.parts[turn], ctx.ranks[turn].long()
            # Coordinate d - r is the step from the r-th largest coordinate, of those within the simplex, to the next.
            along = grad[part.points].T.flip(0)
            along = along.sub(along.roll(1, 0)).gather(0, rank)
            start = part.image * pixels
            out[part.image, :, part.points.start - start : part.points.stop - start].copy_(back @ along)

        with crew(grad.device) as share:
            share(len(ctx.parts), one)
        return out.mT, None, None, None


@dataclass(frozen=True)
class Simplices:
    """Those a part's n points lie in: many share one, as neighbouring pixels do.

    base, rank [d+1, S]: as `enclosing_simplex` has them. members [n]: the points, block by block and simplex by
    simplex; starts [S]: where each begins; counts [S]: how many each has. simplex [n]: of a point.
    """

    base: Tensor
    rank: Tensor
    members: Tensor
    starts: Tensor
    counts: Tensor
    simplex: Tensor

    @classmethod
    def of(cls, base: Tensor, rank: Tensor, place: int) -> Simplices:
        members, counts, simplex = _group(base, rank, place)
        starts = counts.cumsum(0) - counts
        first = members.index_select(0, starts)
        base, rank = (torch.stack([row.index_select(0, first) for row in rows]) for rows in (base, rank))
        return cls(base, rank, members, starts, counts, simplex)


def _group(base: Tensor, rank: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which points of a block, of 2^place points, share a simplex: members, counts and simplex of `Simplices`."""
    axes, points = rank.shape
    members = torch.arange(points, device=base.device)
    digit, blocks = (axes - 1).bit_length(), points - 1 >> place
    low = base[:-1].amin(1)
    spans = [int(span) for span in (base[:-1].amax(1) - low + 1).tolist()]
    bits = math.prod(spans).bit_length() + digit * (axes - 1)  # of a name: the remainder-0 vertex, and the ranks
    if blocks.bit_length() + bits + place > 62:
        return members, torch.ones_like(members), members  # too wide to sort beside a place: each point its own
    # One integer: block, name, place within the block.
    name, stride = members & (1 << place) - 1, 1 << place
    if blocks:
        name.add_(members >> place, alpha=1 << bits + place)
    for i in range(axes - 1):
        name.add_(rank[i], alpha=stride)
        stride <<= digit
    for row, span in zip((base[:-1] - low[:, None]).long(), spans, strict=True):
        name.add_(row, alpha=stride)
        stride *= span
    name = _sort_(name)
    members = name & (1 << place) - 1
    if blocks:
        members += name >> bits + place << place
    _, simplex, counts = torch.unique_consecutive(name >> place, return_inverse=True, return_counts=True)
    return members, counts, torch.empty_like(simplex).scatter_(0, members, simplex)


@dataclass(frozen=True)
class _Bags:
    """What the vertices hear from a part's points. keys: of the bags' vertices, ascending in each block; corner
    [S, 2^bits]: the bag of each simplex's corners; blocks: order, point and bags of each, as in `Lattice`; ones: what
    each bag hears where all say 1."""

    keys: Tensor
    corner: Tensor
    blocks: list[tuple[Tensor, Tensor, Tensor]]
    ones: Tensor


def _bags(part: Part, simplices: Simplices, low: Tensor, strides: Sequence[int], weight: Tensor) -> _Bags:
    axes, device = len(simplices.rank), simplices.rank.device
    rank, starts, counts, points = simplices.rank.long(), simplices.starts, simplices.counts, len(simplices.members)
    key = torch.zeros_like(starts)
    for row, stride in zip((simplices.base[:-1] - low[:, None]).long(), strides, strict=False):
        key.add_(row, alpha=stride)
    bound, place, blocks = strides[-1], (part.block - 1).bit_length(), part.blocks
    if len(blocks) > 1:
        key.add_(simplices.members.index_select(0, starts) >> place, alpha=bound)
    # From remainder k-1 to k: one more in every coordinate, d+1 less in the one whose turn it is by rank.
    turn = 1 - torch.tensor([*strides[:-1], 0], device=device)
    turn = torch.empty_like(rank).scatter_(0, rank, turn[:, None].expand_as(rank))
    keys = torch.stack([*itertools.accumulate([key, *turn.flip(0)[:-1]], torch.add)])

    # A corner is named simplex << bits | k.
    bits, numbers = axes.bit_length(), torch.arange(axes, device=device)[:, None]
    corners = (torch.arange(len(starts), device=device) << bits) + numbers
    keys, corners = _sort(keys.flatten(), corners.flatten(), len(blocks) * bound, len(starts) << bits)
    keys, bag, shared = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    corner = torch.empty(len(starts) << bits, dtype=torch.int64, device=device).scatter_(0, corners, bag)

    # The points of a simplex are neighbours in `members`: a bag is a few runs of it.
    home, shared = corners >> bits, _cumulative(shared)
    lengths = counts.int().index_select(0, home)
    ends = _cumulative(lengths)
    begins = (corners & (1 << bits) - 1).int() * points + starts.int().index_select(0, home)
    order = (((simplices.members & (1 << place) - 1) << bits).int() + numbers.int()).flatten()
    order = order.index_select(0, _runs(begins, lengths, ends, axes * points))
    bags = ends.index_select(0, shared)

    sums = bag_sum(F.pad(weight, (0, (1 << bits) - axes)), simplices.members, F.pad(starts, (0, 1), value=points))
    cuts = torch.searchsorted(keys, torch.arange(len(blocks) + 1, device=device) * bound).tolist()
    entries = [axes * (block.stop - block.start) for block in blocks]
    parts = zip(order.split(entries), (order >> bits).split(entries), itertools.pairwise(cuts), strict=True)
    return _Bags(
        keys % bound + part.image * bound if len(blocks) > 1 or part.image else keys,
        corner.view(-1, 1 << bits)[:, :axes],
        [(order, point, bags[first : last + 1] - bags[first]) for order, point, (first, last) in parts],
        bag_sum(sums.view(-1, 1), corners, shared),
    )


@torch.no_grad()
def build(parts: Sequence[Part], simplices: Sequence[Simplices], weight: Tensor) -> tuple[Lattice, list[Tensor]]:
    """Number the vertices that the simplices touch, and link them to their points and to their neighbours.

    A vertex of remainder k has coordinates (d+1) c_i + k, with c_i = base_i or base_i - 1, so c_0 .. c_{d-1} and k name
    it. They are the digits of one integer, its key: sorting keys finds equal vertices, adding a constant gives a
    neighbour. Each image has a lattice of its own; `simplices` are those of each part. With the points' weights
    [P, d+1] also returns what each part's bags hear if all points say 1.
    """
    axes, device = len(simplices[0].rank), simplices[0].rank.device
    d = axes - 1
    low = torch.stack([s.base[:d].amin(1) for s in simplices]).amin(0) - 1
    # One spare value a digit: a step out of the box, on either side, lands on it and finds nothing.
    spans = [int(span) for span in (torch.stack([s.base[:d].amax(1) for s in simplices]).amax(0) - low + 2).tolist()]
    strides = [axes * math.prod(spans[:i]) for i in range(axes)]
    if strides[d] * max(parts[-1].image + 1, *(len(part.blocks) for part in parts)) >= 2**62:
        raise ValueError(
            f"features spread over {' x '.join(map(str, spans))} lattice cells, too many to number in 64 bits; "
            "expected bandwidths that are not so small beside the features' range"
        )
    corner = torch.empty(parts[-1].points.stop, axes, dtype=torch.int32, device=device)

    def bags(turn: int) -> _Bags:
        return _bags(parts[turn], simplices[turn], low, strides, weight[parts[turn].points])

    with crew(device) as share:
        found = share(len(parts), bags)
        keys = torch.cat([bags.keys for bags in found])
        keys, heard = _sort(keys, torch.arange(len(keys), device=device), strides[d] * (parts[-1].image + 1), len(keys))
        keys, vertex, heard_from = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
        vertex = torch.empty_like(vertex).scatter_(0, heard, vertex).int().split([len(bags.keys) for bags in found])
        offsets = F.pad(heard_from.cumsum(0), (1, 1), value=0)
        offsets[-1] = offsets[-2]
        vertices = len(keys)
        # One step in direction j: one less in every coordinate, d+1 more in coordinate j.
        ahead = keys + torch.where(keys % axes > 0, -1, d - sum(strides[:d]))
        neighbours = torch.empty(axes, vertices + 1, 3, dtype=torch.int32, device=device)

        def link(turn: int) -> None:
            if not turn:
                steps = torch.tensor([*strides[:d], 0], device=device)
                neighbours.copy_(_beside(_locate(keys, ahead + steps[:, None])))
            else:
                turn -= 1
                mine = vertex[turn].index_select(0, found[turn].corner.flatten()).view(-1, axes)
                torch.index_select(mine, 0, simplices[turn].simplex, out=corner[parts[turn].points])

        share(1 + len(parts), link)
    lattice = Lattice(
        corner,
        [block for part in parts for block in part.blocks],
        [block for bags in found for block in bags.blocks],
        heard.int(),
        offsets.int(),
        neighbours,
    )
    return lattice, [bags.ones for bags in found]


def _locate(keys: Tensor, wanted: Tensor) -> Tensor:
    """Which of the ascending keys [M] each of `wanted` [..] is, int32; M where it is none.

    By hashing (multiplicative: Knuth, The Art of Computer Programming 3, 6.4), some ten times faster than a search.
    """
    count, bits = len(keys), len(keys).bit_length() + 3

    def slot(some: Tensor) -> Tensor:
        return (some * MULTIPLIER >> 64 - bits).bitwise_and_((1 << bits) - 1)

    table = torch.full((1 << bits,), count, dtype=torch.int32, device=keys.device)
    table.scatter_(0, slot(keys), torch.arange(count, dtype=torch.int32, device=keys.device))
    flat = wanted.flatten()
    at = table.index_select(0, slot(flat))
    # An empty slot is an answer, and so is a key's own; where a slot holds another key, search.
    other = keys.index_select(0, at.clamp(max=count - 1)).ne_(flat).logical_and_(at < count).nonzero().squeeze(1)
    some = flat.index_select(0, other)
    found = torch.searchsorted(keys, some).clamp_(max=count - 1)
    found = found.where(keys.index_select(0, found) == some, count)
    return at.index_copy_(0, other, found.int()).view_as(wanted)


def _beside(ahead: Tensor) -> Tensor:
    """Each vertex, who is ahead of it and who behind, [axes, M+1, 3], from who is ahead, [axes, M]."""
    axes, count = ahead.shape
    me = torch.arange(count + 1, dtype=torch.int32, device=ahead.device).repeat(axes, 1)
    behind = torch.full_like(me, count).scatter_(1, ahead.long(), me[:, :-1])
    behind[:, count] = count
    return torch.stack([me, F.pad(ahead, (0, 1), value=count), behind], 2)


def _sort_(keys: Tensor) -> Tensor:
    if keys.is_cuda:
        return keys.sort().values
    keys.numpy().sort()  # numpy has SIMD for this
    return keys


def _sort(keys: Tensor, things: Tensor, bound: int, names: int) -> tuple[Tensor, Tensor]:
    """Keys [P] below `bound`, sorted, and beside each what it belongs to: numbers below `names`, ascending in ties."""
    bits = (names - 1).bit_length()
    if bound >= 2 ** (63 - bits):
        keys, places = keys.sort(stable=True)
        return keys, things.index_select(0, places)
    # Plain integers sort much faster than pairs: carry the thing in the low bits.
    keys = _sort_((keys << bits) + things)
    return keys >> bits, keys & ((1 << bits) - 1)


def _cumulative(lengths: Tensor) -> Tensor:
    """0 and the running sum of lengths [P]: where each begins, and the end; [P + 1], of the same dtype."""
    ends = torch.zeros(len(lengths) + 1, dtype=lengths.dtype, device=lengths.device)
    torch.cumsum(lengths, 0, out=ends[1:])
    return ends


def _runs(begins: Tensor, lengths: Tensor, ends: Tensor, total: int) -> Tensor:
    """begins[0], begins[0] + 1, .. lengths[0] of them, then begins[1], ..; ends: 0 and the lengths' running sum."""
    # A running sum of ones, but for the jump from a run's last number to the next run's first.
    steps = torch.ones(total, dtype=begins.dtype, device=begins.device)
    steps[0] = begins[0]
    return steps.scatter_(0, ends[1:-1].long(), begins[1:] - begins[:-1] - lengths[:-1] + 1).cumsum_(0)


def bag_sum(table: Tensor, index: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """out[b] = sum of weight[e] table[index[e]] over offsets[b] <= e < offsets[b+1]; no weight: 1."""
    return torch.embedding_bag(table, index, offsets, mode=0, per_sample_weights=weight, include_last_offset=True)[0]


class Weights:
    """Weights [P, corners] of the corners of several lattices over the same points, as they are sliced and splatted."""

    def __init__(self, rows: Tensor, lattices: Sequence[Lattice]):
        self.rows, self.lattices = rows, lattices

    @cached_property
    def sorted(self) -> list[list[Tensor]]:
        """Block by block and lattice by lattice, in the order in which its bags take them."""
        rows, corners = self.rows.detach(), [lattice.corner.shape[1] for lattice in self.lattices]

        def task(block: int) -> list[Tensor]:
            points = self.lattices[0].blocks[block]
            parts = zip(rows[points].split(corners, 1), self.lattices, strict=True)
            return [_padded(part).index_select(0, lattice.parts[block][0]) for part, lattice in parts]

        with crew(rows.device) as share:
            return share(len(self.lattices[0].blocks), task)


def _padded(rows: Tensor) -> Tensor:
    """Rows of d+1 numbers as if of 2^bits, flat: what `Lattice.parts`' order counts through."""
    corners = rows.shape[1]
    return F.pad(rows, (0, (1 << corners.bit_length()) - corners)).flatten()


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


class Joint:
    """Several lattices over the same points behind one slice: for that, their vertices are numbered through."""

    def __init__(self, lattices: Sequence[Lattice]):
        self.lattices, self.sizes = lattices, [lattice.size for lattice in lattices]
        self.blocks = lattices[0].blocks
        self.points, self.corners = len(lattices[0].corner), sum(f.corner.shape[1] for f in lattices)
        self.corner = lattices[0].corner
        if len(lattices) > 1:
            self.corner = self.corner.new_empty(self.points, self.corners)

            def number(block: int) -> None:
                points, starts = self.blocks[block], itertools.accumulate(self.sizes, initial=0)
                parts = [f.corner[points] + start for f, start in zip(lattices, starts, strict=False)]
                torch.cat(parts, 1, out=self.corner[points])

            with crew(self.corner.device) as share:
                share(len(self.blocks), number)

    def _steps(self, count: int, step: int) -> Tensor:
        return torch.arange(0, count * step + 1, step, dtype=torch.int32, device=self.corner.device)

    @cached_property
    def slice_offsets(self) -> Tensor:
        return self._steps(self.points, self.corners)

    @cached_property
    def blur_offsets(self) -> Tensor:
        return self._steps(max(self.sizes), 3)

    @cached_property
    def taps(self) -> Tensor:
        return torch.tensor([1, 0.5, 0.5], device=self.corner.device).repeat(max(self.sizes))

    def prepare(self, *weights: Weights) -> None:
        """Make now what is made when it is first needed, before several threads need it at once."""
        _ = self.slice_offsets, self.blur_offsets, self.taps, [w.sorted for w in weights]

    def tell(self, values: Tensor, block: int, weights: Weights) -> list[Tensor]:
        """The first half of a splat: [points of a block, C] -> [its bags, C], a part a lattice."""
        parts = zip((lattice.parts[block] for lattice in self.lattices), weights.sorted[block], strict=True)
        return [bag_sum(values, point, bags, weight) for (_, point, bags), weight in parts]

    def hear(self, told: Sequence[Tensor], kernel: int) -> Tensor:
        """The second half: what all blocks told, in turn, to a lattice's [M, C]."""
        lattice = self.lattices[kernel]
        return bag_sum(_cat(told), lattice.heard, lattice.offsets)

    def splat(self, values: Tensor, weights: Weights) -> list[Tensor]:
        """[P, C] -> [M, C], a part a lattice"""
        self.prepare(weights)
        with crew(values.device) as share:
            told = share(len(self.blocks), lambda block: self.tell(values[self.blocks[block]], block, weights))
            told = [*zip(*told, strict=True)]
            return share(len(told), lambda kernel: self.hear(told[kernel], kernel))

    def blur(self, part: Tensor, kernel: int, reverse: bool = False) -> Tensor:
        """[M, C] -> [M, C], along a lattice's directions"""
        lattice = self.lattices[kernel]
        offsets, taps = self.blur_offsets[: lattice.size + 1], self.taps[: 3 * lattice.size].to(part.dtype)
        for neighbours in lattice.neighbours.flip(0) if reverse else lattice.neighbours:
            part = bag_sum(part, neighbours.flatten(), offsets, taps)
        return part

    def slice(self, table: Tensor, weights: Weights, first: int = 0, last: int | None = None) -> Tensor:
        """[M, C] -> [P, C], or those of the points first <= p < last only"""
        rows = weights.rows.detach()[first:last]
        corner = self.corner[first:last]
        return bag_sum(table, corner.flatten(), self.slice_offsets[: len(rows) + 1], rows.flatten())

    def read(self, table: Tensor, weights: Weights) -> Tensor:
        """`slice`, of all points, block by block."""
        out = table.new_empty(self.points, table.shape[1])
        self.prepare(weights)

        def one(block: int) -> None:
            points = self.blocks[block]
            out[points].copy_(self.slice(table, weights, points.start, points.stop))

        with crew(table.device) as share:
            share(len(self.blocks), one)
        return out

    def dots(self, block: int, values: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
        """Adds to out [points of a block, corners] values[p] . table[corner[p, k]]: the gradient of weights.

        Of a splat's or a slice's weights, or of both, which one gather serves: values and tables side by side.
        """
        points = self.blocks[block]
        count, corner = points.stop - points.start, self.corner[points]
        values = _cat(values, 1)
        if table.is_cuda:
            rows = table.index_select(0, corner.flatten()).view(count, self.corners, -1)
            out[:, :, None].baddbmm_(rows, values[:, :, None])
            return
        # A product of dense matrices where a sparse one has entries, added to those.
        entries = self.slice_offsets[: count + 1], corner.flatten(), out.view(-1)
        entries = torch.sparse_csr_tensor(*entries, (count, len(table)), check_invariants=False)
        torch.sparse.sampled_addmm(entries, values, table.T, out=entries)


def _mix(part: Tensor, mixing: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(part, mixing, out=out) if mixing.ndim else torch.mul(part, mixing, out=out)


class _Apply(torch.autograd.Function):
    """slice @ mix @ blur @ splat @ values, with gradients to values [P, C], both weights [P, corners] and the mixing.

    mixing [M] scales each kernel's share, mixing [M, C, C'] also mixes its channels: on the lattice's vertices, which
    are fewer than the pixels.
    """

    @staticmethod
    def forward(ctx, values, splat_rows, slice_rows, mixing, joint, splat_weights, slice_weights):
        with crew(values.device) as share:
            parts = joint.splat(values, splat_weights)
            blurred = share(len(parts), lambda kernel: joint.blur(parts[kernel], kernel))
            table = _cat([_mix(part, m) for part, m in zip(blurred, mixing, strict=True)])
            ctx.extras = joint, splat_weights, slice_weights
            ctx.save_for_backward(values, mixing, table, *blurred)
            return joint.read(table, slice_weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, mixing, table, *blurred = ctx.saved_tensors
        joint, splat_weights, slice_weights = ctx.extras
        values_too, splat_too, slice_too, mixing_too, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        to_values = to_splat = to_slice = to_mixing = None
        with crew(grad.device) as share:
            parts = joint.splat(grad, slice_weights)
            if mixing_too:
                pairs = zip(blurred, parts, strict=True)
                to_mixing = torch.stack([b.T @ p if mixing.ndim > 1 else (b * p).sum() for b, p in pairs])
            if values_too or splat_too:
                mixed = [_mix(part, m.T if m.ndim else m) for part, m in zip(parts, mixing, strict=True)]
                back = _cat(share(len(mixed), lambda kernel: joint.blur(mixed[kernel], kernel, reverse=True)))
            if values_too:
                to_values = joint.read(back, splat_weights)
            ends = [(slice_too, grad, table), (splat_too, values, back if splat_too else None)]
            if splat_too and slice_too and splat_weights is slice_weights:
                to_slice = _dots(joint, [grad, values], [table, back])
            else:
                to_slice, to_splat = (_dots(joint, [v], [rows]) if wanted else None for wanted, v, rows in ends)
        return to_values, to_splat, to_slice, to_mixing, None, None, None


def _dots(joint: Joint, values: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    table = _cat(tables, 1)
    out = table.new_zeros(joint.points, joint.corners)

    def one(block: int) -> None:
        points = joint.blocks[block]
        joint.dots(block, [v[points] for v in values], table, out[points])

    with crew(table.device) as share:
        share(len(joint.blocks), one)
    return out


def _softmax_backward(slope: Tensor, q: Tensor, ones: Tensor) -> Tensor:
    """In place, rows [P, K]: from the slope along q to that along q's scores."""
    slope.mul_(q)
    return slope.addcmul_(torch.mv(slope, ones)[:, None], q, value=-1)


class _MeanField(torch.autograd.Function):
    """`LatticeBank.mean_field`, with gradients to all that is a tensor; planes [K, B N], scores or (log=False) marginals.

    What is done to a block of pixels, from slice to splat, is done while it is in the cache, and so on the way back.
    """

    @staticmethod
    def forward(ctx, logits, write_rows, read_rows, mixing, gains, own, bank, iterations, log, keep):
        joint, write, read = bank.joint, bank.write, bank.read
        batch, pixels, labels = logits.shape
        # Rows that fill vector registers better: the added labels have probability zero, and no gradient.
        spare = -labels % 4 if logits.dtype == torch.float32 and labels > 4 else 0
        rows = logits.new_empty(batch * pixels, labels + spare)
        mixing, gains = F.pad(mixing, (0, spare, 0, spare)), F.pad(gains, (0, spare, 0, spare))
        if torch.equal(gains, gains[0, 0] * torch.eye(len(gains)).to(gains)):
            mixing = mixing[:, 0, 0]  # Potts: a number
        ones, planes = rows.new_ones(labels + spare), logits.new_empty(labels, batch * pixels)
        marginals = [[None] * len(joint.blocks) for _ in range(iterations + 1 if keep else 1)]
        tables = [rows.new_empty(sum(joint.sizes), labels + spare) for _ in range(iterations if keep else 1)]
        blurred = [[] for _ in range(iterations)]

        def score(block: int, step: int) -> Tensor:
            points = joint.blocks[block]
            if not step:
                image, start = divmod(points.start, pixels)
                here, given = rows[points], logits[image, start : start + points.stop - points.start]
                here[:, :labels].copy_(given)
                here[:, labels:].fill_(LEAST)
                return here.sub_(given.amax(1, keepdim=True)).clone()
            energy = joint.slice(tables[keep * (step - 1)], read, points.start, points.stop).add_(rows[points])
            return energy if own is None else energy.sub_((marginals[keep * (step - 1)][block] * own[points]) @ gains)

        def update(block: int, step: int) -> list[Tensor] | None:
            here = score(block, step)
            if step < iterations or not log:
                # Softmax, but for the maximum that it subtracts: no score that counts is far below zero. To raise
                # those that are costs little, while exp is slow where it underflows.
                here = here.clamp_(min=FLOOR).exp_()
                total = torch.mv(here, ones)
                if total.max() < math.inf:
                    here.mul_(total.reciprocal_()[:, None])
                else:
                    here = torch.softmax(score(block, step), -1)
                if keep or own is not None:
                    marginals[keep * step][block] = here
            if step < iterations:
                return joint.tell(here, block, write)
            planes[:, joint.blocks[block]].copy_(here[:, :labels].T)

        def spread(kernel: int, step: int, told: Sequence[Sequence[Tensor]]) -> Tensor:
            part = joint.blur(joint.hear([bags[kernel] for bags in told], kernel), kernel)
            _mix(part, mixing[kernel], tables[keep * step].split(joint.sizes)[kernel])
            return part

        with crew(rows.device) as share:
            joint.prepare(read, write)
            for step in range(iterations + 1):
                told = share(len(joint.blocks), lambda block, step=step: update(block, step))
                if step < iterations:
                    parts = share(len(joint.sizes), lambda kernel, step=step, told=told: spread(kernel, step, told))
                    blurred[step] = parts if keep else []
        if keep:
            ctx.save_for_backward(mixing, gains, own)
            ctx.shape = logits.shape
            ctx.extras = joint, write, read, marginals, tables, blurred, log
        return planes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mixing, gains, own = ctx.saved_tensors
        joint, write, read, marginals, tables, blurred, log = ctx.extras
        logits_too, write_too, read_too, mixing_too = ctx.needs_input_grad[:4]
        labels, width, steps = len(grad), len(gains), len(blurred)
        slopes = [None] * len(joint.blocks)  # the gradient of the scores that a step begins or ends with
        total, ones = grad.new_empty(joint.points, width), grad.new_ones(width)
        to_mixing = mixing.new_zeros(len(joint.sizes), width, width)
        to_own, to_gains = grad.new_zeros(joint.points, 1), torch.zeros_like(gains)
        together = write is read
        to_write, to_read = (
            grad.new_zeros(joint.points, joint.corners) if wanted else None
            for wanted in (write_too and not together, read_too)
        )
        back = grad.new_empty(sum(joint.sizes), width)
        backs = back.split(joint.sizes)

        def begin(block: int) -> list[Tensor]:
            points = joint.blocks[block]
            slope = slopes[block] = grad.new_zeros(points.stop - points.start, width)
            slope[:, :labels].copy_(grad[:, points].T)
            if not log:
                _softmax_backward(slope, marginals[steps][block], ones)
            total[points].copy_(slope)
            return joint.tell(slope, block, read) if steps else []

        def spread(kernel: int, step: int, told: Sequence[Sequence[Tensor]]) -> None:
            part = joint.hear([bags[kernel] for bags in told], kernel)
            if mixing_too:
                to_mixing[kernel].addmm_(blurred[step][kernel].T, part)
            part = _mix(part, mixing[kernel].T if mixing.ndim > 1 else mixing[kernel])
            backs[kernel].copy_(joint.blur(part, kernel, reverse=True))

        def weigh(block: int, slope: Tensor, q: Tensor, pair: Sequence[Tensor]) -> None:
            points = joint.blocks[block]
            if together and read_too:
                joint.dots(block, [slope, q], pair[0], to_read[points])
                return
            if read_too:
                joint.dots(block, [slope], pair[0], to_read[points])
            if write_too:
                joint.dots(block, [q], pair[1], to_write[points])

        def retreat(block: int, step: int, pair: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
            points = joint.blocks[block]
            slope, q, shared = slopes[block], marginals[step][block], None
            weigh(block, slope, q, pair)
            along_q = joint.slice(back, write, points.start, points.stop)
            if own is not None:
                heard = slope @ gains.T
                to_own[points].sub_((q * heard).sum(1, keepdim=True))
                shared = (q * own[points]).T @ slope
                along_q.sub_(heard.mul_(own[points]))
            slope = slopes[block] = _softmax_backward(along_q, q, ones)
            total[points].add_(slope)
            return joint.tell(slope, block, read) if step else [], shared

        with crew(grad.device) as share:
            blocks = len(joint.blocks)
            told = share(blocks, begin)
            for step in reversed(range(steps)):
                share(len(backs), lambda kernel, step=step, told=told: spread(kernel, step, told))
                pair = [tables[step], back]
                pair = [torch.cat(pair, 1)] if together and read_too else pair
                done = share(blocks, lambda block, step=step, pair=pair: retreat(block, step, pair))
                told = [bags for bags, _ in done]
                if own is not None:
                    to_gains -= sum(shared for _, shared in done)
        inner = slice(labels)
        to_logits = total.view(*ctx.shape[:2], width)[..., :labels] if logits_too else None
        to_mixing, to_gains = to_mixing[:, inner, inner], to_gains[inner, inner]
        return to_logits, to_write, to_read, to_mixing, to_gains, None if own is None else to_own, *[None] * 4


class _Sums(torch.autograd.Function):
    """What each point hears if all say 1, n [P, 1], which is there already, with its gradient to the weights."""

    @staticmethod
    def forward(ctx, rows, n, table, joint, weights, gain):
        ctx.extras = table, joint, weights, gain
        return n.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, joint, weights, gain = ctx.extras
        out = torch.empty_like(weights.rows)

        def one(block: int) -> None:
            points = joint.blocks[block]
            corner = joint.corner[points].flatten()
            heard, told = (some[:, 0].index_select(0, corner).view_as(out[points]) for some in (table, back))
            torch.addcmul(told, heard, grad[points], out=out[points])

        with crew(grad.device) as share:
            back = joint.blur(joint.splat(grad.contiguous(), weights)[0], 0, reverse=True).mul_(gain)
            share(len(joint.blocks), one)
        return out, *[None] * 5


class _Softmax(torch.autograd.Function):
    """Over rows [P, K]. What lies e^30 below a row's best is nothing in float32, but slow to underflow to."""

    @staticmethod
    def forward(ctx, scores):
        out = torch.empty_like(scores)
        ones = scores.new_ones(scores.shape[1])

        def one(block: int) -> None:
            some = slice(block * BLOCK, (block + 1) * BLOCK)
            q = out[some]
            torch.sub(scores[some], scores[some].amax(1, keepdim=True), out=q).clamp_(min=FLOOR).exp_()
            q.mul_(torch.mv(q, ones).reciprocal_()[:, None])

        with crew(scores.device) as share:
            share((len(scores) - 1) // BLOCK + 1, one)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        out, ones = torch.empty_like(q), q.new_ones(q.shape[1])

        def one(block: int) -> None:
            some = slice(block * BLOCK, (block + 1) * BLOCK)
            _softmax_backward(out[some].copy_(grad[some]), q[some], ones)

        with crew(grad.device) as share:
            share((len(q) - 1) // BLOCK + 1, one)
        return out


def softmax(scores: Tensor) -> Tensor:
    """torch.softmax(scores, -1) [B, N, K], up to exp(-30), faster on CPUs where probabilities are near 0 or 1."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return torch.softmax(scores, -1)
    return _Softmax.apply(scores.contiguous().flatten(0, 1)).view_as(scores)


class LatticeFilter(GaussianFilter):
    """One Gaussian kernel on the permutohedral lattice: filt(values [B, N, C]) -> [B, N, C].

    Args:
        features: [B, N, D] divided by their bandwidths, so that k(i, j) = exp(-|f_i - f_j|^2 / 2); [1, N, D] serves any
            batch of values.
        normalization, self_message: as for every `GaussianFilter`; n and k(i, i) are the lattice's own.

    Float32 or float64, any device; deterministic, up to rounding where the number of threads differs. Raises ValueError
    for features that are not finite, or that spread over more lattice cells than 62 bits can number.
    """

    def __init__(self, features: Tensor, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        if features.ndim != 3 or features.numel() == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D], none of them zero")
        # Looked at plane by plane, as `DenseCRF` lays them out in memory.
        largest = torch.stack(features.detach().transpose(1, 2).aminmax()).abs().max()
        if not torch.isfinite(largest):
            raise ValueError("features hold NaN or infinity; expected finite numbers (is a bandwidth zero?)")
        self.batch, pixels, d = features.shape
        learn = torch.is_grad_enabled() and features.requires_grad
        flat = features.detach().transpose(1, 2)
        if largest > LARGE:
            flat = flat.double()
        weight = features.new_empty(self.batch * pixels, d + 1)

        def place(part: Part) -> tuple[Simplices, Tensor | None]:
            start = part.image * pixels
            elevated = elevate(flat[part.image, :, part.points.start - start : part.points.stop - start])
            base, rank = enclosing_simplex(elevated)
            weight[part.points].copy_(barycentric(elevated, base))
            return Simplices.of(base, rank, (part.block - 1).bit_length()), rank if learn else None

        with crew(features.device) as share:
            parts = Part.of(self.batch, pixels, features.device, share.threads)
            simplices, ranks = zip(*share(len(parts), lambda turn: place(parts[turn])), strict=True)
            self.lattice, told = build(parts, simplices, weight)
            self.gain = 1 / (1 + 2.0**-d)  # the reference code's alpha: an isolated vertex hears 1 + 2^-d of itself
            n = torch.empty_like(weight[:, :1])
            joint, weights = Joint([self.lattice]), Weights(weight, [self.lattice])
            with torch.no_grad():
                table = joint.blur(joint.hear(told, 0), 0).mul_(self.gain)

            def read(part: Part) -> None:
                n[part.points].copy_(joint.slice(table, weights, part.points.start, part.points.stop))

            joint.prepare()
            share(len(parts), lambda turn: read(parts[turn]))
        if learn:
            weight = _Barycentric.apply(features, weight, parts, ranks)
            n = _Sums.apply(weight, n, table, joint, weights, self.gain)
        self.weight = weight
        self.n = n.view(self.batch, pixels, 1)
        if not self_message:
            self.own = torch.minimum(_self_weight(self.weight) * self.gain, n).view_as(self.n)

    def ends(self, points: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Weights of the splat and of the slice of some points, [.., D+1], with the normalisation folded in."""
        weight, n = self.weight[points], self.n.flatten()[points, None] + EPS
        if self.normalization == "symmetric":
            weight = weight * n.rsqrt()
        return weight, weight / n if self.normalization == "row" else weight

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
        device = features[0].theta.device if isinstance(features[0], GridPositions) else features[0].device

        def one(turn: int) -> LatticeFilter:
            f = features[turn]
            return _grid(f, **make) if isinstance(f, GridPositions) else LatticeFilter(f, **make)

        with crew(device) as share:
            turns = range(len(features))
            # Side by side, unless a gradient is wanted: tasks have none.
            super().__init__([one(turn) for turn in turns] if torch.is_grad_enabled() else share(len(turns), one))
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
        lattices = [f.lattice.repeat(batch // f.batch) for f in self.filters]
        self.joint = Joint(lattices)
        first = self.filters[0]
        apart = first.normalization == "row"  # what is written is weighted differently from what is read
        if torch.is_grad_enabled() and any(f.weight.requires_grad for f in self.filters):
            ends = [[end.repeat(batch // f.batch, 1) for end in f.ends()] for f in self.filters]
            rows = [_cat(end, 1) for end in zip(*ends, strict=True)]
        else:
            shape = self.joint.points, self.joint.corners
            rows = [first.weight.new_empty(shape) for _ in range(1 + apart)]

            def weigh(block: int) -> None:
                points = self.joint.blocks[block]
                within = [(points.start % len(f.weight), f) for f in self.filters]
                ends = [f.ends(slice(start, start + points.stop - points.start)) for start, f in within]
                for row, end in zip(rows, zip(*ends, strict=True), strict=False):
                    torch.cat(end, 1, out=row[points])

            with crew(first.weight.device) as share:
                share(len(self.joint.blocks), weigh)
        self.write = Weights(rows[0], lattices)
        self.read = Weights(rows[1], lattices) if apart else self.write
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

    def mean_field(
        self, logits: Tensor, weights: Tensor, compatibility: Tensor, iterations: int, *, log: bool = True
    ) -> Tensor:
        """log_q [B, N, K] after `iterations` of q <- softmax(logits - (sum_m weights[m] message_m(q)) @ compatibility).

        What `__call__` does inside a loop, with fewer passes over memory, and with the same gradients. log=False
        returns q itself, which is cheaper than its logarithm.
        """
        batch, pixels, labels = logits.shape
        if batch != self.batch:
            self._join(batch)
        # An energy that all labels share changes nothing: made so that pixels only ever speak for labels, it keeps each
        # pixel's best score above 0, and Potts becomes a number.
        gains = compatibility.detach().amax(1, keepdim=True) - compatibility
        mixing, own = (weights * self.gain)[:, None, None] * gains, None
        if not self.filters[0].self_message:
            own = sum(w * f.own_share() for w, f in zip(weights, self.filters, strict=True))
            own = own.expand(batch, -1, -1).flatten(0, 1)
        keep = torch.is_grad_enabled()
        ends = self.write.rows, self.read.rows
        planes = _MeanField.apply(logits, *ends, mixing, gains, own, self, iterations, log, keep)
        planes = planes.view(labels, batch, pixels).transpose(0, 1)
        return (torch.log_softmax(planes, 1) if log else planes).mT


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
