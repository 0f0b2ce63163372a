"""Quadratic assignment of many small problems at once, by Frank–Wolfe's algorithm and searches by swaps.

Maximised over permutations p of n rows: Σ_i node[i, p(i)] + ½ Σ_ij pair[(i, p(i)), (j, p(j))]. The problem is NP-hard;
what comes back is the best that local searches from several starts came by.

Shapes: G problems, S permutations of each, n rows and columns. All loops have fixed lengths and read nothing on the
host, but for a CPU, where they end once nothing changes and where problems that are decided leave. On CUDA with Triton
the searches are one kernel each. Everything is deterministic. ``pair`` holds n⁴ numbers per problem, 0.26 MB for n = 16
in float32: meant for n up to about 40.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_plugin.objectives.assignment import has_kernels, linear_assignment

FRANK_WOLFE_STEPS = 5
ASCENT_STEPS = 40
"""Greatest number of swaps of the ascent; with n = 16 it has ended after about 20."""
TABU_STEPS = 32
"""Swaps of the search that goes on where the starts ended in different permutations."""


class QuadraticProblem(NamedTuple):
    """G problems of n rows and columns."""

    node: Tensor
    """(G, n, n)."""
    pair: Tensor
    """(G, n², n²), symmetric; entries (i·n + a, j·n + b) with i = j or a = b are 0."""

    def products(self, permutations: Tensor) -> Tensor:
        """``pair`` times the permutation matrices: (G, S, n) → (G, S, n, n), the sum of n rows for each."""
        graphs, starts, n = permutations.shape
        rows = _graph_of(permutations)[:, None] * n**2 + _places(permutations.flatten(0, 1))
        return F.embedding_bag(rows, self.pair.reshape(-1, n * n), mode="sum").view(graphs, starts, n, n)

    def value(self, permutations: Tensor) -> Tensor:
        """The objective: (G, S, n) → (G, S)."""
        gradient = self.node[:, None] + self.products(permutations) / 2
        return gradient.gather(-1, permutations[..., None]).sum((-2, -1))

    def best(self, permutations: Tensor) -> Tensor:
        """The best permutation of each problem, the first of equals: (G, S, n) → (G, n)."""
        first = self.value(permutations).argmax(1)
        return permutations.gather(1, first[:, None, None].expand(-1, 1, permutations.shape[-1])).squeeze(1)


def quadratic_assignment(problem: QuadraticProblem, start: Tensor | None = None) -> Tensor:
    """A permutation whose value is not below that of the linear assignment, nor of ``start``.

    Starts are the linear assignment of ``node`` and the end of Frank–Wolfe's algorithm from the uniform matrix. Each
    ascends by the best swap; where they end in different permutations, a tabu search goes on from each.

    Args:
        problem: finite numbers.
        start: (G, n), one more start.

    Returns:
        (G, n) int64.
    """
    graphs, n = problem.node.shape[:2]
    if graphs == 0 or n < 2:
        return torch.zeros(graphs, n, dtype=torch.long, device=problem.node.device)
    starts = [linear_assignment(problem.node), linear_assignment(frank_wolfe(problem, FRANK_WOLFE_STEPS))]
    starts += [] if start is None else [start]
    ends = ascend(problem, torch.stack(starts, 1), ASCENT_STEPS)
    undecided = _undecided(ends[:, :2])
    remaining = QuadraticProblem(problem.node[undecided], problem.pair[undecided])
    ends[undecided] = tabu_search(remaining, ends[undecided], TABU_STEPS)
    return problem.best(ends)


def frank_wolfe(problem: QuadraticProblem, steps: int) -> Tensor:
    """A doubly stochastic matrix by Frank–Wolfe's algorithm with exact line search, from the uniform one.

    The objective is linearised, the best permutation matrix of the linear one is the direction, and the step is the
    best one on the way there, in closed form as the objective is quadratic (Vogelstein et al., "Fast approximate
    quadratic programming for graph matching", PLOS ONE 10(4), 2015). pair · v moves along with v.

    Returns:
        (G, n, n).
    """
    n = problem.node.shape[-1]
    v = torch.full_like(problem.node, 1 / n)
    product = (problem.pair.sum(-1) / n).view_as(v)
    for _ in range(steps):
        gradient = problem.node + product
        towards = linear_assignment(gradient)
        direction = F.one_hot(towards, n).to(v.dtype) - v
        change = problem.products(towards[:, None]).squeeze(1) - product
        slope = (gradient * direction).sum((-2, -1), keepdim=True)
        curvature = (change * direction).sum((-2, -1), keepdim=True)
        step = torch.where(curvature < 0, (slope / -curvature.clamp(max=-_tiny(v))).clamp(0, 1), 1.0)
        moves = slope > _rounding(gradient)[:, None, None]
        step = torch.where(moves, step, 0.0)
        v, product = v + step * direction, product + step * change
        if v.device.type == "cpu" and not moves.any():
            break
    return v


def ascend(problem: QuadraticProblem, permutations: Tensor, steps: int) -> Tensor:
    """Swaps the two rows that gain most, until none gains: (G, S, n) → (G, S, n), after at most ``steps`` swaps."""
    walk = _Walk(problem, permutations)
    if has_kernels(problem.pair):
        return _with_kernel(walk, problem, permutations, steps, tabu=False)
    for _ in range(steps):
        gains, places = walk.swaps()
        gain, chosen = gains.max(1)
        moves = gain > walk.rounding
        if permutations.device.type == "cpu" and not moves.any():
            break
        walk.swap(_chosen(places, chosen), moves)
    return walk.permutations.view_as(permutations)


def tabu_search(problem: QuadraticProblem, permutations: Tensor, steps: int) -> Tensor:
    """The best permutation on a walk that always takes the best swap, up or down, and does not turn back.

    A swap that brings both rows to columns that they left within the last n/2 to n steps is forbidden, unless it leads
    above the best so far (Taillard, "Robust taboo search for the quadratic assignment problem", Parallel Computing 17,
    1991, with a fixed sequence instead of random numbers).

    Args:
        problem: G problems.
        permutations: (G, S, n), where the walks start.
        steps: swaps.

    Returns:
        (G, S, n), no worse than ``permutations``.
    """
    if len(permutations) == 0:
        return permutations
    walk, n = _Walk(problem, permutations), permutations.shape[-1]
    if has_kernels(problem.pair):
        return _with_kernel(walk, problem, permutations, steps, tabu=True)
    best, below = walk.permutations, walk.rounding.new_zeros(len(walk.rounding))  # how far the walk is below its best
    until = torch.zeros(len(best), n * n, dtype=torch.int32, device=best.device)
    always = torch.ones_like(below, dtype=torch.bool)
    for step in range(steps):
        gains, places = walk.swaps()
        forbidden = until.gather(1, places[:, 2:].flatten(1)).unflatten(1, (2, -1)).amin(1) > step
        no_record = gains <= (below + walk.rounding)[:, None]
        chosen = gains.masked_fill(forbidden & no_record, -torch.inf).argmax(1)
        gain = gains.gather(1, chosen[:, None]).squeeze(1)
        places = _chosen(places, chosen)
        walk.swap(places, always)
        until.scatter_(1, places[:, :2], step + n // 2 + 7 * step % (n // 2 + 1))
        below = below - gain
        best = torch.where((below < 0)[:, None], walk.permutations, best)
        below = below.clamp(min=0)
    return best.view_as(permutations)


class _Walk:
    """P = G · S permutations that change by swaps, with the gradient of the objective at each kept up to date.

    A place is an index into the flat n × n matrix of a permutation. A swap of rows i < j has four: those of i and j
    before it and those after it. There are W = n (n − 1) / 2 swaps.
    """

    def __init__(self, problem: QuadraticProblem, permutations: Tensor) -> None:
        n = permutations.shape[-1]
        self.permutations = permutations.flatten(0, 1)  # (P, n)
        gradient = problem.node[:, None] + problem.products(permutations)
        self.gradient = gradient.view(-1, n * n)
        self.rounding = _rounding(self.gradient)
        self.pair = problem.pair.reshape(-1, n * n)
        self.offset = _graph_of(permutations)[:, None] * n**2
        self.rows = torch.triu_indices(n, n, 1, device=permutations.device)  # (2, W)
        self.signs = torch.arange(4, device=permutations.device).gt(1).to(gradient.dtype) * 2 - 1  # −1, −1, 1, 1

    def swaps(self) -> tuple[Tensor, Tensor]:
        """What each swap would add to the objective (P, W), and its places (P, 4, W).

        With D the change of the permutation matrix, ⟨gradient, D⟩ + ½ ⟨D, pair · D⟩; pairs of one row or column are 0.
        """
        n = self.permutations.shape[-1]
        columns = self.permutations[:, self.rows]
        places = torch.cat((columns, columns.flip(1)), 1).unflatten(1, (2, 2)) + self.rows * n
        linear = self.gradient.gather(1, places.flatten(1)).view_as(places).sum(2)
        pairs = (places[:, :, 0] + self.offset[:, :, None]) * n**2 + places[:, :, 1]
        quadratic = self.pair.view(-1).index_select(0, pairs.flatten()).view_as(pairs).sum(1)
        return linear[:, 1] - linear[:, 0] + quadratic, places.flatten(1, 2)

    def swap(self, places: Tensor, moves: Tensor) -> None:
        """Makes one swap, given by its places (P, 4), where ``moves`` (P,)."""
        n = self.permutations.shape[-1]
        weights = self.signs * moves[:, None]
        change = F.embedding_bag(places + self.offset, self.pair, mode="sum", per_sample_weights=weights)
        self.gradient = self.gradient + change
        taken = torch.where(moves[:, None], places[:, 2:], places[:, :2])
        self.permutations = self.permutations.scatter(1, taken // n, taken % n)


def _with_kernel(walk: _Walk, problem: QuadraticProblem, permutations: Tensor, steps: int, *, tabu: bool) -> Tensor:
    from nnssl_plugin.objectives import quadratic_assignment_kernels  # needs Triton

    given = walk.gradient, problem.pair, permutations, walk.rounding, walk.rows
    return quadratic_assignment_kernels.search(*given, steps=steps, tabu=tabu).view_as(permutations)


def _chosen(places: Tensor, chosen: Tensor) -> Tensor:
    """(P, 4, W) and (P,) → (P, 4)."""
    return places.gather(2, chosen[:, None, None].expand(-1, 4, 1)).squeeze(2)


def _undecided(ends: Tensor) -> Tensor | slice:
    """Problems whose starts ended in different permutations; all, where looking would wait for the device."""
    if ends.device.type != "cpu":
        return slice(None)
    return (ends != ends[:, :1]).flatten(1).any(1)


def _places(permutations: Tensor) -> Tensor:
    """Index into the flat n × n matrix for every row, (…, n)."""
    n = permutations.shape[-1]
    return torch.arange(n, device=permutations.device) * n + permutations


def _graph_of(permutations: Tensor) -> Tensor:
    """The problem of each permutation: (G, S, n) → (G · S,)."""
    return torch.arange(len(permutations), device=permutations.device).repeat_interleave(permutations.shape[1])


def _rounding(gradient: Tensor) -> Tensor:
    """What a difference of values must exceed to be one, for each of P gradients: (P,)."""
    return 16 * torch.finfo(gradient.dtype).eps * gradient.flatten(1).abs().amax(1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
