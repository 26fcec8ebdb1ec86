"""`python -m pwlib bench crf`: what a dense CRF costs here, beside other implementations and the exact model.

The contenders take turns, so that a busy machine slows all of them alike; the table shows medians. Peak memory is
measured in a separate process for each. Set-up is that of the kernels; the unary energies count in the total. `pwlib`
keeps the lattice of the spatial kernel for images of one size and bandwidth. The bandwidth therefore changes a little
from round to round: the first set-up of a round has to make the lattice, and the second one ("next") finds it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import commit

from pwlib.crf import DenseCRF

THETA = {"theta_alpha": 80.0, "theta_beta": 13.0, "theta_gamma": 3.0, "w_bilateral": 10.0, "w_spatial": 3.0}
EXACT_LIMIT = {"cpu": 128 * 192, "cuda": 1 << 30}  # pixels; beyond them a pass of exact attention is minutes on a CPU

EXAMPLES = """examples:
  python -m pwlib bench crf --peers
  python -m pwlib bench crf --sizes 64x96 375x500 1024x2048 --labels 2 21 150 --json crf.json
  python -m pwlib bench crf --training-step --root data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Time the dense CRF's message passing: set-up, per iteration, total, peak memory, agreement."
    parser.epilog = EXAMPLES
    parser.add_argument("what", choices=["crf"], help="what to measure")
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(375, 500)], metavar="HxW", help="default: 375x500")
    parser.add_argument("--labels", nargs="+", type=_positive, default=[21], metavar="K", help="default: 21")
    parser.add_argument("--iterations", type=_positive, default=10, metavar="N", help="of mean field (default: 10)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="medians of so many (default: 5)")
    parser.add_argument("--peers", action="store_true", help="also time the other implementations that are installed")
    parser.add_argument(
        "--training-step", action="store_true", help="also the CRF's share of a stage 3 step and predict"
    )
    parser.add_argument(
        "--root", metavar="DIR", help="folder that holds camvid/, for --training-step (default: scenes)"
    )
    parser.add_argument(
        "--width",
        type=float,
        default=1.0,
        metavar="X",
        help="of its network, in VGG's channels (default: 1)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there too")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected height x width in pixels, like 375x500")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def problem(height: int, width: int, labels: int) -> tuple[np.ndarray, Tensor]:
    """A photograph, uint8 [H, W, 3], and smooth random logits [1, K, H, W]: matplotlib's sample portrait, resized."""
    from matplotlib import cbook
    from PIL import Image

    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        image = np.array(file.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    coarse = 2 * torch.randn(1, labels, height // 16 + 2, width // 16 + 2, generator=torch.Generator().manual_seed(0))
    return image, torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


Step = Callable[[], Any]


def ours(filtering: str, device: str) -> Callable[..., tuple[Callable, Callable[[Any, int], Tensor]]]:
    """A contender: (image, logits) -> (set_up, infer).

    set_up(fresh) makes the filters, for a bandwidth that was not used before if `fresh`; infer(filters, iterations)
    returns the marginals [K, H, W].
    """

    def contender(image: np.ndarray, logits: Tensor):
        crf = DenseCRF(logits.shape[1], **THETA, filtering=filtering).to(device)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float().to(device) / 255
        logits = logits.to(device)
        bandwidth, used = crf.log_theta_gamma.detach().clone(), itertools.count(1)

        @torch.no_grad()
        def set_up(fresh: bool = False):
            # The lattice of a bandwidth that was not used before is not kept.
            crf.log_theta_gamma.copy_(bandwidth + (1e-6 * next(used) if fresh else 0))
            filters = crf.filters(pixels)
            _wait(device)
            return filters

        def infer(filters, iterations):
            q = crf.marginals(logits, pixels, iterations=iterations, filters=filters)[0]
            _wait(device)
            return q

        return set_up, infer

    return contender


def pydensecrf2(image: np.ndarray, logits: Tensor):
    import pydensecrf.densecrf as peer

    _, labels, height, width = logits.shape
    scores = logits[0].flatten(1)

    def set_up(fresh=False):
        crf = peer.DenseCRF2D(width, height, labels)
        crf.addPairwiseGaussian(sxy=THETA["theta_gamma"], compat=THETA["w_spatial"])
        bilateral = {"sxy": THETA["theta_alpha"], "srgb": THETA["theta_beta"], "compat": THETA["w_bilateral"]}
        crf.addPairwiseBilateral(rgbim=image, **bilateral)
        return crf

    def infer(crf, iterations):
        crf.setUnaryEnergy(np.ascontiguousarray(-torch.log_softmax(scores, 0).numpy()))
        return torch.from_numpy(np.array(crf.inference(iterations))).view(labels, height, width)

    return set_up, infer


def contenders(pixels: int, peers: bool) -> dict[str, Callable]:
    found = {"lattice": ours("lattice", "cpu")}
    if pixels <= EXACT_LIMIT["cpu"]:
        found["exact"] = ours("exact", "cpu")
    if torch.cuda.is_available():
        found |= {"lattice (cuda)": ours("lattice", "cuda"), "exact (cuda)": ours("exact", "cuda")}
    if peers and not missing_peers():
        found["pydensecrf2"] = pydensecrf2
    return found


def missing_peers() -> list[str]:
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        return ["pydensecrf2"]
    return []


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(step: Step) -> tuple[float, Any]:
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def peak_memory(name: str, height: int, width: int, labels: int, iterations: int) -> float | None:
    """MB that one inference of a contender adds to a fresh process at its peak; None where /proc does not say."""
    call = "import sys; sys.path.insert(0, sys.argv[1]); import bench; print(bench._peak_here(*eval(sys.argv[2])))"
    done = subprocess.run(
        [sys.executable, "-c", call, str(Path(__file__).parent), repr((name, height, width, labels, iterations))],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    last = done.stdout.split()[-1]
    return None if last == "None" else float(last)


def _peak_here(name: str, height: int, width: int, labels: int, iterations: int) -> float | None:
    def kilobytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    small = contenders(1, True)[name](*problem(32, 48, labels))
    small[1](small[0](), 1)  # libraries load and thread pools start before the clock does
    set_up, infer = contenders(1, True)[name](*problem(height, width, labels))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = kilobytes("VmRSS")
    _result = infer(set_up(), iterations)
    return (kilobytes("VmHWM") - before) / 1024


def measure(height: int, width: int, labels: int, args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """One row a contender: milliseconds, MB, agreement with exact mean field where that was run."""
    image, logits = problem(height, width, labels)
    built = {name: make(image, logits) for name, make in contenders(height * width, args.peers).items()}
    times = {name: [] for name in built}
    marginals = {}
    for repeat in range(args.repeats + 1):
        for name, (set_up, infer) in built.items():
            bar.set_postfix_str(f"{height}x{width}, {labels} labels, {name}")
            first, _ = seconds(lambda set_up=set_up: set_up(True))
            again, state = seconds(set_up)
            none, _ = seconds(lambda infer=infer, state=state: infer(state, 0))
            all_, marginals[name] = seconds(lambda infer=infer, state=state: infer(state, args.iterations))
            if repeat:  # the first round warms up
                times[name].append((first, again, (all_ - none) / args.iterations, first + all_))
            bar.update()
    rows = []
    truth = next((marginals[name] for name in ("exact", "exact (cuda)") if name in marginals), None)
    for name, runs in times.items():
        bar.set_postfix_str(f"{height}x{width}, {labels} labels, memory of {name}")
        set_up, following, iteration, total = (1000 * statistics.median(column) for column in zip(*runs, strict=True))
        row = {"contender": name, "height": height, "width": width, "labels": labels, "iterations": args.iterations}
        row |= {"set_up_ms": set_up, "next_set_up_ms": following, "iteration_ms": iteration, "total_ms": total}
        row["peak_mb"] = None if "cuda" in name else peak_memory(name, height, width, labels, args.iterations)
        for other, q in (("exact", truth), ("pydensecrf2", marginals.get("pydensecrf2"))):
            if q is not None and other != name:
                difference = (marginals[name].cpu() - q.cpu()).abs()
                row[f"labels_as_{other}"] = (marginals[name].cpu().argmax(0) == q.cpu().argmax(0)).float().mean().item()
                row[f"mean_difference_to_{other}"] = difference.mean().item()
                row[f"max_difference_to_{other}"] = difference.max().item()
        rows.append(row)
        bar.update()
    return rows


def training_step(root: str | None, repeats: int, channels: float = 1.0) -> dict[str, float | str]:
    """The CRF's share of a stage 3 step, 8 images at 180x240 and 5 iterations, and its part in predicting 360x480.

    Seconds. The network is DeepLab-LargeFOV with `channels` times VGG's channels (the profiles for CPUs take a quarter)
    and batch norm; all its parameters and all the CRF's get gradients.
    """
    from pwlib.data import load
    from pwlib.networks import DeepLabLargeFOV

    def batch(size: tuple[int, int], count: int) -> tuple[Tensor, Tensor, int]:
        data = load("camvid", "val", root, size=size) if root else load("scenes", "val", size=size)
        images, labels = zip(*(data[i] for i in range(count)), strict=True)
        return torch.stack(images), torch.stack(labels), data.num_classes

    images, labels, classes = batch((180, 240), 8)
    network = DeepLabLargeFOV(classes, width=channels, batch_norm=True)
    crf = DenseCRF(classes, iterations=5, filtering="lattice")
    times = []
    for _ in range(repeats + 1):
        forward, logits = seconds(lambda: network(images))
        held = logits.detach().requires_grad_()

        def both(held: Tensor = held) -> None:
            torch.nn.functional.nll_loss(crf(held, images), labels, ignore_index=255).backward()

        inference, _ = seconds(both)
        backward, _ = seconds(lambda logits=logits, held=held: logits.backward(held.grad))
        times.append((forward + backward, inference))
    cnn, own = (statistics.median(column) for column in zip(*times[1:], strict=True))
    image, _, _ = batch((360, 480), 1)
    with torch.no_grad():
        logits = network.eval()(image)
        predict = [seconds(lambda: crf(logits, image, iterations=10))[0] for _ in range(repeats)]
    return {
        "data": "camvid" if root else "scenes",
        "width": channels,
        "labels": classes,
        "network_s": cnn,
        "crf_s": own,
        "crf_share": own / (cnn + own),
        "predict_crf_s": statistics.median(predict),
    }


COLUMNS = [
    ("contender", "contender", "{}"),
    ("set-up ms", "set_up_ms", "{:.1f}"),
    ("next", "next_set_up_ms", "{:.1f}"),
    ("iteration ms", "iteration_ms", "{:.2f}"),
    ("total ms", "total_ms", "{:.0f}"),
    ("peak MB", "peak_mb", "{:.0f}"),
    ("labels = exact", "labels_as_exact", "{:.2%}"),
    ("mean |dQ| exact", "mean_difference_to_exact", "{:.1e}"),
    ("max |dQ| exact", "max_difference_to_exact", "{:.1e}"),
    ("mean |dQ| pydensecrf2", "mean_difference_to_pydensecrf2", "{:.1e}"),
]


def table(rows: list[dict]) -> str:
    lines = [[title for title, _, _ in COLUMNS]]
    for row in rows:
        cells = (row.get(key) for _, key, _ in COLUMNS)
        lines.append(["-" if c is None else f.format(c) for c, (_, _, f) in zip(cells, COLUMNS, strict=True)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def run(args: argparse.Namespace) -> int:
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "rows": [],
    }
    if args.peers:
        for name in missing_peers():
            print(f"{name} is not installed and is left out (pip install '.[bench]')", file=sys.stderr)
        if not missing_peers():
            result["machine"]["pydensecrf2"] = version("pydensecrf2")
    problems = [(h, w, k) for h, w in args.sizes for k in args.labels]
    runs = sum(len(contenders(h * w, args.peers)) for h, w, _ in problems) * (args.repeats + 2)
    with tqdm(total=runs, desc="bench crf", unit="run") as bar:
        for height, width, labels in problems:
            rows = measure(height, width, labels, args, bar)
            result["rows"] += rows
            bar.clear()
            print(f"\n{height}x{width}, {labels} labels, {args.iterations} iterations\n{table(rows)}", flush=True)
            _store(args, result)
    if not torch.cuda.is_available():
        print("\nlattice (cuda), exact (cuda): not measured, there is no CUDA device here")
    if args.training_step:
        step = result["training_step"] = training_step(args.root, args.repeats, args.width)
        print(
            f"\nstage 3, 8 images of 180x240 ({step['data']}, {step['labels']} labels): "
            f"network of width {step['width']:g} {step['network_s']:.2f} s, "
            f"CRF {step['crf_s']:.2f} s, {step['crf_share']:.0%} of the step; "
            f"predicting 360x480, 10 iterations: CRF {step['predict_crf_s']:.2f} s"
        )
    _store(args, result)
    return 0


def _store(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
