"""The contextual CRF of Lin et al. (CVPR 2016): pairwise potentials from networks, on a coarse feature map.

Every cell p of the map is a node. Every relation r connects p to the cells q in a range box by ordered edges (p, q):

    P(x) = exp(-E(x)) / Z,    E(x) = sum_p psi_p(x_p) + sum_r sum_{(p,q) in r} psi_pq^r(x_p, x_q)

    surrounding   q in a box centred on p                      which labels occur near each other
    above_below   q in a box whose lower edge is centred at p  which labels q has above p

The paper writes scores z = -psi. The unary network gives z_p; a pairwise network gives K*K numbers z_pq from the
features [f_p, f_q] of both cells. A Gaussian kernel depends only on how similar two pixels are, while this network sees
what they are, and since edges are ordered it can prefer "sky above sea" to "sea above sky".

Training is piecewise: each potential is normalised by itself, P_U = softmax over K of z_p and P_V = softmax over K*K of
z_pq, and learned as a classifier of nodes or of pairs, without inference. For inference the terms are combined. Each
pairwise term contains evidence about its two nodes, so the plain sum counts that evidence once per edge, and a node has
dozens of edges. `counting` chooses the energy:

    sum               E = -sum_p log P_U(x_p) - sum_e log P_V(x_p, x_q)                               as in the paper
    tree              E = -sum_p log P_U(x_p) - rho sum_e [log P_V(x_p, x_q) - log P_U(x_p) - log P_U(x_q)]
    reparametrised    E = -sum_p log P_U(x_p) - rho sum_e [log P_V(x_p, x_q) - log P_e(x_p) - log P_e(x_q)]

P_e(x_p) = sum_b P_V(x_p, b) and P_e(x_q) = sum_a P_V(a, x_q) are the marginals of the edge's own term. If edges form a
tree and rho = 1, "tree" is exact for terms that have seen the evidence of their two nodes, and "reparametrised" for
terms that have not, given features that are independent given the labels (Wainwright, Jaakkola & Willsky 2003). The
two agree where P_e equals P_U. Elsewhere "tree" adds rho times the difference for every edge, whether it is evidence or
an error of estimation, and "reparametrised" discards it: notebook 06 derives both. On graphs with cycles
rho = (N - 1) / E is the mean probability that an edge belongs to a random spanning tree (the edge appearance
probability of Wainwright et al. 2005, the same for all edges).

With `residual`, P_V starts as the product of its nodes' P_U: z_pq(a, b) = log P_U(a) + log P_U(b) + the network's
score, and at the start of training the edges contribute almost nothing, except in "sum".
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn

from pwlib.graph import LIKELIHOODS, expected_energies, mean_field
from pwlib.inputs import at_least, one_of
from pwlib.losses import cross_entropy, pairwise_nll
from pwlib.trace import Trace, record

RELATIONS = ("surrounding", "above_below")
COUNTING = ("tree", "reparametrised", "sum")


def box_offsets(relation: str, short_side: int, *, reach: float = 0.4, neighbours: int | None = None) -> np.ndarray:
    """Offsets from a node to its neighbours in the range box: int64 [D, 2] as (rows down, columns right).

    The box is a square of side reach * short_side and reaches at least one cell. A cell belongs to it if the cell's
    centre does; the node itself does not.

    Args:
        relation: "surrounding" or "above_below".
        short_side: of the map, in cells.
        reach: side of the box as a share of `short_side`.
        neighbours: None for all cells in the box, or an odd square less 1 (24): if the box holds more cells, a regular
            5x5 grid over it without the centre, or fewer where the box has fewer than 5 rows or columns.
    """
    one_of(RELATIONS, relation=relation)
    if not reach > 0:
        raise ValueError(f"reach is {reach}; expected a positive share of the map's short side")
    side = reach * short_side
    half = max(1, int(side / 2 + 1e-9))  # 1e-9: 0.4 * 5 rounds to slightly less than 2
    top, bottom = (-half, half) if relation == "surrounding" else (-max(1, int(side + 1e-9)), -1)
    rows, columns = np.arange(top, bottom + 1), np.arange(-half, half + 1)
    box = _offsets(rows, columns)
    if neighbours is None or len(box) <= neighbours:
        return box
    count = isqrt(neighbours + 1)
    if count**2 != neighbours + 1 or count % 2 == 0:
        raise ValueError(f"neighbours is {neighbours}; expected an odd square less 1 (8, 24, 48), or None for all")
    rows, columns = (np.rint(np.linspace(axis[0], axis[-1], count)).astype(int) for axis in (rows, columns))
    centre = (rows[count // 2], columns[count // 2])
    grid = _offsets(np.unique(rows), np.unique(columns))
    return grid[(grid != centre).any(1)]


def _offsets(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """All pairs (row, column) except (0, 0): int64 [D, 2]."""
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2).astype(np.int64)
    return grid[grid.any(1)]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor also serves later calls that need a gradient
def box_edges(relation: str, height: int, width: int, *, reach: float = 0.4, neighbours: int | None = None) -> Tensor:
    """The edges (p, q) of a height x width map, q in p's box: int64 [E, 2], row-major nodes, ordered by p.

    Boxes are cut at the map's border. "surrounding" contains every pair as (p, q) and as (q, p), as in the paper: two
    different potentials, since the network depends on the order.
    """
    offsets = torch.from_numpy(box_offsets(relation, min(height, width), reach=reach, neighbours=neighbours))
    node = torch.arange(height * width)[:, None]
    row, column = node // width + offsets[:, 0], node % width + offsets[:, 1]  # [N, D]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.stack([node.expand_as(row)[inside], (row * width + column)[inside]], 1)


class PairwiseNet(nn.Module):
    """K x K scores of ordered pairs from their features: relu(W_1 f_p + W_2 f_q + b), then a linear layer.

    Both products are computed once per node and added per edge, without concatenating pairs.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int):
        super().__init__()
        self.num_classes = num_classes
        self.of_first = nn.Linear(channels, hidden)
        self.of_second = nn.Linear(channels, hidden, bias=False)
        self.scores = nn.Linear(hidden, num_classes**2)
        for layer in (self.of_first, self.of_second):  # He et al. (2015) for one layer with 2 * channels inputs
            nn.init.normal_(layer.weight, std=channels**-0.5)
        nn.init.normal_(self.scores.weight, std=0.01)  # nearly uniform over the K*K label pairs at the start
        nn.init.zeros_(self.of_first.bias), nn.init.zeros_(self.scores.bias)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """features [B, N, C] and edges [E, 2] -> scores [B, E, K, K], the label of the edge's first node first."""
        first, second = edges.unbind(1)
        hidden = torch.relu(self.of_first(features)[:, first] + self.of_second(features)[:, second])  # [B, E, hidden]
        return self.scores(hidden).unflatten(-1, (self.num_classes, self.num_classes))


