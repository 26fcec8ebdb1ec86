"""What the dense CRF costs on this device, with the lattice and exactly, beside pydensecrf2.

    python benchmarks/gpu/crf.py crf.json --seconds 100

A row of the result is one measurement. "forward" builds the filters and runs 10 mean-field iterations; "training" runs
5 iterations and the backward pass to the logits and all parameters. Times are medians over repeats, after a warm-up,
taken with CUDA events on a GPU. Every repeat sees another image (the photograph, rotated by some columns), so nothing
that depends on the image can be reused. Memory is what PyTorch allocated at the peak, minus what was there before.

"attention" rows time one call of PyTorch's fused attention, of which exact filtering consists, with queries as wide as
the values (as `ExactFilter` pads them), narrower, and with TF32 allowed. They show what could make it faster.

"profile" states, for one forward pass of the lattice at 375x500, the time for which the GPU computes, the operations
that Python starts, and the number of entries of the vertex with most of them.

Rows are ordered by importance and the file is written after each, so that a run that is cut off loses only the last
ones. A measurement that is predicted to take longer than the time left is made with 1 iteration, or skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pwlib import DenseCRF

sys.path.insert(0, str(Path(__file__).parents[1] / "crf"))
import bench

PHOTO, LARGE, MANY = (375, 500, 21), (1024, 2048, 21), (375, 500, 150)  # height, width, labels
TINY = (20, 30, 3)
ITERATIONS = {"forward": 10, "training": 5}


def schedule(photo: tuple, large: tuple, many: tuple) -> list[tuple[str, str, tuple[int, int, int]]]:
    """(contender, task, problem) in the order in which they are measured."""
    rows = [(name, task, photo) for name in ("lattice", "exact") for task in ITERATIONS]
    rows += [("pydensecrf2", "forward", photo)]
    rows += [("lattice", task, problem) for problem in (large, many) for task in ITERATIONS]
    rows += [("lattice (cpu)", task, photo) for task in ITERATIONS]
    rows += [("pydensecrf2", "forward", problem) for problem in (many, large)]
    rows += [("exact", task, problem) for problem in (many, large) for task in ITERATIONS]
    return list(dict.fromkeys(rows))


def elapsed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: CUDA events on a GPU, else the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def repeated(step: Callable[[int], object], device: torch.device, seconds: float, repeats: int) -> dict:
    """Times of step(0), step(1), ...: the first warms up, the others count until `seconds` have passed.

    Returns:
        milliseconds (median), fastest, slowest, repeats, and the first call's milliseconds. A first call that took more
        than `seconds` is the only one: repeats is 0, and milliseconds is that call's.
    """
    start = time.perf_counter()
    first, times = elapsed(lambda: step(0), device), []
    while time.perf_counter() - start < seconds and len(times) < repeats:
        number = 1 + len(times)
        times.append(elapsed(lambda number=number: step(number), device))
    counted = times or [first]
    return {
        "ms": statistics.median(counted),
        "fastest_ms": min(counted),
        "slowest_ms": max(counted),
        "repeats": len(times),
        "first_ms": first,
    }


def measure(
    name: str, task: str, problem: tuple[int, int, int], iterations: int, seconds: float, repeats: int
) -> tuple[dict, Tensor]:
    """One row's times and memory, and the log-marginals [K, H, W] of the image before rotation."""
    height, width, labels = problem
    picture, logits = bench.problem(height, width, labels)  # uint8 [H, W, 3], [1, K, H, W]
    if name == "pydensecrf2":
        set_up, infer = bench.pydensecrf2(picture, logits)
        found = []

        def step(number: int) -> None:
            found.append(infer(set_up(), iterations))

        row = repeated(step, torch.device("cpu"), seconds, min(repeats, 3))
        return row, found[0].clamp_min(1e-30).log()

    device = torch.device("cuda" if torch.cuda.is_available() and "cpu" not in name else "cpu")
    method = name.split()[0]
    crf = DenseCRF(labels, **bench.THETA, filtering=method, iterations=iterations).to(device)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float().to(device) / 255  # [1, 3, H, W]
    logits = logits.to(device).requires_grad_(task == "training")
    label = logits.detach().argmax(1)  # [1, H, W]
    result = []

    def step(number: int) -> None:
        moved = image.roll(7 * number, -1)
        if task == "forward":
            with torch.no_grad():
                log_q = crf(logits, moved)
        else:
            crf.zero_grad(set_to_none=True)
            logits.grad = None
            log_q = crf(logits, moved)
            torch.nn.functional.nll_loss(log_q, label).backward()
        if number == 0:
            result.append(log_q.detach()[0])

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    row = repeated(step, device, seconds, repeats)
    if device.type == "cuda":
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if task == "training":
        row["gradients_finite"] = all(bool(t.grad.isfinite().all()) for t in (logits, *crf.parameters()))
    return row, result[0].cpu()


