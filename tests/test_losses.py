"""Losses, against loops over pixels, torch's own loss, finite differences and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pwlib.course.piecewise import sample_pairs, structured
from pwlib.crf import DenseCRF
from pwlib.losses import balanced_weights, cross_entropy, pairwise_nll


class Table(nn.Module):
    """A CRF for tests: V(a, b) of a pair is a learnable table, multiplied by the first pixel's red channel."""

    def __init__(self, num_classes, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(torch.randn(num_classes, num_classes, generator=g, dtype=dtype))

    def pair_energy(self, image, first, second):
        red = image[:, 0].flatten(1).gather(1, first).to(self.table)
        return red[..., None, None] * self.table


def example(batch=2, num_classes=4, size=(5, 6), seed=0, void=0.2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, num_classes, *size, generator=g, dtype=dtype) * 2
    label = torch.randint(0, num_classes, (batch, *size), generator=g)
    return scores, label.masked_fill(torch.rand(batch, *size, generator=g) < void, 255)


def labelled(scores, label):
    """(probabilities as a list, true class) of every labelled pixel, with the softmax written out."""
    for b, row, column in (label != 255).nonzero().tolist():
        z = [math.exp(s) for s in scores[b, :, row, column].tolist()]
        yield [x / sum(z) for x in z], label[b, row, column].item()


# ---------------------------------------------------------------------------------------------------- against formulas


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0, 2.0]])
def test_cross_entropy_by_hand(weights):
    scores, label = example()
    w = weights or [1.0] * 4
    pixels = list(labelled(scores, label))
    expected = sum(-w[y] * math.log(p[y]) for p, y in pixels) / sum(w[y] for _, y in pixels)
    given = None if weights is None else torch.tensor(weights)
    assert cross_entropy(scores, label, class_weights=given).item() == pytest.approx(expected, rel=1e-12)
    given = None if weights is None else given.double()
    assert F.cross_entropy(scores, label, given, ignore_index=255).item() == pytest.approx(expected, rel=1e-12)


