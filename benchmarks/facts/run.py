"""Compute single numbers that the notebooks state, independently of the notebooks, with their exact definition.

    python benchmarks/facts/run.py        20 CPU seconds; writes result.json

Scenes are those of notebook 00's quick profile: 200 to learn from and 40 test scenes of 64x96 px.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study

from pwlib import graph
from pwlib.data import VOID, load
from pwlib.lattice import LatticeFilter
from pwlib.mean_field import free_energy, mean_field
from pwlib.metrics import boundary_mask

HERE = Path(__file__).parent
SETTINGS = {"train_images": 200, "test_images": 40, "many_images": 1000, "steps": [8, 16, 32, 64, 128], "alike": 12.0}


def stack(split: str, length: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = load("scenes", split, length=length, **options)
    images, labels = zip(*(dataset[i] for i in range(length)), strict=True)
    return torch.stack(images), torch.stack(labels)


def colour_table(train, test) -> dict:
    """Accuracy, in per cent, of the most frequent class of each colour cell, by the steps per channel.

    in_sample: the table is counted on the test images. held_out: it is counted on the training images.
    """

    def counted(images, labels, steps: int):
        red, green, blue = (images * steps).long().clamp(max=steps - 1).unbind(1)
        cell, known = (red * steps + green) * steps + blue, labels != VOID
        return cell[known], labels[known]

    def accuracy(source, target, steps: int) -> float:
        cell, label = counted(*source, steps)
        table = torch.bincount(cell * 10 + label, minlength=steps**3 * 10).view(-1, 10).argmax(1)
        cell, label = counted(*target, steps)
        return round(100 * (table[cell] == label).float().mean().item(), 1)

    many = stack("test", SETTINGS["many_images"])
    return {
        "in_sample": {s: accuracy(test, test, s) for s in SETTINGS["steps"]},
        "held_out": {s: accuracy(train, test, s) for s in SETTINGS["steps"]},
        f"in_sample, 16 steps, {SETTINGS['many_images']} scenes": accuracy(many, many, 16),
    }


def like_colours(train, test, pairs: int = 400_000) -> dict:
    """Share of random pairs of pixels with equal labels, in per cent, by where they are taken from and their colours.

    Colours are alike if the root mean square difference of the channels is below 12 grey levels.
    """
    images, labels = test
    count, height, width = labels.shape
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randint(n, (2, pairs), generator=generator) for n in (height, width))
    first = torch.randint(count, (pairs,), generator=generator)
    other = (first + torch.randint(1, count, (pairs,), generator=generator)) % count
    result = {}
    for name, second in (("within a scene", first), ("across scenes", other)):
        a, b = labels[first, y[0], x[0]], labels[second, y[1], x[1]]
        gap = 255 * (images[first, :, y[0], x[0]] - images[second, :, y[1], x[1]]).square().mean(1).sqrt()
        known = (a != VOID) & (b != VOID)
        for kind, chosen in (("alike", gap < SETTINGS["alike"]), ("unlike", gap >= SETTINGS["alike"])):
            result[f"{name}, {kind}"] = round(100 * (a == b)[known & chosen].float().mean().item(), 1)
    return result


def noise_in_the_bilateral_kernel(theta: float = 10.0, sigma: float = 6.0, columns: int = 31) -> dict:
    """A bar of w px is kept if w > (columns - w) r, with r the mean kernel across its border over that within.

    With noise sigma per channel, a difference of channels has the variance 2 sigma^2, and the mean of
    exp(-d^2 / 2 theta^2) is theta / sqrt(v) exp(-c^2 / 2v) per channel, v = theta^2 + 2 sigma^2.
    """
    generator, result = torch.Generator().manual_seed(0), {}
    noise = sigma * 2**0.5 * torch.randn(1_000_000, 3, generator=generator)
    for contrast in (10, 15, 20):
        across, within = (torch.exp(-(noise + c).square().sum(1) / (2 * theta**2)).mean() for c in (contrast, 0))
        ratios = {
            "without noise": math.exp(-3 * contrast**2 / (2 * theta**2)),
            "with noise": math.exp(-3 * contrast**2 / (2 * (theta**2 + 2 * sigma**2))),
            "simulated": (across / within).item(),
        }
        result[f"contrast {contrast}"] = {
            f"width {name} (px)": round(columns * r / (1 + r), 2) for name, r in ratios.items()
        }
    return result


def parallel_updates() -> dict:
    """Problems, of 200, in which the free energy rises in 40 parallel updates: random kernels of 8 nodes, Potts."""
    generator, rises = torch.Generator().manual_seed(0), {"self-message": 0, "no self-message": 0, "sign flipped": 0}
    for _ in range(200):
        features = 3 * torch.rand(8, 2, generator=generator, dtype=torch.float64)
        kernel = torch.exp(-torch.cdist(features, features).square() / 2)
        kernel = kernel * 6 * torch.rand((), generator=generator).item()
        unary = 3 * torch.rand(8, 3, generator=generator, dtype=torch.float64)
        without = kernel - torch.diag(kernel.diag())
        potts = 1 - torch.eye(3, dtype=torch.float64)
        for name, coupling, mu in zip(rises, (kernel, without, kernel), (potts, potts, -potts), strict=True):
            found = []
            mean_field(
                unary,
                lambda q, coupling=coupling, mu=mu: coupling @ q @ mu,
                40,
                observe=lambda q, e, found=found, unary=unary: found.append(free_energy(q, unary, e).item()),
            )
            rises[name] += max(b - a for a, b in itertools.pairwise(found)) > 1e-9
    return rises


def confidence_of_mean_field(weights=(0.25, 0.5, 1.0, 1.5)) -> dict:
    """Probability of the favoured label at the centre of a 3x3 grid with Potts weight w and a unary of 0.01 nats."""
    edges, potts = graph.grid_edges(3, 3), 1 - torch.eye(2, dtype=torch.float64)
    unary = torch.zeros(9, 2, dtype=torch.float64)
    unary[:, 1] = 0.01
    result = {}
    for weight in weights:
        pair = (weight * potts).expand(len(edges), 2, 2)
        exact = graph.infer(unary, edges, pair).marginals[4, 0].item()
        found = graph.mean_field(unary[None], edges, pair[None], iterations=500)[0, 4, 0].exp().item()
        result[f"w = {weight}"] = {"exact": round(exact, 3), "mean field": round(found, 3)}
    return result


def lattice_deviation(dimensions=(1, 2)) -> dict:
    """Standard deviation, in bandwidths, of the response of the lattice to one point, over random positions of it.

    Blur alone: each of the D + 1 directions adds half a squared step, [1/4, 1/2, 1/4]; along any axis that is
    3 / 4 of a squared bandwidth in every dimension.
    """
    generator, result = torch.Generator().manual_seed(0), {"blur alone, by the formula": round(0.75**0.5, 3)}
    for d in dimensions:
        step = 0.2 if d == 1 else 0.4
        grid = torch.arange(-5, 5 + step / 2, step, dtype=torch.float64)
        grid = torch.cartesian_prod(*[grid] * d).view(-1, d)
        variances, weights = [], []
        for _ in range(60 if d == 1 else 30):
            start = 5 * torch.rand(1, d, generator=generator, dtype=torch.float64)
            points = torch.cat([start, start + grid])
            values = torch.zeros(1, len(points), 1, dtype=torch.float64)
            values[0, 0] = 1
            response = LatticeFilter(points[None], normalization="none")(values)[0, 1:, 0]
            variances.append((response * grid.square().mean(1)).sum().item())
            weights.append(response.sum().item())
        result[f"splat, blur and slice, D = {d}"] = round((sum(variances) / sum(weights)) ** 0.5, 3)
    return result


def comparisons(draws: int = 2000, count: int = 9) -> dict:
    """Smallest two-sided p-value of a bootstrap, and the chance of a false claim among comparisons at 5 %.

    Comparisons that share one baseline are correlated: simulated for normal scores with a correlation of 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(1_000_000, n, generator=generator) for n in (1, count))
    rate = ((shared + own) / 2**0.5).abs().amax(1).gt(1.959964).float().mean().item()
    return {
        f"smallest two-sided p-value, {draws} draws": 2 / draws,
        f"chance of a false claim, {count} independent comparisons": round(1 - 0.95**count, 3),
        f"chance of a false claim, {count} comparisons with one baseline": round(rate, 3),
        "bounds whatever the dependence": [0.05, round(0.05 * count, 2)],
    }


