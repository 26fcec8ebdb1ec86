"""Figures of notebook 03: fast messages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import colorize
from pwlib.trace import Trace

MARKERS = (("o", COLOURS["blue"]), ("s", COLOURS["vermilion"]), ("^", COLOURS["green"]))  # by remainder
PLANE = np.array([[3**0.5, 1], [-(3**0.5), 1], [0, -2]])  # elevation of two features: [3, 2]
STEPS = np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2]])  # of the lattice, one for each direction
EXTENT = 3.2  # bandwidths


def flat(elevated: np.ndarray | Tensor) -> np.ndarray:
    """Map elevated points [..., 3] to features [..., 2]."""
    return np.asarray(elevated, float) @ PLANE / 6


def vertices(remainder: int, reach: int = 5) -> np.ndarray:
    """Return vertices with this remainder, integers [M, 3]."""
    pairs = itertools.product(range(-reach, reach + 1), repeat=2)
    return np.array([(3 * a + remainder, 3 * b + remainder, -3 * (a + b) - 2 * remainder) for a, b in pairs])


def edges(axes: Axes) -> None:
    """Draw the edges of all triangles in grey."""
    for remainder in range(3):
        start = vertices(remainder)
        for step in STEPS:
            ends = flat(np.stack([start, start + step]))  # [2, M, 2]
            axes.plot(ends[..., 0], ends[..., 1], color="0.85", lw=0.8, zorder=0)


def window(axes: Axes, extent: float, title: str) -> None:
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    axes.set_title(title, fontsize=9)


def attention(row: Tensor, scores: Tensor, attention: Tensor, kernel: Tensor) -> None:
    """Show scores, attention and kernel [W, W] of one image row [3, W], with its pixels along both edges."""
    fig, axes = plots.figure(1, 3, figsize=(11, 3.6))
    titles = ("scores", "attention: softmax of each row", "kernel")
    length = len(scores)
    pixels = row.T.numpy()
    for cell, matrix, title in zip(axes[0], (scores, attention, kernel), titles, strict=True):
        drawn = cell.imshow(matrix, cmap="cividis", vmax=0.15 if "softmax" in title else None)
        cell.imshow(pixels[None], extent=(-0.5, length - 0.5, -2, -6), aspect="auto")
        cell.imshow(pixels[:, None], extent=(-6, -2, length - 0.5, -0.5), aspect="auto")
        cell.set(xlim=(-6, length - 0.5), ylim=(length - 0.5, -6), xlabel="sender j")
        cell.set_title(title, fontsize=9)
        fig.colorbar(drawn, ax=cell, shrink=0.7)
    axes[0, 0].set_ylabel("receiver i")
    alt = (
        f"Three {length} x {length} matrices over the pixels of one row of the portrait, whose colours are shown along "
        "the edges. The scores form stripes. Attention and kernel are near zero except in blocks near the diagonal, "
        "one for each stretch of similar pixels."
    )
    plots.show(fig, alt=alt)


def line(points: Tensor, values: Tensor, nodes: Tensor, splatted: Tensor, blurred: Tensor, curve: tuple) -> None:
    """Show splat, blur and slice in one dimension.

    Args:
        points, values: positions (bandwidths) and values of the points.
        nodes, splatted, blurred: positions of the vertices, and their values after splat and blur.
        curve: positions x, the exact sum of Gaussians there, and what is interpolated from the vertices.
    """
    fig, axes = plots.figure(1, 3, figsize=(11, 2.8), sharey=True)
    x, exact, found = curve
    red, blue = COLOURS["vermilion"], COLOURS["blue"]
    axes[0, 0].stem(points, values, linefmt=red, markerfmt="o", basefmt=" ", label="points")
    axes[0, 0].bar(nodes, splatted, width=0.16, color=blue, alpha=0.7, label="vertices")
    axes[0, 1].bar(nodes, blurred, width=0.16, color=blue, alpha=0.7, label="vertices")
    axes[0, 2].plot(x, exact, color="black", lw=1.2, label="sum of Gaussians")
    axes[0, 2].plot(x, found, "--", color=blue, label="interpolated from vertices")
    axes[0, 2].plot(points, np.interp(points, x, found), "o", color=red, label="result at the points")
    for cell, title in zip(axes[0], ("1. splat", "2. blur", "3. slice"), strict=True):
        cell.set(title=title, xlabel="feature (bandwidths)", xlim=(-5, 5), ylim=(0, 2.2))
        cell.legend(fontsize=7, loc="upper left", frameon=False)
    alt = (
        "A lattice on a line. Splat: three points as stems, and bars at the vertices next to them. Blur: the bars have "
        "spread to a smooth hump. Slice: the piecewise linear curve through the bars is close to the exact sum of "
        f"Gaussians; at its peak it is {found.max():.2f} and the exact one {exact.max():.2f}."
    )
    plots.show(fig, alt=alt)


def plane(elevated: Sequence[float]) -> None:
    """Show the lattice in the plane, one hexagon with its six triangles, and the triangle of an elevated point [3]."""
    fig, axes = plots.figure(1, 3, figsize=(12, 4.2))
    point = np.asarray(elevated, float)
    star = flat(point)
    for cell in axes[0, :2]:
        edges(cell)
    corners = np.array([(1, 1, -2), (2, -1, -1), (1, -2, 1), (-1, -1, 2), (-2, 1, 1), (-1, 2, -1)])
    for centre in vertices(0):
        axes[0, 0].add_patch(Polygon(flat(centre + corners), fill=False, ec="0.35", lw=1.4))
    for remainder, (marker, colour) in enumerate(MARKERS):
        x, y = flat(vertices(remainder)).T
        axes[0, 0].plot(x, y, marker, ls="none", color=colour, ms=6, label=f"remainder {remainder}")
    axes[0, 0].plot(*star, "*", color="black", ms=11, label="a point")
    axes[0, 0].legend(fontsize=8, loc="upper left", framealpha=1)
    window(axes[0, 0], 2.2, "rounding finds the hexagon")
    axes[0, 0].set(xlabel="feature 1 (bandwidths)", ylabel="feature 2 (bandwidths)")
    axes[0, 1].add_patch(Polygon(flat(corners), fill=False, ec="0.35", lw=1.4))
    subscripts = "₀₁₂"
    for first, second in itertools.pairwise([*corners, corners[0]]):
        middle = (first + second) / 3
        order = " < ".join(f"r{subscripts[i]}" for i in middle.argsort())
        axes[0, 1].text(*flat(middle), order, ha="center", va="bottom", fontsize=10)
    axes[0, 1].plot(*star, "*", color="black", ms=9)
    axes[0, 1].set_axis_off()
    window(axes[0, 1], 1.1, "ranking finds the triangle")
    triangle(axes[0, 2], point)
    alt = (
        "Left: a triangular lattice in the plane. Its vertices are circles, squares and triangles for the remainders "
        "0, 1 and 2, and each circle is the centre of a hexagon of six triangles. Middle: one hexagon; each of its "
        "triangles has one of the six orders of the residuals r0, r1, r2. Right: the triangle of one point, with a "
        "closed path over the remainders 0, 1, 2, and the barycentric weights 0.4, 0.2 and 0.4 of its corners."
    )
    plots.show(fig, alt=alt)


def triangle(axes: Axes, point: np.ndarray) -> None:
    """Draw the triangle around an elevated point [3] of the hexagon at the origin, its path and its weights."""
    order = point.argsort()
    path = np.concatenate([np.zeros((1, 3)), -np.cumsum(STEPS[order], 0)])  # three corners, and the first again
    gaps = np.diff(point[order]) / 3
    weights = [1 - gaps.sum(), *gaps]
    spots = flat(path)
    axes.add_patch(Polygon(spots[:3], color=COLOURS["sky"], alpha=0.2))
    for k, (start, end) in enumerate(itertools.pairwise(spots)):
        arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 9, "shrinkB": 9}
        axes.annotate("", end, start, arrowprops=arrow)
        middle = (start + end) / 2 + 0.3 * ((start + end) / 2 - spots[:3].mean(0))
        axes.text(*middle, f"$-u_{order[k]}$", fontsize=11, ha="center", va="center")
    for k, (spot, weight, (marker, colour)) in enumerate(zip(spots[:3], weights, MARKERS, strict=True)):
        axes.plot(*spot, marker, color=colour, ms=9)
        axes.plot(*zip(spot, flat(point), strict=True), color=colour, lw=1 + 6 * weight, alpha=0.5)
        away = spot + 0.42 * (spot - spots[:3].mean(0))
        coordinates = ", ".join(f"{v:.0f}" for v in path[k] + 0.0)
        axes.text(*away, f"$b_{k}$ = {weight:.1f}\n({coordinates})", fontsize=10, ha="center", va="center")
    axes.plot(*flat(point), "*", color="black", ms=12)
    middle = spots[:3].mean(0)
    axes.set(xlim=middle[0] + np.array([-1, 1]), ylim=middle[1] + np.array([-1, 1]), aspect="equal")
    axes.set_axis_off()
    axes.set_title("its corners and weights", fontsize=9)


def response(spots: Tensor, tables: Sequence[Tensor], field: Tensor, point: Tensor) -> None:
    """Show the vertices' values after splat and each blur, and what the whole plane reads, for one point of value 1.

    Args:
        spots: features of the vertices [M, 2].
        tables: values of the vertices [M], after splat and after each of three blurs.
        field: the result [S, S] on a square grid from -3.2 to 3.2 bandwidths, first feature first.
        point: its features [2].
    """
    fig, axes = plots.figure(2, 3, figsize=(10, 7))
    axes = axes.flatten()
    axes[5].set_axis_off()
    titles = ("splat", "blur along direction 0", "then along 1", "then along 2")
    for cell, table, title in zip(axes, tables, titles, strict=False):
        edges(cell)
        there = table > 1e-6
        colour = {"c": table[there], "cmap": "cividis", "vmin": 0, "vmax": tables[-1].max()}
        cell.scatter(*spots[there].T, s=30 + 330 * table[there], edgecolors="k", linewidths=0.5, **colour)
        for spot, value in zip(spots[there].tolist(), table[there].tolist(), strict=True):
            place = {"textcoords": "offset points", "xytext": (0, 8 + 3 * value), "ha": "center"}
            cell.annotate(f"{value:.2f}", spot, fontsize=8, annotation_clip=True, **place)
        cell.plot(*point, "*", color=COLOURS["vermilion"], ms=6)
        window(cell, 3.4, title)
    side = np.linspace(-EXTENT, EXTENT, len(field))
    distance = (side[:, None] - float(point[0])) ** 2 + (side - float(point[1])) ** 2
    last, levels = axes[4], [0.1, 0.3, 0.6, 0.9]
    last.imshow(field.T, origin="lower", extent=(-EXTENT, EXTENT) * 2, cmap="cividis")
    last.contour(side, side, np.exp(-distance / 2).T, levels=levels, colors="white", linewidths=0.8)
    last.contour(side, side, field.T, levels=levels, colors=COLOURS["orange"], linewidths=0.8, linestyles="--")
    window(last, 3, "slice (dashed), Gaussian (white)")
    for cell in axes:
        cell.set(xticks=[], yticks=[])
    alt = (
        "The response to one point. Splat: the three corners of its triangle hold the barycentric weights. Three blurs "
        "spread them along three directions to a hexagonal hump. Slice: the dashed contours of the result are slightly "
        "angular and lie near the white circles of the Gaussian, inside them at the centre."
    )
    plots.show(fig, alt=alt)


def response_by_distance(distance: Tensor, quantiles: Tensor) -> None:
    """Show the 5, 50 and 95 % quantiles [R, 3] of the lattice's weight against the distance [R] in bandwidths."""
    fig, axes = plots.figure(figsize=(6, 3.3))
    chart, gaussian = axes[0, 0], torch.exp(-distance.square() / 2)
    low, middle, high = quantiles.T
    chart.fill_between(distance, low, high, color=COLOURS["blue"], alpha=0.25, label="lattice, 5 to 95 % of pairs")
    chart.plot(distance, middle, "--", color=COLOURS["blue"], label="lattice, median")
    chart.plot(distance, gaussian, color="black", lw=1.2, label="exp(-r²/2)")
    chart.set(xlabel="distance r (bandwidths)", ylabel="weight", ylim=(0, 1.05))
    chart.legend(fontsize=8, frameon=False)
    alt = (
        f"Weight against distance. At {distance[0]:.2f} bandwidths the lattice's median is {middle[0]:.2f} and the "
        f"Gaussian {gaussian[0]:.2f}; beyond 1.5 bandwidths the two curves nearly coincide. The band between the 5 and "
        f"95 % quantiles is at most {(high - low).max():.2f} wide."
    )
    plots.show(fig, alt=alt)


