"""FeatMap-Net: features at three scales, pooled over sliding windows (Lin et al., CVPR 2016, section 3).

    image -> resized by 1.2, 0.8, 0.4 -> VGG's blocks 1 to 5, shared -> block 6, one for each scale
          -> resized to the largest map, concatenated -> 5x5 and 9x9 max pooling with stride 1, concatenated: features
          -> head: logits, one cell per output_stride px of the largest scale -> bilinear resize: one score per pixel

The same features feed the unary head here and the pairwise networks of `pwlib.context`.

Cells of several scales must lie over the same pixels before they may be concatenated. So an image is not resized by
1.2 exactly, but to the nearest whole number of cells: then every scale's map covers the image exactly, the i-th of n
cells covers the i-th n-th of it, and resizing one map to another's size, or to the image's, keeps everything in place.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwlib.unary import (
    Normalize,
    check_vgg_options,
    convolution,
    download_vgg,
    load_vgg_blocks,
    load_vgg_fc6,
    resize_logits,
    vgg_blocks,
)


class FeatMapNet(nn.Module):
    """Multi-scale features on VGG-16, and a unary head: image [B, 3, H, W] in [0, 1] -> logits [B, K, H, W].

    Args:
        num_classes: K, at least 2.
        scales: the image is seen at each; (1.0,) switches multi-scale off.
        pyramid: sides of the sliding pooling windows, in cells, odd; () switches them off.
        output_stride: px of the resized image a cell stands for: 16 in the paper, 8 where images are small.
        dilation: of block 6's first layer. None: 96 / output_stride, so that its taps lie 96 px apart, as every third
            of the 7x7 cells VGG's first fully connected layer reads. 1 or 2 where images are small.
        width: multiplies every layer's channels. batch_norm: behind every convolution but the last.
        weights: "imagenet" for torchvision's VGG-16 (-BN) in blocks 1 to 5 and block 6's first layer; needs width=1.
        dropout: in the head, in training.

    `features` gives [B, feature_channels, h, w], `head` their scores; `coarse` is one after the other. (h, w) are the
    whole numbers of cells nearest to the largest scale times (H, W) / output_stride, at least 1.
    """

    cell_size = None  # the map covers the image exactly, whatever its size

    def __init__(
        self,
        num_classes: int = 21,
        *,
        scales: Sequence[float] = (1.2, 0.8, 0.4),
        pyramid: Sequence[int] = (5, 9),
        output_stride: int = 16,
        dilation: int | None = None,
        width: float = 1.0,
        batch_norm: bool = False,
        weights: str | None = None,
        dropout: float = 0.5,
    ):
        super().__init__()
        check_vgg_options(num_classes, width, weights)
        if not scales or not all(scale > 0 for scale in scales):
            raise ValueError(f"scales are {tuple(scales)}; expected one or more positive numbers")
        if not all(side > 0 and side % 2 for side in pyramid):
            raise ValueError(
                f"pyramid is {tuple(pyramid)}; expected odd numbers of cells, so that windows have a centre"
            )
        if dilation is not None and dilation < 1:
            raise ValueError(f"dilation is {dilation}; expected at least 1")
        self.num_classes, self.width, self.batch_norm = num_classes, width, batch_norm
        self.scales, self.output_stride = tuple(scales), output_stride
        features, first = max(1, round(512 * width)), max(1, round(1024 * width))
        self.feature_channels = features * len(self.scales) * (1 + len(pyramid))
        self.normalize = Normalize()
        self.blocks = vgg_blocks(width=width, batch_norm=batch_norm, output_stride=output_stride)
        dilation = dilation or 96 // output_stride
        self.block6 = nn.ModuleList(
            nn.Sequential(
                *convolution(features, first, dilation=dilation, batch_norm=batch_norm),
                *convolution(first, features, batch_norm=batch_norm),
                *convolution(features, features, batch_norm=batch_norm),
            )
            for _ in self.scales
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(side, stride=1, padding=side // 2) for side in pyramid)
        classifier = nn.Conv2d(features, num_classes, 1)
        nn.init.normal_(classifier.weight, std=0.01)  # near-uniform first predictions
        nn.init.zeros_(classifier.bias)
        hidden = convolution(self.feature_channels, features, 1, batch_norm=batch_norm)
        self.head = nn.Sequential(*hidden, nn.Dropout(dropout), classifier)
        self.to(memory_format=torch.channels_last)
        if weights:
            self.load_vgg(download_vgg(batch_norm))

    def cells(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """(h, w) of the map of an image of `size` (H, W) at `scale`."""
        height, width = (max(1, round(side * scale / self.output_stride)) for side in size)
        return height, width

    def features(self, image: Tensor) -> Tensor:
        image = self.normalize(image)
        maps = []
        for scale, block6 in zip(self.scales, self.block6, strict=True):
            size = [cells * self.output_stride for cells in self.cells(image.shape[-2:], scale)]
            resized = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
            maps.append(block6(self.blocks(resized)))
        largest = self.cells(image.shape[-2:], max(self.scales))
        joined = torch.cat([resize_logits(one, largest) for one in maps], dim=1)
        return torch.cat([joined, *(pool(joined) for pool in self.pools)], dim=1)

    def coarse(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def forward(self, image: Tensor) -> Tensor:
        return resize_logits(self.coarse(image), image.shape[-2:])

    def load_vgg(self, state: Mapping[str, Tensor]) -> None:
        """Start from torchvision's vgg16 (or vgg16_bn) state dict: blocks 1 to 5, and every block 6's first layer."""
        load_vgg_blocks(self.blocks, state)
        for block6 in self.block6:
            load_vgg_fc6(block6[0], state)
