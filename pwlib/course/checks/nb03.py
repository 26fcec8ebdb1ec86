"""Checks of notebook 03: keys for a kernel, separable means, barycentric weights, the lattice's gradient, windows."""

from __future__ import annotations

import itertools
import math

import torch

from pwlib.course.checks import exercise, expect, expect_close, expect_shape


@exercise("03.1", title="Keys for another kernel", minutes=15, difficulty=2)
def queries_and_keys(answer):
    for points, d in ((6, 2), (9, 3)):
        features, scale = torch.randn(points, d), 0.3 + 2 * torch.rand(d)
        result = answer(features.clone(), scale.clone())
        expect(
            isinstance(result, tuple | list) and len(result) == 2,
            "Return two tensors: (query, key), each with one row a pixel.",
        )
        query, key = (torch.as_tensor(part).double() for part in result)
        features, scale = features.double(), scale.double()
        expect(query.ndim == 2, f"The query has shape {list(query.shape)}; expected [{points}, E].")
        expect_shape(query, (points, query.shape[1]), "the query")
        expect_shape(key, query.shape, "the key, as wide as the query,")

        product, square = (scale * features) @ features.T, (scale * features.square()).sum(1)
        plain = features @ features.T

        def attention(score):
            return torch.softmax(score, dim=1)

        wanted = attention(product - square / 2)
        hints = [
            (
                attention(plain - features.square().sum(1) / 2),
                "The precisions s_c are missing: that is the kernel with the same precision in all directions.",
            ),
            (attention(product - square), "The half is missing: the key's last entry is -1/2 sum_c s_c f_jc²."),
            (
                attention(product + square / 2),
                "The sign of the key's last entry is wrong: it has to lower the scores of keys with large norms.",
            ),
            (
                attention(product),
                "The keys do not carry their own length: without -1/2 sum_c s_c f_jc² points with large features get the "
                "largest weights, however far they are. (On the query's side the term would cancel.)",
            ),
            (
                attention((product - square / 2) / math.sqrt(query.shape[1])),
                "The scores are divided by sqrt(E), as in transformers; here the scale is 1.",
            ),
            (
                attention((product - square / 2) / math.sqrt(d)),
                "The scores are divided by sqrt(D); here the scale is 1.",
            ),
            (
                attention((scale.square() * features) @ features.T - square / 2),
                "s_c stands on both sides of the product: put it into the query or the key (or its root into both).",
            ),
            (
                attention(plain - square / 2),
                "The product has no s_c: scale the query (or the key) as well as the key's last entry.",
            ),
            (
                attention((scale.square() * features) @ features.T - (scale * features).square().sum(1) / 2),
                "The features are multiplied by s_c; the distance has s_c (f_i - f_j)², so multiply by its root.",
            ),
        ]
        expect_close(attention(query @ key.T), wanted, "the attention they give", hints=hints)
    return "Any Gaussian is attention: its exponent is a dot product, up to a term that the softmax cancels."


@exercise("03.2", title="A mean, by two small products", minutes=10, difficulty=2)
def spatial_mean(answer):
    for labels, height, width, theta in ((2, 5, 5, 1.5), (3, 4, 7, 2.5)):
        q = torch.softmax(2 * torch.randn(labels, height, width), 0)

        def gaussian(length, exponent):
            place = torch.arange(length, dtype=torch.float32)
            return torch.exp(-(place[:, None] - place).square() / exponent)

        def both(gy, gx, q=q):
            return torch.einsum("yh,khw,xw->kyx", gy, q, gx)

        def by_row(matrix):
            return matrix / matrix.sum(1, keepdim=True)

        gy, gx = gaussian(height, 2 * theta**2), gaussian(width, 2 * theta**2)
        sy, sx = gy.sum(1).rsqrt(), gx.sum(1).rsqrt()
        wanted = both(by_row(gy), by_row(gx))
        hints = [
            (both(gy, gx), "The messages are not normalised: divide by n, what the kernel gives for all ones."),
            (
                both(sy[:, None] * gy * sy, sx[:, None] * gx * sx),
                "That is the symmetric normalisation; 'row' divides by the pixel's own n, after filtering.",
            ),
            (
                both(by_row(gy).T, by_row(gx).T),
                "The columns are divided by their sums: divide the rows, so that every pixel receives a weighted mean.",
            ),
            (
                both(by_row(gy), by_row(gx).T),
                "A transpose is missing: row x of G_x holds the weights of pixel x, so the product is G_y q G_x^T.",
            ),
            (
                both(by_row(gy).T, by_row(gx)),
                "G_y is transposed: row y of G_y holds the weights of pixel y, so the product is G_y q G_x^T.",
            ),
            (
                both(gy / gy.sum(), gx / gx.sum()),
                "One sum over the whole matrix divides everything; each pixel has its own n.",
            ),
            (
                both(by_row(gaussian(height, theta**2)), by_row(gaussian(width, theta**2))),
                "The 2 in the exponent is missing: exp(-d² / (2 theta²)).",
            ),
            (
                both(by_row(gaussian(height, 2 * theta)), by_row(gaussian(width, 2 * theta))),
                "theta is not squared in the exponent: exp(-d² / (2 theta²)).",
            ),
            (
                both(by_row(gaussian(height, 4 * theta**2)), by_row(gaussian(width, 4 * theta**2))),
                "The 2 is squared along with theta: the exponent is -d² / (2 theta²), not -d² / (2 theta)².",
            ),
            (both(by_row(gy), torch.eye(width)), "Only the columns are filtered; the rows come next."),
            (both(torch.eye(height), by_row(gx)), "Only the rows are filtered; the columns come next."),
            (
                both(gy, gx) / both(gy, gx).sum((1, 2), keepdim=True),
                "Each label is divided by its own total over the image; n is a sum of weights, not of q.",
            ),
            (wanted.movedim(0, -1), "The result is [H, W, K]; expected [K, H, W]."),
        ]
        expect_close(answer(q.clone(), theta), wanted, "the message", hints=hints)
    return "The message is a weighted mean over all pixels, from two matrices no larger than H x H and W x W."


