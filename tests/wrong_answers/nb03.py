"""Planted wrong answers to the exercises of notebook 03, each with a part of the message that it must get."""

import math

import torch
import torch.nn.functional as F


def keys(features, scale, *, half=0.5, last=True, to_query=True, to_last=True, root=False, scores=1.0):
    ones = torch.ones_like(features[:, :1])
    own = ((scale if to_last else 1) * features.square()).sum(1, keepdim=True)
    query = (scale if to_query else 1) * features
    query = torch.cat([scale * query if root else query, ones], 1) / scores
    return query, torch.cat([features, -half * own if last else 0 * own], 1)


def mean(q, theta, *, form="row", exponent=None, axes="yx", turned=""):
    def side(length, name):
        place = torch.arange(length, dtype=q.dtype)
        gaussian = torch.exp(-(place[:, None] - place).square() / (exponent(theta) if exponent else 2 * theta**2))
        if name not in axes:
            return torch.eye(length)
        if form == "row":
            return gaussian / gaussian.sum(1, keepdim=True)
        if form == "column":
            return gaussian / gaussian.sum(0, keepdim=True)
        if form == "symmetric":
            return gaussian * (gaussian.sum(1)[:, None] * gaussian.sum(0)).rsqrt()
        return gaussian / gaussian.sum() if form == "total" else gaussian

    rows, columns = side(q.shape[1], "y"), side(q.shape[2], "x")
    rows, columns = rows.T if "y" in turned else rows, columns.T if "x" in turned else columns
    return torch.einsum("yh,khw,xw->kyx", rows, q, columns)


def solve(point, corners):
    ones = torch.ones(1, len(corners), dtype=corners.dtype)
    return torch.linalg.solve(torch.cat([corners.T, ones]), torch.cat([point, ones[0, :1]]))


def inverse_distances(point, corners):
    near = 1 / (corners - point).norm(dim=1)
    return near / near.sum()


def backward(grad, where, weight, neighbours, *, turn=True, lost=False, tap=0.5, wrap=False, gain=False, at_once=False):
    shares = (weight[..., None] * grad[:, None]).flatten(0, 1)
    table = torch.zeros(neighbours.shape[1], grad.shape[1])
    if lost:
        table[where.flatten()] += shares
    else:
        table.index_add_(0, where.flatten(), shares)
    start = table
    for beside in reversed(list(neighbours)) if turn else neighbours:
        source = start if at_once else table
        padded = F.pad(source, (0, 0, 0, 1))
        table = table + tap * (source[beside.clamp(max=len(table) - 1)] if wrap else padded[beside]).sum(1)
    return (weight[..., None] * table[where]).sum(1) / (1 + 2.0 ** (1 - where.shape[1]) if gain else 1)


def share(theta, radius, *, power=2, low=None, high=0, exponent=None, whole=True):
    exponent = 2 * theta**2 if exponent is None else exponent(theta)
    far = math.ceil(10 * theta)

    def axis(first, last):
        place = torch.arange(first, last + 1, dtype=torch.float64)
        return torch.exp(-place.square() / exponent).sum().item()

    everything = axis(-far if low is None else 0, far) if whole else 1
    return (axis(-radius if low is None else low, radius + high) / everything) ** power


def planted(function, **options):
    return lambda *arguments: function(*arguments, **options)


WRONG = {
    "03.1": [
        (planted(keys, half=1.0), "half is missing"),
        (planted(keys, half=-0.5), "sign of the key's last entry"),
        (planted(keys, last=False), "do not carry their own length"),
        (planted(keys, to_query=False, to_last=False), "precisions s_c are missing"),
        (planted(keys, to_query=False), "The product has no s_c"),
        (planted(keys, root=True), "on both sides"),
        (lambda f, s: keys(f, s, scores=math.sqrt(f.shape[1])), "divided by sqrt(D)"),
        (lambda f, s: keys(f * s, torch.ones_like(s)), "multiplied by s_c"),
        (lambda f, s: keys(f, s)[0], "Return two tensors"),
    ],
    "03.2": [
        (planted(mean, form="none"), "not normalised"),
        (planted(mean, form="symmetric"), "symmetric normalisation"),
        (planted(mean, form="column"), "columns are divided"),
        (planted(mean, turned="x"), "transpose is missing"),
        (planted(mean, turned="y"), "transposed"),
        (planted(mean, form="total"), "One sum over the whole matrix"),
        (planted(mean, exponent=lambda t: t**2), "2 in the exponent"),
        (planted(mean, exponent=lambda t: 2 * t), "not squared"),
        (planted(mean, exponent=lambda t: 4 * t**2), "2 is squared"),
        (planted(mean, axes="y"), "Only the columns"),
        (planted(mean, axes="x"), "Only the rows"),
        (lambda q, t: mean(q, t).movedim(0, -1), "[K, H, W]"),
    ],
    "03.3": [
        (inverse_distances, "inverse distances"),
        (lambda p, c: torch.softmax(-(c - p).square().sum(1) / 2, 0), "Gaussian weights"),
        (lambda p, c: solve(p, c).flip(0), "reverse order"),
        (lambda p, c: torch.linalg.lstsq(c.T, p[:, None]).solution[:, 0], "row of ones"),
        (lambda p, c: torch.linalg.solve((c[1:] - c[0]).T, p - c[0]), "corner 0 is missing"),
        (lambda p, c: (c - p).norm(dim=1), "do not sum to 1"),
    ],
    "03.4": [
        (planted(backward, turn=False), "Transposing a product reverses it"),
        (planted(backward, lost=True), "keeps only the last"),
        (planted(backward, tap=0), "blurs are missing"),
        (planted(backward, tap=1), "sends all of it"),
        (planted(backward, wrap=True), "there is no neighbour"),
        (planted(backward, gain=True), "includes the gain"),
        (planted(backward, at_once=True), "all of them read the splat"),
    ],
    "03.5": [
        (planted(share, power=1), "along one axis"),
        (planted(share, high=-1), "last row and column"),
        (planted(share, low=0), "Only distances from 0 up"),
        (planted(share, exponent=lambda t: t**2), "2 in the exponent"),
        (planted(share, exponent=lambda t: 4 * t**2), "2 is squared"),
        (planted(share, whole=False), "window's sum"),
        (lambda t, r: 100 * share(t, r), "percent"),
        (lambda t, r: math.erf(r / t / math.sqrt(2)) ** 2, "integral"),
        (lambda t, r: math.erf((r + 0.5) / t / math.sqrt(2)) ** 2, "window's area"),
    ],
}
