"""Planted wrong answers to the exercises of notebook 04, each with a part of the message that it must get."""

import torch


def differences(f, x, eps, *, low=1, high=1, width=2, keep=False, spoil=False):
    copy, gradient = x if spoil else x.clone(), torch.zeros_like(x)
    flat = copy.view(-1)
    for i in range(x.numel()):
        middle = flat[i].item()
        flat[i] = middle + high * eps
        above = float(f(copy))
        flat[i] = middle - low * eps
        below = float(f(copy))
        flat[i] = middle + (eps if keep else 0)
        gradient.view(-1)[i] = (above - below) / (width * eps)
    return gradient


def everything_at_once(f, x, eps):
    return torch.full_like(x, float(f(x + eps) - f(x - eps)) / (2 * eps))


def by_autograd(f, x, eps):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def names_where(module, loss, unreached):
    free = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True, retain_graph=True)
    found = dict.fromkeys(n for n, _ in module.named_parameters())
    found |= dict(zip(free, gradients, strict=True))
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    return [n for n, g in found.items() if unreached(g, n in frozen)]


def by_backward(module, loss):
    loss.backward()
    return [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def form(mu, log_w, *, rows=False, scaled=True, everywhere=False, absolute=True, move=1, product=False):
    mu = mu - (mu.diag()[:, None] if rows else mu.diag()[None, :])
    entries = mu.abs() if absolute else mu
    scale = entries.sum() / (mu.numel() - (0 if everywhere else len(mu)))
    if not scaled:
        return mu, log_w
    return mu / scale, log_w * scale if product else log_w + move * scale.log()


def diagonal_overwritten(mu, log_w):
    mu = mu - torch.diag(mu.diag())
    scale = mu.abs().sum() / (mu.numel() - len(mu))
    return mu / scale, log_w + scale.log()


def planted(function, **options):
    return lambda *arguments: function(*arguments, **options)


WRONG = {
    "04.1": [
        (lambda q, g: q * (g - (q * g).sum(1, keepdim=True)), "sign is wrong"),
        (lambda q, g: -q * (1 - q) * g, "diagonal of the Jacobian"),
        (lambda q, g: -q * g, "other labels are missing"),
        (lambda q, g: -(g - (q * g).sum(1, keepdim=True)), "factor q"),
        (lambda q, g: -q * (g - (q * g).sum(0, keepdim=True)), "over pixels"),
        (lambda q, g: -q * (g - g.mean(1, keepdim=True)), "under q"),
    ],
    "04.2": [
        (planted(differences, low=0, width=1), "forward difference"),
        (planted(differences, high=0, width=1), "backward difference"),
        (planted(differences, width=1), "twice too large"),
        (planted(differences, high=-1, low=-1), "sign is wrong"),
        (planted(differences, spoil=True, keep=True), "x was changed"),
        (everything_at_once, "All entries moved at once"),
        (by_autograd, "must not use what it checks"),
    ],
    "04.3": [
        (lambda m, loss: names_where(m, loss, lambda g, frozen: g is None), "zero everywhere"),
        (lambda m, loss: names_where(m, loss, lambda g, frozen: frozen), "no gradient at all"),
        (lambda m, loss: names_where(m, loss, lambda g, frozen: g is None or (g == 0).any()), "one of its entries"),
        (lambda m, loss: names_where(m, loss, lambda g, frozen: g is not None and g.any()), "other way round"),
        (
            lambda m, loss: names_where(m, loss, lambda g, frozen: not frozen and (g is None or not g.any())),
            "requires_grad=False",
        ),
        (by_backward, ".grad of the module was changed"),
    ],
    "04.4": [
        (planted(form, rows=True), "taken from rows"),
        (planted(form, scaled=False), "not scaled yet"),
        (planted(form, everywhere=True), "over all K²"),
        (planted(form, absolute=False), "absolute values"),
        (planted(form, move=0), "log_w is unchanged"),
        (planted(form, move=-1), "wrong way"),
        (planted(form, product=True), "summand"),
        (lambda mu, log_w: (mu / mu.abs().mean(), log_w), "diagonal of mu is not zero"),
        (diagonal_overwritten, "diagonal was set to zero"),
    ],
}
