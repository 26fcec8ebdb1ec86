"""The figure of lab 5: the divergence from the truth for several ways to combine piecewise terms."""

from __future__ import annotations

from collections.abc import Mapping

from pwlib.course import plots
from pwlib.course.plots import COLOURS

# marker and line, colour
STYLES = (("o-", "black"), ("s--", "orange"), ("x:", "vermilion"), ("^-", "blue"), ("v--", "green"))


def divergences(table: Mapping[tuple[str, str], tuple[float, float, float]], graphs: Mapping[str, int]) -> None:
    """Show both divergences from the truth, on a log scale.

    Args:
        table: {(graph, combination): (overconfidence, KL of the marginals, KL of the whole)}, KL in nats per node.
        graphs: {graph: number of its edges}.
    """
    combinations = list(dict.fromkeys(way for _, way in table))
    first, *_, last = graphs
    fig, axes = plots.figure(1, 2, figsize=(9.5, 3.2))
    found = []
    for axis, column, title in zip(axes[0], (1, 2), ("marginals", "whole distribution"), strict=True):
        for way, (style, colour) in zip(combinations, STYLES, strict=True):
            values = [table[name, way][column] for name in graphs]
            axis.semilogy(values, style, color=COLOURS[colour], label=way)
            found.append(f"{title}, {way}: {values[0]:.4f} on {first}, {values[-1]:.4f} on {last}")
        axis.set_xticks(range(len(graphs)), [f"{name}\n{edges} edges" for name, edges in graphs.items()], fontsize=8)
        axis.set_title(f"KL of the {title} (nats per node)", fontsize=10)
    axes[0, 1].legend(fontsize=7, frameon=False)
    plots.show(
        fig,
        alt="Divergence from the truth for five ways to combine the terms, on four graphs, on a log scale. "
        + "; ".join(found)
        + ".",
    )
