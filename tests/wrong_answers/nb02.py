"""Planted wrong answers to the exercises of notebook 02, each with a part of the message that it must get."""

import torch
import torch.nn.functional as F


def energy(labels, unary, edges, weights, mu, *, sign=1, times=1, swap=False, weighted=True, potts=False, alone=True):
    first, second = labels[edges[:, 0]], labels[edges[:, 1]]
    cost = (first != second).float() if potts else mu[second, first] if swap else mu[first, second]
    own = unary[torch.arange(len(labels)), labels].sum()
    return alone * own + sign * times * ((weights if weighted else 1) * cost).sum()


def best_answer(
    i,
    q,
    unary,
    edges,
    w,
    mu,
    *,
    minus=-1,
    own=1,
    itself=0,
    ends=(0, 1),
    anchored=False,
    use_mu=True,
    mean=False,
    hard=False,
):
    neighbours = [q[e[1 - side]] for e in edges.tolist() for side in ends if e[side] == i]
    if hard:
        neighbours = [F.one_hot(other.argmax(), len(other)).to(q) for other in neighbours]
    received = sum(neighbours) / (len(neighbours) if mean else 1) + itself * q[i]
    cost = w * (mu @ received if use_mu else received)
    start = q[i].log() if anchored else -unary[i] * own
    return torch.softmax(start + minus * cost, 0)


def calm(unary, coupling, mu, iterations, step, *, sign=-1, anchored=False, start=None, swap=False, history=False):
    q = torch.softmax(-unary, 1) if start is None else torch.full_like(unary, start / unary.shape[1])
    every = [q]
    for _ in range(iterations):
        new = torch.softmax((q.log() if anchored else -unary) + sign * coupling @ q @ mu.T, 1)
        q = step * q + (1 - step) * new if swap else (1 - step) * q + step * new
        every.append(q)
    return torch.stack(every) if history else q


def calm_logarithms(unary, coupling, mu, iterations, step):
    """Damping of log q: a geometric mean of old and new beliefs."""
    q = torch.softmax(-unary, 1)
    for _ in range(iterations):
        new = torch.log_softmax(-unary - coupling @ q @ mu.T, 1)
        q = torch.softmax((1 - step) * q.log() + step * new, 1)
    return q


def kernel(image, theta_alpha, theta_beta, *, scale=255, half=2, root=False, scrambled=False, colour=1, diagonal=True):
    _, height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    p = torch.stack([x, y], -1).reshape(-1, 2).float() / theta_alpha
    c = scale * (image.reshape(-1, 3) if scrambled else image.flatten(1).T) / theta_beta
    d = (p[:, None] - p).square().sum(-1) + colour * (c[:, None] - c).square().sum(-1)
    k = torch.exp(-(d.sqrt() if root else d) / half)
    return k if diagonal else k - torch.eye(len(k))


def column_major(image, theta_alpha, theta_beta):
    return kernel(image.transpose(1, 2), theta_alpha, theta_beta)


def messages(
    kernel, q, normalization, self_message, *, late=False, columns=False, root=True, ignore=False, all_q=False
):
    if late and not self_message:
        kernel = kernel - torch.diag(kernel.diag())
    n = kernel.sum(1)
    if normalization == "row":
        kernel = kernel / (n if columns else n[:, None])
    elif normalization == "symmetric":
        product = n[:, None] * n
        kernel = kernel / (product.sqrt() if root else product)
    if all_q and not self_message:
        return kernel @ q - q
    if not self_message and not ignore:
        kernel = kernel - torch.diag(kernel.diag())
    return kernel @ q


def planted(function, **options):
    return lambda *arguments: function(*arguments, **options)


RIGHT = {"A": "double softmax", "B": "normalised colours", "C": "healthy", "D": "wrong sign"}

WRONG = {
    "02.1": [
        (planted(energy, sign=-1), "wrong sign"),
        (planted(energy, times=2), "counted twice"),
        (planted(energy, times=0.5), "halved"),
        (planted(energy, swap=True), "wrong way round"),
        (planted(energy, weighted=False), "weights of the pairs are missing"),
        (planted(energy, potts=True), "That is Potts"),
        (planted(energy, alone=False), "unary energies are missing"),
        (lambda *a: (-energy(*a)).exp(), "exp(-E)"),
    ],
    "02.2": [
        (planted(best_answer, minus=1), "sign of the pairwise cost"),
        (planted(best_answer, own=0), "unary of the pixel is missing"),
        (planted(best_answer, itself=1), "own q is in the sum"),
        (planted(best_answer, ends=(0,)), "first end"),
        (planted(best_answer, anchored=True), "old q is used"),
        (planted(best_answer, mean=True), "mean of the neighbours"),
        (planted(best_answer, hard=True), "most likely label"),
        (planted(best_answer, use_mu=False), "mu is missing"),
    ],
    "02.3": [
        (lambda u, c, m, t, step: calm(u, c, m, t, 1.0), "no damping"),
        (planted(calm, swap=True), "parts are swapped"),
        (planted(calm, sign=1), "sign"),
        (planted(calm, anchored=True), "enters every iteration"),
        (planted(calm, start=1.0), "start is uniform"),
        (planted(calm, history=True), "not its history"),
        (calm_logarithms, "logarithms"),
    ],
    "02.4": [
        (planted(kernel, scale=1), "grey levels from 0 to 255"),
        (planted(kernel, half=1), "half in the exponent"),
        (planted(kernel, half=4), "2 is squared"),
        (planted(kernel, root=True), "not squared"),
        (planted(kernel, scrambled=True), "scrambled"),
        (planted(kernel, colour=0), "colours are missing"),
        (planted(kernel, diagonal=False), "diagonal is 0"),
        (column_major, "column by column"),
    ],
    "02.5": [
        (planted(messages, late=True), "after the diagonal was taken out"),
        (planted(messages, columns=True), "columns are divided"),
        (planted(messages, root=False), "square root is missing"),
        (planted(messages, ignore=True), "should not be"),
        (planted(messages, all_q=True), "weight k_ii / n_i"),
        (lambda k, q, name, own: messages(k, q, "row", own), "what 'row' should give"),
    ],
    "02.6": [
        (RIGHT | {"A": "wrong sign"}, "Run A has the right sign"),
        (RIGHT | {"D": "healthy"}, "Look at run D again"),
        (RIGHT | {"A": "healthy"}, "Look at the unary of run A"),
        (RIGHT | {"B": "healthy"}, "Run B is not healthy"),
        (RIGHT | {"C": "normalised colours"}, "Run C uses the colours"),
        (RIGHT | {"C": "double softmax"}, "Run C has a healthy unary"),
        (RIGHT | {"C": "noisy unary"}, "is called 'noisy unary'"),
    ],
}
