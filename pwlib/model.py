"""The whole model: the logits of a unary network, and the CRFs that refine them.

    image [B, 3, H, W] -> unary network -> logits [B, K, H, W] -> dense CRF -> log-marginals [B, K, H, W]

Both parts can be replaced: the network by any `nn.Module` from image to logits, the CRF by any module that is called as
`DenseCRF` is. With a `context`, as in the paper, a contextual CRF refines the network's coarse map first:

    features [B, C, h, w] and their logits -> contextual CRF -> log-marginals [B, K, h, w] -> [B, K, H, W] -> dense CRF
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pwlib.crf import DenseCRF
from pwlib.inputs import at_least
from pwlib.networks import DeepLabLargeFOV, as_unary, resize_logits


class PiecewiseTrainedModel(nn.Module):
    """CNN + dense CRF; `model(image, apply_crf=True) -> (unary_output, crf_output)`.

    Args:
        num_classes: K, at least 2.
        crf_iterations: mean-field iterations of the dense CRF, unless a call gives another number; sets
            `crf.iterations`. None: the CRF's own number.
        unary: any module from image to logits; see `pwlib.networks.as_unary`. None: `DeepLabLargeFOV(num_classes)`.
        context: a `ContextualCRF` between the two, or None. The network then needs `features`, their `head`,
            `feature_channels` and `cell_size`, as `FeatMapNet` and `DeepLabLargeFOV` have them.
        crf: module called as crf(logits, image, iterations=n) -> log-marginals, where n may be None. None:
            `DenseCRF(num_classes)`.
    """

    def __init__(
        self,
        num_classes: int = 21,
        crf_iterations: int | None = None,
        *,
        unary: nn.Module | None = None,
        context: nn.Module | None = None,
        crf: nn.Module | None = None,
    ):
        super().__init__()
        at_least(2, num_classes=num_classes)
        self.num_classes = num_classes
        unary = DeepLabLargeFOV(num_classes) if unary is None else unary
        self.unary = as_unary(unary, num_classes=num_classes)
        if context is not None:
            channels = getattr(self.unary, "feature_channels", None)
            if (channels, num_classes) != (context.in_channels, context.num_classes):
                given = f"{context.in_channels} features and {context.num_classes} classes"
                expected = f"{'none' if channels is None else channels} for {num_classes} classes"
                raise ValueError(f"context is for {given}; the network gives {expected}")
        self.context = context
        self.crf = DenseCRF(num_classes) if crf is None else crf
        if crf_iterations is not None:
            at_least(0, crf_iterations=crf_iterations)
            self.crf.iterations = crf_iterations

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
        """The outputs of all parts, [B, K, H, W] each, in order: "unary", "context" (if there is one), "crf".

        apply_crf: whether to run the dense CRF; the context, if there is one, always runs.
        """
        if self.context is None:
            outputs = {"unary": self.unary_logits(image)}
        else:
            size, (features, logits) = image.shape[-2:], self.maps(image)
            outputs = {"unary": self.to_pixels(logits, size)}
            outputs["context"] = self.to_pixels(self.contextual(logits, features), size)
        if apply_crf:
            outputs["crf"] = self.refine(list(outputs.values())[-1], image, iterations=iterations)
        return outputs

    def _check_precision(self) -> None:
        for dtype in {p.dtype for p in self.crf.parameters()} & {torch.float16, torch.bfloat16}:
            raise ValueError(
                f"the model's parameters are {dtype}; expected torch.float32, which the CRF needs: for half precision "
                "in the network use torch.autocast (the trainer's amp=True)"
            )


@contextlib.contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore, after the block, the training or evaluation mode of every sub-module."""
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training  # `inner.train(training)` would change its sub-modules, too
