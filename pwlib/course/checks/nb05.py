"""Checks of notebook 05: the three stages."""

import copy
import itertools
import math

import torch
from torch import nn

from pwlib.course.checks import WrongAnswer, exercise, expect, expect_close, expect_shape


@exercise("05.1", title="Freeze it, bit for bit", minutes=10, difficulty=2)
def freeze(answer):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    )  # fmt: skip
    network.train()
    before = copy.deepcopy(network.state_dict())
    frozen = answer(network)
    expect(isinstance(frozen, nn.Module), f"You return {type(frozen).__name__}; return the network.")
    expect(frozen is network, "You return another network; change the one that was given, and return it.")
    same = all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    expect(same, "Freezing itself changed the network's parameters or statistics.")
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    expect(
        not learning,
        f"{len(learning)} of {len(list(network.parameters()))} parameters still require a gradient, such as {next(iter(learning), '')}: eval() does not stop "
        "gradients. Use requires_grad_ on every parameter of every part.",
    )
    image = 3 + torch.randn(8, 3, 9, 9)
    with torch.no_grad():
        first, second = network(image), network(image)
    drifted = [key for key, value in network.state_dict().items() if not torch.equal(before[key], value)]
    expect(
        not drifted,
        f"Without any gradient, {next(iter(drifted), '')} changed in a forward pass: batch norm updates its running statistics while "
        "the network is in training mode.",
    )
    expect(torch.equal(first, second), "The same image gives two different outputs: dropout is still on.")
    return "No gradients, constant statistics, no dropout."


