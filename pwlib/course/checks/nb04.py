"""Checks of notebook 04: gradient of a softmax, finite differences, parameters without gradient, scale of mu and w."""

from __future__ import annotations

import torch
from torch import nn

from pwlib.course.checks import exercise, expect, expect_close


@exercise("04.1", title="Backwards through the softmax", minutes=10, difficulty=2)
def energy_gradient(answer):
    for pixels, labels in ((5, 3), (4, 4), (7, 2)):
        energy = torch.randn(pixels, labels, requires_grad=True)
        q, grad = torch.softmax(-energy, 1), torch.randn(pixels, labels)
        (wanted,) = torch.autograd.grad(q, energy, grad)
        q = q.detach()
        mean = (q * grad).sum(1, keepdim=True)
        hints = [
            (-wanted, "The sign is wrong: q is the softmax of *minus* e."),
            (-q * (1 - q) * grad, "Only the diagonal of the Jacobian is there: a label's energy moves all labels' q."),
            (-q * grad, "The other labels are missing: subtract the mean of grad under q."),
            (-(grad - mean), "The factor q in front is missing."),
            (-q * (grad - grad.mean(1, keepdim=True)), "The mean of grad is to be taken under q, not uniformly."),
            (-q * (grad - grad.sum(1, keepdim=True)), "The sum over labels lacks its weights q."),
            (-q * (grad - (q * grad).sum(0, keepdim=True)), "The sum runs over pixels; it should run over labels."),
            (-q * (grad - (q * grad).sum()), "The sum runs over everything; each pixel has its own, over labels."),
        ]
        expect_close(answer(q.clone(), grad.clone()), wanted, "dL/de", hints=hints)
    return "Your gradient equals autograd's."


@exercise("04.2", title="Finite differences", minutes=10, difficulty=1)
def numerical_gradient(answer):
    for shape, eps in (((3,), 0.1), ((2, 2), 0.25)):
        x = torch.rand(*shape, dtype=torch.float64) + 0.5
        factor = torch.rand(*shape, dtype=torch.float64) + 0.5
        kept = x.clone()

        def cubic(t, factor=factor):
            return (factor * t**3).sum()

        result = answer(cubic, x, eps)
        expect(torch.equal(x, kept), "x was changed: work on a copy, and put every entry back.")
        x = kept
        central = factor * (3 * x**2 + eps**2)
        forward = factor * (3 * x**2 + 3 * x * eps + eps**2)
        backward = factor * (3 * x**2 - 3 * x * eps + eps**2)

        hints = [
            (forward, "That is the forward difference; the central one also looks at x - eps."),
            (backward, "That is the backward difference; the central one also looks at x + eps."),
            (2 * central, "It is twice too large: the two points lie 2 eps apart."),
            (2 * eps * central, "The difference is not divided by 2 eps."),
            (central * eps, "The difference is divided by 2, not by 2 eps."),
            (central * eps**2, "The difference is multiplied by eps, not divided."),
            (-central, "The sign is wrong: f(x + eps) - f(x - eps)."),
            (central.sum(), "All entries moved at once: move one at a time."),
            (torch.full_like(x, central.sum().item()), "All entries moved at once: move one at a time."),
            (
                3 * factor * x**2,
                "That is the derivative itself, not a finite difference: a check must not use what it checks.",
            ),
        ]
        expect_close(result, central, "the difference", hints=hints)
    return "Central differences, and x as it was."


class _PartlyReached(nn.Module):
    """A loss that depends on `reached`, on one entry of `partly` and on `inner.weight`, but on no other parameter."""

    def __init__(self):
        super().__init__()
        self.reached = nn.Parameter(torch.rand(3) + 0.5)
        self.partly = nn.Parameter(torch.rand(3) + 0.5)
        self.item = nn.Parameter(torch.tensor(3.0))
        self.idle = nn.Parameter(torch.rand(2))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
        self.inner = nn.Linear(2, 2)

    def forward(self):
        value = (self.reached * self.item.item()).sum() + self.partly[0] ** 2
        return value + 0 * self.idle.sum() + self.frozen.sum() + self.inner.weight.square().sum()