def messages(image: Tensor, sent: Mapping[str, Tensor], labels: Mapping[str, Tensor], region: str) -> None:
    """Show the portrait's messages for one region and its labels, exact and by the lattice, and where they differ.

    Args:
        image: [3, H, W]. sent: {"exact": [H, W], "lattice": [H, W]}. labels: the same keys, int64 [H, W].
    """
    fig, axes = plots.figure(2, 3, figsize=(9, 6.6))
    top = float(sent["exact"].max())
    for cell, (name, message) in zip(axes[0], sent.items(), strict=False):
        drawn = cell.imshow(message, cmap="viridis", vmin=0, vmax=top)
        cell.set_title(f"first bilateral message, {name}", fontsize=9)
    fig.colorbar(drawn, ax=axes[0, 1], shrink=0.8)
    error = sent["lattice"] - sent["exact"]
    limit = float(error.abs().max())
    drawn = axes[0, 2].imshow(error, cmap="RdBu", vmin=-limit, vmax=limit)
    axes[0, 2].set_title("lattice minus exact", fontsize=9)
    fig.colorbar(drawn, ax=axes[0, 2], shrink=0.8)
    for cell, (name, label) in zip(axes[1], labels.items(), strict=False):
        plots.draw(cell, colorize(label, photos.PALETTE), f"labels after 10 iterations, {name}")
    different = labels["exact"] != labels["lattice"]
    plots.draw(axes[1, 2], plots.to_uint8(image.cpu() / 2 + 0.5))
    axes[1, 2].plot(*different.nonzero().flip(1).T, "kx", ms=5)
    axes[1, 2].set_title(f"different labels: {different.sum()} of {different.numel()} pixels", fontsize=9)
    for cell in axes.flat:
        cell.set_axis_off()
    alt = (
        f"Bilateral messages for the region {region} of the portrait, exact and by the lattice. They look alike. Their "
        f"difference, at most {limit:.2f}, forms small patches. The labels after ten iterations also look alike; they "
        f"differ at {different.sum()} of {different.numel()} pixels, which crosses mark on the photograph."
    )
    plots.show(fig, alt=alt)


