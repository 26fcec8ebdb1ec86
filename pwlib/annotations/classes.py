"""Class lists, and the meaning of the values and colours in label files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwlib.data.images import VOID, decode_colours, read_label_values

NUMBER = r"\s*(\d{1,3})\s*"
COLOUR_LINES = (
    re.compile(rf"(?P<name>[^:]+):{NUMBER},{NUMBER},{NUMBER}(:.*)?"),  # CVAT's labelmap.txt
    re.compile(rf"(?P<name>.*[^\s,;])[\s,;]+{NUMBER}[\s,;]{NUMBER}[\s,;]{NUMBER}"),  # name r g b
    re.compile(rf"{NUMBER}[\s,;]{NUMBER}[\s,;]{NUMBER}[\s,;]+(?P<name>\S.*)"),  # r g b name, as in CamVid's originals
)


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8 (with or without a byte-order mark), UTF-16 or Latin-1."""
    data = Path(path).read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_classes(path: str | Path) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Read a class list, one class per line: `name`, `name r g b`, `r g b name` or CVAT's `name:r,g,b::`.

    Empty lines and comments (#) are skipped. The colour of a class called "void" is the colour of void, not a class.

    Returns:
        K names, and their colours, uint8 [K + 1, 3] with void last; None if no line has a colour.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no class, a name or a colour occurs twice, or only some of the lines have a colour.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a list of classes")
    lines = [line.strip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    matches = [next(filter(None, (form.fullmatch(line) for form in COLOUR_LINES)), None) for line in lines]
    if not any(matches):
        names, colours = lines, None
    elif not all(matches):
        raise ValueError(
            f"{path}: {lines[matches.index(None)]!r} has no colour, unlike other lines; expected name r g b"
        )
    else:
        names = [match["name"].strip() for match in matches]
        colours = [tuple(int(group) for group in match.groups() if group and group.isdigit())[-3:] for match in matches]
    if not names:
        raise ValueError(f"{path}: the file contains no class; expected one name per line")
    for kind, items in (("name", names), ("colour", colours or [])):
        if repeated := [item for item in items if items.count(item) > 1]:
            raise ValueError(f"{path}: the {kind} {repeated[0]} occurs twice; expected different classes")
    if colours is None:
        return tuple(names), None
    if np.max(colours) > 255:
        raise ValueError(f"{path}: a colour has the value {np.max(colours)}; expected 0 to 255")
    table = dict(zip(names, colours, strict=True))
    void = [table.pop(name) for name in names if name.lower() == "void"]
    void += [c for c in ((224, 224, 192), (255, 255, 255), (0, 0, 0), (1, 2, 3)) if c not in colours]
    return tuple(table), np.array([*table.values(), void[0]], np.uint8)


def parse_classes(text: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Read `--classes`: the path of a class list, or names separated by commas."""
    if Path(text).is_file() or Path(text).suffix == ".txt":
        return read_classes(text)
    return tuple(name.strip() for name in text.split(",") if name.strip()), None


def parse_values(text: str) -> dict[int, int]:
    """Parse `--values`: {value in the label files: class number, or 255 for void}.

    Single values (`0=0,255=1,128=void`) and ranges (`0-127=0,128-255=1`, for masks with smoothed borders).
    """
    mapping = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*[=:]\s*(\d+|void)\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or (match[3] != "void" and int(match[3]) >= VOID):
            raise ValueError(
                f"{part!r} is not a mapping of a value to a class; expected, for example, 0=0,255=1,128=void"
            )
        mapping |= dict.fromkeys(range(first, last + 1), VOID if match[3] == "void" else int(match[3]))
    return mapping


def label_arguments(
    classes: str | None = None, palette: str | None = None, values=None, void: str | None = None
) -> dict[str, Any]:
    """Convert the texts of --classes, --palette, --values (pairs) and --void to options of `folder.load`, for JSON."""
    options: dict[str, Any] = {}
    if palette is not None:
        names, colours = parse_classes(palette)
        if colours is None:
            raise ValueError(f"--palette {palette}: the file has no colours; expected lines with name r g b")
        options |= {"class_names": list(names), "palette": colours.tolist()}
    if classes is not None:
        names, colours = parse_classes(classes)
        options["class_names"] = list(names)
        options |= {} if colours is None or palette else {"palette": colours.tolist()}
    if values is not None:
        options["values"] = [list(pair) for pair in values]
    if void is not None:
        options["void"] = None if void == "none" else int(void)
    return options


@dataclass(frozen=True)
class LabelReader:
    """Reads a label file as class numbers, uint8 [H, W] with 255 = void.

    Attributes:
        palette: uint8 [K + 1, 3], void last, to decode colour images, and palette images that show one of its colours.
        values: {value in the file: class number, or 255 for void}, or a list of such pairs, as JSON stores them; other
            values are errors. None: values are classes.
        void: value in the file that is void, if `values` does not mention it; None: no value.
    """

    palette: np.ndarray | None = None
    values: Mapping[int, int] | Sequence[tuple[int, int]] | None = None
    void: int | None = VOID

    def __call__(self, path: str | Path) -> Tensor:
        return torch.from_numpy(self.classes(read_label_values(path, self.palette), path))

    def classes(self, values: np.ndarray, path: str | Path) -> np.ndarray:
        """Convert the values or colours of a file to class numbers; ValueError for those that have no meaning."""
        if values.ndim == 3 and self.palette is not None:
            return decode_colours(values, self.palette, path)
        if values.ndim == 3:
            found, counts = np.unique(values[..., :3].reshape(-1, 3), axis=0, return_counts=True)
            common = ", ".join("{} {} {}".format(*found[k]) for k in np.argsort(-counts)[:5])
            raise ValueError(
                f"{path}: the label is a colour image (colours {common}{', ...' if len(found) > 5 else ''}); list them "
                "with their names in classes.txt or a file for --palette, in lines like: cat 255 0 0"
            )
        largest = int(values.max(initial=0))
        mapping = {} if self.void is None else {self.void: VOID}
        if self.values is None:
            if largest > VOID:
                raise ValueError(f"{path}: label values reach {largest}; map them to classes with --values")
            mapping = {value: value for value in range(VOID)} | mapping
        else:
            mapping |= dict(self.values)
        table = np.full(max(largest, *mapping, VOID) + 1, -1, np.int16)
        table[list(mapping)] = list(mapping.values())
        classes = table[values]
        if (unknown := classes < 0).any():
            found = sorted(set(values[unknown].tolist()))
            names = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
            raise ValueError(
                f"{path}: the label has the values {names} in {unknown.sum()} pixels; --values or --void must name them"
            )
        return classes.astype(np.uint8)
