"""`dense_crf` against float64 loops over all pairs of pixels, and its inputs."""

import io
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from pwlib import DenseCRF, dense_crf, probabilities_from_labels

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 7, 3), dtype=np.uint8)
P = RNG.dirichlet([1, 1, 1], (6, 7)).transpose(2, 0, 1).astype(np.float32)  # [3, 6, 7]
SETTINGS = {"theta_alpha": 4.0, "theta_beta": 60.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0}


def brute_force(image, p, iterations=10, spacing=1.0, compatibility=None, **options):
    """Mean field with the kernels of Kraehenbuehl & Koltun (eq. 3), normalised symmetrically; [K, *S]."""
    options = SETTINGS | options
    size = p.shape[1:]
    places = np.array(list(itertools.product(*map(range, size))), float) * np.array(spacing)  # [N, D]
    colours = image.reshape(len(places), -1).astype(float)
    total = np.zeros((len(places),) * 2)
    for weight, features in (
        (options["w_spatial"], places / np.array(options["theta_gamma"])),
        (
            options["w_bilateral"],
            np.hstack([places / np.array(options["theta_alpha"]), colours / np.array(options["theta_beta"])]),
        ),
    ):
        kernel = np.exp(-((features[:, None] - features[None]) ** 2).sum(-1) / 2)
        n = kernel.sum(1)
        total += weight * kernel / np.sqrt(np.outer(n, n))
    mu = 1 - np.eye(len(p)) if compatibility is None else compatibility
    unary = -np.log(p.astype(float).clip(1e-5)).reshape(len(p), -1).T  # [N, K]
    q = np.exp(-unary) / np.exp(-unary).sum(1, keepdims=True)
    for _ in range(iterations):
        q = np.exp(-unary - total @ q @ mu.T)
        q /= q.sum(1, keepdims=True)
    return q.T.reshape(p.shape)


def data(size, channels, labels=3, dtype=np.uint8):
    shape = (*size, *(() if channels is None else (channels,)))
    image = RNG.integers(0, 256, shape).astype(dtype)
    return image, np.moveaxis(RNG.dirichlet([1] * labels, size), -1, 0).astype(np.float32)


