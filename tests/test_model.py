"""The model as a whole: what goes in, what comes out, in which precision and at which scale."""

import torch
import torchvision
from torch import nn

from pwlib.crf import DenseCRF
from pwlib.data import load
from pwlib.model import PiecewiseTrainedModel, scaled_bandwidths
from pwlib.networks import DeepLabLargeFOV

CRF = {"theta_alpha": 6.0, "theta_beta": 20.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0}


def tiny(num_classes=3, **crf):
    torch.manual_seed(0)
    unary = DeepLabLargeFOV(num_classes, width=1 / 16)
    return PiecewiseTrainedModel(num_classes, unary=unary, crf=DenseCRF(num_classes, **{**CRF, **crf})).eval()


class Fixed(nn.Module):
    """A unary network that answers what it was told."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits.expand(len(image), -1, -1, -1)


def test_the_call_of_the_issue():
    model = tiny()
    image = torch.rand(2, 3, 19, 27)
    unary, crf = model(image)
    assert unary.shape == crf.shape == (2, 3, 19, 27)
    torch.testing.assert_close(crf.exp().sum(1), torch.ones(2, 19, 27))
    again, none = model(image, apply_crf=False)
    assert none is None and torch.equal(again, unary)


def test_the_constructors_number_of_iterations_is_the_one_that_runs():
    model = PiecewiseTrainedModel(3, crf_iterations=0, unary=Fixed(torch.randn(1, 3, 8, 9)), crf=DenseCRF(3, **CRF))
    image = torch.rand(1, 3, 8, 9)
    unary, crf = model(image)
    torch.testing.assert_close(crf, unary.log_softmax(1))
    one = model(image, iterations=1)[1]
    assert not torch.allclose(one, crf)
    torch.testing.assert_close(one, model.crf(unary, image, iterations=1))


def test_the_default_parts_are_the_papers():
    model = PiecewiseTrainedModel(num_classes=21, crf_iterations=10)
    assert isinstance(model.unary, DeepLabLargeFOV) and isinstance(model.crf, DenseCRF)
    assert model.unary.width == 1 and model.crf_iterations == 10


def test_under_autocast_the_crf_computes_in_float32():
    model, image = tiny(), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unary, crf = model(image)
    assert unary.dtype == torch.bfloat16, "the network did not run in mixed precision: the test shows nothing"
    assert crf.dtype == torch.float32
    torch.testing.assert_close(crf, model.crf(unary.float(), image), rtol=0, atol=0)


def test_a_torchvision_network_takes_the_unarys_place():
    torch.manual_seed(0)
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    model = PiecewiseTrainedModel(4, unary=network, crf=DenseCRF(4, **CRF)).eval()
    image = torch.rand(1, 3, 33, 47)
    unary, crf = model(image)
    assert unary.shape == crf.shape == (1, 4, 33, 47)
    torch.testing.assert_close(unary, network(image)["out"])


def test_predict_scales_bandwidths_with_the_image():
    """An image enlarged n times is the same picture: its labels are the small image's, n times as large. Had
    theta_alpha and theta_gamma stayed what they are in pixels, the CRF would see a smaller neighbourhood."""
    scene, _ = load("scenes", "val", size=(24, 36), length=1)[0]
    torch.manual_seed(1)
    coarse = torch.randn(1, 4, 3, 4)
    model = PiecewiseTrainedModel(
        4, unary=Fixed(nn.functional.interpolate(coarse, (24, 36), mode="bilinear")), crf=DenseCRF(4, **CRF)
    )
    small = model.predict(scene)
    large = scene.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert large.shape == (3, 72, 108)
    expected = small.argmax(0).repeat_interleave(3, 0).repeat_interleave(3, 1)

    def agreement(**options):
        return (model.predict(large, short_side=24, **options).argmax(0) == expected).float().mean()

    assert agreement() > 0.96
    unscaled = model.crf(
        nn.functional.interpolate(model.unary(scene[None]), (72, 108), mode="bilinear"), large[None]
    ).argmax(1)[0]
    assert (unscaled == expected).float().mean() < agreement() - 0.01


def test_predict_gives_probabilities_at_the_images_own_size():
    model, image = tiny().train(), torch.rand(3, 50, 71)
    for options in ({}, {"short_side": 24}, {"short_side": 24, "crf_long_side": 40}, {"apply_crf": False}):
        probability = model.predict(image, **options)
        assert probability.shape == (3, 50, 71)
        torch.testing.assert_close(probability.sum(0), torch.ones(50, 71))
    assert model.training, "predict left the model in another mode"
    torch.testing.assert_close(
        tiny().predict(image, apply_crf=False), tiny()(image[None], False)[0].softmax(1)[0].detach()
    )


def test_scaled_bandwidths_leaves_the_crf_alone():
    crf = DenseCRF(3, **CRF)
    other = scaled_bandwidths(crf, 2.0)
    torch.testing.assert_close(other.log_theta_alpha.exp(), torch.tensor(12.0))
    torch.testing.assert_close(other.log_theta_gamma.exp(), torch.tensor(3.0))
    torch.testing.assert_close(other.log_theta_beta, crf.log_theta_beta)
    torch.testing.assert_close(crf.log_theta_alpha.exp(), torch.tensor(6.0))
