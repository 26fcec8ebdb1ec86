"""Figures of lab 2: the scene of nine pixels, and mean field beside the exact answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pwlib.course import plots
from pwlib.course.plots import COLOURS


def scene(image: Tensor, labels: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Show a grey image [1, H, W] and label maps {title: int64 [H, W]}, with the name of each label."""
    fig, axes = plots.figure(1, len(labels) + 1, figsize=(8, 2.3))
    axes[0, 0].imshow(image[0], cmap="gray", vmin=0, vmax=1)
    axes[0, 0].set_title("image", fontsize=9)
    found = []
    for axis, (title, label) in zip(axes[0, 1:], labels.items(), strict=True):
        axis.imshow(label, cmap="cividis", vmin=0, vmax=len(names) - 1)
        for row, line in enumerate(label.tolist()):
            for column, value in enumerate(line):
                colour = "white" if value == 0 else "black"
                axis.text(column, row, names[value], ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(title, fontsize=9)
        found.append(f"{title}: " + "; ".join(", ".join(names[v] for v in line) for line in label.tolist()))
    for axis in axes[0]:
        axis.set(xticks=[], yticks=[])
    plots.show(fig, alt="An image and label maps of 3 rows of 3 pixels, row by row. " + ". ".join(found) + ".")


def confidence_and_divergence(
    strengths: Sequence[float],
    reference: Mapping[str, Sequence[float]],
    own: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Show the confidence of the exact marginals and of mean field, and their divergence, against the strength.

    Args:
        strengths: S values.
        reference: {"exact": [S], "mean field": [S], "KL(Q || P)": [S]}.
        own: the same of a learner's functions, drawn as crosses.
    """
    styles = {"exact": ("o", "-", "blue"), "mean field": ("^", "--", "vermilion"), "KL(Q || P)": ("s", "-", "black")}
    fig, axes = plots.figure(1, 2, figsize=(9, 3))
    found = []
    for axis, names, title in (
        (axes[0, 0], ("exact", "mean field"), "mean probability of the most probable label"),
        (axes[0, 1], ("KL(Q || P)",), "KL(Q || P), nats"),
    ):
        for name in names:
            marker, line, colour = styles[name]
            axis.plot(strengths, reference[name], color=COLOURS[colour], marker=marker, ls=line, label=name)
            if own:
                axis.plot(
                    strengths, own[name], "x", color="0.2", ms=8, label="your functions" if name != "exact" else None
                )
            found.append(f"{name} from {reference[name][0]:.2f} to {reference[name][-1]:.2f}")
        axis.set(xlabel="strength s", title=title)
        axis.title.set_fontsize(10)
        axis.legend(fontsize=8, frameon=False)
    plots.show(
        fig,
        alt=f"Against the strength from {strengths[0]:g} to {strengths[-1]:g}. Left, the mean confidence: {found[0]}, "
        f"{found[1]}. Right: {found[2]} nats.",
    )
