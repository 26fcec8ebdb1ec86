"""The explorer's mean field (meanfield.js, run in Chromium) against `DenseCRF.trace`, enumeration and plain loops."""

import base64
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("playwright.sync_api")

import pwlib.course
from pwlib.crf import DenseCRF
from pwlib.data import VOID
from pwlib.tools.dense import probabilities_from_labels

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCE = Path(pwlib.course.__file__).parent / "explorer" / "meanfield.js"
RUN = """
async ({ problem, settings, strokes, plain }) => {
  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const packed = (a) => { let s = ""; for (const byte of new Uint8Array(Float32Array.from(a).buffer)) s += String.fromCharCode(byte); return btoa(s); };
  if (plain) WebAssembly.Module = class { constructor() { throw new Error("refused"); } };
  problem.image = floats(problem.image);
  problem.logits = floats(problem.logits);
  const out = [];
  for (const step of numerics().meanField(problem, { settings, strokes: strokes && Uint8Array.from(strokes) }, {}))
    if (step) out.push(Object.fromEntries(Object.entries(step).map(([k, v]) => [k, ArrayBuffer.isView(v) ? packed(v) : v])));
  return out;
}
"""  # noqa: E501


@pytest.fixture
def run(open_page, tmp_path):
    """run(image, logits, settings, ...) -> what meanField yields, merged: lists over iterations, and single arrays."""
    (tmp_path / "page.html").write_text("<!doctype html><title>numerics</title>")
    page = open_page((tmp_path / "page.html").as_uri())
    page.add_script_tag(content=SOURCE.read_text("utf-8").replace("export function", "function"))

    def pack(values):
        return base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()

    def run(image, logits, settings, *, compatibility=None, coupling=None, strokes=None, plain=False):
        classes, height, width = logits.shape
        compatibility = 1 - torch.eye(classes) if compatibility is None else compatibility
        problem = {
            "height": height,
            "width": width,
            "K": classes,
            "image": pack(image.permute(1, 2, 0)),
            "logits": pack(logits),
            "compatibility": compatibility.tolist(),
            "coupling": None if coupling is None else coupling.flatten().tolist(),
        }
        arguments = {"problem": problem, "settings": settings, "strokes": strokes, "plain": plain}
        found: dict = {"q": [], "labels": [], "messages": [], "pairwise": [], "free": []}
        for step in page.evaluate(RUN, arguments):
            for name, value in step.items():
                if isinstance(value, str):
                    value = np.frombuffer(base64.b64decode(value), np.float32).reshape(-1, height, width)
                if name in ("q", "labels", "messages", "pairwise", "free"):
                    found[name].append(value)
                elif name not in ("t", "at"):
                    found[name] = value
        return found

    return run


def scene(seed, classes, height, width):
    """A smooth picture with edges and noise, and logits that know a part of it; float32, as a notebook has them."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x > 0.5) * 0.6 + 0.2]) + 0.05 * torch.rand(3, height, width, generator=generator)
    truth = (classes * 0.999 * (x + y) / 2).long()
    logits = 2 * torch.nn.functional.one_hot(truth, classes).permute(2, 0, 1).float()
    return image.clamp(0, 1), logits + torch.randn(classes, height, width, generator=generator)


def reference(settings, compatibility, image, logits):
    """`DenseCRF.trace` in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        names = (
            "theta_alpha",
            "theta_beta",
            "theta_gamma",
            "w_bilateral",
            "w_spatial",
            "normalization",
            "self_message",
        )
        chosen = {name: settings[name] for name in names}
        crf = DenseCRF(len(logits), **chosen, compatibility=compatibility.double(), filtering="exact")
        return crf.trace(logits.double(), image.double(), iterations=settings["iterations"])
    finally:
        torch.set_default_dtype(torch.float32)


def close(found, wanted, name, part=1e-4):
    wanted = np.asarray(wanted)
    off = np.abs(np.asarray(found, np.float64).reshape(wanted.shape) - wanted).max()
    assert off <= part * max(np.ptp(wanted), 1e-6), f"{name}: off by {off:.1e}, its range is {np.ptp(wanted):.1e}"


def same(found, trace):
    for t in range(trace.iterations + 1):
        close(found["q"][t], trace.q[t], f"q[{t}]")
        if t:
            close(found["messages"][t - 1], trace.messages[t - 1].flatten(0, 1), f"messages[{t - 1}]")
            close(found["pairwise"][t - 1], trace.pairwise[t - 1], f"pairwise[{t - 1}]")
    close(found["unary"], trace.unary, "unary")
    close(found["sums"], trace.sums, "sums")
    close(found["free"], trace.free_energy, "free energy")


SIZES = [(1, 2), (2, 1), (3, 3), (5, 7), (12, 17), (24, 32), (33, 20), (40, 30), (64, 96)]


