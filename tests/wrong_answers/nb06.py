"""Planted wrong answers to the exercises of notebook 06, each with a part of the message that it must get."""

import torch


def hot(scores, first, second):
    result = torch.zeros_like(scores)
    result[torch.arange(len(scores)), first, second] = 1
    return result


def over_all(scores):
    return torch.softmax(scores.flatten(1), 1).view_as(scores)


def rho_of(log_u, edges):
    return (len(log_u) - 1) / len(edges)


def degrees(log_u, ends):
    return torch.bincount(ends.flatten(), minlength=len(log_u))[:, None]


def with_bracket(log_u, log_v, edges):
    ends = log_u[edges[:, 0]][:, :, None] + log_u[edges[:, 1]][:, None, :]
    return log_u, rho_of(log_u, edges) * (log_v - ends)


def box(rows, columns, border=True):
    """neighbours_of with these ranges of (row, column), each a function of (node's, half, up)."""

    def neighbours_of(node, height, width, half, up):
        row, column = divmod(node, width)
        cells = [(r, c) for r in rows(row, half, up) for c in columns(column, half, up)]
        if border:
            cells = [(r, c) for r, c in cells if 0 <= r < height and 0 <= c < width]
        return {r * width + c for r, c in cells}

    return neighbours_of


def either_side(column, half, up):
    return range(column - half, column + half + 1)


def above(row, half, up):
    return range(row - up, row)


def concatenated(features, edges, weight, bias):
    first, second = features[edges[:, 0]], features[edges[:, 1]]
    return torch.relu(torch.cat([first, second, first - second], 1) @ weight.T + bias)


def edge_by_edge(features, edges, weight, bias):
    rows = [weight @ torch.cat([features[p], features[q], features[p] - features[q]]) + bias for p, q in edges.tolist()]
    return torch.relu(torch.stack(rows))


def by_nodes(first_bias=1, second_bias=0, sign=1, swapped=False, third=True):
    def hidden_of_pairs(features, edges, weight, bias):
        one, two, three = weight.chunk(3, 1)
        three = sign * three if third else 0 * three
        p, q = edges.flip(1).unbind(1) if swapped else edges.unbind(1)
        of_first, of_second = features @ (one + three).T + first_bias * bias, features @ (two - three).T
        return torch.relu(of_first[p] + of_second[q] + second_bias * bias)

    return hidden_of_pairs


def relu_of_nodes(features, edges, weight, bias):
    one, two, three = weight.chunk(3, 1)
    of_first, of_second = features @ (one + three).T + bias, features @ (two - three).T
    return of_first.relu()[edges[:, 0]] + of_second.relu()[edges[:, 1]]


def given_the_lower(table):
    rows = table / table.sum(1, keepdim=True)
    return (rows / rows.T).log()


WRONG = {
    "06.1": [
        (lambda z, a, b: (z.softmax(2) - hot(z, a, b)) / len(z), "second label only"),
        (lambda z, a, b: (z.softmax(1) - hot(z, a, b)) / len(z), "first label only"),
        (lambda z, a, b: over_all(z) - hot(z, a, b), "left out 1 / E"),
        (lambda z, a, b: (hot(z, a, b) - over_all(z)) / len(z), "The sign is wrong"),
        (lambda z, a, b: (over_all(z) - hot(z, b, a)) / len(z), "ends exchanged"),
        (lambda z, a, b: over_all(z) / len(z), "one-hot is missing"),
        (lambda z, a, b: (torch.softmax(z.flatten(), 0).view_as(z) - hot(z, a, b)) / len(z), "over the edges, too"),
    ],
    "06.2": [
        (with_bracket, "That is the bracket"),
        (lambda u, v, e: ((1 - degrees(u, e)) * u, v), "pair is not scaled"),
        (lambda u, v, e: ((1 - degrees(u, e)) * u, rho_of(u, e) * v), "rho times log P_U, not all"),
        (lambda u, v, e: ((1 - rho_of(u, e) * degrees(u, e[:, 0])) * u, rho_of(u, e) * v), "*first* end"),
        (lambda u, v, e: ((1 - rho_of(u, e)) * u, rho_of(u, e) * v), "once for every edge"),
        (lambda u, v, e: (-rho_of(u, e) * degrees(u, e) * u, rho_of(u, e) * v), "own log P_U is lost"),
        (lambda u, v, e: (u, len(u) / len(e) * v), "N - 1 edges"),
        (lambda u, v, e: (rho_of(u, e) * (1 - degrees(u, e)) * u, rho_of(u, e) * v), "own log P_U too"),
        (lambda u, v, e: (rho_of(u, e) * u, rho_of(u, e) * v), "it stays whole"),
        (lambda u, v, e: rho_of(u, e) * v, "Return two tensors"),
    ],
    "06.3": [
        (box(lambda row, half, up: range(row + 1, row + up + 1), either_side), "*below*"),
        (box(lambda row, half, up: range(row - up, row + 1), either_side), "own row"),
        (box(above, lambda column, half, up: range(column - half, column + half)), "last column"),
        (box(above, either_side, border=False), "not on the map"),
        (lambda *given: {v for v in box(above, either_side, border=False)(*given) if 0 <= v < 63}, "other border"),
        (box(lambda row, half, up: range(row - up + 1, row), either_side), "top row is missing"),
        (lambda node, height, width, half, up: box(above, either_side)(node, height, width, up, half), "exchanged"),
        (lambda node, height, width, half, up: node - width, "set or list"),
    ],
    "06.4": [
        (concatenated, "multiply the 12 nodes"),
        (edge_by_edge, "C for each of the 400 edges"),
        (by_nodes(1, 1), "twice"),
        (by_nodes(0, 0), "bias is missing"),
        (by_nodes(sign=-1), "turned round"),
        (by_nodes(swapped=True), "ends are exchanged"),
        (by_nodes(third=False), "difference is missing"),
        (relu_of_nodes, "ReLU of each node"),
    ],
    "06.5": [
        (lambda table: (table.T / table).log(), "turned round"),
        (lambda table: table / table.T, "its logarithm"),
        (lambda table: table - table.T, "difference of probabilities"),
        (given_the_lower, "Use joint ones"),
        (lambda table: (table / (table.sum(1, keepdim=True) * table.sum(0))).log(), "compares with chance"),
    ],
}  # fmt: skip
