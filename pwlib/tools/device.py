"""The device that a command uses."""

from __future__ import annotations

import os

import torch


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`, or a GPU if there is one; ValueError if it cannot be used."""
    if name is None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here; expected cpu, or cuda where there is a GPU") from error
    return device
