"""Figures of notebook 06: the contextual CRF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pwlib.course import plots
from pwlib.course.plots import COLOURS
from pwlib.data import colorize
from pwlib.trace import Trace

# colour, marker, line
COUNTING = {
    "plain sum": (COLOURS["vermilion"], "s", "--"),
    "plain sum, temperature": (COLOURS["orange"], "v", "-."),
    "tree": (COLOURS["blue"], "o", "-"),
    "reparametrised": (COLOURS["green"], "^", ":"),
}
MODELS = {
    "plain": ("network", COLOURS["black"], "o"),
    "larger": ("larger network", COLOURS["purple"], "D"),
    "tree": ("with context, tree", COLOURS["blue"], "s"),
    "reparametrised": ("with context, reparametrised", COLOURS["green"], "^"),
}


def field_name(field: str) -> str:
    """Return a receptive field of the stored study in words: "10 px", or "whole image"."""
    return "whole image" if field == "whole" else f"{field} px"


def patches(image: Tensor, label: Tensor, corners: Sequence[tuple[int, int]], side: int, names, palette) -> None:
    """Show a scene [3, H, W], its labels [H, W], and square patches with these upper left corners (row, column)."""
    fig, axes = plots.figure(1, 4, figsize=(10, 2.5), width_ratios=[2, 2, 1, 1])
    plots.draw(axes[0, 0], plots.to_uint8(image), "scene")
    plots.draw(axes[0, 1], colorize(label, palette), "true labels")
    for axis, (row, column), title in zip(axes[0, 2:], corners, "AB", strict=True):
        plots.draw(axis, plots.to_uint8(image[:, row : row + side, column : column + side]), f"patch {title}")
        frame = plots.plt.Rectangle((column - 0.5, row - 0.5), side, side, fill=False, ec="white", lw=1.5)
        axes[0, 0].add_patch(frame)
    plots.legend(fig, palette, names, sorted(label.unique().tolist()))
    alt = (
        f"A scene with a plane in the sky and a boat on the sea, its true labels, and two patches of {side}x{side} px "
        "cut from inside the plane and the boat. Both patches are red above a dark colour, with corners of background. "
        "Nothing in them shows which is which."
    )
    plots.show(fig, alt=alt)


def star(degrees: Sequence[int], equal: Mapping[str, Sequence], different: Mapping[str, Sequence]) -> None:
    """Show P(sea) on a star against the number of neighbours.

    Args:
        equal: {counting: (middle cell, outer cell) for each degree}, where all terms have the same marginals.
        different: {counting: the same}, where the edges have another marginal of the middle cell.
    """
    fig, axes = plots.figure(1, 3, figsize=(12, 3.2), sharey=True)
    panels = (
        ("equal marginals: middle cell", equal, 0),
        ("equal marginals: outer cell", equal, 1),
        ("different marginals: middle cell", different, 0),
    )
    for axis, (title, ways, which) in zip(axes[0], panels, strict=True):
        for name, points in ways.items():
            colour, marker, line = COUNTING[name]
            axis.plot(degrees, [p[which] for p in points], line, marker=marker, color=colour, label=name, ms=5)
        axis.axhline(0.7, color="0.6", lw=0.8, zorder=0)
        axis.set(xlabel="neighbours of the middle cell", ylim=(0.5, 1.02))
        axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("P(sea)")
    axes[0, 1].legend(frameon=False, fontsize=8, loc="center right")
    axes[0, 2].legend(frameon=False, fontsize=8, loc="upper left")
    last = {name: points[-1] for name, points in equal.items()}
    alt = (
        f"P(sea) on a star with up to {degrees[-1]} neighbours; 0.7 is correct. Equal marginals: by the plain sum the "
        f"middle cell rises to {last['plain sum'][0]:.3f} and outer cells stay at {last['plain sum'][1]:.2f}; with a "
        f"temperature they reach {last['plain sum, temperature'][0]:.2f} and {last['plain sum, temperature'][1]:.2f}; "
        "counted as a tree both stay at 0.7. Different marginals: counted as a tree the middle cell rises to "
        f"{different['tree'][-1][0]:.2f}, reparametrised it stays at {different['reparametrised'][-1][0]:.2f}."
    )
    plots.show(fig, alt=alt)


def learners(found: Mapping[str, Mapping[str, tuple[float, float]]], draws: int) -> None:
    """Show mean and half of the 95 % interval of several measures, a row for each learner: {measure: {learner: …}}."""
    fig, axes = plots.figure(1, len(found), figsize=(12, 2.6), sharey=True)
    colours = ("black", "purple", "green", "vermilion", "orange", "blue")
    titles = list(next(iter(found.values())))
    for axis, (measure, rows) in zip(axes[0], found.items(), strict=True):
        for row, ((mean, half), colour, marker) in enumerate(zip(rows.values(), colours, "oDPsv^", strict=True)):
            axis.errorbar(mean, row, xerr=half, fmt=marker, color=COLOURS[colour], ms=5, capsize=2)
        axis.axvline(0, color="0.7", lw=0.8, zorder=0)
        axis.set_title(measure, fontsize=9)
    axes[0, 0].set_yticks(range(len(titles)), titles, fontsize=9)
    axes[0, 0].invert_yaxis()
    text = "; ".join(
        f"{measure}: " + ", ".join(f"{name} {mean:.2f}" for name, (mean, _) in rows.items())
        for measure, rows in found.items()
    )
    plots.show(fig, alt=f"Six learners over {draws} draws, mean and 95 % interval of each measure. {text}.")


def boxes(photo: Tensor, cell: int, node: tuple[int, int], found: Mapping[str, np.ndarray]) -> None:
    """Show a photograph divided into cells, and the neighbours of one cell: {title: offsets [D, 2]}."""
    fig, axes = plots.figure(1, len(found), figsize=(12.5, 3.9))
    rows, columns = photo.shape[1] // cell, photo.shape[2] // cell
    for axis, (title, offsets) in zip(axes[0], found.items(), strict=True):
        axis.imshow(photo.permute(1, 2, 0), extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), alpha=0.7)
        axis.set_xticks(np.arange(-0.5, columns), []), axis.set_yticks(np.arange(-0.5, rows), [])
        axis.grid(color="white", lw=0.4)
        axis.tick_params(length=0)
        axis.plot(node[1] + offsets[:, 1], node[0] + offsets[:, 0], "s", color=COLOURS["blue"], ms=4)
        axis.plot(node[1], node[0], "o", color=COLOURS["vermilion"], ms=7, mec="white")
        axis.set_title(f"{title}:\n{len(offsets)} neighbours", fontsize=9)
    counts = ", ".join(f"{title} {len(offsets)}" for title, offsets in found.items())
    alt = (
        f"The portrait, divided into {rows}x{columns} cells. One cell on the chin is marked, with its neighbours: those"
        f" of a box around it, and those of a box above it, which covers the face. Numbers of neighbours: {counts}."
    )
    plots.show(fig, alt=alt)


def predictions(rows: Sequence, palette: np.ndarray, names: Sequence[str]) -> None:
    """Show scenes, their true labels, and the labels of networks with and without a context."""
    alt = (
        f"{len(rows)} test scenes: image, true labels, and the labels of three models without a dense CRF. The network "
        "with 10 px mixes plane and boat, roof and tent within single objects. With the context most objects have one "
        "label. The network with 34 px also gives most objects one label, with fewer wrong ones."
    )
    plots.show(plots.predictions(rows, palette, names), alt=alt)


def study(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], kinds: Mapping[str, str]) -> None:
    """Show mIoU against the receptive field, one panel for each kind of dense CRF: the seeds and their mean.

    Args:
        found: {field: {model: {kind: the score of each seed}}}.
        kinds: {kind: title of its panel}.
    """
    fig, axes = plots.figure(1, len(kinds), figsize=(11, 3.8), sharey=True)
    texts = []
    for axis, (kind, title) in zip(axes[0], kinds.items(), strict=True):
        for shift, (model, (name, colour, marker)) in enumerate(MODELS.items()):
            means = [float(np.mean(rows[model][kind])) for rows in found.values()]
            x = np.arange(len(found)) + 0.16 * (shift - 1.5)
            for at, rows in zip(x, found.values(), strict=True):
                axis.plot([at] * len(rows[model][kind]), rows[model][kind], "_", color=colour, ms=9, mew=1.5)
            axis.plot(x, means, marker, ls="none", color=colour, ms=6, label=name)
            values = ", ".join(f"{field_name(f)} {m:.1f}" for f, m in zip(found, means, strict=True))
            texts.append(f"{title}, {name}: {values}")
        axis.set_xticks(range(len(found)), [field_name(field) for field in found])
        axis.set_xlim(-0.5, len(found) - 0.5)
        axis.set(title=title, xlabel="receptive field of the network")
        axis.grid(axis="y", color="0.9")
    axes[0, 0].set_ylabel("mIoU on test scenes (%)")
    axes[0, 1].legend(frameon=False, fontsize=9, loc="lower right")
    plots.show(fig, alt="mIoU by receptive field and model, mean over seeds. " + "; ".join(texts) + ".")


def sweep(weights: Sequence[float], found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Show mIoU against the weight of the pairwise terms: {field: {counting: [seeds, weights]}}."""
    fig, axes = plots.figure(1, len(found), figsize=(12, 3.2), sharey=True)
    texts = []
    for axis, (field, ways) in zip(axes[0], found.items(), strict=True):
        for counting, scores in ways.items():
            colour, marker, line = COUNTING[counting]
            for one in scores:
                axis.plot(weights, one, line, color=colour, lw=0.7, alpha=0.35)
            mean = scores.mean(0)
            axis.plot(weights, mean, line, marker=marker, color=colour, ms=5, label=counting)
            texts.append(f"{field_name(field)}, {counting}: {', '.join(f'{v:.1f}' for v in mean.tolist())}")
        axis.set(title=field_name(field), xlabel="weight of the pairwise terms")
        axis.grid(axis="y", color="0.9")
    axes[0, 0].set_ylabel("mIoU on test scenes (%)")
    axes[0, 0].legend(frameon=False, fontsize=9)
    shown = ", ".join(f"{w:g}" for w in weights)
    alt = f"mIoU against the weight of the pairwise terms ({shown}), mean over seeds: " + "; ".join(texts) + "."
    plots.show(fig, alt=alt)


