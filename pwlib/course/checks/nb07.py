"""Checks of notebook 07: evaluation."""

import math

import torch

from pwlib.course.checks import exercise, expect, expect_close, expect_shape


def _ratio(part, whole):
    return part / whole if whole else math.nan


@exercise("07.1", title="mIoU with absent classes", minutes=10, difficulty=2)
def mean_iou(answer):
    for absent, false_only in ((None, None), (2, None), (None, 3), (0, 3)):
        matrix = torch.randint(1, 50, (5, 5)) + 200 * torch.eye(5, dtype=torch.int64)
        if absent is not None:
            matrix[absent], matrix[:, absent] = 0, 0
        if false_only is not None:
            matrix[false_only] = 0
        m = matrix.tolist()
        right = [m[k][k] for k in range(5)]
        true = [sum(m[k]) for k in range(5)]
        predicted = [sum(row[k] for row in m) for k in range(5)]
        iou = [_ratio(right[k], true[k] + predicted[k] - right[k]) for k in range(5)]
        occurs = [k for k in range(5) if not math.isnan(iou[k])]
        known = [k for k in range(5) if true[k]]
        wanted = sum(iou[k] for k in occurs) / len(occurs)
        hints = [
            (lambda x: bool(x.isnan().all()), "The result is nan: a class that occurs on neither side has an IoU of 0/0; leave it out of the mean."),
            (sum(iou[k] for k in occurs) / 5, "A class that occurs on neither side counts as 0 in your mean; it has no IoU, leave it out."),
            (sum(1 if math.isnan(v) else v for v in iou) / 5, "A class that occurs on neither side counts as 1 in your mean; it has no IoU, leave it out."),
            (sum(iou[k] for k in known) / len(known), "You leave out a class that is predicted but never true; its union is not empty, and its IoU is 0."),
            (sum(_ratio(right[k], true[k]) for k in known) / len(known), "That is the mean class accuracy: the union also contains the false positives."),
            (sum(_ratio(right[k], true[k] + predicted[k]) for k in occurs) / len(occurs), "Your union counts the right pixels twice: true + predicted - right."),
            (sum(_ratio(2 * right[k], true[k] + predicted[k]) for k in occurs) / len(occurs), "That is the mean F1 (Dice); IoU is right / union."),
            (sum(right) / sum(true), "That is pixel accuracy; mIoU gives every class the same weight."),
            (sum(right) / sum(true[k] + predicted[k] - right[k] for k in range(5)), "You divide sums by sums, so that large classes decide; take each class's IoU first, then the mean."),
        ]  # fmt: skip
        expect_close(answer(matrix.clone()), wanted, "mIoU", hints=hints)
    return "Right with and without absent classes and classes that are predicted only."


def _near(points, others, width):
    """Return the share of points with one of the others at most `width` away in rows and in columns."""
    near = [any(max(abs(y - v), abs(x - u)) <= width for v, u in others) for y, x in points]
    return sum(near) / len(near)


@exercise("07.2", title="Matching contours", minutes=15, difficulty=2)
def boundary_f1(answer):
    for width, apart in ((3, False), (2, False), (1, False), (1, True)):
        found, true = torch.rand(14, 18) < 0.05, torch.rand(14, 18) < 0.02
        found[0, 0], true[1, 1] = True, True
        if apart:
            found, true = torch.zeros(14, 18, dtype=torch.bool), torch.zeros(14, 18, dtype=torch.bool)
            found[0, :4], true[10, :4] = True, True
        points, others = found.nonzero().tolist(), true.nonzero().tolist()

        def f1(w, points=points, others=others):
            p, r = _near(points, others, w), _near(others, points, w)
            return 2 * p * r / (p + r) if p + r else 0.0

        p, r = _near(points, others, width), _near(others, points, width)
        a, b = p * len(points) / len(others), r * len(others) / len(points)
        grown = [_grow(x, width) for x in (found, true)]
        both, either = (grown[0] & grown[1]).sum().item(), grown[0].sum().item() + grown[1].sum().item()
        city = [_city(a, b, width) for a, b in ((points, others), (others, points))]
        hints = [
            (lambda x, apart=apart: apart and bool(x.isnan().all()), "Where nothing matches, your result is nan (0/0); return 0 there."),
            ((p + r) / 2, "That is the arithmetic mean of precision and recall; F1 is the harmonic one, 2PR / (P + R)."),
            (2 * a * b / (a + b) if a + b else 0.0, "The totals are exchanged: precision is a share of the predicted pixels, recall a share of the true ones."),
            (p, "That is the precision alone; recall is missing."),
            (r, "That is the recall alone; precision is missing."),
            (2 * both / either, "You dilate both maps and compare the bands; each pixel of one map is to be looked up in the dilated *other*."),
            (f1((width - 1) / 2), "Your window has `width` pixels in all; a distance of at most `width` needs 2 * width + 1."),
            (f1(width - 1), "Pixels exactly `width` away count as well."),
            (2 * city[0] * city[1] / (city[0] + city[1]) if sum(city) else 0.0, "A diagonal step counts as one here (a square window), not as two."),
        ]  # fmt: skip
        expect_close(answer(found.clone(), true.clone(), width), f1(width), f"F1 at width {width}", hints=hints)
    return "Your F1 agrees with distances computed pair by pair."


