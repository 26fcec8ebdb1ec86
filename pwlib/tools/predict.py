"""Label image files with a trained run."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from pwlib.data import VOID, read_image
from pwlib.data.files import list_files
from pwlib.data.images import IMAGE_SUFFIXES
from pwlib.tools.pictures import label_image, legend, overlay, stacked
from pwlib.tools.runs import Run
from pwlib.tools.tiling import label_image as compute_label


def find_images(places: Sequence[str]) -> list[Path]:
    """The image files that are named, are in a named folder, or match a pattern such as `photos/*.jpg`, each once.

    FileNotFoundError if a place gives no image; ValueError if two images have the same name.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            paths = list_files(path, IMAGE_SUFFIXES)
        elif path.is_file():
            paths = [path]
        else:
            paths = [Path(match) for match in sorted(glob.glob(place, recursive=True)) if Path(match).is_file()]
            paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            what = "contains no image" if path.is_dir() else "is not there; expected an image, a folder or a pattern"
            raise FileNotFoundError(f"{place} {what}")
        found |= dict.fromkeys(paths)
    names: dict[str, Path] = {}
    for path in found:
        if path.stem in names:
            raise ValueError(
                f"two images are called {path.stem}: {names[path.stem]} and {path}; their predictions would overwrite "
                "each other"
            )
        names[path.stem] = path
    return list(found)


def label_files(
    run: Run, images: Sequence[Path], out: str | Path, *, apply_crf: bool = True
) -> Iterator[tuple[Path, list[Path], str]]:
    """Write NAME-label.png (palette), NAME-overlay.png (with a legend) and NAME-confidence.png for each image.

    Yields:
        The image, the files that were written, and the reason why it could not be labelled ("" if it was).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    options = {"short_side": run.short_side, "apply_crf": apply_crf}
    for path in images:
        try:
            image = read_image(path)
            label, confidence = (part.cpu() for part in compute_label(run.model, image, **options))  # [H, W] each
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            yield path, [], str(error).split("\n")[0] or type(error).__name__
            continue
        picture = Image.fromarray(overlay(image, label, run.palette))
        key = legend(run.palette, run.class_names, [k for k in label.unique().tolist() if k != VOID], picture.width)
        pictures = {
            "label": label_image(label, run.palette),
            "overlay": stacked(picture, key),
            "confidence": Image.fromarray((255 * confidence).round().to(torch.uint8).numpy()),
        }
        files = [out / f"{path.stem}-{kind}.png" for kind in pictures]
        for file, content in zip(files, pictures.values(), strict=True):
            content.save(file)
        yield path, files, ""
