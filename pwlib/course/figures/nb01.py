"""Figures of notebook 01: the unary network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import VOID, colorize

# colour, marker, line
STYLES = {
    "network": (COLOURS["vermilion"], "o", "-"),
    "class shares": (COLOURS["blue"], "s", "--"),
    "fitted logits": (COLOURS["green"], "^", ":"),
}


def coarse_photograph(image: Tensor, labels: Mapping[str, Tensor], stride: int) -> None:
    """Show a photograph with its grid of cells, and label maps [H, W]: the given one and two coarse versions."""
    fig, axes = plots.figure(1, 1 + len(labels), figsize=(11, 3.9))
    plots.draw(axes[0, 0], plots.to_uint8(image), f"photograph, cells of {stride} px")
    for start in range(stride, max(image.shape[-2:]), stride):
        if start < image.shape[-2]:
            axes[0, 0].axhline(start - 0.5, color="white", lw=0.7)
        if start < image.shape[-1]:
            axes[0, 0].axvline(start - 0.5, color="white", lw=0.7)
    for cell, (title, label) in zip(axes[0, 1:], labels.items(), strict=True):
        plots.draw(cell, colorize(label, photos.PALETTE), title)
    plots.legend(fig, photos.PALETTE, list(photos.REGIONS["portrait"]))
    truth, *coarse = labels.values()
    same = [f"{100 * (label == truth).float().mean():.0f} %" for label in coarse]
    alt = (
        f"A portrait under a grid of {stride} px cells, and three label maps: the one from strokes, one from class "
        f"shares with {same[0]} of the labels right, and one from fitted logits with {same[1]} right. Both coarse "
        "maps lack the eyes and the mouth and extend the hat to the upper edge. The shares also lack the name badge. "
        "The fitted logits keep a part of it and follow the outlines of face and uniform more closely."
    )
    plots.show(fig, alt=alt)


def coarse_scene(
    image: Tensor,
    label: Tensor,
    shares: Mapping[int, Tensor],
    fitted: Mapping[int, Tensor],
    names: Sequence[str],
    palette: np.ndarray,
) -> None:
    """Show a scene, its labels, and for each output stride the labels of class shares and of fitted logits."""
    fig, axes = plots.figure(2, 1 + len(shares), figsize=(11, 4.3))
    plots.draw(axes[0, 0], plots.to_uint8(image), "image")
    plots.draw(axes[1, 0], colorize(label, palette), "truth (black: void)")
    for line, title, maps in ((axes[0], "shares", shares), (axes[1], "fitted", fitted)):
        for cell, (stride, found) in zip(line[1:], maps.items(), strict=True):
            plots.draw(cell, colorize(found, palette), f"{title}, stride {stride}")
    plots.legend(fig, palette, names, sorted(set(label.unique().tolist()) - {VOID}))
    alt = (
        "A scene and its true labels, beside labels from class shares (top) and fitted logits (bottom). Shares: "
        "objects are round at stride 8, most are gone at 16, and broad bands are left at 32. Fitted logits: nearly "
        "the truth at stride 8, objects with coarse outlines at 16, and few objects at 32."
    )
    plots.show(fig, alt=alt)


def dilations(paths: Mapping[tuple[int, ...], Tensor]) -> None:
    """Show through how many paths each input pixel reaches the middle output, for stacks of dilated convolutions.

    Args:
        paths: {dilations: number of paths [H, W]}.
    """
    fig, axes = plots.figure(1, len(paths), figsize=(11, 3.5))
    for axis, (stack, count) in zip(axes[0], paths.items(), strict=True):
        read = count > 0
        rows = read.any(1).nonzero()[:, 0]
        side = int(rows.max() - rows.min()) + 1
        drawn = axis.imshow(count.where(read, torch.nan), cmap="viridis")
        axis.set_facecolor("0.88")
        title = f"dilations {', '.join(map(str, stack))}\nspans {side}x{side}, reads {int(read.sum())} pixels"
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
        fig.colorbar(drawn, ax=axis, shrink=0.7, label="paths")
    alt = (
        "Three maps of the input pixels that the middle output reads. Dilations 1, 1, 1: a dense 7x7 square. Dilations "
        "1, 2, 4: a dense 15x15 square. Dilations 4, 4, 4: a sparse grid over 25x25 with gaps of three pixels."
    )
    plots.show(fig, alt=alt)


def gradients(
    maps: Mapping[str, Tensor], fields: Sequence[int], sides: Sequence[int], inside: Sequence[Tensor], centre: float
) -> None:
    """Show the size of the gradient of one cell over the image for two networks, and the share within squares.

    Args:
        maps: {title: mean |gradient| [H, W]} of two networks.
        fields: the receptive field of each, in px.
        sides: of the square with 90 % of |gradient|, in px.
        inside: share of |gradient| within a square of side 2, 4, 6, ... px.
        centre: of the cell, in px.
    """
    fig, axes = plots.figure(1, 3, figsize=(11, 3.6), width_ratios=[1, 1, 1.1])
    styles = [("-", COLOURS["blue"]), ("--", COLOURS["vermilion"])]
    chart = axes[0, 2]
    results = zip(axes[0], maps.items(), fields, sides, inside, styles, strict=False)
    for axis, (title, gradient), field, side, curve, (line, colour) in results:
        smooth = F.avg_pool2d(gradient[None, None], 15, stride=1, padding=7, count_include_pad=False)[0, 0]
        drawn = axis.imshow(smooth / smooth.max(), cmap="viridis", vmin=0)
        for width, style, name in (
            (field, "-", f"receptive field: {field} px"),
            (side, "--", f"90 % of |gradient|: {side} px"),
        ):
            corner = (centre - width / 2, centre - width / 2)
            axis.add_patch(Rectangle(corner, width, width, fill=False, ec="white", ls=style, lw=1.3, label=name))
        axis.legend(fontsize=7, loc="lower left", facecolor="0.2", labelcolor="white")
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
        chart.plot(2 * torch.arange(len(curve)) + 2, curve, ls=line, color=colour, label=title)
        chart.axvline(field, color="0.6", lw=0.8, ls=line)
    fig.colorbar(drawn, ax=axes[0, 1], shrink=0.75, label="|gradient|, relative")
    chart.axhline(0.9, color="0.8", lw=0.8)
    chart.set(xlabel="side of a centred square (px)", ylabel="share of |gradient| inside", ylim=(0, 1.02))
    chart.legend(frameon=False, fontsize=8)
    alt = (
        f"Gradient of one cell over the image. With dilation 12 nine bells, 96 px apart, merge into a broad plateau: "
        f"the receptive field is {fields[0]} px and 90 % of the gradient lies within {sides[0]} px. With dilation 1 "
        f"there is one bell: {fields[1]} px and {sides[1]} px. The curves show the share within centred squares."
    )
    plots.show(fig, alt=alt)


def displacement(errors: Mapping[str, Tensor]) -> None:
    """Show how far from its place each row's score lies, in px, for three ways of resizing.

    Args:
        errors: {way: displacement of each row [H]}; the right way, stretching and align_corners, in this order.
    """
    fig, axes = plots.figure(figsize=(7.5, 3.1))
    styles = [("-", COLOURS["green"]), ("--", COLOURS["vermilion"]), (":", COLOURS["blue"])]
    for (title, error), (line, colour) in zip(errors.items(), styles, strict=True):
        axes[0, 0].plot(error, ls=line, color=colour, lw=2, label=title)
    axes[0, 0].set(xlabel="row of the image", ylabel="row of its score minus its own (px)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _, stretched, corners = errors.values()
    alt = (
        f"Displacement of the scores by image row. The right way is zero except in the first four rows. Stretching "
        f"grows to {stretched.abs().max():.1f} px at the bottom. align_corners is off by up to "
        f"{corners.abs().max():.1f} px."
    )
    plots.show(fig, alt=alt)


def training(history: Sequence[Mapping[str, Any]], num_classes: int) -> None:
    """Show loss, validation mIoU and number of predicted classes by epoch."""
    fig, axes = plots.figure(1, 3, figsize=(11, 2.9))
    epochs = [record["epoch"] for record in history]
    panels = {"loss": "training loss (weighted, nats)", "miou": "validation mIoU (%)", "classes": "predicted classes"}
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        values = [record[key] * (100 if key == "miou" else 1) for record in history]
        axis.plot(epochs, values, "o-", color=COLOURS["blue"], ms=4)
        axis.set(xlabel="epoch", ylim=(0, None))
        axis.set_title(title, fontsize=9)
    axes[0, 2].axhline(num_classes, color="0.6", lw=0.8, ls="--")
    first, last = history[0], history[-1]
    alt = (
        f"Over {last['epoch']} epochs the loss falls from {first['loss']:.1f} to {last['loss']:.1f}, validation "
        f"mIoU rises from {100 * first['miou']:.0f} % to {100 * last['miou']:.0f} %, and the number of classes "
        f"that are predicted grows from {first['classes']} to {last['classes']}."
    )
    plots.show(fig, alt=alt)


def errors(
    images: Tensor, label: Tensor, prediction: Tensor, fitted: Tensor, names: Sequence[str], palette: np.ndarray
) -> None:
    """Show images [N, 3, H, W], their labels, those of the network and of fitted logits, and the wrong pixels."""
    fig, axes = plots.figure(len(images), 5, figsize=(11, 4.9))
    for line, image, true, found, best in zip(axes, images, label, prediction, fitted, strict=True):
        plots.draw(line[0], plots.to_uint8(image))
        for axis, shown in zip(line[1:4], (true, found, best), strict=True):
            plots.draw(axis, colorize(shown, palette))
        marks = np.full((*true.shape, 3), 235, np.uint8)
        marks[true == VOID] = 255
        marks[(found != true) & (true != VOID)] = (213, 94, 0)
        plots.draw(line[4], marks)
    titles = ("image", "truth", "network", "fitted logits, stride 8", "wrong pixels of the network")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    plots.legend(fig, palette, names)
    alt = (
        "Three scenes: image, truth, the labels of the network, those of logits fitted at stride 8, and the network's "
        "wrong pixels. The network finds most objects as rounded regions. The wrong pixels form rims around objects "
        "and along the shore, and poles and wires are missing. The fitted logits are close to the truth, "
        "but have only fragments of the poles."
    )
    plots.show(fig, alt=alt)


def by_distance(share: Tensor, rates: Mapping[str, Tensor]) -> None:
    """Show error rates by the distance to the nearest border, and where the network's errors are.

    Args:
        share: of all labelled pixels at distance 1, 2, ... px, the last entry for all beyond, [D].
        rates: {method: error rate at each distance [D]}, with the keys of `STYLES`.
    """
    fig, axes = plots.figure(1, 2, figsize=(11, 3.4))
    ticks = [str(d) for d in range(1, len(share))] + [f">{len(share) - 1}"]
    for method, rate in rates.items():
        colour, marker, line = STYLES[method]
        axes[0, 0].plot(ticks, 100 * rate, color=colour, marker=marker, ls=line, ms=5, label=method)
    axes[0, 0].set(xlabel="distance to the nearest border (px)", ylabel="wrong pixels (%)", ylim=(0, None))
    axes[0, 0].set_title("error rate by distance", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    errors = share * rates["network"] / (share * rates["network"]).sum()
    axes[0, 1].bar(ticks, 100 * errors, color=STYLES["network"][0], edgecolor="black", label="of the network's errors")
    axes[0, 1].plot(ticks, 100 * share, "k.:", label="of all pixels")
    axes[0, 1].set(xlabel="distance to the nearest border (px)", ylabel="share (%)")
    axes[0, 1].set_title("where the errors are", fontsize=9)
    axes[0, 1].legend(frameon=False, fontsize=8)
    values = "; ".join(f"{method} {100 * rate[0]:.0f} %, {100 * rate[3]:.0f} %" for method, rate in rates.items())
    alt = (
        f"Left: error rates at 1 px and at 4 px from a border: {values}. All fall with the distance. Right: "
        f"{100 * errors[:3].sum():.0f} % of the network's errors and {100 * share[:3].sum():.0f} % of the pixels are "
        "within 3 px of a border."
    )
    plots.show(fig, alt=alt)


def classes(rows: Tensor, ious: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Show a confusion matrix and the IoU of each class.

    Args:
        rows: share of each true class [K] with each prediction, [K, K].
        ious: {method: IoU [K]}, with the keys of `STYLES`.
    """
    fig, axes = plots.figure(1, 2, figsize=(11, 4.1), width_ratios=[1, 1.3])
    drawn = axes[0, 0].imshow(100 * rows, cmap="cividis", vmin=0, vmax=100)
    for t, p in (rows > 0.02).nonzero().tolist():
        ink = "white" if rows[t, p] < 0.6 else "black"
        axes[0, 0].text(p, t, f"{100 * rows[t, p]:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes[0, 0].set_xticks(range(len(names)), names, rotation=90)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set(xlabel="predicted", ylabel="true")
    fig.colorbar(drawn, ax=axes[0, 0], shrink=0.8, label="% of the true class")
    places = np.arange(len(names))
    for number, ((method, iou), hatch) in enumerate(zip(ious.items(), ("", "//", ".."), strict=False)):
        style = {"color": STYLES[method][0], "edgecolor": "black", "hatch": hatch}
        axes[0, 1].bar(places + 0.27 * (number - 1), 100 * iou, 0.27, label=method, **style)
    axes[0, 1].set_xticks(places, names, rotation=45)
    axes[0, 1].set(ylabel="IoU (%)", ylim=(0, 115))
    axes[0, 1].legend(frameon=False, ncols=3, fontsize=8)
    values = "; ".join(
        f"{name} " + ", ".join(f"{100 * iou[k]:.0f}" for iou in ious.values()) for k, name in enumerate(names)
    )
    alt = (
        "Left: confusion matrix in per cent of the true class; the diagonal is largest except for poles. Right: IoU in "
        f"per cent of {', '.join(ious)}: {values}."
    )
    plots.show(fig, alt=alt)


def pasted(image: Tensor, edited: Tensor, predictions: Tensor, names: Sequence[str], palette: np.ndarray) -> None:
    """Show a scene and an edited copy with their predicted labels [2, H, W]."""
    fig, axes = plots.figure(1, 4, figsize=(11, 2.5))
    panels = {
        "a scene with a boat": plots.to_uint8(image),
        "predicted labels": colorize(predictions[0], palette),
        "with a copy in the sky": plots.to_uint8(edited),
        "predicted labels ": colorize(predictions[1], palette),
    }
    for axis, (title, picture) in zip(axes[0], panels.items(), strict=True):
        plots.draw(axis, picture, title)
    plots.legend(fig, palette, names, sorted(predictions.unique().tolist()))
    alt = (
        "A scene with a boat and its predicted labels; the same scene with a copy of the boat in the sky and its "
        "predicted labels. Most of the copy in the sky is labelled plane, and the original stays boat."
    )
    plots.show(fig, alt=alt)
