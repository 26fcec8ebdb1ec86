"""Convert LabelMe JSON, COCO JSON and masks to the data set "folder": index PNGs, images and classes.txt.

A pixel belongs to a polygon if its centre is inside, by the even-odd rule; pixel (x, y) covers [x, x + 1] x [y, y + 1].
Shapes are drawn one after the other: in the order of the file in LabelMe, from large to small in COCO. A box of COCO
without a segmentation is void where no shape covers it, because it does not say which of its pixels the object has.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pwlib.annotations.check import classes_error, image_orientation, read_classes_of, rotated
from pwlib.annotations.classes import LabelReader, parse_classes, parse_values, read_classes, read_text
from pwlib.data.files import list_files
from pwlib.data.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, VOID, image_size
from pwlib.data.palettes import voc_palette

BACKGROUND = "background"
VOID_NAMES = ("void", "__ignore__")
BACKGROUND_NAMES = (BACKGROUND, "_background_")
# An image, its size (H, W) according to its annotation, and (class name, mask bool [H, W]) in the order of drawing.
Annotated = tuple[Path, tuple[int, int], Iterator[tuple[str, np.ndarray]]]


@dataclass
class Summary:
    """What was converted: pixels per class, and notes about what was left out."""

    names: tuple[str, ...] = ()
    files: int = 0
    pixels: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = max(1, sum(self.pixels.values()))
        lines = [f"{self.files} images"]
        for k, name in [*enumerate(self.names), (VOID, "void")]:
            lines.append(f"  {name:20} {100 * self.pixels[k] / total:6.2f} % of the pixels")
        return "\n".join(lines + [f"note: {count} {text}" for text, count in self.notes.items()])


def convert(
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    classes: str | None = None,
    palette: str | None = None,
    values: dict[int, int] | None = None,
    void: int | None = VOID,
    rest: str = BACKGROUND,
    split: str | None = None,
) -> Summary:
    """Write `out/images`, `out/labels` (or below `out/<split>`) and `out/classes.txt`.

    Args:
        source: a COCO file, a folder of LabelMe files, a folder of masks (with the names of their images; "-mask" or
            "_mask" may follow, and the images may be in the same folder), or a folder in VOC's layout, as CVAT exports
            "segmentation masks".
        images: folder of the images; None: the places that the annotations name. A folder of masks needs it.
        classes: class names, separated by commas or in a file (see `read_classes`); None: all categories of a COCO file
            by their ids, the labels in LabelMe files in alphabetical order, the numbers in masks.
        palette, values, void: the meaning of masks, see `LabelReader`; palette: a file with lines `name r g b`.
        rest: the class of pixels without annotation, or "void".

    Raises:
        FileNotFoundError, ValueError: an input is missing or damaged, a label is not in `classes`, or `out/classes.txt`
            has other classes; nothing is written then.
    """
    source, base = Path(source), Path(out) / split if split else Path(out)
    for part in ("images", "labels"):
        if (base / part).is_dir() and any((base / part).iterdir()):
            raise FileExistsError(f"{base / part} is not empty; choose another --out or --split")
    if (source / "SegmentationClass").is_dir() and (source / "labelmap.txt").is_file():  # VOC's layout
        images, palette = images or source / "JPEGImages", palette or str(source / "labelmap.txt")
        source = source / "SegmentationClass"
    kind, content = _open_source(source)
    summary = Summary()
    if kind == "masks":
        return _convert_masks(content, base, Path(out), images, classes, palette, values, void, summary)
    reader = {"coco": _read_coco, "labelme": _read_labelme}[kind]
    annotated, declared, used = reader(content, source, Path(images) if images else None, summary)
    names, colours = parse_classes(classes) if classes else (None, None)
    if names is None:
        ignored = (*VOID_NAMES, *BACKGROUND_NAMES)
        names = tuple(name for name in dict.fromkeys(declared) if name not in ignored)
        if unused := [name for name in names if name not in used]:
            summary.notes["categories have no pixels; to leave them out, list the others with --classes"] = len(unused)
        names = names if rest == "void" else (rest, *(name for name in names if name != rest))
    elif rest not in ("void", *names):
        raise ValueError(f"--rest {rest} is not in --classes {', '.join(names)}; expected one of them, or void")
    if unknown := [name for name in used if name not in (*names, *VOID_NAMES, *BACKGROUND_NAMES)]:
        raise ValueError(f"the annotations contain {', '.join(unknown)}, which --classes does not name")
    numbers = {name: k for k, name in enumerate(names)} | dict.fromkeys(VOID_NAMES, VOID)
    fill = numbers.get(rest, VOID)
    numbers |= {name: numbers.get(name, fill) for name in BACKGROUND_NAMES}
    lines = _class_lines(Path(out), names, colours)
    for file, read in annotated.items():
        try:
            image, size, shapes = read()
            label = np.full(size, fill, np.uint8)
            for name, mask in shapes:
                label[mask] = numbers[name]
            _write_pair(image, label, base, summary)
        except (ValueError, FileNotFoundError) as error:
            summary.failed.append(f"{file}: {error}")
        except (KeyError, TypeError, IndexError) as error:
            summary.failed.append(f"{file}: its annotation is damaged ({type(error).__name__}: {error})")
    return _finish(Path(out), names, lines, summary)


# ------------------------------------------------------------------------------------------------------------- sources


def _open_source(source: Path) -> tuple[str, Any]:
    """The kind of a source, and its content: a COCO dictionary, {path: LabelMe dictionary}, or a list of masks."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; expected COCO JSON, LabelMe JSON or masks")
    paths = list_files(source, (".json",)) if source.is_dir() else [source]
    contents = {path: _read_json(path) for path in paths}
    coco = [path for path, content in contents.items() if {"images", "annotations", "categories"} <= content.keys()]
    if coco and len(paths) == 1:
        return "coco", contents[coco[0]]
    if coco:
        raise ValueError(f"{source} contains several JSON files; give the path of the COCO file, for example {coco[0]}")
    if labelme := {path: content for path, content in contents.items() if "shapes" in content}:
        return "labelme", labelme
    if source.is_dir() and not paths and (masks := list_files(source, LABEL_SUFFIXES)):
        return "masks", masks
    jpeg = source.is_dir() and list_files(source, (".jpg", ".jpeg"))
    remedy = "; JPEG changes the values of masks, which must be PNG" if jpeg else ""
    raise ValueError(f"{source} is neither COCO JSON, nor a folder of LabelMe JSON, nor a folder of masks{remedy}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _read_coco(content: dict[str, Any], source: Path, folder: Path | None, summary: Summary):
    """COCO: {image: function that reads it}, the names of all categories by their ids, and of those used."""
    for part in ("categories", "images", "annotations"):
        if not isinstance(content[part], list):
            raise ValueError(f"{source}: {part} is not a list; expected COCO JSON")
    categories: dict[Any, str] = {}
    for category in content["categories"]:
        k, name = _coco_id(category, "id", source), _class_name(category.get("name"), f"{source}: a category")
        if categories.setdefault(k, name) != name:
            raise ValueError(f"{source}: {categories[k]} and {name} both have the id {k}; expected different ids")
    files: dict[Any, str] = {}
    entries: dict[str, dict[Any, dict]] = {}  # of a file by their ids: merged COCO files list an image several times
    for entry in content["images"]:
        k, name = _coco_id(entry, "id", source), entry.get("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{source}: the image with the id {k} has no file_name; expected one")
        if files.setdefault(k, name) != name:
            raise ValueError(f"{source}: {files[k]} and {name} both have the id {k}; expected different ids")
        entries.setdefault(name, {})[k] = entry
    by_image: dict[Any, list] = {k: [] for k in files}
    used = set()
    for annotation in content["annotations"]:
        if (k := _coco_id(annotation, "image_id", source)) not in by_image:
            summary.notes["annotations belong to images that the file does not list, and were left out"] += 1
            continue
        by_image[k].append(annotation)
        if _has_outline(annotation):
            used.add(_coco_id(annotation, "category_id", source))

    def masks(size: tuple[int, int], annotations: list) -> Iterator[tuple[str, np.ndarray]]:
        outlined = []
        for annotation in annotations:
            if _has_outline(annotation):
                name = categories[_coco_id(annotation, "category_id", source)]
                outlined.append((name, _coco_mask(annotation["segmentation"], size)))
            elif annotation.get("bbox"):  # somewhere in it is an object, the rest of it is unknown
                x, y, width, height = annotation["bbox"]
                yield VOID_NAMES[0], _coco_mask([[x, y, x + width, y, x + width, y + height, x, y + height]], size)
                summary.notes["annotations are boxes without a segmentation; the pixels in the boxes are void"] += 1
            else:
                raise ValueError("an annotation has neither a segmentation nor a bbox; expected one of them")
        yield from sorted(outlined, key=lambda pair: -pair[1].sum())

    def read(name: str) -> Annotated:
        sizes = {(entry["height"], entry["width"]) for entry in entries[name].values()}
        if len(sizes) > 1:
            raise ValueError(f"it is listed with the sizes {' and '.join(f'{h}x{w}' for h, w in sizes)}; expected one")
        path = _find(name, folder, source.parent if source.is_file() else source)
        (size,) = sizes
        return path, size, masks(size, [a for k in entries[name] for a in by_image[k]])

    readers = {name: partial(read, name) for name in entries}
    ordered = sorted(categories, key=lambda k: (isinstance(k, str), k))  # numbers before texts
    # All categories, used or not, so that the files of two splits give the same classes.
    return readers, [categories[k] for k in ordered], [categories[k] for k in ordered if k in used]


def _coco_id(item: Any, key: str, source: Path) -> int | float | str:
    """An id in a COCO file. Some programs write the number 4 as the text "4" in one place and not in another."""
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{source}: an entry has no {key}: {json.dumps(item)[:100]}; expected a number")
    return int(value) if re.fullmatch("0|[1-9][0-9]*", str(value)) else value


def _has_outline(annotation: dict[str, Any]) -> bool:
    """Whether a COCO annotation has a mask or a polygon with points."""
    return any(annotation.get("segmentation") or ())


def _coco_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask [H, W] of COCO polygons, or of a run-length encoding (column by column, background first)."""
    if isinstance(segmentation, list):
        parts = [draw_polygon(np.reshape(part, (-1, 2)), size) for part in segmentation]
        return np.logical_or.reduce(parts)
    if isinstance(segmentation["counts"], list):
        runs = np.repeat(np.arange(len(segmentation["counts"])) % 2 == 1, segmentation["counts"])
        return runs.reshape(segmentation["size"][::-1]).T
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError("the COCO file has compressed masks, which need `pip install pycocotools`") from error
    counts = segmentation["counts"]
    encoded = {"size": segmentation["size"], "counts": counts.encode() if isinstance(counts, str) else counts}
    return mask.decode(encoded).astype(bool)


def _read_labelme(contents: dict[Path, dict], source: Path, folder: Path | None, summary: Summary):
    """LabelMe: {file: function that reads it}, and twice the names of all labels in alphabetical order."""

    def read(path: Path, content: dict[str, Any]) -> Annotated:
        image = _find(content.get("imagePath") or path.stem, folder, path.parent, path.stem)
        size = image_size(image)
        if not isinstance(content["shapes"], list):
            raise ValueError(f"shapes is {json.dumps(content['shapes'])[:100]}; expected a list")
        size = (content.get("imageHeight") or size[0], content.get("imageWidth") or size[1])
        return image, size, masks(content["shapes"], size)

    def masks(shapes: list, size: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
        for shape in shapes:
            mask, name = _labelme_mask(shape, size), _class_name(shape.get("label"), "a shape")
            if mask is None:
                summary.notes[f"shapes of type {shape.get('shape_type')} have no area and were left out"] += 1
            else:
                yield name, mask

    readers = {str(path): partial(read, path, content) for path, content in contents.items()}
    shapes = [
        shape for content in contents.values() if isinstance(content["shapes"], list) for shape in content["shapes"]
    ]
    labels = [shape.get("label") for shape in shapes if isinstance(shape, dict)]
    names = sorted({label.strip() for label in labels if isinstance(label, str)} - {""})  # `read` refuses the others
    return readers, names, names


def _labelme_mask(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """The mask [H, W] of a polygon, rectangle, circle or mask; None for points and lines."""
    points, kind = np.reshape(shape["points"], (-1, 2)).astype(float), shape.get("shape_type") or "polygon"
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    elif kind == "circle":
        radius, angles = np.hypot(*(points[1] - points[0])), np.linspace(0, 2 * np.pi, 181)[:-1]
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    elif kind == "mask":
        mask, (left, top) = np.zeros(size, bool), points[0].astype(int)
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        part = part[: max(0, size[0] - top), : max(0, size[1] - left)]
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        return mask
    elif kind != "polygon":
        return None
    return draw_polygon(points, size)


def draw_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask bool [H, W] of the pixels whose centre is in the polygon [N, 2] of (x, y), by the even-odd rule."""
    if not np.isfinite(points).all():
        raise ValueError("a polygon has coordinates that are infinite or NaN; expected numbers in px")
    mask, y, x = np.zeros(size, bool), np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        crossed = (y0 > y) != (y1 > y)  # the rows that the edge crosses
        crossings = x0 + (y[crossed] - y0) * (x1 - x0) / (y1 - y0)
        mask[crossed] ^= x < crossings[:, None]
    return mask


def _class_name(name: Any, owner: str) -> str:
    """The name that an annotation gives to a class, without spaces at its ends; ValueError if it is not a text."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{owner} is called {json.dumps(name)}; expected the name of a class")
    return name.strip()


def _find(name: str, folder: Path | None, beside: Path, stem: str | None = None) -> Path:
    """The image that an annotation names: in `folder`, or relative to the annotation, or with the annotation's stem."""
    relative, folders = Path(name.replace("\\", "/")), [place for place in (folder, beside) if place]
    named = (place / part for place in folders for part in (relative, relative.name))
    same_stem = (path for place in folders if stem for path in list_files(place, IMAGE_SUFFIXES) if path.stem == stem)
    if found := next((path for path in chain(named, same_stem) if path.is_file()), None):
        return found
    raise FileNotFoundError(f"the image {name} is neither in {folder or beside} nor in {beside}; give --images")


# ------------------------------------------------------------------------------------------------------------- outputs


def _convert_masks(
    masks: Sequence[Path], base: Path, out: Path, images, classes, palette, values, void, summary: Summary
) -> Summary:
    """Decode masks to index PNGs; files that fail are listed in the summary."""
    if images is None:
        raise ValueError("masks need --images, the folder of the images that they belong to")
    names, colours = parse_classes(palette or classes) if palette or classes else (None, None)
    names = parse_classes(classes)[0] if classes and palette else names
    reader = LabelReader(colours, values, void)
    if not Path(images).is_dir():
        raise FileNotFoundError(f"{images} is not a folder; expected the images of the masks there (--images)")
    pairs = _pair_masks(masks, Path(images), summary)
    count = max((k for k in (values or {}).values() if k != VOID), default=0) + 1
    if colours is None and values is None and pairs:
        count = _check_values([*pairs], reader, names)
    names = names or [f"class {k}" for k in range(count)]
    lines = _class_lines(out, names, colours) if pairs else []
    for path, image in pairs.items():
        try:
            _write_pair(image, read_classes_of(path, reader)[1], base, summary)
        except (ValueError, FileNotFoundError) as error:
            summary.failed.append(str(error))
    return _finish(out, names, lines, summary)


def _pair_masks(masks: Sequence[Path], folder: Path, summary: Summary) -> dict[Path, Path]:
    """{mask: its photograph}; the folder may contain both. The summary says what has no or no unique counterpart."""
    files = {path.resolve(): path for path in list_files(folder, IMAGE_SUFFIXES)}
    stems: dict[str, list[Path]] = {}
    for path in files:
        stems.setdefault(path.stem, []).append(path)
    found = {}
    for mask in masks:
        same, base = mask.stem, re.sub(r"[-_. ]masks?$", "", mask.stem, flags=re.IGNORECASE)
        others = [[path for path in stems.get(stem, ()) if path != mask.resolve()] for stem in (same, base)]
        found[mask] = others[0] or others[1]
    photographs = {path for paths in found.values() for path in paths}
    found = {mask: paths for mask, paths in found.items() if mask.resolve() not in photographs}
    for mask, paths in found.items():
        if not paths:
            summary.failed.append(f"{mask}: {folder} has no photograph {mask.stem}.* for it; expected the same name")
        elif len(paths) > 1:
            names = " and ".join(files[path].name for path in paths)
            summary.failed.append(f"{mask}: {folder} has several photographs for it, {names}; expected one")
    if left := files.keys() - photographs - {mask.resolve() for mask in masks}:
        summary.notes[f"photographs in {folder} have no mask and were left out"] = len(left)
    return {mask: files[paths[0]] for mask, paths in found.items() if len(paths) == 1}


def _check_values(masks: Sequence[Path], reader: LabelReader, names: Sequence[str] | None) -> int:
    """The number of classes; ValueError, with a suggestion for --values, if the masks' values are not their numbers."""
    stored, occurring = set(), set()
    for path in masks:
        values, classes = read_classes_of(path, reader)
        stored |= set(np.unique(values).tolist())
        occurring |= set(np.unique(classes).tolist()) - {VOID}
    count = len(names) if names else max(occurring, default=0) + 1
    if error := classes_error(sorted(occurring & {*range(count)}), count, stored, named=bool(names)):
        raise ValueError(f"masks: {error}")
    return count


def _write_pair(image: Path, label: np.ndarray, base: Path, summary: Summary) -> None:
    """Copy an image and write its label; a label of the stored pixels is rotated as the image's EXIF tag says."""
    size, orientation = image_size(image), image_orientation(image)
    if label.shape != size and label.shape == size[::-1] and orientation >= 5:
        label = rotated(label, orientation)
        summary.notes["labels were rotated as their photos are by EXIF"] += 1
    if label.shape != size:
        raise ValueError(
            f"{image} is {size[0]}x{size[1]}, its annotation is for {label.shape[0]}x{label.shape[1]} (height x width)"
        )
    target = base / "labels" / f"{image.stem}.png"
    if target.exists():
        raise ValueError(f"two images are called {image.stem}; expected different names")
    for part in ("images", "labels"):
        (base / part).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, base / "images" / image.name)
    Image.fromarray(label).save(target)
    summary.files += 1
    summary.pixels.update(dict(enumerate(np.bincount(label.ravel()).tolist())))


