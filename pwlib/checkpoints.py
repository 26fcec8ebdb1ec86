"""Checkpoints: written atomically, and read without running code that the file may contain."""

from __future__ import annotations

import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "pwlib checkpoint 1"


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, and containers of these) to `path`, atomically."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def save_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON to `path`, atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, or raise OSError and leave it as it was.

    The data go to a temporary file in the same folder and are synchronised with the disk; then the file is renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:  # with the permissions that the umask leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        state = "the previous one is intact" if path.exists() else "nothing was written"
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror}); {state}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `save` to the CPU; FileNotFoundError, or ValueError if the file is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises errors of all kinds for an arbitrary file
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__} while reading it)") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this library; expected format {FORMAT!r}")
    return state


def load_model(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's weights into `model` and return the checkpoint; ValueError if the shapes differ."""
    state = load(path)
    expected, found = model.state_dict(), state["model"]
    for name in [*expected, *found]:
        shapes = [list(side[name].shape) if name in side else "nothing" for side in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} holds another model: {name} is {shapes[0]} there, {shapes[1]} here")
    model.load_state_dict(found)
    return state
