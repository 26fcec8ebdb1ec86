"""Compare the speed of two checkouts of pwlib: prediction, training step and first call of the dense CRF.

    python benchmarks/crf/compare.py OTHER_CHECKOUT [--rounds 5] [--threads 2] [--json FILE]

Each checkout runs in a process of its own, and the processes take turns task by task, so that a busy machine slows both
alike. Each time is a median over the rounds; the ratio (this checkout over the other) is what counts. CPU time includes
all threads. The tasks: predicting a photograph of 500x375 pixels with 21 labels and 10 iterations, with and without the
set-up of the filters; the CRF in a training step on 8 images of 180x240 with 11 labels and 5 iterations, forward and
backward with the gradients of all parameters; and predicting images from 64x96 to 1024x2048.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import commit, machine

HERE = Path(__file__).resolve().parents[2]
SIZES = [(64, 96), (128, 192), (256, 384), (512, 768), (1024, 2048)]


def tasks() -> dict:
    """What the worker can time, by name; pwlib is that of the working checkout."""
    import numpy as np
    import torch
    from matplotlib import cbook
    from PIL import Image

    from pwlib.crf import DenseCRF

    def problem(height: int, width: int, labels: int):
        """A photograph [1, 3, H, W] and smooth random logits [1, K, H, W]."""
        with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
            pixels = np.array(file.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        noise = torch.randn(1, labels, height // 16 + 2, width // 16 + 2, generator=torch.Generator().manual_seed(0))
        logits = torch.nn.functional.interpolate(2 * noise, (height, width), mode="bilinear", align_corners=False)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, logits

    crf = DenseCRF(21, iterations=10, filtering="lattice")
    image, logits = problem(500, 375, 21)
    with torch.no_grad():
        filters = crf.filters(image)
    learner = DenseCRF(11, iterations=5, filtering="lattice")
    photograph, scores = problem(180, 240, 11)
    images = torch.cat([photograph.roll(9 * i, 3) for i in range(8)])
    scores = scores.repeat(8, 1, 1, 1).requires_grad_()
    label = scores.detach().argmax(1)

    def train() -> None:
        torch.nn.functional.nll_loss(learner(scores, images), label).backward()

    def predict(height: int, width: int) -> None:
        crf.marginals(problems[height, width][1], problems[height, width][0])

    problems = {size: problem(*size, 21) for size in SIZES}
    return {
        "predict 500x375": lambda: crf.marginals(logits, image),
        "predict 500x375, filters given": lambda: crf.marginals(logits, image, filters=filters),
        "training step 8x180x240": train,
    } | {f"predict {h}x{w}": lambda h=h, w=w: predict(h, w) for h, w in SIZES}


def work(threads: int) -> None:
    """Read task names from standard input, run each and print its wall and CPU time in seconds."""
    start = time.perf_counter()
    import torch

    torch_time = time.perf_counter() - start
    import pwlib.crf  # noqa: F401

    import_time = time.perf_counter() - start - torch_time
    torch.set_num_threads(threads)
    known = tasks()
    start = time.perf_counter()
    known["predict 64x96"]()
    print(json.dumps([import_time, time.perf_counter() - start]), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        known[line.strip()]()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


class Worker:
    """A process that runs one checkout."""

    def __init__(self, checkout: Path, threads: int):
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "--threads", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=checkout, env=environment, **pipes)
        self.imported, self.first = json.loads(self.process.stdout.readline())

    def run(self, task: str) -> tuple[float, float]:
        print(task, file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--tasks", default="", help="only the tasks whose names contain this")
    parser.add_argument("--json", type=Path, help="write the times there too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.threads)
    if args.other is None or not (args.other / "pwlib").is_dir():
        parser.error(f"{args.other} holds no pwlib; expected the folder of a checkout")
    workers = {"this": Worker(HERE, args.threads), "other": Worker(args.other.resolve(), args.threads)}
    names = ["predict 500x375", "predict 500x375, filters given", "training step 8x180x240"]
    names = [n for n in names + [f"predict {h}x{w}" for h, w in SIZES] if args.tasks in n]
    times = {name: {"this": [], "other": []} for name in names}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name in names:
            for key, worker in workers.items():
                measured = worker.run(name)
                if turn:
                    times[name][key].append(measured)
    first = {key: {"import_s": worker.imported, "first_call_s": worker.first} for key, worker in workers.items()}
    print(f"{'':34s}{'this':>8s}{'other':>8s}{'ratio':>7s}   CPU: this   other  ratio")
    for name, both in times.items():
        (wall, cpu), (wall_other, cpu_other) = (
            [1000 * statistics.median(column) for column in zip(*both[key], strict=True)] for key in ("this", "other")
        )
        print(
            f"{name:34s}{wall:8.0f}{wall_other:8.0f}{wall / wall_other:7.2f}   "
            f"{cpu:9.0f}{cpu_other:8.0f}{cpu / cpu_other:7.2f}"
        )
    print("milliseconds; import and first call in seconds: " + json.dumps(first))
    if args.json:
        result = {"commit": commit(), "machine": machine(), "threads": args.threads, "first": first, "times": times}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
