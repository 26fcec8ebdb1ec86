"""Planted wrong answers to the exercises of notebook 00, each with a part of the message that it must get."""

import torch


def bgr(label, palette):
    return palette[torch.where(label == 255, len(palette) - 1, label)].flip(-1)


def paints_in_place(label, palette):
    label[label == 255] = len(palette) - 1
    return palette[label]


def one_direction(label, first, second):
    known = (first != 255) & (second != 255)
    return ((first == second) & known).sum(), known.sum()


def across(label):
    return one_direction(label, label[:, :-1], label[:, 1:])


def down(label):
    return one_direction(label, label[:-1], label[1:])


def counts_void(label):
    equal = (label[:, :-1] == label[:, 1:]).sum() + (label[:-1] == label[1:]).sum()
    return equal / (label[:, 1:].numel() + label[1:].numel())


def void_in_the_total(label):
    return (across(label)[0] + down(label)[0]) / (label[:, 1:].numel() + label[1:].numel())


def mean_of_shares(label):
    return (across(label)[0] / across(label)[1] + down(label)[0] / down(label)[1]) / 2


def void_as_a_class(label, *, mean_of_shares):
    pairs = [(label[:, :-1], label[:, 1:]), (label[:-1], label[1:])]
    shares = [(first == second).double().mean() for first, second in pairs if first.numel()]
    if mean_of_shares:
        return sum(shares) / 2
    return shares[0]


def masked_means(label):
    pairs = [(label[:, :-1], label[:, 1:]), (label[:-1], label[1:])]
    known = [(first == second) & (first != 255) for first, second in pairs]
    return (known[0].double().mean() + known[1].double().mean()) / 2


def rolls(label):
    pairs = [one_direction(label, label, label.roll(1, dim)) for dim in (0, 1)]
    return sum(p[0] for p in pairs) / sum(p[1] for p in pairs)


WRONG = {
    "00.1": [
        (lambda label, palette: palette[label], "255 is no row"),
        (lambda label, palette: palette[label.masked_fill(label == 255, 0)], "colour of class 0"),
        (lambda label, palette: palette[label.clamp(max=len(palette) - 2)], "colour of the last class"),
        (bgr, "Red and blue"),
        (paints_in_place, "changes the label"),
        (lambda label, palette: palette[label.clamp(max=len(palette) - 1)].permute(2, 0, 1), "colours last"),
        (lambda label, palette: palette[label.clamp(max=len(palette) - 1)] / 255, "The picture at index"),
        (lambda label, palette: palette[label.clamp(max=len(palette) - 1)].float(), "expected torch.uint8"),
    ],
    "00.2": [
        (lambda m: m.diagonal() / (m.sum(0) + m.sum(1) - m.diagonal()), "That is IoU"),
        (lambda m: m.diagonal() / (m.sum(0) + m.sum(1)), "forgot the 2"),
        (lambda m: m.diagonal() / m.sum(1), "That is recall"),
        (lambda m: m.diagonal() / m.sum(0), "That is precision"),
        (lambda m: 2 * m.diagonal() / (m.sum(0) + m.sum(1)).clamp(min=1), "nan, not 0"),
        (lambda m: (2 * m.diagonal() / (m.sum(0) + m.sum(1))).nanmean(), "You return the mean"),
        (lambda m: 2 * m.diagonal() / (m.sum(0) + m.sum(1) - m.diagonal()), "can exceed 1"),
    ],
    "00.3": [
        (lambda c: (c / c.sum(1, keepdim=True)).max(1).values.mean(), "empty cell gives 0/0"),
        (lambda c: (c / c.sum(1, keepdim=True).clamp(min=1)).max(1).values.mean(), "Every cell counts alike"),
        (lambda c: c.max(0).values.sum() / c.sum(), "the other dimension"),
        (lambda c: c.sum(0).max() / c.sum(), "same class in all cells"),
        (lambda c: 1 - c.max(1).values.sum() / c.sum(), "smallest possible *error*"),
        (lambda c: c.max(1).values.sum(), "number of pixels"),
        (lambda c: (c * (c / c.sum(1, keepdim=True).clamp(min=1))).sum() / c.sum(), "*draws* the class"),
    ],
    "00.4": [
        (lambda q: q.prod(0), "one number per class"),
        (lambda q: q.max(1).values.prod(), "most likely labelling"),
        (lambda q: q.sum(0).prod(), "Sum and product are exchanged"),
        (lambda q: q.prod(), "multiply everything"),
        (lambda q: q.prod(0).max(), "most likely class alone"),
        (lambda q: q.prod(0).mean(), "You average over the classes"),
        (lambda q: q.log().sum(0).logsumexp(0), "the logarithm of the probability"),
        (lambda q: q.prod(1).sum(), "multiply over classes"),
        (lambda q: 0.9 * q.prod(0).sum(), "expected 0.46"),
    ],
    "00.5": [
        (lambda label: across(label)[0] / across(label)[1], "side by side only"),
        (lambda label: down(label)[0] / down(label)[1], "one above the other only"),
        (counts_void, "two void pixels"),
        (void_in_the_total, "not out of the total"),
        (mean_of_shares, "average two shares"),
        (rolls, "wrap around"),
        (lambda label: void_as_a_class(label, mean_of_shares=True), "average two shares that count void"),
        (lambda label: void_as_a_class(label, mean_of_shares=False), "side by side only, and void as a class"),
        (masked_means, "average two shares, and void"),
        (lambda label: 1 - (across(label)[0] + down(label)[0]) / (across(label)[1] + down(label)[1]), "*disagree*"),
    ],
}