@exercise("05.2", title="Undo the class weights", minutes=10, difficulty=3)
def undo_weights(answer):
    weights = torch.tensor([0.3, 1.0, 2.5, 7.0])
    truth = torch.softmax(torch.randn(2, 4, 3, 5), 1)
    # The oracle: minimise the weighted loss numerically; the answer has to recover the true probabilities.
    logits = torch.zeros(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = -(weights.view(-1, 1, 1) * truth * torch.log_softmax(logits, 1)).sum()
        total.backward()
        return total

    optimizer.step(loss)
    fitted = (logits.detach() + torch.randn(2, 1, 3, 5)).float()  # logits are free up to a constant a pixel
    kept = fitted.clone()
    actual = answer(fitted, weights)
    expect(torch.equal(fitted, kept), "Your function changes the logits it was given; work on a copy.")
    expect_shape(actual, fitted.shape, "the result")
    w = weights.view(-1, 1, 1)
    slips = [
        (fitted + w.log(), "You weight once more: the network's q is proportional to w p, so p is proportional to q / w; the sign of log w is wrong."),
        (fitted - w, "You subtract w itself; dividing probabilities by w means subtracting log w from the logits."),
        (fitted / w, "You divide the logits by w; it is the probabilities that are to be divided."),
        (fitted * w, "You multiply the logits by w; it is the probabilities that are to be divided by it."),
        ((torch.softmax(fitted, 1) / w), "These are scores before the logarithm; return logits."),
        (fitted - w.log() / 2, "Half of it: subtract log w itself. (The square root is in the weights already.)"),
        (fitted, "Nothing has changed; the softmax of the logits is still the weighted one."),
    ]  # fmt: skip
    hints = [(torch.softmax(slip.double(), 1), message) for slip, message in slips]
    actual = torch.as_tensor(actual)
    expect_close(torch.softmax(actual.double(), 1), truth, "the softmax of your logits", hints=hints, atol=2e-4)
    return "The softmax of your logits is the true class probability, although the weighted loss was minimised."


@exercise("05.3", title="An interval without a bell curve", minutes=10, difficulty=2)
def bootstrap_interval(answer):
    for level in (0.95, 0.8):
        differences = torch.tensor([0.2, 5.0, 1.0, -1.5, 2.2, 0.9, 3.1])
        picks = torch.randint(7, (400, 7))
        actual = _pair(answer(differences, picks, level))
        means = sorted(sum(differences[i].item() for i in row) / 7 for row in picks.tolist())

        def quantile(values, share):
            place = share * (len(values) - 1)
            low = math.floor(place)
            high = min(low + 1, len(values) - 1)
            return values[low] + (place - low) * (values[high] - values[low])

        tail = (1 - level) / 2
        wanted = [quantile(means, tail), quantile(means, 1 - tail)]
        raw = sorted(differences.tolist())
        medians = sorted(sorted(differences[i].item() for i in row)[3] for row in picks.tolist())
        centres = (differences.mean().item(), sum(means) / len(means))
        wrong_way = differences[picks].mean(0).sort().values.tolist()
        hints = [
            ([quantile(means, 1 - level), quantile(means, level)], "You leave 1 - level on either side, twice as much as you may: the middle 95 % leaves 2.5 % at each end."),
            ([quantile(raw, tail), quantile(raw, 1 - tail)], "That is the spread of the differences themselves; the question is how much their mean varies from draw to draw."),
            ([quantile(wrong_way, tail), quantile(wrong_way, 1 - tail)], "You average over the draws; each row of picks is one draw, so average along its own dimension (dim=1)."),
            ([quantile(medians, tail), quantile(medians, 1 - tail)], "You take medians; the exercise asks for the mean of each draw."),
            ([wanted[1], wanted[0]], "Low and high are exchanged."),
            ([means[0], means[-1]], "That is the range of all means; leave out the tails."),
            (
                lambda a, centres=centres: any(abs(a.mean().item() - centre) < 1e-4 for centre in centres),
                "Your interval is symmetric about the mean, as with a bell curve: take quantiles of the means, not mean +- z standard errors.",
            ),
        ]  # fmt: skip
        expect_close(actual, wanted, f"the {level:.0%} interval", hints=hints, atol=1e-4)
    return "Right for both levels."


def _pair(value):
    """Convert (low, high) to a tensor [2]."""
    try:
        pair = torch.stack([torch.as_tensor(v).double().reshape(()) for v in value])
    except (TypeError, RuntimeError):
        raise WrongAnswer("Return two numbers, (low, high).") from None
    expect(len(pair) == 2, f"You return {len(pair)} numbers; expected two, (low, high).")
    return pair


@exercise("05.4", title="How small can p be?", minutes=15, difficulty=3)
def sign_flip_p(answer):
    cases = [
        [0.5, 2.1, -0.6, 1.4],
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [-1.0, -2.0, -3.0, -4.0, -5.0],
        [0.3, -0.3, 0.3],
        [2.0, 0.5, 1.0, -0.25, 0.75, 1.5],
    ]
    for d in cases:
        n, observed = len(d), abs(sum(d))
        totals = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=n)]
        wanted = sum(abs(t) >= observed - 1e-9 for t in totals) / 2**n
        one_sided = sum(t >= sum(d) - 1e-9 for t in totals) / 2**n
        strict = sum(abs(t) > observed + 1e-9 for t in totals) / 2**n
        within = sum(abs(t) <= observed + 1e-9 for t in totals) / 2**n
        hints = [
            (one_sided, "You count one side only; means as far below 0 count too."),
            (strict, "The observed signs are one of the 2^n ways; count means that are equal, too (>=), or p can be 0."),
            (1 - wanted, "That is the share of flips that are nearer to 0; p counts those at least as far."),
            (within, "You count the flips whose mean is at most as far from 0; p counts those at least as far."),
            ((2**n * wanted + 1) / (2**n + 1), "The + 1 belongs to random flips; all 2^n are here, the observed one among them."),
            (wanted * 2**n, "That is a count; p is its share of all 2^n flips."),
        ]  # fmt: skip
        expect_close(answer(torch.tensor(d)), wanted, f"p for {d}", hints=hints)
    return "Right in five cases. The smallest p that five seeds can give is 2 / 32 = 0.0625."


@exercise("05.5", title="The loss with the CRF of another run", minutes=5, difficulty=1)
def swap_loss(answer):
    for size in (5, 3):
        table = 40 + 5 * torch.rand(size, size)
        rows = table.tolist()
        wanted = [rows[n][n] - sum(rows[n][c] for c in range(size) if c != n) / (size - 1) for n in range(size)]
        wanted, own = torch.tensor(wanted), table.diagonal()
        hints = [
            (own - table.mean(1), "The mean over the others contains the own CRF's score: take the diagonal out, and divide by S - 1."),
            (own - (table.sum(0) - own) / (size - 1), "That is by CRF (down the columns); the question is by network, along the rows."),
            (-wanted, "The sign is turned round: the loss is positive where a foreign CRF is worse."),
            (own - (table.sum(1) - own) / size, "You took the diagonal out of the sum, but still divide by S; there are S - 1 others."),
            (wanted.mean(), "One number for all; return one for each network, [S]."),
        ]  # fmt: skip
        expect_close(answer(table.clone()), wanted, "the loss", hints=hints)
    return "One number for each network, and its own CRF is not among the others."
