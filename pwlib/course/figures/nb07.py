"""Figures of notebook 07: evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import VOID, colorize

# colour, marker, line
STYLES = {
    "network": (COLOURS["orange"], "^", ":"),
    "initial CRF": (COLOURS["green"], "s", "--"),
    "learned CRF": (COLOURS["blue"], "o", "-"),
}


def open_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def numbered(axes: Axes, values: Tensor, dark_below: float, smallest: float = -1.0, size: int = 9) -> None:
    """Write the entries of a matrix into its picture; entries below `smallest` stay empty."""
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            if value >= smallest:
                colour = "white" if value < dark_below else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)


def confusion_matrices(tables: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Show confusion matrices side by side, in per cent of the true class.

    Args:
        tables: {title: counts [K, K]}, rows the true classes.
    """
    fig, axes = plots.figure(1, len(tables), figsize=(5.6 * len(tables), 5.0))
    descriptions = []
    for axis, (title, counts) in zip(axes[0], tables.items(), strict=True):
        share = 100 * counts.double() / counts.sum(1, keepdim=True)
        drawn = axis.imshow(share.clamp(min=0.05), cmap="cividis", norm="log", vmin=0.05, vmax=100)
        numbered(axis, share, dark_below=5, smallest=0.5, size=7)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=title, xlabel="predicted class", ylabel="true class")
        wrong = share.clone().fill_diagonal_(0)
        t, p = divmod(int(wrong.argmax()), len(names))
        descriptions.append(
            f"{title}: {share.diagonal().mean():.0f} per cent on the diagonal on average; the largest other entry is "
            f"{wrong[t, p]:.0f} per cent, {names[t]} predicted as {names[p]}"
        )
    fig.colorbar(drawn, ax=axes[0, -1], label="per cent of the true class (log scale)")
    plots.show(fig, alt="Confusion matrices, rows the true class in per cent. " + ". ".join(descriptions) + ".")


def border_scores(image: Tensor, inside: Tensor, widths: Sequence[int], curves: Mapping[str, Tensor]) -> None:
    """Show a border band in one image, and mIoU in the band against its width.

    Args:
        image: [3, H, W] in [0, 1].
        inside: bool [H, W], the band of 2 pixels in this image.
        curves: {method: mIoU in per cent for each width, [len(widths)]}.
    """
    fig, axes = plots.figure(1, 2, figsize=(10.5, 3.5), width_ratios=[1, 1.3])
    shown = plots.to_uint8(image).astype(float)
    shown[~inside.numpy()] = 0.25 * shown[~inside.numpy()] + 190
    plots.draw(axes[0, 0], shown.astype(np.uint8), "a band of 2 px; the other pixels are faded")
    for title, values in curves.items():
        colour, marker, line = STYLES[title]
        axes[0, 1].plot(widths, values, color=colour, marker=marker, ls=line, label=title)
    axes[0, 1].set(xlabel="width of the band on either side (px)", ylabel="mIoU in the band (%)")
    axes[0, 1].set_xticks(widths)
    axes[0, 1].legend(frameon=False, loc="lower right")
    open_axes(axes[0, 1])
    ends = "; ".join(f"{t} {c[0]:.0f} at {widths[0]} px, {c[-1]:.0f} at {widths[-1]} px" for t, c in curves.items())
    plots.show(
        fig,
        alt="Left: a scene in which all pixels further than 2 pixels from a label border are faded. "
        f"Right: mIoU in the band against its width, in per cent. {ends}.",
    )


def reliability_diagrams(diagrams: Mapping[str, tuple[Tensor, Tensor, Tensor]], errors: Mapping[str, float]) -> None:
    """Show accuracy against confidence, and the share of pixels in each bin below.

    Args:
        diagrams: {method: (share, mean confidence, accuracy)}, [bins] each, nan where a bin is empty.
        errors: {method: expected calibration error}.
    """
    fig, axes = plots.figure(2, len(diagrams), figsize=(10.5, 4.6), height_ratios=[3, 1], sharex=True)
    for (above, below), (title, (share, mean, accuracy)) in zip(axes.T, diagrams.items(), strict=True):
        bins, filled = len(share), share > 1e-3  # fewer pixels give no reliable accuracy
        above.plot([0, 1], [0, 1], color="0.6", lw=1)
        above.plot(mean[filled], accuracy[filled], "o-", color=STYLES[title][0], mec="black", mew=0.5)
        above.set(title=f"{title}: ECE {100 * errors[title]:.1f} %", ylim=(0, 1.02), xlim=(0, 1.02))
        above.text(0.97, 0.05, "below the line: overconfident", ha="right", fontsize=8, color="0.35")
        below.bar((torch.arange(bins) + 0.5) / bins, 100 * share, 1 / bins, color="0.75", edgecolor="white")
        below.set(xlabel="confidence", ylim=(0, 100))
        open_axes(above)
        open_axes(below)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("% of pixels")
    found = ", ".join(
        f"{t} {100 * e:.1f} per cent, with {100 * diagrams[t][0][-1]:.0f} per cent of the pixels in the last bin"
        for t, e in errors.items()
    )
    plots.show(
        fig,
        alt="Reliability diagrams: accuracy against confidence in bins of equal width, and the share of pixels in each "
        f"bin. Expected calibration errors: {found}.",
    )


