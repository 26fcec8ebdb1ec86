"""Synthetic answers to lab 5: other correct ones, wrong ones and what they are told, naive ones and what they lose."""

ALTERNATIVE = {
    # Scattered instead of counted; float32.
    "table_gradient": """def table_gradient(table, first, second):
    ok = first.ne(255) * second.ne(255)
    labels = table.shape[0]
    pairs = first[ok] * labels + second[ok]
    observed = F.one_hot(pairs, labels * labels).float().mean(0)
    z = table.reshape(-1)
    expected = (z - z.logsumexp(0)).exp()
    return (expected.float() - observed).reshape(labels, labels)
""",
    "learn_term": """def learn_term(first, second, labels, pseudo=1.0):
    counts = [[pseudo] * labels for _ in range(labels)]
    for a, b in zip(first.tolist(), second.tolist()):
        if a < labels and b < labels:
            counts[a][b] += 1
    total = sum(map(sum, counts))
    return torch.tensor([[math.log(c / total) for c in row] for row in counts])
""",
    # One labelling after another, and the larger of two exponents taken out by hand.
    "log_likelihood": """def log_likelihood(unary, edges, pair, y):
    nodes, labels = unary.shape
    every, right = -math.inf, -math.inf

    def add(a, b):
        top = max(a, b)
        return top + math.log(math.exp(a - top) + math.exp(b - top))

    for x in itertools.product(range(labels), repeat=nodes):
        s = sum(unary[p, x[p]].item() for p in range(nodes))
        s += sum(pair[e, x[p], x[q]].item() for e, (p, q) in enumerate(edges.tolist()))
        every = add(every, s)
        if all(y[p] == 255 or y[p] == x[p] for p in range(nodes)):
            right = add(right, s)
    return right - every
""",
    "overconfidence": """def overconfidence(q, p):
    total = 0
    for mine, true in zip(q.tolist(), p.tolist()):
        best = mine.index(max(mine))
        total += mine[best] - true[best]
    return total / len(q)
""",
    # Powers of probabilities.
    "echo_marginals": """def echo_marginals(log_u, edges):
    result = []
    for p, row in enumerate(log_u):
        power = 1 + int((edges == p).sum())
        weight = row.exp() ** power
        result.append(weight / weight.sum())
    return torch.stack(result)
""",
    # By the loss alone, on ever finer grids.
    "fit_temperature": """def fit_temperature(score, chosen):
    low, high = math.log(0.05), math.log(50)
    for _ in range(6):
        logs = torch.linspace(low, high, 41).double()
        losses = [-(score.double() / t.exp()).log_softmax(0)[chosen].mean() for t in logs]
        best = int(torch.stack(losses).argmin())
        low, high = float(logs[max(best - 1, 0)]), float(logs[min(best + 1, 40)])
    return math.exp((low + high) / 2)
""",
    # Kirchhoff: the trees with an edge are all trees less those of the graph without it, each number a determinant.
    "tree_chances": """def tree_chances(edges, nodes):
    def trees(some):
        laplace = torch.zeros(nodes, nodes, dtype=torch.float64)
        for p, q in some:
            laplace[p, p] += 1
            laplace[q, q] += 1
            laplace[p, q] -= 1
            laplace[q, p] -= 1
        return float(torch.linalg.det(laplace[1:, 1:]))

    pairs = edges.tolist()
    total = trees(pairs)
    return torch.tensor([1 - trees(pairs[:e] + pairs[e + 1 :]) / total for e in range(len(pairs))])
""",
    # The ends' share goes to the nodes, as in pwlib.context.
    "counted": """def counted(log_u, edges, log_v, rho):
    degree = torch.zeros(len(log_u), dtype=log_u.dtype)
    for end in (0, 1):
        degree.index_add_(0, edges[:, end], rho.to(log_u.dtype))
    return (1 - degree)[:, None] * log_u, rho.view(-1, 1, 1) * log_v
""",
}


def gradient(expected="table.flatten().softmax(0).view_as(table)", observed="share / known.sum()", more="") -> str:
    return f"""def table_gradient(table, first, second):
    known = (first != VOID) & (second != VOID)
    share = torch.zeros_like(table)
    for a, b in zip(first[known].tolist(), second[known].tolist()):
        share[a, b] += 1{more}
    return {expected} - {observed}
"""


def piece(result="(counts / counts.sum()).log()", pseudo="pseudo", known="(first != VOID) & (second != VOID)") -> str:
    return f"""def learn_term(first, second, labels, pseudo=1.0):
    known = {known}
    pairs = first[known].clamp(max=labels - 1) * labels + second[known].clamp(max=labels - 1)
    counts = torch.bincount(pairs, minlength=labels**2).double().view(labels, labels) + {pseudo}
    return {result}
"""


