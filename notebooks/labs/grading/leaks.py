"""Find answers, hidden tests, mark schemes, outputs and metadata of the source of a lab in its release."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

REGIONS = ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME")
SHORTEST = 12  # characters; `return q` reveals nothing
METADATA = {"nbgrader", "editable", "deletable"}


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def split(source: str, whole: bool = False) -> tuple[list[str], list[list[str]]]:
    """A cell's lines that students see, and those of each region that they do not; `whole`: nor the rest of it."""
    seen, hidden, region = [], [], None
    for line in source.splitlines():
        if any(f"BEGIN {name}" in line for name in REGIONS):
            region = []
            hidden.append(region)
        elif any(f"END {name}" in line for name in REGIONS):
            region = None
        else:
            (seen if region is None else region).append(plain(line))
    if whole and not hidden:
        return [], [seen]
    return seen, hidden


def secrets(source) -> list[tuple[str, list[str]]]:
    """(name, texts) of each region: its lines that students see nowhere else, and the region as a whole.

    A lab with faulty code shows most lines of its answers; only the corrected lines must not be shown.
    """
    seen, hidden = set(), []
    for cell in source.cells:
        marks = cell.metadata.get("nbgrader", {})
        visible, regions = split(cell.source, whole=marks.get("solution", False))
        seen.update(visible)
        hidden += [(marks.get("grade_id", "a cell without a name"), lines) for lines in regions]
    found = []
    for name, lines in hidden:
        lines = [line for line in lines if line]
        pieces = [line for line in lines if not any(line in other for other in seen)] + [plain(" ".join(lines))]
        found.append((name, [piece for piece in dict.fromkeys(pieces) if len(piece) >= SHORTEST]))
    return found


def strings(value, place: str = "") -> Iterator[tuple[str, str]]:
    """(where, text) of every string in a notebook, keys and attached text files too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield place, str(key)
            yield from strings(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from strings(inner, f"{place}[{number}]")
    elif isinstance(value, str):
        yield place, value
        if "attachments" in place:
            try:
                yield place, base64.b64decode(value, validate=True).decode("utf-8")
            except (binascii.Error, UnicodeDecodeError):
                pass


def leaks(source, released) -> list[str]:
    """One sentence for each; empty for a clean release. Both are notebooks as nbformat reads them."""
    texts = [(place.lstrip("."), plain(text)) for place, text in strings(released)]
    found = []
    for name, pieces in secrets(source):
        for piece in pieces:
            places = [place for place, text in texts if piece in text]
            if places:
                found.append(f"{places[0]} shows what {name} hides: {piece[:60]!r}")
    for place, text in texts:
        found += [f"{place} holds the mark BEGIN {name}" for name in REGIONS if f"BEGIN {name}" in text]
    if extra := set(released.metadata) - {"kernelspec", "language_info"}:
        found.append(f"the notebook's metadata hold {', '.join(sorted(extra))}")
    for number, cell in enumerate(released.cells):
        if extra := set(cell.metadata) - METADATA:
            found.append(f"cells[{number}] has the metadata {', '.join(sorted(extra))}")
        if cell.get("outputs") or cell.get("execution_count"):
            found.append(f"cells[{number}] was released with its outputs")
    return found
