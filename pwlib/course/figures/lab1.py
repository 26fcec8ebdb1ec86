"""Figures of lab 1: receptive fields, scenes, and cut-outs at different heights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from pwlib.course import plots
from pwlib.course.plots import COLOURS
from pwlib.data import colorize


def receptive_fields(dilations: Sequence[Sequence[int]], masks: Sequence[Tensor], cell: int) -> None:
    """Show which pixels an output cell depends on, one row for each chain of layers.

    Args:
        dilations: the dilations of each chain.
        masks: bool [N] for each chain.
        cell: the output cell.
    """
    fig, axes = plots.figure(len(masks), 1, figsize=(7, 0.7 * len(masks) + 0.7), sharex=True)
    found = []
    for axis, chain, mask in zip(axes[:, 0], dilations, masks, strict=True):
        title = ", ".join(map(str, chain))
        pixels = [pixel for pixel, inside in enumerate(mask) if inside]
        axis.bar(pixels, 1, color=COLOURS["blue"], width=0.8)
        axis.set(xlim=(-0.5, len(mask) - 0.5), ylim=(0, 1), yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
        found.append(f"Dilations {title}: pixels {', '.join(map(str, pixels))}.")
    axes[0, 0].set_title("pixels that the cell depends on, for the dilations on the left", fontsize=10)
    axes[-1, 0].set_xlabel(f"pixel (the output cell is at {cell})")
    alt = f"The pixels that cell {cell} depends on, for chains of layers with kernel 3. " + " ".join(found)
    plots.show(fig, alt=alt)


def scenes(images: Tensor, labels: Tensor, palette: np.ndarray, names: Sequence[str]) -> None:
    """Show images [N, 3, H, W] above their label maps [N, H, W]."""
    fig, axes = plots.figure(2, len(images), figsize=(1.8 * len(images), 2.7))
    for above, below, image, label in zip(*axes, images, labels, strict=True):
        plots.draw(above, plots.to_uint8(image))
        plots.draw(below, colorize(label, palette))
    plots.legend(fig, palette, names)
    plots.show(
        fig,
        alt="Small scenes and their labels: sky, sea and land with planes, boats, houses, tents, trees and poles.",
    )


def cut_outs(rows: Sequence[int], shares: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Show as what the pixels of a cut-out are classified, against the row of its upper end.

    Args:
        rows: R rows.
        shares: {object: {predicted class: share of the object's pixels for each row, [R]}}.
    """
    styles = (("blue", "o", "-"), ("vermilion", "^", "--"))
    fig, axes = plots.figure(1, len(shares), figsize=(4.5 * len(shares), 2.8))
    found = []
    for axis, (thing, curves) in zip(axes[0], shares.items(), strict=True):
        for (predicted, curve), (colour, marker, line) in zip(curves.items(), styles, strict=False):
            axis.plot(rows, curve, color=COLOURS[colour], marker=marker, ls=line, label=f"classified as {predicted}")
            found.append(f"{thing} classified as {predicted}: {', '.join(f'{share:.2f}' for share in curve)}")
        axis.set(xlabel="row of the upper end", title=f"a {thing}, cut out, on grey", ylim=(-0.03, 1.03))
        axis.legend(fontsize=8, frameon=False, loc="center left")
    axes[0, 0].set_ylabel("share of its pixels")
    plots.show(
        fig,
        alt="The share of the pixels of a cut-out that are classified as plane or boat, against the row of its upper "
        f"end ({', '.join(map(str, rows))}). " + "; ".join(found).capitalize() + ".",
    )
