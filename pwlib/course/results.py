"""The stored results of the long runs in `benchmarks/`, which notebooks compare their short runs with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).with_name("stored")  # copied into the wheel by setup.py
CHECKOUT = Path(__file__).parents[2] / "benchmarks"


def stored_results(name: str) -> Any:
    """Read a benchmark's JSON file, from the checkout or from the installed package.

    Args:
        name: the file's path below `benchmarks/`, "three_stages/result.json" for example.

    Raises:
        FileNotFoundError: there is no such file.
    """
    folder = PACKAGED if PACKAGED.is_dir() else CHECKOUT
    path = folder / name
    if not path.is_file():
        known = ", ".join(sorted(found.relative_to(folder).as_posix() for found in folder.glob("*/*.json")))
        raise FileNotFoundError(f"no results {name!r} are stored; expected one of {known or 'benchmarks/*/*.json'}")
    return json.loads(path.read_text("utf-8"))
