"""The lattice filter as loops compiled by numba: the fast backend, for float32 on a CPU.

`embed` and `message` have the arguments of `plain` and its results, up to rounding. Each loop works on consecutive
points, or on consecutive vertices, and releases the global interpreter lock, so that `parallel` can run it in several
threads. The loops are compiled on import; numba keeps the result in a cache folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from pwlib.lattice import geometry
from pwlib.lattice.geometry import Lattice
from pwlib.mean_field import normalise

MULTIPLIER = np.uint64(0x2545F4914F6CDD1D)  # of xorshift64*; spreads these regular keys better than the golden ratio
CHUNK = 2**13  # the least number of points that is worth a thread
BLOCK = 2048  # points
IMPOSSIBLE = 1e30  # the energy of labels that do not exist
LOG2 = np.float32(np.log(2))

ROWS, TAPS, CORNER = "float32[:, ::1]", "int32[:, :, ::1]", "int32[:, ::1]"
HASH = "int32[::1], int64[::1], int64"  # slots, each empty (0) or a vertex; the vertices' keys; 64 - log2(slots)
compiled = functools.partial(numba.njit, nogil=True, cache=True, fastmath=True, error_model="numpy")


@compiled(f"int64(int64, {HASH})")
def _find(key, slots, keys, shift):
    """The slot that holds a vertex, or the empty slot where it would be, by linear probing."""
    at = np.int64(np.uint64(key) * MULTIPLIER >> np.uint64(shift))
    while slots[at] and keys[slots[at]] != key:
        at = (at + 1) & (len(slots) - 1)
    return at


@compiled(f"int64(int64[::1], int8[:, :], int64[::1], {CORNER}, {HASH})")
def _number(first, rank, strides, corner, slots, keys, shift):
    """Number the vertices 1, 2, .. in the order in which the points touch them; returns their number."""
    count, axes = 0, len(rank)
    order = np.empty(axes, np.int64)  # the coordinate of each rank
    for p in range(len(first)):
        key = first[p]
        for i in range(axes):
            order[rank[i, p]] = i
        for k in range(axes):
            at = _find(key, slots, keys, shift)
            if slots[at] == 0:
                count += 1
                slots[at], keys[count] = count, key
            corner[p, k] = slots[at]
            key += 1 - strides[order[axes - 1 - k]]  # of the next corner
    return count


@compiled(f"void(int64[::1], {TAPS}, {HASH})")
def _link(steps, neighbours, slots, keys, shift):
    axes = len(neighbours)
    for v in range(1, neighbours.shape[1]):
        key = keys[v] + (steps[axes] if keys[v] % axes == 0 else 0)
        for j in range(axes):
            ahead = slots[_find(key + steps[j], slots, keys, shift)]
            if ahead > 0:
                neighbours[j, v, 0] = ahead
                neighbours[j, ahead, 1] = v


@compiled(f"void({ROWS}, {ROWS}, {CORNER}, {ROWS})")
def _splat(values, weight, corner, table):
    for p in range(corner.shape[0]):
        for k in range(corner.shape[1]):
            v, w = corner[p, k], weight[p, k]
            for c in range(values.shape[1]):
                table[v, c] += w * values[p, c]


@compiled(f"void({ROWS}, {ROWS}, {CORNER}, {ROWS})")
def _slice(out, weight, corner, table):
    """Adds to out; two corners at a time, which is a fifth faster."""
    odd = corner.shape[1] % 2
    for p in range(corner.shape[0]):
        if odd:
            v, w = corner[p, 0], weight[p, 0]
            for c in range(out.shape[1]):
                out[p, c] += w * table[v, c]
        for k in range(odd, corner.shape[1], 2):
            v1, w1, v2, w2 = corner[p, k], weight[p, k], corner[p, k + 1], weight[p, k + 1]
            for c in range(out.shape[1]):
                out[p, c] += w1 * table[v1, c] + w2 * table[v2, c]


@compiled(f"void({ROWS}, {ROWS}, {CORNER}, {ROWS})")
def _dots(values, out, corner, table):
    """The gradient of weights, added to out: values[p] . table[corner[p, k]]."""
    for p in range(corner.shape[0]):
        for k in range(corner.shape[1]):
            v, total = corner[p, k], np.float32(0)
            for c in range(values.shape[1]):
                total += values[p, c] * table[v, c]
            out[p, k] += total


@compiled(f"{ROWS}({ROWS}, {TAPS}, boolean)")
def _blur(table, neighbours, backward):
    """The blurred table; the given one is overwritten."""
    here, there = table, np.zeros_like(table)
    for j in range(len(neighbours)):
        axis = len(neighbours) - 1 - j if backward else j
        for v in range(1, len(table)):
            ahead, behind = neighbours[axis, v, 0], neighbours[axis, v, 1]
            for c in range(table.shape[1]):
                there[v, c] = here[v, c] + np.float32(0.5) * (here[ahead, c] + here[behind, c])
        here, there = there, here
    return here


@compiled("float32(float32)")
def _exp(x):
    """exp(x) for x <= 0, as 2^n exp(r) with |r| <= log(2) / 2: unlike a call of the C library, this is vectorised."""
    x = max(x, np.float32(-87))
    n = np.floor(x / LOG2 + np.float32(0.5))
    r = x - n * LOG2
    y = np.float32(1)
    for k in (6, 5, 4, 3, 2, 1):  # the Taylor series
        y = np.float32(1) + y * r * np.float32(1 / k)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled(f"void({ROWS})")
def _softmax(q):
    """Replace the energies in q by softmax(-q)."""
    for p in range(len(q)):
        least = q[p, 0]
        for c in range(1, q.shape[1]):
            least = min(least, q[p, c])
        for c in range(q.shape[1]):
            q[p, c] = least - q[p, c]
    flat = q.reshape(q.size)  # one long loop is faster than many short ones
    for i in range(len(flat)):
        flat[i] = _exp(flat[i])
    for p in range(len(q)):
        total = np.float32(0)
        for c in range(q.shape[1]):
            total += q[p, c]
        inverse = np.float32(1) / total
        for c in range(q.shape[1]):
            q[p, c] *= inverse


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, {ROWS}, {CORNER}, {ROWS}, {ROWS})")
def _update(unary, q, slice_weight, splat_weight, corner, table, total):
    """q = softmax(-unary - slice(table)), and total += splat(q), in blocks of points that stay in the cache.

    A q of one block is overwritten by each. Without rows in table, q = softmax(-unary).
    """
    block = min(BLOCK, len(q))
    for start in range(0, len(unary), block):
        stop = min(start + block, len(unary))
        here = q[start:stop] if len(q) == len(unary) else q[: stop - start]
        here[:] = unary[start:stop]
        if len(table):
            _slice(here, slice_weight[start:stop], corner[start:stop], table)
        _softmax(here)
        _splat(here, splat_weight[start:stop], corner[start:stop], total)


@compiled(f"void({ROWS}, float32[:, :])")
def _marginals(energy, q):
    """q = softmax(-energy) transposed, from energies [P, C], which are overwritten, to [K, P] with K <= C."""
    for start in range(0, len(energy), BLOCK):
        here = energy[start : start + BLOCK]
        _softmax(here)
        q[:, start : start + BLOCK] = here[:, : len(q)].T


@compiled(f"void({ROWS}, {ROWS}, {ROWS})")
def _softmax_backward(q, grad, total):
    """Replace the gradient with respect to q by that with respect to the energies, and add it to total."""
    for p in range(len(q)):
        mean = np.float32(0)
        for c in range(q.shape[1]):
            mean += q[p, c] * grad[p, c]
        for c in range(q.shape[1]):
            grad[p, c] = q[p, c] * (mean - grad[p, c])
            total[p, c] += grad[p, c]


@functools.lru_cache(1)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "pwlib")


def parallel(task: Callable, items: Iterable[tuple]) -> list:
    """[task(*item) for item in items], in as many threads as PyTorch uses; a forked process has threads of its own."""
    items, count = list(items), torch.get_num_threads()
    if min(count, len(items)) < 2:
        return [task(*item) for item in items]
    return list(_threads(os.getpid(), count).map(lambda item: task(*item), items))


def split(points: int, parts: int) -> list[slice]:
    """`parts` slices of so many points, of equal length up to one."""
    return [slice(points * i // parts, points * (i + 1) // parts) for i in range(parts)]


def embed(features: Tensor) -> tuple[Tensor, Lattice]:
    """See `plain.embed`; here each image has a part of the vertices of its own."""
    weight, *arrays = geometry.place(features)
    first, rank, strides, steps = (array.numpy() for array in arrays)
    batch, points, axes = weight.shape
    corner, bits = np.empty(weight.shape, np.int32), (2 * points * axes).bit_length()

    def number(image: int) -> ndarray:
        hashed = np.zeros(1 << bits, np.int32), np.empty(points * axes + 1, np.int64), 64 - bits
        count = _number(first[image], rank[:, image], strides, corner[image], *hashed)
        neighbours = np.zeros((axes, count + 1, 2), np.int32)
        _link(steps, neighbours, *hashed)
        return neighbours

    neighbours = parallel(number, [(image,) for image in range(batch)])
    for image, start in enumerate(np.cumsum([part.shape[1] for part in neighbours[:-1]]), 1):
        corner[image] += start
    return weight, Lattice(torch.from_numpy(corner), tuple(map(torch.from_numpy, neighbours)), (0,) * batch)


class _Filter:
    """Splat, blur, mix and slice with given weights, on arrays [P, C] of all images' points, without gradients."""

    def __init__(self, splat_weight: Tensor, slice_weight: Tensor, mixing: Tensor, lattice: Lattice):
        arrays = (t.detach().flatten(0, 1).contiguous().numpy() for t in (splat_weight, slice_weight, lattice.corner))
        self.splat_weight, self.slice_weight, self.corner = arrays
        self.mixing = mixing.detach().numpy()
        self.diagonal = not (self.mixing * (1 - np.eye(mixing.shape[-1]))).any()
        ends = np.cumsum(lattice.sizes)
        rows = [slice(end - size, end) for end, size in zip(ends, lattice.sizes, strict=True)]
        self.parts = [(r, n.numpy(), k) for r, n, k in zip(rows, lattice.neighbours, lattice.kernel, strict=True)]
        self.vertices = int(ends[-1])
        batch, points, _ = lattice.corner.shape
        # The chunks of an image share its vertices. In a splat, each of them adds to a table of its own, a layer.
        self.layers = max(1, min(torch.get_num_threads() // batch, points // CHUNK))
        self.chunks = [(i % self.layers, p) for i, p in enumerate(split(batch * points, batch * self.layers))]

    def splat(self, values: ndarray, weight: ndarray) -> ndarray:
        """[P, C] -> [layers, M, C], to be summed."""
        layers = np.zeros((self.layers, self.vertices, values.shape[-1]), np.float32)
        parallel(lambda i, p: _splat(values[p], weight[p], self.corner[p], layers[i]), self.chunks)
        return layers

    def blur(self, layers: ndarray, backward: bool = False) -> tuple[list[ndarray], ndarray]:
        """Sum the layers, blur and mix, part by part; backward, mix and blur.

        Returns:
            What is multiplied by the mixing matrices, [M_part, C] each, and the result, [M, C].
        """
        table = np.empty(layers.shape[1:], np.float32)

        def one(rows: slice, neighbours: ndarray, kernel: int) -> ndarray:
            part = layers[:, rows].sum(0)
            part = part if backward else _blur(part, neighbours, False)
            mixing = self.mixing[kernel].T if backward else self.mixing[kernel]
            if self.diagonal:
                np.multiply(part, mixing.diagonal(), out=table[rows])
            else:
                np.matmul(part, mixing, out=table[rows])
            if backward:
                table[rows] = _blur(table[rows], neighbours, True)
            return part

        return parallel(one, self.parts), table

    def slice(self, table: ndarray, weight: ndarray, out: ndarray) -> ndarray:
        """[M, C] -> [P, C], added to out."""
        parallel(lambda _, p: _slice(out[p], weight[p], self.corner[p], table), self.chunks)
        return out

    def update(self, unary: ndarray, table: ndarray, q: ndarray | None) -> ndarray:
        """See `_update`; returns its totals [layers, M, C]. A q of None is not kept."""
        layers = np.zeros((self.layers, self.vertices, unary.shape[-1]), np.float32)

        def one(i: int, p: slice) -> None:
            here = np.empty((BLOCK, unary.shape[-1]), np.float32) if q is None else q[p]
            _update(unary[p], here, self.slice_weight[p], self.splat_weight[p], self.corner[p], table, layers[i])

        parallel(one, self.chunks)
        return layers

    def backward(self, grad: ndarray, values: ndarray, blurred: list, table: ndarray, gradients: list) -> ndarray:
        """Turn the gradient [P, C] of a message into that of its values; add those of the weights to gradients."""
        to_splat, to_slice, to_mixing = gradients
        received, back = self.blur(self.splat(grad, self.slice_weight), backward=True)
        if to_mixing is not None:
            for (_, _, kernel), sent, part in zip(self.parts, blurred, received, strict=True):
                to_mixing[kernel] += sent.T @ part

        def dots(_: int, p: slice) -> None:
            for out, rows, side in ((to_slice, grad, table), (to_splat, values, back)):
                if out is not None:
                    _dots(rows[p], out[p], self.corner[p], side)

        parallel(dots, self.chunks)
        return self.slice(back, self.splat_weight, np.zeros_like(values))


class _Lattice(torch.autograd.Function):
    """`message` of the values in `start`, if iterations is None, or energies of mean field from the unary ones."""

    @staticmethod
    def forward(ctx, start, splat_weight, slice_weight, mixing, lattice, iterations):
        ctx.save_for_backward(start, splat_weight, slice_weight, mixing)  # autograd notices if they change in place
        f, shape = _Filter(splat_weight, slice_weight, mixing, lattice), start.shape
        start = start.detach().flatten(0, 1).contiguous().numpy()
        steps, table, keep = [], np.empty((0, start.shape[-1]), np.float32), any(ctx.needs_input_grad)
        ctx.extras = f, steps, iterations is not None
        if iterations is None:
            blurred, table = f.blur(f.splat(start, f.splat_weight))
            steps.append((start, blurred, table))
            return torch.from_numpy(f.slice(table, f.slice_weight, np.zeros_like(start))).view(shape)
        for _ in range(iterations):
            q = np.empty_like(start) if keep else None
            blurred, table = f.blur(f.update(start, table, q))
            if keep:
                steps.append((q, blurred, table))
        energy = start.copy()
        return torch.from_numpy(f.slice(table, f.slice_weight, energy) if iterations else energy).view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (f, steps, softmax), _ = ctx.extras, ctx.saved_tensors
        wanted = zip((f.splat_weight, f.slice_weight, f.mixing), ctx.needs_input_grad[1:], strict=False)
        gradients = [np.zeros_like(array) if needed else None for array, needed in wanted]
        grad = grad.flatten(0, 1).contiguous().numpy()
        total = grad.copy()
        for q, *rest in reversed(steps):
            grad = f.backward(grad, q, *rest, gradients)
            if softmax:
                parallel(lambda _, p, q=q, g=grad: _softmax_backward(q[p], g[p], total[p]), f.chunks)
        shapes = (t.shape for t in ctx.saved_tensors)
        given = total if softmax else grad, *gradients
        back = [None if g is None else torch.from_numpy(g).view(s) for g, s in zip(given, shapes, strict=True)]
        return *back, None, None


def message(values: Tensor, weights: tuple[Tensor, Tensor], mixing: Tensor, lattice: Lattice) -> Tensor:
    """See `plain.message`."""
    return _Lattice.apply(values, *weights, mixing, lattice, None)


def mean_field(
    unary: Tensor, weights: tuple[Tensor, Tensor], mixing: Tensor, lattice: Lattice, iterations: int, *, log: bool
) -> Tensor:
    """log q (or q) [B, N, K] after some iterations of q = softmax(-unary - message(q)) from q = softmax(-unary)."""
    labels = unary.shape[-1]
    spare = -labels % 8  # labels of probability zero, which fill the vector registers
    unary, mixing = F.pad(unary, (0, spare), value=IMPOSSIBLE), F.pad(mixing, (0, spare, 0, spare))
    energy = _Lattice.apply(unary, *weights, mixing, lattice, iterations)
    if log or energy.requires_grad:
        return normalise(-energy[..., :labels], log=log)
    q = np.empty((len(energy), labels, energy.shape[1]), np.float32)
    chunks = split(energy.shape[1], torch.get_num_threads())
    parallel(_marginals, [(energy[b, p].numpy(), q[b, :, p]) for b in range(len(energy)) for p in chunks])
    return torch.from_numpy(q).mT