def bands(scenes: int = 64) -> dict:
    """Share of the labelled pixels within w px of a border, in per cent, on test scenes of two sizes."""
    result = {}
    for size in ((64, 96), (48, 64)):
        _, labels = stack("test", scenes, size=size)
        known = labels != VOID
        for w in (1, 2, 3, 6, 10):
            share = (boundary_mask(labels, w) & known).sum() / known.sum()
            result[f"{size[0]}x{size[1]}, {w} px"] = round(100 * share.item(), 1)
    return result


def main() -> None:
    torch.set_num_threads(1)
    study, start = Study(HERE / "result.json", SETTINGS), time.process_time()
    train, test = stack("train", SETTINGS["train_images"]), stack("test", SETTINGS["test_images"])
    facts = {
        "accuracy of a colour table (00)": colour_table(train, test),
        "pairs of pixels with equal labels (00)": like_colours(train, test),
        "confidence of mean field (02)": confidence_of_mean_field(),
        "parallel updates whose free energy rises (02)": parallel_updates(),
        "standard deviation of the lattice (03)": lattice_deviation(),
        "pixels near a border (07)": bands(),
        "noise in the bilateral kernel (07)": noise_in_the_bilateral_kernel(),
        "comparisons (07)": comparisons(),
    }
    for name, found in facts.items():
        print(name, found)
        study.add(name, found)
    print(f"{time.process_time() - start:.0f} CPU seconds")


if __name__ == "__main__":
    main()
