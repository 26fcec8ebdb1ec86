"""Unary networks on VGG-16: image [B, 3, H, W] -> logits [B, K, H, W].

DeepLab-LargeFOV (Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", ICLR
2015). VGG-16 halves its feature map five times. Here the last two poolings keep the resolution, and the layers behind
them are dilated, so that each reads inputs as far apart as in VGG:

    image -> block1 /2 -> block2 /2 -> block3 /2 -> block4 -> block5, dilation 2 -> fc6 3x3, dilation 12 -> fc7 1x1
          -> classifier 1x1: one cell per 8 px -> bilinear resize: logits of every pixel

FeatMap-Net (Lin et al., CVPR 2016, section 3) computes features at three scales and pools them over sliding windows:

    image -> resized by 1.2, 0.8, 0.4 -> VGG's blocks 1 to 5 (shared) -> block 6 (one for each scale)
          -> resized to the largest map, concatenated -> 5x5 and 9x9 max pooling with stride 1, concatenated: features
          -> head: one cell per output_stride px of the largest scale -> bilinear resize: logits of every pixel

A 2x2 pooling puts cell i between pixels 2i and 2i + 1. After three of them cell i is centred on pixel 8i + 3.5,
whatever the size of the image. `resize_logits` and `cell_labels` use this geometry.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwlib.data import VOID
from pwlib.inputs import at_least, check_image
from pwlib.pretrained import load_vgg_blocks, load_vgg_fc, read_vgg

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of 3x3 convolutions of each block


class Normalize(nn.Module):
    """Normalise an image [B, 3, H, W], RGB in [0, 1], by ImageNet's mean and standard deviation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (check_image(image) - self.mean) / self.std


def convolution(
    inputs: int, outputs: int, kernel: int = 3, *, dilation: int = 1, batch_norm: bool = False
) -> list[nn.Module]:
    """Layers: convolution (padded to keep the size), optional batch norm, ReLU; He initialisation (2015, eq. 10)."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return [conv, *([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]


def classifier(inputs: int, num_classes: int) -> nn.Conv2d:
    """The last 1x1 convolution, with small weights: the first predictions are close to uniform, as in DeepLab."""
    conv = nn.Conv2d(inputs, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def vgg_blocks(*, width: float = 1.0, batch_norm: bool = False, output_stride: int = 8) -> nn.Sequential:
    """VGG-16's five blocks: [B, 3, H, W] -> [B, 512 width, ceil(H / output_stride), ceil(W / output_stride)].

    Poolings are VGG's 2x2 with stride 2 until the output stride is reached. Later poolings are 3x3 with stride 1 (an
    even size would shift the map by half a cell), and each doubles the dilation of the convolutions behind it. Blocks 1
    to 3 therefore compute exactly what VGG computes. The options are those of `VGGNetwork`.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is {output_stride}; expected 8, 16 or 32")
    blocks, inputs, stride, dilation = [], 3, 1, 1
    for channels, depth in VGG16:
        outputs, layers = max(1, round(channels * width)), []
        for _ in range(depth):
            layers += convolution(inputs, outputs, dilation=dilation, batch_norm=batch_norm)
            inputs = outputs
        if stride < output_stride:
            layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))  # ceil_mode: keep an odd last row or column
            stride *= 2
        else:
            layers.append(nn.MaxPool2d(3, stride=1, padding=1))
            dilation *= 2
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks)


