"""Figures of notebook 08: real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pwlib.course import photos, plots
from pwlib.course.plots import COLOURS
from pwlib.data import VOID, SegmentationDataset, colorize, voc_palette

# background, object, no stroke
TWO_LABELS = np.array([[86, 180, 233], [240, 228, 66], [255, 255, 255]], np.uint8)
# colour, marker
NETWORKS = {
    "scratch": (COLOURS["blue"], "o"),
    "pretrained": (COLOURS["vermilion"], "D"),
    "scratch, long": (COLOURS["green"], "s"),
}


def file_types(stored: Mapping[str, np.ndarray], images: Mapping[str, Tensor]) -> None:
    """Show files whose values were divided by 255 and clipped, and below them the same files as read by the library.

    Args:
        stored: {file: array [H, W] or [H, W, 3 or 4] as Pillow returns it}.
        images: {file: image [3, H, W] in [0, 1]}.
    """
    fig, axes = plots.figure(2, len(stored), figsize=(5.6, 4.9))
    for (above, below), (name, values) in zip(axes.T, stored.items(), strict=True):
        colours = np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values[..., :3]
        plots.draw(above, (colours / 255).clip(0, 1), f"{name}\nvalues / 255")
        plots.draw(below, plots.to_uint8(images[name]), "read_image")
        for axis in (above, below):
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
    alt = (
        "One photograph in three files. Upper row, values divided by 255: the telephone's file lies on its side, the "
        "cut-out has a bright pink surround, the scan is white everywhere. Lower row, read_image: all three are "
        "upright, the cut-out has a white surround, the scan is a grey picture."
    )
    plots.show(fig, alt=alt)


def cut_out(image: Tensor, strokes: Tensor, marginals: np.ndarray, names: Sequence[str]) -> None:
    """Show strokes, labels, the labels over the photograph, and the last classes cut out with their marginal.

    Two classes are cut out, or one if there are only two.

    Args:
        image: [3, H, W] in [0, 1]. strokes: int64 [H, W], 255 where there is no stroke. marginals: [K, H, W].
    """
    pixels, marginals = plots.to_uint8(image), torch.as_tensor(marginals).cpu()
    palette = photos.PALETTE if len(names) < len(photos.PALETTE) else voc_palette(len(names))
    last = min(2, len(names) - 1)
    labels, alpha = marginals.argmax(0), marginals[-last:].sum(0)[..., None].numpy()  # [H, W], [H, W, 1]
    kept = " or ".join(names[-last:])
    pictures = {
        "strokes": plots.overlay(image, strokes, palette, alpha=1.0),
        "labels of the dense CRF": colorize(labels, palette),
        "over the photograph": plots.overlay(image, labels, palette),
        f"P({kept}) as alpha": (alpha * pixels + (1 - alpha) * 255).astype(np.uint8),
    }
    fig, axes = plots.figure(1, len(pictures), figsize=(10, 3.5))
    for axis, (title, picture) in zip(axes[0], pictures.items(), strict=True):
        plots.draw(axis, picture, title)
    plots.legend(fig, palette, names)
    shares = ", ".join(f"{name} {(labels == k).float().mean():.0%}" for k, name in enumerate(names))
    alt = (
        f"Four panels: a photograph with strokes in {len(names)} colours; the labels of the dense CRF, which cover the "
        f"whole photograph ({shares}); the labels over the photograph; and the pixels of {kept} on white."
    )
    if names == list(photos.REGIONS["portrait"]):
        alt += (
            " The borders of background, face and uniform follow the outlines. Strips of the flag's golden fringe and "
            "cord are labelled face, and remain in the cut-out. The eyes, the upper rims of the glasses, the shadow "
            "below the chin and the dark end of the flag's lower edge are labelled uniform."
        )
    plots.show(fig, alt=alt)


def photograph_gallery(rows: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Show photographs with strokes for background and object, and below them the object with the background faded.

    Args:
        rows: {photograph: (image [3, H, W] in [0, 1], strokes [H, W] with 255 = none, labels [H, W])}.
    """
    widths = [image.shape[-1] / image.shape[-2] for image, _, _ in rows.values()]
    fig, axes = plots.figure(2, len(rows), figsize=(11, 4.4), width_ratios=widths)
    for (above, below), (name, (image, strokes, labels)) in zip(axes.T, rows.items(), strict=True):
        faded = plots.to_uint8(image)
        faded[labels.numpy() == 0] = faded[labels.numpy() == 0] * 0.2 + 204
        plots.draw(above, plots.overlay(image, strokes, TWO_LABELS, alpha=1.0), name)
        plots.draw(below, faded)
    plots.legend(fig, TWO_LABELS, ("background", "object"))
    shares = ", ".join(f"{name} {labels.float().mean():.0%}" for name, (_, _, labels) in rows.items())
    alt = (
        f"Photographs with strokes, and the pixels labelled object; the background is faded. Object: {shares}. "
        "Astronaut: person, suit and helmet are found; pale parts of the neck ring are missing, and a corner of the "
        "flag at the lower left is included. Cat: the border follows the fur; a strip at the upper right and two bumps "
        "beside the cheek are included. Coffee: cup, saucer and spoon are found, with holes at the foam and at "
        "reflections; the saucer's shadow on the table is included. Rocket: the body is found; most of the tip is "
        "missing, and specks near the lamps on the right are included."
    )
    plots.show(fig, alt=alt)


