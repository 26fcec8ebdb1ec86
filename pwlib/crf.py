"""The fully connected CRF: energies, mean field, and a trace of everything that happens on the way.

    P(x | I) = exp(-E(x)) / Z,    E(x) = sum_i psi_i(x_i) + sum_{i<j} mu(x_i, x_j) sum_m w_m k_m(f_i, f_j)

(Kraehenbuehl & Koltun, NIPS 2011, eqs. 1-3.) The unary psi is -log_softmax of a network's logits; the k_m are Gaussian
in position (the spatial, or smoothness, kernel) and in position and colour (the bilateral, or appearance, kernel). The
compatibility mu is a *penalty*: with Potts, mu(a, b) = [a != b], two alike pixels pay for disagreeing. Mean field looks
for the product of independent marginals Q that is closest to P; all pixels update at once:

    Q_i(l) <- softmax_l( -psi_i(l) - sum_l' mu(l, l') sum_m w_m sum_j k_m(f_i, f_j) Q_j(l') )

Names beside pydensecrf's: theta_gamma is sxy of addPairwiseGaussian, theta_alpha is sxy of addPairwiseBilateral,
theta_beta is srgb, and compat is the kernel's weight w. Bandwidths are standard deviations, not window sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pwlib.data import VOID
from pwlib.filters import ExactFilter, FilterBank, GridPositions, SeparableFilter, check_normalization
from pwlib.lattice import LatticeBank
from pwlib.trace import Trace, record

METHODS = ("auto", "exact", "lattice")
AFFORDABLE = {"cpu": 48 * 64, "cuda": 256 * 256}  # pixels; exact messages at 48x64 take about 15 ms on two cores
SMALLEST_PROBABILITY = 1e-5  # what pydensecrf's unary_from_softmax clips at


class Kernel(nn.Module):
    """One more Gaussian kernel for a `DenseCRF`: any features of the image, each divided by a learnable bandwidth.

    Args:
        name: what traces and plots call it.
        features: image [B, 3, H, W] in [0, 1] -> [B, H*W, D], in the features' own units.
        theta: D bandwidths (or one for all), in those units.
        weight: the kernel's initial weight w_m.
        in_pixels: whether the bandwidths are lengths in pixels, which grow with an image that is enlarged; one answer
            for all, or one for each.
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
        self.name = name
        self.raw_features = features
        self.weight = weight
        self.log_theta = _log_parameter("theta", theta)
        self.in_pixels = in_pixels
        if not isinstance(in_pixels, bool) and self.log_theta.shape != (len(in_pixels),):
            raise ValueError(
                f"kernel {name!r} has {self.log_theta.numel()} bandwidths and {len(in_pixels)} values of in_pixels; "
                "expected as many, or one bool"
            )

    def forward(self, image: Tensor) -> Tensor:
        return self.raw_features(image).to(self.log_theta) / self.log_theta.exp()


def choose_method(method: str, pixels: int, device: torch.device) -> str:
    """ "exact" or "lattice": what `method` means for so many pixels on a device."""
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
    """The filters for a batch of images, one per kernel.

    Args:
        features: one entry per kernel, [B, N, D] divided by the bandwidths ([1, N, D] for all images), or
            `GridPositions`.
        method: "exact" filters by attention (grid positions by separable products), "lattice" filters on permutohedral
            lattices, "auto" is exact up to `AFFORDABLE` pixels and uses lattices beyond.
        normalization, self_message: see `pwlib.filters`.
    """
    first = features[0]
    pixels = first.height * first.width if isinstance(first, GridPositions) else first.shape[1]
    device = first.theta.device if isinstance(first, GridPositions) else first.device
    options = {"normalization": normalization, "self_message": self_message}
    if choose_method(method, pixels, device) == "lattice":
        return LatticeBank(features, **options)
    return FilterBank(
        [SeparableFilter(f, **options) if isinstance(f, GridPositions) else ExactFilter(f, **options) for f in features]
    )


