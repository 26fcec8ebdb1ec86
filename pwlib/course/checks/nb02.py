"""Checks of notebook 02: energies, the update of one pixel, damping, kernels, messages, and four runs to diagnose."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

from pwlib import graph
from pwlib.course.checks import NoAnswer, exercise, expect, expect_close, expect_shape
from pwlib.crf import DenseCRF, Trace
from pwlib.data import VOID, load

FAULTS = ("healthy", "wrong sign", "double softmax", "normalised colours")


@exercise("02.1", title="The energy of any labelling", minutes=10, difficulty=1)
def energy_of(answer):
    for nodes, labels in ((9, 2), (6, 4)):
        edges = graph.all_pairs(nodes)[:: 2 if nodes == 9 else 1]
        unary, weights, mu = 3 * torch.rand(nodes, labels), torch.rand(len(edges)), torch.rand(labels, labels)
        for _ in range(3):
            x = torch.randint(labels, (nodes,))
            alone = sum(unary[i, x[i]] for i in range(nodes))
            pairs = [(w, mu[x[i], x[j]], mu[x[j], x[i]]) for (i, j), w in zip(edges.tolist(), weights, strict=True)]
            pairwise = sum(w * forth for w, forth, _ in pairs)
            back = sum(w * back for w, _, back in pairs)
            potts = sum(w * float(x[i] != x[j]) for (i, j), w in zip(edges.tolist(), weights, strict=True))
            hints = [
                (alone - pairwise, "The pairwise part has the wrong sign: mu is a penalty, so it is added to E."),
                (alone + pairwise + back, "Each pair is counted twice, once from each end; edges name a pair once."),
                (alone + 2 * pairwise, "Each pair is counted twice; edges name a pair once."),
                (
                    alone + pairwise / 2,
                    "The pairwise part is halved; edges name each pair once, so it is not counted twice.",
                ),
                (alone + back, "mu is read the wrong way round: its row is the label of the pair's first end."),
                (alone + sum(forth for _, forth, _ in pairs), "The weights of the pairs are missing."),
                (alone + potts, "That is Potts: mu[a, b] should be looked up, not [a != b]."),
                (pairwise, "The unary energies are missing."),
                (alone, "The pairwise energies are missing."),
                (-alone - pairwise, "That is -E: energies are costs, low is good."),
                (torch.exp(-alone - pairwise), "That is exp(-E); return E itself."),
            ]
            expect_close(answer(x, unary, edges, weights, mu), alone + pairwise, "the energy", hints=hints)
    return "The energy is right for any labels, weights and compatibility."


@exercise("02.2", title="One pixel's best answer", minutes=10, difficulty=2)
def best_answer(answer):
    for nodes, labels in ((9, 2), (5, 3)):
        edges = graph.grid_edges(3, 3) if nodes == 9 else graph.all_pairs(5)[1:]
        unary, q = 2 * torch.rand(nodes, labels), torch.softmax(2 * torch.randn(nodes, labels), 1)
        mu = torch.rand(labels, labels)
        mu, w = mu + mu.T, 0.8
        for i in range(nodes):
            ends = [sum(q[e[1 - side]] for e in edges.tolist() if e[side] == i) + q[i] * 0 for side in (0, 1)]
            received = ends[0] + ends[1]
            cost = w * mu @ received
            neighbours = [e[1 - side] for e in edges.tolist() for side in (0, 1) if e[side] == i]
            hard = F.one_hot(q[neighbours].argmax(1), labels).sum(0).to(q)
            hints = [
                (
                    torch.softmax(unary[i] + cost, 0),
                    "The minus is missing: a label with a higher cost gets a lower probability.",
                ),
                (torch.softmax(-unary[i] + cost, 0), "The sign of the pairwise cost is wrong: mu is a penalty."),
                (torch.softmax(-cost, 0), "The unary of the pixel is missing from its cost."),
                (torch.softmax(-unary[i], 0), "The neighbours are missing from the cost."),
                (
                    torch.softmax(-unary[i] - w * mu @ (received + q[i]), 0),
                    "The pixel's own q is in the sum; the sum runs over its neighbours only, j ≠ i.",
                ),
                (
                    torch.softmax(-unary[i] - cost / len(neighbours), 0),
                    "That is the mean of the neighbours' q; the cost is their sum, so that more neighbours count more.",
                ),
                (
                    torch.softmax(-unary[i] - w * mu @ hard, 0),
                    "Each neighbour counts with its most likely label only; use its probabilities q_j, all of them.",
                ),
                (torch.softmax(q[i].log() - cost, 0), "The pixel's old q is used in place of its unary energy."),
                (unary[i] + cost, "That is the cost e_i; the softmax of its negative is still to come."),
                (
                    torch.softmax(-unary[i] - w * received, 0),
                    "mu is missing: multiply the sum of the neighbours' q by it.",
                ),
                (
                    torch.softmax(-unary[i] - mu @ received, 0),
                    "The weight w is missing from the pairwise cost.",
                ),
                *[
                    (
                        torch.softmax(-unary[i] - w * mu @ end, 0),
                        f"Only edges whose {side} end is pixel i are counted; it may be either end.",
                    )
                    for side, end in zip(("first", "second"), ends, strict=True)
                ],
            ]
            new = answer(i, q.clone(), unary, edges, w, mu)
            expect_close(new, torch.softmax(-unary[i] - cost, 0), f"q of pixel {i}", hints=hints)
    return "This is the minimum of the free energy over the marginals of one pixel."


@exercise("02.3", title="A calmer update", minutes=10, difficulty=2)
def calm_mean_field(answer):
    for nodes, labels, step, iterations in ((5, 3, 1.0, 3), (6, 2, 0.3, 1), (7, 3, 0.6, 4)):
        unary = 2 * torch.rand(nodes, labels)
        mu, coupling = torch.rand(labels, labels) + 0.2, torch.rand(nodes, nodes)
        mu, coupling = mu + mu.T, coupling + coupling.T

        def damped(
            eta,
            sign=-1,
            anchor=False,
            start=None,
            early=0,
            unary=unary,
            mu=mu,
            coupling=coupling,
            iterations=iterations,
            logarithms=False,
        ):
            q = torch.softmax(-unary, 1) if start is None else start
            for _ in range(iterations - early):
                previous, cost = q, coupling @ q @ mu
                new = torch.softmax((q.log() if anchor else -unary) + sign * cost, 1)
                q = (1 - eta) * q + eta * new
                if logarithms:
                    q = torch.softmax((1 - eta) * previous.log() + eta * new.log(), 1)
            return q

        uniform = torch.full_like(unary, 1 / labels)
        hints = [
            (damped(1.0), "There is no damping: q is replaced outright, whatever the step."),
            (damped(1 - step), "The parts are swapped: `step` is the share of the new marginals, 1 - step of the old."),
            (damped(step, sign=1), "The sign of the pairwise cost is wrong."),
            (
                damped(step, anchor=True),
                "The previous q is used in place of the unary; the unary energy enters every iteration.",
            ),
            (
                damped(step, logarithms=True),
                "You mix the logarithms of q (or energies) and normalise; mix the probabilities themselves.",
            ),
            (damped(step, start=uniform), "The start is uniform; expected softmax(-unary)."),
            (damped(step, early=1), "One iteration is missing."),
            (lambda a, n=nodes, k=labels: a.ndim == 3, "Return the final q [N, K] only, not its history."),
            (
                lambda a, n=nodes: (
                    a.shape[:1] == (n,)
                    and a.ndim == 2
                    and not torch.allclose(a.sum(1), torch.ones(n).double(), atol=1e-4)
                ),
                "The rows do not sum to 1: mix probabilities, not energies or sums that were not divided.",
            ),
        ]
        if step == 1.0:
            hints = [h for h in hints if "no damping" not in h[1]]
        q = answer(unary, coupling, mu, iterations, step)
        expect_close(q, damped(step), "q", hints=hints)
    swap = 3.0 * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    two, potts = -torch.tensor([[0.3, 0.7], [0.7, 0.3]]).log(), 1 - torch.eye(2)
    change = answer(two, swap, potts, 201, 0.5) - answer(two, swap, potts, 200, 0.5)
    expect_close(change, torch.zeros(2, 2), "the change in iteration 201 of the two pixels that swapped their labels")
    return "And the two pixels that swapped their labels in every iteration converge."


@exercise("02.4", title="The bilateral kernel", minutes=15, difficulty=2)
def bilateral_kernel(answer):
    for height, width, alpha, beta in ((3, 4, 2.0, 30.0), (5, 2, 4.0, 60.0)):
        image = torch.rand(3, height, width)

        def kernel(
            scale=255.0,
            half=0.5,
            alpha=alpha,
            beta=beta,
            image=image,
            colour=True,
            where=True,
            power=2,
            columns=False,
        ):
            rows, cols = torch.meshgrid(torch.arange(image.shape[1]), torch.arange(image.shape[2]), indexing="ij")
            if columns:
                rows, cols = cols, rows
            order = (lambda t: t.T.flatten()) if columns else (lambda t: t.flatten())
            p = torch.stack([order(rows), order(cols)], 1).float() / alpha
            c = scale * torch.stack([order(channel) for channel in image], 1) / beta
            d = where * (p[:, None] - p).square().sum(-1) + colour * (c[:, None] - c).square().sum(-1)
            return torch.exp(-half * d ** (power / 2))

        squares = kernel(alpha=alpha**0.5, beta=beta**0.5)
        wrong_view = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
        p = wrong_view.reshape(-1, 2).float() / alpha
        scrambled = 255 * image.reshape(-1, 3) / beta
        mixed = torch.exp(-((p[:, None] - p).square().sum(-1) + (scrambled[:, None] - scrambled).square().sum(-1)) / 2)
        wanted = kernel()
        hints = [
            (kernel(scale=1.0), "The colours are on the scale [0, 1]; theta_beta counts grey levels from 0 to 255."),
            (kernel(half=1.0), "The half in the exponent is missing: exp(-d² / 2)."),
            (
                kernel(half=0.25),
                "The 2 is squared along with theta: the exponent is -d² / (2 theta²), not -d² / (2 theta)².",
            ),
            (kernel(power=1), "The distance is not squared in the exponent."),
            (kernel(colour=False), "The colours are missing: that is the spatial kernel."),
            (kernel(where=False), "The positions are missing: two pixels of one colour get k = 1 at any distance."),
            (squares, "The distances are divided by theta, not by theta²: divide features before squaring."),
            (kernel(alpha=beta, beta=alpha), "theta_alpha and theta_beta are swapped: alpha is for positions."),
            (kernel(columns=True), "The pixels are counted column by column; expected row by row."),
            (
                mixed,
                "The colours are scrambled: reshape(-1, 3) of a [3, H, W] image mixes pixels; use flatten(1).T.",
            ),
            (wanted - torch.eye(len(wanted)), "The diagonal is 0: leave it in, a pixel is like itself (k = 1)."),
            (wanted / wanted.sum(1, keepdim=True), "The rows are normalised; the bare kernel was asked for."),
            (1 / (wanted.sum(1, keepdim=True) * wanted.sum(1)).sqrt() * wanted, "The kernel is normalised already."),
        ]
        expect_shape(answer(image, alpha, beta), [height * width] * 2, "the kernel")
        expect_close(answer(image, alpha, beta), wanted, "the kernel", hints=hints)
    return "The kernel is large between pixels that are close to each other and similar in colour."


@exercise("02.5", title="The messages that a pixel receives", minutes=15, difficulty=3)
def messages_of(answer):
    features = 2 * torch.rand(7, 2)
    kernel = torch.exp(-torch.cdist(features, features).square() / 2)
    q = torch.softmax(2 * torch.randn(7, 3), 1)
    n, eye = kernel.sum(1), torch.eye(7)
    bare = kernel - eye
    m = bare.sum(1)
    forms = {"none": kernel, "row": kernel / n[:, None], "symmetric": kernel / (n[:, None] * n).sqrt()}
    late = {"none": bare, "row": bare / m[:, None], "symmetric": bare / (m[:, None] * m).sqrt()}
    for self_message in (True, False):
        for name, form in forms.items():
            wanted = (form if self_message else form - torch.diag(form.diag())) @ q
            others = [(other, forms[other] @ q) for other in forms if other != name]
            column = kernel / n
            if not self_message:
                others = [(o, (forms[o] - torch.diag(forms[o].diag())) @ q) for o in forms if o != name]
                column = bare / n
            hints = [
                (
                    late[name] @ q if not self_message and name != "none" else torch.nan,
                    "n was summed after the diagonal was taken out; it always includes k_ii, the pixel itself.",
                ),
                (
                    form @ q if not self_message else (form - torch.diag(form.diag())) @ q,
                    f"With self_message={self_message} the pixel's own q should "
                    f"{'be' if self_message else 'not be'} in its message.",
                ),
                (
                    form @ q - q if not self_message and name != "none" else torch.nan,
                    "You subtract q itself; after normalisation the self-message has the weight k_ii / n_i, not 1.",
                ),
                (
                    column @ q if name == "row" else torch.nan,
                    "The columns are divided by n; 'row' divides the message of pixel i by n_i.",
                ),
                (
                    kernel / (n[:, None] * n) @ q if name == "symmetric" else torch.nan,
                    "The square root is missing: symmetric divides by sqrt(n_i n_j).",
                ),
                *[(value, f"normalization={name!r} gives what {o!r} should give.") for o, value in others],
                (
                    lambda a: a.shape == q.shape and torch.allclose(a.sum(1), torch.ones(7).double(), atol=1e-4),
                    f"Each message sums to 1: it was normalised again; {name!r} with self_message={self_message} "
                    "does not do that.",
                ),
            ]
            expect_close(
                answer(kernel.clone(), q.clone(), name, self_message),
                wanted,
                f"the message for normalization={name!r}, self_message={self_message}",
                hints=hints,
            )
    return "All six combinations are right."


@functools.cache
def run_to_diagnose(letter: str) -> Trace:
    """Return one of the four runs of exercise 02.6, "A" to "D": a trace of a dense CRF on a scene; three have a fault."""
    if letter not in "ABCD" or len(letter) != 1:
        raise ValueError(f"there is no run {letter!r}; expected A, B, C or D")
    fault = {"A": "double softmax", "B": "normalised colours", "C": "healthy", "D": "wrong sign"}[letter]
    dataset = load("scenes", "val", size=(32, 48))
    image, label = dataset[0]
    classes = dataset.num_classes
    one_hot = F.one_hot(label.where(label != VOID, 0), classes).movedim(-1, 0) * (label != VOID)
    coarse = F.avg_pool2d(one_hot[None].float(), 4).clamp_min(0.02).log()
    coarse = 0.75 * coarse + torch.randn(coarse.shape, generator=torch.Generator().manual_seed(4))
    logits = F.interpolate(coarse, size=label.shape, mode="bilinear")[0]
    if fault == "double softmax":
        logits = torch.softmax(logits, 0)
    crf = DenseCRF(
        classes,
        theta_alpha=8,
        theta_beta=12,
        theta_gamma=1,
        w_bilateral=5,
        w_spatial=1,
        compatibility=torch.eye(classes) if fault == "wrong sign" else "potts",
        filtering="exact",
    )
    # Shifted into [0, 1]: kernels depend on differences only.
    seen = 0.5 + (image - image.mean()) / image.std() / 255 if fault == "normalised colours" else image
    return replace(crf.trace(logits, seen, iterations=8), image=image)


@exercise("02.6", title="Four runs to diagnose", minutes=15, difficulty=2)
def diagnosis(answer):
    expect(isinstance(answer, dict), "The diagnosis should be a dictionary from letter to fault.")
    if all(answer.get(letter) in (None, ...) for letter in "ABCD"):
        raise NoAnswer
    for letter in "ABCD":
        given = answer.get(letter)
        if given in (None, ...):
            expect(False, f"Run {letter} has no diagnosis yet.")
        choices = ", ".join(repr(fault) for fault in FAULTS)
        expect(given in FAULTS, f"Run {letter} is called {given!r}; expected one of {choices}.")
    runs = {letter: run_to_diagnose(letter) for letter in "ABCD"}
    for letter, run in runs.items():
        given = answer[letter]
        spread = (run.unary.amax(0) - run.unary.amin(0)).mean().item()
        rises = bool((run.free_energy[1:] > run.free_energy[:-1] + 1).any())
        changed = (run.labels[-1] != run.labels[-2]).float().mean().item()
        if given == "wrong sign":
            expect(
                rises and changed > 0.2,
                f"Run {letter} has the right sign: from iteration 7 to 8 only {changed:.0%} of its labels change.",
            )
        else:
            expect(
                not (rises and changed > 0.2),
                f"Look at run {letter} again: from iteration 7 to 8, {changed:.0%} of its labels change. "
                "Which fault makes similar pixels take different labels?",
            )
        if given == "double softmax":
            expect(
                spread < 1.01,
                f"Run {letter} has a healthy unary: best and worst label differ by {spread:.1f} nats, more than the 1 "
                "that two probabilities can differ by.",
            )
        else:
            expect(
                spread > 1.01,
                f"Look at the unary of run {letter}: best and worst label differ by {spread:.2f} nats. What bounds "
                "the differences between scores by 1?",
            )
        if given in ("healthy", "normalised colours"):
            # The bilateral message should jump where the image jumps.
            edge = (run.image[:, :, 1:] - run.image[:, :, :-1]).abs().sum(0)
            message = run.messages[0, 1]
            jump = (message[:, :, 1:] - message[:, :, :-1]).abs().sum(0)
            sharp = (jump[edge > 0.4].mean() / jump[edge < 0.1].mean()).item()
            blurred = sharp < 4
            if given == "healthy":
                expect(
                    not blurred,
                    f"Run {letter} is not healthy: its bilateral message crosses the image's edges as if all colours "
                    "were alike. What could make them alike?",
                )
            else:
                expect(blurred, f"Run {letter} uses the colours: its bilateral message stops at the image's edges.")
    return "All four diagnoses are right."
