"""Unary networks: image -> logits, one score per class and pixel.

DeepLab-LargeFOV (Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", ICLR
2015) is VGG-16 that forgets to shrink. VGG halves its map five times, to one cell per 32 px; here the last two poolings
keep their resolution, and the layers behind them are dilated so that each still reads inputs as far apart as VGG's did:

    image -> block1 /2 -> block2 /2 -> block3 /2 -> block4 -> block5, dilation 2 -> fc6 3x3, dilation 12 -> fc7 1x1
          -> classifier 1x1: one cell per 8 px -> bilinear resize: one score vector per pixel

Where a cell sits decides where its scores must go. A 2x2 pooling puts cell i between pixels 2i and 2i + 1, so after
three of them cell i is centred on pixel 8i + 3.5, whatever the image's size. `resize_logits` respects that.
"""

from collections.abc import Mapping
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwlib.data import VOID

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and 3x3 convolutions of each block


class Normalize(nn.Module):
    """RGB in [0, 1] -> zero mean, unit deviation over ImageNet; the one place where pixels are normalised."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (check_image(image) - self.mean) / self.std


def check_image(image: Tensor) -> Tensor:
    """The image itself, if it is a float tensor [B, 3, H, W] with at least one pixel; ValueError otherwise."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [B, 3, H, W] (RGB), none of them empty")
    if not image.is_floating_point():
        raise ValueError(f"image has dtype {image.dtype}; expected float RGB in [0, 1] (divide uint8 by 255)")
    return image


# ------------------------------------------------------------------------------------------------------------ layers


def convolution(
    inputs: int, outputs: int, kernel: int = 3, *, dilation: int = 1, batch_norm: bool = False
) -> list[nn.Module]:
    """Convolution (padded to keep the size), optional batch norm, ReLU; He et al.'s initialisation (2015, eq. 10)."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return [conv, *([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]


def vgg_blocks(*, width: float = 1.0, batch_norm: bool = False, output_stride: int = 8) -> nn.Sequential:
    """VGG-16's five blocks at an output stride of 8, 16 or 32 px: [B, 3, H, W] -> [B, 512 width, H', W'].

    H' = ceil(H / output_stride). Poolings are VGG's 2x2 with stride 2 until the output stride is reached; from there on
    they are 3x3 with stride 1 (odd, so that the map does not shift by half a cell), and what follows a pooling that no
    longer halves is dilated by the factor it no longer halves by. Blocks 1 to 3 thus compute exactly what VGG computes.
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
            layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))  # ceil: the last row and column count, too
            stride *= 2
        else:
            layers.append(nn.MaxPool2d(3, stride=1, padding=1))
            dilation *= 2
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks)