def cost(cost: Mapping[str, Sequence[tuple[int, float]]], slopes: Mapping[str, float]) -> None:
    """Show the time of one message (s) against the number of pixels for each method, both logarithmic."""
    fig, axes = plots.figure(figsize=(9, 4))
    chart = axes[0, 0]
    styles = [("s:", "black"), ("o-", "vermilion"), ("^--", "green"), ("v-", "blue"), ("D-.", "orange")]
    for (name, points), (style, colour) in zip(cost.items(), styles, strict=True):
        sizes, times = zip(*points, strict=True)
        label = f"{name}: N^{slopes[name]:.1f}"
        chart.loglog(sizes, 1000 * np.array(times), style, color=COLOURS[colour], ms=5, label=label)
    chart.set(xlabel="pixels N", ylabel="time of one message, 21 labels (ms)")
    chart.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    found = "; ".join(f"{name} with exponent {slope:.1f}" for name, slope in slopes.items())
    alt = f"Time of one message against the number of pixels, both axes logarithmic. Time grows as a power: {found}."
    plots.show(fig, alt=alt)


def bandwidth(thetas: np.ndarray, curves: Mapping[str, Sequence[float]], tangents: Mapping[str, Sequence]) -> None:
    """Show a score against theta_beta by exact messages and by the lattice, with tangents.

    Args:
        thetas: in grey levels.
        curves: {"exact": values, "lattice": values}.
        tangents: the same keys, (theta, value, slope) each.
    """
    fig, axes = plots.figure(figsize=(7, 3.4))
    chart, run = axes[0, 0], np.array([-1.2, 1.2])
    for (name, curve), colour in zip(curves.items(), ("black", COLOURS["blue"]), strict=True):
        chart.plot(thetas, curve, color=colour, lw=1.3, label=name)
        for number, (theta, value, slope) in enumerate(tangents[name]):
            label = "gradient" if name == "exact" and number == 0 else None
            chart.plot(theta + run, value + slope * run, "--", color=COLOURS["vermilion"], lw=1.3, label=label)
    chart.set(xlabel="theta_beta (grey levels)", ylabel="mean message of the true label")
    chart.legend(fontsize=8, frameon=False)
    found = "; ".join(
        f"at {a[0]}, {a[2]:+.4f} exact and {b[2]:+.4f} by the lattice"
        for a, b in zip(tangents["exact"], tangents["lattice"], strict=True)
    )
    alt = (
        "A score against theta_beta. With exact messages the curve is smooth; the lattice's is jagged, with kinks and "
        f"small jumps. Short dashed lines are tangents. Their slopes per grey level: {found}."
    )
    plots.show(fig, alt=alt)


