"""Figures of notebook 02: a CRF from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import VOID, SegmentationDataset, colorize
from pwlib.trace import Trace

TINTS = np.array([[0, 96, 190], [200, 70, 130]], np.uint8)  # sea, boat: nearly as in Scenes, dark below white text
WORDS = ("sea", "boat")


def paint(axes: Axes, labels: Sequence[int], title: str, values: Sequence[float] = ()) -> None:
    """Draw nine labels in their colours, with their names or with values in the pixels."""
    plots.draw(axes, TINTS[np.reshape(labels, (3, 3))], title)
    for i, label in enumerate(labels):
        word = f"{values[i]:.2f}" if len(values) else WORDS[label]
        axes.text(i % 3, i // 3, word, ha="center", va="center", fontsize=9, color="white", fontweight="bold")


def nine(grey: Tensor, truth: Tensor, p_boat: Tensor) -> None:
    """Show nine grey values [3, 3], their true labels [9], and the network's probabilities of boat [9]."""
    fig, axes = plots.figure(1, 3, figsize=(7, 2.5))
    plots.draw(axes[0, 0], plots.to_uint8(grey.expand(3, 3, 3)), "image")
    paint(axes[0, 1], truth.tolist(), "true labels")
    paint(axes[0, 2], (p_boat > 0.5).long().tolist(), "network: P(boat)", p_boat.tolist())
    alt = (
        "Three 3x3 grids. The image has two light columns and a dark one. The true labels are boat in the two left "
        f"columns and sea in the right one. The network's probabilities of boat, row by row: {listed(p_boat)}. By the "
        "more probable label, the middle left pixel is wrongly sea and the middle right one wrongly boat."
    )
    plots.show(fig, alt=alt)


def listed(values: Tensor) -> str:
    return ", ".join(f"{v:.2f}" for v in values.flatten().tolist())


def labellings(best: Sequence[tuple[float, Sequence[int]]]) -> None:
    """Show the six most probable labellings: (probability, nine labels) each."""
    fig, axes = plots.figure(1, 6, figsize=(9, 1.8))
    for rank, (cell, (probability, labels)) in enumerate(zip(axes[0], best, strict=True), 1):
        paint(cell, labels, f"{rank}. P = {probability:.3f}")
    names = ("top", "middle", "bottom")
    right = [" and ".join(names[row] for row in range(3) if labels[3 * row + 2] == 0) or "none" for _, labels in best]
    probabilities = ", ".join(f"{probability:.3f}" for probability, _ in best)
    alt = (
        f"The six most probable labellings, with the probabilities {probabilities}. The two left columns are boat in "
        f"all of them. Pixels of the right column that are sea: {'; '.join(right)}. The first is the true labelling."
    )
    plots.show(fig, alt=alt)


def marginals(before: Tensor, after: Tensor) -> None:
    """Show nine probabilities of boat by the network and the exact marginals of the CRF."""
    fig, axes = plots.figure(1, 2, figsize=(5.2, 2.7))
    for cell, p_boat, title in zip(axes[0], (before, after), ("network: P(boat)", "CRF: exact P(boat)"), strict=True):
        paint(cell, (p_boat > 0.5).long().tolist(), title, p_boat.tolist())
    alt = (
        "Two 3x3 grids with the probabilities of boat by the network and by the CRF. In the exact marginals of the CRF "
        f"the middle left pixel has {after[3]:.2f} instead of {before[3]:.2f}, so its label is right. The middle right "
        f"one has {after[5]:.2f} instead of {before[5]:.2f} and is still labelled boat."
    )
    plots.show(fig, alt=alt)


def scan(trials: Tensor, curve: Sequence[float], minimum: float, network: float) -> None:
    """Show F against q(boat) of one pixel, the minimum by the softmax, and the network's probability."""
    fig, axes = plots.figure(figsize=(6.6, 2.9))
    chart = axes[0, 0]
    chart.plot(trials, curve, color=COLOURS["blue"], label="F, the other eight pixels fixed")
    chart.axvline(minimum, color=COLOURS["vermilion"], ls="--", label=f"softmax(-e) = {minimum:.3f}")
    height = np.interp(network, trials, curve)
    chart.plot(network, height, "o", color="black", label=f"network: {network:.2f}")
    chart.set(xlabel="q(boat) of the middle left pixel", ylabel="free energy (nats)")
    chart.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    alt = (
        "Free energy against the probability of boat of one pixel: a convex curve. Its minimum is at the dashed line, "
        f"where the softmax formula gives {minimum:.3f}. The network's probability, {network:.2f}, is further left and "
        "higher up on the curve."
    )
    plots.show(fig, alt=alt)


