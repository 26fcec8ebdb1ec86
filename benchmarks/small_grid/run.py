"""Compare likelihoods for learning a CRF with known parameters: coupling error, marginals and overconfidence.

A grid of 2 x 3 nodes with 3 labels has 729 labellings. Labels can therefore be drawn exactly from P(y | x), exact
maximum likelihood is possible, and every learned model has exact marginals. The scores of truth and model are

    z_p(a) = (W x_p + b)_a,    z_pq(a, b) = V_ab + (S x_p)_a + (T x_q)_b,    V, S, T for each of two relations.

The true S and T are 0: the pairwise scores depend on the labels only, with one table for horizontal and one for
vertical edges. The learners estimate S and T too, as the paper's pairwise networks read the features of both ends.
Exact likelihood, pseudo-likelihood and mean field fit the sum of all scores. Piecewise training fits each term by
itself, and the terms are combined in three ways:

    piecewise               sum_p log P_U + sum_e log P_V, as in the paper
    piecewise, temperature  the same divided by one number T, fitted to 100 more images
    piecewise, tree         the counting numbers of `pwlib.context`: rho = (N - 1) / E for what log P_V adds to log P_U

    python benchmarks/small_grid/run.py                     one minute on one core; writes result.json
    python benchmarks/small_grid/run.py --table
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, mean_and_half, parser

from pwlib import graph

HERE = Path(__file__).parent
HEIGHT, WIDTH, K = 2, 3, 3
N = HEIGHT * WIDTH
STRENGTH, TRAIN, TEST, ITERATIONS = 1.0, 100, 100, 10
EDGES = graph.grid_edges(HEIGHT, WIDTH)
RELATION = (EDGES[:, 1] - EDGES[:, 0] != 1).long()  # 0: the second end is to the right, 1: below
LABELLINGS = graph.labellings(N, K)
HITS = torch.nn.functional.one_hot(LABELLINGS, K).double()  # [S, N, K]
LEARNERS = ("exact", "pseudo", "mean_field", "piecewise", "temperature", "tree")
NAMES = ("maximum likelihood", "pseudo-likelihood", "mean field")
NAMES += ("piecewise, plain sum", "piecewise, temperature", "piecewise, tree")
NAMES = dict(zip(LEARNERS, NAMES, strict=True))

Parameters = dict[str, Tensor]


def start() -> Parameters:
    shapes = {"W": (K, K), "b": (K,), "V": (2, K, K), "S": (2, K, K), "T": (2, K, K)}
    return {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


def scores(theta: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """unary [B, N, K] and pair [B, E, K, K] of features x [B, N, K]."""
    first, second = (x[:, end] for end in EDGES.unbind(1))
    of_first = torch.einsum("eac,bec->bea", theta["S"][RELATION], first)
    of_second = torch.einsum("eac,bec->bea", theta["T"][RELATION], second)
    return x @ theta["W"].T + theta["b"], theta["V"][RELATION] + of_first[..., None] + of_second[:, :, None]


def pieces(theta: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log P_U and log P_V."""
    unary, pair = scores(theta, x)
    return unary.log_softmax(-1), pair.flatten(2).log_softmax(-1).unflatten(-1, (K, K))


def combined(log_u: Tensor, log_v: Tensor, counting: str) -> tuple[Tensor, Tensor]:
    """Combine the terms for inference; see `pwlib.context`."""
    if counting == "sum":
        return log_u, log_v
    rho = (N - 1) / len(EDGES)
    return log_u, rho * (log_v - log_u[:, EDGES[:, 0], :, None] - log_u[:, EDGES[:, 1], None, :])


def joint(unary: Tensor, pair: Tensor) -> Tensor:
    """Return log P(y | x) of every labelling, [B, S]."""
    x = LABELLINGS
    score = unary[:, torch.arange(N), x].sum(-1)
    score = score + pair[:, torch.arange(len(EDGES)), x[:, EDGES[:, 0]], x[:, EDGES[:, 1]]].sum(-1)
    return score.log_softmax(-1)


def marginals(unary: Tensor, pair: Tensor) -> Tensor:
    return torch.einsum("bs,snk->bnk", joint(unary, pair).exp(), HITS)


