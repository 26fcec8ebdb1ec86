"""Checks of notebook 08: a CRF at another size, labels from colours, an adapter for a network, a benchmark's mIoU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pwlib.course.checks import WrongAnswer, exercise, expect, expect_close, expect_shape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@exercise("08.1", title="The same CRF at another size", minutes=5, difficulty=1)
def at_size(answer):
    given = {"theta_alpha": 80.0, "theta_beta": 13.0, "theta_gamma": 3.0, "w_bilateral": 10.0, "w_spatial": 4.0}
    for factor in (0.5, 3.0):
        argument = dict(given)
        result = answer(argument, factor)
        expect(argument == given, "The dictionary you were given was changed; return a new one.")
        expect(isinstance(result, dict), "Return a dictionary like the one given.")
        missing = [name for name in given if name not in result]
        expect(not missing, f"{', '.join(missing)} is missing from the result.")
        ratio = {name: float(result[name]) / given[name] for name in given}
        near = {name: abs(ratio[name] - factor) < 1e-6 for name in ratio}
        same = {name: abs(ratio[name] - 1) < 1e-6 for name in ratio}
        expect(not all(near.values()), "Everything was scaled; only what is measured in pixels changes with the size.")
        expect(not all(same.values()), "Nothing was scaled: theta_alpha and theta_gamma are measured in pixels.")
        expect(
            same["theta_beta"],
            "theta_beta was changed: its unit is grey levels, and a smaller image has the same colours.",
        )
        for name in ("w_bilateral", "w_spatial"):
            expect(
                same[name],
                f"{name} was changed: a normalised message is a mean, so its weight does not depend on the number of pixels.",
            )
        for name in ("theta_alpha", "theta_gamma"):
            expect(
                not abs(ratio[name] * factor - 1) < 1e-6,
                f"{name} was divided by the factor: an image of half the size needs half the bandwidth.",
            )
            expect(
                not abs(ratio[name] - factor**2) < 1e-6,
                f"{name} grew with the area; it is a length, so it grows with the side.",
            )
            expect(not same[name], f"{name} was left as it is: it is measured in pixels as well.")
            expect(
                near[name], f"{name} is {result[name]:g} for a factor of {factor}; expected {given[name] * factor:g}."
            )
    return "Lengths scale; colours and the weights of normalised messages do not."


@exercise("08.2", title="From colours to class numbers", minutes=15, difficulty=2)
def to_classes(answer):
    # Colours that share channels, so that a match in one channel is not a match; void is not black here.
    palette = torch.tensor([[0, 0, 0], [0, 0, 128], [128, 0, 0], [128, 0, 128], [64, 64, 64]], dtype=torch.uint8)
    for height, width in ((4, 6), (5, 3)):
        index = torch.randint(5, (height, width))
        index.view(-1)[:5] = torch.arange(5)
        wanted = index.where(index < 4, 255)
        colours = palette[index]
        any_channel = (colours[:, :, None] == palette).any(-1).long().argmax(-1)
        swapped = (colours.flip(-1)[:, :, None] == palette).all(-1).long().argmax(-1)
        hints = [
            (index, "Void came out as class 4: the palette's last row means 255."),
            (index.where(index < 4, 0), "Void came out as class 0; it is 255, so that no loss or score counts it."),
            (index.where(index < 4, -1), "Void came out as -1; this library's void is 255."),
            (
                any_channel.where(any_channel < 4, 255),
                "A pixel got a class that shares one channel with it; all three channels have to agree.",
            ),
            (swapped.where(swapped < 4, 255), "Red and blue are swapped: the colours are RGB (OpenCV reads BGR)."),
            (wanted.T, "The result is transposed: [W, H]; expected [H, W]."),
            (
                (wanted + 1).where(wanted < 4, 255),
                "The classes are counted from 1; row 0 of the palette is class 0.",
            ),
        ]
        result = answer(colours.clone(), palette.clone())
        expect_close(result, wanted, "the label map", hints=hints)
    broken = colours.clone()
    broken[0, 0] = torch.tensor([0, 0, 127], dtype=torch.uint8)
    try:
        result = answer(broken, palette.clone())
    except ValueError:
        return "And a colour that is not in the palette raises a ValueError."
    value = int(torch.as_tensor(result)[0, 0])
    if value == 255:
        raise WrongAnswer("A colour that is not in the palette became void in silence; raise a ValueError.")
    raise WrongAnswer(f"A colour that is not in the palette (0, 0, 127) became class {value}; raise a ValueError.")


class _Network(torch.nn.Module):
    """Logits at 1/8 of the size, sensitive to the scale of its input."""

    def __init__(self, classes: int):
        super().__init__()
        self.weight = torch.randn(classes, 3, 8, 8)

    def forward(self, image):
        pad = [-image.shape[-1] % 8, -image.shape[-2] % 8]
        image = F.pad(image, (0, pad[0], 0, pad[1]), mode="replicate")
        out = F.conv2d(image, self.weight / 14, stride=8)
        return {"out": out, "aux": -out}


@exercise("08.3", title="An adapter of your own", minutes=10, difficulty=2)
def adapted(answer):
    network = _Network(4)
    for batch, height, width in ((1, 40, 48), (2, 45, 61)):
        image = torch.rand(batch, 3, height, width)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

        def resized(logits, size=(height, width), **options):
            return F.interpolate(logits, size=size, **({"mode": "bilinear", "align_corners": False} | options))

        proper = network((image - mean) / std)
        out = proper["out"]
        wanted = resized(out)
        eightfold = F.interpolate(out, scale_factor=8, mode="bilinear", align_corners=False)
        hints = [
            (resized(network(image)["out"]), "The pixels were not normalised: subtract MEAN and divide by STD."),
            (
                resized(network((255 * image - mean) / std)["out"]),
                "MEAN and STD are for pixels in [0, 1]; your pixels are in 0-255.",
            ),
            (resized(network(image - mean)["out"]), "MEAN was subtracted, but nothing was divided by STD."),
            (resized(network(image / std - mean)["out"]), "The order is: subtract MEAN, then divide by STD."),
            (resized(proper["aux"]), "That is the auxiliary head; the logits are under 'out'."),
            (
                resized(out, align_corners=True),
                "align_corners=True stretches the map so that its outer cells' centres sit on the image's corners: the "
                "logits no longer lie over their pixels.",
            ),
            (
                resized(out, mode="nearest", align_corners=None),
                "The logits were resized to their nearest cell: blocks of 8x8; use bilinear.",
            ),
            (torch.softmax(wanted, 1), "Those are probabilities; return the logits."),
            (torch.log_softmax(wanted, 1), "Those are log-probabilities; return the logits as the network gave them."),
            (wanted.argmax(1), "Those are labels; return the logits."),
            (out, f"The logits are still at the coarse size {list(out.shape[-2:])}."),
            (
                lambda a, e=eightfold, w=wanted: a.shape == e.shape != w.shape,
                f"The logits were enlarged by a factor of 8 to {list(eightfold.shape[-2:])}; resize to the image's size "
                f"{[height, width]}, which need not be a multiple of 8.",
            ),
        ]
        result = answer(network, image.clone())
        if isinstance(result, dict):
            raise WrongAnswer("Return the tensor under 'out', resized, not the dictionary.")
        expect_close(result, wanted, "the logits", hints=hints)
    return "Any network that returns logits can now be the unary network."


@exercise("08.4", title="The benchmark's mIoU", minutes=15, difficulty=2)
def benchmark_miou(answer):
    classes = 5
    for sizes in (((6, 8), (3, 4)), ((5, 5), (9, 7), (2, 3))):
        pairs = []
        for height, width in sizes:
            label = torch.randint(3, (height, width))  # classes 3 and 4 are in no label,
            prediction = label.where(torch.rand(height, width) < 0.7, torch.randint(4, (height, width)))
            prediction[0, 0], label[0, 0] = 3, 0  # but 3 is predicted
            label[-1] = 255
            prediction[-1] = 1
            prediction[-1, 0] = 4  # on void only, so that 4 is left out of the mean
            pairs.append((prediction, label))

        def counts(prediction, label, void=False):
            known = torch.ones_like(label, dtype=torch.bool) if void else label != 255
            both = torch.stack([((prediction == c) & (label == c) & known).sum() for c in range(classes)]).double()
            either = torch.stack([(((prediction == c) | (label == c)) & known).sum() for c in range(classes)]).double()
            truth = torch.stack([((label == c) & known).sum() for c in range(classes)]).double()
            return both, either, truth

        def total(void=False, pairs=pairs):
            return [sum(part) for part in zip(*(counts(p, t, void) for p, t in pairs), strict=True)]

        def mean(both, either, keep=None):
            keep = either > 0 if keep is None else keep
            return (both[keep] / either[keep].clamp(min=1)).mean()

        both, either, truth = total()
        wanted = mean(both, either)
        union = either - both
        hints = [
            (
                torch.stack([mean(*counts(p, t)[:2]) for p, t in pairs]).mean(),
                "That is a mean over images; the benchmark adds up intersections and unions over all of them first.",
            ),
            (mean(*total(void=True)[:2]), "Void pixels were counted; where the label is 255 nothing counts."),
            (
                mean(both, either, torch.ones(classes, dtype=torch.bool)),
                "A class that occurs nowhere was counted with an IoU of 0; leave it out of the mean.",
            ),
            (
                mean(both, either, truth > 0),
                "A class that was predicted but is in no label was left out; its union is not empty, so its IoU is 0.",
            ),
            (both.sum() / truth.sum(), "That is pixel accuracy."),
            (
                (both[truth > 0] / truth[truth > 0]).mean(),
                "That is mean class accuracy: the union also contains the false positives.",
            ),
            (both.sum() / either.sum(), "Classes were added up as well; the mean is over the classes' IoUs."),
            (
                (2 * both[either > 0] / (either + both)[either > 0]).mean(),
                "That is the Dice score; IoU divides the intersection by the union.",
            ),
            (
                (both / union.clamp(min=1))[either > 0].mean(),
                "The intersection is missing from the union: union = prediction + truth - intersection.",
            ),
            (100 * wanted, "That is in percent; return a number between 0 and 1."),
        ]
        result = answer([(p.clone(), t.clone()) for p, t in pairs], classes)
        expect_shape(result, (), "the mean IoU")
        expect_close(result, wanted, "the mean IoU", hints=hints)
    return "This is the number that papers print."