def _class_lines(out: Path, names: Sequence[str], colours: np.ndarray | None) -> list[str]:
    """The lines of classes.txt; ValueError if it cannot hold them, or if `out` has a classes.txt with other classes."""
    path = out / "classes.txt"
    if len(names) > VOID:
        raise ValueError(f"{len(names)} classes do not fit into a label, which holds {VOID}; choose with --classes")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if names.count(name) > 1 or not _is_read_back(name, Path(folder) / "classes.txt"):
                raise ValueError(f"{name!r} cannot be the name of a class in classes.txt, or occurs twice; rename it")
    if path.is_file() and (old := read_classes(path)[0]) != tuple(names):
        raise ValueError(
            f"{path} has other classes ({', '.join(old)}) than {', '.join(names)}; give the same classes in both "
            f"conversions, for example --classes {path}"
        )
    colours = voc_palette(len(names)) if colours is None or len(colours) != len(names) + 1 else colours
    return [f"{name} {r} {g} {b}" for name, (r, g, b) in zip((*names, "void"), colours.tolist(), strict=True)]


def _is_read_back(name: str, path: Path) -> bool:
    """Whether a class list in `path` can hold the name: "#1" is a comment, "void" no class, a line break ends it."""
    try:
        path.write_text(f"{name} 1 2 3\n", encoding="utf-8")
        return read_classes(path)[0] == (name,)
    except ValueError:
        return False


