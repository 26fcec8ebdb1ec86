"""The functions of notebook 01 against the library, torch and plain loops."""

import pytest
import torch
import torch.nn.functional as F

from pwlib.networks import DeepLabLargeFOV, resize_logits


@pytest.mark.parametrize("dilation, padding, kernel", [(1, 0, 3), (2, 2, 3), (12, 12, 3), (3, 1, 5), (1, 0, 1)])
@pytest.mark.parametrize("name", ["dilated_conv2d", "dilated_conv2d_as_product"])
def test_dilated_convolution(pull, name, dilation, padding, kernel):
    generator = torch.Generator().manual_seed(dilation)
    x = torch.randn(2, 3, 17, 22, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    wanted = F.conv2d(x, weight, bias, dilation=dilation, padding=padding)
    torch.testing.assert_close(pull("01", name)(x, weight, bias, dilation, padding), wanted)


def test_large_fov_equals_the_library(pull):
    library = DeepLabLargeFOV(6, width=0.0625, batch_norm=True).eval()
    network = pull("01", "large_fov")(6, width=0.0625).eval()
    for ours, theirs in zip(network.state_dict().values(), library.state_dict().values(), strict=True):
        assert ours.shape == theirs.shape
    network.load_state_dict(dict(zip(network.state_dict(), library.state_dict().values(), strict=True)))
    image = torch.rand(1, 3, 61, 90)
    with torch.no_grad():
        torch.testing.assert_close(network(library.normalize(image)), library.coarse(image))


@pytest.mark.parametrize("size", [(64, 96), (61, 100), (8, 8), (3, 17)])
def test_upsample(pull, size):
    coarse = torch.randn(2, 5, -(-size[0] // 8), -(-size[1] // 8))
    ours = pull("01", "upsample")(coarse, size)
    torch.testing.assert_close(ours, resize_logits(coarse, size, stride=8))
    # Between two cell centres, upsampling the centres' coordinates gives the coordinates of the pixels.
    centres = 8.0 * torch.arange(coarse.shape[2]) + 3.5
    ramp = pull("01", "upsample")(centres[None, None, :, None].expand(1, 1, -1, 2), (size[0], 16))[0, 0, :, 0]
    pixels = torch.arange(size[0]).float()
    inner = (pixels >= centres[0]) & (pixels <= centres[-1])
    torch.testing.assert_close(ramp[inner], pixels[inner])


def test_class_shares(pull):
    label = torch.randint(3, (2, 16, 24), generator=torch.Generator().manual_seed(0))
    label[torch.rand(label.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = 255
    shares = pull("01", "class_shares")(label, 8, 3)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        pixels = label[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten().tolist()
        counts = torch.tensor([pixels.count(k) for k in range(3)])
        torch.testing.assert_close(shares[b, :, i, j], counts / counts.sum())


def test_fitted_logits_place_a_border_between_centres_where_shares_do_not(pull):
    label = (torch.arange(16) >= 6).long().expand(1, 8, 16)  # cells of 8 px: the border is at 5.5, between the centres
    found = {}
    for name in ("class_shares", "fit_logits"):
        cells = pull("01", name)(label, 8, 2)
        found[name] = resize_logits(cells, (8, 16), stride=8).argmax(1)
    assert (found["class_shares"] != label)[0].any(0).nonzero()[:, 0].tolist() == [6]
    assert torch.equal(found["fit_logits"], label)