def minimize(parameters: list[Tensor], loss) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def learn(name: str, x: Tensor, y: Tensor, more: tuple[Tensor, Tensor]):
    """Fit a learner; return its function from features x to (unary, pair) scores for inference."""
    theta = start()

    def loss(likelihood: str = name, **options) -> Tensor:
        unary, pair = scores(theta, x)
        return graph.LIKELIHOODS[likelihood](-unary, EDGES, -pair, y, **options)  # pwlib takes energies, E = -z

    if name in ("exact", "pseudo", "mean_field"):
        options = {"iterations": ITERATIONS} if name == "mean_field" else {}
        minimize(list(theta.values()), lambda: loss(**options))
        return lambda x: scores(theta, x)
    minimize(list(theta.values()), lambda: loss("piecewise"))
    counting = "tree" if name == "tree" else "sum"
    heat = torch.ones(1, dtype=torch.float64)
    if name == "temperature":
        with torch.no_grad():
            log_p = joint(*combined(*pieces(theta, more[0]), counting))
        sharpness = torch.ones(1, dtype=torch.float64, requires_grad=True)
        hits = (LABELLINGS[None] == more[1][:, None]).all(-1)
        minimize([sharpness], lambda: -(sharpness * log_p).log_softmax(-1)[hits].mean())
        heat = 1 / sharpness.detach()
    return lambda x: tuple(part / heat for part in combined(*pieces(theta, x), counting))


def coupling(pair: Tensor) -> Tensor:
    """Return pair scores with rows and columns centred, which no unary can express, averaged over images [E, K, K]."""
    pair = pair - pair.mean(-1, keepdim=True)
    return (pair - pair.mean(-2, keepdim=True)).mean(0)


def draw(seed: int) -> dict[str, dict[str, float]]:
    """Draw true parameters and a training set, and fit all learners."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    truth = {name: value.detach().clone() for name, value in start().items()}
    truth |= {"W": torch.eye(K, dtype=torch.float64) + 0.3 * normal(K, K), "b": 0.3 * normal(K)}
    truth["V"] = STRENGTH * normal(2, K, K)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        x = normal(count, N, K)
        chosen = torch.multinomial(joint(*scores(truth, x)).exp(), 1, generator=g)[:, 0]
        return x, LABELLINGS[chosen]

    (x, y), more, (test, _) = sample(TRAIN), sample(TRAIN), sample(TEST)
    real = scores(truth, test)
    p, table = marginals(*real), coupling(real[1])
    result = {}
    for name in LEARNERS:
        model = learn(name, x, y, more)
        with torch.no_grad():
            unary, pair = model(test)
            found = {
                "exact": marginals(unary, pair),
                "mean field": graph.mean_field(-unary, EDGES, -pair, iterations=ITERATIONS).exp(),
            }
            row = {"coupling error": ((coupling(pair) - table).square().mean() / table.square().mean()).sqrt().item()}
            for inference, q in found.items():
                row[f"KL, {inference}"] = (p * (p.log() - q.clamp(min=1e-30).log())).sum(-1).mean().item()
                confidence, label = q.max(-1)
                true = p.gather(-1, label[..., None])[..., 0]
                row[f"overconfidence, {inference}"] = (confidence - true).mean().item()
        result[name] = row
    return result


def table(runs: dict[str, dict]) -> str:
    """Markdown: the means of every learner, with 95 % intervals."""
    metrics = list(next(iter(runs.values()))["exact"])
    lines = ["| learner | " + " | ".join(metrics) + " |", "|---|" + "--:|" * len(metrics)]
    for name in LEARNERS:
        cells = (cell([row[name][metric] for row in runs.values()], digits=3) for metric in metrics)
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(runs: dict[str, dict]) -> str:
    """Markdown: differences between learners, paired by draw; in parentheses if the interval contains 0."""
    pairs = [(name, "exact") for name in LEARNERS[1:]] + [(name, "tree") for name in LEARNERS[3:5]]
    metrics = list(next(iter(runs.values()))["exact"])
    lines = ["| paired by draw | " + " | ".join(metrics) + " |", "|---|" + "--:|" * len(metrics)]
    for one, other in pairs:
        cells = []
        for metric in metrics:
            values = [row[one][metric] - row[other][metric] for row in runs.values()]
            (mean, half), text = mean_and_half(values), cell(values, sign=True, digits=3)
            cells.append(f"({text})" if abs(mean) <= half else text)
        lines.append(f"| {NAMES[one]} - {NAMES[other]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    given = parser(__doc__, HERE / "result.json", seeds=range(20)).parse_args()
    settings = {"grid": [HEIGHT, WIDTH], "labels": K, "strength": STRENGTH, "train": TRAIN, "test": TEST}
    study = Study(given.out, settings)
    for seed in () if given.table else tqdm(given.seeds, unit="draw"):
        study.measure(f"seed {seed}", lambda seed=seed: draw(seed))
    print(table(study.runs), differences(study.runs), sep="\n\n")


if __name__ == "__main__":
    main()