@exercise("03.3", title="Barycentric weights", minutes=10, difficulty=1)
def barycentric(answer):
    for d in (1, 2, 2, 5):
        # Corners far from a common plane, so that rounding to float32 leaves the weights as they are.
        corners = torch.eye(d + 1)[:, 1:] + 0.2 * torch.randn(d + 1, d)
        wanted = torch.softmax(torch.randn(d + 1), 0)
        point = wanted @ corners
        distance = (corners - point).norm(dim=1)
        near, equal = 1 / distance, torch.full((d + 1,), 1 / (d + 1))
        shortest = torch.linalg.lstsq(corners.T, point[:, None]).solution[:, 0]
        hints = [
            (
                near / near.sum(),
                "Those are inverse distances: they sum to 1, but the corners averaged with them do not give the point.",
            ),
            (
                (-distance.square() / 2).softmax(0),
                "Those are Gaussian weights; barycentric ones solve sum_k b_k c_k = p exactly.",
            ),
            (equal, "All weights are equal: that is the simplex's centre, not the point."),
            (wanted.flip(0), "The weights are in reverse order; weight k belongs to corner k."),
            (wanted[1:], "The weight of corner 0 is missing: the others, and 1 minus their sum."),
            (
                lambda a, s=shortest: a.shape == s.shape and torch.allclose(a, s.double(), atol=1e-4),
                "The row of ones is missing: without sum b = 1 there are more numbers than equations.",
            ),
            (
                lambda a, k=d + 1: a.shape == (k,) and not math.isclose(a.sum(), 1, abs_tol=1e-4),
                "The weights do not sum to 1.",
            ),
        ]
        expect_close(answer(point.clone(), corners.clone()), wanted, "b", hints=hints)
    return "These are the weights that the lattice computes by sorting, in any dimension."


def _chains(directions: int, vertices: int) -> torch.Tensor:
    """Return the neighbours [directions, vertices, 2] of a random lattice: in each direction chains with gaps."""
    table = torch.full((directions, vertices, 2), vertices)
    for j in range(directions):
        order = torch.randperm(vertices).tolist()
        for place, (one, two) in enumerate(itertools.pairwise(order)):
            if place % 4 != 3:
                table[j, one, 0], table[j, two, 1] = two, one
    return table


def _lattice(values, where, weight, neighbours, *, reverse=False, lost=False, tap=0.5, at_once=False, wrap=False):
    """Splat, blur and slice; the options plant known mistakes."""
    vertices = neighbours.shape[1]
    shares = (weight[..., None] * values[:, None]).flatten(0, 1)
    table = values.new_zeros(vertices, values.shape[1])
    if lost:
        table[where.flatten()] += shares
    else:
        table = table.index_add(0, where.flatten(), shares)
    start = table
    for beside in reversed(list(neighbours)) if reverse else neighbours:
        source = start if at_once else table
        absent = source[-1:] if wrap else torch.zeros_like(source[:1])
        table = table + tap * torch.cat([source, absent])[beside].sum(1)
    return (weight[..., None] * table[where]).sum(1)


