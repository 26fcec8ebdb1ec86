"""`dense_crf`: refine given label probabilities with a dense CRF, as with pydensecrf, in one call.

The energies are those of `pwlib.crf`. Positions may have one axis (signals), two (images) or three (volumes), and an
image any number of channels, with bandwidths per axis and per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pwlib.crf import make_filters
from pwlib.data import VOID
from pwlib.data.images import ORIENTATION
from pwlib.filters import GridPositions
from pwlib.inputs import at_least, check_label

SMALLEST_PROBABILITY = 1e-5  # as in unary_from_softmax of pydensecrf
THETA_BETA = 13.0  # grey levels


@torch.no_grad()
def dense_crf(
    image: Any,
    probabilities: np.ndarray | Tensor | Mapping[str, Tensor],
    *,
    iterations: int = 10,
    theta_alpha: float | Sequence[float] = 80.0,
    theta_beta: float | Sequence[float] | None = None,
    theta_gamma: float | Sequence[float] = 3.0,
    w_bilateral: float = 10.0,
    w_spatial: float = 3.0,
    spacing: float | Sequence[float] = 1.0,
    compatibility: np.ndarray | Tensor | None = None,
    normalization: str = "symmetric",
    self_message: bool = True,
    filtering: str = "auto",
    device: str | torch.device | None = None,
) -> np.ndarray | Tensor:
    """Refine the label probabilities of one image with a dense CRF.

    S stands for the size of the image: (H, W), (D, H, W) for a volume, (N,) for a signal.

    Args:
        image: a PIL image, or numpy or torch of shape [*S] or [*S, C] (channels last): uint8, or any numbers if
            `theta_beta` is given in their unit. Depth and other features of a pixel are further channels. Rotate a
            PIL image with an EXIF orientation first, by PIL.ImageOps.exif_transpose.
        probabilities: [K, *S] or [1, K, *S], summing to 1 at each pixel. One channel ([1, *S] or [H, W], a sigmoid)
            is the probability of the foreground. The dict of a torchvision network (key "out") or of transformers
            ("logits") contains logits [1, K, h, w]: they are resized to the image, and a softmax is taken.
        theta_alpha, theta_gamma: bandwidths of the bilateral and of the spatial kernel's positions in px (or in the
            unit of `spacing`), one for all axes or one per axis of S: (y, x). pydensecrf's order is (x, y).
        theta_beta: bandwidth of colours, one for all channels or one per channel; None: 13 grey levels.
        w_bilateral, w_spatial: weights of the kernels; 0 leaves a kernel out.
        spacing: distance of neighbouring pixels, one for all axes or one per axis of S (voxels in mm).
        compatibility: penalties [K, K]; None: Potts.
        normalization, self_message, filtering: see `DenseCRF`.
        device: where to compute; None: the probabilities' device, the CPU for numpy.

    Returns:
        Marginals float32 of the probabilities' shape: numpy if they are, else a tensor on their device.

    Raises:
        ValueError: shapes or dtypes do not fit, a number is NaN, the probabilities are no distribution, or a PIL image
            has an EXIF orientation.
    """
    pixels = _pixels(image)
    as_numpy = isinstance(probabilities, np.ndarray)
    given = _softmax(probabilities, pixels) if isinstance(probabilities, Mapping) else torch.as_tensor(probabilities)
    p, size = _labelled(given.detach(), pixels.shape)  # [K, *S]
    channels = pixels.reshape(math.prod(size), -1)  # [N, C]
    if theta_beta is None and pixels.dtype != torch.uint8:
        raise ValueError(f"image is {pixels.dtype}; expected uint8, or theta_beta= in the unit of its values")
    at_least(0, iterations=iterations)
    p = _check_distribution(p)
    device = torch.device(given.device if device is None else device)
    alpha = _per("axis", "theta_alpha", theta_alpha, len(size)).to(device)
    gamma = _per("axis", "theta_gamma", theta_gamma, len(size)).to(device)
    step = _per("axis", "spacing", spacing, len(size)).to(device)
    beta = _per("channel", "theta_beta", THETA_BETA if theta_beta is None else theta_beta, channels.shape[1]).to(device)
    channels = channels.to(device).float()
    colours = 255 * (channels / 255) / beta  # rounded as in `DenseCRF`, whose images are in [0, 1]
    if not colours.isfinite().all():
        raise ValueError("image contains NaN or infinity; expected finite numbers")
    for name, weight in (("w_spatial", w_spatial), ("w_bilateral", w_bilateral)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}; expected a number of at least 0")
    weights = [weight for weight in (w_spatial, w_bilateral) if weight]
    features = []
    if w_spatial:
        theta = gamma / step
        square = len(size) == 2 and theta[0] == theta[1]
        features.append(GridPositions(*size, theta[0]) if square else _positions(size, theta)[None])
    if w_bilateral:
        features.append(torch.cat([_positions(size, alpha / step), colours], 1)[None])  # [1, N, D + C]
    logits = p.to(device).flatten(1).clamp_min(SMALLEST_PROBABILITY).log()  # [K, N]
    unary = -torch.log_softmax(logits, 0).mT[None]  # [1, N, K]
    if features:
        potts = 1 - torch.eye(len(p))
        mu = potts if compatibility is None else torch.as_tensor(compatibility, dtype=torch.float32)
        if mu.shape != potts.shape:
            raise ValueError(f"compatibility has shape {tuple(mu.shape)}; expected {list(potts.shape)}")
        filters = make_filters(features, method=filtering, normalization=normalization, self_message=self_message)
        q = filters.mean_field(unary, torch.tensor(weights, device=device).log(), mu.to(device), iterations, log=False)
    else:
        q = (-unary).softmax(-1)
    q = q[0].mT.contiguous()  # [K, N]
    q = q[1:] if given.numel() == len(channels) else q  # of a sigmoid: the foreground
    q = q.reshape(given.shape).to(given.device)
    return q.numpy() if as_numpy else q


def _pixels(image: Any) -> Tensor:
    """The image as a tensor [*S] or [*S, C]; a PIL image as uint8 grey or RGB, or as numbers of more than 8 bits."""
    if hasattr(image, "convert"):
        image.load()  # Pillow rotates a TIFF while it decodes the pixels
        # Whether the network saw the stored or the rotated pixels cannot be known: `np.asarray` does not rotate.
        if (orientation := image.getexif().get(ORIENTATION)) in range(2, 9):
            raise ValueError(
                f"image has the EXIF orientation {orientation}; expected ImageOps.exif_transpose(image), for the "
                "network too, or np.asarray(image) if the network saw the pixels as they are stored"
            )
        # `convert` would clip 16-bit and floating-point pixels.
        image = np.array(image if image.mode == "L" or image.mode[0] in "IF" else image.convert("RGB"))
        image = image.astype(image.dtype.newbyteorder("="))
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"image is a {type(image).__name__}; expected a PIL image, numpy or torch [H, W, 3]")
    return torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image.detach()


def _softmax(output: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """Probabilities [1, K, H, W] from the output of another network, at the size of the image."""
    key = next((key for key in ("out", "logits") if key in output), None)
    if key is None:
        raise ValueError(f"probabilities are a dict of {', '.join(map(str, output))}; expected logits in 'out'")
    if output[key].ndim != 4 or pixels.ndim not in (2, 3):
        shape = tuple(output[key].shape)
        raise ValueError(f"{key!r} has shape {shape}; expected [1, K, h, w], for one image [H, W, 3]")
    logits = output[key].detach().float()
    return F.interpolate(logits, tuple(pixels.shape[:2]), mode="bilinear", align_corners=False).softmax(1)


def _labelled(given: Tensor, image: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The probabilities [K, *S], with the background of a sigmoid, and S, from the shape of the image."""
    options = [given] + ([given[None]] if given.ndim <= 2 else [given[0]] if len(given) == 1 else [])
    for p in options:
        size = tuple(p.shape[1:])
        if size and tuple(image[: len(size)]) == size and len(image) - len(size) <= 1:
            if p.ndim == given.ndim + 1 and not given.is_floating_point():
                raise ValueError("probabilities are labels; expected floats: probabilities_from_labels makes them")
            return (torch.cat([1 - p, p]) if len(p) == 1 else p), size
    size = ", ".join(map(str, image[:2]))
    remedy = f"; resize the network's logits to ({size}) before the softmax"
    if len(image) == 3 and image[0] == 3 and tuple(given.shape[-2:]) == tuple(image[1:]):
        size = ", ".join(map(str, image[1:]))
        remedy = f" (the image has shape {list(image)}; expected its channels last)"
    elif tuple(given.shape[:2]) == tuple(image[:2]):
        remedy = "; move the classes to the first axis"
    elif given.ndim == len(image) + 1 and len(given) > 1:
        remedy = "; give one image at a time"
    raise ValueError(f"probabilities have shape {tuple(given.shape)}; expected [K, {size}], as the image{remedy}")