def against_chance(table: Tensor) -> Tensor:
    """Return the logarithm of how many times as often as by chance each pair occurs: counts [K, K] -> [K, K]."""
    table = table / table.sum()
    return (table / (table.sum(1, keepdim=True) * table.sum(0))).clamp(min=1e-3).log()


def pair_tables(expected: Tensor, true: Tensor, names: Sequence[str]) -> None:
    """Show how often each label lies above each other one, compared with chance: counts [K, K], lower label first."""
    fig, axes = plots.figure(1, 2, figsize=(11, 4.8))
    panels = {"expected by the network": against_chance(expected), "counted from the true labels": against_chance(true)}
    for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
        shown = axis.imshow(table, cmap="RdBu_r", vmin=-3, vmax=3)
        for a, b in (table.abs() > 0.7).nonzero().tolist():
            value = table[a, b].item()
            ink = "white" if abs(value) > 2 else "black"
            axis.text(b, a, f"{value:+.1f}", ha="center", va="center", fontsize=6.5, color=ink)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlabel="upper label", ylabel="lower label")
    fig.colorbar(shown, ax=axes[0].tolist(), label="log of the ratio to chance", extend="both")
    same = torch.corrcoef(torch.stack([table.flatten() for table in panels.values()]))[0, 1].item()
    alt = (
        "Two matrices: how much more often than by chance each label lies above each other one, expected by the "
        "pairwise network and counted from the true labels. Roof above wall, plane above plane and sky above plane are "
        f"red; almost everything above sky is blue. The two matrices agree, with a correlation of {same:.2f}."
    )
    plots.show(fig, alt=alt)


