"""VGG-16 weights: read them from a file or download them, and copy them into the layers of `pwlib.networks`.

Names are torchvision's: "features.N" are the convolutions (and batch norms), "classifier.0" and "classifier.3" the
fully connected layers fc6 and fc7. A file may contain the thirteen convolutions only, and float16 values. All functions
raise ValueError for a layer that is missing or has another shape.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn


def load_vgg_blocks(blocks: nn.Sequential, state: Mapping[str, Tensor]) -> None:
    """Copy the convolutions (and batch norms) of torchvision's vgg16 (vgg16_bn) into `vgg_blocks(width=1)`.

    torchvision's vgg16_bn file is older than batch norm's `num_batches_tracked`, and is accepted without it.
    """
    # torchvision numbers convolutions, norms, ReLUs and poolings in one list, in the order of the concatenated blocks.
    layers = nn.Sequential(*(layer for block in blocks for layer in block))
    targets = {f"features.{name}": value for name, value in layers.state_dict().items()}
    if extra := sorted(name for name in state if name.startswith("features.") and name not in targets):
        raise ValueError(
            f"VGG weights contain {extra[0]!r}, which these blocks lack; expected vgg16, or vgg16_bn with batch norm"
        )
    for name, target in targets.items():
        if name in state or not name.endswith("num_batches_tracked"):
            _copy(target, _entry(state, name), name)


def load_vgg_fc(state: Mapping[str, Tensor], *, fc6: nn.Conv2d, fc7: nn.Conv2d | None = None) -> None:
    """Copy the fully connected layers into convolutions, decimated as in DeepLab, if the state dict has any.

    fc6, [4096, 512 * 7 * 7], becomes a 3x3 convolution [1024, 512, 3, 3]: every third tap and every fourth output. The
    taps of VGG are 32 px apart, so these are 96 px apart (dilation 12 at 8 px a cell). fc7, [4096, 4096], becomes a 1x1
    convolution [1024, 1024, 1, 1]. Nothing is rescaled.
    """
    if not any(name.startswith("classifier.") for name in state):
        return
    for name, layer in (("classifier.0", fc6), ("classifier.3", fc7)):
        if layer is not None:
            weight = _entry(state, f"{name}.weight")[::4]
            weight = weight.reshape(-1, 512, 7, 7)[..., ::3, ::3] if layer is fc6 else weight[:, ::4, None, None]
            _copy(layer.weight, weight, f"{name}.weight")
            _copy(layer.bias, _entry(state, f"{name}.bias")[::4], f"{name}.bias")


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
        raise ValueError(f"VGG weights lack {name!r}; expected those of vgg16, or of vgg16_bn with batch norm")
    return state[name]


@torch.no_grad()
def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if target.shape != source.shape:
        shapes = f"{tuple(source.shape)}; expected {tuple(target.shape)} (width=1)"
        raise ValueError(f"VGG weights {name!r} have shape {shapes}")
    target.copy_(source)