CASES = {
    "RGB": ((6, 7), 3, {}),
    "grey": ((6, 7), None, {}),
    "one channel": ((6, 7), 1, {}),
    "two channels": ((6, 7), 2, {}),
    "colour and depth": ((6, 7), 4, {"theta_beta": (60.0, 50.0, 40.0, 9.0)}),
    "ten bands": ((6, 7), 10, {"theta_beta": 200.0}),
    "bandwidths per axis": ((6, 7), 3, {"theta_alpha": (2.0, 5.0), "theta_gamma": (1.0, 3.0)}),
    "volume": ((3, 4, 5), None, {}),
    "volume in mm": ((3, 4, 5), 2, {"spacing": (2.5, 1.0, 0.5), "theta_gamma": (3.0, 1.0, 2.0)}),
    "signal": ((30,), None, {}),
    "signal of two channels": ((30,), 2, {"spacing": 0.1, "theta_alpha": 0.4, "theta_gamma": (0.2,)}),
    "no spatial kernel": ((6, 7), 3, {"w_spatial": 0}),
    "no bilateral kernel": ((6, 7), 3, {"w_bilateral": 0.0}),
    "penalties": ((6, 7), 3, {"compatibility": np.array([[0.0, 1, 2], [1, 0, 0.5], [3, 0.5, 0]])}),
    "3 x 3 pixels of 3 channels and labels": ((3, 3), 3, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_mean_field(case):
    size, channels, options = CASES[case]
    image, p = data(size, channels)
    found = dense_crf(image, p, **SETTINGS | options, filtering="exact")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, brute_force(image, p, **options), atol=1e-5)


@pytest.mark.parametrize("case", ["grey", "volume in mm", "signal"])
def test_the_lattice_is_close(case):
    size, channels, options = CASES[case]
    image, p = data([4 * side for side in size], channels)
    options = SETTINGS | options
    exact, lattice = (dense_crf(image, p, **options, filtering=method) for method in ("exact", "lattice"))
    assert (exact.argmax(0) == lattice.argmax(0)).mean() > 0.9 and np.abs(exact - lattice).mean() < 0.03


def test_without_kernels_nothing_changes():
    np.testing.assert_allclose(dense_crf(IMAGE, P, w_spatial=0, w_bilateral=0), P, atol=1e-5)


@pytest.mark.parametrize("filtering", ["exact", "lattice"])
def test_it_is_the_module(filtering):
    crf = DenseCRF(3, **SETTINGS, filtering=filtering)
    image, logits = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255, torch.from_numpy(P).log()[None]
    want = crf.marginals(logits, image, iterations=10)[0]
    np.testing.assert_allclose(dense_crf(IMAGE, P, **SETTINGS, filtering=filtering), want, atol=1e-6)


def test_numpy_torch_and_pil():
    want = brute_force(IMAGE, P)
    reversed_twice = np.ascontiguousarray(IMAGE[:, ::-1])[:, ::-1]  # negative strides
    images = [IMAGE, reversed_twice, torch.from_numpy(IMAGE), Image.fromarray(IMAGE)]
    images += [Image.fromarray(np.dstack([IMAGE, np.full((6, 7), 9, np.uint8)]))]  # RGBA
    for image, kind in itertools.product(images, (np.asarray, torch.tensor)):
        found = dense_crf(image, kind(P), **SETTINGS)
        assert type(found) is type(kind(P))
        np.testing.assert_allclose(found, want, atol=1e-5)
    read_only = np.asarray(Image.fromarray(IMAGE))
    assert not read_only.flags.writeable
    with warnings.catch_warnings(action="error"):  # torch warns if it shares such an array
        np.testing.assert_allclose(dense_crf(read_only, P, **SETTINGS), want, atol=1e-5)
    grey = Image.fromarray(IMAGE[..., 0])
    np.testing.assert_allclose(dense_crf(grey, P, **SETTINGS), brute_force(IMAGE[..., 0], P), atol=1e-5)


@pytest.mark.parametrize("key", ["out", "logits"])
def test_the_output_of_another_network(key):
    """A dict of coarse logits, with a gradient, as torchvision's and transformers' networks return it."""
    logits = torch.randn(1, 3, 3, 4, requires_grad=True)
    p = F.interpolate(logits.detach(), (6, 7), mode="bilinear", align_corners=False).softmax(1)[0].numpy()
    found = dense_crf(Image.fromarray(IMAGE), {key: logits, "aux": None}, **SETTINGS)
    assert found.shape == (1, 3, 6, 7) and not found.requires_grad
    np.testing.assert_allclose(found[0], brute_force(IMAGE, p), atol=1e-5)


def test_probabilities_of_a_batch_of_one_and_of_a_sigmoid():
    found = dense_crf(IMAGE, P[None], **SETTINGS)
    assert found.shape == (1, 3, 6, 7)
    np.testing.assert_allclose(found[0], brute_force(IMAGE, P), atol=1e-5)
    want = brute_force(IMAGE, np.stack([1 - P[0], P[0]]))[1]
    for sigmoid in (P[0], P[:1]):
        found = dense_crf(IMAGE, sigmoid, **SETTINGS)
        assert found.shape == sigmoid.shape
        np.testing.assert_allclose(found.reshape(6, 7), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_other_precision(dtype):
    p = torch.randn(21, 6, 7).softmax(0)
    found = dense_crf(IMAGE, p.to(dtype), **SETTINGS)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, brute_force(IMAGE, p.numpy()), atol=0.02)


CHANNELS_FIRST = torch.from_numpy(IMAGE).permute(2, 0, 1) / 255
NAN = np.where(np.arange(7) == 3, np.nan, P)
FAULTS = {
    # what is wrong: (image, probabilities, options, the error)
    "float image": (IMAGE / 255, P, {}, "image is torch.float64; expected uint8, or theta_beta="),
    "channels first": (CHANNELS_FIRST, P, {}, "expected its channels last"),
    "channels and classes first": (IMAGE.transpose(2, 0, 1), P[:2], {}, "expected its channels last"),
    "a path": ("a.jpg", P, {}, "image is a str; expected a PIL image"),
    "NaN in the image": (np.full((6, 7), np.nan), P, {"theta_beta": 1.0}, "image contains NaN"),
    "another size": (
        IMAGE,
        P[:, :3],
        {},
        r"\(3, 3, 7\); expected \[K, 6, 7\].*resize the network's logits to \(6, 7\)",
    ),
    "classes last": (IMAGE, P.transpose(1, 2, 0), {}, "move the classes to the first axis"),
    "two images": (IMAGE, np.stack([P, P]), {}, "one image at a time"),
    "logits": (IMAGE, np.log(P), {}, "expected a softmax over the classes"),
    "a sigmoid per class": (IMAGE, 0.9 * np.ones_like(P), {}, "not logits, log-probabilities or a sigmoid per class"),
    "one channel of logits": (IMAGE, 3 * P[0] - 1.5, {}, "negative or do not sum to 1"),
    "labels": (IMAGE, P.argmax(0), {}, "probabilities are labels.*probabilities_from_labels"),
    "NaN": (IMAGE, NAN, {}, "probabilities contain NaN"),
    "a dict without logits": (IMAGE, {"masks": P}, {}, "a dict of masks; expected logits in 'out'"),
    "a dict without a batch": (IMAGE, {"out": torch.from_numpy(P)}, {}, r"expected \[1, K, h, w\]"),
    "weight": (IMAGE, P, {"w_spatial": -1}, "w_spatial is -1; expected a number of at least 0"),
    "bandwidths": (IMAGE, P, {"theta_alpha": (1, 2, 3)}, "theta_alpha has 3 numbers; expected one, or one per axis: 2"),
    "colour bandwidths": (IMAGE, P, {"theta_beta": (1, 2)}, "theta_beta has 2 .* one per channel: 3"),
    "bandwidth 0": (IMAGE, P, {"theta_gamma": 0}, "theta_gamma is 0.0; expected positive numbers"),
    "compatibility": (IMAGE, P, {"compatibility": np.eye(2)}, r"compatibility has shape \(2, 2\); expected \[3, 3\]"),
    "iterations": (IMAGE, P, {"iterations": -1}, "iterations is -1"),
    "filtering": (IMAGE, P, {"filtering": "fast"}, "filtering is 'fast'"),
    "normalization": (IMAGE, P, {"normalization": "all"}, "normalization is 'all'"),
}


def turned(orientation, form):
    """The photograph as a phone stores it: other pixels, and a tag that says how a viewer must rotate them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = {0: IMAGE, 1: IMAGE, 3: IMAGE[::-1, ::-1], 6: IMAGE.transpose(1, 0, 2)[::-1]}[orientation]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, form, exif=exif)
    return Image.open(file)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photograph_with_an_exif_orientation(orientation):
    """Refused, in whatever shape the network saw it; with either remedy of the message the result is right."""
    image = turned(orientation, "PNG")
    for given in (P, np.rot90(P, axes=(2, 1)), {"out": torch.zeros(1, 3, 3, 4)}):
        with pytest.raises(ValueError, match=rf"EXIF orientation {orientation}; expected ImageOps.exif_transpose"):
            dense_crf(image, given)
    want = brute_force(IMAGE, P)
    np.testing.assert_allclose(dense_crf(ImageOps.exif_transpose(image), P, **SETTINGS), want, atol=1e-5)
    turn = {3: lambda x: x[::-1, ::-1], 6: lambda x: x.swapaxes(0, 1)[::-1]}[orientation]  # as a phone stores it
    p = turn(P.transpose(1, 2, 0)).transpose(2, 0, 1)
    found = dense_crf(np.asarray(image), np.ascontiguousarray(p), **SETTINGS, filtering="exact")
    np.testing.assert_allclose(found, turn(want.transpose(1, 2, 0)).transpose(2, 0, 1), atol=1e-5)


def test_orientations_that_ask_for_no_rotation():
    """1 is upright, 0 is written by some programs, and Pillow rotates a TIFF itself."""
    for image in (turned(0, "PNG"), turned(1, "PNG"), turned(6, "TIFF")):
        np.testing.assert_allclose(dense_crf(image, P, **SETTINGS), brute_force(IMAGE, P), atol=1e-5)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_pil_images_of_more_than_8_bits_are_read_as_arrays(mode):
    """Pillow's conversion to RGB would make all pixels white, or of numbers from 0 to 1 all black."""
    grey = IMAGE[..., 0] * (257.0 if mode != "F" else 1 / 255)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]
    image = Image.frombytes(mode, (7, 6), grey.astype(dtype).tobytes())
    with pytest.raises(ValueError, match="expected uint8, or theta_beta="):
        dense_crf(image, P)
    unit = grey.max() / IMAGE[..., 0].max()
    found = dense_crf(image, P, **SETTINGS | {"theta_beta": 60 * unit}, filtering="exact")
    np.testing.assert_allclose(found, brute_force(IMAGE[..., 0], P), atol=1e-4)


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_input(kind):
    image, p, options, message = FAULTS[kind]
    with pytest.raises(ValueError, match=message):
        dense_crf(image, p, **options)


def test_labels_of_another_method():
    labels = P.argmax(0)
    p = probabilities_from_labels(labels, 3)
    np.testing.assert_allclose(dense_crf(IMAGE, p, **SETTINGS), brute_force(IMAGE, p), atol=1e-5)