def _finish(out: Path, names: Sequence[str], lines: Sequence[str], summary: Summary) -> Summary:
    """Write classes.txt, unless it is there already; ValueError if nothing was converted."""
    if not summary.files:
        raise ValueError(summary.failed[0] if summary.failed else "there is no image to convert")
    summary.names = tuple(names)
    if not (out / "classes.txt").is_file():
        (out / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return summary


# -------------------------------------------------------------------------------------------------------- command line


EXAMPLES = """examples:
  python -m pwlib convert photos/ --out my_images                 LabelMe: photos/*.jpg with photos/*.json
  python -m pwlib convert instances.json --images photos --out my_images
  python -m pwlib convert cvat_export/ --out my_images            CVAT's "segmentation mask"; --images if without images
  python -m pwlib convert masks/ --images photos --palette colours.txt --out my_images
  python -m pwlib convert masks/ --images photos --values 0=0,255=1 --classes background,cat --out my_images

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `python -m pwlib convert`."""
    parser.epilog = EXAMPLES + parser.epilog.strip()
    parser.add_argument("source", metavar="SOURCE", help="COCO file; folder of LabelMe files, of masks, or from CVAT")
    parser.add_argument("--out", metavar="ROOT", required=True, help="data set to write: ROOT/images, ROOT/labels")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: as the annotations say)")
    parser.add_argument("--split", metavar="NAME", help="write ROOT/NAME/images and ROOT/NAME/labels instead")
    parser.add_argument("--rest", default=BACKGROUND, metavar="NAME|void", help="class of pixels without annotation")
    parser.add_argument("--classes", metavar="A,B,C|FILE", help="class names, in the order of their numbers")
    parser.add_argument("--palette", metavar="FILE", help="lines `name r g b`: colours of colour masks")
    parser.add_argument("--values", metavar="V=K,...", help="values of grey masks: 0=0,255=1,9=void; 0-127=0,128-255=1")
    parser.add_argument("--void", metavar="V|none", help="value of grey masks that is void (default: 255)")


def run(args: argparse.Namespace) -> int:
    """Convert, print a summary and list what failed; 1 if an image could not be converted."""
    void = VOID if args.void is None else None if args.void == "none" else int(args.void)
    values = parse_values(args.values) if args.values else None
    summary = convert(args.source, args.out, images=args.images, classes=args.classes, palette=args.palette,
                      values=values, void=void, rest=args.rest, split=args.split)  # fmt: skip
    print(summary)
    for text in summary.failed:
        print(f"failed: {text}")
    print(f"\n{args.out}/ holds images, labels and classes.txt; check them with: python -m pwlib labels {args.out}")
    return 1 if summary.failed else 0