@exercise("03.4", title="Backwards through the lattice", minutes=20, difficulty=3)
def lattice_backward(answer):
    for d, points, vertices in ((2, 20, 12), (3, 30, 15)):
        where = torch.stack([torch.randperm(vertices)[: d + 1] for _ in range(points)])
        weight = torch.softmax(torch.randn(points, d + 1), 1)
        neighbours = _chains(d + 1, vertices)
        values = torch.randn(points, 2, requires_grad=True)
        grad = torch.randn(points, 2)
        parts = (where, weight, neighbours)
        (wanted,) = torch.autograd.grad(_lattice(values, *parts), values, grad)  # the oracle: autograd
        plain = grad.detach()
        hints = [
            (
                _lattice(plain, *parts),
                "That is the forward pass: the blurs run in the same order. Transposing a product reverses it.",
            ),
            (
                _lattice(plain, *parts, reverse=True, lost=True),
                "Points that share a vertex overwrite each other: table[where] += … keeps only the last; index_add_ "
                "adds all.",
            ),
            (
                _lattice(plain, *parts, lost=True),
                "Points that share a vertex overwrite each other (table[where] += …), and the blurs are not reversed.",
            ),
            (_lattice(plain, *parts, tap=0), "The blurs are missing: that is splat and slice alone."),
            (
                _lattice(plain, *parts, reverse=True, tap=1.0),
                "A neighbour sends 1/2 of its value, here it sends all of it.",
            ),
            (_lattice(plain, *parts, reverse=True, tap=0.25), "A neighbour sends 1/2 of its value, here it sends 1/4."),
            (
                _lattice(plain, *parts, at_once=True),
                "Each blur works on what the one before it left; here all of them read the splat.",
            ),
            (
                _lattice(plain, *parts, reverse=True, wrap=True),
                f"Index {vertices} means that there is no neighbour; here it reads the last vertex.",
            ),
            (
                wanted / (1 + 2.0**-d),
                "The result includes the gain, which the exercise leaves out.",
            ),
        ]
        expect_close(
            answer(plain.clone(), where.clone(), weight.clone(), neighbours.clone()), wanted, "dL/dv", hints=hints
        )
    return "The gradient is the same chain in reverse order, and as fast as the message."


@exercise("03.5", title="How much of a kernel lies in a window", minutes=10, difficulty=1)
def share(answer):
    for theta, radius in ((3.0, 2), (0.8, 1), (20.0, 12)):

        def axis(low, high, exponent, theta=theta):
            place = torch.arange(low, high + 1, dtype=torch.float64)
            return torch.exp(-place.square() / exponent).sum().item()

        far, exponent = math.ceil(12 * theta), 2 * theta**2
        line = axis(-radius, radius, exponent) / axis(-far, far, exponent)
        grid = torch.arange(-far, far + 1, dtype=torch.float64)
        squares = grid[:, None].square() + grid.square()
        weight = torch.exp(-squares / exponent)
        hints = [
            (line, "That is the share along one axis; the window has two."),
            (1 - line**2, "That is the share outside the window."),
            (
                (weight * (squares <= radius**2)).sum() / weight.sum(),
                "That is a disc of radius r; the window is a square, corners included.",
            ),
            (
                (axis(-radius, radius, theta**2) / axis(-far, far, theta**2)) ** 2,
                "The 2 in the exponent is missing: exp(-d² / (2 theta²)).",
            ),
            (
                (axis(-radius, radius, 4 * theta**2) / axis(-far, far, 4 * theta**2)) ** 2,
                "The 2 is squared along with theta: the exponent is -d² / (2 theta²), not -d² / (2 theta)².",
            ),
            (
                (axis(-radius, radius - 1, exponent) / axis(-far, far, exponent)) ** 2,
                "The last row and column of the window are missing: it reaches from -r to r, both included.",
            ),
            (
                (axis(0, radius, exponent) / axis(0, far, exponent)) ** 2,
                "Only distances from 0 up are summed; the window reaches to both sides, and its centre counts once.",
            ),
            (
                (2 * radius + 1) ** 2 / (2 * far + 1) ** 2,
                "That counts pixels; sum their weights instead.",
            ),
            (100 * line**2, "That is in percent; return a share between 0 and 1."),
            (
                (axis(-radius, radius, exponent)) ** 2,
                "That is the window's sum; divide it by the sum over all pixels.",
            ),
            (
                math.erf(radius / theta / math.sqrt(2)) ** 2,
                "That is the integral from -r to r, which covers half of the outermost pixels; sum the weights at the pixels.",
            ),
            (
                math.erf((radius + 0.5) / theta / math.sqrt(2)) ** 2,
                "That is an integral over the window's area, as in the cell above: close, but the exercise sums the weights at the window's pixels.",
            ),
        ]
        expect_close(answer(theta, radius), line**2, f"the share for theta = {theta}, r = {radius}", hints=hints)
    return "A 5x5 window contains 0.06 % of a kernel with a standard deviation of 80 pixels."
