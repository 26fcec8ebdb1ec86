"""Gaussian filtering on the permutohedral lattice: splat, blur and slice as sparse sums.

A filter sum_j exp(-|f_i - f_j|^2 / 2) v_j over N points costs N^2. The permutohedral lattice (Adams, Baek & Davis 2010)
tiles feature space by simplices. A point hands its value to the d + 1 corners of the simplex it lies in, by barycentric
coordinates (splat); the values spread along the lattice's d + 1 directions, by [1/2, 1, 1/2] in each (blur); and the
point reads them back (slice). The cost is linear in N, the result approximate, and everything is differentiable:

    out = slice @ blur_d ... blur_0 @ splat @ values

Each factor is a sparse matrix, applied as `embedding_bag`: a bag sums a few weighted rows of a table. A blur along one
direction is symmetric, so the adjoint is the same chain reversed. Barycentric coordinates are piecewise linear in the
features, hence the bandwidths have a gradient too: that of the lattice operator itself. Which rows there are to sum,
`pwlib.permutohedral` finds out.

The conventions are those of Kraehenbuehl & Koltun's reference code, whose marginals these are.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.crew import crew
from pwlib.filters import FilterBank, GaussianFilter, GridPositions
from pwlib.permutohedral import (
    Lattice,
    Part,
    Simplices,
    bag_sum,
    barycentric,
    build,
    elevate,
    enclosing_simplex,
)

# What is used of it, in `Joint.dots`, is tested.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

EPS = 1e-20  # the reference code's guard against an empty row
LEAST = -1e30  # in place of minus infinity
FLOOR = -30.0  # of a score: exp(-30) is nothing beside a probability in float32, and far from its underflow
LARGE = 2**12  # beyond it float32 has too few digits left to place a point inside its simplex


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

        with crew(grad.device, len(grad)) as share:
            share(len(ctx.parts), one)
        return out.mT, None, None, None


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

        with crew(rows.device, len(rows)) as share:
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

            with crew(self.corner.device, self.points) as share:
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
        with crew(values.device, self.points) as share:
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

        with crew(table.device, self.points) as share:
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
        with crew(values.device, joint.points) as share:
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
        with crew(grad.device, joint.points) as share:
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

    with crew(table.device, joint.points) as share:
        share(len(joint.blocks), one)
    return out


def _softmax_backward(slope: Tensor, q: Tensor, ones: Tensor) -> Tensor:
    """In place, rows [P, K]: from the slope along q to that along q's scores."""
    slope.mul_(q)
    return slope.addcmul_(torch.mv(slope, ones)[:, None], q, value=-1)


class _MeanField(torch.autograd.Function):
    """`LatticeBank.mean_field`, with gradients to all tensors; planes [K, B N] of scores or, log=False, of marginals.

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

        with crew(rows.device, len(rows)) as share:
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

        with crew(grad.device, joint.points) as share:
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

        with crew(grad.device, joint.points) as share:
            back = joint.blur(joint.splat(grad.contiguous(), weights)[0], 0, reverse=True).mul_(gain)
            share(len(joint.blocks), one)
        return out, *[None] * 5


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

        with crew(features.device, self.batch * pixels) as share:
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
        return LatticeBank.of([self])(values, values.new_zeros(1))


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
        shapes = [(1, f.height * f.width) if isinstance(f, GridPositions) else tuple(f.shape[:2]) for f in features]
        device = features[0].theta.device if isinstance(features[0], GridPositions) else features[0].device

        def one(turn: int) -> LatticeFilter:
            f = features[turn]
            return _grid(f, **make) if isinstance(f, GridPositions) else LatticeFilter(f, **make)

        with crew(device, math.prod(max(shapes))) as share:
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
            rows = [_cat(end, 1) for end in itertools.islice(zip(*ends, strict=True), 1 + apart)]
        else:
            shape = self.joint.points, self.joint.corners
            rows = [first.weight.new_empty(shape) for _ in range(1 + apart)]

            def weigh(block: int) -> None:
                points = self.joint.blocks[block]
                within = [(points.start % len(f.weight), f) for f in self.filters]
                ends = [f.ends(slice(start, start + points.stop - points.start)) for start, f in within]
                for row, end in zip(rows, zip(*ends, strict=True), strict=False):
                    torch.cat(end, 1, out=row[points])

            with crew(first.weight.device, self.joint.points) as share:
                share(len(self.joint.blocks), weigh)
        self.write = Weights(rows[0], lattices)
        self.read = Weights(rows[1], lattices) if apart else self.write
        self.gain = self.write.rows.new_tensor([f.gain for f in self.filters])

    def __call__(self, values: Tensor, log_weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        """(sum_m w_m message_m) @ compatibility.T, as `FilterBank` has it: [B, N, K] -> [B, N, K]."""
        if len(values) != self.batch:
            self._join(len(values))
        compatibility, weights = None if compatibility is None else compatibility.T, log_weights.exp()
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
        self, unary: Tensor, log_weights: Tensor, compatibility: Tensor, iterations: int, *, log: bool = True
    ) -> Tensor:
        """log_q [B, N, K] after `iterations` of q <- softmax(-unary - (sum_m w_m message_m(q)) @ compatibility.T).

        What `__call__` does inside a loop, with fewer passes over memory, and with the same gradients. log=False
        returns q itself, which is cheaper than its logarithm.
        """
        batch, pixels, labels = unary.shape
        if batch != self.batch:
            self._join(batch)
        compatibility, weights = compatibility.T, log_weights.exp()
        # An energy that all labels share changes nothing: made so that pixels only ever speak for labels, it keeps each
        # pixel's best score above 0, and Potts becomes a number.
        gains = compatibility.detach().amax(1, keepdim=True) - compatibility
        mixing, own = (weights * self.gain)[:, None, None] * gains, None
        if not self.filters[0].self_message:
            own = sum(w * f.own_share() for w, f in zip(weights, self.filters, strict=True))
            own = own.expand(batch, -1, -1).flatten(0, 1)
        keep = torch.is_grad_enabled()
        ends = self.write.rows, self.read.rows
        planes = _MeanField.apply(-unary, *ends, mixing, gains, own, self, iterations, log, keep)
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
