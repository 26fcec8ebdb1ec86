"""Label images of any size: the network sees them as large as its training images, the CRF at their size.

`label_image` needs little memory, even for large images: it runs the network in tiles and resizes the probabilities a
few classes at a time. A tile overlaps its neighbours by half the receptive field, and starts at a multiple of the cell
size, so that the cells inside are the same as without tiles. Only networks with a fixed `cell_size` and a
`receptive_field` (DeepLab-LargeFOV) are tiled, and only without a context.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwlib.model import PiecewiseTrainedModel, kept_modes
from pwlib.networks import resize_logits

TILE = 1024  # px, without the overlap
LIMIT = 2**25  # number of float32 values of one chunk of classes (128 MB)
CRF_LONG_SIDE = 1024  # px
UNLIMITED = 2**62


@torch.no_grad()
def predict(
    model: PiecewiseTrainedModel,
    image: Tensor,
    *,
    short_side: int | None = None,
    crf_long_side: int = CRF_LONG_SIDE,
    apply_crf: bool = True,
) -> Tensor:
    """Label probabilities [K, H, W] of one image [3, H, W] of any size, float RGB in [0, 1].

    Args:
        short_side: pixels to which the image's shorter side is resized for the network, so that objects are as large as
            in training (None: as it is).
        crf_long_side: the CRF runs at the image's own size, or at this length of its longer side if it is larger, with
            bandwidths in pixels that are scaled accordingly (`scaled_bandwidths`).
        apply_crf: False for the network alone.
    """
    probability = _probabilities(model, image, short_side, crf_long_side, apply_crf, UNLIMITED, UNLIMITED)
    return resize_logits(probability, image.shape[-2:])[0]


@torch.no_grad()
def label_image(
    model: PiecewiseTrainedModel,
    image: Tensor,
    *,
    short_side: int | None = None,
    crf_long_side: int = CRF_LONG_SIDE,
    apply_crf: bool = True,
    tile: int = TILE,
    limit: int = LIMIT,
) -> tuple[Tensor, Tensor]:
    """The most probable class, int64 [H, W], and its probability, float32 [H, W], of one image [3, H, W].

    Args:
        short_side, crf_long_side, apply_crf: see `predict`.
        tile: side of the network's tiles in px. limit: number of values of the largest map at the image's size.
    """
    height, width = image.shape[-2:]
    probability = _probabilities(model, image, short_side, crf_long_side, apply_crf, tile, limit)
    best = torch.full((height, width), -1.0, device=probability.device)
    label = torch.zeros(height, width, dtype=torch.int64, device=probability.device)
    start = 0
    for part in _chunks(probability, height * width, limit):
        confidence, index = resize_logits(part, (height, width))[0].max(0)  # [H, W] each
        better = confidence > best
        best, label = torch.where(better, confidence, best), torch.where(better, index + start, label)
        start += part.shape[1]
    return label, best


def _probabilities(
    model: PiecewiseTrainedModel,
    image: Tensor,
    short_side: int | None,
    crf_long_side: int,
    apply_crf: bool,
    tile: int,
    limit: int,
) -> Tensor:
    """Label probabilities [1, K, h, w] at the size at which the CRF runs."""
    height, width = image.shape[-2:]
    image = image.to(next(model.parameters()).device)[None]  # [1, 3, H, W]
    scale = short_side / min(height, width) if short_side else 1.0
    crf_scale = min(1.0, crf_long_side / max(height, width))
    small, size = (tuple(max(1, round(side * s)) for side in (height, width)) for s in (scale, crf_scale))
    with kept_modes(model):
        model.eval()
        logits = _network(model, _resize_image(image, small), size, apply_crf, tile, limit)
    if apply_crf:
        logits = scaled_bandwidths(model.crf, crf_scale / scale)(logits, _resize_image(image, size))
    return torch.softmax(logits, dim=1)


def _network(
    model: PiecewiseTrainedModel, image: Tensor, size: tuple[int, int], apply_crf: bool, tile: int, limit: int
) -> Tensor:
    """The logits [1, K, h, w] that the CRF receives, for an image [1, 3, H, W] and (h, w) = size."""
    unary, cell = model.unary, getattr(model.unary, "cell_size", None)
    if model.context is not None or cell is None or not hasattr(unary, "receptive_field"):
        outputs = model.outputs(image, apply_crf=False)
        return resize_logits(outputs["context" if apply_crf and "context" in outputs else "unary"], size)
    coarse = coarse_in_tiles(unary, image, tile)
    chunks = _chunks(coarse, image.shape[-2] * image.shape[-1], limit)
    return torch.cat([resize_logits(resize_logits(c, image.shape[-2:], stride=cell), size) for c in chunks], dim=1)


def _chunks(maps: Tensor, pixels: int, limit: int) -> tuple[Tensor, ...]:
    """Split maps [1, K, h, w] into chunks of classes that have at most `limit` values at a size of `pixels`."""
    return maps.split(max(1, limit // pixels), dim=1)


def coarse_in_tiles(network: nn.Module, image: Tensor, tile: int = TILE) -> Tensor:
    """`network.coarse(image)`, [B, K, h, w], computed in overlapping tiles of at most `tile` px plus overlap."""
    cell, (height, width) = network.cell_size, image.shape[-2:]
    step = max(1, tile // cell)  # cells
    halo = -(-network.receptive_field // (2 * cell))  # cells
    cells = [-(-side // cell) for side in (height, width)]
    rows = []
    for top in range(0, cells[0], step):
        row = []
        for left in range(0, cells[1], step):
            y, x = max(0, top - halo), max(0, left - halo)
            part = image[..., y * cell : (top + step + halo) * cell, x * cell : (left + step + halo) * cell]
            row.append(network.coarse(part)[..., top - y : top - y + step, left - x : left - x + step])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def _resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of image [B, 3, h, w] to [B, 3, H, W], size = (H, W), antialiased when it shrinks."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


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
