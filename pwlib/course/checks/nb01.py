"""Checks of notebook 01: the unary network."""

import math

import torch
import torch.nn.functional as F

from pwlib.course.checks import exercise, expect, expect_close, expect_shape


@exercise("01.1", title="How large is the map?", minutes=5, difficulty=1)
def output_side(answer):
    cases = [
        (61, 3, 3, 9, 13),
        (96, 3, 1, 1, 1),
        (97, 2, 2, 1, 0),
        (64, 3, 2, 1, 0),
        (64, 3, 1, 12, 12),
        (40, 5, 3, 4, 6),
        (33, 7, 2, 3, 1),
    ]
    for side, kernel, stride, dilation, padding in cases:
        # The oracle is torch: convolve an image of zeros and measure the result.
        line = torch.zeros(1, 1, side, side)
        wanted = F.conv2d(line, torch.zeros(1, 1, kernel, kernel), stride=stride, dilation=dilation, padding=padding)
        wanted = wanted.shape[-1]
        padded, window = side + 2 * padding, dilation * (kernel - 1) + 1
        hints = [
            ((padded - kernel) // stride + 1, "The dilation is missing: a window spans dilation * (kernel - 1) + 1 px."),
            ((padded - dilation * kernel) // stride + 1, "A window of k taps has k - 1 gaps, not k: it spans dilation * (kernel - 1) + 1 px."),
            ((padded - window) // stride, "One too few: the position at the very start counts, too."),
            ((side + padding - window) // stride + 1, "The padding is added at both ends."),
            (-(-(padded - window) // stride) + 1, "The last window sticks out of the input: round down, not up."),
            ((padded - window) / stride + 1, "A window that would stick out does not count: use whole division, //."),
            (padded - window + 1, "The stride is missing: windows start `stride` px apart."),
        ]  # fmt: skip
        arguments = f"output_side({side}, {kernel}, {stride}, {dilation}, {padding})"
        expect_close(answer(side, kernel, stride, dilation, padding), wanted, arguments, hints=hints)
    return f"The same as torch.nn.functional.conv2d, in {len(cases)} cases."


def _seen(layers):
    """Measure the receptive field: the extent of a gradient through convolutions with positive weights."""
    side, jump = 1, 1
    for kernel, stride, dilation in layers:
        side, jump = side + (kernel - 1) * dilation * jump, jump * stride
    pixels = torch.ones(1, 1, 1, side + 4 * jump, dtype=torch.float64, requires_grad=True)
    x = pixels
    for kernel, stride, dilation in layers:
        x = F.conv2d(x, torch.ones(1, 1, 1, kernel, dtype=torch.float64), stride=(1, stride), dilation=(1, dilation))
    (gradient,) = torch.autograd.grad(x[0, 0, 0, 0], pixels)
    seen = gradient[0, 0, 0].nonzero()[:, 0]
    return int(seen.max() - seen.min()) + 1


@exercise("01.2", title="The receptive field of a chain", minutes=10, difficulty=2)
def field_of(answer):
    vgg = [layer for depth in (2, 2, 3, 3, 3) for layer in [(3, 1, 1)] * depth + [(2, 2, 1)]]
    cases = [[], [(3, 1, 1), (3, 1, 1)], [(2, 2, 1), (3, 1, 1)], [(3, 1, 2)], [(3, 2, 1), (3, 2, 3), (5, 1, 2)], vgg]
    for layers in cases:
        wanted = _seen(layers) if layers else 1
        hints = [
            (_walk(layers, dilated=False), "The dilation is missing: a layer's taps are dilation * jump px apart."),
            (_walk(layers, jump_first=True), "You multiply the jump by the layer's stride before you use it; the layer's taps lie on the map before its own stride."),
            (_walk(layers, strided=False), "The jump never changes: behind a stride, neighbouring cells are more px apart."),
            (_walk(layers, gaps=0), "k taps have k - 1 gaps between them: add (k - 1) * dilation * jump, not k * dilation * jump."),
            (_walk(layers, start=0), "The field starts at 1: before any layer an output is one pixel and sees itself."),
        ]  # fmt: skip
        expect_close(answer(list(layers)), wanted, f"field_of({str(layers)[:60]})", hints=hints)
    return f"Five chains agree with brute force; the last was VGG-16's convolutions, {_seen(vgg)} px."


def _walk(layers, dilated=True, jump_first=False, strided=True, gaps=1, start=1):
    """Compute the receptive field by the recursion, with at most one planted mistake."""
    field, jump = start, 1
    for kernel, stride, dilation in layers:
        if jump_first:
            jump *= stride
        field += (kernel - gaps) * (dilation if dilated else 1) * jump
        if strided and not jump_first:
            jump *= stride
    return field


@exercise("01.3", title="The effective field", minutes=10, difficulty=2)
def effective_side(answer):
    spike = torch.zeros(21, 21)
    spike[10, 10] = 2.0
    rows = torch.arange(61) - 30.0
    bell = torch.exp(-(rows[:, None] ** 2 + rows[None] ** 2) / (2 * 9**2))
    bell = torch.where(torch.maximum(rows.abs()[:, None], rows.abs()[None]) < 14, bell, -bell)
    for name, gradient, share in (
        ("a single spike", spike, 0.9),
        ("a flat square of ones", torch.ones(21, 21), 0.5),
        ("a bell, negative outside", bell, 0.9),
        ("a bell, negative outside, everything", bell, 1.0),
    ):
        wanted = _smallest(gradient.abs(), share)
        kept = gradient.clone()
        actual = answer(gradient, share)
        expect(torch.equal(gradient, kept), "Your function changes the gradient it was given; work on a copy.")
        hints = [
            ((wanted - 1) / 2, "That is half the side (without the middle): the side is 2 * half + 1."),
            (wanted + 1, "A centred square has an odd side: 2 * half + 1, not 2 * half + 2."),
            (_smallest(gradient, share), "Negative gradients count against positive ones; take the absolute value first."),
            (_smallest(gradient**2, share), "You weigh by the squared gradient; the exercise asks for its absolute value."),
            (_smallest(gradient.abs(), share, "inscribed"), "One ring too far: the square holds the share already at a smaller side."),
            (wanted - 2, "One ring too small: the square has to hold at least the share."),
        ]  # fmt: skip
        expect_close(actual, wanted, f"the side for {name} ({share:.0%})", hints=hints)
    return "Right on a spike, a flat square and a bell that is negative outside."


def _smallest(size, share, late=""):
    """Return the side of the smallest centred square by definition; 0 if no square has the share."""
    middle, total = len(size) // 2, float(size.double().sum())
    rows = (torch.arange(len(size)) - middle).abs()
    ring = torch.maximum(rows[:, None], rows[None])
    for half in range(middle + 1):
        if float(size.double()[ring <= half].sum()) >= share * total * (1 - 1e-6):
            return 2 * half + (3 if late else 1)
    return 0


@exercise("01.4", title="Holes for any network", minutes=15, difficulty=3)
def with_holes(answer):
    vgg = [layer for depth in (2, 2, 3, 3, 3) for layer in [(3, 1)] * depth + [(2, 2)]] + [(7, 1)]
    cases = [
        ([(3, 1), (2, 2), (3, 1), (2, 2), (3, 1)], 2),
        (vgg, 8),
        (vgg, 32),
        (vgg, 4),
        ([(3, 2), (3, 3), (3, 1), (3, 2), (3, 1)], 2),
    ]
    for layers, output_stride in cases:
        wanted = _holes(layers, output_stride)
        actual = answer(list(layers), output_stride)
        rows = torch.as_tensor(actual)
        where = f"with_holes({str(layers)[:40]}…, {output_stride})"
        expect_shape(rows, (len(layers), 3), where)
        hints = [
            (torch.tensor(_holes(layers, output_stride, own=True)), "A layer whose stride you take out is itself dilated by it; only what follows it is (its own taps lie before its stride)."),
            (torch.tensor(_holes(layers, output_stride, undilated=True)), "No layer is dilated: the taps of the layers behind a removed stride are then too close together."),
            (torch.tensor(_holes(layers, output_stride, once=True)), "The dilation stays that of the last removed stride; two removed strides of 2 dilate by 4: multiply."),
            (torch.tensor(_holes(layers, output_stride, next_only=True)), "Only the next layer is dilated; all that follow a removed stride are."),
            (torch.tensor(_holes(layers, output_stride, strict=True)), "You remove a stride too early: the product of strides may reach output_stride itself."),
            (torch.tensor([(k, s, 1) for k, s in layers]), "Nothing has changed: strides beyond output_stride become 1."),
        ]  # fmt: skip
        expect_close(rows, torch.tensor(wanted), where, hints=hints)
        _same_outputs(layers, actual)
    return "Five networks; and the new ones compute every old output, with the same weights."


def _holes(layers, output_stride, own=False, undilated=False, once=False, next_only=False, strict=False):
    """Apply the transformation, with at most one planted mistake."""
    changed, product, dilation = [], 1, 1
    for kernel, stride in layers:
        keep = product * stride < output_stride if strict and stride > 1 else product * stride <= output_stride
        now = 1 if undilated else dilation
        if next_only and stride == 1:
            dilation = 1
        if keep:
            product *= stride
            changed.append((kernel, stride, now))
        else:
            dilation = stride if once else dilation * stride
            changed.append((kernel, 1, dilation if own else now))
    return changed


def _same_outputs(layers, changed):
    """Check on a row of random pixels that the new network computes every output of the old one."""
    side = 600
    weights = [torch.rand(1, 1, 1, kernel, dtype=torch.float64) / kernel for kernel, _ in layers]
    old = new = torch.rand(1, 1, 1, side, dtype=torch.float64)
    for weight, (_, stride), (_, kept, dilation) in zip(weights, layers, changed, strict=True):
        old = F.conv2d(old, weight, stride=(1, stride))
        new = F.conv2d(new, weight, stride=(1, int(kept)), dilation=(1, int(dilation)))
    step = math.prod(stride for _, stride in layers) // math.prod(int(kept) for _, kept, _ in changed)
    new = new[..., ::step][..., : old.shape[-1]]
    expect(torch.allclose(new, old[..., : new.shape[-1]]), "The new network does not compute the old one's outputs.")


@exercise("01.5", title="How much of it is rim?", minutes=10, difficulty=2)
def rim_share(answer):
    for width in (1, 3, 5):
        label, prediction = torch.randint(4, (20, 30)), torch.randint(4, (20, 30))
        label[torch.rand(20, 30) < 0.25] = 255
        distance = torch.randint(1, 9, (20, 30))
        right = torch.rand(20, 30) < 0.1 * distance  # fewer errors far from borders
        prediction = torch.where(right & (label != 255), label, prediction)
        kept = prediction.clone(), label.clone(), distance.clone()
        actual = answer(prediction, label, distance, width)
        expect(
            all(torch.equal(a, b) for a, b in zip((prediction, label, distance), kept, strict=True)),
            "Your function changes the maps it was given; work on copies.",
        )
        errors = rim = pixels = rim_pixels = 0
        for y in range(20):  # pixel by pixel
            for x in range(30):
                if label[y, x] == 255:
                    continue
                near, miss = bool(distance[y, x] <= width), bool(label[y, x] != prediction[y, x])
                errors, rim = errors + miss, rim + (miss and near)
                pixels, rim_pixels = pixels + 1, rim_pixels + near
        miss, near = prediction != label, distance <= width
        hints = [
            ((miss & near).sum() / miss.sum(), "Void pixels are counted as errors; they count nowhere."),
            ((miss & near & (label != 255)).sum() / miss.sum(), "Void pixels are out of the numerator but still in the total."),
            (rim / rim_pixels, "That is the error rate near borders; divide by all errors, not by the pixels near borders."),
            (rim / pixels, "You divide by the number of pixels; the question is what share of the errors it is."),
            ((miss & (distance < width) & (label != 255)).sum() / errors, "`width` itself is included: at most `width` px, so <=."),
            (1 - rim / errors, "That is the share of errors far from borders, the rest."),
        ]  # fmt: skip
        expect_close(actual, rim / errors, f"the share within {width} px", hints=hints)
    return "Void counts nowhere, and the shares are of the errors."