def test_structured_by_hand():
    """Every term normalised by itself, by explicit sums over K and K*K."""
    scores, label = example(num_classes=3)
    image, crf = torch.rand(2, 3, 5, 6, dtype=torch.float64), Table(3)
    first, second = sample_pairs(label, 9, generator=torch.Generator().manual_seed(1))
    second[0, 0] = (label[0] == 255).flatten().nonzero()[0]  # one void end
    second[1, 1] = first[1, 1]  # one pixel with itself
    pairs, table = [], crf.table.tolist()
    for b in range(2):
        for i, j in zip(first[b].tolist(), second[b].tolist(), strict=True):
            yi, yj = label[b].flatten()[i].item(), label[b].flatten()[j].item()
            if 255 in (yi, yj) or i == j:
                continue
            red = image[b, 0].flatten()[i].item()
            z = sum(math.exp(-red * table[a][c]) for a in range(3) for c in range(3))
            pairs.append(red * table[yi][yj] + math.log(z))
    assert len(pairs) == 16
    unary = [-math.log(p[y]) for p, y in labelled(scores, label)]
    expected = sum(unary) / len(unary) + sum(pairs) / len(pairs)
    found = structured(scores, label, image, crf, pairs=(first, second))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_a_term_in_its_scores_is_softmax_minus_one_hot():
    scores, label = example(num_classes=3)
    scores.requires_grad_()
    cross_entropy(scores, label).backward()
    known = label != 255
    one_hot = F.one_hot(label.masked_fill(~known, 0), 3).movedim(-1, 1)
    expected = (scores.detach().softmax(1) - one_hot) * known[:, None] / known.sum()
    torch.testing.assert_close(scores.grad, expected)

    energy = torch.randn(2, 7, 3, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.randint(0, 3, (2, 2, 7))
    pairwise_nll(energy, *ends).backward()
    one_hot = F.one_hot(ends[0] * 3 + ends[1], 9).view(2, 7, 3, 3)
    p = (-energy.detach()).flatten(2).softmax(-1).view(2, 7, 3, 3)
    torch.testing.assert_close(-energy.grad, (p - one_hot) / 14)  # in the score z = -V


def test_under_potts_a_pairwise_term_learns_how_often_pixels_agree():
    """With mu = [a != b] and one strength w, the minimum is at w = log((K - 1) agree / disagree)."""
    num_classes, agree, pairs = 5, 0.9, 4000
    g = torch.Generator().manual_seed(0)
    first = torch.randint(0, num_classes, (1, pairs), generator=g)
    second = torch.where(torch.arange(pairs) < agree * pairs, first, (first + 1) % num_classes)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    potts = 1 - torch.eye(num_classes, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pairwise_nll((w * potts).expand(1, pairs, -1, -1), first, second)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.item() == pytest.approx(math.log((num_classes - 1) * agree / (1 - agree)), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_finite_differences():
    scores, label = example(size=(3, 3))
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, label), scores.requires_grad_())


def test_structured_gradients_reach_logits_and_crf():
    scores, label = example(num_classes=3, size=(3, 4))
    image, crf, pairs = torch.rand(2, 3, 3, 4, dtype=torch.float64), Table(3), sample_pairs(label, 8)
    table = crf.table.detach().clone().requires_grad_()

    def loss(s, t):
        crf.pair_energy = lambda image, first, second: image[:, :1, 0, :1, None] * t.expand(2, 8, 3, 3)
        return structured(s, label, image, crf, pairs=pairs)

    assert torch.autograd.gradcheck(loss, (scores.requires_grad_(), table))


def test_structured_moves_every_parameter_of_the_dense_crf():
    """Against central differences in float64, through the real potentials, which contain a pair's normaliser."""
    torch.manual_seed(0)
    logits, label = example(num_classes=3, size=(6, 7))
    image = torch.rand(2, 3, 6, 7, dtype=torch.float64)
    crf = DenseCRF(3, theta_alpha=4.0, theta_beta=60.0, theta_gamma=1.5, filtering="exact").double()
    pairs = sample_pairs(label, 40, generator=torch.Generator().manual_seed(2))

    def loss():
        return structured(logits, label, image, crf, pairs=pairs)

    loss().backward()
    moved = 0
    for name, parameter in crf.named_parameters():
        for i in range(parameter.numel()):
            flat, step, values = parameter.data.view(-1), 1e-5, []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(loss().item())
                flat[i] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(difference, rel=1e-4, abs=1e-8), name
            moved += difference != 0
    assert moved == 2 + 9 + 3  # kernel weights, compatibility, bandwidths


def test_perfect_scores_have_no_loss_and_saturated_ones_a_finite_one():
    _, label = example(void=0.0)
    right = F.one_hot(label, 4).movedim(-1, 1).double() * 200 - 100
    for scores, low, high in ((right, 0, 1e-12), (-right, 0.9, 202)):
        scores = scores.clone().requires_grad_()
        value = cross_entropy(scores, label)
        assert low <= value.item() <= high
        assert torch.autograd.grad(value, scores)[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------- void, and layouts


def test_scores_on_void_do_not_matter():
    scores, label = example()
    other = torch.where((label == 255)[:, None], torch.full_like(scores, 9.0), scores)
    other[:, 0] += 1.0 * (label == 255)
    a, b = (x.clone().requires_grad_() for x in (scores, other))
    losses = [cross_entropy(x, label) for x in (a, b)]
    assert losses[0].item() == losses[1].item()
    gradient = torch.autograd.grad(losses[1], b)[0]
    assert (gradient.movedim(1, -1)[label == 255] == 0).all() and (gradient != 0).any()


def test_a_batch_without_labels_has_a_loss_of_exactly_0():
    scores, label = example()
    label.fill_(255)
    image, crf = torch.rand(2, 3, 5, 6), Table(4)
    net = nn.Conv2d(4, 4, 1).double()
    for loss in (cross_entropy, lambda s, y: structured(s, y, image, crf)):
        value = loss(net(scores), label)
        value.backward()
        assert value.item() == 0
        assert (net.weight.grad == 0).all()
    assert (crf.table.grad == 0).all()


@pytest.mark.parametrize(("batch", "num_classes"), [(1, 2), (1, 4), (2, 2)])
def test_non_contiguous_scores_have_the_same_gradient(batch, num_classes):
    """A crop, channels last, a transposed [N, K] table as mean field makes it: nll_loss fails on some of these."""
    scores, label = example(batch, num_classes)
    expected = scores.clone().requires_grad_()
    cross_entropy(expected, label).backward()
    rows = scores.flatten(2).transpose(1, 2).contiguous()  # [B, N, K]
    for make, leaf in [
        (lambda x: x[..., :5, :6], F.pad(scores, (0, 2, 0, 3))),
        (lambda x: x.permute(0, 3, 1, 2), scores.permute(0, 2, 3, 1).contiguous()),
        (lambda x: x.transpose(1, 2).unflatten(2, (5, 6)), rows),
    ]:
        leaf = leaf.clone().requires_grad_()
        view = make(leaf)
        loss = cross_entropy(view, label)
        (gradient,) = torch.autograd.grad(loss, view, retain_graph=True)
        torch.testing.assert_close(gradient, expected.grad)
        loss.backward()
        assert leaf.grad.shape == leaf.shape


def test_logits_and_log_marginals_have_the_same_loss_and_half_precision_is_widened():
    scores, label = example(dtype=torch.float32)
    torch.testing.assert_close(cross_entropy(scores.log_softmax(1), label), cross_entropy(scores, label))
    half = cross_entropy(scores.bfloat16(), label)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cross_entropy(scores.bfloat16().float(), label))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_labels_of_any_integer_type_have_the_same_loss(dtype):
    """K = 20: the index of a pair of labels, 20 a + b, does not fit into eight bits."""
    scores, label = example(num_classes=20)
    weights = torch.linspace(0.5, 2, 20)
    found = [cross_entropy(scores, one, class_weights=weights) for one in (label, label.to(dtype))]
    assert found[0] == found[1]
    image, crf = torch.rand(2, 3, 5, 6), Table(20)
    pairs = [sample_pairs(one, 30, generator=torch.Generator().manual_seed(1)) for one in (label, label.to(dtype))]
    assert all(torch.equal(*index) for index in zip(*pairs, strict=True))
    found = [structured(scores, one, image, crf, pairs=pairs[0]) for one in (label, label.to(dtype))]
    assert found[0] == found[1]
    ends, energy = label[:, :2].flatten(1), torch.randn(2, 6, 20, 20, dtype=torch.float64)
    found = [pairwise_nll(energy, one[:, :6], one[:, 6:], class_weights=weights) for one in (ends, ends.to(dtype))]
    assert found[0] == found[1]


def test_class_weights_may_be_a_list():
    scores, label = example()
    weights, ends = [1.0, 0.5, 3.0, 2.0], torch.randint(0, 4, (2, 2, 7))
    energy = torch.randn(2, 7, 4, 4)
    found = [cross_entropy(scores, label, class_weights=w) for w in (weights, torch.tensor(weights))]
    assert found[0] == found[1]
    found = [pairwise_nll(energy, *ends, class_weights=w) for w in (weights, torch.tensor(weights))]
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_probabilities_are_rejected_and_other_scores_between_0_and_1_are_not():
    scores, label = example(dtype=torch.float32)
    hard = F.one_hot(scores.argmax(1), 4).movedim(-1, 1).float()
    for probabilities in (scores.softmax(1), scores.softmax(1).half(), hard):
        with pytest.raises(ValueError, match=r"look like probabilities .*probabilities.log\(\)"):
            cross_entropy(probabilities, label)
    for fine in (scores.sigmoid(), scores.softmax(1).clamp(min=1e-12).log(), torch.zeros_like(scores), scores / 100):
        assert cross_entropy(fine, label).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, y: (s.index_fill(0, torch.tensor([0]), math.nan), y), "nan or infinity"),
        (lambda s, y: (s.index_fill(3, torch.tensor([2]), math.inf), y), "nan or infinity"),
        (lambda s, y: (s[:, :1], y), r"\(2, 1, 5, 6\); expected \[B, K, H, W\] with K at least 2"),
        (lambda s, y: (s[0], y), "expected"),
        (lambda s, y: (s, y[:, :3]), r"label has shape \(2, 3, 6\); expected \[2, 5, 6\]"),
        (lambda s, y: (s, y.masked_fill(y == 2, 4)), r"label holds 4; expected 0\.\.3 or 255"),
        (lambda s, y: (s, y.masked_fill(y == 255, -1)), "label holds -1"),
        (lambda s, y: (s, y.float()), "label has dtype torch.float32"),
        (lambda s, y: (s.long(), y), "scores have dtype torch.int64"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*change(*example()))


