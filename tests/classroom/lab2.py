"""Made-up answers to lab 2: others that are right, wrong ones with what they must be told, and a naive student's."""

ALTERNATIVE = {
    "pair_energies": """
import numpy as np

def pair_energies(image, edges, labels, strength, contrast, cut):
    width = image.shape[2]
    tables = np.zeros((len(edges), labels, labels))
    for e, (i, j) in enumerate(edges.tolist()):
        apart = image[:, i // width, i % width] - image[:, j // width, j % width]
        for a in range(labels):
            for b in range(labels):
                similar = math.exp(-float(apart @ apart) / (2 * contrast ** 2))
                tables[e, a, b] = strength * similar * min(abs(a - b), cut)
    return torch.from_numpy(tables).float()
""",
    "energies": """
def energies(x, unary, edges, pair):
    result = []
    for row in x.tolist():
        total = sum(float(unary[i, a]) for i, a in enumerate(row))
        for table, (i, j) in zip(pair.tolist(), edges.tolist()):
            total += table[row[i]][row[j]]
        result.append(total)
    return torch.tensor(result, dtype=torch.float64)
""",
    "enumerate_exactly": """
def enumerate_exactly(unary, edges, pair):
    nodes, labels = unary.shape
    code = torch.arange(labels ** nodes)
    x = torch.stack([code // labels ** (nodes - 1 - i) % labels for i in range(nodes)], 1)
    cost = energies(x, unary.double(), edges, pair.double())
    low = cost.min()
    weight = (low - cost).exp()
    one_hot = torch.nn.functional.one_hot(x, labels).double()
    marginals = torch.einsum("s,snk->nk", weight / weight.sum(), one_hot)
    return float(weight.sum().log() - low), marginals, x[cost.argmin()].tolist()
""",
    "mean_field": """
def mean_field(unary, edges, pair, sweeps):
    nodes, labels = unary.shape
    table = torch.zeros(nodes, nodes, labels, labels, dtype=torch.float64)
    for e, (i, j) in enumerate(edges.tolist()):
        table[i, j] += pair[e]
        table[j, i] += pair[e].T
    q = torch.softmax(-unary.double(), 1)
    for _ in range(sweeps):
        for i in range(nodes):
            q[i] = torch.softmax(-(unary[i] + torch.einsum("jab,jb->a", table[i], q)), 0)
    return q.float()
""",
    "divergence": """
def divergence(q, unary, edges, pair):
    nodes, labels = unary.shape
    x = torch.tensor(list(itertools.product(range(labels), repeat=nodes)))
    of_q = q[torch.arange(nodes), x].prod(1)
    log_p = -energies(x, unary, edges, pair)
    log_p = log_p - log_p.logsumexp(0)
    return float((torch.xlogy(of_q, of_q) - of_q * log_p).sum())
""",
}


def pair_energies(
    weight="apart / (2 * contrast**2)", jump="(label[:, None] - label[None]).abs().clamp(max=cut)", extra=""
):
    return f"""
def pair_energies(image, edges, labels, strength, contrast, cut):
    pixels = image.flatten(1).T
    {extra}
    apart = (pixels[edges[:, 0]] - pixels[edges[:, 1]]).square().sum(1)
    label = torch.arange(labels)
    return strength * torch.exp(-({weight}))[:, None, None] * ({jump})
"""


def energies(body):
    return f"""
def energies(x, unary, edges, pair):
    alone = unary[torch.arange(len(unary)), x].sum(1)
    first, second = x[:, edges[:, 0]], x[:, edges[:, 1]]
    e = torch.arange(len(edges))
    return {body}
"""


def enumerate_exactly(
    log_z="torch.logsumexp(-energy, 0)", marginals="share(torch.softmax(-energy, 0))", best="x[energy.argmin()]"
):
    return f"""
def enumerate_exactly(unary, edges, pair):
    nodes, labels = unary.shape
    x = torch.cartesian_prod(*[torch.arange(labels)] * nodes).view(-1, nodes)
    energy = energies(x, unary, edges, pair)

    def share(p):
        return torch.stack([(p[:, None] * (x == label)).sum(0) for label in range(labels)], 1)

    return {log_z}, {marginals}, {best}
"""


def mean_field(start="torch.softmax(-unary, 1)", cost="unary[i].clone()", second="pair[e].T @ q[first]", sign="+",
               order="range(len(unary))", sweeps="range(sweeps)", after="q[i] = torch.softmax(-cost, 0)"):  # fmt: skip
    return f"""
def mean_field(unary, edges, pair, sweeps):
    q = {start}
    for _ in {sweeps}:
        for i in {order}:
            cost = {cost}
            for e, (first, second) in enumerate(edges.tolist()):
                if first == i:
                    cost = cost {sign} pair[e] @ q[second]
                elif second == i:
                    cost = cost {sign} {second}
            {after}
    return q
"""


