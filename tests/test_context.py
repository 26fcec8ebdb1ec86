"""The contextual CRF: boxes drawn and counted, pair energies by a double loop, trees by enumeration, gradients, planted
faults, and a map that only context can label."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from pwlib import context, graph
from pwlib.context import ContextualCRF, PairwiseNet, box_edges, box_offsets
from pwlib.graph import LIKELIHOODS
from pwlib.losses import cross_entropy, pairwise_nll

K, C, H, W = 3, 4, 5, 6


def make(num_classes=K, channels=C, temperature=1.0, **options):
    torch.manual_seed(0)
    crf = ContextualCRF(num_classes, channels, **{"hidden": 8, **options}).double()
    for network in crf.networks.values():  # as if trained
        torch.nn.init.normal_(network.scores.weight, std=0.7)
        torch.nn.init.normal_(network.scores.bias, std=0.7)
        torch.nn.init.normal_(network.of_first.bias, std=0.3)
    torch.nn.init.constant_(crf.log_temperature, math.log(temperature))
    return crf


def problem(batch=2, num_classes=K, channels=C, size=(H, W), seed=1, void=0.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, *size, generator=g, dtype=torch.float64)
    features = torch.randn(batch, channels, *size, generator=g, dtype=torch.float64)
    label = torch.randint(0, num_classes, (batch, *size), generator=g)
    return logits, features, label.masked_fill(torch.rand(batch, *size, generator=g) < void, 255)


# ---------------------------------------------------------------------------------------------------------------- graph


def drawn(relation, height, width, reach=Fraction(2, 5)):
    """{(p, q)} by drawing every node's box over every cell, in exact arithmetic; a box reaches one cell at least."""
    side = reach * min(height, width)
    half, up = max(side / 2, 1), max(side, 1)
    found = set()
    for p, q in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        down, right = q[0] - p[0], q[1] - p[1]
        tall = abs(down) <= half if relation == "surrounding" else -up <= down < 0
        if tall and abs(right) <= half and p != q:
            found.add((p[0] * width + p[1], q[0] * width + q[1]))
    return found


@pytest.mark.parametrize("relation", context.RELATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 5), (7, 4), (10, 12), (13, 15)])
def test_edges_are_the_drawn_boxes(relation, size):
    edges = box_edges(relation, *size)
    found = list(map(tuple, edges.tolist()))
    assert set(found) == drawn(relation, *size) and len(found) == len(set(found))
    assert [p for p, _ in found] == sorted(p for p, _ in found)


def test_counts_known_by_hand():
    """A short side of 10: boxes of 4 cells, so 5x5 cells around a node (2 to either side), and 4x5 above one."""
    assert len(box_offsets("surrounding", 10)) == 24 and len(box_offsets("above_below", 10)) == 20
    assert len(box_offsets("surrounding", 10, reach=0.6)) == 48
    # On 10x10, of 5x5 cells around, rows and columns keep 3, 4, 5, …, 5, 4, 3: 44 in all; less each node itself.
    assert len(box_edges("surrounding", 10, 10)) == 44**2 - 100
    # Above: rows keep 0, 1, 2, 3, 4, …: 30 in all.
    assert len(box_edges("above_below", 10, 10)) == 30 * 44


@pytest.mark.parametrize("relation", context.RELATIONS)
@pytest.mark.parametrize("short_side", [10, 14, 20, 33, 60])
def test_a_sample_of_24_spans_the_same_box(relation, short_side):
    box = {tuple(o) for o in box_offsets(relation, short_side).tolist()}
    sample = [tuple(o) for o in box_offsets(relation, short_side, neighbours=24).tolist()]
    assert set(sample) <= box and len(sample) == len(set(sample)) == min(24, len(box))
    for axis in (0, 1):
        sides = [{o[axis] for o in some} for some in (box, sample)]
        assert (min(sides[0]), max(sides[0])) == (min(sides[1]), max(sides[1]))
        gaps = {b - a for a, b in itertools.pairwise(sorted(sides[1]))}
        assert max(gaps) - min(gaps) <= 1  # regular, to the cell


