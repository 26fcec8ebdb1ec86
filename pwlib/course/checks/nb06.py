"""Checks of notebook 06: gradient of a pairwise term, tree counting, the box above a node, pairs by node, directions."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pwlib.course.checks import WrongAnswer, exercise, expect, expect_close


@exercise("06.1", title="The gradient of a pairwise term", minutes=10, difficulty=2)
def piece_gradient(answer):
    for edges, labels in ((6, 3), (4, 2), (1, 4)):
        scores = (2 * torch.randn(edges, labels, labels)).double()
        first, second = torch.randint(labels, (2, edges))
        if edges > 1:
            first[0], second[0] = 0, 1  # an edge whose ends differ, so that exchanging them shows
        # The oracle: finite differences of the loss, one entry at a time.
        wanted, step = torch.zeros_like(scores), 1e-5

        def loss(z, first=first, second=second):
            logs = [z[e, a, b] - z[e].exp().sum().log() for e, (a, b) in enumerate(zip(first, second, strict=True))]
            return -sum(logs) / len(z)

        for index in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
            nudge = torch.zeros_like(scores)
            nudge[tuple(index)] = step
            wanted[tuple(index)] = (loss(scores + nudge) - loss(scores - nudge)) / (2 * step)
        hot, turned = torch.zeros_like(scores), torch.zeros_like(scores)
        hot[torch.arange(edges), first, second] = 1
        turned[torch.arange(edges), second, first] = 1
        softmax = wanted * edges + hot
        by_row, by_column = scores.softmax(2), scores.softmax(1)
        hints = [
            (-wanted, "The sign is wrong: the loss is *minus* log P_V, so its gradient is softmax - one-hot."),
            (wanted * edges, "The loss is a mean over the E edges; you left out 1 / E."),
            ((by_row - hot) / edges, "Your softmax runs over the second label only; an edge has one softmax over all K * K pairs of labels."),
            (by_row - hot, "Your softmax runs over the second label only; an edge has one softmax over all K * K pairs of labels."),
            ((by_column - hot) / edges, "Your softmax runs over the first label only; an edge has one softmax over all K * K pairs of labels."),
            (by_column - hot, "Your softmax runs over the first label only; an edge has one softmax over all K * K pairs of labels."),
            ((scores.flatten().softmax(0).view_as(scores) - hot) / edges, "Your softmax runs over the edges, too; each edge has a softmax of its own."),
            (scores.flatten().softmax(0).view_as(scores) - hot, "Your softmax runs over the edges, too; each edge has a softmax of its own."),
            ((softmax - turned) / edges, "The 1 is subtracted with the ends exchanged: the first end's label selects the row."),
            (softmax - turned, "The 1 is subtracted with the ends exchanged: the first end's label selects the row."),
            (softmax / edges, "The one-hot is missing: subtract 1 at the true pair of labels."),
            (softmax, "The one-hot is missing: subtract 1 at the true pair of labels."),
            ((softmax.log() - hot) / edges, "That is the log-softmax less one-hot; the gradient has the softmax itself."),
        ]  # fmt: skip
        expect_close(answer(scores.float(), first.clone(), second.clone()), wanted, "the gradient", hints=hints)
    return "Your gradient equals finite differences on every edge."


@exercise("06.2", title="The same energy, regrouped", minutes=15, difficulty=3)
def regrouped(answer):
    chain = torch.tensor([[1, 0], [2, 1], [3, 2]])
    grid = torch.tensor([[0, 1], [1, 2], [3, 4], [4, 5], [0, 3], [1, 4], [2, 5]])
    both_ways = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0], [2, 3]])
    for nodes, edges, labels in ((6, grid, 3), (4, chain, 2), (4, both_ways, 3)):
        log_u = torch.randn(nodes, labels).log_softmax(1)
        log_v = torch.randn(len(edges), labels * labels).log_softmax(1)
        log_v = log_v.view(-1, labels, labels)
        rho = (nodes - 1) / len(edges)
        unary, degree, outgoing = log_u.clone(), torch.zeros(nodes), torch.zeros(nodes)
        for p, q in edges.tolist():  # term by term, as in the formula
            unary[p] -= rho * log_u[p]
            unary[q] -= rho * log_u[q]
            degree[p] += 1
            degree[q] += 1
            outgoing[p] += 1
        result = answer(log_u.clone(), log_v.clone(), edges.clone())
        expect(
            isinstance(result, tuple | list) and len(result) == 2,
            "Return two tensors: (unary, pair), [N, K] and [E, K, K].",
        )
        first, second = edges.unbind(1)
        bracket = log_v - log_u[first][:, :, None] - log_u[second][:, None, :]
        hints = [
            (log_v, "pair is not scaled: multiply every edge's log P_V by rho = (N - 1) / E."),
            (log_v / rho, "You divide by rho; multiply, so that an edge counts less."),
            (nodes / len(edges) * log_v, "rho is (N - 1) / E: a tree on N nodes has N - 1 edges, one less than nodes."),
            (len(edges) / nodes * log_v, "rho is upside down: (N - 1) / E."),
            (rho * bracket, "That is the bracket, with log P_U subtracted from every pair; here the pairs have to be a multiple of log_v."),
            (bracket, "That is the bracket, with log P_U subtracted from every pair; here the pairs have to be a multiple of log_v."),
        ]  # fmt: skip
        expect_close(result[1], rho * log_v, "pair", hints=hints)
        d, o = degree[:, None], outgoing[:, None]
        hints = [
            (log_u, "The nodes still have all of their log P_U; every edge subtracts rho times it at both of its ends."),
            ((1 - rho * o) * log_u, "You count only the edges of which a node is the *first* end; those of which it is the second end count too."),
            ((1 - rho * (d - o)) * log_u, "You count only the edges of which a node is the *second* end; those of which it is the first end count too."),
            ((1 - d) * log_u, "Each edge subtracts rho times log P_U, not all of it."),
            ((1 - rho) * log_u, "You subtract rho once; subtract it once for every edge that touches the node."),
            (rho * (1 - d) * log_u, "You multiply the node's own log P_U too by rho; only what the edges subtract has the factor: 1 - rho * degree."),
            (rho * log_u, "You multiply the node's log P_U by rho; it stays whole, and every edge subtracts rho times it: 1 - rho * degree."),
            (-rho * d * log_u, "The node's own log P_U is lost: 1 - rho * degree, not -rho * degree."),
            ((1 + rho * d) * log_u, "You add log P_U once more for every edge; subtract it."),
            ((1 - rho * d.mean()) * log_u, "You use the mean degree; each node has its own number of edges."),
        ]  # fmt: skip
        expect_close(result[0], unary, "unary", hints=hints)
    return "The same energy for every labelling, on a grid, a chain and a graph with edges in both directions."


@exercise("06.3", title="Who is in the box?", minutes=10, difficulty=2)
def neighbours_of(answer):
    height, width, half, up = 7, 9, 2, 3

    def drawn(node, where):
        """Return the cells of the map for which where(rows down, columns right) is true."""
        row, column = divmod(node, width)
        cells = ((r, c) for r in range(height) for c in range(width))
        return {r * width + c for r, c in cells if where(r - row, c - column)}

    for node in (40, 58, 13, 36, 44, 18, 4, 0, 62):  # inside, then at every border and in corners
        result = answer(node, height, width, half, up)
        try:
            named = [int(v) for v in result]
        except TypeError:
            raise WrongAnswer("Return a set or list of node numbers.") from None
        expect(len(named) == len(set(named)), f"Node {node} has a neighbour that you list twice.")
        found, wanted = set(named), drawn(node, lambda down, right: -up <= down < 0 and abs(right) <= half)
        slips = [
            (drawn(node, lambda down, right: 0 < down <= up and abs(right) <= half), "That is the box *below* the node: rows count downwards, so what is above has a smaller row number."),
            (drawn(node, lambda down, right: -up <= down <= 0 and abs(right) <= half), "The node's own row is in your box; the lowest row of the box is the one above the node."),
            (drawn(node, lambda down, right: -up <= down <= 0 and abs(right) <= half and (down or right)), "The node's own row is in your box; the lowest row of the box is the one above the node."),
            (drawn(node, lambda down, right: abs(down) <= half and abs(right) <= half and (down or right)), "That is the box of 'surrounding', centred on the node; this one lies above it."),
            (drawn(node, lambda down, right: -up <= down < 0 and -half <= right < half), "The last column is missing: the box reaches `half` columns to *either* side, and range() stops one early."),
            (drawn(node, lambda down, right: -up < down < 0 and abs(right) <= half), "The top row is missing: the box is `up` rows high."),
            (drawn(node, lambda down, right: -half <= down < 0 and abs(right) <= up), "half and up are exchanged: `up` rows high, `half` columns to either side."),
            (drawn(node, lambda down, right: -up <= down < 0 and abs(right) <= half and right), "The column straight above the node is missing: only the node itself is not its own neighbour."),
        ]  # fmt: skip
        if found != wanted:
            for slip, message in slips:
                expect(found != slip, message)
            row, column = divmod(node, width)
            outside = sorted(v for v in found if not 0 <= v < height * width)
            expect(not outside, f"Node {node} gets the neighbour {next(iter(outside), '')}, which is not on the map.")
            wrapped = [v for v in found - wanted if abs(v % width - column) > half]
            expect(
                not wrapped,
                f"Node {node} is at (row {row}, column {column}) and gets node {min(wrapped, default='')}, at the other border: test "
                "the column before you turn (row, column) into a number.",
            )
            raise WrongAnswer(
                f"Node {node} of a {height}x{width} map, half {half}, up {up}: expected {sorted(wanted)}, got {sorted(found)}."
            )
    return "Inside, at every border, and in the corners."


class _CountNumbers(TorchDispatchMode):
    """Count the numbers in the results of all operations, views included."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@exercise("06.4", title="Pairs without pairs", minutes=15, difficulty=3)
