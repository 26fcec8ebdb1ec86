"""Planted wrong answers to the exercises of notebook 08, each with a part of the message that it must get."""

import torch
import torch.nn.functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def scaled(parameters, factor, *, names=("theta_alpha", "theta_gamma"), power=1):
    return {name: value * factor**power if name in names else value for name, value in parameters.items()}


def in_place(parameters, factor):
    parameters["theta_alpha"] *= factor
    parameters["theta_gamma"] *= factor
    return parameters


def classes(colours, palette, *, void=255, every=True, flip=False, check=True, nearest=False):
    if flip:
        colours = colours.flip(-1)
    equal = colours[:, :, None] == palette
    hit = equal.all(-1) if every else equal.any(-1)
    if check and not hit.any(-1).all():
        raise ValueError("a colour is not in the palette")
    number = hit.long().argmax(-1)
    if nearest:
        number = (colours[:, :, None].float() - palette.float()).square().sum(-1).argmin(-1)
    last = len(palette) - 1
    return number.where(number < last, last if void is None else void)


def unknown_is_void(colours, palette):
    known = (colours[:, :, None] == palette).all(-1).any(-1)
    return classes(colours, palette, check=False).where(known, 255)


def adapt(network, image, *, pixels=lambda x: (x - MEAN) / STD, head="out", after=lambda x: x, **options):
    logits = network(pixels(image))[head]
    if "scale_factor" in options:
        return F.interpolate(logits, mode="bilinear", align_corners=False, **options)
    options = {"mode": "bilinear", "align_corners": False} | options
    return after(F.interpolate(logits, size=image.shape[-2:], **options))


def tables(pairs, count, *, void=False):
    both, either, truth = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    for prediction, label in pairs:
        for c in range(count):
            known = (label != 255) | void
            p, t = (prediction == c) & known, (label == c) & known
            both[c], either[c], truth[c] = both[c] + (p & t).sum(), either[c] + (p | t).sum(), truth[c] + t.sum()
    return both, either, truth


def miou(pairs, count, *, void=False, keep=lambda either, truth: either > 0):
    both, either, truth = tables(pairs, count, void=void)
    kept = keep(either, truth)
    return float((both[kept] / either[kept].clamp(min=1)).mean())


def accuracy(pairs, count):
    both, _, truth = tables(pairs, count)
    return float(both.sum() / truth.sum())


def class_accuracy(pairs, count):
    both, _, truth = tables(pairs, count)
    return float((both[truth > 0] / truth[truth > 0]).mean())


def dice(pairs, count):
    both, either, _ = tables(pairs, count)
    return float((2 * both / (either + both))[either > 0].mean())


def planted(function, **options):
    return lambda *arguments: function(*arguments, **options)


EVERYTHING = ("theta_alpha", "theta_beta", "theta_gamma", "w_bilateral", "w_spatial")

WRONG = {
    "08.1": [
        (planted(scaled, names=EVERYTHING), "Everything was scaled"),
        (planted(scaled, names=EVERYTHING[:3]), "theta_beta was changed"),
        (planted(scaled, power=-1), "divided by the factor"),
        (planted(scaled, power=2), "with the area"),
        (planted(scaled, names=("theta_alpha",)), "theta_gamma was left"),
        (planted(scaled, names=("theta_alpha", "theta_gamma", "w_bilateral")), "w_bilateral was changed"),
        (lambda parameters, factor: dict(parameters), "Nothing was scaled"),
        (in_place, "was changed; return a new one"),
    ],
    "08.2": [
        (planted(classes, void=None), "Void came out as class 4"),
        (planted(classes, void=0), "Void came out as class 0"),
        (planted(classes, every=False), "shares one channel"),
        (planted(classes, flip=True), "Red and blue"),
        (planted(classes, check=False), "(0, 0, 127) became class 0"),
        (planted(classes, nearest=True, check=False), "(0, 0, 127) became class 1"),
        (unknown_is_void, "void in silence"),
        (lambda colours, palette: classes(colours, palette).T, "transposed"),
    ],
    "08.3": [
        (planted(adapt, pixels=lambda x: x), "not normalised"),
        (planted(adapt, pixels=lambda x: (255 * x - MEAN) / STD), "0-255"),
        (planted(adapt, pixels=lambda x: x - MEAN), "nothing was divided"),
        (planted(adapt, head="aux"), "auxiliary head"),
        (planted(adapt, align_corners=True), "stretches the map"),
        (planted(adapt, mode="nearest", align_corners=None), "nearest cell"),
        (planted(adapt, scale_factor=8), "factor of 8"),
        (planted(adapt, after=lambda x: torch.softmax(x, 1)), "Those are probabilities"),
        (lambda network, image: network((image - MEAN) / STD), "not the dictionary"),
    ],
    "08.4": [
        (lambda pairs, k: sum(miou([pair], k) for pair in pairs) / len(pairs), "mean over images"),
        (planted(miou, void=True), "Void pixels were counted"),
        (planted(miou, keep=lambda either, truth: either >= 0), "occurs nowhere"),
        (planted(miou, keep=lambda either, truth: truth > 0), "is in no label"),
        (accuracy, "pixel accuracy"),
        (class_accuracy, "mean class accuracy"),
        (dice, "Dice score"),
        (lambda pairs, k: 100 * miou(pairs, k), "percent"),
    ],
}
