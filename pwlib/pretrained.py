"""VGG-16 weights: read them from a file or download them, and copy them into the layers of `pwlib.networks`.

Names are torchvision's: "features.N" are the convolutions (and batch norms), "classifier.0" and "classifier.3" the
fully connected layers fc6 and fc7. DeepLab decimates these two: it keeps every third of fc6's 7x7 taps and every fourth
channel of both. Nothing is rescaled. A file may contain the thirteen convolutions only, and float16 values.
"""

from collections.abc import Mapping
from pathlib import Path
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


def has_fc(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict contains fully connected layers besides the convolutions."""
    return any(name.startswith("classifier.") for name in state)


def read_vgg(weights: str | Path, *, batch_norm: bool = False) -> Mapping[str, Tensor]:
    """Read the state dict of torchvision's vgg16 or vgg16_bn, or of its convolutions only.

    Args:
        weights: "imagenet" (528 MB from torchvision's cache or the network), or a file written by `torch.save`.
        batch_norm: whether "imagenet" means VGG-16-BN.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not such a state dict. OSError: no download.
    """
    if weights == "imagenet":
        return _download(batch_norm)
    if not Path(weights).is_file():
        raise FileNotFoundError(f'weights {weights}: no such file; expected "imagenet", or a state dict of vgg16')
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # an arbitrary file makes the unpickler fail in arbitrary ways
        raise ValueError(f"weights {weights}: damaged or not written by torch.save ({type(error).__name__})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {weights}: not a state dict; expected that of torchvision's vgg16")
    return state


def _download(batch_norm: bool) -> Mapping[str, Tensor]:
    from torchvision.models import VGG16_BN_Weights, VGG16_Weights

    weights = (VGG16_BN_Weights if batch_norm else VGG16_Weights).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network; wrong hash; a broken cached file
        raise OSError(
            f"cannot get ImageNet weights from {weights.url} ({error}); put the file into "
            f"{torch.hub.get_dir()}/checkpoints, give a file with --weights, or random weights with weights=None"
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