@pytest.mark.parametrize("seed", range(20))
def test_twenty_random_settings(run, seed):
    """Normalisations, signs and self-messages in turn; sizes, labels, bandwidths and weights at random."""
    draw = random.Random(seed)
    (height, width), classes = (
        (64, 96) if seed == 19 else SIZES[seed % 8],
        21 if seed == 19 else [2, 3, 5, 10, 21][seed % 5],
    )
    none = seed % 3 == 2
    settings = {
        "normalization": ["symmetric", "row", "none"][seed % 3],
        "sign": ["penalty", "reward"][seed // 3 % 2],
        "self_message": seed // 6 % 2 == 0,
        "theta_alpha": draw.uniform(2, 30),
        "theta_beta": draw.uniform(5, 60),
        "theta_gamma": draw.uniform(0.5, 5),
        "w_bilateral": draw.uniform(0.5, 5) / (20 if none else 1),
        "w_spatial": draw.uniform(0.5, 3) / (20 if none else 1),
        "iterations": 3 if seed == 19 else draw.randint(1, 6),
        "temperature": 1,
    }
    image, logits = scene(seed, classes, height, width)
    compatibility = 1 - torch.eye(classes)
    if seed % 4 == 3:
        compatibility = torch.rand(classes, classes, generator=torch.Generator().manual_seed(seed))
    penalty = compatibility.max() - compatibility if settings["sign"] == "reward" else compatibility
    same(run(image, logits, settings, compatibility=compatibility), reference(settings, penalty, image, logits))


PLAIN = {
    "normalization": "symmetric",
    "sign": "penalty",
    "self_message": True,
    "theta_alpha": 8,
    "theta_beta": 20,
    "theta_gamma": 2,
    "w_bilateral": 4,
    "w_spatial": 1,
    "iterations": 4,
    "temperature": 1,
}


def test_without_webassembly(run):
    image, logits = scene(1, 5, 13, 18)
    found = run(image, logits, PLAIN, plain=True)
    same(found, reference(PLAIN, 1 - torch.eye(5), image, logits))


def test_temperature_double_softmax_and_normalised_colours(run):
    """The faults of notebook 02, as it makes them."""
    image, logits = scene(2, 4, 12, 16)
    potts = 1 - torch.eye(4)
    same(run(image, logits, PLAIN | {"temperature": 2.5}), reference(PLAIN, potts, image, logits / 2.5))
    same(run(image, logits, PLAIN | {"double_softmax": True}), reference(PLAIN, potts, image, torch.softmax(logits, 0)))
    same(run(image, logits, PLAIN | {"sign": "reward"}), reference(PLAIN, torch.eye(4), image, logits))
    flat = 0.5 + (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True) / 255
    same(run(image, logits, PLAIN | {"normalised_colours": True}), reference(PLAIN, potts, flat, logits))


@pytest.mark.parametrize("confidence", [0.3, 0.7, 0.95])
def test_strokes_are_pythons_unary(run, confidence):
    image, logits = scene(3, 4, 9, 11)
    labels = torch.full((9, 11), VOID)
    labels[2, 3:9], labels[5:8, 2], labels[8, 10] = 1, 3, 0
    drawn = probabilities_from_labels(labels, 4, confidence=confidence).log()
    painted = torch.where(labels != VOID, drawn, logits)
    found = run(image, logits, PLAIN | {"confidence": confidence}, strokes=labels.flatten().tolist())
    close(found["unary"], -torch.log_softmax(painted.double(), 0), "unary", 1e-6)
    same(found, reference(PLAIN, 1 - torch.eye(4), image, painted))
    blank = run(image, torch.zeros(4, 9, 11), PLAIN | {"confidence": confidence}, strokes=labels.flatten().tolist())
    close(blank["unary"], -probabilities_from_labels(labels, 4, confidence=confidence).double().log(), "unary", 1e-6)


# Small graphs.


def by_hand(unary, coupling, iterations, in_turn):
    """Potts mean field on a graph, [iterations + 1, N, K] marginals and the free energies, in plain loops."""
    nodes = len(unary)
    q = torch.softmax(-unary, 1)
    history = [q]
    for _ in range(iterations):
        new = q.clone()
        for i in range(nodes):
            message = sum(coupling[i, j] * (new if in_turn else q)[j] for j in range(nodes))
            new[i] = torch.softmax(-(unary[i] + message.sum() - message), 0)
        q = new
        history.append(q)
    free = []
    for q in history:
        pairs = [coupling[i, j] * (1 - (q[i] * q[j]).sum()) for i in range(nodes) for j in range(nodes)]
        free.append(((q * unary).sum() + sum(pairs) / 2 + (q * q.log()).sum()).item())
    return torch.stack(history), free


def enumerated(unary, coupling):
    nodes, labels = unary.shape
    marginals, total = torch.zeros(nodes, labels, dtype=torch.float64), 0.0
    for x in itertools.product(range(labels), repeat=nodes):
        energy = sum(unary[i, x[i]] for i in range(nodes))
        energy += sum(coupling[i, j] * (x[i] != x[j]) for i, j in itertools.combinations(range(nodes), 2))
        weight = math.exp(-energy)
        total += weight
        for i in range(nodes):
            marginals[i, x[i]] += weight
    return marginals / total, math.log(total)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(("size", "classes"), [((1, 2), 2), ((3, 3), 2), ((2, 3), 3)])
def test_graphs_have_mean_field_and_the_exact_marginals(run, size, classes, in_turn):
    generator = torch.Generator().manual_seed(classes)
    nodes = size[0] * size[1]
    coupling = 3 * torch.rand(nodes, nodes, generator=generator, dtype=torch.float64) - 1
    coupling = coupling + coupling.T
    logits = torch.randn(classes, *size, generator=generator)
    settings = {"scale": 0.5, "self_weight": 0.7, "edges": [[0, 1, 1.5]], "in_turn": in_turn, "iterations": 8}
    found = run(torch.rand(3, *size), logits, settings, coupling=coupling)
    used = 0.5 * coupling
    used[0, 1] = used[1, 0] = 1.5
    used.fill_diagonal_(0.7)
    unary = -torch.log_softmax(logits.double(), 0).flatten(1).T
    history, free = by_hand(unary, used, 8, in_turn)
    for t in range(9):
        close(found["q"][t], history[t].T.reshape(classes, *size), f"q[{t}]")
    close(found["free"], free, "free energy")
    marginals, log_z = enumerated(unary, used)
    close(found["exact"], marginals.T.reshape(classes, *size), "exact marginals")
    assert found["logZ"] == pytest.approx(log_z, abs=1e-5)
