"""Static figures: a training history, predictions beside the truth, overlays.

Every function returns a matplotlib `Figure` that a notebook shows as a cell's value and `savefig` writes; none touches
the state of pyplot. Lines are Okabe & Ito's colours, told apart by their markers too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pwlib.data import VOID, colorize

# Okabe & Ito (2008): told apart with any colour vision.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure outside pyplot's books (so that a notebook shows it once), and its axes [rows, columns]."""
    fig, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    plt.close(fig)
    return fig, axes


def history(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and mIoU over all epochs of the three stages, from what `PiecewiseTrainer` returns (or its history.json)."""
    fig, ((left, right),) = figure(1, 2, figsize=(10, 3.6))
    start, ends, curves = 0, [], {}
    for stage in sorted(history):
        for record in history[stage]:
            x = start + record["epoch"]
            points = {"training loss": record.get("loss"), "training batches": record.get("miou")}
            points |= {f"validation, {part}": scores["miou"] for part, scores in record.get("val", {}).items()}
            for name, y in points.items():
                if y is not None:
                    curves.setdefault(name, []).append((x, y, stage))
        if history[stage]:
            ends.append((stage, start, start + history[stage][-1]["epoch"]))
            start = ends[-1][2]
    styles = {
        "training loss": (COLOURS["black"], "."),
        "training batches": (COLOURS["orange"], "."),
        "validation, unary": (COLOURS["blue"], "o"),
        "validation, crf": (COLOURS["vermilion"], "^"),
    }
    for name, (colour, marker) in styles.items():
        axes = left if name == "training loss" else right
        label = name.replace("crf", "CRF")
        for stage in history:
            points = [(x, y) for x, y, of in curves.get(name, []) if of == stage]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=1.2, label=label)
                label = None
    for axes, title in ((left, "training loss (nats)"), (right, "mean IoU")):
        for stage, low, high in ends:
            axes.axvline(high + 0.5, color="0.8", lw=0.8, zorder=0)
            axes.annotate(stage, ((low + high) / 2 + 0.5, 1), (0, 3), ("data", "axes fraction"), ha="center",
                          textcoords="offset points", color="0.35", fontsize=8)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    if right.lines:
        right.legend(frameon=False, fontsize=8)
    return fig


def predictions(
    rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]], palette: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """One row an image: the image, then each label map under its title, and a legend of the classes that occur.

    rows: (image [3, H, W] in [0, 1], {title: label [H, W]}), the same titles in each.
    """
    titles = list(rows[0][1])
    height, width = rows[0][0].shape[-2:]
    side = 2.4
    fig, axes = figure(
        len(rows), len(titles) + 1, figsize=(side * (len(titles) + 1), side * len(rows) * height / width + 0.9)
    )
    for line, (image, labels) in zip(axes, rows, strict=True):
        draw(line[0], to_uint8(image), "image")
        for cell, title in zip(line[1:], titles, strict=True):
            draw(cell, colorize(labels[title], palette), title)
    for line in axes[1:]:
        for cell in line:
            cell.set_title("")
    present = sorted({int(v) for _, labels in rows for label in labels.values() for v in label.unique()})
    legend(fig, palette, class_names, present)
    return fig


def legend(fig: Figure, palette: np.ndarray, class_names: Sequence[str], present: Sequence[int] | None = None) -> None:
    """Name the palette's colours below the figure: all classes, or those `present` (255 is void)."""
    present = range(len(class_names)) if present is None else present
    handles = [
        Patch(
            facecolor=np.asarray(palette[-1 if index == VOID else index]) / 255,
            edgecolor="0.4",
            label="void" if index == VOID else class_names[index],
        )
        for index in present
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=8)


def overlay(image: Tensor, label: Tensor, palette: np.ndarray, *, alpha: float = 0.55) -> np.ndarray:
    """The label map's colours over the image [3, H, W]: uint8 [H, W, 3]. Void stays the bare image."""
    pixels, colours = to_uint8(image).astype(np.float32), colorize(label, palette).astype(np.float32)
    share = np.where(np.asarray(label) == VOID, 0.0, alpha)[..., None]
    return ((1 - share) * pixels + share * colours).round().astype(np.uint8)


def to_uint8(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return (255 * image.detach().cpu().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def draw(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    """A picture without ticks, pixels kept square and sharp."""
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def show(fig: Figure, *, alt: str, dpi: int = 90) -> None:
    """Display the figure in a notebook as a PNG that carries `alt`, a sentence for those who cannot see it; close it.

    The text is stored in the output's metadata, and as its plain-text form. ValueError without a text.
    """
    from IPython.display import display  # a notebook has it; the library alone does not need it

    if not alt.strip():
        raise ValueError("show needs alt text: a sentence that says what the figure shows")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(fig)
    bundle = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)
