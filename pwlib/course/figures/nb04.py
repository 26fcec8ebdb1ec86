"""Figures of notebook 04: learning the CRF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS

# colour, marker, line of the four losses and of the four ways to learn
STYLES = [("blue", "o", "-"), ("green", "s", "--"), ("vermilion", "^", "-."), ("purple", "D", ":")]


def settings(photo: Tensor, strokes: Tensor, maps: Mapping[str, Tensor], regions: Sequence[str]) -> None:
    """Show the portrait, its strokes and the labels with three settings of the CRF."""
    fig = plots.strokes(photo, strokes, maps, photos.PALETTE, regions)
    alt = (
        "The portrait, the strokes, and the labels of three CRFs. With the first setting the outlines of cap and face "
        "are ragged, and some pixels of the face are labelled flag. With the second the regions have clean outlines. "
        "With the third, cap and collar are labelled flag, and parts of the face as well."
    )
    plots.show(fig, alt=alt)


def likelihoods(weights: Tensor, curves: Mapping[str, Sequence[float]], truth: float) -> None:
    """Show four losses, each less its minimum, against the pairwise weight that generated the data."""
    fig, axes = plots.figure(figsize=(7, 3.6))
    chart, found = axes[0, 0], []
    for (name, curve), (colour, marker, line) in zip(curves.items(), STYLES, strict=True):
        curve = np.array(curve)
        best = int(curve.argmin())
        chart.plot(weights, curve - curve.min(), line, color=COLOURS[colour], label=name.replace("_", " "))
        chart.plot(weights[best], 0, marker, color=COLOURS[colour], ms=8, clip_on=False)
        found.append(f"{name.replace('_', ' ')} {weights[best]:.2f}")
    chart.axvline(truth, color="0.6", lw=0.9)
    chart.set(xlabel="pairwise weight w", ylabel="loss minus its minimum (nats a pixel)", ylim=(0, 0.12))
    chart.annotate("true w", (truth, 0.112), (4, 0), textcoords="offset points", fontsize=8, color="0.35")
    chart.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    alt = (
        f"Four losses against w, each a curve with one minimum. The data were drawn with w = {truth}. Minima: "
        f"{', '.join(found)}."
    )
    plots.show(fig, alt=alt)


def finite_differences(steps: np.ndarray, errors: Mapping[str, np.ndarray], gradient: float) -> None:
    """Show the error of central differences against the step, for two precisions."""
    fig, axes = plots.figure(figsize=(6.5, 3.2))
    chart = axes[0, 0]
    for (name, error), (colour, marker, line) in zip(errors.items(), STYLES, strict=False):
        chart.loglog(steps, np.maximum(error, 1e-13), line, marker=marker, ms=4, color=COLOURS[colour], label=name)
    chart.axhline(gradient, color="0.5", lw=0.9)
    chart.annotate("size of the gradient", (steps[0], gradient), (0, 4), textcoords="offset points", fontsize=8)
    chart.set(xlabel="step ε", ylabel="error of the difference")
    chart.legend(frameon=False, fontsize=8, loc="lower left")
    best = [f"{name} {error.min():.0e} at a step of {steps[error.argmin()]:.0e}" for name, error in errors.items()]
    alt = (
        "Error of the finite difference for theta_beta against the step, on logarithmic axes: V-shaped curves. "
        f"Smallest errors: {'; '.join(best)}. In float32, the error of small steps is as large as the gradient itself."
    )
    plots.show(fig, alt=alt)


def history(history: np.ndarray) -> None:
    """Show loss, kernel weights and bandwidths [steps, 6] during training."""
    fig, axes = plots.figure(1, 3, figsize=(11, 3))
    panels = (
        ("loss of each batch (nats a pixel)", [(0, "loss")]),
        ("kernel weights", [(1, "w spatial"), (2, "w bilateral")]),
        ("bandwidths", [(3, "theta_alpha (px)"), (4, "theta_beta (grey levels)"), (5, "theta_gamma (px)")]),
    )
    for chart, (title, columns) in zip(axes[0], panels, strict=True):
        for (column, name), (colour, _, line) in zip(columns, STYLES, strict=False):
            chart.plot(np.arange(1, len(history) + 1), history[:, column], line, color=COLOURS[colour], label=name)
        chart.set(xlabel="step")
        chart.set_title(title, fontsize=10)
        if len(columns) > 1:
            ticks = [0.1, 0.3, 1, 3, 10, 30, 100]
            chart.set_yscale("log")
            chart.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            chart.set_yticks([], minor=True)
            values = history[:, [column for column, _ in columns]]
            chart.set_ylim(values.min() / 1.3, values.max() * 1.3)
            chart.legend(frameon=False, fontsize=8)
    first, last = history[0], history[-1]
    alt = (
        f"Three panels against the step. The loss falls from {first[0]:.2f} to {last[0]:.2f}, noisily. From the first "
        f"to the last step the spatial weight goes from {first[1]:.2f} to {last[1]:.2f}, the bilateral weight from "
        f"{first[2]:.1f} to {last[2]:.1f}, theta_alpha from {first[3]:.1f} to {last[3]:.1f} px, theta_beta from "
        f"{first[4]:.1f} to {last[4]:.1f} grey levels and theta_gamma from {first[5]:.1f} to {last[5]:.1f} px."
    )
    plots.show(fig, alt=alt)


def compatibility(relative: Tensor, names: Sequence[str]) -> None:
    """Show a compatibility matrix [K, K], each column relative to its diagonal entry."""
    fig, axes = plots.figure(figsize=(6.6, 5.4))
    chart, limit = axes[0, 0], float(relative.abs().max())
    drawn = chart.imshow(relative, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(relative.tolist()):
        for j, value in enumerate(row):
            ink = "white" if abs(value) > 0.7 * limit else "black"
            chart.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink)
    chart.set_xticks(range(len(names)), names, rotation=60)
    chart.set_yticks(range(len(names)), names)
    chart.set(xlabel="the sender's label", ylabel="the pixel's own label")
    chart.spines[["top", "right"]].set_visible(True)
    fig.colorbar(drawn, ax=chart, shrink=0.8, label="penalty relative to equal labels")
    negative = int((relative < 0).sum())
    alt = (
        f"The learned compatibility as a matrix of {len(names)} x {len(names)} numbers, each column relative to its "
        f"diagonal entry. The largest is {relative.max():.1f} and the smallest {relative.min():.1f}; {negative} are "
        "negative, and the matrix is not symmetric."
    )
    plots.show(fig, alt=alt)


def before_and_after(image: Tensor, maps: Mapping[str, Tensor], names: Sequence[str], palette: np.ndarray) -> None:
    """Show a test image with its true labels and the labels of the network and of two CRFs."""
    fig = plots.predictions([(image, maps)], palette, names)
    truth = maps["true labels"]
    known = truth != 255
    rates = ", ".join(f"{name} {100 * (m == truth)[known].float().mean():.0f} %" for name, m in list(maps.items())[1:])
    alt = (
        "A test image, its true labels, and the labels of the network, of the initial CRF and of the learned CRF. "
        f"Accuracy in this image: {rates}."
    )
    plots.show(fig, alt=alt)


def surface(betas: np.ndarray, weights: np.ndarray, surface: np.ndarray) -> None:
    """Show the loss [weights, betas] over theta_beta and w_bilateral, with the best weight of each column."""
    fig, axes = plots.figure(figsize=(6.4, 3.9))
    chart = axes[0, 0]
    levels = surface.min() + np.array([0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6])
    drawn = chart.contourf(betas, weights, surface, levels=levels, cmap="cividis_r", extend="max")
    chart.contour(betas, weights, surface, levels=levels, colors="white", linewidths=0.5)
    along = weights[surface.argmin(0)]
    chart.plot(betas, along, "--", color=COLOURS["vermilion"], lw=1.5, label="best w for each theta_beta")
    row, column = np.unravel_index(surface.argmin(), surface.shape)
    chart.plot(betas[column], weights[row], "*", color=COLOURS["vermilion"], ms=13, label="minimum", ls="none")
    chart.set(xscale="log", yscale="log", xlabel="theta_beta (grey levels)", ylabel="w bilateral")
    chart.legend(fontsize=8, loc="upper left")
    fig.colorbar(drawn, label="loss (nats a pixel)")
    lowest = surface.min(0)
    alt = (
        f"Contours of the loss on logarithmic axes. The minimum {surface.min():.3f} is at theta_beta "
        f"{betas[column]:.0f} and w {weights[row]:.1f}. With the best w for each theta_beta, the loss is at most "
        f"{lowest.max():.3f} over the whole range of theta_beta. For large w it rises steeply."
    )
    plots.show(fig, alt=alt)


def curves(curves: Mapping[str, np.ndarray], lines: Mapping[str, Sequence[float]]) -> None:
    """Show test scores against training steps for the ways to learn, mean and range over the orders of the batches.

    Args:
        curves: {way: [orders, scores, columns]} of benchmarks/learning.
        lines: {name: accuracy, NLL, ECE, calibrated NLL, temperature} of what was not trained.
    """
    fig, axes = plots.figure(1, 3, figsize=(10, 3.7))
    panels = (("accuracy (%)", 1, 100, (69, 87)), ("NLL (nats a pixel)", 2, 1, (0.55, 1.05)),
              ("calibrated NLL (nats a pixel)", 4, 1, (0.42, 0.78)))  # fmt: skip
    for chart, (title, column, factor, limits) in zip(axes[0], panels, strict=True):
        for (way, curve), (colour, marker, line) in zip(curves.items(), STYLES, strict=True):
            steps, values = curve[0, :, 0], factor * curve[..., column]
            chart.fill_between(steps, values.min(0), values.max(0), color=COLOURS[colour], alpha=0.2, lw=0)
            chart.plot(steps, values.mean(0), line, marker=marker, ms=4, color=COLOURS[colour], label=way)
        for (name, scores), style in zip(lines.items(), (":", "--"), strict=True):
            chart.axhline(factor * scores[column - 1], color="0.45", ls=style, lw=1)
            chart.text(318, factor * scores[column - 1], name.replace(" ", "\n"), va="center", fontsize=8, color="0.35")
        chart.set(xlabel="step", ylim=limits)
        chart.set_title(title, fontsize=10)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    final = "; ".join(
        f"{way} {100 * curve[:, -1, 1].mean():.1f} %, {curve[:, -1, 2].mean():.2f} nats"
        for way, curve in curves.items()
    )
    alt = (
        "Accuracy, negative log-likelihood and calibrated negative log-likelihood on test images against the step, "
        f"with the range over the orders of the batches. Means after the last step: {final}. The curves of the "
        "piecewise loss leave the panels."
    )
    plots.show(fig, alt=alt)