def check_vgg_options(num_classes: int, width: float, weights: str | None) -> None:
    """ValueError for a number of classes, a width or weights that no network on VGG-16 can have."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; expected at least 2 (a softmax over one class says nothing)")
    if not width > 0:
        raise ValueError(f"width is {width}; expected a positive multiplier of VGG's channels")
    if weights not in (None, "imagenet"):
        raise ValueError(f'weights is {weights!r}; expected "imagenet" or None')
    if weights and width != 1:
        raise ValueError(f"width is {width}; ImageNet weights exist for width=1 only (or pass weights=None)")


class DeepLabLargeFOV(nn.Module):
    """DeepLab-LargeFOV on VGG-16 (Chen et al. 2015): image [B, 3, H, W] in [0, 1] -> logits [B, K, H, W].

    Any H, W >= 1. `width` multiplies every layer's channels (0.25 trains on a laptop). `batch_norm` follows every
    convolution but the classifier. `dropout` acts behind fc6 and fc7 in training. `weights="imagenet"` downloads
    torchvision's VGG-16 (with batch norm: VGG-16-BN) and needs `width=1`; None starts from He's initialisation.
    `coarse` gives the logits before resizing, one cell per 8 px: [B, K, ceil(H/8), ceil(W/8)]; it is `head` of
    `features`, [B, feature_channels, ceil(H/8), ceil(W/8)].
    """

    output_stride = cell_size = 8  # cell_size: px that a cell of `coarse` stands for

    def __init__(
        self,
        num_classes: int = 21,
        *,
        width: float = 1.0,
        batch_norm: bool = False,
        weights: str | None = None,
        dropout: float = 0.5,
    ):
        super().__init__()
        check_vgg_options(num_classes, width, weights)
        self.num_classes, self.width, self.batch_norm = num_classes, width, batch_norm
        features, hidden = max(1, round(512 * width)), max(1, round(1024 * width))
        self.normalize = Normalize()
        self.blocks = vgg_blocks(width=width, batch_norm=batch_norm, output_stride=self.output_stride)
        self.fc6 = nn.Sequential(
            *convolution(features, hidden, dilation=12, batch_norm=batch_norm), nn.Dropout(dropout)
        )
        self.fc7 = nn.Sequential(*convolution(hidden, hidden, 1, batch_norm=batch_norm), nn.Dropout(dropout))
        self.classifier = nn.Conv2d(hidden, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # near-uniform first predictions, as in DeepLab
        nn.init.zeros_(self.classifier.bias)
        self.to(memory_format=torch.channels_last)  # 10-30 % faster on CPUs, and what tensor cores want
        if weights:
            self.load_vgg(download_vgg(batch_norm))

    @property
    def feature_channels(self) -> int:
        return self.classifier.in_channels

    @property
    def head(self) -> nn.Module:
        return self.classifier

    def features(self, image: Tensor) -> Tensor:
        return self.fc7(self.fc6(self.blocks(self.normalize(image))))

    def coarse(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))

    def forward(self, image: Tensor) -> Tensor:
        return resize_logits(self.coarse(image), image.shape[-2:], stride=self.output_stride)

    @property
    def receptive_field(self) -> int:
        """Side, in px, of the square of image pixels that one cell of `coarse` can see."""
        return receptive_field(nn.Sequential(self.blocks, self.fc6, self.fc7, self.classifier))

    def load_vgg(self, state: Mapping[str, Tensor]) -> None:
        """Start from torchvision's vgg16 (or vgg16_bn) state dict; only the classifier keeps its random weights.

        fc6 and fc7 are decimated as DeepLab does. VGG's fc6 reads all 7x7 cells, 32 px apart, into 4096 channels;
        every third tap and every fourth channel are kept: 3x3 taps, 96 px apart. At 8 px a cell that is a dilation of
        12, so the taps sit where VGG's did. fc7 keeps every fourth input and output. Nothing is rescaled.
        """
        load_vgg_blocks(self.blocks, state)
        load_vgg_fc6(self.fc6[0], state)
        fc7 = _entry(state, "classifier.3.weight")
        _copy(self.fc7[0].weight, fc7[::4, ::4, None, None], "classifier.3.weight")
        _copy(self.fc7[0].bias, _entry(state, "classifier.3.bias")[::4], "classifier.3.bias")


# ---------------------------------------------------------------------------------------------------- ImageNet weights


def load_vgg_blocks(blocks: nn.Sequential, state: Mapping[str, Tensor]) -> None:
    """Copy the convolutions (and batch norms) of torchvision's vgg16 (vgg16_bn) into `vgg_blocks(width=1)`.

    Layer by layer in order; ValueError where one is missing, has another shape, or where the state dict has more.
    """
    layers = [layer for block in blocks for layer in block]
    expected = set()
    # torchvision counts convolutions, norms, ReLUs and poolings in one list, just as the blocks laid end to end do.
    for i, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            _copy(value, _entry(state, f"features.{i}.{name}"), f"features.{i}.{name}")
            expected.add(f"features.{i}.{name}")
    if extra := sorted({name for name in state if name.startswith("features.")} - expected):
        raise ValueError(
            f"VGG weights hold {extra[0]!r}, unknown to these blocks; expected vgg16, or vgg16_bn with batch norm"
        )


def load_vgg_fc6(convolution: nn.Conv2d, state: Mapping[str, Tensor]) -> None:
    """VGG's first fully connected layer, 4096 outputs of 7x7 cells, as a 3x3 convolution: every third tap and every
    fourth output."""
    fc6 = _entry(state, "classifier.0.weight")
    fc6 = fc6.reshape(len(fc6), 512, 7, 7)[::4, :, ::3, ::3]
    _copy(convolution.weight, fc6, "classifier.0.weight")
    _copy(convolution.bias, _entry(state, "classifier.0.bias")[::4], "classifier.0.bias")


def download_vgg(batch_norm: bool = False) -> Mapping[str, Tensor]:
    """ImageNet weights of torchvision's VGG-16 (-BN), 528 MB, from its cache or the net; OSError if neither has it."""
    from torchvision.models import VGG16_BN_Weights, VGG16_Weights

    weights = (VGG16_BN_Weights if batch_norm else VGG16_Weights).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network; wrong hash; a broken cached file
        raise OSError(
            f"cannot get ImageNet weights from {weights.url} ({error}); put the file into "
            f"{torch.hub.get_dir()}/checkpoints, or start from random weights with weights=None"
        ) from error


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"VGG weights lack {name!r}; expected the state dict of torchvision's vgg16, or vgg16_bn with batch norm"
        )
    return state[name]


