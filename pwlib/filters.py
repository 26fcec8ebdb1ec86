"""Gaussian filtering in feature space: what every pixel hears from all the others.

A dense CRF passes messages with K @ values, where K_ij = exp(-|f_i - f_j|^2 / 2) joins every pixel to every other and
f is position, or position and colour, divided by the kernel's bandwidth (Kraehenbuehl & Koltun, NIPS 2011, eq. 3).
N pixels make N^2 weights, so K is never stored. Three ways to apply it, behind one call `filter(values) -> messages`:

    ExactFilter       any features, N^2 time and O(N) memory, as softmax attention
    SeparableFilter   positions on a pixel grid only: exact and cheap, two small matrix products
    LatticeFilter     any features, time linear in N, approximate (in `pwlib.lattice`)

`make_filters` chooses. All differentiate with respect to the values and to the features, hence to the bandwidths.

Normalisation: with n = K 1, the sum of what a pixel hears, its own vote (K_ii = 1) included,

    "none"       K v                         messages grow with the number of like pixels
    "row"        n^-1 K v                    a weighted mean; not symmetric, so no energy has these messages
    "symmetric"  n^-1/2 K n^-1/2 v           the reference code's choice; still an energy, and positive semi-definite

`self_message=False` takes the pixel's own vote out of the message; n stays what it is, so that an isolated pixel hears
nothing rather than 0/0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

NORMALIZATIONS = ("symmetric", "row", "none")
METHODS = ("auto", "exact", "lattice")

# Up to this many pixels a pass of exact attention is a matter of milliseconds (about 15 ms on two cores at 48x64).
AFFORDABLE = {"cpu": 48 * 64, "cuda": 256 * 256}
# In exp(f_i.f_j - |f_j|^2/2) rounding in the exponent is a relative error of the weight: about eps * |f|^2.
EXPONENT_ERROR = 1e-4


@dataclass(frozen=True)
class GridPositions:
    """Features that are nothing but pixel positions over one bandwidth: row-major over `height` x `width`."""

    height: int
    width: int
    theta: Tensor

    def axes(self) -> tuple[Tensor, Tensor]:
        y = torch.arange(self.height, device=self.theta.device, dtype=self.theta.dtype)
        x = torch.arange(self.width, device=self.theta.device, dtype=self.theta.dtype)
        return y / self.theta, x / self.theta

    def planes(self) -> Tensor:
        """[2, H, W], (x, y): the order matters to a lattice, and this is the reference code's."""
        y, x = torch.meshgrid(*self.axes(), indexing="ij")
        return torch.stack([x, y])

    def features(self) -> Tensor:
        """[1, H*W, 2], plane by plane in memory."""
        return self.planes().flatten(1).T[None]


def check_normalization(normalization: str) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; expected one of {', '.join(NORMALIZATIONS)}")


