"""Gaussian filters on the permutohedral lattice, one per kernel, and the bank that joins them.

    K v ~ gain * slice(blur(splat(v)))

The conventions are those of Kraehenbuehl & Koltun's reference code, and so are the marginals. `plain` computes in
PyTorch operations on any device; `compiled` computes the same in float32 on a CPU, about twice as fast. It needs
numba, and where numba is missing `plain` takes its place.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pwlib.filters import FilterBank, GaussianFilter, GridPositions
from pwlib.lattice import geometry, plain
from pwlib.lattice.geometry import Lattice

EPS = 1e-20  # added to row sums, as in the reference code
LARGE = 2**12  # beyond it, float32 has too few digits to place a point inside its simplex


@functools.cache
def _compiled() -> ModuleType:
    """The compiled backend; `plain` where numba is not installed."""
    note = "pwlib compiles the loops of its lattice, which takes some seconds; the result is kept for later processes"
    timer = threading.Timer(5.0, print, [note], {"file": sys.stderr})
    timer.start()
    try:
        from pwlib.lattice import compiled
    except (ImportError, RuntimeError) as error:  # numba raises RuntimeError if it can store its results nowhere
        reason = "numba is not installed" if isinstance(error, ImportError) else f"numba cannot be used ({error})"
        warnings.warn(f"{reason}: the dense CRF takes about twice as long", stacklevel=2)
        return plain
    finally:
        timer.cancel()
    return compiled


def backend(features: Tensor) -> ModuleType:
    """The module that filters such features: `compiled` for float32 on a CPU, else `plain`."""
    return _compiled() if features.device.type == "cpu" and features.dtype == torch.float32 else plain


class LatticeFilter(GaussianFilter):
    """One Gaussian kernel on a permutohedral lattice: filter(values [B, N, C]) -> messages [B, N, C].

    Args:
        features: [B, N, D], already divided by the bandwidths; [1, N, D] serves any number of images.
        normalization, self_message: see `pwlib.filters`; the row sums and K_ii are those of the lattice.

    Raises:
        ValueError: the features are not [B, N, D], not finite, or spread over too many cells to number in 64 bits.
    """

    def __init__(self, features: Tensor, *, normalization: str = "symmetric", self_message: bool = True):
        super().__init__(normalization, self_message)
        if features.ndim != 3 or features.numel() == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, N, D], none of them zero")
        largest = features.detach().abs().max()
        if not torch.isfinite(largest):
            raise ValueError("features hold NaN or infinity; expected finite numbers (is a bandwidth zero?)")
        self.backend = backend(features)
        weight, self.lattice = self.backend.embed(features.double() if largest > LARGE else features)
        self.weight = weight.to(features.dtype)  # [B, N, D + 1]
        self.gain = 1 / (1 + 2.0 ** -features.shape[-1])  # see `geometry`
        ones, mixing = torch.ones_like(self.weight[..., :1]), self.weight.new_full((1, 1, 1), self.gain)
        self.n = EPS + self.backend.message(ones, (self.weight, self.weight), mixing, self.lattice)  # [B, N, 1]
        if not self_message:  # the factor of a pixel's own value in its normalised message, [B, N, 1]
            before, after = self.scales()
            own = torch.minimum(geometry.self_weight(self.weight) * self.gain, self.n)
            self.own_share = own * before * after

    def __call__(self, values: Tensor) -> Tensor:
        return LatticeBank([self])(values, values.new_zeros(1))


class LatticeBank(FilterBank):
    """Several kernels over the same pixels, each on a lattice of its own, with one splat and one slice for all."""

    def __init__(self, filters: Sequence[LatticeFilter]):
        super().__init__(filters)
        self.backend = self.filters[0].backend
        self.self_message = self.filters[0].self_message
        self.gain = self.filters[0].weight.new_tensor([f.gain for f in self.filters])
        self.joined = {}

    @classmethod
    def of(cls, features: Sequence[Tensor | GridPositions], **options) -> LatticeBank:
        """The bank for features [B, N, D] of each kernel; filters of `GridPositions` are kept for the next image.

        options: normalization and self_message, see `LatticeFilter`.
        """
        make = [_grid_filter if isinstance(f, GridPositions) else LatticeFilter for f in features]
        return cls([build(f, **options) for build, f in zip(make, features, strict=True)])

    def join(self, values: Tensor) -> tuple[tuple[Tensor, Tensor], Lattice]:
        """The weights [B, N, A] of all kernels' corners in the splat and in the slice, and their lattices as one.

        The normalisation is part of the weights. The result is kept for values with the same B.
        """
        made, pixels = self.shape
        if values.ndim != 3 or values.shape[1] != pixels or made not in (1, len(values)):
            raise ValueError(
                f"values have shape {tuple(values.shape)}; expected [{'B' if made == 1 else made}, {pixels}, C]"
            )
        key = len(values), torch.is_grad_enabled()  # weights that were joined without gradients have none
        if key not in self.joined:

            def scaled(scales: Sequence[Tensor]) -> Tensor:
                weights = [f.weight * scale for f, scale in zip(self.filters, scales, strict=True)]
                return torch.cat([w.expand(len(values), -1, -1) for w in weights], -1)

            before, after = zip(*(f.scales() for f in self.filters), strict=True)
            splat = scaled(before)
            slice_ = splat if before[0] is after[0] else scaled(after)
            self.joined = {key: ((splat, slice_), Lattice.join([f.lattice for f in self.filters], len(values)))}
        return self.joined[key]

    def __call__(self, values: Tensor, log_weights: Tensor, compatibility: Tensor | None = None) -> Tensor:
        weights, lattice = self.join(values)
        if compatibility is None:
            compatibility = torch.eye(values.shape[-1]).to(values)
        mixing = (log_weights.exp() * self.gain)[:, None, None] * compatibility.T  # [M, K, K], on the vertices
        out = self.backend.message(values, weights, mixing, lattice)
        if self.self_message:
            return out
        own = values * sum(w * f.own_share for w, f in zip(log_weights.exp(), self.filters, strict=True))
        return out - own @ compatibility.T

    def mean_field(
        self, unary: Tensor, log_weights: Tensor, compatibility: Tensor, iterations: int, *, log: bool = True
    ) -> Tensor:
        """See `FilterBank.mean_field`; the compiled backend runs all iterations in one call."""
        if self.backend is plain or not self.self_message:
            return super().mean_field(unary, log_weights, compatibility, iterations, log=log)
        weights, lattice = self.join(unary)
        # An energy that all labels of a pixel share does not change its marginals: Potts becomes a diagonal matrix.
        compatibility = compatibility - compatibility.detach().amax(0)
        mixing = (log_weights.exp() * self.gain)[:, None, None] * compatibility.T
        return self.backend.mean_field(unary, weights, mixing, lattice, iterations, log=log)


@functools.lru_cache(4)
def _cached_filter(height: int, width: int, theta: float, dtype: torch.dtype, device: torch.device, **options):
    with torch.inference_mode(False), torch.no_grad():
        positions = GridPositions(height, width, torch.tensor(theta, dtype=dtype, device=device))
        return LatticeFilter(positions.features(), **options)


def _grid_filter(positions: GridPositions, **options) -> LatticeFilter:
    """The filter of a spatial kernel; the last four are kept, since images often share their size and the bandwidth."""
    theta = positions.theta
    if theta.requires_grad and torch.is_grad_enabled():
        return LatticeFilter(positions.features(), **options)
    return _cached_filter(positions.height, positions.width, theta.item(), theta.dtype, theta.device, **options)