def _grow(points, width):
    grown = torch.zeros_like(points)
    for y, x in points.nonzero().tolist():
        grown[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1] = True
    return grown


def _city(points, others, width):
    return sum(any(abs(y - v) + abs(x - u) <= width for v, u in others) for y, x in points) / len(points)


@exercise("07.3", title="Bins of equal count", minutes=15, difficulty=2)
def adaptive_ece(answer):
    for bins in (4, 10):
        confidence = 0.2 + 0.8 * torch.rand(200) ** 0.5
        right = torch.rand(200) < 0.73  # independent of the confidence, so that gaps have both signs
        pairs = sorted(zip(confidence.tolist(), right.tolist(), strict=True))
        size = 200 // bins
        groups = [pairs[i * size : (i + 1) * size] for i in range(bins)]
        gaps = [sum(r for _, r in g) / size - sum(c for c, _ in g) / size for g in groups]
        wanted = sum(abs(g) for g in gaps) / bins
        equal = [[p for p in pairs if min(int(p[0] * bins), bins - 1) == i] for i in range(bins)]
        width = sum(abs(sum(r for _, r in g) - sum(c for c, _ in g)) for g in equal) / 200
        means = confidence.sort().values.view(bins, -1).mean(1)
        unsorted = (right.double().view(bins, -1).mean(1) - means).abs().mean()
        neither = (right.double().view(bins, -1).mean(1) - confidence.view(bins, -1).mean(1)).abs().mean()
        across = confidence.argsort()
        columns = (right[across].double().view(-1, bins).mean(0) - confidence[across].view(-1, bins).mean(0)).abs()
        hints = [
            (width, "These are bins of equal width; cut the *sorted* pixels into groups of equal count."),
            (unsorted, "You sort the confidences alone; `right` has to go along in the same order."),
            (neither, "Nothing is sorted: your groups hold pixels of all confidences."),
            (columns.mean(), "Your groups take every bins-th pixel; consecutive ones belong together: view(bins, -1), then the mean over dim 1."),
            ((right.double() - confidence).abs().mean(), "You take the difference pixel by pixel, where it cannot be small; take both means over a group first."),
            (abs(sum(gaps)) / bins, "Gaps of opposite sign cancel in your mean: take the absolute value group by group."),
            (sum(gaps) / bins, "The absolute value is missing: gaps of opposite sign cancel in your mean."),
            (-sum(gaps) / bins, "The absolute value is missing: gaps of opposite sign cancel in your mean."),
            (max(abs(g) for g in gaps), "That is the largest gap (the maximum calibration error); the exercise asks for the mean."),
            (sum(abs(g) for g in gaps), "That is the sum over the groups; each holds 1 / bins of the pixels, so take the mean."),
            (math.sqrt(sum(g * g for g in gaps) / bins), "That is the root of the mean square; ECE takes absolute values."),
        ]  # fmt: skip
        expect_close(
            answer(confidence.clone(), right.clone(), bins), wanted, f"the error in {bins} groups", hints=hints
        )
    return "All groups have the same number of pixels, and each confidence keeps its pixel."