class GaussianFilter:
    """The part all filters share: normalisation and the self-message around a bare K @ values.

    A subclass sets `n = K 1`, [B, N, 1], in its constructor and gives `apply(values) -> K @ values`; K_ii = 1 in both.
    """

    n: Tensor

    def __init__(self, normalization: str = "symmetric", self_message: bool = True):
        check_normalization(normalization)
        self.normalization = normalization
        self.self_message = self_message

    def apply(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, values: Tensor) -> Tensor:
        """Messages [B, N, C] from values [B, N, C] (marginals, usually), both row-major over the image."""
        if self.normalization == "symmetric":
            scale = self.n.rsqrt()
            values = values * scale
        message = self.apply(values)
        if not self.self_message:
            message = message - values
        if self.normalization == "symmetric":
            message = message * scale
        elif self.normalization == "row":
            message = message / self.n
        return message

    def pair_weights(self, similarity: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Normalised weights [B, P] of pixel pairs from their similarity exp(-|f_i - f_j|^2 / 2)."""
        n = self.n.squeeze(-1).expand(similarity.shape[0], -1)
        if self.normalization == "symmetric":
            return similarity * (n.gather(1, first) * n.gather(1, second)).rsqrt()
        if self.normalization == "row":
            return similarity / n.gather(1, first)
        return similarity


class ExactFilter(GaussianFilter):
    """K @ values by attention: exact up to rounding, O(N^2) time, O(N) memory.

    A row-normalised Gaussian filter is softmax attention, since exp(-|f_i - f_j|^2 / 2) = exp(f_i.f_j - |f_j|^2 / 2)
    times a factor that only depends on i, which the softmax cancels. To get K v itself and not its row-normalised form,
    one more key joins the N, a sink with weight exactly 1 for every query. Its share of the softmax is 1 / (1 + n_i)
    with n = K 1, and the pixels' share of the values, multiplied by 1 + n_i, is K v.

    Args:
        features: [B, N, D], divided by the bandwidths already; may require a gradient.
        normalization: "symmetric", "row" or "none" (see the module's head).
        self_message: whether a pixel's own value is part of its message.
        chunk: queries at a time (None: all). The fused attention kernels need no N x N memory either way; chunks are
            for the progress bar, and for devices where no fused kernel serves.
        progress: show a tqdm bar over the chunks.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        normalization: str = "symmetric",
        self_message: bool = True,
        chunk: int | None = None,
        progress: bool = False,
    ):
        super().__init__(normalization, self_message)
        if features.ndim != 3:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D]")
        self.dtype = features.dtype
        self.chunk = chunk or features.shape[1]
        self.progress = progress
        # Differences are all that counts: centring costs nothing and keeps the exponent's terms small.
        features = features - features.mean(dim=1, keepdim=True).detach()
        largest = features.detach().square().sum(-1).max().item()
        if largest * torch.finfo(features.dtype).eps > EXPONENT_ERROR:
            features = features.double()
        half = features.square().sum(-1, keepdim=True) / 2
        one, zero = torch.ones_like(half), torch.zeros_like(half)
        # The width of queries, keys and values is one, and a multiple of 8: what the fused kernels ask for.
        self.query = torch.cat([features, one, half], dim=-1)
        key = torch.cat([features, -half, zero], dim=-1)
        sink = torch.zeros_like(key[:, :1])
        sink[..., -1] = 1
        self.key = torch.cat([key, sink], dim=1)
        # Attention over nothing but the sink's value gives each pixel's 1 / (1 + n).
        share = self._attend(torch.zeros_like(half), sink_value=1.0)
        self.total = 1 / share
        self.n = (self.total - 1).to(self.dtype)

    def _attend(self, values: Tensor, sink_value: float) -> Tensor:
        batch, _, channels = values.shape
        values = F.pad(values, (0, 0, 0, 1), value=sink_value)
        width = -(-max(self.query.shape[-1], channels) // 8) * 8
        query, key, values = (
            F.pad(t, (0, width - t.shape[-1])).expand(batch, -1, -1).unsqueeze(1)
            for t in (self.query, self.key, values)
        )
        chunks = query.split(self.chunk, dim=2)
        bar = tqdm(chunks, desc="exact messages", unit="chunk", leave=False) if self.progress else chunks
        out = [F.scaled_dot_product_attention(part, key, values, scale=1.0) for part in bar]
        return torch.cat(out, dim=2)[:, 0, :, :channels]

    def apply(self, values: Tensor) -> Tensor:
        heard = self._attend(values.to(self.query.dtype), sink_value=0.0)
        return (heard * self.total).to(values.dtype)


class SeparableFilter(GaussianFilter):
    """The spatial kernel on a pixel grid: exp(-(dy^2 + dx^2) / 2) is a product, so K v = G_y v G_x, exactly."""

    def __init__(self, positions: GridPositions, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        self.grid = (positions.height, positions.width)
        self.gy, self.gx = (torch.exp(-((a[:, None] - a[None, :]) ** 2) / 2) for a in positions.axes())
        self.n = (self.gy.sum(1)[:, None] * self.gx.sum(1)[None, :]).reshape(1, -1, 1)

    def apply(self, values: Tensor) -> Tensor:
        batch, pixels, channels = values.shape
        grid = values.reshape(batch, self.grid[0], self.grid[1], channels)
        rows = torch.matmul(self.gy, grid.reshape(batch, self.grid[0], -1)).reshape(grid.shape)
        return torch.matmul(self.gx, rows).reshape(batch, pixels, channels)


class FilterBank:
    """The filters of a CRF's kernels, applied to the same values."""

    def __init__(self, filters: Sequence[GaussianFilter | Callable[[Tensor], Tensor]]):
        self.filters = list(filters)

    @property
    def shape(self) -> tuple[int, int]:
        """Images (1 where they share their features) and pixels that the filters were made for."""
        return max(len(f.n) for f in self.filters), self.filters[0].n.shape[1]

    def messages(self, values: Tensor) -> list[Tensor]:
        """One [B, N, C] a kernel: normalised, unweighted."""
        return [f(values) for f in self.filters]

    def __call__(self, values: Tensor, weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        """sum_m weights[m] * message_m (@ compatibility [C, C], where given), [B, N, C]."""
        total = weights[0] * self.filters[0](values)
        for weight, f in zip(weights[1:], self.filters[1:], strict=True):
            total = total + weight * f(values)
        return total if compatibility is None else total @ compatibility


def choose_method(method: str, pixels: int, device: torch.device) -> str:
    """What "auto" means for so many pixels on a device: exact where that is affordable, else the lattice."""
    if method not in METHODS:
        raise ValueError(f"filtering is {method!r}; expected one of {', '.join(METHODS)}")
    if method != "auto":
        return method
    return "exact" if pixels <= AFFORDABLE.get(device.type, AFFORDABLE["cpu"]) else "lattice"


def make_filters(
    features: Sequence[Tensor | GridPositions],
    *,
    method: str = "auto",
    normalization: str = "symmetric",
    self_message: bool = True,
) -> FilterBank:
    """The filters for one image (or batch): one an entry of `features`, [B, N, D] or `GridPositions`.

    method: "exact" filters by attention (and positions separably, which is exact too), "lattice" everything on
    permutohedral lattices, "auto" exactly where that is affordable on the device, else on lattices.
    """
    first = features[0]
    pixels = first.height * first.width if isinstance(first, GridPositions) else first.shape[1]
    device = first.theta.device if isinstance(first, GridPositions) else first.device
    options = {"normalization": normalization, "self_message": self_message}
    if choose_method(method, pixels, device) == "lattice":
        from pwlib.lattice import LatticeBank

        return LatticeBank(features, **options)
    return FilterBank(
        [SeparableFilter(f, **options) if isinstance(f, GridPositions) else ExactFilter(f, **options) for f in features]
    )