def _check_distribution(p: Tensor) -> Tensor:
    """The probabilities in float32, normalised; ValueError if they are negative or do not sum to 1 at each pixel."""
    tolerance = 1e-3 if p.dtype not in (torch.float16, torch.bfloat16) else 1e-2
    p = p.float()
    if p.isnan().any():
        raise ValueError("probabilities contain NaN; expected numbers from 0 to 1 (did training diverge?)")
    total = p.sum(0, keepdim=True)
    if (p < 0).any() or not torch.allclose(total, torch.ones_like(total), rtol=0, atol=tolerance):
        raise ValueError(
            "probabilities of some pixels are negative or do not sum to 1; expected a softmax over the classes (of "
            "logits z [K, H, W] in torch z.softmax(0)), not logits, log-probabilities or a sigmoid per class"
        )
    return p if tolerance < 1e-2 else p / total


def _per(what: str, name: str, value: float | Sequence[float], count: int) -> Tensor:
    """One positive number per axis or channel, float32 [count]."""
    value = torch.as_tensor(value, dtype=torch.float32)
    if value.shape not in ((), (count,)):
        raise ValueError(f"{name} has {value.numel()} numbers; expected one, or one per {what}: {count}")
    if not (value.isfinite().all() and (value > 0).all()):
        raise ValueError(f"{name} is {value.tolist()}; expected positive numbers")
    return value.log().exp().expand(count)  # rounded as in `DenseCRF`, whose parameters are logarithms