@exercise("04.3", title="Parameters without a gradient", minutes=10, difficulty=2)
def unreached(answer):
    module = _PartlyReached()
    names = [name for name, _ in module.named_parameters()]
    found = answer(module, module())
    expect(
        isinstance(found, list | tuple | set) and all(isinstance(name, str) for name in found),
        "The result should be a list of parameter names.",
    )
    found = set(found)
    expect(found <= set(names), f"There is no parameter {sorted(found - set(names))}: return names, as they are.")
    expect(
        not {"reached", "inner.weight"} <= found,
        "It is the other way round: you list the parameters that do have a gradient.",
    )
    expect(
        "partly" not in found,
        "`partly` is reached in one of its entries: only a gradient that is zero in every entry is none.",
    )
    expect("item" in found, "`item` went through .item() and has no gradient at all (None): it is missing in the list.")
    expect(
        "inner.bias" in found, "`inner.bias` is missing: parameters of submodules count, and this one is never used."
    )
    expect("idle" in found, "`idle` has a gradient that is zero everywhere; a gradient of zeros changes nothing.")
    expect("frozen" in found, "`frozen` has requires_grad=False: training cannot change it either.")
    wrong = sorted(found - {"item", "idle", "frozen", "inner.bias"})
    expect(not wrong, f"The loss does depend on {', '.join(wrong)}.")
    expect(
        all(p.grad is None for p in module.parameters()),
        "The .grad of the module was changed: use torch.autograd.grad rather than backward.",
    )
    return "Your function finds every parameter that does not learn, and no other."


@exercise("04.4", title="A canonical form", minutes=15, difficulty=3)
def canonical(answer):
    for labels in (3, 5):
        mu, log_w = torch.randn(labels, labels) + 1, torch.randn(2)
        off = labels * labels - labels
        result = answer(mu.clone(), log_w.clone())
        expect(isinstance(result, tuple | list) and len(result) == 2, "Return two tensors: (mu, log_w).")
        centred = mu - mu.diag()[None, :]
        scale = centred.abs().sum() / off
        rows = mu - mu.diag()[:, None]
        signed = centred.sum() / off
        largest = centred.abs().max()
        overwritten = mu - torch.diag(mu.diag())
        hints = [
            (
                rows / (rows.abs().sum() / off),
                "The constants were taken from rows; a constant in a row is a class bias and changes q.",
            ),
            (rows, "The constants were taken from rows; a constant in a row is a class bias and changes q."),
            (centred, "mu is not scaled yet: the mean absolute off-diagonal entry should be 1."),
            (centred / centred.abs().mean(), "The mean runs over all K² entries; only off-diagonal ones count."),
            (centred / signed, "The scale is the mean of the entries, not of their absolute values."),
            (centred / largest, "The scale is the largest entry, not the mean absolute one."),
            (centred / centred.norm(), "The scale is the norm of mu, not its mean absolute off-diagonal entry."),
            (centred * scale, "mu is multiplied by its scale; it should be divided by it."),
            (
                overwritten / (overwritten.abs().sum() / off),
                "The diagonal was set to zero, not subtracted from its column: that changes q.",
            ),
            (
                lambda a, mu=mu: a.shape == mu.shape and bool((a.diag().abs() > 1e-5).any()),
                "The diagonal of mu is not zero: subtract from each column its diagonal entry.",
            ),
        ]
        expect_close(result[0], centred / scale, "mu", hints=hints)
        hints = [
            (log_w, "log_w is unchanged: mu was divided by its scale, so w must be multiplied by it."),
            (log_w - scale.log(), "log_w took the scale the wrong way: w must be multiplied by it."),
            (log_w * scale, "log_w was multiplied; a factor on w is a summand on log w."),
            (log_w + scale, "The scale itself was added to log_w; add its logarithm."),
            (log_w.exp() * scale, "That is w; return log w."),
        ]
        expect_close(result[1], log_w + scale.log(), "log_w", hints=hints)
    return "In this form two learned CRFs can be compared."
