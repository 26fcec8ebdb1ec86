"""Figures of notebook 05: the three stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import colorize
from pwlib.tools.pictures import overlay
from pwlib.trace import Trace

# colour, marker, line
STYLES = {
    "piecewise": (COLOURS["blue"], "o", "-"),
    "joint": (COLOURS["vermilion"], "s", "--"),
    "independent": (COLOURS["green"], "^", ":"),
    "independent, weights removed": (COLOURS["orange"], "v", "-."),
}
STAGES = {"stage1": COLOURS["sky"], "stage2": COLOURS["orange"], "stage3": COLOURS["vermilion"]}


def photograph(
    image: Tensor, sets: Mapping[str, Tensor], labels: Mapping[str, Tensor], accuracy: Mapping[str, float]
) -> None:
    """Show the portrait with two sets of strokes above, and the label map after each step below.

    Args:
        image: [3, H, W] in [0, 1].
        sets: {title: strokes int64 [H, W]}, 255 where there is no stroke.
        labels: {title: label map int64 [H, W]}.
        accuracy: {title of a label map: share of correct labels on the second set of strokes}.
    """
    columns = len(labels)
    fig, axes = plots.figure(2, columns, figsize=(10, 6.3))
    for cell in axes.flat:
        cell.set_axis_off()
    plots.draw(axes[0, 0], plots.to_uint8(image), "photograph")
    for cell, (title, strokes) in zip(axes[0, 1:], sets.items(), strict=False):
        plots.draw(cell, overlay(image, strokes, photos.PALETTE, alpha=1.0), title)
    for cell, (title, label) in zip(axes[1], labels.items(), strict=True):
        plots.draw(cell, colorize(label, photos.PALETTE), title)
    plots.legend(fig, photos.PALETTE, list(photos.REGIONS["portrait"]))
    found = ", ".join(f"{title} {100 * share:.0f} per cent" for title, share in accuracy.items())
    alt = (
        "Above: the portrait, the pen strokes for stage 1 and those for stage 2. Below: labels of the network after "
        "stage 1, which are speckled, with the initial CRF, which are smoother, and after stages 2 and 3, where the "
        "face has the label of the flag. "
        f"Correct on the strokes of stage 2: {found}."
    )
    plots.show(fig, alt=alt)


def gap(strengths: Tensor, gaps: Tensor, constant: float) -> None:
    """Show the piecewise minus the true negative log-likelihood against the strength of the pairwise energies."""
    fig, axes = plots.figure(figsize=(6.4, 3.2))
    axes[0, 0].plot(strengths, gaps, ".", color=COLOURS["blue"])
    axes[0, 0].axhline(constant, color="0.5", lw=1, ls="--")
    axes[0, 0].text(strengths[0], constant - 1.5, "7 log 9", va="top", fontsize=9, color="0.35")
    axes[0, 0].set(xlabel="standard deviation of the pairwise energies", ylabel="piecewise - true loss (nats)")
    axes[0, 0].set_ylim(0, None)
    strong = gaps[len(gaps) // 2 :]
    alt = (
        "Difference of the piecewise and the true negative log-likelihood for 100 random CRFs on a 2x3 grid. It is "
        f"never negative. It starts at 7 log 9 = {constant:.1f} nats; for the stronger half of the pairwise energies "
        f"it scatters from {strong.min():.0f} to {strong.max():.0f} nats."
    )
    plots.show(fig, alt=alt)


def history(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Show loss and mIoU over the epochs of the three stages."""
    fig = plots.history(history)
    for axis in fig.axes:
        for text in axis.texts:  # stages 2 and 3 are too short for their full names
            text.set_text(text.get_text().removeprefix("stage"))
        axis.set_title("stage", fontsize=9, pad=14)
    last = {stage: {p: 100 * s["miou"] for p, s in records[-1]["val"].items()} for stage, records in history.items()}
    ends = "; ".join(
        f"{stage.replace('stage', 'stage ')}: " + ", ".join(f"{p.replace('crf', 'CRF')} {v:.0f}" for p, v in s.items())
        for stage, s in last.items()
    )
    alt = (
        "Training loss, and mIoU, over the epochs of the three stages. The loss jumps between stages, because each has "
        f"a loss of its own. Validation mIoU in per cent after the last epoch of each stage: {ends}."
    )
    plots.show(fig, alt=alt)


def scenes(rows: Sequence[tuple], palette: np.ndarray, names: Sequence[str]) -> None:
    """Show test scenes with their true labels and those after each step; `rows` as for `plots.predictions`."""
    fig = plots.predictions(rows, palette, names)
    alt = (
        f"{len(rows)} test scenes: image, true labels, and the predictions after each step. The network predicts round "
        "regions. The default CRF sharpens some of their borders. After stages 2 and 3 the predictions follow the "
        "outlines of the large objects; small objects are still missing."
    )
    plots.show(fig, alt=alt)