def test_above_below_looks_up():
    """The first number of an offset counts rows down, so cells above have a negative one."""
    above = box_offsets("above_below", 10)
    assert above[:, 0].min() == -4 and above[:, 0].max() == -1
    edges = box_edges("above_below", 4, 3)
    assert (edges[:, 1] // 3 < edges[:, 0] // 3).all()


def test_surrounding_has_every_pair_in_both_orders_and_above_in_one():
    pairs = {relation: set(map(tuple, box_edges(relation, 6, 7).tolist())) for relation in context.RELATIONS}
    assert pairs["surrounding"] == {(q, p) for p, q in pairs["surrounding"]}
    assert pairs["above_below"].isdisjoint({(q, p) for p, q in pairs["above_below"]})


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("residual", [False, True])
def test_pairwise_terms_are_those_of_concatenated_pairs(residual):
    """A double loop over nodes: concatenate [f_p, f_q], linear, ReLU, linear; P_U of both ends added, or not."""
    crf, (logits, features, _) = make(residual=residual), problem()
    terms, log_u = crf.pairwise_terms(logits, features), logits.log_softmax(1).flatten(2)
    for relation, network in crf.networks.items():
        joint = torch.cat([network.of_first.weight, network.of_second.weight], 1)
        at = {edge: e for e, edge in enumerate(map(tuple, box_edges(relation, H, W).tolist()))}
        seen = 0
        for p, q in itertools.product(range(H * W), repeat=2):
            if (p, q) in at:
                for b in range(2):
                    pair = torch.cat([features[b, :, p // W, p % W], features[b, :, q // W, q % W]])
                    hidden = (joint @ pair + network.of_first.bias).relu()
                    expected = (network.scores.weight @ hidden + network.scores.bias).view(K, K)
                    expected = expected + residual * (log_u[b, :, p, None] + log_u[b, None, :, q])
                    torch.testing.assert_close(terms[relation][b, at[p, q]], expected - expected.exp().sum().log())
                    seen += 1
        assert seen == 2 * len(at)


def test_order_and_relation_matter():
    crf, (logits, features, _) = make(), problem()
    terms = crf.pairwise_terms(logits, features)["surrounding"]
    edges = box_edges("surrounding", H, W)
    at = {edge: e for e, edge in enumerate(map(tuple, edges.tolist()))}
    back = torch.tensor([at[q, p] for p, q in edges.tolist()])
    # V(y_p, y_q) of (p, q) is not V(y_q, y_p) of (q, p), or the network would be symmetric.
    assert (terms - terms[:, back].transpose(2, 3)).abs().amax((2, 3)).min() > 0.01
    rows = features.flatten(2).transpose(1, 2)
    one, other = (network(rows, edges) for network in crf.networks.values())
    assert (one - other).abs().amax((2, 3)).min() > 0.01
    # Swapping the two networks changes the marginals.
    before = crf(logits, features)
    crf.networks["surrounding"], crf.networks["above_below"] = crf.networks["above_below"], crf.networks["surrounding"]
    assert (crf(logits, features) - before).abs().max() > 0.01


def test_first_layer_starts_as_one_layer_of_both_ends():
    """He's deviation for 2C inputs: hidden units behind the ReLU have the mean square of the inputs."""
    torch.manual_seed(0)
    network = PairwiseNet(64, 3, 512)
    features = torch.randn(1, 200, 64)
    edges = torch.randint(0, 200, (300, 2))
    hidden = torch.relu(network.of_first(features)[:, edges[:, 0]] + network.of_second(features)[:, edges[:, 1]])
    assert hidden.square().mean().item() == pytest.approx(1, rel=0.1)
    assert network(features, edges).softmax(-1).sub(1 / 3).abs().max() < 0.35


# ------------------------------------------------------------------------------------------------------------ inference


def by_hand(crf, logits, features, iterations):
    """log_q of the first image from the module's formulas, one edge at a time: `counting`, weights, temperature."""
    height, width = logits.shape[-2:]
    log_u = torch.log_softmax(logits[0].flatten(1).T, -1)
    all_edges, terms = [], []
    log_v = crf.pairwise_terms(logits, features)
    for relation, weight in zip(crf.relations, crf.weight, strict=True):
        all_edges += box_edges(relation, height, width, reach=crf.reach, neighbours=crf.neighbours).tolist()
        terms += [(weight, term) for term in log_v[relation][0]]
    rho = 1.0 if crf.counting == "sum" else (height * width - 1) / len(all_edges)
    if crf.counting == "tree":
        ends = (log_u[p][:, None] + log_u[q][None] for p, q in all_edges)
        terms = [(weight, term - both) for (weight, term), both in zip(terms, ends, strict=True)]
    elif crf.counting == "reparametrised":
        terms = [(w, (term.exp() / term.exp().sum(1)[:, None] / term.exp().sum(0)).log()) for w, term in terms]
    q = log_u.exp()
    for _ in range(iterations):
        score = log_u.clone()
        for (first, second), (weight, term) in zip(all_edges, terms, strict=True):
            score[first] += rho * weight * term @ q[second]
            score[second] += rho * weight * term.T @ q[first]
        q = torch.softmax(score / crf.log_temperature.exp(), -1)
    return q.log().T.reshape(-1, height, width)


@pytest.mark.parametrize("counting", context.COUNTING)
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_inference_is_the_loop(counting, iterations):
    crf, (logits, features, _) = make(counting=counting, temperature=1.3), problem()
    crf.weight.data = torch.tensor([1.3, 0.7], dtype=torch.float64)
    log_q = crf(logits, features, iterations=iterations)
    torch.testing.assert_close(log_q[0], by_hand(crf, logits, features, iterations))
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(2, H, W, dtype=torch.float64))
    alone = crf(logits[1:], features[1:], iterations=iterations)
    torch.testing.assert_close(log_q[1:], alone)  # the images of a batch are independent


@pytest.mark.parametrize("counting", context.COUNTING)
def test_a_trace_is_what_forward_does_and_its_parts_add_up(counting):
    crf, (logits, features, _) = make(counting=counting, temperature=1.3), problem(1)
    crf.weight.data = torch.tensor([1.3, 0.7], dtype=torch.float64)
    image = torch.rand(3, 4 * H, 4 * W)
    trace = crf.trace(logits, features, image, iterations=3)
    assert trace.kernels == context.RELATIONS and trace.iterations == 3 and trace.image is not None
    for t in range(4):
        torch.testing.assert_close(trace.q[t].log(), crf(logits, features, iterations=t)[0].detach())
    for t in range(3):
        again = torch.softmax(-trace.unary - trace.pairwise[t], 0)
        torch.testing.assert_close(trace.q[t + 1], again)
        torch.testing.assert_close(trace.pairwise[t], -trace.messages[t].sum(0))
    single = make(counting=counting, temperature=1.3, relations=("surrounding",))
    assert single.trace(logits[0], features[0], image).messages.shape == (3, 1, K, H, W)
    with pytest.raises(ValueError, match="expected one map"):
        crf.trace(logits.expand(2, -1, -1, -1), features, image)


@pytest.mark.parametrize("relation", context.RELATIONS)
def test_a_message_of_the_trace_is_what_edges_add_beyond_their_nodes(relation):
    """One edge at a time, from the formula in the module's head."""
    crf, (logits, features, _) = make(), problem(1)
    trace, log_u = crf.trace(logits, features, torch.rand(3, 8, 8)), logits[0].log_softmax(0).flatten(1).T
    edges = {r: e.tolist() for r, e in crf.edges(H, W).items()}
    rho = (H * W - 1) / sum(map(len, edges.values()))
    expected, q = torch.zeros(H * W, K, dtype=torch.float64), log_u.exp()
    terms = crf.pairwise_terms(logits, features)[relation]
    for (first, second), log_v in zip(edges[relation], terms[0].detach(), strict=True):
        beyond = rho * (log_v - log_u[first][:, None] - log_u[second][None])
        expected[first] += beyond @ q[second]
        expected[second] += beyond.T @ q[first]
    torch.testing.assert_close(trace.messages[0, crf.relations.index(relation)].flatten(1).T, expected)


@pytest.mark.parametrize("counting", context.COUNTING)
def test_free_energy_of_a_trace_is_the_divergence_less_log_z(counting):
    """KL(Q || P) by enumerating all labellings of a 2x3 map."""
    crf, (logits, features, _) = make(counting=counting, temperature=1.2), problem(1, size=(2, 3))
    trace = crf.trace(logits, features, torch.rand(3, 8, 8), iterations=3)
    unary, edges, pair = (part.detach() for part in crf.potentials(logits, crf.pairwise_terms(logits, features)))
    x = graph.labellings(6, K)
    energy = graph.energies(x, unary[0], edges, pair[0])
    for t, q in enumerate(trace.q.flatten(2)):
        log_q_of_x = q.T.log()[torch.arange(6), x].sum(1)
        assert trace.free_energy[t].item() == pytest.approx((log_q_of_x.exp() * (log_q_of_x + energy)).sum().item())


def chain(length=5, num_classes=K, seed=3):
    """Exact inference on a random chain; its marginals as the terms of a map of one column, p - 1 above p."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.tensor([[p, p - 1] for p in range(1, length)])
    unary = torch.randn(length, num_classes, generator=g, dtype=torch.float64)
    pair = 2 * torch.randn(length - 1, num_classes, num_classes, generator=g, dtype=torch.float64)
    truth = graph.infer(unary, edges, pair)
    terms = {"above_below": truth.pair_marginals.log()[None]}
    return edges, truth, truth.marginals.log().T[None, :, :, None], terms


def test_on_a_tree_the_true_marginals_as_terms_give_the_joint():
    edges, truth, logits, terms = chain()
    combined = {}
    for counting in context.COUNTING:
        crf = make(relations=("above_below",), counting=counting)
        unary, found_edges, pair = crf.potentials(logits, terms)
        assert found_edges.tolist() == edges.tolist()
        combined[counting] = graph.infer(unary[0], edges, pair[0])
    for counting in ("tree", "reparametrised"):
        assert combined[counting].log_z.item() == pytest.approx(0, abs=1e-10)
        torch.testing.assert_close(combined[counting].marginals, truth.marginals)
        torch.testing.assert_close(combined[counting].pair_marginals, truth.pair_marginals)
    # The plain sum counts an inner node's evidence three times: its marginals have less than 0.7 of the entropy.
    entropy = {name: torch.special.entr(part.marginals).sum().item() for name, part in combined.items()}
    assert entropy["sum"] < 0.7 * entropy["tree"]


@pytest.mark.parametrize("counting", ["tree", "reparametrised"])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_tree_the_posterior_is_exact_although_the_marginals_differ(counting, seed):
    """Independent evidence is added to a random chain. The terms have seen it ("tree") or not ("reparametrised"), and
    either way the combination is the posterior that enumeration gives for the chain with the evidence."""
    edges, prior, _, terms = chain(seed=seed)
    evidence = 2 * torch.randn(prior.marginals.shape, generator=torch.Generator().manual_seed(seed)).double()
    posterior = graph.infer(-prior.marginals.log() - evidence, edges, -mutual(prior, edges))
    logits = (prior.marginals.log() + evidence).T[None, :, :, None]  # P_U: each node's prior and its own evidence
    if counting == "tree":
        both = evidence[edges[:, 0], :, None] + evidence[edges[:, 1], None, :]
        terms = {"above_below": (terms["above_below"] + both).flatten(2).log_softmax(-1).unflatten(-1, (K, K))}
    own = terms["above_below"][0].exp().sum(2)
    assert (own - logits[0, :, edges[:, 0], 0].softmax(0).T).abs().max() > 0.05, "the marginals differ"
    found = {}
    for name in ("tree", "reparametrised"):
        unary, _, pair = make(relations=("above_below",), counting=name).potentials(logits, terms)
        found[name] = graph.infer(unary[0], edges, pair[0])
    torch.testing.assert_close(found[counting].marginals, posterior.marginals)
    torch.testing.assert_close(found[counting].pair_marginals, posterior.pair_marginals)
    del found[counting]
    assert all((other.marginals - posterior.marginals).abs().max() > 0.02 for other in found.values())


def mutual(exact, edges):
    """Pointwise mutual information of every edge, [E, K, K]."""
    first, second = (exact.marginals[index] for index in edges.unbind(1))
    return (exact.pair_marginals / first[:, :, None] / second[:, None, :]).log()


def test_reparametrised_terms_that_are_products_add_nothing():
    """Whatever their marginals are. "tree" adds rho times the difference between them and P_U for every edge."""
    logits, features, _ = problem()
    g = torch.Generator().manual_seed(5)
    off = {}
    for counting in ("tree", "reparametrised"):
        crf = make(counting=counting)
        parts = {r: torch.randn(2, 2, len(e), K, generator=g).double() for r, e in crf.edges(H, W).items()}
        crf.pairwise_terms = lambda *_, parts=parts: {
            r: a.log_softmax(-1)[..., :, None] + b.log_softmax(-1)[..., None, :] for r, (a, b) in parts.items()
        }
        off[counting] = (crf(logits, features) - logits.log_softmax(1)).abs().max().item()
    assert off["reparametrised"] < 1e-12 and off["tree"] > 0.5


def test_temperature_and_weights():
    crf, (logits, features, _) = make(), problem()
    hot = make(temperature=4.0)
    entropy = [torch.special.entr(one(logits, features).exp()).mean() for one in (crf, hot)]
    assert entropy[1] > entropy[0] + 0.1
    for nothing in (0.0, -0.5):  # without pairwise terms the unary is left
        crf.weight.data.fill_(nothing)
        torch.testing.assert_close(crf(logits, features), logits.log_softmax(1))


def test_an_untrained_context_changes_little():
    """With `residual`, pairwise terms start as the product of their nodes' P_U. Without it they start nearly uniform,
    and "tree" then subtracts more than they contain."""
    logits, features, _ = (x.float() for x in problem())
    unary, off = logits.softmax(1), {}
    for residual in (True, False):
        torch.manual_seed(0)
        crf = ContextualCRF(K, C, residual=residual)
        torch.testing.assert_close(crf(logits, features, iterations=0).exp(), unary)
        off[residual] = (crf(logits, features).exp() - unary).abs().max().item()
    assert off[True] < 0.1 and off[False] > 0.5


# ------------------------------------------------------------------------------------------------------------- learning


def test_pair_loss_is_the_mean_over_edges_of_minus_log_p_v():
    crf, (logits, features, label) = make(), problem(void=0.3)
    total = []
    for relation, log_v in crf.pairwise_terms(logits, features).items():
        for e, (p, q) in enumerate(box_edges(relation, H, W).tolist()):
            for b in range(2):
                y = label[b].flatten()[[p, q]].tolist()
                if 255 not in y:
                    total.append(-log_v[b, e][y[0], y[1]].item())
    assert crf.pair_loss(logits, features, label).item() == pytest.approx(sum(total) / len(total), rel=1e-10)


def test_piecewise_gradients_are_one_hot_minus_softmax():
    crf, (logits, features, label) = make(), problem(void=0.2)
    energies = {name: e.detach().requires_grad_() for name, e in crf.pair_energies(logits, features).items()}
    crf.pair_energies = lambda *_: energies
    logits.requires_grad_()
    crf.loss(logits, features, label).backward()
    known, flat = label != 255, label.flatten(1)
    one_hot = F.one_hot(label.where(known, 0), K).movedim(-1, 1)
    expected = (logits.detach().softmax(1) - one_hot) * known[:, None] / known.sum()
    torch.testing.assert_close(logits.grad, expected)
    ends = {name: (flat[:, e[:, 0]], flat[:, e[:, 1]]) for name, e in crf.edges(H, W).items()}
    count = sum(((p != 255) & (q != 255)).sum() for p, q in ends.values())
    for name, (p, q) in ends.items():
        both = (p != 255) & (q != 255)
        hot = F.one_hot((p * K + q).where(both, 0), K * K).unflatten(-1, (K, K))
        softmax = (-energies[name].detach()).flatten(2).softmax(-1).unflatten(-1, (K, K))
        torch.testing.assert_close(energies[name].grad, (hot - softmax) * both[..., None, None] / count)


def test_edges_first_used_in_inference_mode_still_serve_training():
    crf, (logits, features, label) = make(), problem(size=(3, 11))  # a size that no other test uses: edges are cached
    with torch.inference_mode():
        crf(logits, features)
    crf.pair_loss(logits, features, label).backward()
    assert crf.networks["surrounding"].scores.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("likelihood", ["piecewise", "pseudo", "mean_field", "exact"])
def test_gradients_of_the_networks_by_finite_differences(likelihood):
    size = (2, 3) if likelihood == "exact" else (3, 3)
    residual = likelihood != "piecewise"  # piecewise terms send no gradient to the logits, as finite differences would
    crf = make(2, 2, hidden=3, neighbours=8, residual=residual)
    logits, features, label = problem(1, 2, 2, size)
    parameters = dict(crf.named_parameters())
    inputs = [value.detach().requires_grad_() for value in (*parameters.values(), logits, features)]

    def loss(*values):
        named = dict(zip(parameters, values, strict=False))
        call = {"label": label, "likelihood": likelihood}
        return torch.func.functional_call(Loss(crf), {f"crf.{n}": v for n, v in named.items()}, values[-2:], call)

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6)


class Loss(torch.nn.Module):
    def __init__(self, crf):
        super().__init__()
        self.crf = crf

    def forward(self, logits, features, **options):
        return self.crf.loss(logits, features, **options)


def test_each_likelihood_uses_the_potentials():
    crf, (logits, features, label) = make(), problem(size=(2, 3), void=0.2)
    unary, edges, pair = crf.potentials(logits, crf.pairwise_terms(logits, features))
    initial = -logits.log_softmax(1).flatten(2).transpose(1, 2)
    expected = {
        "exact": LIKELIHOODS["exact"](unary, edges, pair, label.flatten(1)),
        "pseudo": LIKELIHOODS["pseudo"](unary, edges, pair, label.flatten(1)),
        "mean_field": LIKELIHOODS["mean_field"](unary, edges, pair, label.flatten(1), iterations=3, initial=initial),
    }
    for name, value in expected.items():
        torch.testing.assert_close(crf.loss(logits, features, label, name), value)
    torch.testing.assert_close(expected["mean_field"], F.cross_entropy(crf(logits, features), label, ignore_index=255))


def test_every_learnable_parameter_has_a_gradient():
    crf, (logits, features, label) = make(), problem()
    F.nll_loss(crf(logits, features), label).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in crf.parameters())
    frozen = make()
    logits.requires_grad_(), features.requires_grad_()
    F.nll_loss(frozen(logits, features, frozen=True), label).backward()
    assert {n for n, p in frozen.named_parameters() if p.grad is not None} == {"weight", "log_temperature"}
    assert logits.grad is None and features.grad is None
    for name in ("weight", "log_temperature"):
        torch.testing.assert_close(getattr(frozen, name).grad, getattr(crf, name).grad)
    piecewise = make()
    piecewise.pair_loss(logits, features.detach(), label).backward()
    assert logits.grad is None
    assert {n for n, p in piecewise.named_parameters() if p.grad is None} == {"weight", "log_temperature"}


def test_the_weight_of_a_harmful_relation_becomes_zero_and_returns_when_it_helps():
    """The label of a cell is what its own logits state, or what the cell above has in its features; the pairwise terms
    prefer the latter. Adam's momentum carries the weight below 0, where it counts as 0."""
    crf, (logits, features, _) = make(2, 2, relations=("above_below",)), problem(4, 2, 2, (6, 6))
    above = F.pad(features[:, :, :-1], (0, 0, 1, 0)).argmax(1)  # [B, h, w]
    edges = crf.edges(6, 6)["above_below"]
    index = features.argmax(1).flatten(1)[:, edges[:, 1]]  # [B, E]: what the upper cell prefers
    terms = torch.full((4, len(edges), 2, 2), 0.02).double()
    terms = terms.scatter_(2, index[..., None, None].expand(-1, -1, 1, 2), 0.48).log()
    crf.pairwise_terms = lambda *_: {"above_below": terms}
    optimizer = torch.optim.Adam([crf.weight], lr=0.05)

    def learn(label, steps):
        for _ in range(steps):
            loss = F.nll_loss(crf(logits, features, frozen=True), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    learn((2 * logits).argmax(1), 100)
    assert -1 < crf.weight.item() <= 0
    learn(above, 100)
    assert crf.weight.item() > 0.3


def test_class_weights_cancel_in_what_a_pair_adds_beyond_its_nodes():
    """Label pairs occur as often as a table of counts states. The weighted pairwise term is stationary at
    log(count w_a w_b), the weighted unary at log(count w_a), so in log P_V - log P_U - log P_U the weights cancel."""
    counts = torch.tensor([[5, 2, 0], [1, 7, 3], [2, 1, 4]]) + 1
    first, second = (
        end.repeat_interleave(counts.flatten())[None] for end in (torch.arange(9) // 3, torch.arange(9) % 3)
    )
    w = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def slope(factor):
        scores = (counts.double().log() + factor * (w.log()[:, None] + w.log())).requires_grad_()
        energy = -scores.expand(1, first.shape[1], -1, -1)
        return torch.autograd.grad(pairwise_nll(energy, first, second, class_weights=w), scores)[0].abs().max().item()

    assert slope(1.0) < 1e-12 and slope(0.5) > 0.01
    unary = (counts.sum(1).double() * w).log().requires_grad_()
    loss = cross_entropy(unary.view(1, 3, 1, 1).expand(-1, -1, first.shape[1], -1), first[..., None], class_weights=w)
    assert torch.autograd.grad(loss, unary)[0].abs().max() < 1e-12


def look_alikes(count, seed):
    """Maps of two bands, label 0 above 1, which a feature distinguishes. Objects, which another feature marks, have
    label 2 in the upper band and 3 in the lower: the features at an object's own cell do not distinguish 2 from 3."""
    g = torch.Generator().manual_seed(seed)
    label = torch.zeros(count, 10, 12, dtype=torch.int64)
    horizon = torch.randint(4, 7, (count,), generator=g)
    label[torch.arange(10)[None, :] >= horizon[:, None]] = 1
    band = label.clone()
    rows, columns = (torch.randint(0, n, (count, 6), generator=g) for n in (10, 12))
    objects = torch.zeros_like(label, dtype=torch.bool)
    objects[torch.arange(count)[:, None], rows, columns] = True
    label = torch.where(objects, band + 2, label)
    features = torch.stack([band.float() * ~objects, (1 - band).float() * ~objects, objects.float()], 1)
    return features + 0.3 * torch.randn(features.shape, generator=g), label


@pytest.mark.slow
def test_context_distinguishes_labels_that_the_unary_cannot():
    """Trained without inference on fixed features, then three iterations. The unary is at chance on objects."""
    torch.manual_seed(0)
    crf, head = ContextualCRF(4, 3, hidden=16, neighbours=24), torch.nn.Conv2d(3, 4, 1)
    optimizer = torch.optim.AdamW([*crf.parameters(), *head.parameters()], 0.02)
    for step in range(80):
        features, label = look_alikes(8, step)
        loss = F.cross_entropy(head(features), label) + crf.pair_loss(head(features), features, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, label = look_alikes(40, 10**6)
    with torch.no_grad():
        unary, log_q = head(features), crf(head(features), features)
    objects = label > 1
    accuracy = [(scores.argmax(1) == label)[objects].float().mean().item() for scores in (unary, log_q)]
    assert accuracy[0] < 0.6 and accuracy[1] > 0.85
    rest = [(scores.argmax(1) == label)[~objects].float().mean().item() for scores in (unary, log_q)]
    assert rest[1] >= rest[0] - 0.02

    class Swapped(ContextualCRF):  # a planted fault: the nodes of an edge mistaken for each other
        def pairwise_terms(self, logits, features):
            return {r: log_v.transpose(2, 3) for r, log_v in super().pairwise_terms(logits, features).items()}

    crf.__class__ = Swapped
    with torch.no_grad():
        wrong = (crf(unary, features).argmax(1) == label)[objects].float().mean().item()
    assert wrong < accuracy[1] - 0.2


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"iterations": -1}, "iterations is -1"),
        ({"counting": "twice"}, "'twice'; expected one of tree, reparametrised, sum"),
        ({"relations": ()}, "relations are"),
        ({"relations": ("below",)}, "'below'; expected one of surrounding, above_below"),
        ({"relations": ("surrounding", "surrounding")}, "each once"),
        ({"reach": 0.0}, "reach is 0.0"),
        ({"neighbours": 20}, "neighbours is 20; expected an odd square less 1"),
    ],
)
def test_impossible_crfs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_single_cell_has_no_context():
    """A map of one cell has no edge: the marginals are the unary's, and the pairwise loss is 0."""
    crf, (logits, features, label) = make(), problem(size=(1, 1))
    torch.testing.assert_close(crf(logits, features), logits.log_softmax(1))
    loss = crf.pair_loss(logits, features, label)
    loss.backward()
    assert loss.item() == 0


def test_what_does_not_fit_is_named():
    crf, (logits, features, label) = make(), problem()
    for call, message in [
        (lambda: crf(logits[:, 1:], features), r"expected \[2, 3, 5, 6\]"),
        (lambda: crf(logits, features[..., 1:]), "the features' size"),
        (lambda: crf(logits, features[:, 1:]), r"expected \[B, 4, h, w\]"),
        (lambda: crf.pair_loss(logits, features, label + K), r"label holds [345]; expected 0..2"),
        (lambda: crf.loss(logits, features, label, "guess"), "'guess'; expected one of exact"),
        (lambda: box_offsets("surrounding", 40, neighbours=20), "odd square less 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