def test_bad_weights_and_energies_are_named():
    scores, label = example()
    for weights in ([1.0, 2.0], [1.0, 1.0, -1.0, 1.0], [1.0, 1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="expected 4 finite numbers, none negative"):
            cross_entropy(scores, label, class_weights=torch.tensor(weights))
    with pytest.raises(ValueError, match=r"expected \[B, P, K, K\]"):
        pairwise_nll(torch.zeros(1, 4, 3, 2), torch.zeros(1, 4).long(), torch.zeros(1, 4).long())


# ------------------------------------------------------------------------------------------------------------- sampling


def test_pairs_join_labelled_pixels_at_distances_of_every_octave():
    g = torch.Generator().manual_seed(0)
    label = torch.zeros(2, 64, 48).long().masked_fill(torch.rand(2, 64, 48, generator=g) < 0.3, 255)
    first, second = sample_pairs(label, 20000, generator=g)
    for index in (first, second):
        assert (label.flatten(1).gather(1, index) != 255).all()
    dy, dx = first // 48 - second // 48, first % 48 - second % 48
    distance = torch.hypot(dy.double(), dx.double())
    assert distance.min() >= 1 and distance.max() <= math.hypot(64, 48) / 2 + 1
    # Log-uniform in [1, 40]: equally many in each octave, but fewer in the last ones, which more often leave the image.
    octaves = torch.histc(distance[distance >= 1.5].log2(), bins=3, min=math.log2(1.5), max=math.log2(12)) / 40000
    assert (octaves > 0.14).all() and (octaves < 0.26).all()
    assert (distance > 12).double().mean() > 0.1
    # Directions are uniform, and first pixels are uniform over the labelled ones.
    assert abs(dy.double().mean()) < 0.5 and abs(dx.double().mean()) < 0.5
    assert len(first[0].unique()) > 0.9 * (label[0] != 255).sum()


def test_the_same_seed_draws_the_same_pairs():
    label = example(size=(20, 20))[1]
    a, b, c = (torch.stack(sample_pairs(label, 50, generator=torch.Generator().manual_seed(s))) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_images_with_few_pairs():
    label = torch.full((4, 6, 6), 255)
    label[1, 2, 2] = 0  # one labelled pixel
    label[2, 2, 2:4] = 1  # two labelled pixels
    label[3] = 0
    first, second = sample_pairs(label, 30, generator=torch.Generator().manual_seed(0))
    assert (first[:2] == 0).all() and (second[:2] == 0).all()
    assert set(first[2].tolist()) == {14, 15} and (first[2] + second[2] == 29).all()
    assert (first[3] != second[3]).all()
    one = sample_pairs(torch.zeros(1, 1, 1).long(), 5)
    assert torch.stack(one).eq(0).all()
    scores, image = torch.randn(1, 2, 1, 1, dtype=torch.float64), torch.rand(1, 3, 1, 1)
    label = torch.zeros(1, 1, 1).long()
    alone = structured(scores, label, image, Table(2))  # a 1x1 image has a unary term only
    assert alone.item() == cross_entropy(scores, label).item()
    with pytest.raises(ValueError, match="pairs is 0"):
        sample_pairs(label, 0)


# ------------------------------------------------------------------------------------------------------------- weights


def test_balanced_weights():
    counts = torch.tensor([900, 90, 10, 0])
    weights = balanced_weights(counts)
    share = counts[:3] / 1000
    torch.testing.assert_close(weights[:3] / weights[0], (share[0] / share) ** 0.5)
    assert (share * weights[:3]).sum().item() == pytest.approx(1) and weights[3] == 1
    assert torch.equal(balanced_weights(counts, power=0.0), torch.ones(4))
    equal = balanced_weights(counts, power=1.0)[:3] * share  # every class has the same weight in total
    torch.testing.assert_close(equal, equal[:1].expand(3))
    with pytest.raises(ValueError, match="pixel counts"):
        balanced_weights(torch.zeros(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_losses_agree_on_a_gpu():
    scores, label = example()
    image, crf, values = torch.rand(2, 3, 5, 6), Table(4), []
    for device in ("cpu", "cuda"):
        given, g = (scores.to(device), label.to(device)), torch.Generator().manual_seed(0)
        values.append(cross_entropy(*given).item())
        values.append(structured(*given, image.to(device), crf.to(device), generator=g).item())
    assert values[:2] == pytest.approx(values[2:], rel=1e-9)
