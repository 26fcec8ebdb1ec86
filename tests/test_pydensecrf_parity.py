"""The same marginals as pydensecrf2 under its own conventions; skipped only where it is not installed."""

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image

import pwlib.crf
from pwlib.crf import DenseCRF

peer = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (pip install '.[bench]')")

NORMALIZATIONS = {"symmetric": peer.NORMALIZE_SYMMETRIC, "row": peer.NORMALIZE_AFTER, "none": peer.NO_NORMALIZATION}


def photograph(height, width):
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        return np.array(file.convert("RGB").resize((width, height)))


def logits(labels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = 2 * torch.randn(1, labels, height // 12 + 2, width // 12 + 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def reference(scores, image, *, alpha, beta, gamma, bilateral, spatial, normalization="symmetric", iterations=10):
    _, labels, height, width = scores.shape
    crf = peer.DenseCRF2D(width, height, labels)
    unary = -torch.log_softmax(scores, 1)[0].flatten(1)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.numpy()))
    options = {"normalization": NORMALIZATIONS[normalization]}
    crf.addPairwiseGaussian(sxy=gamma, compat=spatial, **options)
    crf.addPairwiseBilateral(sxy=alpha, srgb=beta, rgbim=image, compat=bilateral, **options)
    return torch.from_numpy(np.array(crf.inference(iterations))).view(labels, height, width)


def ours(scores, image, *, alpha, beta, gamma, bilateral, spatial, normalization="symmetric", iterations=10):
    crf = DenseCRF(
        scores.shape[1],
        iterations=iterations,
        theta_alpha=alpha,
        theta_beta=beta,
        theta_gamma=gamma,
        w_bilateral=bilateral,
        w_spatial=spatial,
        normalization=normalization,
        filtering="lattice",
    )
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        fast = crf(scores, pixels)[0].exp()
    slow = crf(scores, pixels)[0].exp().detach()
    return fast, slow


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("size", "labels", "theta"),
    [
        ((93, 125), 21, {"alpha": 80.0, "beta": 13.0, "gamma": 3.0, "bilateral": 10.0, "spatial": 3.0}),
        ((61, 47), 2, {"alpha": 10.0, "beta": 5.0, "gamma": 1.0, "bilateral": 4.0, "spatial": 1.0}),
        ((40, 90), 11, {"alpha": 30.0, "beta": 40.0, "gamma": 7.0, "bilateral": 2.0, "spatial": 5.0}),
    ],
)
def test_marginals_are_pydensecrf_s(size, labels, theta, normalization):
    image, scores = photograph(*size), logits(labels, *size)
    if normalization == "none":  # unnormalised kernels sum over hundreds of pixels
        theta = theta | {"bilateral": theta["bilateral"] / 500, "spatial": theta["spatial"] / 100}
    expected = reference(scores, image, **theta, normalization=normalization)
    for q in ours(scores, image, **theta, normalization=normalization):
        assert (q - expected).abs().mean() < 1e-5
        assert (q.argmax(0) == expected.argmax(0)).all()


@pytest.mark.slow
def test_marginals_are_pydensecrf_s_at_full_size():
    image, scores = photograph(375, 500), logits(21, 375, 500)
    theta = {"alpha": 80.0, "beta": 13.0, "gamma": 3.0, "bilateral": 10.0, "spatial": 3.0}
    expected = reference(scores, image, **theta)
    fast, _ = ours(scores, image, **theta)
    assert (fast - expected).abs().mean() < 1e-5
    assert (fast.argmax(0) == expected.argmax(0)).all()


def test_one_call_for_people_who_come_from_pydensecrf():
    image, scores = photograph(50, 70), logits(5, 50, 70)
    probabilities = torch.softmax(scores, 1)[0].numpy()
    theta = {"alpha": 80.0, "beta": 13.0, "gamma": 3.0, "bilateral": 10.0, "spatial": 3.0}
    got = pwlib.dense_crf(image, probabilities, filtering="lattice")
    expected = reference(torch.from_numpy(probabilities).clamp_min(1e-5).log()[None], image, **theta).numpy()
    assert np.abs(got - expected).mean() < 1e-5


def test_a_shifted_image_is_noticed():
    """The oracle can fail: one pixel of misalignment is well above the tolerance."""
    image, scores = photograph(61, 47), logits(2, 61, 47)
    theta = {"alpha": 10.0, "beta": 5.0, "gamma": 1.0, "bilateral": 4.0, "spatial": 1.0}
    expected = reference(scores, np.ascontiguousarray(np.roll(image, 1, 1)), **theta)
    assert (ours(scores, image, **theta)[0] - expected).abs().mean() > 1e-3
