"""Label image files with a trained run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from pwlib.data import read_image
from pwlib.runs import Run
from pwlib.tools.pictures import label_image, overlay


def label_files(run: Run, images: Sequence[str], out: str | Path, *, apply_crf: bool = True) -> Iterator[Path]:
    """Write NAME-label.png (palette), NAME-overlay.png and NAME-confidence.png for each image; yield the label's path.

    Raises:
        FileNotFoundError: an image is missing; nothing has been written then.
        ValueError: two images have the same name, or an image is broken.
    """
    out, names = Path(out), [Path(path).stem for path in images]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two images are called {name}; their predictions would overwrite each other")
    if missing := [path for path in images if not Path(path).is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not there; expected an image")
    out.mkdir(parents=True, exist_ok=True)
    for path, name in zip(images, names, strict=True):
        image = read_image(path)
        confidence, label = (part.cpu() for part in run.predict(image, apply_crf=apply_crf).max(0))  # [H, W] each
        label_image(label, run.palette).save(out / f"{name}-label.png")
        Image.fromarray(overlay(image, label, run.palette)).save(out / f"{name}-overlay.png")
        Image.fromarray((255 * confidence).round().byte().numpy()).save(out / f"{name}-confidence.png")
        yield out / f"{name}-label.png"