def hidden_of_pairs(answer):
    for nodes, channels, width, count in ((5, 3, 4, 9), (12, 160, 5, 400)):
        features = torch.randn(nodes, channels)
        weight = torch.randn(width, 3 * channels) / channels**0.5
        bias = torch.randn(width)
        edges = torch.randint(nodes, (count, 2))
        edges[0] = torch.tensor([0, 1])

        def by_loop(parts, edges=edges, features=features, weight=weight, bias=bias, times=1):
            """Compute one row for each edge from concatenated features, as in the paper."""
            rows = [torch.cat(parts(features[p], features[q])) for p, q in edges.tolist()]
            return torch.stack([weight @ row + times * bias for row in rows])

        before = by_loop(lambda f, g: (f, g, f - g))
        wanted = before.clamp(min=0)
        one, two, three = weight.split(channels, 1)
        first, second = edges.unbind(1)
        of_first, of_second = features @ (one + three).T, features @ (two - three).T
        hints = [
            (before, "The ReLU is missing."),
            (by_loop(lambda f, g: (f, g, f - g), times=2).relu(), "The bias is in there twice: give it to one of the two products, not to both."),
            (by_loop(lambda f, g: (f, g, f - g), times=0).relu(), "The bias is missing."),
            (by_loop(lambda f, g: (f, g, g - f)).relu(), "The difference is turned round: f_i - f_j, the first end less the second."),
            (by_loop(lambda f, g: (g, f, g - f)).relu(), "The ends are exchanged: edges[:, 0] is i, and W_1 belongs to f_i."),
            (by_loop(lambda f, g: (f, g, 0 * f)).relu(), "The difference is missing: the last C columns of W act on f_i - f_j."),
            (by_loop(lambda f, g: (f, g, f)).relu(), "W_3 acts on f_i only; it acts on f_i - f_j, so f_j gets W_2 - W_3."),
            (by_loop(lambda f, g: (f, g, -g)).relu(), "W_3 acts on f_j only; it acts on f_i - f_j, so f_i gets W_1 + W_3."),
            ((of_first + bias).relu()[first] + of_second.relu()[second], "You take the ReLU of each node; it comes after the two are added, at the edge."),
        ]  # fmt: skip
        with _CountNumbers() as counter:
            result = answer(features.clone(), edges.clone(), weight.clone(), bias.clone())
        expect_close(result, wanted, "the hidden layer", hints=hints)
        # Picking, concatenating or multiplying features edge by edge takes C numbers for each edge; a row of the
        # products has only H, which is 32 times fewer here.
        expect(
            count < 10 * nodes or counter.numbers < count * channels,
            f"The result is right, but the intermediate results have {counter.numbers} numbers, more than C for each of the "
            f"{count} edges: multiply the {nodes} nodes by the matrices first, then pick rows of the products.",
        )
    return "The same numbers, without concatenating any pair."


