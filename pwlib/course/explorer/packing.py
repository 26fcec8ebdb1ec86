"""What an explorer's page gets: a JSON-ready description, and one gzip of named blocks.

Each block's words are stored bytewise, all low bytes first, and those of a trace as differences from one iteration to
the next: mean field converges, so most of them vanish. Nothing is lost except what float16 rounds.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pwlib.course.plots import label_colours, to_uint8
from pwlib.crf import DenseCRF
from pwlib.trace import Trace


def pack_trace(trace: Trace, class_names: Sequence[str] | None, palette: np.ndarray | None) -> tuple[dict, bytes]:
    """Description and data of a trace: unary energies, messages and marginals in half precision."""
    classes, height, width = trace.unary.shape
    steps, kernels = trace.messages.shape[:2]
    if trace.q.shape != (steps + 1, classes, height, width) or len(trace.kernels) != kernels:
        raise ValueError(
            f"the trace's parts disagree: unary {list(trace.unary.shape)}, messages {list(trace.messages.shape)}, "
            f"q {list(trace.q.shape)}, {len(trace.kernels)} kernel names"
        )
    blocks: dict[str, np.ndarray] = {
        "image": to_uint8(trace.image),
        "unary": half(trace.unary),
        "messages": half(trace.messages),
        "q": half(trace.q),
        "labels": trace.labels.byte().numpy(),
    }
    if not follows(trace):
        blocks["pairwise"] = half(trace.pairwise)
    if trace.features and trace.sums is not None:
        blocks["sums"] = trace.sums.float().numpy()
        blocks |= {f"features{m}": rows.float().numpy() for m, rows in enumerate(trace.features)}
    free = [] if trace.free_energy is None else [float(f) for f in trace.free_energy]
    meta = describe(classes, (height, width), class_names, palette) | {
        "iterations": steps,
        "kernels": list(trace.kernels),
        "weights": [] if trace.weights is None else trace.weights.tolist(),
        "compatibility": [] if trace.compatibility is None else trace.compatibility.tolist(),
        "free_energy": [f if math.isfinite(f) else None for f in free],
        "normalization": trace.normalization,
        "self_message": trace.self_message,
    }
    return seal(meta, blocks, {"messages", "q", "labels"})


def pack_problem(
    image: Tensor,
    logits: Tensor,
    model: DenseCRF | Tensor,
    iterations: int | None,
    class_names: Sequence[str] | None,
    palette: np.ndarray | None,
) -> tuple[dict, bytes]:
    """Description and data of a problem that the browser solves: only image and logits, both in half precision.

    Args:
        image: [3, H, W] in [0, 1]; kept as uint8 where that is exact.
        logits: [K, H, W].
        model: the CRF, whose parameters are the settings to begin with, or a coupling matrix [N, N] of a small graph.
    """
    classes, height, width = logits.shape
    if image.shape[0] != 3 or image.ndim != 3:
        raise ValueError(f"image has shape {list(image.shape)}; expected [3, H, W]")
    settings = {"temperature": 1.0, "confidence": 0.7, "sign": "penalty", "double_softmax": False}
    meta = describe(classes, (height, width), class_names, palette)
    potts = 1 - torch.eye(classes)
    if isinstance(model, DenseCRF):
        if model.extra_kernels:
            raise ValueError("this CRF has extra kernels, which the browser cannot compute; explore its trace")
        if model.num_classes != classes or image.shape[1:] != logits.shape[1:]:
            expected = f"[{model.num_classes}, {image.shape[1]}, {image.shape[2]}]"
            raise ValueError(f"logits have shape {list(logits.shape)}; expected {expected}")
        compatibility = model.compatibility.detach().float().cpu()
        meta["kernels"] = ["spatial", "bilateral"]
        settings |= settings_of(model) | {"normalised_colours": False}
    else:
        coupling = torch.as_tensor(model).double()
        if coupling.shape != (height * width,) * 2 or not torch.equal(coupling, coupling.T):
            raise ValueError(
                f"the coupling matrix has shape {list(coupling.shape)}; expected a symmetric [{height * width}, "
                f"{height * width}]"
            )
        compatibility = potts
        diagonal = coupling.diag()
        meta |= {"kernels": ["coupling"], "coupling": coupling.flatten().tolist()}
        settings |= {"scale": 1.0, "self_weight": float(diagonal[0]), "edges": [], "in_turn": False, "iterations": 10}
    if iterations is not None:
        settings["iterations"] = iterations
    meta |= {
        "settings": settings,
        "compatibility": compatibility.tolist(),
        "potts": bool(torch.equal(compatibility, potts)),
    }
    pixels = to_uint8(image)
    exact = np.abs(pixels / 255 - image.detach().cpu().permute(1, 2, 0).numpy()).max() < 1e-6
    stored = pixels if exact else half(image.detach().cpu().permute(1, 2, 0))
    return seal(meta, {"image": stored, "logits": half(logits.detach().cpu())}, set())


def settings_of(crf: DenseCRF) -> dict:
    """The parameters of a dense CRF as plain numbers."""
    w_spatial, w_bilateral = crf.log_w.detach().exp().tolist()[:2]
    return {
        "w_bilateral": tidy(w_bilateral),
        "w_spatial": tidy(w_spatial),
        "theta_alpha": tidy(crf.log_theta_alpha.detach().exp().item()),
        "theta_beta": tidy(crf.log_theta_beta.detach().exp().item()),
        "theta_gamma": tidy(crf.log_theta_gamma.detach().exp().item()),
        "iterations": crf.iterations,
        "normalization": crf.normalization,
        "self_message": crf.self_message,
    }


def tidy(value: float) -> float:
    """Six digits: a parameter kept as a float32 logarithm has no more, and 12.0000003 is 12 again."""
    return float(f"{value:.6g}")


def describe(
    classes: int, size: tuple[int, int], class_names: Sequence[str] | None, palette: np.ndarray | None
) -> dict:
    names = [f"label {k}" for k in range(classes)] if class_names is None else [str(n) for n in class_names]
    if len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names; this trace has {classes} labels")
    colours = ["#" + bytes(c).hex() for c in label_colours(classes, palette).tolist()]
    return {"size": list(size), "classes": names, "colours": colours}


def seal(meta: dict, blocks: dict[str, np.ndarray], changing: set[str]) -> tuple[dict, bytes]:
    meta["blocks"] = [{"name": n, "dtype": b.dtype.name, "shape": list(b.shape)} for n, b in blocks.items()]
    raw = b"".join(shuffled(block, differences=name in changing) for name, block in blocks.items())
    data = gzip.compress(raw, 6, mtime=0)
    meta["bytes"] = [0, len(data)]
    return meta, data


def half(values: Tensor) -> np.ndarray:
    """float16, saturating rather than infinite."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half().numpy()


def shuffled(block: np.ndarray, *, differences: bool) -> bytes:
    words = np.ascontiguousarray(block).view(f"<u{block.itemsize}")
    if differences:
        words = np.concatenate([words[:1], words[1:] - words[:-1]])  # modulo 2^16, and back in the browser
    return words.reshape(-1, 1).view(np.uint8).T.tobytes()


def follows(trace: Trace) -> bool:
    """Whether the pairwise term is compatibility @ sum_m w_m message_m, so that the page can work it out."""
    if trace.weights is None or trace.compatibility is None:
        return False
    made = torch.einsum("kl,m,tmlhw->tkhw", trace.compatibility, trace.weights, trace.messages)
    return torch.allclose(made, trace.pairwise, rtol=1e-3, atol=1e-3)
