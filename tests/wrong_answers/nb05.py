"""Planted wrong answers to the exercises of notebook 05, each with a part of the message that it must get."""

import itertools

import torch
from torch import nn


def no_gradients_only(network):
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def modes_of_norms_only(network):
    no_gradients_only(network)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return network


def only_the_outer_layers(network):
    for part in network:
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(False)
    return network.eval()


def forgets_return(network):
    no_gradients_only(network).eval()


def resets(network):
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return no_gradients_only(network).eval()


def quantiles(values, tail):
    return torch.quantile(values, tail), torch.quantile(values, 1 - tail)


def normal(differences, level, *, z=None):
    """mean +- z standard errors."""
    tail = torch.tensor((1 - level) / 2, dtype=torch.float64)
    z = -torch.special.ndtri(tail) if z is None else z
    half = z * differences.std() / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def flips(differences):
    d = torch.as_tensor(differences, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=len(d))), dtype=torch.float64)
    return (signs * d).mean(1), d.mean()


def one_sided(differences):
    means, observed = flips(differences)
    return (means >= observed - 1e-12).double().mean()


def strict(differences):
    means, observed = flips(differences)
    return (means.abs() > observed.abs() + 1e-12).double().mean()


def nearer(differences):
    means, observed = flips(differences)
    return (means.abs() < observed.abs() - 1e-12).double().mean()


def count(differences):
    means, observed = flips(differences)
    return (means.abs() >= observed.abs() - 1e-12).sum()


def column(weights):
    return weights.view(-1, 1, 1)


WRONG = {
    "05.1": [
        (no_gradients_only, "running statistics"),
        (lambda network: network.eval(), "still require a gradient"),
        (modes_of_norms_only, "dropout is still on"),
        (only_the_outer_layers, "4 of 8"),
        (lambda network: no_gradients_only(network.eval()).state_dict(), "return the network"),
        (resets, "Freezing itself"),
        (forgets_return, "returns None"),
    ],
    "05.2": [
        (lambda logits, weights: logits + column(weights).log(), "weight once more"),
        (lambda logits, weights: logits - column(weights), "subtract w itself"),
        (lambda logits, weights: logits / column(weights), "divide the logits"),
        (lambda logits, weights: torch.softmax(logits, 1) / column(weights), "before the logarithm"),
        (lambda logits, weights: logits - weights.log(), "with RuntimeError"),
    ],
    "05.3": [
        (lambda d, picks, level: quantiles(d[picks].mean(1), 1 - level), "either side"),
        (lambda d, picks, level: quantiles(d, (1 - level) / 2), "differences themselves"),
        (lambda d, picks, level: quantiles(d[picks].mean(0), (1 - level) / 2), "dim=1"),
        (lambda d, picks, level: quantiles(d[picks].mean(1), (1 - level) / 2)[::-1], "exchanged"),
        (lambda d, picks, level: d[picks].mean(), "two numbers"),
        (lambda d, picks, level: normal(d, level), "symmetric about the mean"),
    ],
    "05.4": [
        (one_sided, "one side only"),
        (strict, "one of the 2^n ways"),
        (nearer, "nearer to 0"),
        (count, "a count"),
    ],
    "05.5": [
        (lambda table: table.diagonal() - table.mean(1), "divide by S - 1"),
        (lambda table: table.diagonal() - (table.sum(0) - table.diagonal()) / (len(table) - 1), "down the columns"),
        (lambda table: (table.sum(1) - table.diagonal()) / (len(table) - 1) - table.diagonal(), "turned round"),
        (lambda table: table.diagonal() - (table.sum(1) - table.diagonal()) / len(table), "still divide by S"),
    ],
}