@exercise("06.5", title="Which way round?", minutes=5, difficulty=1)
def rather_above(answer):
    for labels in (3, 5):
        table = torch.rand(labels, labels) + 0.05
        table = table / table.sum()
        rows = table.tolist()
        quotient = torch.tensor(
            [[rows[a][b] / rows[b][a] for b in range(labels)] for a in range(labels)], dtype=torch.float64
        )
        wanted = quotient.log()
        below = table / table.sum(1, keepdim=True)
        above = table / table.sum(0)
        expected = table.sum(1, keepdim=True) * table.sum(0)
        hints = [
            (-wanted, "It is turned round: entry [a, b] is about b *above* a, which is table[a, b] itself, against table[b, a]."),
            (quotient, "That is the quotient; in nats it is its logarithm."),
            (1 / quotient, "That is a quotient, and the wrong way round; take the logarithm of table[a, b] / table[b, a]."),
            (table - table.T, "That is a difference of probabilities; how much *likelier* is a quotient, and its logarithm."),
            ((below / below.T).log(), "You normalised the rows first: those are probabilities *given* the lower label, and compare two different conditions. Use joint ones."),
            ((above / above.T).log(), "You normalised the columns first: those are probabilities *given* the upper label, and compare two different conditions. Use joint ones."),
            ((table / expected).log(), "That compares with chance; the question is b above a against a above b."),
            (table.log(), "That is the logarithm of 'b above a' alone; compare it with 'a above b', which is also in the table."),
            (quotient.log2(), "Those are bits; nats have the natural logarithm."),
            (quotient.log10(), "That is the logarithm to base 10; nats have the natural one."),
        ]  # fmt: skip
        expect_close(answer(table.clone()), wanted, "the result", hints=hints)
    return "Your matrix is antisymmetric, as it must be."
