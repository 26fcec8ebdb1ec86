"""Gaussian filtering in feature space: the messages of a dense CRF.

The pairwise kernel of a dense CRF is K_ij = exp(-|f_i - f_j|^2 / 2). Its features f are a pixel's position, or its
position and colour, divided by the kernel's bandwidths (Kraehenbuehl & Koltun, NIPS 2011, eq. 3). A mean-field
iteration filters the marginals: the messages are K @ values. K has N^2 entries for N pixels and is never stored. There
are three ways to apply it, with one call `filter(values) -> messages`:

    ExactFilter       any features, O(N^2) time and O(N) memory, by softmax attention
    SeparableFilter   positions on a pixel grid, exact, by two small matrix products
    LatticeFilter     any features, O(N) time, approximate (in `pwlib.lattice`)

All are differentiable with respect to values and features, hence with respect to the bandwidths. A `FilterBank` holds
one filter per kernel of a CRF.

With the row sums n = K 1, in which the pixel itself counts (K_ii = 1), the normalisations are

    "none"       K v                         messages grow with the number of similar pixels
    "row"        n^-1 K v                    a weighted mean; not symmetric, so no energy has these messages
    "symmetric"  n^-1/2 K n^-1/2 v           as in the reference code; positive semi-definite, and of an energy

`self_message=False` removes the pixel's own value from its message. n does not change, so that an isolated pixel
receives zero and not 0/0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.inputs import one_of
from pwlib.mean_field import mean_field

NORMALIZATIONS = ("symmetric", "row", "none")
# A rounding error in the exponent of exp(f_i.f_j - |f_j|^2/2) is a relative error of the weight: about eps * |f|^2.
EXPONENT_ERROR = 1e-4
MANY = 2**14  # pixels; with fewer, float32 takes milliseconds
SINK = 2.0**15  # a value whose share 1 / (1 + n) neither overflows nor underflows 16 bits


@dataclass(frozen=True)
class GridPositions:
    """The pixel positions of a `height` x `width` grid, row-major, divided by the bandwidth `theta` (a scalar)."""

    height: int
    width: int
    theta: Tensor

    def axes(self) -> tuple[Tensor, Tensor]:
        y, x = (torch.arange(length).to(self.theta) for length in (self.height, self.width))
        return y / self.theta, x / self.theta

    def planes(self) -> Tensor:
        """[2, H, W], in the order (x, y): a lattice depends on the order, and this is the reference code's."""
        y, x = torch.meshgrid(*self.axes(), indexing="ij")
        return torch.stack([x, y])

    def features(self) -> Tensor:
        """[1, H*W, 2], stored as [2, H*W] in memory."""
        return self.planes().flatten(1).T[None]


