"""Figures of lab 3: five faulty CRFs beside a healthy one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from pwlib.course import plots
from pwlib.data import VOID, colorize
from pwlib.trace import Trace


def label_maps(
    image: Tensor,
    truth: Tensor,
    network: Tensor,
    labels: Mapping[str, Sequence[Tensor]],
    iterations: Sequence[int],
    palette: np.ndarray,
) -> None:
    """Show the label maps of several programs after some iterations, with the share of correct pixels.

    Args:
        image: [3, H, W] in [0, 1].
        truth, network: int64 [H, W].
        labels: {program: one label map [H, W] for each iteration}.
        iterations: T numbers.
    """
    known = truth != VOID

    def correct(label: Tensor) -> float:
        return float((label == truth)[known].float().mean())

    fig, axes = plots.figure(len(labels), len(iterations) + 2, figsize=(9, 1.17 * len(labels)))
    found = []
    for line, (name, maps) in zip(axes, labels.items(), strict=True):
        plots.draw(line[0], plots.to_uint8(image), name)
        plots.draw(line[1], colorize(network, palette), f"network: {correct(network):.0%}")
        for axis, label, t in zip(line[2:], maps, iterations, strict=True):
            plots.draw(axis, colorize(label, palette), f"{t}: {correct(label):.0%}")
        found.append(f"{name} {', '.join(f'{correct(label):.0%}' for label in maps)}")
    plots.show(
        fig,
        alt=f"Label maps of a healthy CRF and of five patients after {', '.join(map(str, iterations))} iterations. "
        f"Share of correct pixels: network {correct(network):.0%}; {'; '.join(found)}. The labels of A alternate "
        "between noise and a plausible map, those of C form blobs; B, D and E look much like the healthy CRF.",
    )


def trace(film: Trace, letter: str, names: Sequence[str], palette: np.ndarray) -> None:
    """Show the iterations of one patient for the label whose marginals change most."""
    plots.show(
        plots.trace(film, class_names=names, palette=palette),
        alt=f"The iterations of patient {letter} for the label whose marginals change most: message, pairwise energy, "
        "marginal, entropy and labels at iterations 0, 1, 2 and 6.",
    )


def influences(fields: Mapping[str, Tensor], probe: tuple[int, int]) -> None:
    """Show the influence of the pixel `probe`, (row, column), on all others, {program: [H, W]}, on a log scale."""
    fig, axes = plots.figure(1, len(fields), figsize=(2 * len(fields), 2))
    found = []
    for axis, (name, field) in zip(axes[0], fields.items(), strict=True):
        axis.imshow(field.clamp_min(1e-9).log10(), cmap="cividis", vmin=-6, vmax=0)
        axis.plot(probe[1], probe[0], "w+")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        found.append(f"{name} {int((field > 1e-6).sum())}")
    plots.show(
        fig,
        alt="The influence of one pixel of a uniform image after one iteration, on a logarithmic scale. Number of "
        f"pixels that change by more than 0.000001: {', '.join(found)}. The influence decreases smoothly with the "
        "distance, except for D, where it forms horizontal stripes, and for E, where it is zero outside a square.",
    )
