"""Checks of notebook 00: why structure."""

import math

import torch

from pwlib.course.checks import WrongAnswer, exercise, expect, expect_close, expect_shape


@exercise("00.1", title="Paint a label map", minutes=5, difficulty=1)
def paint(answer):
    palette = torch.tensor([[10, 20, 30], [200, 0, 0], [0, 150, 80], [0, 0, 0], [90, 90, 90]], dtype=torch.uint8)
    label = torch.randint(4, (5, 7))
    label[0, :3] = 255
    kept = label.clone()
    try:
        picture = answer(label, palette)
    except IndexError as error:
        message = f"255 is no row of the palette ({error}). Replace void by the number of the last row first."
        raise WrongAnswer(message) from None
    expect(torch.equal(label, kept), "Your function changes the label it was given; work on a copy (torch.where does).")
    colours = [[palette[-1 if v == 255 else v] for v in line] for line in label.tolist()]  # pixel by pixel
    wanted = torch.stack([torch.stack(line) for line in colours])
    if tuple(getattr(picture, "shape", ())) == (3, 5, 7):
        raise WrongAnswer("Your picture is [3, H, W]; pictures to look at have the colours last: [H, W, 3].")
    expect_shape(picture, (5, 7, 3), "the picture")
    hints = [
        (_void_as(wanted, label, palette[0]), "Void pixels have the colour of class 0; they get the palette's last row."),
        (
            _void_as(wanted, label, palette[-2]),
            "Void pixels have the colour of the last class; void's row comes after it.",
        ),
        (_void_as(wanted, label, palette[255 % 5]), "Void pixels get row 255 % (K + 1) of the palette, which is the last row only by accident."),
        (lambda p: (p - wanted.flip(-1)).abs().max() == 0, "Red and blue are exchanged; the palette is RGB already."),
    ]  # fmt: skip
    expect_close(picture, wanted, "the picture", hints=hints)
    expect(picture.dtype == torch.uint8, f"The picture is {picture.dtype}; expected torch.uint8, as the palette.")
    return "Every class has its colour, and void has its own."


def _void_as(wanted, label, colour):
    return torch.where((label == 255)[..., None], colour, wanted)


@exercise("00.2", title="Dice from the same table", minutes=10, difficulty=1)
def class_dice(answer):
    label, prediction = torch.randint(4, (400,)), torch.randint(4, (400,))
    label[prediction == 2] = 2  # makes rows and columns differ
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(label.tolist(), prediction.tolist(), strict=True):
        matrix[t, p] += 1
    correct, true, predicted = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
    by_sets = []
    for k in range(5):
        t, p = set((label == k).nonzero()[:, 0].tolist()), set((prediction == k).nonzero()[:, 0].tolist())
        by_sets.append(2 * len(t & p) / (len(t) + len(p)) if t | p else torch.nan)
    dice = torch.tensor(by_sets, dtype=torch.float64)
    both = true + predicted
    hints = [
        (
            correct / (both - correct),
            "That is IoU: the union counts the common pixels once. Dice divides by both sizes.",
        ),
        (correct / both, "You forgot the 2: this is half of Dice, and a perfect prediction would score 0.5."),
        (2 * correct / (both - correct), "2 x intersection over *union* can exceed 1. Dice divides by |T| + |P|."),
        (correct / true, "That is recall: it divides by the true pixels alone and forgives every false alarm."),
        (correct / predicted, "That is precision: it divides by the predicted pixels alone and forgives every miss."),
        (
            dice.nan_to_num(0),
            "A class in neither truth nor prediction has no Dice: nan, not 0. A 0 would enter the mean.",
        ),
        (
            dice.nan_to_num(1),
            "A class in neither truth nor prediction has no Dice: nan, not 1. A 1 would enter the mean.",
        ),
        (dice.nanmean(), "You return the mean; the exercise asks for one number per class, [K]."),
    ]
    expect_close(answer(matrix), dice, "Dice", hints=hints)
    return "Dice by counting equals Dice by sets."


@exercise("00.3", title="The ceiling of a table", minutes=10, difficulty=2)
def ceiling(answer):
    # Cells of very different sizes, so that forgetting to weigh them shows; one is empty.
    counts = torch.tensor([[90, 5, 5], [1, 0, 2], [0, 0, 0], [30, 300, 70], [4, 4, 4]])
    best = 0
    for cell in counts.tolist():
        best += max(cell)
    total = sum(map(sum, counts.tolist()))
    share = counts / counts.sum(1, keepdim=True)
    filled = share[counts.sum(1) > 0]
    posterior = (counts * share.nan_to_num()).sum() / total
    hints = [
        (1 - best / total, "That is the smallest possible *error*; the ceiling is the accuracy, one minus it."),
        (filled.max(1).values.mean(), "Every cell counts alike in your mean; weigh a cell by its number of pixels."),
        (share.nan_to_num().max(1).values.mean(), "Every cell counts alike in your mean, and empty ones as 0; weigh each by its pixels."),
        (counts.max(0).values.sum() / total, "You take the best *cell* of each class; take the best class of each cell (the other dimension)."),
        (counts.sum(0).max() / total, "That predicts the same class in all cells, whatever the cell; take the best class of each cell."),
        (posterior, "You score a classifier that *draws* the class from the cell's shares; always predicting the most frequent class is better."),
        (best, "You return a number of pixels; divide by all pixels."),
        (lambda a: a.isnan().any(), "You get nan: an empty cell gives 0/0. Add up counts first, divide once at the end."),
    ]  # fmt: skip
    expect_close(answer(counts), best / total, "the ceiling", hints=hints)
    return "No classifier that sees only the cell can do better."