@torch.no_grad()
def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if target.shape != source.shape:
        raise ValueError(f"VGG weights {name!r} give {tuple(source.shape)}; expected {tuple(target.shape)} (width=1)")
    target.copy_(source)


# ------------------------------------------------------------------------------------------------------------ geometry


def resize_logits(logits: Tensor, size: tuple[int, int], *, stride: int | None = None) -> Tensor:
    """Bilinear resize [B, K, h, w] -> [B, K, H, W], size = (H, W), with half-pixel centres (align_corners=False).

    Without `stride` the map is taken to cover the image exactly. With `stride`, cell (i, j) covers the pixels from
    (i, j) * stride on, and the last cells may reach beyond the image (h = ceil(H / stride)): the map is resized to the
    h*stride x w*stride pixels it covers and then cropped. Squeezing it into H x W instead would stretch the unary: at
    H = 90 the bottom cell would lie 5.75 px above its pixels.
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
    """The label under each cell's centre: [B, H, W] -> [B, h, w], cells = (h, w).

    The counterpart of `resize_logits`: cells lie where its map's cells lie. Without `cell_size` they cover the image
    exactly; with it, cell (i, j) covers the pixels from (i, j) * cell_size on. A cell that has its centre beyond the
    image is void.
    """
    rows, columns = (
        ((torch.arange(count, device=label.device) + 0.5) * (cell_size or side / count)).long()
        for count, side in zip(cells, label.shape[-2:], strict=True)
    )
    inside = (rows < label.shape[-2])[:, None] & (columns < label.shape[-1])
    picked = label[:, rows.clamp(max=label.shape[-2] - 1)[:, None], columns.clamp(max=label.shape[-1] - 1)]
    return picked.masked_fill(~inside, VOID)


def receptive_field(module: nn.Module) -> int:
    """Side, in input px, of what one output cell of a chain of convolutions and poolings can see.

    A layer with kernel k, dilation d and stride s at a jump of j px between its inputs adds (k - 1) d j px and
    multiplies the jump by s (Dumoulin & Visin, "A guide to convolution arithmetic", 2016).
    Layers count in the order of `module.modules()`, square ones only; branches are not chains.
    """
    field, jump = 1, 1
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            kernel, stride, dilation = (_side(getattr(layer, n, 1)) for n in ("kernel_size", "stride", "dilation"))
            field += (kernel - 1) * dilation * jump
            jump *= stride
    return field


def _side(value: int | tuple[int, int]) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"a layer has the sides {value}; the receptive field is defined here for square layers")
    return sides.pop()


# ------------------------------------------------------------------------------------------------------ other networks


class AsUnary(nn.Module):
    """Any network in DeepLab's place: dicts unpacked (torchvision's {"out": ...}), logits resized, shapes checked."""

    def __init__(self, module: nn.Module, *, num_classes: int | None = None, normalize: bool = False):
        super().__init__()
        self.module, self.num_classes = module, num_classes
        self.normalize = Normalize() if normalize else None

    def forward(self, image: Tensor) -> Tensor:
        logits = self.module(self.normalize(image) if self.normalize else check_image(image))
        if isinstance(logits, Mapping):
            if "out" not in logits:
                raise ValueError(f"the unary network returned a dict of {sorted(logits)}; expected logits under 'out'")
            logits = logits["out"]
        name = type(self.module).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(image):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"unary network {name} returned {given}; expected logits [{len(image)}, K, H, W]")
        if self.num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"unary network {name} returned {logits.shape[1]} classes; expected {self.num_classes} "
                f"(logits [B, {self.num_classes}, H, W])"
            )
        return resize_logits(logits, image.shape[-2:])


def as_unary(module: nn.Module, *, num_classes: int | None = None, normalize: bool = False) -> nn.Module:
    """Adapt any image -> logits module to the library's convention; adapted ones pass unchanged, and so does what
    names the `cell_size` of its map, as the library's own networks do: it answers at the image's size already.

    normalize: whether the module wants ImageNet-normalised pixels rather than RGB in [0, 1]. torchvision's
    segmentation models do.
    """
    return (
        module
        if isinstance(module, AsUnary) or hasattr(module, "cell_size")
        else AsUnary(module, num_classes=num_classes, normalize=normalize)
    )
