"""FeatMap-Net, against known geometry, scipy's maximum filter, loops and VGG's weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter
from torch import nn
from torchvision.models import vgg

from pwlib.networks import DeepLabLargeFOV, FeatMapNet, as_unary, cell_labels, resize_logits

MEAN, STD = 0.485, 0.229  # ImageNet's, red


def tiny(num_classes=3, **options):
    torch.manual_seed(0)
    return FeatMapNet(num_classes, **{"width": 1 / 64, "output_stride": 8, "dilation": 1, **options})


# ---------------------------------------------------------------------------------------------------- size and parts


@pytest.mark.parametrize("size", [(1, 1), (9, 17), (16, 24), (33, 50)])
@pytest.mark.parametrize("options", [{}, {"output_stride": 16, "dilation": None}, {"batch_norm": True}])
def test_logits_have_the_images_exact_size(size, options):
    net = tiny(5, **options).eval()
    image = torch.rand(2, 3, *size)
    assert net(image).shape == (2, 5, *size)
    cells = tuple(max(1, round(1.2 * side / net.output_stride)) for side in size)
    features = net.features(image)
    assert features.shape == (2, net.feature_channels, *cells) and net.coarse(image).shape == (2, 5, *cells)
    torch.testing.assert_close(net.head(features), net.coarse(image))


def test_every_part_can_be_switched_off():
    image, base = torch.rand(1, 3, 32, 40), 8
    for scales, pyramid, channels in [
        ((1.0,), (), base),
        ((1.0,), (5, 9), 3 * base),
        ((1.2, 0.8, 0.4), (), 3 * base),
        ((1.2, 0.8, 0.4), (5, 9), 9 * base),
    ]:
        net = tiny(scales=scales, pyramid=pyramid).eval()
        assert net.feature_channels == channels == net.features(image).shape[1]
        assert len(net.block6) == len(scales)


def test_blocks_are_shared_and_block_6_is_not():
    """A second scale adds one block 6 and the head's weights for its features, and no other parameters."""
    one, two = tiny(scales=(1.0,), pyramid=()), tiny(scales=(1.0, 0.5), pyramid=())
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in two.named_children()}
    assert count["blocks"] == sum(p.numel() for p in one.blocks.parameters())
    assert count["block6"] == 2 * sum(p.numel() for p in one.block6.parameters())
    two(torch.rand(1, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in two.head.parameters())
    assert all(block[0].weight.grad.abs().max() > 0 for block in two.block6)


def test_sliding_pyramid_pooling_is_a_maximum_filter():
    net, image = tiny(scales=(1.0,)).eval(), torch.rand(1, 3, 72, 104)
    with torch.no_grad():
        features = net.features(image)[0]
    own, fives, nines = features.chunk(3)
    assert own.std() > 0
    for pooled, side in ((fives, 5), (nines, 9)):
        # Features are not negative (ReLU), so zeros around the map do not change the maximum.
        expected = [maximum_filter(channel.numpy(), size=side, mode="constant", cval=0.0) for channel in own]
        assert (pooled.numpy() == expected).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"width": 0.0}, "width is 0.0"),
        ({"weights": "imagenet"}, "width is 0.015625"),
        ({"scales": ()}, "scales are"),
        ({"scales": (1.0, -1.0)}, "scales are"),
        ({"pyramid": (4,)}, "odd numbers"),
        ({"dilation": 0}, "dilation is 0"),
        ({"output_stride": 12}, "output_stride is 12"),
    ],
)
def test_impossible_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_it_passes_as_unary_unchanged():
    net = tiny()
    assert as_unary(net) is net


# ------------------------------------------------------------------------------------------------------------ alignment


