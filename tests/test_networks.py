"""DeepLab-LargeFOV, weights and adapters, against torchvision's VGG-16, known geometry and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from pwlib import networks
from pwlib.networks import DeepLabLargeFOV, FeatMapNet, as_unary, receptive_field, resize_logits, vgg_blocks
from pwlib.pretrained import load_vgg_blocks

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def tiny(num_classes=3, **options):
    torch.manual_seed(0)
    return DeepLabLargeFOV(num_classes, **{"width": 1 / 32, **options})


# ------------------------------------------------------------------------------------------------------- shape and size


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (8, 8), (9, 7), (16, 24), (33, 50)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_have_the_images_exact_size(size, batch_norm):
    net = tiny(5, batch_norm=batch_norm).eval()
    image = torch.rand(2, 3, *size)
    logits = net(image)
    assert logits.shape == (2, 5, *size) and logits.is_contiguous()  # a cropped view would trip nll_loss
    assert net.coarse(image).shape == (2, 5, math.ceil(size[0] / 8), math.ceil(size[1] / 8))


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_blocks_shrink_by_the_output_stride(output_stride):
    blocks = vgg_blocks(width=1 / 32, output_stride=output_stride)
    assert blocks(torch.rand(1, 3, 64, 96)).shape == (1, 16, 64 // output_stride, 96 // output_stride)


def test_parameters_and_dilations_are_deeplabs():
    """Chen et al. 2015: 20.5 M parameters for LargeFOV with 21 classes; dilation 2 in block 5 and 12 in fc6."""
    net = DeepLabLargeFOV(21)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(20.5e6, rel=0.005)
    assert [c.dilation[0] for c in net.modules() if isinstance(c, nn.Conv2d)] == [1] * 10 + [2] * 3 + [12, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"width": 0.0}, "width is 0.0"),
        ({"weights": "imagenet", "width": 0.5}, "width is 0.5"),
    ],
)
def test_impossible_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.rand(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.rand(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_invalid_images_are_rejected(image, message):
    for net in (tiny(), as_unary(nn.Conv2d(3, 3, 1))):
        with pytest.raises(ValueError, match=message):
            net(image)


# ------------------------------------------------------------------------------------------------------------ alignment


def plant_identity(net):
    """Convolutions copy channel 0 and poolings average: logits[:, 0] is the blurred red channel."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
                setattr(parent, name, nn.AvgPool2d(kernel, stride, padding, ceil_mode=True, count_include_pad=False))
            elif isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                centre = layer.kernel_size[0] // 2
                layer.weight.data[:, 0, centre, centre] = 1
    return net.eval()


def misplacement(net, size):
    """Largest displacement of the logits in px, away from the border: a ramp must come back as the same ramp."""
    scale = 256  # px; images from 0.5 to 1 are positive when normalised, so that no ReLU clips them
    y, x = torch.meshgrid(*(torch.arange(1.0, s + 1) for s in size), indexing="ij")
    inside = (slice(24, size[0] - 32), slice(24, size[1] - 32))
    worst = 0.0
    for ramp in (y, x):
        with torch.no_grad():
            logits = net(0.5 + ramp.expand(1, 3, -1, -1) / scale)[0, 0]
        found = (logits * STD[0] + MEAN[0] - 0.5) * scale
        worst = max(worst, (found - ramp)[inside].abs().max().item())
    return worst


@pytest.mark.parametrize("rest", range(8))
def test_logits_are_aligned_with_the_image_at_any_size(rest, monkeypatch):
    net = plant_identity(tiny())
    size = (96 + rest, 104 + rest)
    assert misplacement(net, size) < 1e-3

    def stretched(logits, size, stride=None):
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)

    monkeypatch.setattr(networks, "resize_logits", stretched)
    assert (misplacement(net, size) > 0.3) == (rest != 0)  # the test detects a planted fault

    def corners(logits, size, stride=None):
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)

    monkeypatch.setattr(networks, "resize_logits", corners)
    assert misplacement(net, size) > 0.3


