"""Would a finer lattice be nearer the exact model, and at what cost? Two blurs a direction, and bridging vertices.

    PWLIB_DATA=... python benchmarks/crf/closer.py            writes closer.json beside itself; PWLIB_DATA adds CamVid

Splat and slice each add a variance of (d+1)^2 / 12 per direction of the lattice, a blur (d+1)^2 / 2 (Adams, Baek &
Davis 2010, p. 6). With B blurs the features are scaled by sqrt((1 + 3 B) / 4) for their sum to be that of the kernel;
`scale` multiplies that once more. Blurs only reach vertices that some point touches; bridging adds the vertices beside
those. The spatial kernel is exact in all variants (a separable filter): what differs is the bilateral one.

Errors are of the marginals after 10 iterations against exact mean field. Which variants come through to the report is
chosen on images that are not reported. Cost: vertices, and the time of the bilateral kernel's splat, blurs and slice.
"""

import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pwlib.crf import DenseCRF
from pwlib.data import load
from pwlib.filters import ExactFilter, FilterBank, GaussianFilter, SeparableFilter
from pwlib.permutohedral import bag_sum, barycentric, elevate, enclosing_simplex

SIZE, ITERATIONS = (64, 96), 10
STANDARD = "1 blur, scale 1"
THETA = {"theta_alpha": 14.0, "theta_beta": 13.0, "theta_gamma": 1.0, "w_bilateral": 10.0, "w_spatial": 3.0}
EPS = 1e-20


class FineLattice(GaussianFilter):
    """The bilateral kernel, symmetric normalisation, on one image's lattice, plainly: no blocks, no gradient."""

    def __init__(self, features: Tensor, blurs: int, bridges: bool, scale: float):
        super().__init__()
        d = features.shape[-1]
        f = features[0].T * (scale * ((1 + 3 * blurs) / 4) ** 0.5)
        elevated = elevate(f)
        base, rank = enclosing_simplex(elevated)
        self.rows = barycentric(elevated, base).contiguous()
        base, rank = base.long(), rank.long()
        # Coordinates of the corners: remainder k has (d+1) base + k, less d+1 where the rank is above d - k.
        k = torch.arange(d + 1)
        corners = (d + 1) * base[None] + k[:, None, None] - (d + 1) * (rank[None] > d - k[:, None, None])
        corners = corners.permute(2, 0, 1).reshape(-1, d + 1)
        touched, where = corners.unique(dim=0, return_inverse=True)
        steps = (d + 1) * torch.eye(d + 1, dtype=torch.int64) - 1
        vertices = touched
        if bridges:
            beside = torch.cat([touched + sign * step for step in steps for sign in (1, -1)])
            vertices = torch.cat([touched, beside]).unique(dim=0)
        low, span = vertices.amin(0) - d - 1, vertices.amax(0) - vertices.amin(0) + 2 * d + 3
        stride = torch.cat([torch.ones(1, dtype=torch.int64), span[:-2].cumprod(0)])

        def name(rows: Tensor) -> Tensor:
            return ((rows - low)[:, :d] * stride).sum(1)

        keys, order = name(vertices).sort()
        vertices, self.size = vertices[order], len(keys)

        def find(rows: Tensor) -> Tensor:
            at = torch.searchsorted(keys, name(rows)).clamp_(max=len(keys) - 1)
            return at.where(keys[at] == name(rows), len(keys))

        self.corner = find(touched)[where].view(-1, d + 1)
        me = torch.arange(len(keys))
        none = torch.full((1, 3), len(keys))
        self.neighbours = [
            torch.cat([torch.stack([me, find(vertices + step), find(vertices - step)], 1), none]).flatten()
            for step in steps
        ]
        self.blurs = blurs
        by_vertex = self.corner.flatten().argsort(stable=True)
        self.splat = by_vertex // (d + 1), by_vertex
        self.offsets = F.pad(self.corner.flatten().bincount(minlength=len(keys) + 1).cumsum(0), (1, 0))
        self.n = self.apply(torch.ones_like(features[..., :1]))
        self.n = self.n.clamp_min(EPS)

    def apply(self, values: Tensor) -> Tensor:
        points, by_vertex = self.splat
        table = bag_sum(values[0].contiguous(), points, self.offsets, self.rows.flatten()[by_vertex])
        taps = torch.tensor([0.5, 0.25, 0.25]).repeat(self.size + 1)
        offsets = torch.arange(0, 3 * self.size + 4, 3)
        for neighbours in self.neighbours:
            for _ in range(self.blurs):
                table = bag_sum(table, neighbours, offsets, taps)
        starts = torch.arange(0, self.corner.numel() + 1, self.corner.shape[1])
        return bag_sum(table, self.corner.flatten(), starts, self.rows.flatten())[None]