def predictions(rows: Mapping[str, tuple[Tensor, Tensor, Tensor]], palette: np.ndarray, names: Sequence[str]) -> None:
    """Show images, their predicted labels, the labels over the image, and the confidence of each pixel.

    Args:
        rows: {name: (image [3, H, W] in [0, 1], labels [H, W], confidence [H, W] in [0, 1])}.
    """
    heights = [image.shape[-2] / image.shape[-1] for image, _, _ in rows.values()]
    fig, axes = plots.figure(len(rows), 4, figsize=(10, 2.4 * sum(heights) + 0.9), height_ratios=heights)
    found = []
    for line, (name, (image, labels, confidence)) in zip(axes, rows.items(), strict=True):
        plots.draw(line[0], plots.to_uint8(image), name)
        plots.draw(line[1], colorize(labels, palette), "predicted labels")
        plots.draw(line[2], plots.overlay(image, labels, palette), "overlay")
        drawn = line[3].imshow(confidence, cmap="cividis", vmin=0, vmax=1)
        line[3].set_title(f"confidence, mean {confidence.mean():.2f}", fontsize=9)
        line[3].set_axis_off()
        fig.colorbar(drawn, ax=line[3], shrink=0.8, ticks=(0, 0.5, 1))
        bands = [band.flatten().bincount(minlength=len(names)).argmax() for band in labels.chunk(3)]
        top, middle, bottom = (names[band] for band in bands)
        found.append(
            f"{name}: mostly {top} in the upper third, {middle} in the middle, {bottom} in the lower third; mean "
            f"confidence {confidence.mean():.2f}"
        )
    plots.legend(fig, palette, names)
    plots.show(fig, alt="Images, predicted labels, overlays and confidences. " + ". ".join(found) + ".")


def scene_gallery(
    dataset: SegmentationDataset, chosen: Sequence[int], predicted: Tensor, accuracy: Tensor, palette: np.ndarray
) -> None:
    """Show some images of a data set in columns: image, true labels, predicted labels, and the accuracy above.

    Args:
        predicted: labels of all images, int64 [N, H, W]. accuracy: share of correct pixels, [N].
    """
    fig, axes = plots.figure(3, len(chosen), figsize=(2 * len(chosen), 4.8))
    for column, index in zip(axes.T, chosen, strict=True):
        image, label = dataset[index]
        plots.draw(column[0], plots.to_uint8(image), f"image {index}: {100 * accuracy[index]:.0f} %")
        plots.draw(column[1], colorize(label, palette))
        plots.draw(column[2], colorize(predicted[index], palette))
    for axis, title in zip(axes[:, 0], ("image", "truth", "predicted"), strict=True):
        axis.text(-0.06, 0.5, title, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=9)
    plots.legend(fig, palette, dataset.class_names, [*range(dataset.num_classes), VOID])
    shown = ", ".join(f"{index}: {100 * accuracy[index]:.0f}" for index in chosen)
    plots.show(
        fig,
        alt=f"{len(chosen)} validation images in columns: image, true labels, predicted labels. Correct pixels in per "
        f"cent, by image: {shown}.",
    )


def images_needed(runs: Sequence[Mapping], places: Mapping[str, str]) -> None:
    """Show the mIoU of networks against the number of training images: mean over the seeds, and their range.

    Args:
        runs: those of `benchmarks/backbone/images.json`. places: {name of a scored set: title}.
    """
    fig, axes = plots.figure(1, len(places), figsize=(9, 3.5), sharey=True)
    found = []
    for axis, (place, title) in zip(axes[0], places.items(), strict=True):
        for network in dict.fromkeys(run["network"] for run in runs):
            scores: dict[int, list[float]] = {}
            for run in (run for run in runs if run["network"] == network):
                scores.setdefault(run["images"], []).append(run["scores"][place]["unary"]["miou"])
            counts, values = list(scores), list(scores.values())
            means = [float(np.mean(v)) for v in values]
            colour, marker = NETWORKS[network]
            axis.plot(counts, means, color=colour, marker=marker, label=network)
            axis.fill_between(counts, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
            ends = ", ".join(f"{m:.0f} with {c}" for c, m in zip(counts, means, strict=True))
            found.append(f"{title}, {network}: {ends}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := sorted({run["images"] for run in runs}), ticks)
        axis.set(title=title, xlabel="training images", ylim=(0, 50))
    axes[0, 0].set_ylabel("mIoU of the network (%)")
    axes[0, 0].legend(frameon=False, loc="lower right")
    plots.show(fig, alt="Mean IoU in per cent against the number of training images. " + "; ".join(found) + ".")


def labellings(
    image: Tensor, label: Tensor, predicted: Mapping[str, Tensor], palette: np.ndarray, names: Sequence[str]
) -> None:
    """Show an image, its true labels, and several predictions [H, W] in one row."""
    fig = plots.predictions([(image, {"truth": label, **predicted})], palette, names)
    found = []
    for title, labels in predicted.items():
        shares = labels.flatten().bincount(minlength=len(names)) / labels.numel()
        order = [k for k in shares.argsort(descending=True).tolist() if shares[k] > 0]
        found.append(f"{title}: " + ", ".join(f"{names[k]} {shares[k]:.0%}" for k in order))
    plots.show(fig, alt=f"A scene, its true labels, and predictions with shares of the pixels. {'. '.join(found)}.")