def test_resize_by_size_is_torchs_and_cells_must_cover_the_image():
    logits = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(
        resize_logits(logits, (9, 11)), F.interpolate(logits, size=(9, 11), mode="bilinear", align_corners=False)
    )
    torch.testing.assert_close(
        resize_logits(logits, (30, 37), stride=8),
        F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=False)[..., :30, :37],
    )
    assert resize_logits(logits, (4, 5)) is logits
    for size in [(33, 40), (24, 40)]:
        with pytest.raises(ValueError, match="4x5 cells of 8 px"):
            resize_logits(logits, size, stride=8)


# ------------------------------------------------------------------------------------------------------ receptive field


def test_receptive_field_is_the_support_of_the_gradient():
    """With positive weights and an image that rises to one side, poolings pass the gradient to their outermost input.

    The field must also be centred on pixel 8i + 3.5, where the resize puts cell i.
    """
    net = tiny(width=1 / 64).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
    side, cell = 448, 28
    reached = torch.zeros(side, side, dtype=torch.bool)
    for sign in (1, -1):
        rise = sign * torch.linspace(-1, 1, side)
        image = (0.8 + (rise[:, None] + rise[None, :]) / 10).expand(1, 3, -1, -1).clone().requires_grad_()
        net.coarse(image)[0, 0, cell, cell].backward()
        reached |= image.grad[0, 0] != 0
    rows, columns = (reached.any(dim).nonzero() for dim in (1, 0))
    first, last = rows.min().item(), rows.max().item()
    assert (first, last) == (columns.min().item(), columns.max().item())
    assert last - first + 1 == net.receptive_field == 412
    assert (first + last) / 2 == 8 * cell + 3.5


def test_receptive_field_of_plain_vgg():
    """212 px before VGG's first fully connected layer is the figure in the literature."""
    assert receptive_field(vgg.make_layers(vgg.cfgs["D"])) == 212
    assert receptive_field(vgg_blocks(width=1 / 64, output_stride=32)) == 212
    with pytest.raises(ValueError, match="square"):
        receptive_field(nn.Conv2d(1, 1, (1, 3)))


# ------------------------------------------------------------------------------------------------------- VGG's weights


@pytest.mark.parametrize("batch_norm", [False, True])
def test_blocks_compute_what_torchvisions_vgg_computes(batch_norm):
    torch.manual_seed(1)
    theirs = vgg.make_layers(vgg.cfgs["D"], batch_norm=batch_norm).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    ours = vgg_blocks(batch_norm=batch_norm).eval()
    load_vgg_blocks(ours, {f"features.{name}": value for name, value in theirs.state_dict().items()})
    image = torch.rand(1, 3, 48, 64)
    a = b = image
    for block in ours[:3]:
        a, b = block(a), theirs[: len(block)](b)
        theirs = theirs[len(block) :]
        torch.testing.assert_close(a, b)
        assert b.std() > 0
    convolutions = len(ours[3]) - 1  # up to the pooling that VGG halves with
    torch.testing.assert_close(ours[3][:convolutions](a), theirs[:convolutions](b))
    # Block 5 applies the same weights with dilation 2: if every second cell of its input is VGG's, so is its output.
    theirs, cells = theirs[len(ours[3]) :], torch.randn(1, 512, 3, 4).relu()
    spread = torch.zeros(1, 512, 6, 8)
    spread[..., ::2, ::2] = cells
    torch.testing.assert_close(ours[4][:convolutions](spread)[..., ::2, ::2], theirs[:convolutions](cells))


def test_the_published_vgg16_bn_file_has_no_batch_counters():
    """It was written before torch counted batches: convolutions, weights, biases and running statistics only."""
    state = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["D"], batch_norm=True).state_dict().items()}
    published = {name: value + 0.5 for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for given in (state | published, published):
        blocks = vgg_blocks(batch_norm=True)
        load_vgg_blocks(blocks, given)
        torch.testing.assert_close(blocks[0][1].running_var, published["features.1.running_var"])
        assert blocks[0][1].num_batches_tracked == 0
    for missing in ("features.1.running_mean", "features.41.bias"):
        with pytest.raises(ValueError, match=f"lack '{missing}'"):
            load_vgg_blocks(vgg_blocks(batch_norm=True), {k: v for k, v in published.items() if k != missing})


@pytest.mark.slow
def test_weights_of_another_network_are_rejected():
    plain = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}
    normed = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["D"], batch_norm=True).state_dict().items()}
    deeper = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["E"]).state_dict().items()}
    with pytest.raises(ValueError, match=r"features.0.weight.*\(64, 3, 3, 3\); expected \(16, 3, 3, 3\)"):
        load_vgg_blocks(vgg_blocks(width=0.25), plain)
    for blocks, state in [(vgg_blocks(), normed), (vgg_blocks(batch_norm=True), plain), (vgg_blocks(), deeper)]:
        with pytest.raises(ValueError, match=r"VGG weights .*features\.\d+\."):
            load_vgg_blocks(blocks, state)
    with pytest.raises(ValueError, match=r"lack 'classifier.0.weight'"):
        DeepLabLargeFOV(2).load_vgg(plain | {"classifier.3.weight": torch.zeros(4096, 4096)})