def marginals(crf: DenseCRF, bank: FilterBank, logits: Tensor) -> Tensor:
    unary = -torch.log_softmax(logits.flatten(2), 1).mT  # [1, N, K]
    return bank.mean_field(unary, crf.log_w, crf.compatibility, ITERATIONS, log=False)


@torch.no_grad()
def errors(image: Tensor, label: Tensor, classes: int, variants: dict[str, tuple]) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    truth = F.one_hot(label.where(label < classes, 0), classes).movedim(-1, 0)[None].float()
    logits = 3 * F.avg_pool2d(truth, 7, 1, 3) + torch.randn(truth.shape, generator=generator)
    crf = DenseCRF(classes, **THETA)
    spatial, bilateral = crf.features(image[None])
    spatial = SeparableFilter(spatial)
    exact = marginals(crf, FilterBank([spatial, ExactFilter(bilateral)]), logits)
    found = {}
    for name, options in variants.items():
        fine = FineLattice(bilateral, *options)
        q = marginals(crf, FilterBank([spatial, fine]), logits)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fine.apply(q)
            times.append(time.perf_counter() - start)
        found[name] = {
            "mean_error": (q - exact).abs().mean().item(),
            "labels": (q.argmax(-1) == exact.argmax(-1)).float().mean().item(),
            "vertices": fine.size,
            "apply_ms": 1000 * statistics.median(times),
        }
    return found


def mean(data: Dataset, images: list[int], variants: dict[str, tuple]) -> dict:
    each = [errors(*data[i], data.num_classes, variants) for i in images]
    return {
        "images": len(images),
        "variants": {v: {key: statistics.fmean(e[v][key] for e in each) for key in each[0][v]} for v in variants},
    }


def main() -> None:
    torch.manual_seed(0)
    variants = {
        f"{blurs} blur{'s' * (blurs > 1)}{', bridges' * bridges}, scale {scale:g}": (blurs, bridges, scale)
        for blurs in (1, 2, 3)
        for bridges in (False, True)
        for scale in (0.9, 1.0, 1.1)
        if blurs < 3 or scale == 1
    }
    sets = {"scenes": load("scenes", "val", size=SIZE)}
    if root := os.environ.get("PWLIB_DATA"):
        sets["camvid"] = load("camvid", "val", root, size=SIZE)
    result = {"size": SIZE, "iterations": ITERATIONS, **THETA, "sets": {}}
    for name, data in sets.items():
        chosen = [round(i * (len(data) - 1) / 9) for i in range(10)]
        tuning, reported = chosen[1::4], [i for i in chosen if i not in chosen[1::4]]
        rows = result["sets"][name] = {"tuning": mean(data, tuning, variants)}
        # Reported: the standard lattice, and of each other form the scale that did best on the images for tuning.
        forms: dict[str, list[str]] = {}
        for variant in variants:
            forms.setdefault(variant.split(", scale")[0], []).append(variant)
        tuned = rows["tuning"]["variants"]
        keep = [STANDARD, *(min(form, key=lambda v: tuned[v]["mean_error"]) for form in forms.values())]
        rows["reported"] = mean(data, reported, {v: variants[v] for v in keep})
        for part, row in rows.items():
            for variant, numbers in row["variants"].items():
                print(name, part, variant, {key: float(f"{x:.4g}") for key, x in numbers.items()}, flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