def traces(image: Tensor, traces: Mapping[str, Trace], names: Sequence[str], palette: np.ndarray) -> None:
    """Show messages and labels of two traces, exact and lattice, at their first and last iteration."""
    first = traces["exact"]
    c, last = plots.most_changed(first), len(first.messages)
    top = float(first.messages[:, 1, c].max())
    ratio = image.shape[1] / image.shape[2]
    fig, axes = plots.figure(2, 5, figsize=(10, 4 * ratio + 0.8))
    for row, (name, trace) in zip(axes, traces.items(), strict=True):
        plots.draw(row[0], plots.to_uint8(image), "image" if name == "exact" else "")
        for cell, t in zip(row[1:3], (1, last), strict=True):
            cell.imshow(trace.messages[t - 1, 1, c], cmap="viridis", vmin=0, vmax=top)
            cell.set_title(f"{name}: message {t}", fontsize=8)
            cell.set_axis_off()
        for cell, t in zip(row[3:], (1, last), strict=True):
            plots.draw(cell, colorize(trace.labels[t], palette), f"{name}: labels after {t}")
            cell.title.set_fontsize(8)
    different = [int((first.labels[t] != traces["lattice"].labels[t]).sum()) for t in (1, last)]
    alt = (
        f"Exact messages (above) and the lattice's (below) on the portrait: the bilateral message for {names[c]} in "
        f"iterations 1 and {last}, and the labels after them. The messages look alike. {different[0]} labels differ "
        f"after iteration 1, most of them at the collar, and {different[1]} after iteration {last}."
    )
    plots.show(fig, alt=alt)
