"""The whole model: the logits of a unary network, and the CRFs that refine them.

    image [B, 3, H, W] -> unary network -> logits [B, K, H, W] -> dense CRF -> log-marginals [B, K, H, W]

Both parts can be replaced: the network by any `nn.Module` from image to logits, the CRF by any module that is called as
`DenseCRF` is. With a `context`, as in the paper, a contextual CRF refines the network's coarse map first:

    features [B, C, h, w] and their logits -> contextual CRF -> log-marginals [B, K, h, w] -> [B, K, H, W] -> dense CRF
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwlib.crf import DenseCRF
from pwlib.networks import DeepLabLargeFOV, as_unary, resize_logits


class PiecewiseTrainedModel(nn.Module):
    """CNN + dense CRF; `model(image, apply_crf=True) -> (unary_output, crf_output)`.

    Args:
        num_classes: K, at least 2.
        crf_iterations: mean-field iterations of the dense CRF, where a call gives no number.
        unary: any module from image to logits; see `pwlib.networks.as_unary`. None: `DeepLabLargeFOV(num_classes)`.
        context: a `ContextualCRF` between the two, or None. The network then needs `features`, their `head`,
            `feature_channels` and `cell_size`, as `FeatMapNet` and `DeepLabLargeFOV` have them.
        crf: module called as crf(logits, image, iterations=n) -> log-marginals. None: `DenseCRF(num_classes)`.
    """

    def __init__(
        self,
        num_classes: int = 21,
        crf_iterations: int = 10,
        *,
        unary: nn.Module | None = None,
        context: nn.Module | None = None,
        crf: nn.Module | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; expected at least 2 classes to choose between")
        if crf_iterations < 0:
            raise ValueError(f"crf_iterations is {crf_iterations}; expected 0 or more")
        self.num_classes, self.crf_iterations = num_classes, crf_iterations
        unary = DeepLabLargeFOV(num_classes) if unary is None else unary
        self.unary = as_unary(unary, num_classes=num_classes)
        if context is not None:
            channels = getattr(self.unary, "feature_channels", None)
            if (channels, num_classes) != (context.in_channels, context.num_classes):
                raise ValueError(
                    f"context is for {context.in_channels} features and {context.num_classes} classes; the network "
                    f"gives {'none' if channels is None else channels} for {num_classes} classes"
                )
        self.context = context
        self.crf = crf if crf is not None else DenseCRF(num_classes)

    def unary_logits(self, image: Tensor) -> Tensor:
        """Logits [B, K, H, W] of the image [B, 3, H, W], float RGB in [0, 1], at the image's size."""
        self._check_precision()
        return self.unary(image)

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The network's coarse map for the context: features [B, C, h, w] and their logits [B, K, h, w]."""
        self._check_precision()
        features = self.unary.features(image)
        return features, self.unary.head(features)

    def to_pixels(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores of the coarse map [B, K, h, w], resized to the image's pixels [B, K, H, W], size = (H, W)."""
        return resize_logits(scores, size, stride=self.unary.cell_size)

    def contextual(self, logits: Tensor, features: Tensor, *, frozen: bool = False) -> Tensor:
        """Log-marginals [B, K, h, w] of the contextual CRF, in float32 (or wider) under autocast too."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.context(logits, features, frozen=frozen)

    def refine(self, logits: Tensor, image: Tensor, *, iterations: int | None = None) -> Tensor:
        """Log-marginals [B, K, H, W] of the dense CRF, in float32 (or wider) under autocast too."""
        # Kernels depend on differences of 1e-3 between features, which half precision does not resolve.
        iterations = self.crf_iterations if iterations is None else iterations
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return self.crf(logits, image, iterations=iterations)

    def forward(
        self, image: Tensor, apply_crf: bool = True, *, iterations: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(unary_output, crf_output): logits and log-marginals [B, K, H, W]; crf_output is None without `apply_crf`.

        `argmax(dim=1)` of either is a labelling [B, H, W]. ValueError for an image that is not float [B, 3, H, W], and
        if the CRF receives logits that are not finite.
        """
        if not apply_crf:
            return self.unary_logits(image), None
        outputs = self.outputs(image, iterations=iterations)
        return outputs["unary"], outputs["crf"]

    def outputs(self, image: Tensor, *, apply_crf: bool = True, iterations: int | None = None) -> dict[str, Tensor]:
        """The outputs of all parts, [B, K, H, W] each, in order: "unary", "context" (if there is one), "crf"."""
        if self.context is None:
            outputs = {"unary": self.unary_logits(image)}
        else:
            size, (features, logits) = image.shape[-2:], self.maps(image)
            outputs = {"unary": self.to_pixels(logits, size)}
            outputs["context"] = self.to_pixels(self.contextual(logits, features), size)
        if apply_crf:
            outputs["crf"] = self.refine(list(outputs.values())[-1], image, iterations=iterations)
        return outputs

    @torch.no_grad()
    def predict(
        self, image: Tensor, *, short_side: int | None = None, crf_long_side: int = 1024, apply_crf: bool = True
    ) -> Tensor:
        """Label probabilities [K, H, W] of one image [3, H, W] of any size, float RGB in [0, 1].

        Args:
            short_side: pixels to which the image's shorter side is resized for the network, so that objects are as
                large as in training (None: as it is).
            crf_long_side: the CRF runs at the image's own size, or at this length of its longer side if it is larger,
                with bandwidths in pixels that are scaled accordingly (`scaled_bandwidths`).
            apply_crf: False for the network alone.
        """
        height, width = image.shape[-2:]
        image = image.to(next(self.parameters()).device)[None]
        scale = short_side / min(height, width) if short_side else 1.0
        small = resize_image(image, _scaled(height, width, scale))
        with kept_modes(self):
            self.eval()
            logits = list(self.outputs(small, apply_crf=False).values())[-1] if apply_crf else self.unary_logits(small)
        crf_scale = min(1.0, crf_long_side / max(height, width))
        size = _scaled(height, width, crf_scale)
        logits = resize_logits(logits, size)
        if apply_crf:
            crf = scaled_bandwidths(self.crf, crf_scale / scale)
            logits = crf(logits, resize_image(image, size), iterations=self.crf_iterations)
        return resize_logits(torch.softmax(logits, dim=1), (height, width))[0]

    def _check_precision(self) -> None:
        for parameter in self.crf.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"the model's parameters are {parameter.dtype}; expected torch.float32, which the CRF needs: for "
                    "half precision in the network use torch.autocast (the trainer's amp=True)"
                )


@contextlib.contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore, after the block, the training or evaluation mode of every sub-module."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training  # `part.train(training)` would change its sub-modules, too


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of image [B, 3, h, w] to [B, 3, H, W], size = (H, W), antialiased when it shrinks."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def scaled_bandwidths(crf: nn.Module, factor: float) -> nn.Module:
    """A copy of `crf` for images that are `factor` times as large.

    Bandwidths in pixels grow with it: theta_alpha, theta_gamma, and those that an extra `Kernel` declares `in_pixels`.
    theta_beta stays, and so do the weights of normalised kernels.
    """
    crf = copy.deepcopy(crf)
    with torch.no_grad():
        for name in ("log_theta_alpha", "log_theta_gamma"):
            if hasattr(crf, name):
                getattr(crf, name).add_(math.log(factor))
        for kernel in getattr(crf, "extra_kernels", ()):
            kernel.log_theta.add_(math.log(factor) * torch.as_tensor(kernel.in_pixels).to(kernel.log_theta))
        if getattr(crf, "normalization", None) == "none":
            crf.log_w.sub_(2 * math.log(factor))  # factor^2 times as many pixels send messages
    return crf


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))
