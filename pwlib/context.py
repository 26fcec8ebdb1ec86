"""The paper's own CRF: contextual potentials from a network, on a coarse graph (Lin et al., CVPR 2016).

A node p for each cell of a feature map, an edge to each neighbour q in a range box, one kind of edge for each relation:

    P(y | x) = exp(sum_p z_p(y_p) + sum_r sum_{(p,q) in r} z_pq^r(y_p, y_q)) / Z

    surrounding   q in a box centred on p                 which labels occur near which
    above_below   q in a box that stands on p             which labels occur above which

A box is 0.4 a wide and high, a the map's short side. z_p are the unary network's scores. z_pq, K x K of them for an
ordered pair, are a network's of both ends' features, [f_p, f_q]: it knows what the two are, where a Gaussian kernel
knows how alike they are, and since the pair is ordered it can say "sky above sea" without "sea above sky". Its first
layer is linear in [f_p, f_q], W_1 f_p + W_2 f_q + b: both products are computed once for a node and added for an edge;
no pair is ever concatenated.

Learning is piecewise: each z_pq is normalised by itself, P_V = softmax over the K*K label pairs, and trained as a
classifier of pairs, without inference. Then all pieces are put together, and there is a catch: every piece holds
evidence about both its ends, and with dozens of edges a node their plain sum counts it dozens of times. `counting` says
how they are put together:

    sum     sum_p log P_U(y_p) + sum_e log P_V(y_p, y_q)                                      as the paper does
    tree    sum_p log P_U(y_p) + rho sum_e [log P_V(y_p, y_q) - log P_U(y_p) - log P_U(y_q)]

In "tree" an edge adds only what it knows beyond its ends. With rho = 1 that is the exact joint distribution of a tree
whose pieces are its marginals; elsewhere rho = (N - 1) / E, the average chance of an edge to be part of a random
spanning tree, so that all together count as one (tree-reweighted counting numbers, Wainwright, Jaakkola & Willsky 2005,
for all edges alike). For the difference to mean anything P_V must know its ends at least as well as P_U; `residual` has
it start there: z_pq(a, b) = log P_U(a) + log P_U(b) + the network's score, which is then all that "tree" adds up.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn

from pwlib.likelihoods import LIKELIHOODS, mean_field, messages
from pwlib.losses import pairwise_nll
from pwlib.trace import Trace

RELATIONS = ("surrounding", "above_below")
COUNTING = ("tree", "sum")

# ---------------------------------------------------------------------------------------------------------------- graph


def box_offsets(relation: str, short_side: int, *, reach: float = 0.4, neighbours: int | None = None) -> np.ndarray:
    """Where a node's neighbours lie: int64 [D, 2], (rows down, columns right), for a map of `short_side` cells.

    The range box is a square of side reach * short_side, "surrounding" centred on the node, "above_below" with the node
    in the middle of its lower edge; a cell belongs to it if its centre does, the node itself never. It reaches one cell
    at least. neighbours: None for all of them, or 24 (any odd square less 1): where the box holds more, a regular grid
    of 5x5 over it, without its centre (and fewer where the box is too flat for five).
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation is {relation!r}; expected one of {', '.join(RELATIONS)}")
    if not reach > 0:
        raise ValueError(f"reach is {reach}; expected a positive share of the map's short side")
    side = reach * short_side
    half = max(1, int(side / 2 + 1e-9))  # 1e-9: 0.4 * 5 is to be 2
    top, bottom = (-half, half) if relation == "surrounding" else (-max(1, int(side + 1e-9)), -1)
    rows, columns = np.arange(top, bottom + 1), np.arange(-half, half + 1)
    box = _pairs(rows, columns)
    if neighbours is None or len(box) <= neighbours:
        return box
    count = isqrt(neighbours + 1)
    if count**2 != neighbours + 1 or count % 2 == 0:
        raise ValueError(f"neighbours is {neighbours}; expected an odd square less 1 (8, 24, 48), or None for all")
    rows, columns = (np.rint(np.linspace(axis[0], axis[-1], count)).astype(int) for axis in (rows, columns))
    centre = (rows[count // 2], columns[count // 2])
    grid = _pairs(np.unique(rows), np.unique(columns))
    return grid[(grid != centre).any(1)]


def _pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Every (row, column), less (0, 0), where a node itself is."""
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2).astype(np.int64)
    return grid[grid.any(1)]


@lru_cache(maxsize=64)
def box_edges(relation: str, height: int, width: int, *, reach: float = 0.4, neighbours: int | None = None) -> Tensor:
    """The edges (p, q) of a height x width map, q in p's box: int64 [E, 2], row-major nodes, ordered by p.

    Boxes end at the map's border. "surrounding" has every pair twice, as (p, q) and (q, p), as in the paper: two pieces
    that differ, because the network reads an order.
    """
    offsets = torch.from_numpy(box_offsets(relation, min(height, width), reach=reach, neighbours=neighbours))
    node = torch.arange(height * width)[:, None]
    row, column = node // width + offsets[:, 0], node % width + offsets[:, 1]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.stack([node.expand_as(row)[inside], (row * width + column)[inside]], 1)


# ------------------------------------------------------------------------------------------------------------- networks


class PairwiseNet(nn.Module):
    """Features of ordered pairs -> K x K scores: relu(W_1 f_p + W_2 f_q + b), then one more layer."""

    def __init__(self, channels: int, num_classes: int, hidden: int):
        super().__init__()
        self.num_classes = num_classes
        self.of_first = nn.Linear(channels, hidden)
        self.of_second = nn.Linear(channels, hidden, bias=False)
        self.scores = nn.Linear(hidden, num_classes**2)
        for layer in (self.of_first, self.of_second):  # as one layer with 2 * channels inputs, after He et al. 2015
            nn.init.normal_(layer.weight, std=channels**-0.5)
        nn.init.normal_(self.scores.weight, std=0.01)  # near-uniform first pieces: context starts by saying nothing
        nn.init.zeros_(self.of_first.bias), nn.init.zeros_(self.scores.bias)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        """features [B, N, C], edges [E, 2] -> scores [B, E, K, K], the first end's label first."""
        first, second = edges.unbind(1)
        hidden = torch.relu(self.of_first(features)[:, first] + self.of_second(features)[:, second])
        return self.scores(hidden).unflatten(-1, (self.num_classes, self.num_classes))


# ------------------------------------------------------------------------------------------------------------------ CRF


class ContextualCRF(nn.Module):
    """A CRF over the cells of a feature map; `context(logits, features) -> log_q`, all on the map.

    Args:
        num_classes: K, at least 2.
        in_channels: C, of the features.
        hidden: width of the pairwise networks.
        relations: some of "surrounding", "above_below".
        reach: side of the range box, as a share of the map's short side.
        neighbours: None for all in the box; 24 for a regular sample, as in the paper's journal version.
        iterations: of mean field, where a call names none; 3 in the paper.
        counting: "tree" or "sum", see above.
        residual: whether the networks' scores are added to log P_U of both ends; False in the paper.
        temperature: what the combined log-potential is divided by; over 1 makes marginals less certain.

    Learnable: the pairwise networks, by `loss` or `pair_loss`; `log_weight` [relations], logarithms of a factor on each
    relation's edges, and `log_temperature`. Of these two the pieces say nothing: only inference's result does.
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
        temperature: float = 1.0,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a CRF needs at least 2 labels to choose between")
        if iterations < 0:
            raise ValueError(f"iterations is {iterations}; expected 0 or more")
        if counting not in COUNTING:
            raise ValueError(f"counting is {counting!r}; expected one of {', '.join(COUNTING)}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        if not relations or len(set(relations)) != len(relations):
            raise ValueError(f"relations are {relations}; expected one or more of {', '.join(RELATIONS)}, each once")
        for relation in relations:
            box_offsets(relation, 100, reach=reach, neighbours=neighbours)  # complains where it should
        self.num_classes, self.in_channels = num_classes, in_channels
        self.relations, self.reach, self.neighbours = tuple(relations), reach, neighbours
        self.iterations, self.counting, self.residual = iterations, counting, residual
        self.networks = nn.ModuleDict({r: PairwiseNet(in_channels, num_classes, hidden) for r in relations})
        self.log_weight = nn.Parameter(torch.zeros(len(relations)))
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())

    def edges(self, height: int, width: int) -> dict[str, Tensor]:
        """Each relation's edges, int64 [E_r, 2]."""
        options = {"reach": self.reach, "neighbours": self.neighbours}
        return {r: box_edges(r, height, width, **options).to(self.log_weight.device) for r in self.relations}

    def pair_scores(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Each relation's z_pq, of logits [B, K, h, w] and features [B, C, h, w] of one map: [B, E_r, K, K]."""
        rows, result = features.to(self.log_weight).flatten(2).transpose(1, 2), {}
        log_u = self._log_p(logits)
        for relation, edges in self.edges(*features.shape[-2:]).items():
            scores = self.networks[relation](rows, edges)
            if self.residual:
                first, second = edges.unbind(1)
                scores = scores + log_u[:, first, :, None] + log_u[:, second, None, :]
            result[relation] = scores
        return result

    def pieces(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Each relation's log P_V: `pair_scores`, a softmax over the K*K of every edge."""
        scores = self.pair_scores(logits, features)
        return {r: torch.log_softmax(z.flatten(2), dim=-1).view_as(z) for r, z in scores.items()}

    def potentials(self, logits: Tensor, pieces: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """All pieces put together, for inference: unary [B, N, K], edges [E, 2], pair [B, E, K, K].

        Under "tree" log P_U is taken from the nodes, once for each edge, and not from every pair: the same sum.
        """
        height, width = logits.shape[-2:]
        unary = self._log_p(logits)
        graph = self.edges(height, width)
        edges = torch.cat([graph[r] for r in self.relations])
        rho = (height * width - 1) / max(1, len(edges)) if self.counting == "tree" else 1.0
        strength = torch.cat(
            [w.expand(len(graph[r])) for r, w in zip(self.relations, self.log_weight.exp(), strict=True)]
        )
        pair = (rho * strength)[:, None, None] * torch.cat([pieces[r] for r in self.relations], dim=1)
        if self.counting == "tree":
            both = strength.repeat_interleave(2)
            degree = torch.zeros(height * width).to(both).index_add(0, edges.flatten(), both)
            unary = (1 - rho * degree)[:, None] * unary
        heat = self.log_temperature.exp()
        return unary / heat, edges, pair / heat

    def forward(self, logits: Tensor, features: Tensor, *, iterations: int | None = None, frozen: bool = False):
        """log_q [B, K, h, w], log-marginals, of logits [B, K, h, w] and features [B, C, h, w] of one map.

        frozen: gradients reach the weights and the temperature only, not the pieces.
        """
        self._check(logits, features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            pieces = self.pieces(logits, features)
        logits = logits.detach() if frozen else logits
        steps = self.iterations if iterations is None else iterations
        log_q = mean_field(*self.potentials(logits, pieces), iterations=steps, start=self._log_p(logits))
        return log_q.transpose(1, 2).contiguous().view(logits.shape)

    @torch.no_grad()
    def trace(self, logits: Tensor, features: Tensor, image: Tensor, *, iterations: int | None = None) -> Trace:
        """As `forward`, for one map ([1, ...] or without the batch dimension), keeping everything, on the map's grid.

        A kernel of the trace is a relation: messages[t, r, :, p] is what its edges at p add to p's scores, in nats,
        after weight, rho and temperature; "tree" with log P_U of both ends taken off each edge, so that a message is
        what edges know beyond their ends. unary is -log P_U over the temperature, compatibility -1 on the diagonal: the
        pairwise energy is minus the sum of the messages. q[0] is P_U. free_energy is KL(Q || P) - log Z, as
        `DenseCRF.trace` has it. image [3, H, W], of any size, is kept to be shown beside the map.
        """
        if logits.ndim == 3:
            logits, features = logits[None], features[None]
        if len(logits) != 1:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; a trace follows one image")
        self._check(logits, features)
        image = image[0] if image.ndim == 4 else image
        height, width = logits.shape[-2:]
        log_u, graph = self._log_p(logits), self.edges(height, width)
        heat, pieces = self.log_temperature.exp(), self.pieces(logits, features)
        edges = sum(len(one) for one in graph.values())
        rho = (height * width - 1) / max(1, edges) if self.counting == "tree" else 1.0
        for factor, (relation, ends) in zip(self.log_weight.exp(), graph.items(), strict=True):
            if self.counting == "tree":
                first, second = ends.unbind(1)
                pieces[relation] = pieces[relation] - log_u[:, first, :, None] - log_u[:, second, None, :]
            pieces[relation] = pieces[relation] * (rho * factor / heat)
        steps = self.iterations if iterations is None else iterations
        sent, marginals, free_energy = [], [log_u.exp()], []
        for step in range(steps + 1):
            q = marginals[-1]
            sent.append(torch.cat([messages(graph[r], pieces[r], q) for r in self.relations]))
            score = log_u / heat + sent[-1].sum(0)
            expected = (q * (score + log_u / heat) / 2).sum(dtype=torch.float64)  # each edge's share is heard twice
            free_energy.append(-expected - torch.special.entr(q).sum(dtype=torch.float64))
            if step < steps:
                marginals.append(torch.softmax(score, dim=-1))

        def planes(rows: Tensor) -> Tensor:
            return rows.transpose(-1, -2).unflatten(-1, (height, width)).cpu()

        sent = torch.stack(sent)[:steps]
        return Trace(
            image=image.cpu(),
            unary=planes(-log_u[0] / heat),
            kernels=self.relations,
            weights=torch.ones(len(self.relations)).to(log_u).cpu(),
            compatibility=-torch.eye(self.num_classes).to(log_u).cpu(),
            messages=planes(sent),
            pairwise=planes(-sent.sum(1)),
            q=planes(torch.cat(marginals)),
            free_energy=torch.stack(free_energy).cpu(),
        )

    def pair_loss(
        self, logits: Tensor, features: Tensor, label: Tensor, *, class_weights: Tensor | None = None
    ) -> Tensor:
        """Mean over edges of -log P_V(y_p, y_q), label int64 [B, h, w]: learning the networks without inference.

        Edges with a void end take no part, and no gradient reaches the logits: an edge's error is not the unary's to
        mend. class_weights are to be those the unary was trained with: see `pwlib.losses.pairwise_nll`.
        """
        self._check(logits, features)
        scores = torch.cat(list(self.pair_scores(logits.detach(), features).values()), dim=1)
        edges = torch.cat(list(self.edges(*label.shape[-2:]).values()))
        ends = (label.flatten(1)[:, index] for index in edges.unbind(1))
        return pairwise_nll(-scores, *ends, class_weights=class_weights)

    def loss(self, logits: Tensor, features: Tensor, label: Tensor, likelihood: str = "piecewise", **options) -> Tensor:
        """One of `pwlib.likelihoods.LIKELIHOODS` of label [B, h, w], 255 = void, with its options: a scalar.

        "piecewise" looks at each piece by itself, all others at how the pieces are put together.
        """
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; expected one of {', '.join(LIKELIHOODS)}")
        self._check(logits, features)
        if likelihood == "piecewise":
            unary, edges = self._log_p(logits), torch.cat(list(self.edges(*logits.shape[-2:]).values()))
            pair = torch.cat(list(self.pair_scores(logits.detach(), features).values()), dim=1)
        else:
            unary, edges, pair = self.potentials(logits, self.pieces(logits, features))
        if likelihood == "mean_field":
            options = {"iterations": self.iterations, "start": self._log_p(logits), **options}
        return LIKELIHOODS[likelihood](unary, edges, pair, label.flatten(1), **options)

    def _log_p(self, logits: Tensor) -> Tensor:
        """log P_U of every node: [B, N, K]."""
        return torch.log_softmax(logits.to(self.log_weight).flatten(2).transpose(1, 2), dim=-1)

    def _check(self, logits: Tensor, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected [B, {self.in_channels}, h, w]")
        if logits.shape != (len(features), self.num_classes, *features.shape[-2:]):
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}; expected "
                f"{[len(features), self.num_classes, *features.shape[-2:]]}, to lie over the features"
            )

    def extra_repr(self) -> str:
        boxes = "all" if self.neighbours is None else self.neighbours
        return f"{self.num_classes} labels, reach {self.reach}, {boxes} neighbours, counting as {self.counting}"