def ablation_intervals(rows: Mapping[str, tuple[float, tuple, tuple]]) -> None:
    """Show differences of mIoU with their paired and unpaired intervals.

    Args:
        rows: {variant: (difference, paired interval, unpaired interval)}, in points; an interval is (low, high).
    """
    fig, axes = plots.figure(figsize=(8, 3.8))
    axis = axes[0, 0]
    for row, (difference, paired, unpaired) in enumerate(rows.values()):
        first = row == 0
        axis.plot(unpaired, [row + 0.18] * 2, color="0.7", lw=3, label="unpaired interval" if first else None)
        axis.plot(paired, [row - 0.08] * 2, color=COLOURS["blue"], lw=3, label="paired interval" if first else None)
        axis.plot(difference, row - 0.08, "D", color="white", mec="black", ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="mIoU minus that of the learned CRF (points)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.02, 0.62))
    open_axes(axis)
    found = "; ".join(f"{t}: {d:+.1f}, paired from {p[0]:+.1f} to {p[1]:+.1f}" for t, (d, p, _) in rows.items())
    plots.show(fig, alt=f"Differences of mIoU with paired and unpaired 95 per cent intervals. {found}.")


def repeated_trainings(runs: Sequence[Mapping], variants: Sequence[str]) -> None:
    """Show the paired interval of each variant for every training of the same model.

    Args:
        runs: one mapping per seed, with "variants": {variant: {"difference": d, "paired": [low, high]}}, in points.
    """
    fig, axes = plots.figure(1, len(variants), figsize=(3.4 * len(variants), 3.2), sharey=True)
    for axis, variant in zip(axes[0], variants, strict=True):
        for row, run in enumerate(runs):
            entry = run["variants"][variant]
            axis.plot(entry["paired"], [row] * 2, color=COLOURS["blue"], lw=3, solid_capstyle="butt")
            axis.plot(entry["difference"], row, "D", color="white", mec="black", ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(variant, fontsize=10)
        axis.set_xlabel("difference of mIoU (points)")
        open_axes(axis)
    axes[0, 0].set_yticks(range(len(runs)), [f"seed {run['seed']}" for run in runs])
    axes[0, 0].invert_yaxis()
    found = {v: [run["variants"][v]["paired"] for run in runs] for v in variants}
    ends = "; ".join(f"{v}: {', '.join(f'{low:+.1f} to {high:+.1f}' for low, high in found[v])}" for v in variants)
    plots.show(
        fig,
        alt=f"Paired 95 per cent intervals of {len(variants)} ablations, in points of mIoU, for seeds "
        f"{', '.join(str(r['seed']) for r in runs)}. {ends}.",
    )


def failures(
    scenes: Sequence[int],
    images: Tensor,
    labels: Tensor,
    predictions: Mapping[str, Tensor],
    palette: np.ndarray,
    names: Sequence[str],
) -> None:
    """Show image, truth, both predictions, and the errors of the last one, for some scenes.

    Args:
        scenes: indices of images.
        images: [N, 3, H, W]. labels: [N, H, W] with 255 = void.
        predictions: {title: [N, H, W]}; the errors of the last one are shown in the colour of the wrong label.
    """
    classes, last = len(names), list(predictions.values())[-1]
    errors = torch.where((last == labels) | (labels == VOID), classes, last)
    rows = [
        (images[i], {"truth": labels[i], **{t: p[i] for t, p in predictions.items()}, "errors": errors[i]})
        for i in scenes
    ]
    colours = np.vstack([palette[:classes], [[205, 205, 205]], palette[classes:]])
    fig = plots.predictions(rows, colours, (*names, "right or void"))
    shares = ", ".join(f"{(errors[i] != classes).double().mean():.0%}" for i in scenes)
    plots.show(
        fig,
        alt=f"{len(scenes)} scenes: image, true labels, predictions of {' and '.join(predictions)}, and the errors of "
        f"the last in the colour of the wrong label. Wrong pixels: {shares}.",
    )


def recall_by_strength(
    strengths: Sequence[float],
    recall: Tensor,
    thin: int,
    names: Sequence[str],
    pictures: Mapping[str, np.ndarray | Tensor],
    palette: np.ndarray,
) -> None:
    """Show recall against the strength of a CRF, for a thin class and for all others, and some label maps.

    Args:
        recall: per cent, [strengths, K].
        thin: the index of the thin class.
        pictures: {title: image [3, H, W] in [0, 1], or labels [H, W]}.
    """
    widths = [1.9] + [1] * len(pictures)
    fig, axes = plots.figure(1, len(widths), figsize=(13.5, 3.2), width_ratios=widths)
    axis, places = axes[0, 0], range(len(strengths))
    others = [k for k in range(len(names)) if k != thin]
    low, high, mean = recall[:, others].amin(1), recall[:, others].amax(1), recall[:, others].mean(1)
    axis.fill_between(places, low, high, color=COLOURS["sky"], alpha=0.35, label="other classes: range")
    axis.plot(places, mean, "o-", color=COLOURS["blue"], label="other classes: mean")
    axis.plot(places, recall[:, thin], "s--", color=COLOURS["vermilion"], label=names[thin])
    axis.set_xticks(places, strengths)
    axis.set(xlabel="strength (1: weights 3 and 1)", ylabel="recall (%)", ylim=(0, 102))
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    open_axes(axis)
    for axis, (title, picture) in zip(axes[0, 1:], pictures.items(), strict=True):
        plots.draw(axis, plots.to_uint8(picture) if picture.ndim == 3 else colorize(picture, palette), title)
    thin_values, mean_values = ([f"{v:.0f}" for v in x] for x in (recall[:, thin], mean))
    plots.show(
        fig,
        alt=f"Left: recall in per cent at strengths {', '.join(map(str, strengths))}. {names[thin]}: "
        f"{', '.join(thin_values)}; mean of the other classes: {', '.join(mean_values)}. "
        f"Right: one scene: {', '.join(pictures)}.",
    )


def bars_kept(kept: Tensor, contrasts: Sequence[int], widths: Sequence[int]) -> None:
    """Show which part of a bar keeps its label, by contrast and width.

    Args:
        kept: per cent, [contrasts, widths].
    """
    fig, axes = plots.figure(figsize=(5.6, 3.7))
    axis = axes[0, 0]
    drawn = axis.imshow(kept, cmap="cividis", vmin=0, vmax=100, origin="lower")
    numbered(axis, kept, dark_below=50)
    axis.set_xticks(range(len(widths)), widths)
    axis.set_yticks(range(len(contrasts)), contrasts)
    axis.set(xlabel="width of the bar (px)", ylabel="contrast (grey levels)")
    fig.colorbar(drawn, ax=axis, label="% of the bar's pixels labelled as bar")
    rows = "; ".join(
        f"contrast {c}: {', '.join(f'{v:.0f}' for v in row)}" for c, row in zip(contrasts, kept.tolist(), strict=True)
    )
    plots.show(fig, alt=f"Per cent of a bar's pixels that are labelled as bar, for widths {list(widths)} px. {rows}.")


def held_out_strokes(image: Tensor, strokes: Tensor, found: Tensor, regions: Sequence[str]) -> None:
    """Show the strokes on a photograph, and which of their pixels were predicted correctly while held out.

    Args:
        image: [3, H, W] in [0, 1].
        strokes, found: true and predicted classes of the strokes' pixels, int64 [H, W], 255 elsewhere.
    """
    fig, axes = plots.figure(1, 3, figsize=(8.4, 3.9))
    picture, scored = plots.to_uint8(image), (strokes != VOID).numpy()
    drawn = picture.copy()
    drawn[scored] = colorize(strokes, photos.PALETTE)[scored]
    judged = (0.3 * picture + 0.7 * 255).astype(np.uint8)
    right = (found == strokes).numpy()
    judged[scored & right] = [0, 158, 115]  # green of Okabe & Ito
    judged[scored & ~right] = [0, 0, 0]
    for axis, shown, title in zip(
        axes[0], (picture, drawn, judged), ("photograph", "strokes", "held out: right, wrong"), strict=True
    ):
        plots.draw(axis, shown, title)
    legend = np.vstack([photos.PALETTE[:-1], [[0, 158, 115], [0, 0, 0]]])
    plots.legend(fig, legend, [*regions, "right", "wrong"])
    rates = ", ".join(f"{name} {100 * right[(strokes == k).numpy()].mean():.0f}" for k, name in enumerate(regions))
    plots.show(
        fig,
        alt="A portrait, the pen strokes on it in four colours, and the strokes in green where the CRF predicts them "
        f"correctly without having used them, in black where it does not. Per cent correct: {rates}.",
    )