def descent(falls: Mapping[str, Sequence[float]], bound: float) -> None:
    """Show the free energy against the iteration for each update, and its lower bound -log Z."""
    fig, axes = plots.figure(figsize=(5.2, 2.9))
    chart = axes[0, 0]
    styles = (("o-", COLOURS["vermilion"]), ("s--", COLOURS["blue"]))
    for (name, values), (style, colour) in zip(falls.items(), styles, strict=True):
        chart.plot(values, style, color=colour, label=name)
    chart.axhline(bound, color="black", lw=1, label="-log Z, the lower bound")
    chart.set(xlabel="iteration", ylabel="free energy F (nats)")
    chart.legend(fontsize=8, frameon=False)
    last = next(iter(falls.values()))[-1]
    alt = (
        "Free energy against the iteration for the parallel update and for updates in turn. Both curves fall within "
        f"about four iterations to the same value, {last:.2f}, which lies above the line at minus log Z, {bound:.2f}. "
        "Updates in turn fall faster."
    )
    plots.show(fig, alt=alt)


def confidence(exact: Mapping[float, Tensor], found: Mapping[float, Tensor], chosen: Sequence[float]) -> None:
    """Show mean confidence against the weight, and exact against mean-field marginals at chosen weights.

    Args:
        exact, found: {weight: marginals [N, 2]}, by enumeration and by mean field.
    """
    fig, axes = plots.figure(1, 2, figsize=(8.6, 3.1))
    left, right = axes[0]
    means = [[q.amax(1).mean().item() for q in run.values()] for run in (exact, found)]
    left.plot(list(exact), means[0], "-", color="black", label="exact")
    left.plot(list(found), means[1], "--", color=COLOURS["vermilion"], label="mean field")
    left.set(xlabel="pairwise weight w", ylabel="mean confidence", ylim=(0.5, 1.02))
    for weight, marker, colour in zip(chosen, "o^", ("blue", "vermilion"), strict=True):
        points = exact[weight][:, 1], found[weight][:, 1]
        right.plot(*points, marker, color=COLOURS[colour], label=f"w = {weight}")
    right.plot([0, 1], [0, 1], color="grey", lw=1)
    right.set(xlabel="exact P(boat)", ylabel="q(boat) of mean field", aspect="equal")
    for cell in (left, right):
        cell.legend(fontsize=8, frameon=False)
    alt = (
        f"Left: mean confidence against the pairwise weight. The two curves begin at {means[0][0]:.2f}. From a "
        "weight of about 0.4 mean field lies above the exact curve; both approach 1. Right: mean-field against exact "
        "probabilities of boat for two weights. The two lowest points, at a weight of 0.75, lie on the diagonal; "
        "all others lie above it, closer to 1."
    )
    plots.show(fig, alt=alt)


def two(runs: Mapping[str, Sequence[Tensor]]) -> None:
    """Show q(boat) of two pixels in every iteration, for each kind of update: {name: T + 1 marginals [2, 2]}."""
    fig, axes = plots.figure(1, 3, figsize=(9, 2.6), sharey=True)
    for cell, (name, history) in zip(axes[0], runs.items(), strict=True):
        boat = torch.stack(list(history))[:, :, 1]  # [T + 1, 2]
        cell.plot(boat[:, 0], "o-", color=COLOURS["blue"], label="first pixel")
        cell.plot(boat[:, 1], "s--", color=COLOURS["vermilion"], label="second pixel")
        cell.set(xlabel="iteration", xticks=range(0, 13, 3), ylim=(-0.05, 1.05))
        cell.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("q(boat)")
    axes[0, 2].legend(fontsize=8, frameon=False)
    alt = (
        "Probability of boat of two pixels over 12 iterations, in three panels. All at once: both alternate between "
        "high and low values in opposite phase, further in each iteration. In turn: both fall below 0.15 within five "
        "iterations. All at once with self-message: they stay at 0.70 and 0.30."
    )
    plots.show(fig, alt=alt)


