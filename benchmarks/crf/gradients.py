"""How good the lattice's bandwidth gradients are: its own derivative, and the closed form, against the exact filter.

    python benchmarks/crf/gradients.py            writes gradients.json beside itself; PWLIB_DATA adds CamVid

Two ways to differentiate a filter on a lattice with respect to its features. `operator` is what pwlib does: barycentric
coordinates are piecewise linear, so the lattice operator has a derivative, and it costs two more passes over the
corners. `closed form` differentiates the Gaussian and then filters on the lattice (Kraehenbuehl & Koltun 2013):
dk/df_i = -k (f_i - f_j) needs K (v f_a) and K (g f_a) for each of d dimensions, 2 d more filterings. The loss is the
first-order change of the error: <K q, q - truth>, with q a noisy blur of an image's own labels.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import commit, machine

from pwlib.data import VOID, load
from pwlib.filters import ExactFilter, GridPositions
from pwlib.lattice import LatticeFilter

SIZE, THETA_ALPHA, THETA_BETA = (64, 96), 14.0, 13.0


class ClosedForm(torch.autograd.Function):
    """Unnormalised K(f) v on the lattice, its feature gradient by filtering."""

    @staticmethod
    def forward(ctx, features, values):
        ctx.filter = LatticeFilter(features.detach(), normalization="none")
        out = ctx.filter(values)
        ctx.save_for_backward(features, values, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        f, v, kv = ctx.saved_tensors
        kg = ctx.filter(grad)
        pull = [
            (grad * ctx.filter(v * f[..., [a]]) + v * ctx.filter(grad * f[..., [a]])).sum(-1)
            for a in range(f.shape[-1])
        ]
        return torch.stack(pull, -1) - f * (grad * kv + v * kg).sum(-1, keepdim=True), kg


def message(method: str, features: Tensor, values: Tensor, normalization: str) -> Tensor:
    if method != "closed form":
        kind = ExactFilter if method == "exact" else LatticeFilter
        return kind(features, normalization=normalization)(values)
    n = ClosedForm.apply(features, torch.ones_like(values[..., :1]))
    if normalization == "row":
        return ClosedForm.apply(features, values) / n
    return ClosedForm.apply(features, values * n.rsqrt()) * n.rsqrt()


def gradient(method: str, image: Tensor, label: Tensor, classes: int, normalization: str) -> list[float]:
    """d loss / d (log theta_alpha, log theta_beta) of the bilateral kernel, per pixel."""
    generator = torch.Generator().manual_seed(0)
    known = (label != VOID)[None, None]
    truth = F.one_hot(label.where(label != VOID, 0), classes).movedim(-1, 0)[None].float() * known
    q = torch.softmax(3 * F.avg_pool2d(truth, 5, 1, 2) + torch.randn(truth.shape, generator=generator), 1)
    q, uphill = (t.flatten(2).transpose(1, 2).contiguous() for t in (q, (q - truth) * known))
    log_theta = torch.tensor([THETA_ALPHA, THETA_BETA]).log().requires_grad_()
    positions = GridPositions(*SIZE, torch.tensor(1.0)).features() / log_theta[0].exp()
    colours = 255 * image.flatten(1).T[None] / log_theta[1].exp()
    features = torch.cat([positions, colours], -1)
    (message(method, features, q, normalization) * uphill).sum().backward()
    return (log_theta.grad / known.sum()).tolist()


def main() -> None:
    sets = {"scenes": load("scenes", "val", size=SIZE)}
    if root := os.environ.get("PWLIB_DATA"):
        sets["camvid"] = load("camvid", "val", root, size=SIZE)
    rows = []
    for name, data in sets.items():
        chosen = [round(i * (len(data) - 1) / 9) for i in range(10)]
        for normalization in ("symmetric", "row"):
            found = {
                method: torch.tensor(
                    [gradient(method, *data[i], data.num_classes, normalization) for i in chosen], dtype=torch.float64
                )
                for method in ("exact", "operator", "closed form")
            }
            exact = found["exact"]
            for method in ("operator", "closed form"):
                got = found[method]
                row = {"data": name, "images": len(chosen), "normalization": normalization, "method": method}
                row["cosine"] = F.cosine_similarity(got, exact, dim=1).mean().item()
                row["norm_ratio"] = (got.norm(dim=1) / exact.norm(dim=1)).mean().item()
                for column, theta in enumerate(("theta_alpha", "theta_beta")):
                    row[theta] = {
                        "exact": exact[:, column].mean().item(),
                        "lattice": got[:, column].mean().item(),
                        "relative_error_of_mean": (got[:, column].mean() / exact[:, column].mean() - 1).item(),
                        "same_sign": (got[:, column].sign() == exact[:, column].sign()).double().mean().item(),
                    }
                rows.append(row)
                print(json.dumps(row))
    result = {"commit": commit(), "machine": machine()}
    result |= {"size": SIZE, "theta_alpha": THETA_ALPHA, "theta_beta": THETA_BETA, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