def evidence(mean: Tensor, enough: Tensor, titles: Sequence[str], names: Sequence[str], palette: np.ndarray) -> None:
    """Show what an edge adds to plane over boat, in nats, by the label at its other node: [panels, K]."""
    fig, axes = plots.figure(1, len(titles), figsize=(12, 3.2), sharex=True, sharey=True)
    classes, texts = range(len(names)), []
    for axis, title, values, known in zip(axes[0], titles, mean, enough, strict=True):
        axis.barh(classes, values.where(known, 0), color=np.array(palette[: len(names)]) / 255, edgecolor="0.3")
        for k in classes:
            text = f"{values[k]:+.1f}" if known[k] else "too few"
            axis.text(max(values[k].item(), 0) * known[k] + 0.15, k, text, va="center", fontsize=7.5)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("nats for plane over boat")
        texts.append(f"{title}: " + ", ".join(f"{names[k]} {values[k]:+.1f}" for k in classes if known[k]))
    axes[0, 0].set_yticks(classes, names)
    axes[0, 0].invert_yaxis()
    alt = "What an edge adds to plane over boat, in nats, by the label of the cell at its other end. "
    plots.show(fig, alt=alt + ". ".join(texts) + ".")


def pasted(pictures: Sequence[Tensor], labels: Mapping[str, Tensor], names: Sequence[str], palette: np.ndarray) -> None:
    """Show a scene and its edited copy [3, H, W], and the labels [2, H, W] that each model gives them."""
    fig, axes = plots.figure(2, len(labels) + 1, figsize=(10.5, 4.6))
    for row, picture in enumerate(pictures):
        plots.draw(axes[row, 0], plots.to_uint8(picture), ("a boat on the sea", "with a copy in the sky")[row])
        for axis, (title, maps) in zip(axes[row, 1:], labels.items(), strict=True):
            plots.draw(axis, colorize(maps[row], palette), "" if row else title)
    present = sorted(set().union(*(maps.unique().tolist() for maps in labels.values())))
    plots.legend(fig, palette, names, present)
    alt = (
        "A scene with a boat, and the same scene with a copy of the boat in the sky; below and beside them the labels "
        f"of {', '.join(labels)}. The network with 10 px labels both boats with the same mixture of classes. With the "
        "context, and with 34 px, most of the copy in the sky becomes plane."
    )
    plots.show(fig, alt=alt)