def kernels(image: Tensor, rows: Mapping[str, tuple[tuple[int, int], Tensor]]) -> None:
    """Show an image and, for some of its pixels, the bilateral kernel: {name: ((row, column), kernel [H, W])}."""
    fig, axes = plots.figure(1, len(rows) + 1, figsize=(9, 1.7))
    plots.draw(axes[0, 0], plots.to_uint8(image), "image")
    for cell, (name, ((row, column), kernel)) in zip(axes[0, 1:], rows.items(), strict=True):
        drawn = cell.imshow(kernel, cmap="cividis", vmin=0, vmax=1)
        cell.plot(column, row, "w+", ms=9)
        cell.set_title(f"{name}: n = {kernel.sum():.0f}", fontsize=9)
        cell.set_axis_off()
    fig.colorbar(drawn, ax=axes[0, -1], shrink=0.8, label="k")
    alt = (
        "A scene, and the bilateral kernel of three of its pixels as brightness. The pixel in the sky has a wide, "
        "speckled patch of sky on the right; the pixel of the roof has the roof, up to its edges; the pixel of class "
        "pole lies on a wire and has a thin line along it."
    )
    plots.show(fig, alt=alt)


def roof(trace: Trace, dataset: SegmentationDataset) -> None:
    """Show the trace of a scene for the class roof."""
    names = dataset.class_names
    fig = plots.trace(trace, class_names=names, palette=dataset.palette, label=names.index("roof"))
    alt = (
        "Mean field for the class roof, in rows for iterations 0, 1, 2 and 8. Columns: spatial and bilateral message, "
        "pairwise energy, marginal, entropy and labels. The bilateral message has the outline of the roof from the "
        "first iteration; the spatial message is a round spot until the second and fills the roof in the last. The "
        "marginal of roof fills most of the roof at the end. The entropy falls to almost zero, except for "
        "some pixels at borders."
    )
    plots.show(fig, alt=alt)


def strips(
    traces: Mapping[str, Trace], steps: Sequence[int], truth: Tensor | None, dataset: SegmentationDataset, alt: str
) -> None:
    """Show for each trace its image, and its labels after some iterations with their accuracy."""
    fig, axes = plots.figure(len(traces), len(steps) + 1, figsize=(1.6 * (len(steps) + 1), 1.3 * len(traces) + 0.5))
    for row, (name, trace) in zip(axes, traces.items(), strict=True):
        plots.draw(row[0], plots.to_uint8(trace.image), name)
        for cell, step in zip(row[1:], steps, strict=True):
            score = "" if truth is None else f": {100 * accuracy(trace.labels[step], truth):.1f} %"
            plots.draw(cell, colorize(trace.labels[step], dataset.palette), f"iteration {step}{score}")
            cell.title.set_fontsize(8)
    shown = {int(v) for trace in traces.values() for step in steps for v in trace.labels[step].unique()}
    plots.legend(fig, dataset.palette, dataset.class_names, sorted(shown))
    plots.show(fig, alt=alt)


def accuracy(prediction: Tensor, truth: Tensor) -> float:
    known = truth != VOID
    return (prediction[known] == truth[known]).float().mean().item()


def course_of(trace: Trace, steps: Sequence[int], truth: Tensor) -> str:
    return ", ".join(f"{100 * accuracy(trace.labels[step], truth):.1f} %" for step in steps)


def iterations(trace: Trace, truth: Tensor, dataset: SegmentationDataset) -> None:
    """Show the labels of a trace after 0, 1, 2 and 8 iterations."""
    steps = (0, 1, 2, 8)
    alt = (
        "A scene and its labels after 0, 1, 2 and 8 iterations. The network's labels are coarse blobs with ragged "
        "borders. After two iterations the mountains and the shore have their outlines, and after eight the roof. The "
        "wires are missing in all maps, and parts of the poles remain. "
        f"Accuracy: {course_of(trace, steps, truth)}."
    )
    strips({"image": trace}, steps, truth, dataset, alt)


def photograph(photo: Tensor, strokes: Tensor, trace: Trace) -> None:
    """Show the portrait, strokes on it, and its labels after 1, 3 and 8 iterations."""
    maps = {f"iteration {t}": trace.labels[t] for t in (1, 3, 8)}
    fig = plots.strokes(photo, strokes, maps, photos.PALETTE, list(photos.REGIONS["portrait"]))
    fig.set_size_inches(9, 2.7)
    alt = (
        "The portrait, the same with pen strokes in four colours, and its labels after 1, 3 and 8 iterations. After "
        "one iteration background, flag, face and uniform already have their shapes, with many wrong pixels in the "
        "hat, on the chest and between flag and face. After eight, fewer remain: the name badge, parts of the hat, a "
        "rim around it and spots at the collar have the label flag."
    )
    plots.show(fig, alt=alt)


