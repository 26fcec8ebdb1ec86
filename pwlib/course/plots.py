"""Static figures: a training history, predictions beside the true labels, strokes, overlays, a trace of mean field.

The functions return a matplotlib `Figure` and leave the state of pyplot unchanged. A notebook shows the figure as the
value of a cell or with `show`; `savefig` writes it to a file. Curves differ in marker and in colour (Okabe & Ito).
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
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from pwlib.data import VOID, colorize, voc_palette
from pwlib.tools.pictures import overlay, to_uint8
from pwlib.trace import Trace

# Okabe & Ito (2008): distinguishable with any colour vision.
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
    """Create a figure and its axes [rows, columns], without frames at the top and on the right.

    pyplot does not track the figure, so that a notebook shows it only once.
    """
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        fig, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    plt.close(fig)
    return fig, axes


def history(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot loss and mIoU against the epochs of the three stages.

    Args:
        history: {"stage1": [record, ...], ...}, as `PiecewiseTrainer` returns it and writes it to history.json.

    Returns:
        The figure: the training loss on the left; on the right mIoU on the training batches and, for each part of the
        model that was validated (network, context, CRF), on the validation split.
    """
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
        "validation, context": (COLOURS["green"], "s"),
        "validation, crf": (COLOURS["vermilion"], "^"),
    }
    for name, curve in curves.items():
        colour, marker = styles.get(name, (COLOURS["purple"], "D"))
        axes = left if name == "training loss" else right
        label = name.replace("crf", "CRF")
        for stage in history:
            points = [(x, y) for x, y, of in curve if of == stage]
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
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=8)
    return fig


