"""A small seeded run, and what it gave at the commit before the library was restructured.

    python tests/golden.py write FILE     run it and store the result
    python tests/golden.py check FILE     run it again, compare every bit, and exit with 1 on a difference

The run uses only the command line and `pwlib.dense_crf`, so that the same script works at every commit. Floating
point differs between processors: `tests/test_golden.py` compares the stored values within a tolerance, and `check`
compares bit by bit on the machine that wrote the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

TRAIN = ["--data", "scenes", "--size", "32x48", "--epochs", "1,1,1", "--seed", "3", "--quiet"]

# `python -m pwlib`, with the images that were held out when the stored run was made: the seed chose them then.
OLD_SPLIT = """
import runpy
try:
    from pwlib.tools import training
    hold_out = training.hold_out
    training.hold_out = lambda dataset, fraction, *seed: hold_out(dataset, fraction, 3)
except ImportError:  # an older commit
    pass
runpy.run_module("pwlib", run_name="__main__")
"""


def cli(*arguments: str) -> None:
    # Two threads, as in the stored run: the order of sums depends on their number.
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-c", OLD_SPLIT, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def training(folder: Path) -> dict:
    """History (without timings), a hash of every checkpoint's weights, and the label PNGs of `predict`."""
    from pwlib import load

    cli("train", *TRAIN, "--device", "cpu", "--out", str(folder / "run"))
    history = json.loads((folder / "run" / "history.json").read_text())
    for records in history.values():
        for record in records:
            for timing in ("seconds", "images_per_second"):
                record.pop(timing, None)
    checkpoints = {}
    for path in sorted((folder / "run").glob("*.pt")):
        state = torch.load(path, weights_only=True)["model"]
        checkpoints[path.name] = digest(*(state[name].numpy() for name in sorted(state)))
    from PIL import Image

    images = []
    for index, size in enumerate([(48, 64), (120, 160)]):  # exact filtering, and the lattice
        pixels = load("scenes", "val", size=size)[index][0]
        images.append(str(folder / f"{index}.png"))
        Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy()).save(images[-1])
    cli("predict", str(folder / "run"), *images, "--out", str(folder / "labels"), "--device", "cpu")
    # Label maps only: an overlay and a confidence map lie beside each.
    names = sorted(p for p in (folder / "labels").glob("*.png") if Image.open(p).mode == "P")
    return {"history": history, "checkpoints": checkpoints, "labels": {p.name: digest_png(p) for p in names}}


def digest_png(path: Path) -> str:
    """Of pixels and palette, encoded again without the texts that later commits add."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.info.clear()
        picture.save(content, "PNG")
    return hashlib.sha256(content.getvalue()).hexdigest()


def marginals() -> dict[str, list]:
    """`dense_crf` on a drawn scene: labels in full, marginals of every 16th pixel; exact, lattice, row and none."""
    from pwlib import dense_crf, load

    image, label = load("scenes", "test", size=(60, 80))[5]
    pixels = (255 * image).byte().permute(1, 2, 0).numpy()
    noise = torch.Generator().manual_seed(0)
    logits = 2 * torch.nn.functional.one_hot(label.clamp(max=3), 4).permute(2, 0, 1).float()
    probabilities = (logits + torch.randn(4, 60, 80, generator=noise)).softmax(0).numpy()
    result = {}
    for filtering in ("exact", "lattice"):
        for normalization in ("symmetric", "row", "none"):
            weights = {"w_bilateral": 0.02, "w_spatial": 0.02} if normalization == "none" else {}
            q = dense_crf(pixels, probabilities, filtering=filtering, normalization=normalization, **weights)
            key = f"{filtering} {normalization}"
            labels = "".join(map(str, q.argmax(0).ravel()))
            result[key] = {
                "labels": labels,
                "marginals": [round(float(v), 7) for v in q.reshape(4, -1)[:, ::16].ravel()],
            }
    return result


def run() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return {**training(Path(folder)), "dense_crf": marginals()}


def differences(new: dict, old: dict) -> list[str]:
    """What is not bit-identical (history, checkpoints, label PNGs), or not within 2e-5 (marginals)."""
    found = [name for name in ("history", "checkpoints", "labels") if new[name] != old[name]]
    for key, was in old["dense_crf"].items():
        now = new["dense_crf"][key]
        if now["labels"] != was["labels"]:
            changed = sum(a != b for a, b in zip(now["labels"], was["labels"], strict=True))
            found.append(f"dense_crf, {key}: {changed} labels")
        apart = np.abs(np.subtract(now["marginals"], was["marginals"])).max()
        if apart > 2e-5:
            found.append(f"dense_crf, {key}: marginals differ by {apart:.1e}")
    return found


if __name__ == "__main__":
    command, file = sys.argv[1], Path(sys.argv[2])
    result = run()
    if command == "write":
        file.write_text(json.dumps(result, indent=1) + "\n")
    else:
        found = differences(result, json.loads(file.read_text()))
        print("\n".join(found) or "identical")
        sys.exit(bool(found))
