"""Figures of notebook 00: why structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.data import VOID, SegmentationDataset, colorize, load

Pair = tuple[float, float]


def photograph(image: Tensor, strokes: Tensor, labels: Tensor) -> None:
    """Show the portrait, the strokes on it, and the labels [H, W] that a dense CRF computed from them."""
    fig = plots.strokes(image, strokes, {"labels": labels}, photos.PALETTE, list(photos.REGIONS["portrait"]))
    alt = (
        "Three panels: a portrait in front of a flag and a blue background; the same with a dozen pen strokes in four "
        "colours; the labels of all pixels. The borders of background, flag, face and uniform follow the edges of the "
        "photograph. The eyes, the shadow below the chin, the name badge and a cord of the flag have wrong labels."
    )
    plots.show(fig, alt=alt)


def scenes(dataset: SegmentationDataset) -> None:
    """Show one scene with its label map, and five scenes cut along the diagonal into image and label map."""
    image, label = load("scenes", "train", length=23, size=(128, 192))[22]
    palette = dataset.palette
    fig = plt.figure(figsize=(11, 5.6), layout="constrained")
    grid = fig.add_gridspec(2, 10, height_ratios=[2.6, 1])
    left, right = fig.add_subplot(grid[0, :5]), fig.add_subplot(grid[0, 5:])
    plots.draw(left, plots.to_uint8(image), "image")
    plots.draw(right, colorize(label, palette), "label map (black: void)")
    write_names(right, label, dataset)
    for place, index in enumerate([3, 7, 16, 12, 20]):
        image, label = dataset[index]
        y, x = np.mgrid[: label.shape[0], : label.shape[1]]
        above = (x / label.shape[1] + y / label.shape[0] < 1)[..., None]  # [H, W, 1]
        picture = np.where(above, plots.to_uint8(image), colorize(label, palette))
        plots.draw(fig.add_subplot(grid[1, 2 * place : 2 * place + 2]), picture)
    alt = (
        "Top: a painted shore with planes, boats, houses, tents, trees and power poles, and beside it its label map in "
        "flat colours with the class names. Bottom: five more scenes, each half image and half label map."
    )
    plots.show(fig, alt=alt)


def write_names(axes: Axes, label: Tensor, dataset: SegmentationDataset) -> None:
    """Write each class name into the deepest part of its region."""
    for k in label.unique().tolist():
        if k != VOID:
            mask = (label == k).float()[None, None]
            while (inner := 1 - F.max_pool2d(1 - F.pad(mask, (1, 1, 1, 1)), 3, 1)).any():
                mask = inner  # without its outermost pixels
            rows, columns = mask[0, 0].nonzero(as_tuple=True)
            x, y = columns[len(columns) // 2].item(), rows[len(rows) // 2].item()
            ink = "white" if dataset.palette[k].astype(int) @ [2, 5, 1] < 1050 else "black"
            axes.text(x, y, dataset.class_names[k], color=ink, fontsize=9, ha="center", va="center", clip_on=True)


def resized(nearest: Tensor, averaged: Tensor, invented: Tensor, palette: np.ndarray) -> None:
    """Show a label map resized in two ways, K standing for void, and where a class was invented."""
    fig, axes = plots.figure(1, 3, figsize=(11, 2.7))
    void = len(palette) - 1
    for cell, label, title in zip(
        axes[0], (nearest, averaged), ("nearest neighbour", "bilinear, rounded"), strict=False
    ):
        plots.draw(cell, colorize(label.masked_fill(label == void, VOID), palette), title)
    marks = np.where(invented[..., None], [213, 94, 0], [235, 235, 235]).astype(np.uint8)
    plots.draw(axes[0, 2], marks, "pixels with an invented class")
    alt = (
        "A label map resized by nearest neighbour is clean. Resized bilinearly, it has thin rims of wrong classes. "
        f"The third panel marks these {int(invented.sum())} pixels, which outline every object."
    )
    plots.show(fig, alt=alt)


def class_shares(share: Tensor, names: Sequence[str], palette: np.ndarray) -> None:
    """Show the share of the labelled pixels that each class has, as bars."""
    order = share.argsort(descending=True)
    fig, axes = plots.figure(figsize=(8, 2.9))
    colours = palette[order.numpy()] / 255
    bars = axes[0, 0].bar([names[k] for k in order], 100 * share[order], color=colours, edgecolor="black")
    axes[0, 0].bar_label(bars, [f"{100 * share[k]:.1f} %" for k in order], padding=2, fontsize=8)
    axes[0, 0].set_ylabel("labelled pixels (%)")
    values = ", ".join(f"{names[k]} {100 * share[k]:.1f} %" for k in order)
    plots.show(fig, alt=f"Bar chart of the share of each class among the labelled pixels: {values}.")


def table_sizes(steps: Sequence[int], same: Sequence[float], new: Sequence[float], network: float) -> None:
    """Show the accuracy of colour tables on the images they were counted on and on new ones, and of a small network."""
    fig, axes = plots.figure(figsize=(6.4, 3.3))
    chart, colours = axes[0, 0], plots.COLOURS
    label = "counted on the test scenes themselves"
    chart.plot(steps, [100 * v for v in same], color=colours["vermilion"], marker="s", ls="--", label=label)
    label = "counted on training scenes"
    chart.plot(steps, [100 * v for v in new], color=colours["blue"], marker="o", label=label)
    chart.axhline(100 * network, color=colours["black"], ls=":", label="small network, training scenes")
    chart.set(xscale="log", xlabel="steps per colour channel", ylabel="accuracy on the test scenes (%)", ylim=(40, 100))
    chart.set_xticks(steps, steps)
    chart.minorticks_off()
    chart.legend(frameon=False, fontsize=8)
    alt = (
        f"Accuracy on the test scenes against the steps of the table. Counted on the test scenes themselves, it rises "
        f"from {100 * same[0]:.0f} % to {100 * same[-1]:.0f} %. Counted on training scenes, it stays between "
        f"{100 * min(new):.0f} % and {100 * max(new):.0f} %. A small network reaches {100 * network:.0f} %."
    )
    plots.show(fig, alt=alt)


def overlap(matrix: Tensor, image: Tensor, label: Tensor, names: Sequence[str], palette: np.ndarray) -> None:
    """Show the overlap of the classes' colours [K, K], and an image beside its labels by colour alone."""
    fig, axes = plots.figure(1, 2, figsize=(9, 4.4), width_ratios=[1.2, 1])
    axes[0, 0].imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            ink = "white" if matrix[i, j] < 0.6 else "black"
            axes[0, 0].text(j, i, f"{matrix[i, j]:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes[0, 0].set_xticks(range(len(names)), names, rotation=60)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_title("overlap of the classes' colours", fontsize=9)
    gap = np.full((3, label.shape[1], 3), 255, np.uint8)
    plots.draw(axes[0, 1], np.concatenate([plots.to_uint8(image), gap, colorize(label, palette)]))
    axes[0, 1].set_title("a test scene, and its labels by colour alone", fontsize=9)
    pairs = [("plane", "boat"), ("roof", "tent"), ("sky", "sea")]
    values = ", ".join(f"{a} and {b} {matrix[names.index(a), names.index(b)]:.2f}" for a, b in pairs)
    alt = (
        f"Left: a matrix of the colour overlaps of the ten classes, for example {values}. Right: a scene above its "
        "labels by colour alone, which are a coarse speckle of all classes."
    )
    plots.show(fig, alt=alt)


def per_pixel(rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]], names: Sequence[str], palette: np.ndarray) -> None:
    """Show scenes, their true labels, and labels that were predicted for each pixel separately."""
    alt = (
        "Two scenes with their true labels and the labels from colour and height. The large regions are right, but "
        "single wrong pixels are scattered over them, and objects are patchworks of several classes."
    )
    plots.show(plots.predictions(rows, palette, names), alt=alt)


