"""The model as a whole: inputs, outputs, precision, scale."""

import pytest
import torch
import torchvision
from torch import nn

from pwlib.crf import DenseCRF, Kernel
from pwlib.data import load
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.tools.tiling import predict, scaled_bandwidths

CRF = {"theta_alpha": 6.0, "theta_beta": 20.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0}


def tiny(num_classes=3, **crf):
    torch.manual_seed(0)
    unary = DeepLabLargeFOV(num_classes, width=1 / 16)
    return PiecewiseTrainedModel(num_classes, unary=unary, crf=DenseCRF(num_classes, **{**CRF, **crf})).eval()


class Fixed(nn.Module):
    """A unary network with given logits [1, K, H, W]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image):
        return self.logits.expand(len(image), -1, -1, -1)


def test_the_call_returns_logits_and_log_marginals():
    model = tiny()
    image = torch.rand(2, 3, 19, 27)
    unary, crf = model(image)
    assert unary.shape == crf.shape == (2, 3, 19, 27)
    torch.testing.assert_close(crf.exp().sum(1), torch.ones(2, 19, 27))
    again, none = model(image, apply_crf=False)
    assert none is None and torch.equal(again, unary)


def test_crf_iterations_of_the_constructor_are_used():
    model = PiecewiseTrainedModel(3, crf_iterations=0, unary=Fixed(torch.randn(1, 3, 8, 9)), crf=DenseCRF(3, **CRF))
    image = torch.rand(1, 3, 8, 9)
    unary, crf = model(image)
    torch.testing.assert_close(crf, unary.log_softmax(1))
    one = model(image, iterations=1)[1]
    assert not torch.allclose(one, crf)
    torch.testing.assert_close(one, model.crf(unary, image, iterations=1))


def test_the_default_parts_are_deeplab_and_a_dense_crf():
    model = PiecewiseTrainedModel(num_classes=21, crf_iterations=10)
    assert isinstance(model.unary, DeepLabLargeFOV) and isinstance(model.crf, DenseCRF)
    assert model.unary.width == 1 and model.crf.iterations == 10


def test_under_autocast_the_crf_computes_in_float32():
    model, image = tiny(), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unary, crf = model(image)
    assert unary.dtype == torch.bfloat16, "the network did not run in mixed precision: the test shows nothing"
    assert crf.dtype == torch.float32
    torch.testing.assert_close(crf, model.crf(unary.float(), image), rtol=0, atol=0)


def test_a_torchvision_network_can_be_the_unary():
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
    """The labels of an enlarged image are those of the small one, enlarged. With theta_alpha and theta_gamma as they
    were, in pixels, the CRF would smooth over a smaller neighbourhood."""
    scene, _ = load("scenes", "val", size=(24, 36), length=1)[0]
    torch.manual_seed(1)
    coarse = torch.randn(1, 4, 3, 4)
    model = PiecewiseTrainedModel(
        4, unary=Fixed(nn.functional.interpolate(coarse, (24, 36), mode="bilinear")), crf=DenseCRF(4, **CRF)
    )
    small = predict(model, scene)
    large = scene.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert large.shape == (3, 72, 108)
    expected = small.argmax(0).repeat_interleave(3, 0).repeat_interleave(3, 1)

    def agreement(**options):
        return (predict(model, large, short_side=24, **options).argmax(0) == expected).float().mean()

    assert agreement() > 0.96
    unscaled = model.crf(
        nn.functional.interpolate(model.unary(scene[None]), (72, 108), mode="bilinear"), large[None]
    ).argmax(1)[0]
    assert (unscaled == expected).float().mean() < agreement() - 0.01


def test_predict_gives_probabilities_at_the_size_of_the_image():
    model, image = tiny().train(), torch.rand(3, 50, 71)
    for options in ({}, {"short_side": 24}, {"short_side": 24, "crf_long_side": 40}, {"apply_crf": False}):
        probability = predict(model, image, **options)
        assert probability.shape == (3, 50, 71)
        torch.testing.assert_close(probability.sum(0), torch.ones(50, 71))
    assert model.training, "predict changed the mode of the model"
    torch.testing.assert_close(
        predict(tiny(), image, apply_crf=False), tiny()(image[None], False)[0].softmax(1)[0].detach()
    )


def test_scaled_bandwidths_returns_a_copy():
    crf = DenseCRF(3, **CRF)
    other = scaled_bandwidths(crf, 2.0)
    torch.testing.assert_close(other.log_theta_alpha.exp(), torch.tensor(12.0))
    torch.testing.assert_close(other.log_theta_gamma.exp(), torch.tensor(3.0))
    torch.testing.assert_close(other.log_theta_beta, crf.log_theta_beta)
    torch.testing.assert_close(crf.log_theta_alpha.exp(), torch.tensor(6.0))


def positions(image):
    """[B, N, 2], pixels: (row, column) of every pixel."""
    height, width = image.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    return grid.reshape(1, -1, 2).expand(len(image), -1, -1).float()


def places_and_colours(image):
    return torch.cat([positions(image), 255 * image.flatten(2).transpose(1, 2)], -1)


def test_scaled_bandwidths_scales_the_bandwidths_of_kernels_that_are_in_pixels():
    kernels = [
        Kernel("places", positions, 4.0, in_pixels=True),
        Kernel("colours", lambda image: image.flatten(2).transpose(1, 2), 4.0),
        Kernel("both", places_and_colours, [4.0, 4.0, 9.0, 9.0, 9.0], in_pixels=[True, True, False, False, False]),
    ]
    found = scaled_bandwidths(DenseCRF(3, **CRF, extra_kernels=kernels), 2.0).extra_kernels
    torch.testing.assert_close(found[0].log_theta.exp(), torch.tensor(8.0))
    torch.testing.assert_close(found[1].log_theta.exp(), torch.tensor(4.0))
    torch.testing.assert_close(found[2].log_theta.exp(), torch.tensor([8.0, 8.0, 9.0, 9.0, 9.0]))
    with pytest.raises(ValueError, match="kernel 'both' has 5 bandwidths and 2 values of in_pixels"):
        Kernel("both", places_and_colours, [4.0, 4.0, 9.0, 9.0, 9.0], in_pixels=[True, False])


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_an_enlarged_image_has_the_same_marginals(normalization):
    """Each pixel becomes 3 x 3: the marginals stay, up to discretisation, if all three kernels are scaled."""
    torch.manual_seed(0)
    image, logits = (nn.functional.interpolate(torch.randn(1, 3, 5, 6), (20, 24), mode="bilinear") for _ in range(2))
    image = image.sigmoid()

    def enlarged(x):
        return x.repeat_interleave(3, 2).repeat_interleave(3, 3)

    weight = {"symmetric": 1.0, "none": 0.02}[normalization]
    options = {"theta_alpha": 6.0, "theta_beta": 90.0, "theta_gamma": 3.0, "filtering": "exact"}
    options |= {"w_bilateral": weight, "w_spatial": weight, "normalization": normalization}
    changes = {}
    for in_pixels in (True, False):
        crf = DenseCRF(3, **options, extra_kernels=[Kernel("places", positions, 5.0, weight, in_pixels=in_pixels)])
        with torch.no_grad():
            before = crf(logits, image).exp()
            after = scaled_bandwidths(crf, 3.0)(enlarged(logits), enlarged(image)).exp()
        assert (before - logits.softmax(1)).abs().mean() > 0.05, "the CRF changes nothing: the test shows nothing"
        changes[in_pixels] = (after - enlarged(before)).abs().mean()
    assert changes[True] < 0.01 and changes[False] > 2 * changes[True], changes


def test_predict_restores_the_mode_of_every_module():
    model = tiny().train()
    model.unary.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    predict(model, torch.rand(3, 16, 16))
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(ValueError, match="expected"):
        predict(model, torch.full((3, 16, 16), 7))
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_rejected(dtype):
    model = tiny().to(dtype)
    message = rf"the model's parameters are {dtype}; expected torch\.float32.*autocast"
    for image in (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16, dtype=dtype)):
        for apply_crf in (True, False):
            with pytest.raises(ValueError, match=message):
                model(image, apply_crf)
    assert tiny().double()(torch.rand(1, 3, 16, 16))[1].isfinite().all()