def attention(problem: tuple[int, int, int], seconds: float) -> list[dict]:
    """Rows for one call of fused attention over all pixels, float32, queries padded to the values' width or not."""
    height, width, labels = problem
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = -(-labels // 8) * 8
    rows = []
    for queries, tf32 in ((values, False), (8, False), (values, True)):
        q, k = (torch.randn(1, 1, height * width, queries, device=device) for _ in range(2))
        v = torch.randn(1, 1, height * width, values, device=device)
        row = {"contender": "attention", "task": f"queries {queries}, values {values}{', TF32' if tf32 else ''}"}
        row |= {"height": height, "width": width, "labels": labels, "iterations": 1}
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            row |= repeated(lambda _, t=(q, k, v): scaled_dot_product_attention(*t, scale=1.0), device, seconds, 5)
        except Exception as error:  # without a fused kernel, the matrix of weights does not fit into memory
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        rows.append(row)
    return rows


def profile(problem: tuple[int, int, int]) -> dict:
    """What one forward pass of the lattice consists of: the GPU's busy time and operations, and its fullest vertex."""
    height, width, labels = problem
    picture, logits = bench.problem(height, width, labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crf = DenseCRF(labels, **bench.THETA, filtering="lattice").to(device)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float().to(device) / 255  # [1, 3, H, W]
    logits = logits.to(device)
    with torch.no_grad():
        crf(logits, image)
        with torch.profiler.profile() as recorded:
            crf(logits, image)
        _, lattice = crf.filters(image).join(logits.flatten(2).mT)
    events = recorded.key_averages()
    return {
        "gpu_ms": sum(event.self_device_time_total for event in events) / 1000,
        "operations": sum(event.count for event in events if event.key == "cudaLaunchKernel"),
        "most_entries_of_a_vertex": int(lattice.corner.flatten().bincount().max()),
    }


def work(name: str, task: str, problem: tuple[int, int, int], iterations: int) -> float:
    """Relative cost of a measurement, to predict one of a contender from another."""
    height, width, labels = problem
    pixels = height * width
    per_pixel = pixels * -(-labels // 8) * 8 if name == "exact" else labels
    return pixels * per_pixel * (iterations + 1) * (3.0 if task == "training" else 1.0)


def compare(one: Tensor, other: Tensor) -> dict[str, float]:
    """Agreement of two log-marginals [K, H, W]."""
    difference = (one.exp() - other.exp()).abs()
    same = (one.argmax(0) == other.argmax(0)).float()
    found = {"same_labels": same.mean(), "mean_difference": difference.mean(), "max_difference": difference.max()}
    return {key: float(value) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument("--seconds", type=float, default=100.0, help="time for everything (default: 100)")
    parser.add_argument("--tiny", action="store_true", help="small images and one repeat, to try the script")
    args = parser.parse_args()
    deadline = time.perf_counter() + args.seconds
    gpu = torch.cuda.is_available()
    result = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pydensecrf2": not bench.missing_peers(),
        "rows": [],
    }
    reference: dict[tuple, Tensor] = {}  # (contender, problem) -> log-marginals of the forward pass
    known: dict[str, float] = {}  # contender -> seconds per unit of work
    photo, large, many = [TINY] * 3 if args.tiny else (PHOTO, LARGE, MANY)

    def write(row: dict) -> None:
        result["rows"].append(row)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    for name, task, problem in schedule(photo, large, many):
        row = {"contender": name, "task": task, **dict(zip(("height", "width", "labels"), problem, strict=True))}
        left = deadline - time.perf_counter()
        predicted = {n: known.get(name, 0.0) * work(name, task, problem, n) for n in (ITERATIONS[task], 1)}
        fitting = [n for n, seconds in predicted.items() if seconds < left]
        if name == "pydensecrf2" and not result["pydensecrf2"]:
            row["skipped"] = "pydensecrf2 is not installed"
        elif not fitting:
            row |= {"skipped": "not enough time was left", "predicted_s": predicted[ITERATIONS[task]]}
        else:
            row["iterations"] = fitting[0]
            try:
                limits = (0.1, 1) if args.tiny else (3.0, 20)
                times, log_q = measure(name, task, problem, fitting[0], *limits)
            except Exception as error:  # one failure, out of memory for example, must not cost the other measurements
                row["error"] = f"{type(error).__name__}: {error}"[:500]
                if gpu:
                    torch.cuda.empty_cache()
            else:
                row |= times
                known.setdefault(name, times["ms"] / 1000 / work(name, task, problem, fitting[0]))
                if task == "forward" and fitting[0] == ITERATIONS[task]:
                    reference[name, problem] = log_q
                    for other in ("exact", "pydensecrf2", "lattice"):
                        if other != name and (other, problem) in reference:
                            row[f"against {other}"] = compare(log_q, reference[other, problem])
        write(row)
        if (name, task, problem) == ("pydensecrf2", "forward", photo):
            for row in attention(photo, 0.1 if args.tiny else 1.0):
                write(row)
            result["profile"] = profile(photo)


if __name__ == "__main__":
    main()