@pytest.mark.slow
def test_fc6_and_fc7_are_decimated_vgg_layers():
    """fc6 equals VGG's fully connected layer on 7x7 cells, 4 cells apart, if only every third cell is not zero."""
    torch.manual_seed(2)
    state = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}
    shapes = {"0.weight": (4096, 512 * 49), "0.bias": (4096,), "3.weight": (4096, 4096), "3.bias": (4096,)}
    state |= {f"classifier.{name}": torch.empty(shape).uniform_(-0.01, 0.01) for name, shape in shapes.items()}
    net = DeepLabLargeFOV(2).eval()
    net.load_vgg(state)
    seen = torch.zeros(1, 512, 7, 7)
    seen[..., ::3, ::3] = torch.randn(1, 512, 3, 3)
    stride8 = torch.zeros(1, 512, 25, 25)
    stride8[..., ::4, ::4] = seen
    with torch.no_grad():
        ours = net.fc6[0](stride8)[0, :, 12, 12]
        theirs = F.linear(seen.flatten(1), state["classifier.0.weight"], state["classifier.0.bias"])[0]
        torch.testing.assert_close(ours, theirs[::4], atol=1e-5, rtol=1e-4)
        hidden = torch.zeros(4096)
        hidden[::4] = torch.randn(1024)
        ours = net.fc7[0](hidden[::4].view(1, -1, 1, 1)).flatten()
        theirs = F.linear(hidden, state["classifier.3.weight"], state["classifier.3.bias"])
        torch.testing.assert_close(ours, theirs[::4], atol=1e-5, rtol=1e-4)


def test_a_failed_download_is_reported_in_one_sentence(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(OSError, match=r"cannot get ImageNet weights .*not known.* weights=None") as caught:
        DeepLabLargeFOV(2, weights="imagenet", batch_norm=True)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_cached_download_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a file")
    with pytest.raises(OSError, match="cannot get ImageNet weights"):
        DeepLabLargeFOV(2, weights="imagenet")


def convolutions(dtype=torch.float32, batch_norm=False):
    """torchvision's names and random values, for the convolutional layers only."""
    torch.manual_seed(5)
    state = vgg.make_layers(vgg.cfgs["D"], batch_norm=batch_norm).state_dict()
    return {f"features.{name}": value.to(dtype) for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [DeepLabLargeFOV, FeatMapNet])
def test_a_file_with_the_thirteen_convolutions(dtype, kind, tmp_path):
    """They fill blocks 1 to 5; the other layers keep their random weights, and every weight stays float32."""
    state = convolutions(dtype)
    torch.save(state, tmp_path / "vgg16.pt")
    torch.manual_seed(6)
    net = kind(2, weights=tmp_path / "vgg16.pt")
    torch.manual_seed(6)
    other = kind(2)
    found = [layer for layer in net.blocks.modules() if isinstance(layer, nn.Conv2d)]
    assert len(found) == 13
    for layer, name in zip(found, [name for name in state if name.endswith("weight")], strict=True):
        assert torch.equal(layer.weight, state[name].float())
    rest = {name: value for name, value in net.state_dict().items() if not name.startswith("blocks.")}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in rest.items())
    assert all(value.dtype == torch.float32 for value in net.state_dict().values())


def test_a_file_of_vgg_with_batch_norm(tmp_path):
    torch.save(convolutions(batch_norm=True), tmp_path / "vgg16_bn.pt")
    DeepLabLargeFOV(2, weights=tmp_path / "vgg16_bn.pt", batch_norm=True)
    with pytest.raises(ValueError, match=r"VGG weights .*features\.\d+\."):
        DeepLabLargeFOV(2, weights=tmp_path / "vgg16_bn.pt")