class _NonNegative(torch.autograd.Function):
    """max(w, 0). A weight below 0 gets the gradient only if that raises it, so that it can return."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return torch.where((weight > 0) | (gradient < 0), gradient, 0)


class ContextualCRF(nn.Module):
    """A CRF over the cells of a feature map; `context(logits, features) -> log_q`, all at the map's resolution.

    Args:
        num_classes: K, at least 2.
        in_channels: C, the number of features.
        hidden: width of the pairwise networks.
        relations: one or both of "surrounding" and "above_below".
        reach: side of the range box as a share of the map's short side.
        neighbours: None for all cells in the box; 24 for a regular sample, as in the paper's journal version.
        iterations: of mean field, unless a call gives another number; 3 in the paper.
        counting: "tree", "reparametrised" or "sum", see the module's head.
        residual: whether log P_U of both nodes is added to the networks' scores; False in the paper.

    Learnable: the pairwise networks, through `loss` or `pair_loss`; `weight` [relations], a factor on each relation's
    energies, which counts as 0 where it is negative; and `log_temperature`. The combined energy is divided by the
    temperature: above 1, marginals become less certain. The piecewise likelihood does not depend on the last two; they
    are learned through inference. A weight becomes 0 where its relation does not help.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        hidden: int = 256,
        relations: tuple[str, ...] = RELATIONS,
        reach: float = 0.4,
        neighbours: int | None = None,
        iterations: int = 3,
        counting: str = "tree",
        residual: bool = True,
    ):
        super().__init__()
        at_least(2, num_classes=num_classes)
        at_least(0, iterations=iterations)
        one_of(COUNTING, counting=counting)
        if not relations or len(set(relations)) != len(relations):
            raise ValueError(f"relations are {relations}; expected one or more of {', '.join(RELATIONS)}, each once")
        for relation in relations:
            box_offsets(relation, 100, reach=reach, neighbours=neighbours)  # raises for values that are not allowed
        self.num_classes, self.in_channels = num_classes, in_channels
        self.relations, self.reach, self.neighbours = tuple(relations), reach, neighbours
        self.iterations, self.counting, self.residual = iterations, counting, residual
        self.networks = nn.ModuleDict({r: PairwiseNet(in_channels, num_classes, hidden) for r in relations})
        self.weight = nn.Parameter(torch.ones(len(relations)))  # not a logarithm, which could not reach 0
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def edges(self, height: int, width: int) -> dict[str, Tensor]:
        """The edges of each relation, int64 [E_r, 2]."""
        options = {"reach": self.reach, "neighbours": self.neighbours}
        return {r: box_edges(r, height, width, **options).to(self.weight.device) for r in self.relations}

    def pair_energies(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """psi_pq = -z_pq of each relation, [B, E_r, K, K], from logits [B, K, h, w] and features [B, C, h, w]."""
        rows, result = features.to(self.weight).flatten(2).mT, {}  # [B, N, C]
        log_u = self._log_p(logits)
        for relation, edges in self.edges(*features.shape[-2:]).items():
            scores = self.networks[relation](rows, edges)
            result[relation] = -(scores + self._both_nodes(log_u, edges) if self.residual else scores)
        return result

    def pairwise_terms(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """log P_V of each relation, [B, E_r, K, K]: log_softmax(-pair_energies) over the K*K label pairs of an edge."""
        energies = self.pair_energies(logits, features)
        return {r: torch.log_softmax(-e.flatten(2), dim=-1).view_as(e) for r, e in energies.items()}

    def potentials(self, logits: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The combined energies for inference, as `counting`, the weights and the temperature define them.

        Args:
            logits: [B, K, h, w].
            terms: log P_V of each relation, [B, E_r, K, K], from `pairwise_terms`.

        Returns:
            unary [B, N, K], edges int64 [E, 2] and pair [B, E, K, K].
        """
        log_u = self._log_p(logits)
        graph = self._interactions(log_u, logits.shape[-2:], terms).values()
        edges, pair = torch.cat([edges for edges, _ in graph]), -torch.cat([scores for _, scores in graph], dim=1)
        return -log_u / self.log_temperature.exp(), edges, pair

    def forward(
        self, logits: Tensor, features: Tensor, *, iterations: int | None = None, frozen: bool = False
    ) -> Tensor:
        """Log-marginals log_q [B, K, h, w] from logits [B, K, h, w] and features [B, C, h, w] of one map.

        frozen: gradients reach only the weights and the temperature, not the networks, logits or features.
        """
        self._check(logits, features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            terms = self.pairwise_terms(logits, features)
        logits = logits.detach() if frozen else logits
        steps = self.iterations if iterations is None else iterations
        log_q = mean_field(*self.potentials(logits, terms), iterations=steps, initial=-self._log_p(logits))
        return log_q.mT.contiguous().view(logits.shape)

    @torch.no_grad()
    def trace(self, logits: Tensor, features: Tensor, image: Tensor, *, iterations: int | None = None) -> Trace:
        """As `forward`, for one map ([1, ...] or without the batch dimension), as a `Trace` on the map's grid.

        The kernels of the trace are the relations. messages[t, r, :, p] is minus the expected energy, in nats, that p
        receives along the edges of r, after counting, weight and temperature; compatibility is -1 on the diagonal.
        unary is -log P_U / temperature, and q[0] is P_U. image [3, H, W], of any size, is stored for display.
        """
        if logits.ndim == 3:
            logits, features = logits[None], features[None]
        if len(logits) != 1:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected one map")
        self._check(logits, features)
        log_u = self._log_p(logits)
        graph = self._interactions(log_u, logits.shape[-2:], self.pairwise_terms(logits, features))

        def messages(q: Tensor) -> Tensor:
            return torch.cat([expected_energies(edges, scores, q[None]) for edges, scores in graph.values()])

        return record(
            -log_u[0] / self.log_temperature.exp(),
            logits.shape[-2:],
            messages,
            lambda received: -received.sum(0),
            self.iterations if iterations is None else iterations,
            initial=-log_u[0],
            image=(image[0] if image.ndim == 4 else image).cpu(),
            kernels=self.relations,
            weights=torch.ones(len(self.relations)).to(log_u).cpu(),
            compatibility=-torch.eye(self.num_classes).to(log_u).cpu(),
        )

    def pair_loss(
        self, logits: Tensor, features: Tensor, label: Tensor, *, class_weights: Tensor | None = None
    ) -> Tensor:
        """Mean over edges of -log P_V(y_p, y_q), label int64 [B, h, w]: trains the networks without inference.

        Edges with a void node are left out. No gradient reaches the logits, so that the unary network is not trained to
        correct the errors of edges. class_weights should be those of the unary's loss: see `pwlib.losses.pairwise_nll`.
        """
        self._check(logits, features)
        energy = torch.cat(list(self.pair_energies(logits.detach(), features).values()), dim=1)
        edges = torch.cat(list(self.edges(*label.shape[-2:]).values()))
        ends = (label.flatten(1)[:, index] for index in edges.unbind(1))
        return pairwise_nll(energy, *ends, class_weights=class_weights)

    def loss(self, logits: Tensor, features: Tensor, label: Tensor, likelihood: str = "piecewise", **options) -> Tensor:
        """One of `pwlib.graph.LIKELIHOODS`, with its options, of label int64 [B, h, w], 255 = void: a scalar.

        "piecewise" normalises every potential by itself; all others use the combined `potentials`.
        """
        one_of(LIKELIHOODS, likelihood=likelihood)
        self._check(logits, features)
        if likelihood == "piecewise":
            return cross_entropy(logits, label, **options) + self.pair_loss(logits, features, label, **options)
        unary, edges, pair = self.potentials(logits, self.pairwise_terms(logits, features))
        if likelihood == "mean_field":
            options = {"iterations": self.iterations, "initial": -self._log_p(logits), **options}
        return LIKELIHOODS[likelihood](unary, edges, pair, label.flatten(1), **options)

    def _interactions(self, log_u: Tensor, size: tuple[int, int], terms: dict[str, Tensor]) -> dict:
        """Edges [E_r, 2] of each relation, and their scores [B, E_r, K, K] in -E: log P_V less what `counting`
        subtracts, times weight * rho / temperature.
        """
        edges, result = self.edges(*size), {}
        rho = 1.0 if self.counting == "sum" else (size[0] * size[1] - 1) / max(1, sum(map(len, edges.values())))
        factors = rho * _NonNegative.apply(self.weight) / self.log_temperature.exp()
        for (relation, ends), factor in zip(edges.items(), factors, strict=True):
            score = terms[relation]
            if self.counting == "tree":
                score = score - self._both_nodes(log_u, ends)
            elif self.counting == "reparametrised":
                score = score - score.logsumexp(-1, keepdim=True) - score.logsumexp(-2, keepdim=True)
            result[relation] = ends, factor * score
        return result

    @staticmethod
    def _both_nodes(log_u: Tensor, edges: Tensor) -> Tensor:
        """log P_U(a) of the first plus log P_U(b) of the second node of every edge: [B, E, K, K]."""
        first, second = edges.unbind(1)
        return log_u[:, first, :, None] + log_u[:, second, None, :]

    def _log_p(self, logits: Tensor) -> Tensor:
        """log P_U of every node: [B, N, K]."""
        return torch.log_softmax(logits.to(self.weight).flatten(2).mT, dim=-1)

    def _check(self, logits: Tensor, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, {self.in_channels}, h, w]")
        if logits.shape != (len(features), self.num_classes, *features.shape[-2:]):
            expected = [len(features), self.num_classes, *features.shape[-2:]]
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected {expected}, the features' size")

    def extra_repr(self) -> str:
        boxes = "all" if self.neighbours is None else self.neighbours
        return f"{self.num_classes} labels, reach {self.reach}, {boxes} neighbours, counting as {self.counting}"