def confidences(labels: Mapping[float, Tensor]) -> None:
    """Show the labels of the portrait for each confidence in strokes of which one is wrong: {confidence: [H, W]}."""
    fig, axes = plots.figure(1, len(labels), figsize=(9, 2.5))
    for cell, (value, label) in zip(axes[0], labels.items(), strict=True):
        plots.draw(cell, colorize(label, photos.PALETTE), f"confidence {value}")
    plots.legend(fig, photos.PALETTE, list(photos.REGIONS["portrait"]))
    alt = (
        "Labels of the portrait for five confidences in the strokes. With 0.3, 0.7 and 0.95 nothing is left of the "
        "wrong stroke on the uniform. With 0.99 a part of it has the label face, and with 0.999 all of it, as a thin "
        "horizontal bar."
    )
    plots.show(fig, alt=alt)


def wrong_sign(right: Trace, wrong: Trace, truth: Tensor, dataset: SegmentationDataset) -> None:
    """Show the first iterations with the right and with the wrong sign of the compatibility."""
    steps = (0, 1, 2, 3, 4)
    alt = (
        "Labels of a scene after 0 to 4 iterations. With the right sign they take the outlines of the image: "
        f"{course_of(right, steps, truth)} accuracy. With the wrong sign they are a patchwork of all classes "
        f"after 1 and 3 iterations, and like the network's labels after 2 and 4: {course_of(wrong, steps, truth)}."
    )
    strips({"right sign": right, "wrong sign": wrong}, steps, truth, dataset, alt)


def double_softmax(logits: Trace, probabilities: Trace, truth: Tensor, dataset: SegmentationDataset) -> None:
    """Show the iterations of a CRF that gets logits, and of one that gets probabilities in their place."""
    steps = (0, 1, 2, 4, 8)
    alt = (
        "Labels of a scene after 0, 1, 2, 4 and 8 iterations, from the logits and from probabilities in their place. "
        f"Both begin with the same labels. Accuracy from logits: {course_of(logits, steps, truth)}; from "
        f"probabilities: {course_of(probabilities, steps, truth)}. From probabilities, the shore, the "
        "boat and the right roof still have ragged borders at the end."
    )
    strips({"logits": logits, "probabilities": probabilities}, steps, truth, dataset, alt)


def normalised(right: Trace, wrong: Trace, truth: Tensor, dataset: SegmentationDataset) -> None:
    """Show the iterations with colours from 0 to 255 and with normalised colours."""
    steps = (0, 1, 2, 8)
    alt = (
        "Labels of a scene after 0, 1, 2 and 8 iterations. With colours from 0 to 255 they take the outlines of the "
        f"image: {course_of(right, steps, truth)} accuracy. With normalised colours they become a few round blobs "
        f"whose borders ignore the image: {course_of(wrong, steps, truth)}."
    )
    strips({"colours 0-255": right, "normalised": wrong}, steps, truth, dataset, alt)


def reach(influence: Mapping[str, Tensor]) -> None:
    """Show the influence [H, W] of every pixel on the output of one, on a logarithmic scale."""
    fig, axes = plots.figure(1, len(influence), figsize=(9.6, 2.3))
    for cell, (name, values) in zip(axes[0], influence.items(), strict=True):
        drawn = cell.imshow((values / values.max()).clamp_min(1e-12).log10(), cmap="cividis", vmin=-6, vmax=0)
        cell.set_title(name, fontsize=9)
        cell.set_axis_off()
    fig.colorbar(drawn, ax=axes[0, -1], shrink=0.8, label="log10")
    alt = (
        "Influence of each pixel on the output of one pixel, in three panels, on a logarithmic scale. Dense kernel, "
        "one iteration: a wide disc that fades smoothly and covers most of the image. Window of 5x5 px, one iteration: "
        "a small square. Window, ten iterations: a rounded square of about 25 px, brightest in the middle."
    )
    plots.show(fig, alt=alt)


def four_runs(runs: Mapping[str, Trace], dataset: SegmentationDataset) -> None:
    """Show the labels of the four runs of exercise 02.6."""
    alt = (
        "Labels of four runs, A to D, after 0, 1, 2, 3 and 8 iterations, from the same labels at the start. A: objects "
        "with sharp outlines that shrink; at the end the lower edge of the wall is round, and only a part of one tree "
        "is left. B: nearly all objects vanish, and sky and land meet in a round border. C: the outlines of the image, "
        "to the end. D: a patchwork of all classes after 1 and 3 iterations, and nearly the labels of the start after "
        "2 and 8."
    )
    strips(runs, (0, 1, 2, 3, 8), None, dataset, alt)
