"""The permutohedral lattice (Adams, Baek & Davis 2010): which simplex each point lies in, and which vertices there are.

Integers, but for the points' barycentric coordinates. `pwlib.lattice` filters on what is built here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.crew import crew

BLOCK = 2**14  # points, a power of 2: few enough that their values stay at hand while their bags are summed
MOST = 8  # blocks that are embedded at a time: more are out of the cache
MULTIPLIER = 0x2545F4914F6CDD1D  # of xorshift64*: spreads keys well (the golden ratio's multiples do not)


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
            block, blocks = BLOCK, math.ceil(pixels / BLOCK)
            step = block * math.ceil(blocks / max(math.ceil(count / images), math.ceil(blocks / MOST)))
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

    with crew(device, len(weight)) as share:
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
