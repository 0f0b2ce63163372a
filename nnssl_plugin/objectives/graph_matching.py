"""Second-order matching of graphs with a gradient (LVM-Med, sections 3.2.2 to 3.2.4).

Shapes: G pairs of graphs, a source and a target with n nodes each; Eₛ and Eₜ their edges; k neighbours of a node. A
matching is a permutation, the target node of every source node, (G, n) int64, or its indicator v, (G, n, n). Edges are
directed pairs (tail, head) of nodes, (G, E, 2) int64, distinct, and none joins a node to itself.

Nothing here reads the device on the host, but for a CPU; see :mod:`nnssl_plugin.objectives.quadratic_assignment`.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnssl_plugin.objectives.assignment import linear_assignment
from nnssl_plugin.objectives.quadratic_assignment import QuadraticProblem, quadratic_assignment

SOLVERS = ("fw", "lap")
CACHED = 2**22
"""Numbers of pair affinities that a CPU works on at a time: 64 graphs of 16 nodes."""
LEAST_NORM = 1e-6
"""Below, the difference of two nodes has no direction: its cosines are 0, without gradient."""


def match_graphs(
    node_affinity: Tensor,
    edge_affinity: Tensor,
    edges_source: Tensor,
    edges_target: Tensor,
    *,
    solver: str = "fw",
    start: Tensor | None = None,
) -> Tensor:
    """GM(c^v, c^e), the matching with the largest affinity (Eq. 4), for all graphs at once.

    Maximises Σ c^v_ia v_ia + Σ c^e_ia,jb v_ia v_jb, the second sum over pairs of a source edge (i, j) and a target edge
    (a, b). Computed in float32 at least, with autocast off. NaN and infinite affinities count as 0, so that the result
    is a permutation whatever comes in. Equal values are decided by the order of the nodes, often for the identity: who
    measures how often it is found permutes the nodes of one side.

    Args:
        node_affinity: c^v (G, n, n).
        edge_affinity: c^e (G, Eₛ, Eₜ).
        edges_source: (G, Eₛ, 2).
        edges_target: (G, Eₜ, 2).
        solver: ``"fw"`` is :func:`~nnssl_plugin.objectives.quadratic_assignment.quadratic_assignment`, a heuristic;
            ``"lap"`` leaves the edges out and is exact.
        start: (G, n) a matching to start from, besides the solver's own.

    Returns:
        (G, n) int64.

    Raises:
        ValueError: for an unknown solver or shapes that do not belong together.
    """
    _check(node_affinity, edge_affinity, edges_source, edges_target, solver)
    with torch.no_grad(), torch.autocast(node_affinity.device.type, enabled=False):
        node, edge = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in _full_precision(node_affinity, edge_affinity))
        if solver == "lap":
            return linear_assignment(node)
        graphs = [node, edge, edges_source, edges_target] + ([] if start is None else [start])
        parts = zip(*(x.split(_at_once(node)) for x in graphs), strict=True)
        return torch.cat([_second_order(*part) for part in parts])


def graph_matching(
    node_affinity: Tensor,
    edge_affinity: Tensor,
    edges_source: Tensor,
    edges_target: Tensor,
    *,
    strength: float,
    node_noise: Tensor | None = None,
    edge_noise: Tensor | None = None,
    solver: str = "fw",
) -> Tensor:
    """ṽ = GM(c^v + ε, c^e + ε′) with the gradient of implicit maximum likelihood (Algorithm 1, Eq. 6).

    ∂L/∂c^v = (ṽ − v_λ)/λ with v_λ = GM(c^v + ε − λ ∂L/∂ṽ, c^e + ε′), and for the edges the same with the indicators of
    matched pairs of edges. λ counts in units of the largest |∂L/∂ṽ| of the graph, which is 1 for
    :func:`hamming_loss`: so the gradient follows the scale of the loss, be it a weight, a mean or a gradient scaler.

    Where a bound proves v_λ, which then is the matching that ∂L/∂ṽ asks for, the second problem is not solved: on a CPU
    if it does for all graphs; on other devices the second problem is always solved, as looking would wait.

    Args:
        node_affinity: c^v (G, n, n), with gradient.
        edge_affinity: c^e (G, Eₛ, Eₜ), with gradient.
        edges_source: (G, Eₛ, 2).
        edges_target: (G, Eₜ, 2).
        strength: λ > 0, the paper's is 80.
        node_noise: ε, for every source node in the order of the graphs a row, (G·n, n); none if ``None``.
        edge_noise: ε′, for every source node the rows of its k edges, (G·n, k, n·k); none if ``None``. So noise is
            drawn, kept and cut into chunks with the samples. Fits edges in the order of
            :func:`nearest_neighbour_edges`.
        solver: see :func:`match_graphs`.

    Returns:
        ṽ (G, n, n) of 0 and 1, float32 for affinities in half precision; NaN, with its gradient, in graphs with an
        affinity that is not finite.

    Raises:
        ValueError: as :func:`match_graphs`, and for a strength that is not above 0 or noise of another size.
    """
    if not strength > 0:
        raise ValueError(f"strength must be above 0, not {strength}")
    _check(node_affinity, edge_affinity, edges_source, edges_target, solver)
    with torch.autocast(node_affinity.device.type, enabled=False):
        node, edge = _full_precision(node_affinity, edge_affinity)
        node, edge = _add(node, node_noise, "node"), _add(edge, edge_noise, "edge")
        return _GraphMatching.apply(node, edge, edges_source, edges_target, strength, solver)


def hamming_loss(matching: Tensor, truth: Tensor) -> Tensor:
    """L(v, v*) = v·(1 − v*) + v*·(1 − v) of every graph (Eq. 5); ∂L/∂v = 1 − 2 v*.

    Args:
        matching: v (G, n, n).
        truth: (G, n) int64, the true target node of every source node.

    Returns:
        (G,), twice the number of nodes matched wrongly: divided by 2n the error rate, 1 − 1/n by chance.
    """
    true = F.one_hot(truth, matching.shape[-1]).to(matching.dtype)
    return (matching * (1 - true) + true * (1 - matching)).sum((-2, -1))


def edge_matches(permutation: Tensor, edges_source: Tensor, edges_target: Tensor) -> Tensor:
    """v_ia v_jb: whether the source edge (i, j) is matched with the target edge (a, b), (G, Eₛ, Eₜ) bool."""
    carried = permutation.gather(1, edges_source.flatten(1)).view_as(edges_source)
    return (carried[:, :, None] == edges_target[:, None]).all(-1)


def matching_affinity(
    permutation: Tensor, node_affinity: Tensor, edge_affinity: Tensor, edges_source: Tensor, edges_target: Tensor
) -> Tensor:
    """The objective of Eq. 4, with the sign of an affinity, of a matching (G, n): (G,)."""
    nodes = node_affinity.gather(-1, permutation[..., None]).sum((-2, -1))
    return nodes + (edge_affinity * edge_matches(permutation, edges_source, edges_target)).sum((-2, -1))


def nearest_neighbour_edges(features: Tensor, neighbours: int) -> Tensor:
    """Edges from every node to its nearest others in the Euclidean distance (section 3.2.1).

    Args:
        features: (G, n, d).
        neighbours: k; n − 1 where the graph has no more.

    Returns:
        (G, n·k, 2) int64, without gradient: the k edges that leave node i are i·k … i·k + k − 1, the nearest first.
    """
    graphs, n = features.shape[:2]
    neighbours = min(neighbours, n - 1)
    features = _full_precision(features.detach())[0]
    with torch.autocast(features.device.type, enabled=False):
        distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        heads = distance.topk(neighbours, largest=False).indices
    tails = torch.arange(n, device=features.device)[:, None].expand_as(heads)
    return torch.stack((tails, heads), -1).reshape(graphs, n * neighbours, 2)


def edge_cosines(
    features_source: Tensor, edges_source: Tensor, features_target: Tensor, edges_target: Tensor
) -> Tensor:
    """c^e_ia,jb = cos(z_i − z_j, z_a − z_b) of every pair of edges (section 3.2.3).

    Args:
        features_source: (G, n, d).
        edges_source: (G, Eₛ, 2).
        features_target: (G, n, d).
        edges_target: (G, Eₜ, 2).

    Returns:
        (G, Eₛ, Eₜ) in [−1, 1], float32 at least; 0 without gradient where the two nodes of an edge coincide.
    """
    with torch.autocast(features_source.device.type, enabled=False):
        source, target = _full_precision(features_source, features_target)
        return _directions(source, edges_source) @ _directions(target, edges_target).mT


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) on the generator's device, float32: −log of exponential variables; its mean is 0.577."""
    exponential = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()