AT_ONCE = """
def mean_field(unary, edges, pair, sweeps):
    q = torch.softmax(-unary, 1)
    for _ in range(sweeps):
        cost = unary.clone()
        for e, (first, second) in enumerate(edges.tolist()):
            cost[first] += pair[e] @ q[second]
            cost[second] += pair[e].T @ q[first]
        q = torch.softmax(-cost, 1)
    return q
"""


def divergence(body):
    return f"""
def divergence(q, unary, edges, pair):
    log_z, marginals, _ = enumerate_exactly(unary, edges, pair)
    expected = (q * unary).sum() + sum(q[i] @ pair[e] @ q[j] for e, (i, j) in enumerate(edges.tolist()))
    entropy = torch.special.entr(q).sum()
    return {body}
"""


NO_ZEROS = divergence("expected + (q * q.log()).sum() + log_z")
OVERFLOWS = enumerate_exactly("torch.exp(-energy).sum().log()", "share(torch.exp(-energy) / torch.exp(-energy).sum())")
INFERRED = """
def enumerate_exactly(unary, edges, pair):
    found = graph.infer(unary, edges, pair)
    return found.log_z, found.marginals, found.map_labels
"""
NOT_ONE = "share(torch.softmax(-energy, 0)) * torch.exp(-energy).sum()"

WRONG = {
    "pair_energies": [
        (pair_energies(weight="apart / contrast**2"), "factor of two"),
        (pair_energies(weight="apart.sqrt() / (2 * contrast**2)"), "squared distance"),
        (pair_energies(jump="(label[:, None] - label[None]).abs()"), "has the same energy as one over two"),
        (pair_energies(jump="(label[:, None] != label[None]).float()"), "Every jump has the same energy"),
        (pair_energies(extra="pixels = image.transpose(1, 2).flatten(1).T"), "row by row"),
        (pair_energies(weight="apart / len(image) / (2 * contrast**2)"), "expected their sum"),
    ],
    "energies": [
        (energies("alone + pair[e, second, first].sum(1)"), "ends of an edge are exchanged"),
        (
            energies("alone + (pair[e, first, second] + pair[e, second, first]).sum(1)"),
            "counted twice; expected once",
        ),
        (energies("alone"), "the pairwise energies are missing"),
        (energies("-alone - pair[e, first, second].sum(1)"), "The sign is wrong"),
        (
            "def energies(x, unary, edges, pair):\n    return graph.energies(x, unary, edges, pair)",
            "expected a computation of your own",
        ),
    ],
    "enumerate_exactly": [
        (enumerate_exactly(log_z="torch.exp(-energy).sum()"), "expected log Z"),
        (enumerate_exactly(marginals="share(torch.softmax(energy, 0))"), "Labels of high energy are most probable"),
        (enumerate_exactly(marginals=NOT_ONE), "do not sum to 1"),
        (
            enumerate_exactly(best="share(torch.softmax(-energy, 0)).argmax(1)"),
            "expected the labelling of the lowest energy",
        ),
        (enumerate_exactly(marginals="torch.softmax(-unary, 1)"), "as if it were alone"),
        (OVERFLOWS, "expected a finite number"),
        (INFERRED, "expected a computation of your own"),
    ],
    "mean_field": [
        (AT_ONCE, "updated at once"),
        (mean_field(second="pair[e] @ q[first]"), "read the table by rows"),
        (mean_field(sign="-"), "sign of the pairwise energies is wrong"),
        (mean_field(cost="torch.zeros_like(unary[i])"), "used for the start only"),
        (mean_field(order="reversed(range(len(unary)))"), "from the last pixel to the first"),
        (mean_field(start="torch.full_like(unary, 1 / unary.shape[1])"), "The start is uniform"),
        (mean_field(sweeps="range(1)"), "after one sweep"),
    ],
    "divergence": [
        (divergence("expected - entropy"), "log Z is missing"),
        (divergence("expected + entropy + log_z"), "The entropy has the wrong sign"),
        (divergence("(expected - entropy + log_z) / len(q)"), "per pixel"),
        (divergence("(marginals * (marginals / q).log()).sum()"), "pixel by pixel"),
        (NO_ZEROS, "0 log 0"),
    ],
}

NAIVE = (
    {"enumerate_exactly": OVERFLOWS, "mean_field": AT_ONCE, "divergence": NO_ZEROS},
    {"test_large_energies": 6, "test_sweeps": 15, "test_divergence_of_certainty": 5},
)