@exercise("00.4", title="The probability of a whole object", minutes=10, difficulty=2)
def all_alike(answer):
    _compare_all_alike(answer, torch.tensor([[0.7, 0.3], [0.4, 0.6]]))  # every known slip gives another number here
    _compare_all_alike(answer, torch.full((2, 2), 0.5))
    _compare_all_alike(answer, torch.rand(4, 3).softmax(1))
    _compare_all_alike(answer, torch.eye(3)[[1, 1, 1]])
    return (
        "For 60 pixels and two classes of probability 1/2 it is 1.7e-18: independent pixels hardly ever form an object."
    )


def _compare_all_alike(answer, q):
    n, k = q.shape
    wanted = 0.0
    for labelling in torch.cartesian_prod(*[torch.arange(k)] * n):  # all K^N of them
        if (labelling == labelling[0]).all():
            wanted += torch.stack([q[i, labelling[i]] for i in range(n)]).prod().item()
    hints = [
        (
            q.prod(0),
            "You return one number per class; the probabilities of 'all class 0', 'all class 1' and so on add up.",
        ),
        (
            q.max(1).values.prod(),
            "That is the probability of the single most likely labelling, whose labels may differ.",
        ),
        (q.prod(0).max(), "That is the most likely class alone; the other classes count as well: add them."),
        (q.sum(0).prod(), "Sum and product are exchanged: multiply over pixels (dim 0), add over classes."),
        (q.prod(1).sum(), "You multiply over classes (dim 1); independence multiplies over *pixels*, dim 0."),
        (q.prod(), "You multiply everything; a pixel has one class at a time: multiply over pixels, add over classes."),
        (q.prod(0).mean(), "You average over the classes; the probabilities of events that exclude each other add."),
        (math.log(wanted), "That is the logarithm of the probability; return its exponential."),
        (q.mean(0).pow(n).sum(), "You use the mean of the marginals; every pixel has its own."),
        (lambda a: (a > 1 + 1e-6).any(), "A probability above 1: check what you add and what you multiply."),
    ]
    expect_close(answer(q), wanted, f"the probability for q of shape [{n}, {k}]", hints=hints)


@exercise("00.5", title="How often do neighbours agree?", minutes=15, difficulty=2)
def neighbour_agreement(answer):
    for height, width in ((6, 9), (9, 4), (1, 8)):
        label = torch.randint(3, (height, width))
        label[:, : width // 2] = 1
        label[torch.rand(height, width) < 0.25] = 255
        _compare_agreement(answer, label)
    return "Every touching pair is counted once, void ones never."


def _compare_agreement(answer, label):
    height, width = label.shape
    rows = label.tolist()

    def count(pairs, void=False):
        pairs = [(a, b) for a, b in pairs if void or 255 not in (a, b)]
        return sum(a == b for a, b in pairs), len(pairs)

    across = [(rows[y][x], rows[y][x + 1]) for y in range(height) for x in range(width - 1)]
    down = [(rows[y][x], rows[y + 1][x]) for y in range(height - 1) for x in range(width)]
    round_the_edge = [(rows[y][x], rows[y][x - 1]) for y in range(height) for x in range(width)]
    round_the_edge += [(rows[y][x], rows[y - 1][x]) for y in range(height) for x in range(width)]
    skewed = [(rows[y][x], rows[y + 1][x + 1]) for y in range(height - 1) for x in range(width - 1)]

    def share(pairs, void=False):
        equal, total = count(pairs, void)
        return equal / total if total else float("nan")

    def mean(*values):
        values = [value for value in values if value == value]  # a direction without pairs has a share of nan
        return sum(values) / len(values)

    known = count(across + down)[1]
    equal, everything = count(across + down, void=True)
    masked = [count(pairs)[0] / len(pairs) if pairs else float("nan") for pairs in (across, down)]
    hints = [
        (share(across), "You count the pairs side by side only; add the pairs one above the other."),
        (share(across, True), "You count the pairs side by side only, and void as a class: add the pairs one above the other, leave out void."),
        (share(down), "You count the pairs one above the other only; add the pairs side by side."),
        (share(down, True), "You count the pairs one above the other only, and void as a class: add the pairs side by side, leave out void."),
        (equal / everything, "Pairs with void are counted, and two void pixels even count as agreeing; leave such pairs out."),
        (count(across + down)[0] / everything, "You leave void out of the equal pairs but not out of the total: void lowers your share."),
        ((share(across) + share(down)) / 2, "You average two shares; the directions have different numbers of pairs. Add counts, divide once."),
        (mean(share(across, True), share(down, True)), "You average two shares that count void as a class. Leave out every pair with void; then add counts over both directions and divide once."),
        (mean(*masked), "You average two shares, and void is in their totals. Count only pairs without void; then add counts over both directions and divide once."),
        (share(round_the_edge), "Your pairs wrap around the image's edge (torch.roll?): the left edge does not touch the right one."),
        (share(skewed), "You compare diagonal neighbours; pairs that touch differ in one coordinate."),
        (1 - count(across + down)[0] / known, "That is how often neighbours *disagree*."),
        (lambda a: a.isnan().any(), "You get nan where one direction has no pairs (an image one pixel high): add counts, divide once."),
    ]  # fmt: skip
    expect_close(answer(label), count(across + down)[0] / known, f"the share for a {height}x{width} label", hints=hints)
