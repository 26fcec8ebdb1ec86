"""Pictures of label maps without a plotting library: overlays, a legend, a sheet of labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pwlib.annotations.check import Report
from pwlib.data import VOID, SegmentationDataset, colorize, read_image

GAP = 6  # px between the parts of a picture


def to_uint8(image: Tensor) -> np.ndarray:
    """Convert an image [3, H, W] in [0, 1] to uint8 [H, W, 3]."""
    return (255 * image.detach().cpu().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def overlay(image: Tensor, label: Tensor, palette: np.ndarray, *, alpha: float = 0.55) -> np.ndarray:
    """Blend the colours of a label map [H, W] with the image [3, H, W]: uint8 [H, W, 3]. Void shows the image alone."""
    pixels, colours = to_uint8(image).astype(np.float32), colorize(label, palette).astype(np.float32)
    share = np.where(np.asarray(label) == VOID, 0.0, alpha)[..., None]  # [H, W, 1]
    return ((1 - share) * pixels + share * colours).round().astype(np.uint8)


def label_image(label: Tensor, palette: np.ndarray) -> Image.Image:
    """A label map [H, W] as a palette image: pixel values are class numbers (255 = void), shown in their colours."""
    colours = np.tile(palette[-1], (256, 1))  # void's colour at 255, and between the last class and 255
    colours[: len(palette) - 1] = palette[:-1]
    picture = Image.fromarray(np.asarray(label).astype(np.uint8))
    picture.putpalette(colours.flatten().tolist())
    return picture


def legend(palette: np.ndarray, class_names: Sequence[str], present: Iterable[int], width: int) -> Image.Image:
    """A strip of `width` px (at least 240) with the colour and the name of each class in `present` (255 is void).

    The size of the text grows with the width.
    """
    width = max(width, 240)
    unit = max(12, width // 80)  # px, height of the text
    font = ImageFont.load_default(unit)
    entries = [(palette[-1], "void") if k == VOID else (palette[k], class_names[k]) for k in sorted(set(present))]
    places, x, y = [], unit // 2, unit // 2
    for _, name in entries:
        length = round(font.getlength(name)) + 3 * unit
        if x > unit and x + length > width:
            x, y = unit // 2, y + 2 * unit
        places.append((x, y))
        x += length
    strip = Image.new("RGB", (width, y + 2 * unit), "white")
    pen = ImageDraw.Draw(strip)
    for (colour, name), (x, y) in zip(entries, places, strict=True):
        pen.rectangle((x, y, x + unit, y + unit), fill=tuple(colour.tolist()), outline=(100, 100, 100))
        pen.text((x + round(1.4 * unit), y - unit // 8), name, fill="black", font=font)
    return strip


def stacked(*pictures: Image.Image) -> Image.Image:
    """Pictures below each other on a white page, aligned at the left."""
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def sheet(
    rows: Sequence[tuple[Tensor, dict[str, Tensor]]],
    palette: np.ndarray,
    class_names: Sequence[str],
    *,
    side: int = 240,
    overlays: bool = False,
) -> Image.Image:
    """One row per image: the image, its label maps under their titles, and a legend of the classes that occur.

    Args:
        rows: (image [3, H, W] in [0, 1], {title: label [H, W]}) for each row, with the same titles.
        side: width of every picture in px.
        overlays: show label maps over the image instead of alone.
    """
    titles = ["image", *rows[0][1]]
    left = [GAP + column * (side + GAP) for column in range(len(titles))]
    header = Image.new("RGB", (left[-1] + side + GAP, 22), "white")
    for x, title in zip(left, titles, strict=True):
        ImageDraw.Draw(header).text((x, 4), title, fill="black", font=ImageFont.load_default(12))
    lines = [header]
    for image, labels in rows:
        size = (side, max(1, round(side * image.shape[-2] / image.shape[-1])))
        line = Image.new("RGB", (header.width, size[1] + GAP), "white")
        line.paste(Image.fromarray(to_uint8(image)).resize(size, Image.Resampling.BILINEAR), (left[0], 0))
        for x, label in zip(left[1:], labels.values(), strict=True):
            pixels = overlay(image, label, palette) if overlays else colorize(label, palette)
            line.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (x, 0))
        lines.append(line)
    present = {int(k) for _, labels in rows for label in labels.values() for k in label.unique()}
    return stacked(*lines, legend(palette, class_names, present, header.width))


def label_sheet(report: Report, count: int = 8) -> Image.Image:
    """A sheet of images with their labels drawn over them, for `count` files spread over a checked data set."""
    if not report.files:
        raise ValueError("no image has a label without an error; there is nothing to draw")
    chosen = np.linspace(0, len(report.files) - 1, min(count, len(report.files))).round().astype(int)
    pairs = [report.files[k] for k in chosen]
    rows = [(read_image(image), {"label": report.reader(label).long()}) for image, label in pairs]
    return sheet(rows, report.palette, report.class_names, overlays=True)


@torch.no_grad()
def predictions(model: nn.Module, dataset: SegmentationDataset, count: int = 4) -> Image.Image:
    """A sheet of image, truth, network and CRF for `count` images spread over a data set; the model is in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    rows = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        image, label = dataset[index]
        unary, crf = (part[0].argmax(0).cpu() for part in model(image[None].to(device)))  # [H, W] each
        rows.append((image, {"truth": label, "network": unary, "CRF": crf}))
    return sheet(rows, dataset.palette, dataset.class_names)