def likelihood(
    result="score[agrees].logsumexp(0) - score.logsumexp(0)", agrees="((x == y) | (y == VOID)).all(1)"
) -> str:
    return f"""def log_likelihood(unary, edges, pair, y):
    nodes, labels = unary.shape
    x = graph.labellings(nodes, labels)
    score = -graph.energies(x, -unary, edges, -pair)
    agrees = {agrees}
    return {result}
"""


def excess(result: str) -> str:
    return f"""def overconfidence(q, p):
    nodes = torch.arange(len(p))
    return {result}
"""


def echo(times: str, result: str = "(times[:, None] * log_u).softmax(1)") -> str:
    return f"""def echo_marginals(log_u, edges):
    count = lambda nodes: torch.bincount(nodes, minlength=len(log_u)).double()
    times = {times}
    return {result}
"""


def temperature(test="expected > seen_score", result="1 / beta", score="score.double()", low=1 / 50, high=20.0) -> str:
    return f"""def fit_temperature(score, chosen):
    score = {score}
    seen_score = score[chosen].mean()
    low, high = {low}, {high}
    for _ in range(60):
        beta = (low + high) / 2
        expected = ((beta * score).softmax(0) * score).sum()
        low, high = (low, beta) if {test} else (beta, high)
    return {result}
"""


def chances(accept="len(set(part)) == 1", result="counts / trees") -> str:
    return f"""def tree_chances(edges, nodes):
    counts, trees = torch.zeros(len(edges), dtype=torch.float64), 0
    for chosen in itertools.combinations(range(len(edges)), nodes - 1):
        part = list(range(nodes))
        for e in chosen:
            p, q = edges[e].tolist()
            part = [part[q] if x == part[p] else x for x in part]
        if {accept}:
            counts[list(chosen)] += 1
            trees += 1
    return {result}
"""


def together(pair: str, unary: str = "log_u") -> str:
    return f"""def counted(log_u, edges, log_v, rho):
    first, second = (log_u[end] for end in edges.unbind(1))
    first, second, r = first[:, :, None], second[:, None, :], rho[:, None, None]
    return {unary}, {pair}
"""