def _positions(size: Sequence[int], thetas: Tensor) -> Tensor:
    """Positions [N, D] of a grid, divided by the bandwidth per axis, the last axis first, as in `GridPositions`."""
    axes = [torch.arange(n, device=thetas.device) / theta for n, theta in zip(size, thetas, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).reshape(-1, len(size))


def probabilities_from_labels(
    labels: np.ndarray | Tensor, num_classes: int, *, confidence: float = 0.7, void: int = VOID
) -> np.ndarray | Tensor:
    """Probabilities [K, H, W] for `dense_crf` from an incomplete label map [H, W]: strokes, or another method's result.

    A labelled pixel gives its label the probability `confidence` (pydensecrf's gt_prob) and shares the rest among the
    other labels, so that the CRF may change it. Pixels with the value `void` start with a uniform distribution.

    ValueError if labels are no integers (a sigmoid [H, W] is given to `dense_crf` itself) or no classes.
    """
    as_numpy = isinstance(labels, np.ndarray)
    labels = check_label(torch.as_tensor(labels), name="label map")  # int64; a mask of probabilities is refused
    at_least(2, num_classes=num_classes)
    if not 1 / num_classes < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected more than chance (1/{num_classes}) and less than 1")
    known = labels != void
    check_label(labels[known], num_classes, name=f"label map (void: {void})", void=False)
    if num_classes == 2 and void == VOID and not known.all() and not labels[known].any():
        raise ValueError(
            "labels hold only 0 and 255 (void); expected classes 0 and 1: for a mask of 0 and 255, labels > 0"
        )
    one_hot = F.one_hot(labels.where(known, 0), num_classes).movedim(-1, 0).float()
    other = (1 - confidence) / (num_classes - 1)
    probabilities = torch.where(known, other + (confidence - other) * one_hot, 1 / num_classes)
    return probabilities.numpy() if as_numpy else probabilities