class _GraphMatching(torch.autograd.Function):
    """Algorithm 1; its inputs are perturbed already."""

    @staticmethod
    def forward(
        ctx: Any, node: Tensor, edge: Tensor, edges_source: Tensor, edges_target: Tensor, strength: float, solver: str
    ) -> Tensor:
        permutation = match_graphs(node, edge, edges_source, edges_target, solver=solver)
        ctx.save_for_backward(node, edge, edges_source, edges_target, permutation)
        ctx.strength, ctx.solver = strength, solver
        matching = F.one_hot(permutation, node.shape[-1]).to(node.dtype)
        return torch.where(_finite(node, edge), matching, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        node, edge, edges_source, edges_target, permutation = ctx.saved_tensors
        edges = edges_source, edges_target
        scale = gradient.abs().amax((-2, -1), keepdim=True)
        shift = ctx.strength * torch.where(scale > 0, gradient / scale, 0.0)
        if node.device.type == "cpu" and _shift_decides(node, edge, edges_source, shift).all():
            shifted = shift.argmin(-1)
        else:
            shifted = match_graphs(node - shift, edge, *edges, solver=ctx.solver, start=permutation)
        scale = torch.where(_finite(node, edge), scale / ctx.strength, torch.nan)
        n = node.shape[-1]
        of_nodes = scale * (F.one_hot(permutation, n) - F.one_hot(shifted, n))
        of_edges = None
        if ctx.needs_input_grad[1]:
            of_edges = scale * (edge_matches(permutation, *edges).int() - edge_matches(shifted, *edges).int())
        return of_nodes, of_edges, None, None, None, None


def _shift_decides(node: Tensor, edge: Tensor, edges_source: Tensor, shift: Tensor) -> Tensor:
    """Whether −``shift`` outweighs all affinities, (G,) bool: then its own best matching is that of the sum.

    That matching takes the least entry of every row. Another one that differs from it in the rows M loses at least the
    distance to the second least entry in each of them, and can gain at most the range of each of these rows of ``node``
    and, for each source edge that touches M, the range of its row of ``edge`` and 0 (an edge need not be matched).
    """
    n = node.shape[-1]
    least = shift.argmin(-1)
    is_permutation = (F.one_hot(least, n).sum(-2) == 1).all(-1)
    if n == 1:
        return is_permutation
    two = shift.topk(2, largest=False).values
    or_none = F.pad(edge, (0, 1))
    of_edges = or_none.amax(-1) - or_none.amin(-1)
    gain = node.amax(-1) - node.amin(-1)
    for end in (0, 1):
        gain = gain.scatter_add(1, edges_source[..., end], of_edges)
    return is_permutation & (two[..., 1] - two[..., 0] > gain).all(-1)


def _second_order(
    node: Tensor, edge: Tensor, edges_source: Tensor, edges_target: Tensor, start: Tensor | None = None
) -> Tensor:
    pair = _pair_affinity(edge, edges_source, edges_target, node.shape[-1])
    return quadratic_assignment(QuadraticProblem(node, pair), start)


def _at_once(node: Tensor) -> int:
    """Graphs that a CPU solves together, as many as its cache holds; other devices take all."""
    return max(1, CACHED // node.shape[-1] ** 4) if node.device.type == "cpu" else max(1, len(node))


def _pair_affinity(edge: Tensor, edges_source: Tensor, edges_target: Tensor, n: int) -> Tensor:
    """c^e + c^eᵀ as matrices over pairs of nodes, (G, n², n²), for :class:`QuadraticProblem`."""
    tails, heads = (edges_source[:, :, None, end] * n + edges_target[:, None, :, end] for end in (0, 1))
    pair = edge.new_zeros(len(edge), n**4)
    for first, second in ((tails, heads), (heads, tails)):
        pair.scatter_add_(1, (first * n**2 + second).flatten(1), edge.flatten(1))
    return pair.view(-1, n * n, n * n)


def _directions(features: Tensor, edges: Tensor) -> Tensor:
    """Unit vectors along the edges, (G, E, d)."""
    width = features.shape[-1]
    tails, heads = (features.gather(1, edges[..., end, None].expand(-1, -1, width)) for end in (0, 1))
    difference = tails - heads
    norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return torch.where(norm > LEAST_NORM, difference / norm.clamp(min=LEAST_NORM), 0.0)


def _add(affinity: Tensor, noise: Tensor | None, name: str) -> Tensor:
    if noise is None:
        return affinity
    if noise.numel() != affinity.numel():
        raise ValueError(f"{name}_noise {tuple(noise.shape)} does not fit {name}_affinity {tuple(affinity.shape)}")
    return affinity + noise.reshape(affinity.shape).to(affinity.dtype)


def _finite(node: Tensor, edge: Tensor) -> Tensor:
    """Graphs without NaN and infinity, (G, 1, 1)."""
    return (node.isfinite().flatten(1).all(1) & edge.isfinite().flatten(1).all(1))[:, None, None]


def _full_precision(*values: Tensor) -> tuple[Tensor, ...]:
    """The widest of their types, float32 at least."""
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    return tuple(value.to(dtype) for value in values)


def _check(node: Tensor, edge: Tensor, edges_source: Tensor, edges_target: Tensor, solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
    if node.ndim != 3 or node.shape[1] != node.shape[2]:
        raise ValueError(f"node_affinity must have the shape (G, n, n), not {tuple(node.shape)}")
    if edge.ndim != 3 or len(edge) != len(node):
        raise ValueError(f"edge_affinity must have the shape ({len(node)}, Eₛ, Eₜ), not {tuple(edge.shape)}")
    graphs, rows, columns = edge.shape
    expected = {"edges_source": (edges_source, rows), "edges_target": (edges_target, columns)}
    for name, (edges, count) in expected.items():
        if tuple(edges.shape) != (graphs, count, 2):
            raise ValueError(f"{name} must have the shape {(graphs, count, 2)}, not {tuple(edges.shape)}")
