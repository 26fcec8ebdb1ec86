"""VGG-16 weights trained on ImageNet: download them, and copy them into the layers of `pwlib.networks`.

Names are torchvision's: "features.N" are the convolutions (and batch norms), "classifier.0" and "classifier.3" the
fully connected layers fc6 and fc7. DeepLab decimates these two: it keeps every third of fc6's 7x7 taps and every fourth
channel of both. Nothing is rescaled.
"""

from collections.abc import Mapping
from pickle import UnpicklingError

import torch
from torch import Tensor, nn


def load_vgg_blocks(blocks: nn.Sequential, state: Mapping[str, Tensor]) -> None:
    """Copy the convolutions (and batch norms) of torchvision's vgg16 (vgg16_bn) into `vgg_blocks(width=1)`.

    torchvision's vgg16_bn file is older than batch norm's `num_batches_tracked`. The counter is optional here, as it is
    in torch: with a fixed momentum nothing depends on it.

    Raises:
        ValueError: a layer is missing, has another shape, or the state dict has layers that the blocks lack.
    """
    # torchvision numbers convolutions, norms, ReLUs and poolings in one list, in the order of the concatenated blocks.
    layers = [layer for block in blocks for layer in block]
    expected = {
        f"features.{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.state_dict().items()
    }
    for name, value in expected.items():
        if name in state or not name.endswith("num_batches_tracked"):
            _copy(value, _entry(state, name), name)
    if extra := sorted({name for name in state if name.startswith("features.")} - set(expected)):
        raise ValueError(
            f"VGG weights contain {extra[0]!r}, which these blocks lack; expected vgg16, or vgg16_bn with batch norm"
        )


def load_vgg_fc6(convolution: nn.Conv2d, state: Mapping[str, Tensor]) -> None:
    """Copy fc6, [4096, 512 * 7 * 7], into a 3x3 convolution [1024, 512, 3, 3]."""
    fc6 = _entry(state, "classifier.0.weight")
    fc6 = fc6.reshape(len(fc6), 512, 7, 7)[::4, :, ::3, ::3]
    _copy(convolution.weight, fc6, "classifier.0.weight")
    _copy(convolution.bias, _entry(state, "classifier.0.bias")[::4], "classifier.0.bias")


def load_vgg_fc7(convolution: nn.Conv2d, state: Mapping[str, Tensor]) -> None:
    """Copy fc7, [4096, 4096], into a 1x1 convolution [1024, 1024, 1, 1]."""
    fc7 = _entry(state, "classifier.3.weight")[::4, ::4, None, None]
    _copy(convolution.weight, fc7, "classifier.3.weight")
    _copy(convolution.bias, _entry(state, "classifier.3.bias")[::4], "classifier.3.bias")


def download_vgg(batch_norm: bool = False) -> Mapping[str, Tensor]:
    """The state dict of torchvision's VGG-16 (-BN), 528 MB, from its cache or the network; OSError without either."""
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
        raise ValueError(
            f"VGG weights {name!r} have shape {tuple(source.shape)}; expected {tuple(target.shape)} (width=1)"
        )
    target.copy_(source)