def agreement(distances: Sequence[int], curves: Mapping[str, Sequence[Pair]]) -> None:
    """Show how often two pixels have the same label, against their distance.

    Args:
        curves: {name: [(share for similar colours, share for dissimilar colours) for each distance]}; the truth,
            the most probable labels and a random draw, in this order.
    """
    fig, axes = plots.figure(1, 2, figsize=(11, 3.7), sharey=True)
    styles = [("blue", "o", "-"), ("orange", "^", "-"), ("vermilion", "s", "--")]
    titles = ("pairs of similar colour (less than 12 grey levels apart)", "pairs of dissimilar colour")
    for side, (chart, title) in enumerate(zip(axes[0], titles, strict=True)):
        for (name, values), (colour, marker, line) in zip(curves.items(), styles, strict=True):
            shares = [100 * value[side] for value in values]
            chart.plot(distances, shares, color=plots.COLOURS[colour], marker=marker, ls=line, ms=5, label=name)
        chart.set(xscale="log", xlabel="distance of the two pixels (px)", ylim=(0, 102))
        chart.set_title(title, fontsize=9)
        chart.set_xticks(distances, distances)
        chart.minorticks_off()
        chart.grid(alpha=0.25)
    axes[0, 0].set_ylabel("pairs with the same label (%)")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    truth, guess, draw = ([[100 * v for v in values[i]] for i in (0, -1)] for values in curves.values())
    alt = (
        "Share of pixel pairs with the same label against their distance, for similar and for dissimilar colours. "
        f"True labels: {truth[0][0]:.0f} % and {truth[0][1]:.0f} % at {distances[0]} px, {truth[1][0]:.0f} % and "
        f"{truth[1][1]:.0f} % at {distances[-1]} px. For similar colours at {distances[0]} px the most probable labels "
        f"agree in {guess[0][0]:.0f} % and random draws from independent pixels in {draw[0][0]:.0f} %."
    )
    plots.show(fig, alt=alt)


