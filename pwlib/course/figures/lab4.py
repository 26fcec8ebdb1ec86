"""Figures of lab 4: the losses of stage 2, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pwlib.course import plots
from pwlib.course.plots import COLOURS
from pwlib.trace import Trace


def stage2_losses(curves: Mapping[str, Sequence[float]], test: Mapping[str, float]) -> None:
    """Show the training loss of stage 2, with the losses on the test images.

    Args:
        curves: {images: loss before each step}.
        test: {images: loss on the test images after training}; "initial" without training.
    """
    fig, axes = plots.figure(1, len(curves), figsize=(8.5, 2.8))
    found = []
    for axis, (name, losses) in zip(axes[0], curves.items(), strict=True):
        axis.plot(losses, color=COLOURS["black"], label="training images")
        axis.axhline(test[name], color=COLOURS["vermilion"], ls="--", label="test images, after training")
        axis.axhline(test["initial"], color=COLOURS["blue"], ls=":", label="test images, initial CRF")
        axis.set(title=f'trained on "{name}"', xlabel="step", ylim=(0, None))
        axis.title.set_fontsize(10)
        found.append(
            f"trained on {name}, from {losses[0]:.3f} to {losses[-1]:.3f} on the training images and {test[name]:.2f} "
            "on the test images"
        )
    axes[0, 0].set_ylabel("loss (nats per pixel)")
    axes[0, 0].legend(fontsize=7, frameon=False)
    plots.show(
        fig,
        alt=f"Loss of stage 2 against the step, in nats per pixel: {'; '.join(found)}. The initial CRF has "
        f"{test['initial']:.2f} on the test images.",
    )


def trace(trace: Trace, name: str, names: Sequence[str], palette: np.ndarray) -> None:
    """Show the mean-field iterations of a learned CRF for the label whose marginals change most."""
    plots.show(
        plots.trace(trace, class_names=names, palette=palette),
        alt=f'Mean field of the CRF trained on "{name}", on a test image: messages of both kernels, pairwise energy, '
        "marginals, entropy and labels at iterations 0 to 3.",
    )


def differences(rows: Mapping[str, tuple[float, float]]) -> None:
    """Show differences of mIoU with their intervals, {variant: (difference, half the width)}, in points."""
    fig, axes = plots.figure(figsize=(7, 2.8))
    axis = axes[0, 0]
    for row, (d, half) in enumerate(rows.values()):
        axis.plot([d - half, d + half], [row, row], color=COLOURS["blue"], lw=3)
        axis.plot(d, row, "D", color="white", mec="black", ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="mIoU minus that of the CRF trained on held-out images (points)")
    found = "; ".join(f"{name} {d:+.1f}, from {d - half:+.1f} to {d + half:+.1f}" for name, (d, half) in rows.items())
    plots.show(fig, alt=f"Differences of mIoU in points, with 95 per cent jackknife intervals: {found}.")