class VGGNetwork(nn.Module):
    """Base of the two networks. A subclass defines `features`, `head` and `load_vgg`, and calls `_finish` last.

    Args:
        num_classes: K, at least 2.
        width: multiplies the number of channels of every layer (0.25 trains on a laptop).
        batch_norm: whether batch norm follows every convolution except the classifier.
        weights: "imagenet" or a file with VGG-16's weights, see `pwlib.pretrained.read_vgg`; needs width=1. None:
            random weights (He initialisation).
        output_stride: px per cell of the blocks' output, 8, 16 or 32.
    """

    cell_size: int | None  # px per cell of `coarse`; None: the map covers the image exactly, whatever its size
    feature_channels: int  # C of `features`, [B, C, h, w], the input of `head`

    def __init__(
        self,
        num_classes: int,
        *,
        output_stride: int,
        width: float = 1.0,
        batch_norm: bool = False,
        weights: str | None = None,
    ):
        super().__init__()
        at_least(2, num_classes=num_classes)
        if not width > 0:
            raise ValueError(f"width is {width}; expected a positive multiplier of VGG's channels")
        if weights and width != 1:
            raise ValueError(f"width is {width}; VGG-16's weights need width=1 (or pass weights=None)")
        self.num_classes, self.width = num_classes, width
        self.batch_norm, self.output_stride, self.weights = batch_norm, output_stride, weights
        self.normalize = Normalize()
        self.blocks = vgg_blocks(width=width, batch_norm=batch_norm, output_stride=output_stride)

    def _finish(self) -> None:
        self.to(memory_format=torch.channels_last)  # 10 to 30 % faster on CPUs, and the layout of tensor cores
        if self.weights:
            self.load_vgg(read_vgg(self.weights, batch_norm=self.batch_norm))

    def _channels(self, channels: int) -> int:
        return max(1, round(channels * self.width))

    def coarse(self, image: Tensor) -> Tensor:
        """Logits of the cells, before resizing: [B, K, h, w]."""
        return self.head(self.features(image))

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K, H, W] of an image [B, 3, H, W] of any size, RGB in [0, 1]."""
        return resize_logits(self.coarse(image), image.shape[-2:], stride=self.cell_size)


class DeepLabLargeFOV(VGGNetwork):
    """DeepLab-LargeFOV (Chen et al. 2015): image [B, 3, H, W] in [0, 1] -> logits [B, K, H, W].

    dropout: probability of dropout behind fc6 and fc7, in training; the other arguments are those of `VGGNetwork`.
    """

    cell_size = 8

    def __init__(self, num_classes: int = 21, *, dropout: float = 0.5, **options):
        super().__init__(num_classes, output_stride=self.cell_size, **options)
        inputs, hidden, norm = self._channels(512), self._channels(1024), self.batch_norm
        self.fc6 = nn.Sequential(*convolution(inputs, hidden, dilation=12, batch_norm=norm), nn.Dropout(dropout))
        self.fc7 = nn.Sequential(*convolution(hidden, hidden, 1, batch_norm=norm), nn.Dropout(dropout))
        self.classifier = classifier(hidden, num_classes)
        self.feature_channels = hidden
        self._finish()

    @property
    def head(self) -> nn.Module:
        return self.classifier

    @property
    def receptive_field(self) -> int:
        """Side, in px, of the square of the image that one cell of `coarse` depends on."""
        return receptive_field(nn.Sequential(self.blocks, self.fc6, self.fc7, self.classifier))

    def features(self, image: Tensor) -> Tensor:
        """The input of the classifier: [B, feature_channels, ceil(H / 8), ceil(W / 8)]."""
        return self.fc7(self.fc6(self.blocks(self.normalize(image))))

    def load_vgg(self, state: Mapping[str, Tensor]) -> None:
        """Load the state dict of torchvision's vgg16 (or vgg16_bn), or of its convolutions; see `load_vgg_fc`."""
        load_vgg_blocks(self.blocks, state)
        load_vgg_fc(state, fc6=self.fc6[0], fc7=self.fc7[0])