class GaussianFilter:
    """What all filters share: the normalisation and the self-message around K @ values.

    A subclass sets the row sums n = K 1, [B, N, 1], in its constructor and implements `apply`, with K_ii = 1. One whose
    K_ii differs, as a lattice's does, overrides `__call__`.
    """

    n: Tensor

    def __init__(self, normalization: str = "symmetric", self_message: bool = True):
        one_of(NORMALIZATIONS, normalization=normalization)
        self.normalization = normalization
        self.self_message = self_message

    def apply(self, values: Tensor) -> Tensor:
        """K @ values, [B, N, C] -> [B, N, C]."""
        raise NotImplementedError

    def scales(self) -> tuple[Tensor, Tensor]:
        """What values are multiplied by before K is applied, and messages after it; both [B, N, 1]."""
        if self.normalization == "symmetric":
            return (self.n.rsqrt(),) * 2  # the same tensor: a bank then joins its weights once
        one = torch.ones_like(self.n)
        return one, 1 / self.n if self.normalization == "row" else one

    def __call__(self, values: Tensor) -> Tensor:
        """Messages [B, N, C] from values [B, N, C] (usually marginals), both row-major over the image."""
        before, after = self.scales()
        values = values * before
        message = self.apply(values)
        return (message if self.self_message else message - values) * after

    def pair_weights(self, similarity: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Normalised weights [B, P] of pixel pairs (first, second), int64 [B, P], from K_ij [B, P]."""
        before, after = (scale.squeeze(-1).expand(len(similarity), -1) for scale in self.scales())  # [B, N]
        return after.gather(1, first) * similarity * before.gather(1, second)


class ExactFilter(GaussianFilter):
    """K @ values by attention: exact up to rounding, O(N^2) time, O(N) memory.

    exp(-|f_i - f_j|^2 / 2) equals exp(f_i.f_j - |f_j|^2 / 2) times a factor that depends on i only. A softmax over j
    cancels that factor, so softmax attention computes the row-normalised filter n^-1 K v. To recover K v, one key is
    added to the N keys: a sink whose weight is exactly 1 for every query. Its share of the softmax is 1 / (1 + n_i),
    and the output for the pixels' values, multiplied by 1 + n_i, is K v.

    GPUs multiply numbers of 16 bits many times faster than those of 32. With `half`, each factor of an exponent is
    therefore the sum of two such numbers, which has float32's 24 binary digits, and all four products are added in
    float32. Weights and values are rounded to 11 binary digits.

    Args:
        features: [B, N, D], already divided by the bandwidths; may require a gradient.
        normalization, self_message: see the head of the module.
        half: see above; features get no gradient. None: for more than `MANY` pixels on a GPU, in float32 and without
            gradients.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        normalization: str = "symmetric",
        self_message: bool = True,
        half: bool | None = None,
    ):
        super().__init__(normalization, self_message)
        if features.ndim != 3:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D]")
        self.dtype = features.dtype
        # K depends on differences only; centred features make the terms of the exponent small.
        features = features - features.mean(dim=1, keepdim=True).detach()
        largest = features.detach().square().sum(-1).max().item()
        if largest * torch.finfo(features.dtype).eps > EXPONENT_ERROR:
            features = features.double()
        if half is None:
            fast = features.is_cuda and features.dtype == torch.float32 and features.shape[1] > MANY
            half = fast and not features.requires_grad
        energy = features.square().sum(-1, keepdim=True) / 2  # [B, N, 1]
        one, zero = torch.ones_like(energy), torch.zeros_like(energy)
        # query_i . key_j = f_i.f_j - |f_j|^2 / 2, and query_i . sink = |f_i|^2 / 2
        query = torch.cat([features, one, energy], dim=-1)  # [B, N, D + 2]
        key = torch.cat([features, -energy, zero], dim=-1)
        sink = torch.zeros_like(key[:, :1])
        sink[..., -1] = 1
        key = torch.cat([key, sink], dim=1)  # [B, N + 1, D + 2]
        if half:
            query, key = _halves(query.detach(), (0, 0, 1, 1)), _halves(key.detach(), (0, 1, 0, 1))
        self.query, self.key, self.half = query, key, half
        # With a value for the sink and 0 for the pixels, attention returns the sink's share 1 / (1 + n) of it.
        self.total = SINK / self._attend(torch.zeros_like(energy), sink_value=SINK)
        self.n = (self.total - 1).to(self.dtype)

    def _attend(self, values: Tensor, sink_value: float) -> Tensor:
        batch, _, channels = values.shape
        kept, values = values.dtype, F.pad(values.to(self.query.dtype), (0, 0, 0, 1), value=sink_value)  # [B, N + 1, C]
        # Fused kernels expect queries, keys and values of one width, a multiple of 8.
        width = -(-max(self.query.shape[-1], channels) // 8) * 8
        query, key, values = (
            F.pad(t, (0, width - t.shape[-1])).expand(batch, -1, -1).unsqueeze(1)
            for t in (self.query, self.key, values)
        )
        out = F.scaled_dot_product_attention(query, key, values, scale=1.0)[:, 0, :, :channels]  # [B, N, C]
        return out.to(kept)

    def apply(self, values: Tensor) -> Tensor:
        if self.half:
            return _Scaled.apply(values, self)
        mean = self._attend(values.to(self.query.dtype), sink_value=0.0)
        return (mean * self.total).to(values.dtype)


class _Scaled(torch.autograd.Function):
    """K @ values in 16 bits, scaled into their range; K is symmetric, so a gradient is filtered in the same way."""

    @staticmethod
    def forward(ctx, values: Tensor, exact: ExactFilter) -> Tensor:
        ctx.exact = exact
        scale = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
        return exact._attend(values / scale, sink_value=0.0) * (exact.total * scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Scaled.apply(gradient, ctx.exact), None


def _halves(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """The leading 16 bits (0) and the remainder (1) of t [B, N, D], in the given order: [B, N, len(order) * D]."""
    leading = t.half()
    parts = leading, (t - leading.to(t.dtype)).half()
    return torch.cat([parts[i] for i in order], dim=-1)


class SeparableFilter(GaussianFilter):
    """The spatial kernel on a pixel grid: exp(-(dy^2 + dx^2) / 2) is a product, hence K v = G_y v G_x exactly."""

    def __init__(self, positions: GridPositions, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        self.grid = (positions.height, positions.width)
        self.gy, self.gx = (torch.exp(-((a[:, None] - a[None, :]) ** 2) / 2) for a in positions.axes())
        self.n = (self.gy.sum(1)[:, None] * self.gx.sum(1)[None, :]).reshape(1, -1, 1)

    def apply(self, values: Tensor) -> Tensor:
        batch, pixels, channels = values.shape
        grid = values.reshape(batch, *self.grid, channels)  # [B, H, W, C]
        rows = torch.matmul(self.gy, grid.reshape(batch, self.grid[0], -1)).reshape(grid.shape)
        return torch.matmul(self.gx, rows).reshape(batch, pixels, channels)


class FilterBank:
    """The filters of a CRF's kernels, in the order of its kernel names; all receive the same values.

    A subclass may compute the weighted sum or the whole mean-field loop faster, with equal results.
    """

    def __init__(self, filters: Sequence[GaussianFilter]):
        self.filters = list(filters)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N): the images (1 if all share their features) and pixels per image that the filters were made for."""
        return max(len(f.n) for f in self.filters), self.filters[0].n.shape[1]

    def messages(self, values: Tensor) -> list[Tensor]:
        """One message [B, N, C] per kernel: normalised, without weights."""
        return [f(values) for f in self.filters]

    def __call__(self, values: Tensor, log_weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        """The weighted sum of all messages, and with marginals as values, the expected pairwise energy.

        Args:
            values: [B, N, K], usually marginals.
            log_weights: [M], logarithms of the kernels' weights w, which is what a CRF learns.
            compatibility: penalties mu [K, K], row: the pixel's own label, column: the sender's; None: no penalties.

        Returns:
            (sum_m w_m message_m) @ compatibility.T, [B, N, K].
        """
        total = sum(w * f(values) for w, f in zip(log_weights.exp(), self.filters, strict=True))
        return total if compatibility is None else total @ compatibility.T

    def mean_field(
        self, unary: Tensor, log_weights: Tensor, compatibility: Tensor, iterations: int, *, log: bool = True
    ) -> Tensor:
        """log q (or q) [B, N, K] from unary energies [B, N, K]: `pwlib.mean_field` with the energies of `__call__`."""
        return mean_field(unary, lambda q: self(q, log_weights, compatibility), iterations, log=log)