def refined(rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]], names: Sequence[str], palette: np.ndarray) -> None:
    """Show scenes, true labels, labels of single pixels, and labels after a dense CRF."""
    alt = (
        "Three scenes in four columns: image, true labels, labels of single pixels, and labels after a dense CRF. The "
        "CRF removes the scattered pixels and its borders follow the image, but some objects become one clean region "
        "of a wrong class."
    )
    plots.show(plots.predictions(rows, palette, names), alt=alt)


def class_gains(before: Tensor, after: Tensor, names: Sequence[str]) -> None:
    """Show the IoU of each class [K] before and after the CRF as bars, with the difference in points."""
    before, after = 100 * before, 100 * after
    fig, axes = plots.figure(figsize=(8.5, 3.2))
    chart, places = axes[0, 0], np.arange(len(names))
    chart.bar(places - 0.2, before, 0.4, color=plots.COLOURS["orange"], edgecolor="black", label="single pixels")
    style = {"color": plots.COLOURS["blue"], "edgecolor": "black", "hatch": "//"}
    chart.bar(places + 0.2, after, 0.4, label="dense CRF", **style)
    for k, gain in enumerate((after - before).tolist()):
        top = max(before[k], after[k]) + 2
        chart.text(k, top, f"{gain:+.0f}", ha="center", fontsize=8, weight="bold" if gain < 0 else "normal")
    chart.set_xticks(places, names)
    chart.set(ylabel="IoU (%)", ylim=(0, 112))
    chart.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    gains = ", ".join(f"{name} {gain:+.0f}" for name, gain in zip(names, after - before, strict=True))
    plots.show(fig, alt=f"Bar chart of the IoU of each class before and after the CRF. Differences in points: {gains}.")
