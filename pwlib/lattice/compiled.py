"""The lattice filter as loops compiled by numba: the fast backend, for float32 on a CPU.

Names and arguments are those of `plain`, and so are the results, up to rounding. Each loop works on consecutive points,
or on consecutive vertices, and releases Python's lock, so that `parallel` can run it in several threads. The loops are
compiled on import; numba keeps the result in a cache folder.
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

from pwlib.lattice.geometry import Lattice

MULTIPLIER = np.uint64(0x2545F4914F6CDD1D)  # of xorshift64*; spreads these regular keys better than the golden ratio
CHUNK = 2**13  # the least number of points that is worth a thread
BLOCK = 2048  # points
IMPOSSIBLE = 1e30  # the energy of labels that do not exist

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


@compiled(f"int64(int64[:, ::1], {CORNER}, {HASH})")
def _number(corner_keys, corner, slots, keys, shift):
    """Number the vertices 1, 2, .. in the order in which the points touch them; returns their number."""
    count = 0
    for p in range(corner.shape[0]):
        for k in range(corner.shape[1]):
            key = corner_keys[p, k]
            if p > 0 and key == corner_keys[p - 1, k]:  # neighbouring pixels often share a simplex
                corner[p, k] = corner[p - 1, k]
                continue
            at = _find(key, slots, keys, shift)
            if slots[at] == 0:
                count += 1
                slots[at], keys[count] = count, key
            corner[p, k] = slots[at]
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
    here, there = table.copy(), np.zeros_like(table)
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
    """exp(x) for x <= 0 (Cephes): 2^n times a polynomial, which is vectorised, unlike a call of the C library."""
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled(f"void({ROWS}, {ROWS})")
def _softmax(energy, q):
    """q = softmax(-energy), which may be the same array."""
    for p in range(len(q)):
        least = energy[p, 0]
        for c in range(1, q.shape[1]):
            least = min(least, energy[p, c])
        for c in range(q.shape[1]):
            q[p, c] = least - energy[p, c]
    flat = q.reshape(q.size)  # one long loop is faster than many short ones
    for i in range(len(flat)):
        flat[i] = _exp(flat[i])
    for p in range(len(q)):
        total = np.float32(0)
        for c in range(q.shape[1]):
            total += q[p, c]
        share = np.float32(1) / total
        for c in range(q.shape[1]):
            q[p, c] *= share


@compiled(f"void({ROWS}, {ROWS}, {ROWS}, {ROWS}, {CORNER}, {ROWS}, {ROWS})")
def _update(unary, q, slice_weight, splat_weight, corner, table, total):
    """q = softmax(-unary - slice(table)), and total += splat(q), in blocks of points that stay in the cache.

    A q of one block is overwritten by each. Without rows in total, q receives the energies.
    """
    block = min(BLOCK, len(q))
    for start in range(0, len(unary), block):
        stop = min(start + block, len(unary))
        here = q[start:stop] if len(q) == len(unary) else q[: stop - start]
        here[:] = unary[start:stop]
        if len(table):
            _slice(here, slice_weight[start:stop], corner[start:stop], table)
        if len(total):
            _softmax(here, here)
            _splat(here, splat_weight[start:stop], corner[start:stop], total)


@compiled(f"void({ROWS}, {ROWS}, {ROWS})")
def _softmax_backward(q, slope, total):
    """From the slope along q to that along the energies, in place, which is added to total."""
    for p in range(len(q)):
        mean = np.float32(0)
        for c in range(q.shape[1]):
            mean += q[p, c] * slope[p, c]
        for c in range(q.shape[1]):
            slope[p, c] = q[p, c] * (mean - slope[p, c])
            total[p, c] += slope[p, c]


@functools.lru_cache(1)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "pwlib")


def parallel(task: Callable, items: Iterable[tuple]) -> list:
    """[task(*item) for item in items], in as many threads as PyTorch uses; a forked process has threads of its own."""
    items, count = list(items), torch.get_num_threads()
    if min(count, len(items)) < 2:
        return [task(*item) for item in items]
    return list(_threads(os.getpid(), count).map(lambda item: task(*item), items))


def number(corner_keys: Tensor, steps: Tensor) -> Lattice:
    batch, points, axes = corner_keys.shape
    corner_keys, corner = corner_keys.numpy(), np.empty(corner_keys.shape, np.int32)
    bits = (2 * points * axes).bit_length()

    def build(image: int) -> ndarray:
        hashed = np.zeros(1 << bits, np.int32), np.empty(points * axes + 1, np.int64), 64 - bits
        count = _number(corner_keys[image], corner[image], *hashed)
        neighbours = np.zeros((axes, count + 1, 2), np.int32)
        _link(steps.numpy(), neighbours, *hashed)
        return neighbours

    neighbours = parallel(build, [(image,) for image in range(batch)])  # a part of the vertices for each image
    for image, start in enumerate(np.cumsum([part.shape[1] for part in neighbours[:-1]]), 1):
        corner[image] += start
    return Lattice(torch.from_numpy(corner), tuple(map(torch.from_numpy, neighbours)), (0,) * batch)


class _Filter:
    """Splat, blur, mix and slice on a lattice with given weights, on arrays and without gradients."""

    def __init__(self, splat_weight: Tensor, slice_weight: Tensor, mixing: Tensor, lattice: Lattice):
        arrays = (t.detach().contiguous().numpy() for t in (splat_weight, slice_weight, mixing, lattice.corner))
        self.splat_weight, self.slice_weight, self.mixing, self.corner = arrays
        self.diagonal = not (self.mixing * (1 - np.eye(mixing.shape[-1]))).any()
        ends = np.cumsum(lattice.sizes)
        rows = [slice(end - size, end) for end, size in zip(ends, lattice.sizes, strict=True)]
        self.parts = [(r, n.numpy(), k) for r, n, k in zip(rows, lattice.neighbours, lattice.kernel, strict=True)]
        self.vertices = int(ends[-1])
        batch, points, _ = self.corner.shape
        self.layers = max(1, min(torch.get_num_threads() // batch, points // CHUNK))
        bounds = [points * i // self.layers for i in range(self.layers + 1)]
        self.chunks = [(b, i, slice(bounds[i], bounds[i + 1])) for b in range(batch) for i in range(self.layers)]

    def splat(self, values: ndarray, weight: ndarray) -> ndarray:
        """[B, N, C] -> [layers, M, C], to be summed: the chunks of one image share its vertices."""
        layers = np.zeros((self.layers, self.vertices, values.shape[-1]), np.float32)
        parallel(lambda b, i, p: _splat(values[b, p], weight[b, p], self.corner[b, p], layers[i]), self.chunks)
        return layers

    def blur(self, layers: ndarray, backward: bool = False) -> tuple[list[ndarray], ndarray]:
        """Sum the layers, blur and mix, part by part; backward, mix and blur.

        Returns:
            What is multiplied by the mixing matrices, [M_part, C] each, and the result, [M, C].
        """
        table = np.empty(layers.shape[1:], np.float32)

        def one(rows: slice, neighbours: ndarray, kernel: int) -> ndarray:
            part = layers[0, rows] if self.layers == 1 else layers[:, rows].sum(0)
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
        """[M, C] -> [B, N, C], added to out."""
        parallel(lambda b, i, p: _slice(out[b, p], weight[b, p], self.corner[b, p], table), self.chunks)
        return out

    def update(self, unary: ndarray, table: ndarray, q: ndarray | None, splat: bool = True) -> ndarray:
        """See `_update`; returns its totals [layers, M, C], with M = 0 if not `splat`. A q of None is not kept."""
        layers = np.zeros((self.layers, self.vertices * splat, unary.shape[-1]), np.float32)

        def one(b: int, i: int, p: slice) -> None:
            here = np.empty((BLOCK, unary.shape[-1]), np.float32) if q is None else q[b, p]
            weights = self.slice_weight[b, p], self.splat_weight[b, p]
            _update(unary[b, p], here, *weights, self.corner[b, p], table, layers[i])

        parallel(one, self.chunks)
        return layers

    def backward(self, slope: ndarray, values: ndarray, blurred: list, table: ndarray, gradients: list) -> ndarray:
        """From the slope [B, N, C] of a message to that of its values; those of the weights are added to gradients."""
        to_splat, to_slice, to_mixing = gradients
        received, back = self.blur(self.splat(slope, self.slice_weight), backward=True)
        if to_mixing is not None:
            for (_, _, kernel), sent, part in zip(self.parts, blurred, received, strict=True):
                to_mixing[kernel] += sent.T @ part
        for out, rows, side in ((to_slice, slope, table), (to_splat, values, back)):
            if out is not None:
                parallel(
                    lambda b, i, p, o=out, r=rows, s=side: _dots(r[b, p], o[b, p], self.corner[b, p], s), self.chunks
                )
        return self.slice(back, self.splat_weight, np.zeros_like(values))


class _Lattice(torch.autograd.Function):
    """`message` of the values in `start`, if iterations is None, or `mean_field` from the unary energies in `start`."""

    @staticmethod
    def forward(ctx, start, splat_weight, slice_weight, mixing, lattice, iterations, keep):
        ctx.save_for_backward(start, splat_weight, slice_weight, mixing)  # autograd notices if they change in place
        f, start = _Filter(splat_weight, slice_weight, mixing, lattice), start.detach().contiguous().numpy()
        steps, table = [], np.empty((0, start.shape[-1]), np.float32)
        ctx.extras = f, steps, iterations is not None
        if iterations is None:
            blurred, table = f.blur(f.splat(start, f.splat_weight))
            steps.append((start, blurred, table))
            return torch.from_numpy(f.slice(table, f.slice_weight, np.zeros_like(start)))
        for _ in range(iterations):
            q = np.empty_like(start) if keep else None
            blurred, table = f.blur(f.update(start, table, q))
            if keep:
                steps.append((q, blurred, table))
        energy = np.empty_like(start)
        f.update(start, table, energy, splat=False)
        return torch.from_numpy(energy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (f, steps, softmax), _ = ctx.extras, ctx.saved_tensors
        wanted = zip((f.splat_weight, f.slice_weight, f.mixing), ctx.needs_input_grad[1:], strict=False)
        gradients = [np.zeros_like(array) if needed else None for array, needed in wanted]
        slope = grad.contiguous().numpy()
        total = slope.copy()
        for q, *rest in reversed(steps):
            slope = f.backward(slope, q, *rest, gradients)
            if softmax:
                parallel(lambda b, i, p, q=q, s=slope: _softmax_backward(q[b, p], s[b, p], total[b, p]), f.chunks)
        gradients = [None if part is None else torch.from_numpy(part) for part in gradients]
        return torch.from_numpy(total if softmax else slope), *gradients, None, None, None


def message(values: Tensor, splat_weight: Tensor, slice_weight: Tensor, mixing: Tensor, lattice: Lattice) -> Tensor:
    """See `plain.message`."""
    return _Lattice.apply(values, splat_weight, slice_weight, mixing, lattice, None, True)


def mean_field(
    unary: Tensor, splat_weight: Tensor, slice_weight: Tensor, mixing: Tensor, lattice: Lattice, iterations: int
) -> Tensor:
    """The energies [B, N, K] after some iterations of energy = unary + message(softmax(-energy))."""
    labels = unary.shape[-1]
    spare = -labels % 8  # labels of probability zero, which fill the vector registers
    unary, mixing = F.pad(unary, (0, spare), value=IMPOSSIBLE), F.pad(mixing, (0, spare, 0, spare))
    keep = torch.is_grad_enabled()
    return _Lattice.apply(unary, splat_weight, slice_weight, mixing, lattice, iterations, keep)[..., :labels]