@pytest.mark.parametrize("kind", ["missing", "text", "list", "half", "other"])
def test_files_without_vgg_weights_are_rejected(kind, tmp_path):
    path, state = tmp_path / "vgg.pt", convolutions()
    if kind == "text":
        path.write_text("weights")
    elif kind != "missing":
        half = {name: state[name] for name in list(state)[:10]}
        torch.save({"list": [1, 2], "half": half, "other": {"layer.weight": torch.zeros(3)}}[kind], path)
    message = {"missing": "no such file", "text": "damaged or not", "list": "not a state dict"}.get(
        kind, "weights lack"
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DeepLabLargeFOV(2, weights=path)


# ------------------------------------------------------------------------------------------------------------- training


def test_pixels_are_normalised_inside_with_imagenets_statistics():
    net = tiny().eval()
    seen = []
    net.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(2, 3, 8, 9)
    net(image)
    torch.testing.assert_close(seen[0], (image - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    assert not any("mean" in name and "normalize" in name for name in net.state_dict())


def test_initial_activations_neither_vanish_nor_explode():
    torch.manual_seed(3)
    net = DeepLabLargeFOV(21, width=0.25).eval()
    with torch.no_grad():
        features = net.fc7(net.fc6(net.blocks(net.normalize(torch.rand(1, 3, 64, 64)))))
        assert 0.1 < features.std() < 30  # sixteen layers with torch's default initialisation: below 1e-4
        assert net(torch.rand(1, 3, 64, 64)).abs().max() < 5  # first predictions close to uniform


@pytest.mark.parametrize("batch_norm", [False, True])
def test_it_learns_from_scratch(batch_norm):
    """The two halves differ in colour: within a few steps the loss falls far below that of a random guess."""
    net = tiny(2, batch_norm=batch_norm, width=1 / 8, dropout=0.0)
    image = torch.rand(2, 3, 24, 32) * 0.2
    image[..., 16:] += 0.7
    label = torch.zeros(2, 24, 32, dtype=torch.int64)
    label[..., 16:] = 1
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(30):
        loss = F.cross_entropy(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35 < math.log(2)


def test_dropout_is_active_in_training_only():
    net, image = tiny(), torch.rand(1, 3, 16, 16)
    assert not torch.equal(net(image), net(image))
    net.eval()
    assert torch.equal(net(image), net(image))


# --------------------------------------------------------------------------------------------------------- any network


class Stub(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, image):
        return self.output(image)


def test_a_torchvision_network_can_be_the_unary():
    torch.manual_seed(4)
    theirs = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    net = as_unary(theirs, num_classes=5, normalize=True)
    image = torch.rand(2, 3, 45, 61)
    with torch.no_grad():
        expected = theirs((image - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))["out"]
        torch.testing.assert_close(net(image), expected)
    with pytest.raises(ValueError, match=r"LRASPP returned \(2, 5, 45, 61\); expected logits \[2, 7, H, W\]"):
        as_unary(theirs, num_classes=7)(image)


def test_small_maps_are_resized_and_adapters_are_not_stacked():
    net = as_unary(Stub(lambda image: image[:, :2, ::4, ::4]))
    assert net(torch.rand(1, 3, 21, 30)).shape == (1, 2, 21, 30)
    assert as_unary(net) is net
    deeplab = tiny()
    assert as_unary(deeplab) is deeplab


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda image: {"logits": image}, r"a dict of \['logits'\]; .* a dict with them as 'out'"),
        (lambda image: image.argmax(1), r"Stub returned \(2, 8, 8\); expected logits \[2, K, H, W\]"),
        (lambda image: image[:1], r"Stub returned \(1, 3, 8, 8\)"),
        (lambda image: [image], "Stub returned list"),
    ],
)
def test_networks_that_return_no_logits_are_rejected(output, message):
    with pytest.raises(ValueError, match=message):
        as_unary(Stub(output))(torch.rand(2, 3, 8, 8))


def test_a_network_of_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="has 7 classes; expected 5"):
        as_unary(DeepLabLargeFOV(7, width=0.02), num_classes=5)
