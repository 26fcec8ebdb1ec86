"""Label large images with bounded memory: the network in tiles, the probabilities a few classes at a time.

The result is that of `PiecewiseTrainedModel.predict`. A tile overlaps its neighbours by half the receptive field, and
starts at a multiple of the cell size, so that the cells inside are the same as without tiles. Only networks with a
fixed `cell_size` and a `receptive_field` (DeepLab-LargeFOV) are tiled, and only without a context.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pwlib.model import PiecewiseTrainedModel, kept_modes, resize_image, scaled_bandwidths
from pwlib.networks import resize_logits

TILE = 1024  # px, without the overlap
LIMIT = 2**25  # number of float32 values of one chunk of classes (128 MB)


@torch.no_grad()
def label_image(
    model: PiecewiseTrainedModel,
    image: Tensor,
    *,
    short_side: int | None = None,
    crf_long_side: int = 1024,
    apply_crf: bool = True,
    tile: int = TILE,
    limit: int = LIMIT,
) -> tuple[Tensor, Tensor]:
    """The most probable class, int64 [H, W], and its probability, float32 [H, W], of one image [3, H, W].

    Args:
        short_side, crf_long_side, apply_crf: see `PiecewiseTrainedModel.predict`.
        tile: side of the network's tiles in px. limit: number of values of the largest map at the image's size.
    """
    height, width = image.shape[-2:]
    image = image.to(next(model.parameters()).device)[None]  # [1, 3, H, W]
    scale = short_side / min(height, width) if short_side else 1.0
    crf_scale = min(1.0, crf_long_side / max(height, width))
    small, size = (tuple(max(1, round(side * s)) for side in (height, width)) for s in (scale, crf_scale))
    with kept_modes(model):
        model.eval()
        logits = _network(model, resize_image(image, small), size, apply_crf, tile, limit)  # [1, K, h, w]
    if apply_crf:
        crf = scaled_bandwidths(model.crf, crf_scale / scale)
        logits = crf(logits, resize_image(image, size), iterations=model.crf_iterations)
    probability = torch.softmax(logits, dim=1)
    del logits
    best = torch.full((height, width), -1.0, device=image.device)
    label = torch.zeros(height, width, dtype=torch.int64, device=image.device)
    start = 0
    for part in _chunks(probability, height * width, limit):
        confidence, index = resize_logits(part, (height, width))[0].max(0)  # [H, W] each
        better = confidence > best
        best, label = torch.where(better, confidence, best), torch.where(better, index + start, label)
        start += part.shape[1]
    return label, best


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


def _chunks(maps: Tensor, pixels: int, limit: int) -> Iterator[Tensor]:
    """Split maps [1, K, h, w] into chunks of classes that have at most `limit` values at a size of `pixels`."""
    yield from maps.split(max(1, limit // pixels), dim=1)


def coarse_in_tiles(network: nn.Module, image: Tensor, tile: int = TILE) -> Tensor:
    """`network.coarse(image)`, [B, K, h, w], computed in overlapping tiles of at most `tile` px plus overlap."""
    cell, (height, width) = network.cell_size, image.shape[-2:]
    step = max(1, tile // cell)  # cells
    halo = -(-network.receptive_field // (2 * cell))  # cells
    cells = [-(-side // cell) for side in (height, width)]
    if cells[0] <= step and cells[1] <= step:
        return network.coarse(image)
    rows = []
    for top in range(0, cells[0], step):
        row = []
        for left in range(0, cells[1], step):
            y, x = max(0, top - halo), max(0, left - halo)
            part = image[..., y * cell : (top + step + halo) * cell, x * cell : (left + step + halo) * cell]
            row.append(network.coarse(part)[..., top - y : top - y + step, left - x : left - x + step])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)
