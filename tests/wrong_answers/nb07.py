"""Planted wrong answers to the exercises of notebook 07, each with a part of the message that it must get."""

import torch
import torch.nn.functional as F


def parts(matrix):
    matrix = matrix.double()
    return matrix.diagonal(), matrix.sum(1), matrix.sum(0)


def forgets_the_absent(matrix):
    right, true, predicted = parts(matrix)
    return (right / (true + predicted - right)).mean()


def absent_as_zero(matrix):
    right, true, predicted = parts(matrix)
    return (right / (true + predicted - right)).nan_to_num(0).mean()


def only_true_classes(matrix):
    right, true, predicted = parts(matrix)
    return (right / (true + predicted - right))[true > 0].mean()


def recalls(matrix):
    right, true, _ = parts(matrix)
    return (right / true)[true > 0].mean()


def counted_twice(matrix):
    right, true, predicted = parts(matrix)
    return (right / (true + predicted)).nanmean()


def of_sums(matrix):
    right, true, predicted = parts(matrix)
    return right.sum() / (true + predicted - right).sum()


def dice(matrix):
    right, true, predicted = parts(matrix)
    return (2 * right / (true + predicted)).nanmean()


def dilate(x, width):
    return F.max_pool2d(x[None, None].float(), 2 * width + 1, stride=1, padding=width)[0, 0] > 0


def rates(found, true, width):
    return (found & dilate(true, width)).sum() / found.sum(), (true & dilate(found, width)).sum() / true.sum()


def arithmetic(found, true, width):
    return sum(rates(found, true, width)) / 2


def bands(found, true, width):
    a, b = dilate(found, width), dilate(true, width)
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def harmonic(p, r):
    return 2 * p * r / (p + r)


def half_window(found, true, width):
    def grow(x):
        return F.max_pool2d(x[None, None].float(), width, stride=1, padding=width // 2)[0, 0] > 0

    return harmonic((found & grow(true)).sum() / found.sum(), (true & grow(found)).sum() / true.sum())


def totals_exchanged(found, true, width):
    p, r = rates(found, true, width)
    return torch.nan_to_num(harmonic(p * found.sum() / true.sum(), r * true.sum() / found.sum()))


def sorted_alone(confidence, right, bins):
    mean = confidence.sort().values.view(bins, -1).mean(1)
    return (right.double().view(bins, -1).mean(1) - mean).abs().mean()


def gaps(confidence, right, bins):
    order = confidence.argsort()
    return right[order].double().view(bins, -1).mean(1) - confidence[order].view(bins, -1).mean(1)


def unsorted(confidence, right, bins):
    return (right.double().view(bins, -1).mean(1) - confidence.view(bins, -1).mean(1)).abs().mean()


def equal_widths(confidence, right, bins):
    place = (confidence * bins).long().clamp(max=bins - 1)
    return sum((right[place == i].double() - confidence[place == i]).sum().abs() for i in range(bins)) / len(right)


def every_so_many(confidence, right, bins):
    order = confidence.argsort()
    return (right[order].double().view(-1, bins).mean(0) - confidence[order].view(-1, bins).mean(0)).abs().mean()


def squares(log_q, label):
    known = label != 255
    truth = F.one_hot(label.where(known, 0), log_q.shape[1]).movedim(-1, 1)
    return ((log_q.exp() - truth) ** 2).sum(1), known


def of_logs(log_q, label):
    known = label != 255
    truth = F.one_hot(label.where(known, 0), log_q.shape[1]).movedim(-1, 1)
    return ((log_q - truth) ** 2).sum(1)[known].mean()


def true_class_only(log_q, label):
    known = label != 255
    q = log_q.exp().gather(1, label.where(known, 0)[:, None])[:, 0]
    return ((1 - q) ** 2)[known].mean()


def spoils_the_labels(log_q, label):
    known = label != 255
    label[~known] = 0
    return ((log_q.exp() - F.one_hot(label, log_q.shape[1]).movedim(-1, 1)) ** 2).sum(1)[known].mean()


def below(p, level):
    order = p.argsort()
    return order, p[order] <= level / torch.arange(len(p), 0, -1)


def goes_on(p, level):
    order, passed = below(p, level)
    result = torch.zeros(len(p), dtype=torch.bool)
    result[order] = passed
    return result


def in_sorted_order(p, level):
    _, passed = below(p, level)
    return passed.int().cumprod(0).bool()


def step_up(p, level):
    order, passed = below(p, level)
    result = torch.zeros(len(p), dtype=torch.bool)
    result[order] = passed.flip(0).int().cummax(0).values.flip(0).bool()
    return result


def false_discovery(p, level):
    order = p.argsort()
    passed = p[order] <= level * torch.arange(1, len(p) + 1) / len(p)
    result = torch.zeros(len(p), dtype=torch.bool)
    result[order] = passed.flip(0).int().cummax(0).values.flip(0).bool()
    return result


WRONG = {
    "07.1": [
        (forgets_the_absent, "The result is nan"),
        (absent_as_zero, "counts as 0"),
        (only_true_classes, "predicted but never true"),
        (recalls, "mean class accuracy"),
        (counted_twice, "right pixels twice"),
        (of_sums, "large classes decide"),
        (dice, "mean F1"),
        (lambda matrix: matrix.diagonal().sum() / matrix.sum(), "pixel accuracy"),
    ],
    "07.2": [
        (arithmetic, "arithmetic mean"),
        (lambda found, true, width: rates(found, true, width)[0], "precision alone"),
        (lambda found, true, width: rates(found, true, width)[1], "recall alone"),
        (bands, "compare the bands"),
        (lambda found, true, width: harmonic(*rates(found, true, width - 1)), "exactly `width` away"),
        (half_window, "2 * width + 1"),
        (totals_exchanged, "totals are exchanged"),
        (lambda found, true, width: harmonic(*rates(found, true, width)), "nothing matches"),
    ],
    "07.3": [
        (sorted_alone, "go along in the same order"),
        (equal_widths, "equal width"),
        (lambda c, r, bins: gaps(c, r, bins).mean().abs(), "cancel"),
        (lambda c, r, bins: gaps(c, r, bins).mean(), "absolute value is missing"),
        (lambda c, r, bins: gaps(c, r, bins).abs().max(), "largest gap"),
        (lambda c, r, bins: gaps(c, r, bins).abs().sum(), "sum over the groups"),
        (unsorted, "Nothing is sorted"),
        (every_so_many, "every bins-th pixel"),
        (lambda c, r, bins: gaps(c, r, bins).square().mean().sqrt(), "root of the mean square"),
        (lambda c, r, bins: (r.double() - c).abs().mean(), "pixel by pixel"),
    ],
    "07.4": [
        (of_logs, "take exp() first"),
        (true_class_only, "true class alone"),
        (lambda log_q, label: squares(log_q, label)[0].mean(), "the class that replaced void"),
        (lambda log_q, label: squares(log_q, label)[0][label != 255].mean() / 4, "average over the classes"),
        (lambda log_q, label: squares(log_q, label)[0][label != 255].sum() / label.numel(), "divide by all pixels"),
        (spoils_the_labels, "work on a copy"),
    ],
    "07.5": [
        (lambda p, level: p <= level, "no correction"),
        (lambda p, level: p <= level / len(p), "Bonferroni"),
        (goes_on, "go on after the first"),
        (step_up, "step-up"),
        (false_discovery, "Benjamini"),
        (in_sorted_order, "in sorted order"),
    ],
}  # fmt: skip