WRONG = {
    "table_gradient": [
        (
            gradient(observed="table.flatten().softmax(0).view_as(table)", expected="share / known.sum()"),
            "The sign is wrong",
        ),
        (gradient(observed="share"), "expected their shares"),
        (gradient(observed="share / len(first)"), "number of known pairs"),
        (gradient(observed="(share / known.sum()).T"), "Row and column are exchanged"),
        (gradient(expected="table.softmax(1)"), "second label only"),
        (gradient(observed="0"), "The observed pairs have no effect"),
    ],
    "learn_term": [
        (piece("counts / counts.sum()"), "expected its logarithm"),
        (piece("(counts / counts.sum(1, keepdim=True)).log()"), "Each row sums to 1"),
        (piece(pseudo="0"), "has the value minus infinity"),
        (piece(pseudo="1"), "is taken to be 1"),
        (piece("(counts / (counts - pseudo).sum().clamp(min=1e-9)).log()"), "does not contain the pseudo-counts"),
        (piece("(counts / (len(first) + pseudo * labels**2)).log()"), "void end are counted in the total"),
        (piece("(counts / counts.sum()).log().T"), "Row and column are exchanged"),
    ],
    "log_likelihood": [
        (likelihood("score.logsumexp(0) - score[agrees].logsumexp(0)"), "minus the log-likelihood"),
        (
            likelihood("score[agrees].exp().sum().log() - score.exp().sum().log()"),
            "not finite for scores of several hundreds",
        ),
        (likelihood("score[agrees].max() - score.logsumexp(0)"), "set to their best labels"),
        (likelihood("score[agrees].mean() - score.logsumexp(0)"), "the mean of the scores"),
        (likelihood("score[agrees].logsumexp(0)"), "log Z is missing"),
        (likelihood("(-score[agrees]).logsumexp(0) - (-score).logsumexp(0)"), "sign of the scores is wrong"),
        (
            """def log_likelihood(unary, edges, pair, y):
    from pwlib.graph import exact_nll
    return -exact_nll(-unary[None], edges, -pair[None], y[None]) * (y != VOID).sum()
""",
            "expected your own two sums",
        ),
        (
            """def log_likelihood(unary, edges, pair, y):
    known = y != VOID
    total = sum(unary[p].log_softmax(0)[y[p]] for p in range(len(y)) if known[p])
    for (p, q), table in zip(edges.tolist(), pair):
        if known[p] and known[q]:
            total = total + table[y[p], y[q]] - table.logsumexp((0, 1))
    return total
""",
            "piecewise likelihood",
        ),
    ],
    "overconfidence": [
        (excess("(q.amax(1) - p.amax(1)).mean()"), "largest probabilities of model and truth are compared"),
        (excess("(p[nodes, q.argmax(1)] - q.amax(1)).mean()"), "a positive value means overconfidence"),
        (excess("(q.amax(1) - p[nodes, q.argmax(1)]).abs().mean()"), "taken as absolute values"),
        (excess("(q.amax(1) - p[nodes, q.argmax(1)]).sum()"), "the sum over nodes"),
        (excess("(q.amax(1) - (q.argmax(1) == p.argmax(1)).float()).mean()"), "The truth is treated as one label"),
    ],
    "echo_marginals": [
        (echo("count(edges.flatten())"), "unary term of the node is missing"),
        (echo("1 + count(edges[:, 0])"), "Only the first ends of edges"),
        (echo("1 + 0 * count(edges[:, 0])"), "These are the marginals P_U"),
        (echo("1 + count(edges.flatten())", "times[:, None] * log_u"), "These are scores"),
        (echo("1 + count(edges.flatten())", "(times[:, None] * log_u).exp()"), "do not sum to 1"),
        (echo("1 + 0 * log_u[:, 0] + 2 * len(edges) / len(log_u)"), "the mean number of edges"),
        (
            """def echo_marginals(log_u, edges):
    tables = torch.stack([log_u[p][:, None] + log_u[q][None, :] for p, q in edges.tolist()])
    return graph.infer(-log_u, edges, -tables).marginals
""",
            "at most",
        ),
    ],
    "fit_temperature": [
        (temperature(result="beta"), "This is beta"),
        (temperature("expected < seen_score"), "an end of the range"),
        ("def fit_temperature(score, chosen):\n    return 1.0\n", "expected a temperature that is fitted"),
        (
            """def fit_temperature(score, chosen):
    grid = torch.tensor([0.05, 0.1, 0.2, 0.5, 1.001, 2, 5, 10, 20, 50]).double()
    return grid[torch.stack([-(score / t).log_softmax(0)[chosen].mean() for t in grid]).argmin()]
""",
            "within 1 %",
        ),
        (
            """def fit_temperature(score, chosen):
    grid = torch.linspace(0.05, 50, 5000).double()
    return grid[torch.stack([(score / t).exp()[chosen].mean() / (score / t).exp().sum() for t in grid]).argmax()]
""",
            "T is",
        ),
    ],
    "tree_chances": [
        (
            "def tree_chances(edges, nodes):\n    return torch.full((len(edges),), (nodes - 1) / len(edges))\n",
            "This is the mean",
        ),
        ("def tree_chances(edges, nodes):\n    return torch.ones(len(edges))\n", "holds on a tree only"),
        (
            chances("len({p for e in chosen for p in edges[e].tolist()}) == nodes"),
            "a cycle and a separate edge",
        ),
        (chances(result="counts"), "counts of trees"),
        (chances(result="counts / counts.sum()"), "The shares sum to 1"),
        (chances(result="1 - counts / trees"), "trees without the edge"),
    ],
    "counted": [
        (together("r * log_v"), "of both ends is not subtracted"),
        (together("log_v"), "This is the plain sum"),
        (together("log_v - first - second"), "rho has no effect"),
        (together("r * log_v - first - second"), "including log P_U of the ends"),
        (together("r * (log_v - first)"), "of the first end only is subtracted"),
        (together("r * (log_v + first + second)"), "expected that it is subtracted"),
        (together("r.mean() * (log_v - first - second)"), "All edges have the mean of rho"),
    ],
}

# Probabilities conditional on the first end; the largest true probability in place of that of the predicted label;
# repeated evidence without the unary term; the mean over all edges.
NAIVE = (
    {
        "learn_term": piece("(counts / counts.sum(1, keepdim=True)).log()"),
        "overconfidence": excess("(q.amax(1) - p.amax(1)).mean()"),
        "echo_marginals": echo("count(edges.flatten())"),
        "tree_chances": WRONG["tree_chances"][0][0],
    },
    {"test_learn_term": 8, "test_overconfidence": 10, "test_echo_marginals": 10, "test_tree_chances": 12},
)