class FeatMapNet(VGGNetwork):
    """FeatMap-Net (Lin et al. 2016), features at several scales: image [B, 3, H, W] in [0, 1] -> logits [B, K, H, W].

    The maps of the scales must cover the same pixels before they can be concatenated. Every scale therefore resizes the
    image to a whole number of cells, the nearest to scale * (H, W) / output_stride and at least 1: the map of n cells
    covers the image exactly, and cell i covers its i-th n-th part.

    Args:
        scales: factors by which the image is resized; (1.0,) switches multi-scale features off.
        pyramid: sides of the sliding pooling windows, in cells, odd; () switches them off.
        output_stride: px of the resized image per cell: 16 in the paper, 8 for small images.
        dilation: of the first layer of block 6. None: 96 / output_stride, so that its taps are 96 px apart, as is every
            third of the 7x7 cells that VGG's first fully connected layer reads. 1 or 2 for small images.
        dropout: probability of dropout in the head, in training.
        num_classes and options: see `VGGNetwork`.
    """

    cell_size = None

    def __init__(
        self,
        num_classes: int = 21,
        *,
        scales: Sequence[float] = (1.2, 0.8, 0.4),
        pyramid: Sequence[int] = (5, 9),
        output_stride: int = 16,
        dilation: int | None = None,
        dropout: float = 0.5,
        **options,
    ):
        super().__init__(num_classes, output_stride=output_stride, **options)
        if not scales or not all(scale > 0 for scale in scales):
            raise ValueError(f"scales are {tuple(scales)}; expected one or more positive numbers")
        if not all(side > 0 and side % 2 for side in pyramid):
            raise ValueError(f"pyramid is {tuple(pyramid)}; expected odd numbers of cells")
        dilation = 96 // output_stride if dilation is None else dilation
        at_least(1, dilation=dilation)
        self.scales = tuple(scales)
        channels, first, norm = self._channels(512), self._channels(1024), self.batch_norm
        self.feature_channels = channels * len(self.scales) * (1 + len(pyramid))
        self.block6 = nn.ModuleList(
            nn.Sequential(
                *convolution(channels, first, dilation=dilation, batch_norm=norm),
                *convolution(first, channels, batch_norm=norm),
                *convolution(channels, channels, batch_norm=norm),
            )
            for _ in self.scales
        )
        self.pools = nn.ModuleList(nn.MaxPool2d(side, stride=1, padding=side // 2) for side in pyramid)
        last = classifier(channels, num_classes)
        hidden = convolution(self.feature_channels, channels, 1, batch_norm=norm)
        self.head = nn.Sequential(*hidden, nn.Dropout(dropout), last)
        self._finish()

    def cells(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Size (h, w) of the map of an image of `size` (H, W) at `scale`."""
        scale = Fraction(scale).limit_denominator(1000)
        unit = 2 * scale.denominator * self.output_stride
        cells = []
        for side in size:  # round(side * scale / output_stride), in integer arithmetic that torch.export can trace
            doubled = 2 * side * scale.numerator + unit // 2
            nearest, is_tie = doubled // unit, 1 - (doubled % unit + unit - 1) // unit
            cells.append(torch.sym_max(1, nearest - is_tie * (nearest % 2)))
        return cells[0], cells[1]

    def features(self, image: Tensor) -> Tensor:
        """The input of the head: [B, feature_channels, h, w], (h, w) as `cells` gives it for the largest scale."""
        image = self.normalize(image)
        maps = []
        for scale, block6 in zip(self.scales, self.block6, strict=True):
            size = [cells * self.output_stride for cells in self.cells(image.shape[-2:], scale)]
            resized = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
            maps.append(block6(self.blocks(resized)))  # [B, C, h_scale, w_scale]
        largest = self.cells(image.shape[-2:], max(self.scales))
        joined = torch.cat([resize_logits(one, largest) for one in maps], dim=1)  # [B, C * scales, h, w]
        return torch.cat([joined, *(pool(joined) for pool in self.pools)], dim=1)

    def load_vgg(self, state: Mapping[str, Tensor]) -> None:
        """Load blocks 1 to 5, and the first layer of block 6 if the state dict has fc6."""
        load_vgg_blocks(self.blocks, state)
        for block6 in self.block6:
            load_vgg_fc(state, fc6=block6[0])


def resize_logits(logits: Tensor, size: tuple[int, int], *, stride: int | None = None) -> Tensor:
    """Resize [B, K, h, w] -> [B, K, H, W] bilinearly, with half-pixel centres (align_corners=False).

    Args:
        size: (H, W), in px.
        stride: px per cell. Cell (i, j) covers the pixels from (i, j) * stride on, and the last cells may reach beyond
            the image (h = ceil(H / stride)): the map is resized to the h*stride x w*stride px it covers, and cropped.
            (Squeezing it into H x W would shift it: by 5.75 px at the lower border for H = 90 and stride 8.)
            None: the map covers the image exactly.

    Raises:
        ValueError: h x w cells of `stride` px do not cover the size.
    """
    height, width = size
    if stride is None:
        if logits.shape[-2:] == (height, width):
            return logits
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    cells = tuple(logits.shape[-2:])
    if cells != (-(-height // stride), -(-width // stride)):
        raise ValueError(
            f"logits have {cells[0]}x{cells[1]} cells of {stride} px; they cannot cover {height}x{width} px"
        )
    covered = (cells[0] * stride, cells[1] * stride)
    logits = F.interpolate(logits, size=covered, mode="bilinear", align_corners=False)
    return logits[..., :height, :width].contiguous()


def cell_labels(label: Tensor, cells: tuple[int, int], *, cell_size: int | None = None) -> Tensor:
    """The label under the centre of each cell: [B, H, W] -> [B, h, w], with the geometry of `resize_logits`.

    Args:
        cells: (h, w).
        cell_size: px per cell; cell (i, j) covers the pixels from (i, j) * cell_size on, and a cell whose centre is
            outside the image is void. None: the cells cover the image exactly.
    """
    rows, columns = (
        ((torch.arange(count, device=label.device) + 0.5) * (cell_size or side / count)).long()
        for count, side in zip(cells, label.shape[-2:], strict=True)
    )  # [h], [w]
    inside = (rows < label.shape[-2])[:, None] & (columns < label.shape[-1])  # [h, w]
    picked = label[:, rows.clamp(max=label.shape[-2] - 1)[:, None], columns.clamp(max=label.shape[-1] - 1)]
    return picked.masked_fill(~inside, VOID)


def receptive_field(module: nn.Module) -> int:
    """Side, in input px, of the square that one output cell of a chain of convolutions and poolings depends on.

    A layer with kernel k, dilation d and stride s adds (k - 1) d j px, where j is the distance of its inputs in px, and
    multiplies j by s (Dumoulin & Visin, "A guide to convolution arithmetic", 2016). Branches are not supported, nor are
    layers that are not square: ValueError.
    """
    field, jump = 1, 1
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            given = [getattr(layer, name, 1) for name in ("kernel_size", "stride", "dilation")]
            sides = [{value} if isinstance(value, int) else set(value) for value in given]
            if max(map(len, sides)) > 1:
                raise ValueError(f"{layer} is not square; the receptive field is defined here for square layers")
            kernel, stride, dilation = (side.pop() for side in sides)
            field += (kernel - 1) * dilation * jump
            jump *= stride
    return field


class AsUnary(nn.Module):
    """The adapter that `as_unary` makes."""

    def __init__(self, module: nn.Module, num_classes: int | None, normalize: bool):
        super().__init__()
        self.module, self.num_classes = module, num_classes
        self.normalize = Normalize() if normalize else check_image

    def forward(self, image: Tensor) -> Tensor:
        output = self.module(self.normalize(image))
        logits = output.get("out") if isinstance(output, Mapping) else output
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
        if len(shape) != 4 or shape[0] != image.shape[0] or self.num_classes not in (None, shape[1]):
            given = shape or (f"a dict of {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__)
            expected = f"logits [{len(image)}, {self.num_classes or 'K'}, H, W], or a dict with them as 'out'"
            raise ValueError(f"unary network {type(self.module).__name__} returned {given}; expected {expected}")
        return resize_logits(logits, image.shape[-2:])


def as_unary(module: nn.Module, *, num_classes: int | None = None, normalize: bool = False) -> nn.Module:
    """Adapt a module from image to logits to the library's convention: [B, 3, H, W] in [0, 1] -> [B, K, H, W].

    Logits may be the "out" of a dict, as in torchvision, and are resized to the image. A module that is adapted
    already, or that has a `cell_size` as the library's networks do, is returned unchanged.

    Args:
        num_classes: K, if it should be checked.
        normalize: whether the module expects ImageNet-normalised pixels, as torchvision's segmentation models do.
    """
    if not isinstance(module, AsUnary) and not hasattr(module, "cell_size"):
        return AsUnary(module, num_classes, normalize)
    classes = getattr(module, "num_classes", None)
    if None not in (num_classes, classes) and classes != num_classes:
        raise ValueError(f"the unary network has {classes} classes; expected {num_classes}")
    return module