def trace(trace: Trace, names: Sequence[str], palette: np.ndarray, label: int) -> None:
    """Show mean field of the contextual CRF for one class, iterations 1 to 3."""
    fig = plots.trace(trace, class_names=names, palette=palette, label=label, iterations=(1, 2, 3))
    alt = (
        f"Mean field of the contextual CRF for the class {names[label]} on {trace.q.shape[2]}x{trace.q.shape[3]} cells,"
        " iterations 0 to 3: messages of the two relations, pairwise energy, marginal, entropy and labels. Messages "
        "for boat are lowest in the sky. The marginal of boat decreases on the planes and increases on the boats."
    )
    plots.show(fig, alt=alt)


def step_cost(times: Mapping[int, Sequence[float]], piecewise: float, edges: int) -> None:
    """Show the time of a training step (ms) against the mean-field iterations in it: {iterations: all times}."""
    fig, axes = plots.figure(figsize=(6, 3))
    chart, counts = axes[0, 0], list(times)
    median = {n: float(np.median(taken)) for n, taken in times.items()}
    low, high = [min(taken) for taken in times.values()], [max(taken) for taken in times.values()]
    chart.plot(counts, list(median.values()), "s--", color=COLOURS["vermilion"], label="through mean field")
    chart.fill_between(counts, low, high, color=COLOURS["vermilion"], alpha=0.15)
    chart.axhline(piecewise, color=COLOURS["blue"], label="piecewise: no inference")
    chart.set(xlabel="mean-field iterations in a training step", ylabel="time of a step (ms)")
    chart.set(ylim=(0, None), xlim=(0, counts[-1] + 0.5))
    chart.legend(frameon=False, fontsize=8)
    listed = ", ".join(f"{value:.0f} with {n}" for n, value in median.items())
    alt = (
        f"Milliseconds of a training step on {edges} edges: piecewise {piecewise:.0f}, for any number of iterations; "
        f"through mean field {listed}."
    )
    plots.show(fig, alt=alt)