def plant_identity(net, channel):
    """Convolutions copy channel 0, poolings average, the head reads feature `channel`: the blurred red channel."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                options = (layer.kernel_size, layer.stride, layer.padding)
                setattr(parent, name, nn.AvgPool2d(*options, ceil_mode=True, count_include_pad=False))
            elif isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                centre = layer.kernel_size[0] // 2
                layer.weight.data[:, 0, centre, centre] = 1
    net.pools = nn.ModuleList(net.pools)
    net.head[0].weight.data.zero_()
    net.head[0].weight.data[:, channel] = 1
    return net.eval()


def misplacement(net, size, margin=72):
    """Largest displacement of the logits in px, away from the border: a ramp must come back as the same ramp."""
    y, x = torch.meshgrid(*(torch.arange(1.0, s + 1) for s in size), indexing="ij")
    scale = 512  # px; images from 0.5 to 1 are positive when normalised, so that no ReLU clips them
    worst = 0.0
    for ramp in (y, x):
        with torch.no_grad():
            logits = net(0.5 + ramp.expand(1, 3, -1, -1) / scale)[0, 0]
        found = (logits * STD + MEAN - 0.5) * scale
        worst = max(worst, (found - ramp)[margin:-margin, margin:-margin].abs().max().item())
    return worst


class Careless(FeatMapNet):
    """A planted fault: resizes by the exact scale, so that maps extend beyond the image by part of a cell."""

    def features(self, image):
        image, maps = self.normalize(image), []
        for scale, block6 in zip(self.scales, self.block6, strict=True):
            size = [round(side * scale) for side in image.shape[-2:]]
            maps.append(block6(self.blocks(F.interpolate(image, size=size, mode="bilinear", antialias=True))))
        joined = torch.cat([resize_logits(one, maps[0].shape[-2:]) for one in maps], dim=1)
        return torch.cat([joined, *(pool(joined) for pool in self.pools)], dim=1)


@pytest.mark.parametrize("size", [(208, 209), (211, 214), (205, 223)])
@pytest.mark.parametrize("channel", [0, 8, 16])  # the three scales; 8 channels each
def test_features_of_every_scale_are_aligned_with_the_image(size, channel):
    assert misplacement(plant_identity(tiny(), channel), size) < 0.02
    torch.manual_seed(0)
    careless = Careless(3, width=1 / 64, output_stride=8, dilation=1)
    assert misplacement(plant_identity(careless, channel), size) > 0.3  # the test detects the planted fault


def test_cell_labels_are_the_labels_under_the_cell_centres():
    label = torch.randint(0, 9, (2, 13, 18), generator=torch.Generator().manual_seed(0))
    for cells, cell_size in [
        ((4, 6), None),
        ((13, 18), None),
        ((1, 1), None),
        ((2, 3), 8),
        ((4, 5), 4),
        ((20, 30), None),
    ]:
        found = cell_labels(label, cells, cell_size=cell_size)
        for i in range(cells[0]):
            for j in range(cells[1]):
                row = math.floor((i + 0.5) * (cell_size or 13 / cells[0]))
                column = math.floor((j + 0.5) * (cell_size or 18 / cells[1]))
                expected = label[:, row, column] if row < 13 and column < 18 else torch.full((2,), 255)
                assert torch.equal(found[:, i, j], expected)


def test_resized_one_hot_cell_labels_give_the_label_back():
    """Regions of a few cells survive label -> cells -> one-hot scores -> pixels, also if cells exceed the image."""
    label = torch.zeros(1, 45, 61, dtype=torch.int64)
    label[:, 20:], label[:, :, 33:] = 1, 2
    for cells, cell_size in [((6, 8), 8), ((6, 8), None), ((9, 12), None)]:
        scores = F.one_hot(cell_labels(label, cells, cell_size=cell_size) % 255, 3)  # void counts as class 0
        back = resize_logits(scores.movedim(-1, 1).float(), (45, 61), stride=cell_size).argmax(1)
        wrong = (back != label)[0]
        wrong[16:24], wrong[:, 29:37] = False, False
        assert wrong.float().mean() < 0.02


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.mark.slow
def test_vgg_weights_are_copied_to_blocks_1_to_6():
    torch.manual_seed(2)
    state = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}
    state |= {"classifier.0.weight": torch.randn(4096, 512 * 49) * 0.01, "classifier.0.bias": torch.randn(4096)}
    net = FeatMapNet(2, pyramid=(), scales=(1.0, 0.5))
    net.load_vgg(state)
    torch.testing.assert_close(net.blocks[4][0].weight, state["features.24.weight"])
    # The taps are VGG's cells 0, 3 and 6 of 7x7 in both directions, of every fourth output.
    for block in net.block6:
        for i, j in [(0, 0), (1, 1), (2, 0)]:
            tap = state["classifier.0.weight"].view(4096, 512, 7, 7)[4 * 5, :, 3 * i, 3 * j]
            torch.testing.assert_close(block[0].weight[5, :, i, j], tap)
        assert block[0].dilation == (6, 6)  # 96 px at 16 px a cell; VGG: 3 cells of 32 px
    with pytest.raises(ValueError, match=r"expected \(8, 3, 3, 3\)"):
        FeatMapNet(2, width=1 / 8).load_vgg(state)


def test_deeplab_has_features_and_a_head_too():
    net, image = DeepLabLargeFOV(3, width=1 / 32).eval(), torch.rand(2, 3, 20, 30)
    features = net.features(image)
    assert features.shape == (2, net.feature_channels, 3, 4)
    torch.testing.assert_close(net.head(features), net.coarse(image))


@pytest.mark.slow
def test_it_learns_from_scratch():
    """The two halves differ in colour: within a few steps the loss falls far below that of a random guess."""
    net = tiny(2, width=1 / 16, dropout=0.0)
    image = torch.rand(2, 3, 32, 48) * 0.2
    image[..., 24:] += 0.7
    label = torch.zeros(2, 32, 48, dtype=torch.int64)
    label[..., 24:] = 1
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(25):
        loss = F.cross_entropy(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 < math.log(2)