def compatibility_change(change: Tensor, names: Sequence[str]) -> None:
    """Show how stage 2 changed the compatibility [K, K], relative to the diagonal entry of each column."""
    fig, axes = plots.figure(figsize=(6.6, 4.8))
    limit = float(change.abs().max())
    drawn = axes[0, 0].imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(change.tolist()):
        for j, value in enumerate(row):
            if abs(value) > 0.3 * limit:
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axes[0, 0].text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes[0, 0].set_xticks(range(len(names)), names, rotation=90)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set(xlabel="label of the sender", ylabel="label of the receiver")
    fig.colorbar(drawn, ax=axes[0, 0], label="change of the penalty (red: larger)")
    rows = change.sum(1) / (len(names) - 1)
    most, least = int(rows.argmax()), int(rows.argmin())
    alt = (
        "Matrix of how stage 2 changed the penalties, rows the receiver's label, columns the sender's. The diagonal is "
        f"zero by construction. Averaged over the other labels, the penalty of {names[most]} changes most, by "
        f"{rows[most]:+.2f}, and that of {names[least]} by {rows[least]:+.2f}."
    )
    plots.show(fig, alt=alt)


def class_ious(ious: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Show the IoU of each class, in per cent; `ious` maps a title to an array [K]."""
    fig, axes = plots.figure(figsize=(11, 3.4))
    colours = ("#FFFFFF", COLOURS["orange"], COLOURS["sky"], COLOURS["blue"])
    for i, (title, values) in enumerate(ious.items()):
        look = {"color": colours[i], "hatch": ("", "..", "//", "xx")[i], "edgecolor": "black"}
        axes[0, 0].bar(np.arange(len(names)) + 0.2 * (i - 1.5), values, 0.2, label=title, **look)
    axes[0, 0].set_xticks(range(len(names)), names)
    axes[0, 0].set(ylabel="IoU (%)", ylim=(0, 118))
    axes[0, 0].legend(frameon=False, ncols=4, fontsize=8, loc="upper center")
    found = "; ".join(f"{n} {', '.join(f'{v[k]:.0f}' for v in ious.values())}" for k, n in enumerate(names))
    plots.show(fig, alt=f"IoU of each class in per cent for {', '.join(ious)}: {found}.")


def traces(traces: Mapping[str, Trace], names: Sequence[str], palette: np.ndarray, label: int) -> None:
    """Show mean field with each CRF for one class, one figure per CRF."""
    for title, trace in traces.items():
        fig = plots.trace(trace, class_names=names, palette=palette, label=label, iterations=(1, -1))
        fig.suptitle(f"{title}, class {names[label]}", fontsize=10, x=0.01, ha="left")
        alt = (
            f"Mean field with the {title} for the class {names[label]} at iterations 0, 1 and 5: messages of the "
            "spatial and the bilateral kernel, pairwise energy, marginals, entropy and labels."
        )
        plots.show(fig, alt=alt)


def plans(plans: Mapping[str, Mapping[str, int]], costs: Mapping[str, float]) -> None:
    """Show how each method divides its compute among the stages.

    Args:
        plans: {method: {stage: steps}}. costs: {stage: cost of a step in stage-1 steps}.
    """
    fig, axes = plots.figure(figsize=(9, 2.3))
    found = []
    for row, (method, steps) in enumerate(plans.items()):
        start = 0.0
        for stage, count in steps.items():
            width = count * costs[stage]
            axes[0, 0].barh(row, width, left=start, color=STAGES[stage], edgecolor="black", height=0.6)
            text = f"{stage.replace('stage', 'stage ')}\n{count} steps"
            axes[0, 0].text(start + width / 2, row, text, ha="center", va="center", fontsize=8)
            start += width
            found.append(f"{method} {count} steps of {stage.replace('stage', 'stage ')}")
    axes[0, 0].set_yticks(range(len(plans)), list(plans))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="compute (stage-1 steps)")
    plots.show(fig, alt="Three bars of equal length, divided among the stages: " + ", ".join(found) + ".")


def performance(values: Mapping[str, Mapping[str, Tensor]], conditions: str) -> None:
    """Show test scores by method and seed; `values` maps a score's title to {method: per cent [S]}."""
    fig, axes = plots.figure(1, len(values), figsize=(11, 3.6))
    for axis, (title, by_method) in zip(axes[0], values.items(), strict=True):
        table = torch.stack(list(by_method.values()))  # [methods, S]
        axis.plot(range(len(table)), table, color="0.75", lw=0.8, zorder=0)
        for place, (method, scores) in enumerate(by_method.items()):
            colour, marker, _ = STYLES.get(method) or STYLES[method.split(",")[0]]
            axis.plot([place] * len(scores), scores, marker, color=colour, ms=6, mec="black", mew=0.5)
            axis.plot([place - 0.25, place + 0.25], [scores.mean()] * 2, color="black", lw=1.5)
        axis.set_xticks(range(len(table)), [method.replace(", ", ",\n") for method in by_method], fontsize=7.5)
        axis.set(title=f"{title} (%)", xlim=(-0.5, len(table) - 0.5))
    means = [
        f"{title}: " + ", ".join(f"{method} {scores.mean():.1f}" for method, scores in by_method.items())
        for title, by_method in values.items()
    ]
    alt = (
        f"Test scores {conditions}, by method; grey lines join the runs of one seed, and bars mark means. Means in per "
        f"cent. {'. '.join(means)}."
    )
    plots.show(fig, alt=alt)


def efficiency(budgets: Sequence[float], curves: Mapping[str, Tensor], halves: Mapping[str, Tensor]) -> None:
    """Show test mIoU against compute; `curves` maps a method to per cent [budgets, S], `halves` to [budgets]."""
    fig, axes = plots.figure(figsize=(8.6, 3.6))
    chart = axes[0, 0]
    for method, values in curves.items():
        colour, marker, line = STYLES[method]
        look = {"color": colour, "marker": marker, "ls": line, "capsize": 3, "label": method}
        chart.errorbar(budgets, values.mean(1), halves[method], **look)
    chart.set_xscale("log")
    chart.set_xticks(budgets, [f"{b:.0f}" for b in budgets])
    chart.minorticks_off()
    chart.set(xlabel="compute (stage-1 steps)", ylabel="test mIoU (%)", ylim=(0, None))
    chart.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    found = "; ".join(f"{m}: " + ", ".join(f"{v:.0f}" for v in c.mean(1)) for m, c in curves.items())
    sizes = ", ".join(f"{b:.0f}" for b in budgets)
    alt = f"Mean test mIoU in per cent, with 95 per cent intervals, for budgets of {sizes} stage-1 steps. {found}."
    plots.show(fig, alt=alt)


def stability(rates: Sequence[float], grids: Mapping[str, Tensor], budget: float) -> None:
    """Show test mIoU against the learning rate; `grids` maps a method to per cent [rates, S]."""
    fig, axes = plots.figure(figsize=(6.6, 3.4))
    chart, found = axes[0, 0], []
    for i, (method, grid) in enumerate(grids.items()):
        colour, marker, line = STYLES[method]
        chart.plot(range(len(rates)), grid.mean(1), color=colour, ls=line, marker=marker, label=method)
        for r, scores in enumerate(grid):
            chart.plot([r + 0.06 * (i - 1)] * len(scores), scores, marker, color=colour, ms=3, alpha=0.6)
        found.append(f"{method}: " + ", ".join(f"{v:.0f}" for v in grid.mean(1)))
    chart.set_xticks(range(len(rates)), [f"x {r:g}" for r in rates])
    chart.set(xlabel="factor of the learning rates", ylabel=f"test mIoU (%) at {budget:.0f} units", ylim=(0, None))
    chart.legend(frameon=False)
    alt = (
        f"Test mIoU in per cent at the learning rates times {', '.join(f'{r:g}' for r in rates)}, single seeds and "
        f"means. Means: {'; '.join(found)}."
    )
    plots.show(fig, alt=alt)


def exchange(tables: Mapping[str, Tensor]) -> None:
    """Show mIoU in per cent of the network of one seed (row) with the CRF of another (column), [S, S] each."""
    fig, axes = plots.figure(1, len(tables), figsize=(11, 3.8))
    losses = []
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        matrix(axis, table)
        axis.set(title=title, xlabel="CRF of seed", ylabel="network of seed")
        own = table.diagonal()
        losses.append(f"{title} {(own - (table.sum(1) - own) / (len(table) - 1)).mean():.1f}")
    alt = (
        "Matrices of test mIoU: the network of one seed (row) with the CRF of another (column). A network with its own "
        f"CRF is better than with those of other seeds by, in points: {', '.join(losses)}."
    )
    plots.show(fig, alt=alt)


def matrix(axis: Axes, table: Tensor) -> None:
    """Draw a matrix of scores, and write each entry into its cell, those of the diagonal in bold."""
    axis.imshow(table, cmap="viridis")
    middle = (table.min() + table.max()) / 2
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            colour, weight = ("white" if value < middle else "black"), ("bold" if i == j else "normal")
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour, weight=weight)
    axis.set_xticks(range(len(table)))
    axis.set_yticks(range(len(table)))