def predictions(
    rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]], palette: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """Show images beside their label maps, with a legend of the classes that occur.

    Args:
        rows: one (image, {title: label}) per row; image [3, H, W] in [0, 1], label int64 [H, W] with 255 = void.
            All rows have the same titles.
        palette: uint8 [K + 1, 3], the colour of void last.
        class_names: K names.
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


def strokes(
    image: Tensor, strokes: Tensor, labels: Mapping[str, Tensor], palette: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """Show an image, the strokes that a person drew on it, and the label maps computed from them, in one row.

    Args:
        image: [3, H, W] in [0, 1].
        strokes: int64 [H, W], 255 where there is no stroke.
        labels: {title: label map int64 [H, W]}.
        palette: uint8 [K + 1, 3], the colour of void last.
        class_names: K names.
    """
    height, width = image.shape[-2:]
    columns, side = len(labels) + 2, 2.9
    fig, axes = figure(1, columns, figsize=(side * columns, side * height / width + 0.6))
    draw(axes[0, 0], to_uint8(image), "photograph")
    draw(axes[0, 1], overlay(image, strokes, palette, alpha=1.0), "strokes")
    for cell, (title, label) in zip(axes[0, 2:], labels.items(), strict=True):
        draw(cell, colorize(label, palette), title)
    legend(fig, palette, class_names)
    return fig


def legend(fig: Figure, palette: np.ndarray, class_names: Sequence[str], present: Sequence[int] | None = None) -> None:
    """Add a legend of class colours below the figure.

    Args:
        palette: uint8 [K, 3], or [K + 1, 3] with the colour of void last.
        present: the classes to list (255 is void); all K by default.
    """
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


def trace(
    trace: Trace,
    *,
    class_names: Sequence[str] | None = None,
    palette: np.ndarray | None = None,
    iterations: Sequence[int] = (0, 1, 2, -1),
    label: int | None = None,
) -> Figure:
    """Show mean field for one class, one row per iteration: the static counterpart of the explorer.

    The first row is iteration 0: image, unary energy and free energy, then marginal, entropy and labels of the unary
    alone. Row t shows the messages of update t, the pairwise energy that they give, and the marginal, entropy and
    labels after it. A column has one colour scale for all rows.

    Args:
        trace: the recorded run, from `DenseCRF.trace`.
        class_names: K names; "label 0", "label 1", ... by default.
        palette: uint8 [K, 3] or [K + 1, 3]; see `label_colours` for the default.
        iterations: those to show, 0 to T; negative numbers count from the end, numbers beyond T are ignored.
        label: the class to show; by default the one whose marginals change most.
    """
    steps, kernels = trace.messages.shape[:2]
    classes, height, width = trace.unary.shape
    rows = [0, *sorted({t % (steps + 1) for t in iterations if -steps - 1 <= t <= steps} - {0})]
    c = most_changed(trace) if label is None else label
    names = [f"label {k}" for k in range(classes)] if class_names is None else class_names
    colours = np.vstack([label_colours(classes, palette), [[0, 0, 0]]]).astype(np.uint8)
    left, side = max(kernels + 1, 3), 1.75
    size = (side * (left + 3), (side * height / width + 0.12) * len(rows) + 1.2)
    fig, axes = figure(len(rows) + 1, left + 3, figsize=size, height_ratios=[1] * len(rows) + [0.05])
    axes, bars = axes[:-1], axes[-1]
    for cell in bars:
        cell.set_axis_off()

    maps = {f"{name}\nmessage": (trace.messages[:, m, c].numpy(), "viridis") for m, name in enumerate(trace.kernels)}
    maps["pairwise\nenergy"] = (trace.pairwise[:, c].numpy(), "cividis")
    after = {"marginal\nq": (trace.q[:, c].numpy(), "viridis", 1.0)}
    after["entropy\nnats"] = (trace.entropy.numpy(), "cividis", np.log(classes))
    for line, t in zip(axes, rows, strict=True):
        for column, (title, (values, cmap)) in enumerate(maps.items() if t else ()):
            limits = {"vmin": float(values.min()), "vmax": float(values.max())}
            drawn = line[column].imshow(values[t - 1], cmap=cmap, interpolation="nearest", **limits)
            line[column].set_title(title if t == rows[1] else "", fontsize=8)
            if t == rows[-1]:
                bar(fig, drawn, bars[column])
        for column, (title, (values, cmap, top)) in enumerate(after.items(), left):
            drawn = line[column].imshow(values[t], cmap=cmap, interpolation="nearest", vmin=0, vmax=top)
            line[column].set_title("" if t else title, fontsize=8)
            if t == rows[-1]:
                bar(fig, drawn, bars[column])
        draw(line[-1], colorize(trace.labels[t], colours), "" if t else "labels\nargmax q")
        for cell in line:
            cell.set_axis_off()
            cell.title.set_fontsize(8)
        line[-1].text(1.06, 0.5, f"iteration {t}", transform=line[-1].transAxes, rotation=90, va="center", fontsize=8)
    draw(axes[0, 0], to_uint8(trace.image))
    axes[0, 0].set_title("image\n", fontsize=8)
    axes[0, 1].imshow(trace.unary[c].numpy(), cmap="cividis", interpolation="nearest")
    low, high = float(trace.unary[c].min()), float(trace.unary[c].max())
    axes[0, 1].set_title(f"unary energy\n{low:.2g} to {high:.2g}", fontsize=8)
    if trace.free_energy is not None:
        chart = axes[0, 2]
        chart.set_axis_on()
        chart.plot(trace.free_energy.numpy(), color=COLOURS["blue"], marker="o", ms=2.5, lw=1)
        chart.set_title("free energy (nats)\nby iteration", fontsize=8)
        chart.tick_params(labelsize=6.5)
        chart.locator_params(nbins=4)
    fig.suptitle(f"class {names[c]}", fontsize=10, x=0.01, ha="left")
    legend(fig, colours, names, sorted({int(v) for v in trace.labels[rows].unique()}))
    return fig


def bar(fig: Figure, drawn: Any, axes: Axes) -> None:
    """Draw a thin colour bar below a column of maps."""
    axes.set_axis_on()
    scale = fig.colorbar(drawn, cax=axes, orientation="horizontal", ticks=MaxNLocator(3))
    scale.ax.tick_params(labelsize=6.5, length=2)
    scale.outline.set_visible(False)


def most_changed(trace: Trace) -> int:
    """Return the class whose marginals differ most between the first and the last iteration."""
    return int((trace.q[-1] - trace.q[0]).abs().sum((1, 2)).argmax())


def label_colours(num_classes: int, palette: np.ndarray | None = None) -> np.ndarray:
    """Return one colour per class, uint8 [K, 3].

    Args:
        palette: uint8 [K, 3], or [K + 1, 3] with void last. By default the colours of Okabe & Ito, or those of VOC if
            there are more than eight classes.

    Raises:
        ValueError: if the palette has another shape.
    """
    if palette is None:
        if num_classes > len(COLOURS):
            return voc_palette(num_classes)[:-1]
        return np.array([list(bytes.fromhex(c[1:])) for c in COLOURS.values()], np.uint8)[:num_classes]
    palette = np.asarray(palette, np.uint8)
    if palette.shape not in {(num_classes, 3), (num_classes + 1, 3)}:
        raise ValueError(f"palette has shape {list(palette.shape)}; expected [{num_classes}, 3], or one row more")
    return palette[:num_classes]


def draw(axes: Axes, picture: np.ndarray, title: str = "") -> None:
    """Draw a picture [H, W] or [H, W, 3] without ticks and without smoothing."""
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def show(fig: Figure, *, alt: str, dpi: int = 90) -> None:
    """Display a figure in a notebook as a PNG with alternative text, and close it.

    Args:
        alt: what the figure shows, in words, for readers who cannot see it. It is stored in the metadata of the output
            and as its plain-text form.
        dpi: resolution in pixels per inch.

    Raises:
        ValueError: if `alt` is empty.
    """
    from IPython.display import display  # installed with Jupyter; the library itself does not need it

    if not alt.strip():
        raise ValueError("alt is empty; expected a sentence that says what the figure shows")
    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(fig)
    # 256 colours chosen for this figure take a third of the space; the error stays below two or three grey levels.
    colours = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=0)
    colours.save(small, "png", optimize=True)
    bundle = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": alt}
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)
