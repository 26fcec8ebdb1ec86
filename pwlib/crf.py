"""The fully connected (dense) CRF over the pixels of an image.

    P(x | I) = exp(-E(x)) / Z,    E(x) = sum_i psi_u(x_i) + sum_{i<j} mu(x_i, x_j) sum_m w_m k_m(f_i, f_j)

(Kraehenbuehl & Koltun, NIPS 2011, eqs. 1-3.) The unary energy psi_u is -log_softmax of a network's logits. The spatial
kernel is Gaussian in position, the bilateral kernel in position and colour. The compatibility mu is a penalty: with
Potts, mu(a, b) = [a != b], two similar pixels with different labels cost energy. Mean field (`pwlib.mean_field`)
repeats, for all pixels at once,

    q_i(l) <- softmax_l( -psi_u(l) - sum_l' mu(l, l') sum_m w_m sum_j k_m(f_i, f_j) q_j(l') )

Names in pydensecrf: theta_gamma is `sxy` of addPairwiseGaussian; theta_alpha and theta_beta are `sxy` and `srgb` of
addPairwiseBilateral; a kernel's weight w is `compat`. Bandwidths are standard deviations, not window sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pwlib.filters import NORMALIZATIONS, ExactFilter, FilterBank, GridPositions, SeparableFilter
from pwlib.inputs import at_least, check_image, check_label, one_of
from pwlib.lattice import LatticeBank
from pwlib.trace import Trace, record

METHODS = ("auto", "exact", "lattice")
AFFORDABLE = {"cpu": 48 * 64, "cuda": 256 * 256}  # pixels; exact messages at 48x64 take about 15 ms on two cores


class Kernel(nn.Module):
    """An additional Gaussian kernel of a `DenseCRF`: features of the image, divided by learnable bandwidths.

    Args:
        name: used in traces and plots.
        features: image [B, 3, H, W] in [0, 1] -> [B, H*W, D], in the features' own units.
        theta: D bandwidths, or one for all, in those units.
        weight: initial kernel weight w_m.
        in_pixels: whether bandwidths are lengths in pixels, which scale with an enlarged image; one bool or D.
    """

    def __init__(
        self,
        name: str,
        features: Callable[[Tensor], Tensor],
        theta: float | Sequence[float],
        weight: float = 1.0,
        *,
        in_pixels: bool | Sequence[bool] = False,
    ):
        super().__init__()
        self.name, self.raw_features, self.weight, self.in_pixels = name, features, weight, in_pixels
        self.log_theta = _log_parameter("theta", theta)
        if not isinstance(in_pixels, bool) and len(in_pixels) != self.log_theta.numel():
            counts = f"{self.log_theta.numel()} bandwidths and {len(in_pixels)} values of in_pixels"
            raise ValueError(f"kernel {name!r} has {counts}; expected as many, or one bool")

    def forward(self, image: Tensor) -> Tensor:
        return self.raw_features(image).to(self.log_theta) / self.log_theta.exp()


def choose_method(method: str, pixels: int, device: torch.device) -> str:
    """Return "exact" or "lattice"; "auto" depends on the number of pixels per image and on the device."""
    one_of(METHODS, filtering=method)
    if method != "auto":
        return method
    return "exact" if pixels <= AFFORDABLE.get(device.type, AFFORDABLE["cpu"]) else "lattice"


def make_filters(features: Sequence[Tensor | GridPositions], *, method: str = "auto", **options) -> FilterBank:
    """The filters for a batch of images, one per kernel.

    Args:
        features: of each kernel, [B, N, D] divided by the bandwidths ([1, N, D] for all images), or `GridPositions`.
        method: "exact" filters by attention (grid positions by separable products), "lattice" filters on permutohedral
            lattices, "auto" is exact up to `AFFORDABLE` pixels and uses lattices beyond.
        options: normalization and self_message, see `pwlib.filters`.
    """
    grid, first = isinstance(features[0], GridPositions), features[0]
    pixels, device = (first.height * first.width, first.theta.device) if grid else (first.shape[1], first.device)
    if choose_method(method, pixels, device) == "lattice":
        return LatticeBank.of(features, **options)
    kinds = [SeparableFilter if isinstance(f, GridPositions) else ExactFilter for f in features]
    return FilterBank([kind(f, **options) for kind, f in zip(kinds, features, strict=True)])


class DenseCRF(nn.Module):
    """A fully connected CRF over an image's pixels; `crf(logits, image) -> log_q`.

    Args:
        num_classes: K, at least 2.
        iterations: of mean field, unless a call gives another number.
        theta_alpha, theta_beta: bandwidths of the bilateral kernel, in pixels and in grey levels (0-255).
        theta_gamma: bandwidth of the spatial kernel, in pixels.
        w_bilateral, w_spatial: kernel weights, positive.
        compatibility: "potts" or penalties [K, K]; row: the pixel's own label, column: the sender's.
        normalization: "symmetric", "row" or "none", see `pwlib.filters`.
        self_message: whether a pixel's own marginal is part of its message, as in the reference code. With it, the
            kernel matrix is positive semi-definite, and parallel updates of a Potts model decrease the free energy.
        filtering: "exact", "lattice" or "auto", see `make_filters`.
        extra_kernels: additional `Kernel`s.

    Learnable: `log_w` [M] in the order of `kernel_names`, `compatibility` [K, K], `log_theta_gamma`, `log_theta_alpha`
    and `log_theta_beta`; positive parameters are kept as logarithms. A learned compatibility may become asymmetric (as
    in Zheng et al., ICCV 2015). The update is then no longer that of an energy, since pairs i < j have no order.
    """

    def __init__(
        self,
        num_classes: int = 21,
        *,
        iterations: int = 10,
        theta_alpha: float = 80.0,
        theta_beta: float = 13.0,
        theta_gamma: float = 3.0,
        w_bilateral: float = 10.0,
        w_spatial: float = 3.0,
        compatibility: str | Tensor = "potts",
        normalization: str = "symmetric",
        self_message: bool = True,
        filtering: str = "auto",
        extra_kernels: Sequence[Kernel] = (),
    ):
        super().__init__()
        at_least(2, num_classes=num_classes)
        at_least(0, iterations=iterations)
        one_of(METHODS, filtering=filtering)
        one_of(NORMALIZATIONS, normalization=normalization)
        self.num_classes, self.iterations, self.filtering = num_classes, iterations, filtering
        self.normalization, self.self_message = normalization, self_message
        self.extra_kernels = nn.ModuleList(extra_kernels)
        self.log_theta_gamma = _log_parameter("theta_gamma", theta_gamma)
        self.log_theta_alpha = _log_parameter("theta_alpha", theta_alpha)
        self.log_theta_beta = _log_parameter("theta_beta", theta_beta)
        self.log_w = _log_parameter("kernel weights", [w_spatial, w_bilateral, *(k.weight for k in extra_kernels)])
        if isinstance(compatibility, str) and compatibility != "potts":
            raise ValueError(f"compatibility is {compatibility!r}; expected 'potts' or a tensor of penalties [K, K]")
        potts = 1 - torch.eye(num_classes)
        compatibility = potts if isinstance(compatibility, str) else torch.as_tensor(compatibility).to(potts.dtype)
        if compatibility.shape != potts.shape:
            raise ValueError(f"compatibility has shape {tuple(compatibility.shape)}; expected {list(potts.shape)}")
        self.compatibility = nn.Parameter(compatibility.clone())

    @property
    def kernel_names(self) -> tuple[str, ...]:
        return ("spatial", "bilateral", *(k.name for k in self.extra_kernels))

    def extra_repr(self) -> str:
        units = {"theta_alpha": "px", "theta_beta": "grey levels", "theta_gamma": "px"}
        thetas = ", ".join(f"{t} {getattr(self, f'log_{t}').exp().item():.3g} {unit}" for t, unit in units.items())
        weights = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.kernel_names, self.log_w.exp().tolist(), strict=True))
        return f"{self.num_classes} labels, {thetas}, w: {weights}, {self.normalization}, {self.iterations} iterations"

    def features(self, image: Tensor) -> list[Tensor | GridPositions]:
        """Features [B, N, D] of the kernels, divided by their bandwidths, from the image [B, 3, H, W] in [0, 1].

        `pwlib.tools.dense.dense_crf`, for images of any kind, makes its features itself.
        """
        batch, _, height, width = image.shape
        spatial = GridPositions(height, width, self.log_theta_gamma.exp())
        positions = GridPositions(height, width, self.log_theta_alpha.exp()).planes().expand(batch, -1, -1, -1)
        colours = 255 * image / self.log_theta_beta.exp()  # [B, 3, H, W]
        bilateral = torch.cat([positions, colours], dim=1).flatten(2).transpose(1, 2)  # [B, N, 5]
        return [spatial, bilateral, *(kernel(image) for kernel in self.extra_kernels)]

    def filters(self, image: Tensor, *, self_message: bool | None = None) -> FilterBank:
        """The filters of all kernels for the image [B, 3, H, W] in [0, 1]; self_message None: as the CRF's."""
        features = self.features(check_image(image).to(self.compatibility))
        self_message = self.self_message if self_message is None else self_message
        options = {"normalization": self.normalization, "self_message": self_message}
        return make_filters(features, method=self.filtering, **options)

    def penalties(self) -> Tensor:
        """mu [K, K], row: the pixel's own label, column: the sender's. A subclass may compute it in another way."""
        return self.compatibility.T.contiguous().T  # column-major: messages are multiplied by its transpose

    def forward(
        self,
        logits: Tensor,
        image: Tensor,
        *,
        iterations: int | None = None,
        filters: FilterBank | None = None,
        log: bool = True,
    ) -> Tensor:
        """Run mean field.

        Args:
            logits: [B, K, H, W]; the unary energies are -log_softmax(logits).
            image: RGB [B, 3, H, W] in [0, 1].
            iterations: None: the CRF's own number.
            filters: the result of `filters(image)`, to be reused while image and bandwidths stay the same; None: made
                for this call. Made under `torch.no_grad()`, they send no gradient to the bandwidths.
            log: False: return the marginals q, which is cheaper than exp(log_q).

        Returns:
            Log-marginals log_q [B, K, H, W]. Train with `pwlib.losses.cross_entropy(log_q, label)`: log_q is normalised
            already, so a log_softmax leaves it as it is. Marginals exp(log_q) would be wrong there.

        Raises:
            ValueError: shapes do not fit, logits or image are not finite, or the image is not in [0, 1].
        """
        steps = self.iterations if iterations is None else iterations
        with torch.autocast(logits.device.type, enabled=False):
            unary = self._unary(logits, image)
            batch, pixels, _ = unary.shape
            if filters is None:
                filters = self.filters(image)
            elif filters.shape not in ((1, pixels), (batch, pixels)):
                made = " x ".join(map(str, filters.shape))
                expected = f"{batch} x {pixels}; expected the result of `filters(image)`"
                raise ValueError(f"filters were made for {made} pixels, the image has {expected}")
            out = filters.mean_field(unary, self.log_w, self.penalties(), steps, log=log)  # [B, N, K]
        # Contiguous: the backward pass of nll_loss does not accept a transposed view.
        return out.mT.contiguous().view(logits.shape)

    @torch.no_grad()
    def marginals(self, logits: Tensor, image: Tensor, **options) -> Tensor:
        """Marginals q [B, K, H, W] without a gradient; `options` are those of `forward`."""
        return self(logits, image, log=False, **options)

    @torch.no_grad()
    def trace(self, logits: Tensor, image: Tensor, *, iterations: int | None = None) -> Trace:
        """As `forward`, for one image ([1, ...] or without the batch dimension), but return all quantities.

        The pairwise part of the free energy includes self-messages if they are on. With normalization="row", or with an
        asymmetric compatibility, the updates do not minimise it: it is then only a diagnostic.
        """
        if logits.ndim == 3:
            logits, image = logits[None], image[None]
        if len(logits) != 1:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected one image")
        unary, filters, weights = self._unary(logits, image), self.filters(image), self.log_w.exp()
        return record(
            unary[0],
            image.shape[-2:],
            lambda q: torch.cat(filters.messages(q[None])),  # [M, N, K]
            lambda messages: torch.tensordot(weights, messages, 1) @ self.penalties().T,  # [N, K]
            self.iterations if iterations is None else iterations,
            image=image[0].cpu(),
            kernels=self.kernel_names,
            weights=weights.cpu(),
            compatibility=self.penalties().cpu().contiguous(),
            features=tuple(f[0].cpu() for f in self._feature_rows(image)),
            sums=torch.stack([f.n[0, :, 0] for f in filters.filters]).cpu(),
            normalization=self.normalization,
            self_message=self.self_message,
        )

    @torch.no_grad()
    def energy(self, labels: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        """E(x) [B] of the labellings x, int64 [B, H, W], each pair counted once and without self-messages."""
        unary = self._unary(logits, image)
        labels = check_label(labels, self.num_classes, name="labelling", void=False)
        x = nn.functional.one_hot(labels.flatten(1), self.num_classes).to(unary)  # [B, N, K]
        pairwise = self.filters(image, self_message=False)(x, self.log_w, self.penalties())  # [B, N, K]
        return (x * (unary + pairwise / 2)).sum((1, 2))

    def pair_energy(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Energies mu(x_i, x_j) sum_m w_m k_m(f_i, f_j) of pixel pairs, [B, P, K, K], the label of i first.

        first, second: row-major pixel indices i and j, int64 [B, P]. Differentiable in all parameters. The piecewise
        likelihood needs only these, and no inference.
        """
        if first.shape != second.shape or first.ndim != 2 or len(first) != len(image):
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise ValueError(f"pixel pairs have shapes {shapes}; expected two [{len(image)}, P]")
        total = 0.0
        filters = self.filters(image).filters
        for weight, f, rows in zip(self.log_w.exp(), filters, self._feature_rows(image), strict=True):
            ends = [rows.take_along_dim(index[..., None], dim=1) for index in (first, second)]  # [B, P, D] each
            similarity = torch.exp(-(ends[0] - ends[1]).square().sum(-1) / 2)  # [B, P]
            total = total + weight * f.pair_weights(similarity, first, second)
        return total[..., None, None] * self.penalties()

    def _feature_rows(self, image: Tensor) -> list[Tensor]:
        """`features` with grid positions written out: one [B, N, D] or [1, N, D] per kernel."""
        features = self.features(image.to(self.compatibility))
        return [f.features() if isinstance(f, GridPositions) else f for f in features]

    def _unary(self, logits: Tensor, image: Tensor) -> Tensor:
        """Unary energies [B, N, K] in the parameters' precision, after checking the logits and the image's shape."""
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [B, {self.num_classes}, H, W]")
        expected = [len(logits), 3, *logits.shape[-2:]]
        if list(image.shape) != expected:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected {expected}, the size of the logits")
        # The sum is cheaper than isfinite of each number; it is not finite if one is not, or if it overflows.
        if not logits.detach().sum().isfinite() and not logits.isfinite().all():
            raise ValueError("logits contain NaN or infinity; expected finite numbers (did training diverge?)")
        return -torch.log_softmax(logits.to(self.compatibility).flatten(2), dim=1).mT


def _log_parameter(name: str, value: float | Sequence[float]) -> nn.Parameter:
    value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if not (torch.isfinite(value).all() and (value > 0).all()):
        raise ValueError(f"{name} is {value.tolist()}; expected positive numbers")
    return nn.Parameter(value.log())
