"""Label image files with a trained run."""

from __future__ import annotations

import glob
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pwlib.checkpoints import write_atomically
from pwlib.data import read_image
from pwlib.data.files import list_files
from pwlib.data.images import IMAGE_SUFFIXES
from pwlib.tools.pictures import label_image, legend, overlay, stacked
from pwlib.tools.runs import Run
from pwlib.tools.tiling import label_image as compute_label

KINDS = ("label", "overlay", "confidence")
MARK = "pwlib predict"  # key of a PNG text: the digest of the pixels that were written


def find_images(places: Sequence[str]) -> list[Path]:
    """The image files that are named, are in a named folder, or match a pattern such as `photos/*.jpg`, each once.

    FileNotFoundError if a place gives no image; ValueError if two images have the same name.
    """
    found: dict[str, Path] = {}  # by their names without suffixes
    for place in places:
        if Path(place).is_dir():
            paths = list_files(place, IMAGE_SUFFIXES)
        elif Path(place).is_file():
            paths = [Path(place)]
        else:
            matches = map(Path, sorted(glob.glob(place, recursive=True)))
            paths = [path for path in matches if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
        if not paths and Path(place).is_dir():
            raise FileNotFoundError(f"{place} contains no image; subfolders are not searched")
        if not paths:
            raise FileNotFoundError(f"{place} is not there; expected an image, a folder or a pattern")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise ValueError(
                    f"two images are called {path.stem}: {found[path.stem]} and {path}; their predictions would "
                    "overwrite each other"
                )
    return list(found.values())


def image_in_subfolder(folder: str | Path, searched: Iterable[str | Path]) -> Path | None:
    """An image in a direct subfolder, which `find_images` leaves out, or None; folders in `searched` do not count."""
    known = {Path(place).resolve() for place in searched}
    visible = Path(folder).glob("[!.]*/[!.]*")
    inside = (path for path in visible if path.parent.resolve() not in known)
    return next((path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES), None)


def label_files(
    run: Run, images: Sequence[Path], out: str | Path, *, apply_crf: bool = True
) -> Iterator[tuple[Path, list[Path], str]]:
    """Write NAME-label.png (palette), NAME-overlay.png (with a legend) and NAME-confidence.png for each image.

    Yields:
        The image, the files that were written, and the reason why it could not be labelled ("" if it was).

    Raises:
        FileExistsError: one of these files exists already, and this function did not write it, or it was changed since.
    """
    out = Path(out)
    outputs = {path: [out / f"{path.stem}-{kind}.png" for kind in KINDS] for path in images}
    for file in (file for files in outputs.values() for file in files):
        if file.exists() and not _replaceable(file):
            raise FileExistsError(
                f"{file} was not written by predict, or was changed since, and would be lost; choose another folder "
                "for the results, or move the file"
            )
    out.mkdir(parents=True, exist_ok=True)
    options = {"short_side": run.short_side, "apply_crf": apply_crf}
    for path, files in outputs.items():
        try:
            image = read_image(path)
            label, confidence = (part.cpu() for part in compute_label(run.model, image, **options))  # [H, W] each
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            yield path, [], str(error).split("\n")[0] or type(error).__name__
            continue
        picture = Image.fromarray(overlay(image, label, run.palette))
        key = legend(run.palette, run.class_names, label.unique().tolist(), picture.width)
        pictures = [label_image(label, run.palette), stacked(picture, key)]
        pictures += [Image.fromarray((255 * confidence).round().to(torch.uint8).numpy())]
        for file, content in zip(files, pictures, strict=True):
            _save(content, file)
        yield path, files, ""


def _save(picture: Image.Image, file: Path) -> None:
    """Write a PNG that `_replaceable` recognises, completely or not at all."""
    text, data = PngInfo(), io.BytesIO()
    text.add_text(MARK, _digest(picture))
    picture.save(data, "PNG", pnginfo=text)
    write_atomically(file, data.getvalue())


def _replaceable(file: Path) -> bool:
    """Whether `_save` wrote a file, and its pixels are still the same: a corrected label must not be lost."""
    try:
        with Image.open(file) as picture:
            return picture.info.get(MARK) == _digest(picture)
    except Exception:  # Pillow raises errors of all kinds for a file that is no image, or no complete one
        return False


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()