class DenseCRF(nn.Module):
    """A fully connected CRF over an image's pixels; `crf(logits, image) -> log_q`.

    Args:
        num_classes: K, at least 2.
        iterations: of parallel mean field, where a call names none.
        theta_alpha, theta_beta: bandwidths of the bilateral kernel, in pixels and grey levels (0-255).
        theta_gamma: bandwidth of the spatial kernel, pixels.
        w_bilateral, w_spatial: kernel weights, > 0.
        compatibility: "potts" or a [K, K] penalty; row: the pixel's own label, column: the sender's.
        normalization: "symmetric", "row" or "none"; see `pwlib.filters`.
        self_message: whether a pixel votes for itself, as in the reference code. With its vote the kernel matrix is
            positive semi-definite, which is what makes the parallel update of a Potts model descend.
        filtering: "auto" (exact where affordable, else lattices), "exact" or "lattice".
        extra_kernels: more `Kernel`s.

    Learnable, all with gradients: `log_w` [M] in the order of `kernel_names`, `compatibility` [K, K],
    `log_theta_gamma`, `log_theta_alpha`, `log_theta_beta`. Positive ones are kept as logarithms. An asymmetric
    compatibility can be learned (as in Zheng et al., ICCV 2015) but is then a rule of update, not an energy: the pairs
    i < j have no order.
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
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a CRF needs at least 2 labels to choose between")
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}; expected 0 or more")
        if filtering not in METHODS:
            raise ValueError(f"filtering is {filtering!r}; expected one of {', '.join(METHODS)}")
        check_normalization(normalization)
        self.num_classes = num_classes
        self.iterations = iterations
        self.normalization = normalization
        self.self_message = self_message
        self.filtering = filtering
        self.extra_kernels = nn.ModuleList(extra_kernels)
        self.log_theta_gamma = _log_parameter("theta_gamma", theta_gamma)
        self.log_theta_alpha = _log_parameter("theta_alpha", theta_alpha)
        self.log_theta_beta = _log_parameter("theta_beta", theta_beta)
        self.log_w = _log_parameter("kernel weights", [w_spatial, w_bilateral, *(k.weight for k in extra_kernels)])
        if isinstance(compatibility, str):
            if compatibility != "potts":
                raise ValueError(
                    f"compatibility is {compatibility!r}; expected 'potts' or a [K, K] tensor of penalties"
                )
            compatibility = 1 - torch.eye(num_classes)
        compatibility = torch.as_tensor(compatibility, dtype=torch.get_default_dtype())
        if compatibility.shape != (num_classes, num_classes):
            raise ValueError(
                f"compatibility has shape {tuple(compatibility.shape)}; expected [{num_classes}, {num_classes}]"
            )
        self.compatibility = nn.Parameter(compatibility.clone())

    @property
    def kernel_names(self) -> tuple[str, ...]:
        return ("spatial", "bilateral", *(k.name for k in self.extra_kernels))

    def extra_repr(self) -> str:
        logs = (self.log_theta_alpha, self.log_theta_beta, self.log_theta_gamma)
        alpha, beta, gamma = (f"{p.exp().item():.3g}" for p in logs)
        weights = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.kernel_names, self.log_w.exp().tolist(), strict=True))
        return (
            f"{self.num_classes} labels, theta_alpha {alpha} px, theta_beta {beta} grey levels, "
            f"theta_gamma {gamma} px, w: {weights}, {self.normalization}, {self.iterations} iterations"
        )

    def features(self, image: Tensor) -> list[Tensor | GridPositions]:
        """Each kernel's features of `image` [B, 3, H, W] in [0, 1], over their bandwidths, in `kernel_names`' order."""
        batch, _, height, width = image.shape
        spatial = GridPositions(height, width, self.log_theta_gamma.exp())
        positions = GridPositions(height, width, self.log_theta_alpha.exp()).planes().expand(batch, -1, -1, -1)
        colours = 255 * image / self.log_theta_beta.exp()
        bilateral = torch.cat([positions, colours], dim=1).flatten(2).transpose(1, 2)
        return [spatial, bilateral, *(kernel(image) for kernel in self.extra_kernels)]

    def filters(self, image: Tensor) -> FilterBank:
        """The filters of the kernels over `image`, ready to pass messages."""
        options = {"normalization": self.normalization, "self_message": self.self_message}
        return make_filters(self.features(image), method=self.filtering, **options)

    def pairwise(self, filters: FilterBank, q: Tensor) -> Tensor:
        """Expected pairwise energies [B, N, K] of the marginals q [B, N, K]."""
        return filters(q, self.log_w, self._penalties())

    def _penalties(self) -> Tensor:
        """The matrix mu [K, K] of the linear map `penalize`: applied to the identity, it gives mu transposed."""
        return self.penalize(torch.eye(self.num_classes).to(self.compatibility)).T

    def penalize(self, message: Tensor) -> Tensor:
        """sum_l' mu(l, l') message(l'), [..., K] -> [..., K]: the penalty of each label. A subclass may change it."""
        return message @ self.compatibility.T

    def forward(
        self, logits: Tensor, image: Tensor, *, iterations: int | None = None, filters: FilterBank | None = None
    ) -> Tensor:
        """log_q [B, K, H, W], log-marginals, from logits [B, K, H, W] and the image [B, 3, H, W] in [0, 1].

        Train with `nll_loss(log_q, label)`; never with a cross-entropy on exp(log_q), which would be a second softmax.
        `filters`, what `filters(image)` returned, saves making them again for an image that comes back while the
        bandwidths stay as they are; made under `torch.no_grad()` they are constants, and bandwidths have no gradient.
        Raises ValueError for shapes that do not fit and for logits that are not finite.
        """
        return self._infer(logits, image, iterations, filters, log=True)

    @torch.no_grad()
    def marginals(
        self, logits: Tensor, image: Tensor, *, iterations: int | None = None, filters: FilterBank | None = None
    ) -> Tensor:
        """q [B, K, H, W], the marginals themselves: exp of what `forward` returns, without a gradient, and cheaper."""
        return self._infer(logits, image, iterations, filters, log=False)

    def _infer(
        self, logits: Tensor, image: Tensor, iterations: int | None, filters: FilterBank | None, *, log: bool
    ) -> Tensor:
        height, width = image.shape[-2:]
        steps = self.iterations if iterations is None else iterations
        with torch.autocast(logits.device.type, enabled=False):
            unary, image = self._prepare(logits, image)
            if filters is None:
                filters = self.filters(image)
            elif filters.shape[0] not in (1, len(image)) or filters.shape[1] != height * width:
                made = " x ".join(map(str, filters.shape))
                raise ValueError(
                    f"filters were made for {made} pixels, the image has {len(image)} x {height * width}; "
                    "expected what `filters(image)` returned"
                )
            out = filters.mean_field(unary, self.log_w, self._penalties(), steps, log=log)  # [B, N, K]
        # Contiguous: the backward pass of nll_loss does not accept a transposed view.
        return out.mT.contiguous().reshape(len(image), self.num_classes, height, width)

    @torch.no_grad()
    def trace(self, logits: Tensor, image: Tensor, *, iterations: int | None = None) -> Trace:
        """As `forward`, for one image ([1, ...] or without the batch dimension), keeping everything.

        free_energy is F(Q) = E_Q[E(x)] - H(Q) = KL(Q || P) - log Z. log Z is unknown, so F is no divergence: it may be
        negative, and only its fall means something. Its pairwise part is 1/2 sum_i sum_l q_i(l) pairwise_i(l); a
        pixel's message to itself counts in it where `self_message` is on. With normalization="row", or a compatibility
        that is not symmetric, the update descends no such F: the number is then only a diagnostic.
        """
        if logits.ndim == 3:
            logits, image = logits[None], image[None]
        if len(logits) != 1:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected one image")
        unary, rows_image = self._prepare(logits, image)
        filters, weights = self.filters(rows_image), self.log_w.exp()
        features = [f.features() if isinstance(f, GridPositions) else f for f in self.features(rows_image)]
        return record(
            unary[0],
            image.shape[-2:],
            lambda q: torch.cat(filters.messages(q[None])),  # [M, N, K]
            lambda messages: self.penalize(sum(w * m for w, m in zip(weights, messages, strict=True))),
            self.iterations if iterations is None else iterations,
            image=image[0].cpu(),
            kernels=self.kernel_names,
            weights=weights.cpu(),
            compatibility=self.compatibility.detach().cpu().clone(),
            features=tuple(f[0].cpu() for f in features),
            sums=torch.stack([f.n[0, :, 0] for f in filters.filters]).cpu(),
            normalization=self.normalization,
            self_message=self.self_message,
        )

    @torch.no_grad()
    def energy(self, labels: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        """E(x) [B] of the labellings x, int64 [B, H, W], each pair counted once (without self-messages)."""
        unary, image = self._prepare(logits, image)
        x = nn.functional.one_hot(labels.flatten(1), self.num_classes).to(unary)  # [B, N, K]
        options = {"normalization": self.normalization, "self_message": False}
        filters = make_filters(self.features(image), method=self.filtering, **options)
        return (x * (unary + self.pairwise(filters, x) / 2)).sum((1, 2))

    def pair_energy(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """V(x_i, x_j) = mu(x_i, x_j) sum_m w_m k_m(f_i, f_j) of pixel pairs: [B, P, K, K], x_i's label first.

        first, second: int64 [B, P], row-major pixel indices. Differentiable in every CRF parameter. This is what the
        piecewise likelihood needs: the potentials of some pairs, and no inference.
        """
        batch = len(image)
        if first.shape != second.shape or first.ndim != 2 or len(first) != batch:
            raise ValueError(
                f"pixel pairs have shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two [{batch}, P]"
            )
        image = image.to(self.compatibility)
        total = 0.0
        features = self.features(image)
        for weight, kernel, filt in zip(self.log_w.exp(), features, self.filters(image).filters, strict=True):
            rows = (kernel.features() if isinstance(kernel, GridPositions) else kernel).expand(batch, -1, -1)
            ends = [rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1])) for index in (first, second)]
            similarity = torch.exp(-(ends[0] - ends[1]).square().sum(-1) / 2)
            total = total + weight * filt.pair_weights(similarity, first, second)
        return total[..., None, None] * self.compatibility

    def _prepare(self, logits: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Unary energies [B, N, K] and the image, both checked and in the parameters' precision."""
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [B, {self.num_classes}, H, W]")
        if image.shape != (len(logits), 3, *logits.shape[-2:]):
            expected = [len(logits), 3, *logits.shape[-2:]]
            raise ValueError(f"image has shape {tuple(image.shape)}; expected {expected}, to lie over the logits")
        # A sum is finite only if all its terms are, and costs less than a look at each; it may overflow, too.
        if not logits.detach().sum().isfinite() and not logits.isfinite().all():
            raise ValueError(
                "logits hold NaN or infinity; expected finite numbers (did the network's training diverge?)"
            )
        unary = -torch.log_softmax(logits.to(self.compatibility).flatten(2), dim=1)  # [B, K, N]
        return unary.mT, image.to(self.compatibility)


def _log_parameter(name: str, value: float | Sequence[float]) -> nn.Parameter:
    value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if not (torch.isfinite(value).all() and (value > 0).all()):
        raise ValueError(f"{name} is {value.tolist()}; expected positive numbers")
    return nn.Parameter(value.log())


def dense_crf(
    image: np.ndarray | Tensor,
    probabilities: np.ndarray | Tensor,
    *,
    iterations: int = 10,
    theta_alpha: float = 80.0,
    theta_beta: float = 13.0,
    theta_gamma: float = 3.0,
    w_bilateral: float = 10.0,
    w_spatial: float = 3.0,
    normalization: str = "symmetric",
    filtering: str = "auto",
    device: torch.device | str | None = None,
) -> np.ndarray | Tensor:
    """Refine one image's label probabilities with a dense CRF: what people use pydensecrf for, in one call.

    Args:
        image: uint8 [H, W, 3], RGB, numpy or torch.
        probabilities: float [K, H, W], each pixel's summing to 1: not logits, not -log p. Clipped at 1e-5.
        iterations: mean-field iterations (`d.inference(n)`).
        theta_alpha, theta_beta: bilateral bandwidths, pixels and grey levels (`sxy`, `srgb` of addPairwiseBilateral).
        theta_gamma: spatial bandwidth, pixels (`sxy` of addPairwiseGaussian).
        w_bilateral, w_spatial: the two `compat` numbers (a Potts penalty; what pydensecrf takes as a positive number).
        normalization: "symmetric" as pydensecrf, "row" or "none".
        filtering: "auto", "exact" or "lattice"; see `DenseCRF`.
        device: where to compute; None: the probabilities' own device, CPU for numpy.

    Returns:
        marginals float32 [K, H, W], numpy for numpy, else a tensor on the probabilities' device.
    """
    as_numpy = isinstance(probabilities, np.ndarray)
    image = torch.as_tensor(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image)
    probabilities = torch.as_tensor(probabilities)
    home = probabilities.device
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype} of shape {tuple(image.shape)}; expected uint8 [H, W, 3]")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        expected = f"[K, {image.shape[0]}, {image.shape[1]}], as the image"
        raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}; expected {expected}")
    total = probabilities.float().sum(0)
    if not (bool((probabilities >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)):
        raise ValueError("probabilities of some pixels are negative or do not sum to 1; expected a softmax, not logits")
    device = torch.device(device) if device is not None else home
    crf = DenseCRF(
        len(probabilities),
        iterations=iterations,
        theta_alpha=theta_alpha,
        theta_beta=theta_beta,
        theta_gamma=theta_gamma,
        w_bilateral=w_bilateral,
        w_spatial=w_spatial,
        normalization=normalization,
        filtering=filtering,
    ).to(device)
    pixels = image.to(device).permute(2, 0, 1)[None].float() / 255
    logits = probabilities.to(device).float().clamp_min(SMALLEST_PROBABILITY).log()[None]
    marginals = crf.marginals(logits, pixels)[0].to(home)
    return marginals.numpy() if as_numpy else marginals


def probabilities_from_labels(
    labels: np.ndarray | Tensor, num_classes: int, *, confidence: float = 0.7, void: int = VOID
) -> np.ndarray | Tensor:
    """Probabilities [K, H, W] for `dense_crf` from a partial label map [H, W]: scribbles, or another method's answer.

    `confidence` is what pydensecrf calls gt_prob: the probability that a given label is right. The rest is shared by
    the other labels, so the CRF may overrule it; pixels marked `void` are unlabelled and start uniform.
    """
    as_numpy = isinstance(labels, np.ndarray)
    labels = torch.as_tensor(labels).long()
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; expected at least 2")
    if not 1 / num_classes < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected more than chance (1/{num_classes}) and less than 1")
    known = labels != void
    outside = known & ((labels < 0) | (labels >= num_classes))
    if outside.any():
        raise ValueError(f"labels hold {int(labels[outside][0])}; expected 0 to {num_classes - 1}, or {void} for void")
    one_hot = nn.functional.one_hot(labels.where(known, 0), num_classes).movedim(-1, 0).float()
    other = (1 - confidence) / (num_classes - 1)
    probabilities = torch.where(known, other + (confidence - other) * one_hot, 1 / num_classes)
    return probabilities.numpy() if as_numpy else probabilities