@exercise("07.4", title="A score for probabilities", minutes=10, difficulty=1)
def brier(answer):
    log_q = torch.log_softmax(2 * torch.randn(2, 4, 5, 6), dim=1)
    label = torch.randint(4, (2, 5, 6))
    label[:, :, :2] = 255
    q = log_q.exp().double()
    every, only, inside, zero = [], [], [], []
    for i in range(2):
        for y in range(5):
            for x in range(6):
                t = label[i, y, x].item()
                truth = torch.tensor([float(k == t) for k in range(4)], dtype=torch.float64)
                score = ((q[i, :, y, x] - truth) ** 2).sum().item()
                every.append(score)
                zero.append(score if t != 255 else ((q[i, :, y, x] - torch.eye(4)[0]) ** 2).sum().item())
                if t != 255:
                    inside.append(score)
                    only.append((1 - q[i, t, y, x].item()) ** 2)
    wanted, kept = sum(inside) / len(inside), label.clone()
    mask = label != 255
    hot = torch.nn.functional.one_hot(label.where(mask, 0), 4).movedim(-1, 1)
    hints = [
        (((log_q.double() - hot) ** 2).sum(1)[mask].mean(), "You compare log-probabilities with 0 and 1; take exp() first."),
        (wanted / 4, "You average over the classes; sum over them, and average over pixels only."),
        (sum(only) / len(only), "You score the true class alone; the other classes' probabilities count too."),
        (sum(every) / len(every), "Void pixels are in your mean, as pixels of no class; leave them out."),
        (sum(zero) / len(zero), "Void pixels are in your mean, as pixels of the class that replaced void; mask them after the sum over classes."),
        (sum(inside) / len(every), "You leave void out of the sum, yet divide by all pixels."),
        (sum(inside), "That is the sum over pixels; take the mean."),
        ((q - hot).abs().sum(1)[mask].mean(), "You sum absolute differences; the Brier score squares them."),
    ]  # fmt: skip
    actual = answer(log_q.clone(), label)
    expect(torch.equal(label, kept), "Your function changes the labels it is given; work on a copy.")
    expect_close(actual, wanted, "the Brier score", hints=hints)
    return "Void is left out, and all classes are counted."


@exercise("07.5", title="Holm's correction", minutes=15, difficulty=3)
def holm(answer):
    cases = [
        ([0.064, 0.002, 0.008, 0.026, 0.011, 0.012, 0.047], 0.05),  # every known slip gives another answer here
        ([0.04, 0.001, 0.30, 0.012, 0.02], 0.05),
        ([0.011, 0.02, 0.03, 0.001, 0.013, 0.9], 0.05),
        ([0.03, 0.04, 0.045, 0.049], 0.05),
        ([0.012, 0.024, 0.5, 0.03, 0.001], 0.1),
        ([0.2, 0.6], 0.05),
        ([0.001, 0.002, 0.003], 0.05),
    ]
    for values, level in cases:
        m = len(values)
        order = sorted(range(m), key=lambda i: values[i])
        passed = [values[i] <= level / (m - rank) for rank, i in enumerate(order)]
        first = passed.index(False) if False in passed else m
        last = max((rank for rank in range(m) if passed[rank]), default=-1)
        step = max((r for r in range(m) if values[order[r]] <= level * (r + 1) / m), default=-1)

        def claims(chosen, order=order, m=m):
            return torch.tensor([i in {order[r] for r in chosen} for i in range(m)]).double()

        wanted = claims(range(first))
        hints = [
            (torch.tensor([v <= level for v in values]), "That is no correction at all: each p is compared with the level itself."),
            (torch.tensor([v <= level / m for v in values]), "That is Bonferroni: every p is compared with level / m. Holm's second step is milder, level / (m - 1), and so on."),
            (claims([r for r in range(m) if passed[r]]), "You go on after the first that fails; it and all larger p-values are not claimed."),
            (claims(range(last + 1)), "You look for the last p-value that holds (Hochberg's step-up); Holm stops at the first that fails."),
            (claims(range(step + 1)), "Those are Benjamini and Hochberg's thresholds, level * rank / m: they bound the share of false claims, not the chance of any."),
            (1 - wanted, "True and False are exchanged: True means claimed."),
            (torch.tensor([float(rank < first) for rank in range(m)]), "The answers come in sorted order; put them back where their p-values came from."),
        ]  # fmt: skip
        actual = answer(torch.tensor(values), level)
        expect_shape(actual, (m,), "the result")
        expect_close(actual, wanted, f"the result for {values} at level {level}", hints=hints)
    return "Right in seven cases, in the order of the p-values."
