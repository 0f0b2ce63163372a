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
LARGE = 1e30
"""Taken from what a forbidden swap gains."""
TABU_STEPS = 24
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
    if has_kernels(problem.pair):
        return _searched_by_kernel(problem, permutations, steps, tabu=False)
    walk = _Walk(problem, permutations)
    for _ in range(steps):
        gain, chosen = walk.gains().flatten(1).max(1)
        moves = gain > walk.rounding
        if permutations.device.type == "cpu" and not moves.any():
            break
        walk.swap(torch.where(moves, chosen, 0))
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
    if has_kernels(problem.pair):
        return _searched_by_kernel(problem, permutations, steps, tabu=True)
    walk, n = _Walk(problem, permutations), permutations.shape[-1]
    best, below = walk.permutations.clone(), torch.zeros_like(walk.rounding)  # how far the walk is below its best
    until = torch.zeros_like(walk.gradient, dtype=torch.int32)
    for step in range(steps):
        gains, left = walk.gains(), walk.under_swaps(until)
        forbidden = torch.minimum(left, left.mT) > step
        no_record = gains <= (below + walk.rounding)[:, None, None]
        allowed = torch.where(forbidden & no_record, gains - LARGE, gains)
        chosen = allowed.flatten(1).argmax(1)  # where all are forbidden the first one
        gain = gains.flatten(1).gather(1, chosen[:, None]).squeeze(1)
        before = walk.swap(chosen)
        until.flatten(1).scatter_(1, before, step + n // 2 + 7 * step % (n // 2 + 1))
        below = below - gain
        best = torch.where((below < 0)[:, None], walk.permutations, best)
        below = below.clamp(min=0)
    return best.view_as(permutations)


class _Walk:
    """P = G · S permutations that change by swaps, with what each swap would gain kept up to date.

    A place is an index into the flat n × n matrix of a permutation. A swap i · n + j is that of the rows i and j, so
    that every swap has two numbers, and that of a row with itself changes nothing.
    """

    def __init__(self, problem: QuadraticProblem, permutations: Tensor) -> None:
        n, device = permutations.shape[-1], permutations.device
        self.permutations = permutations.flatten(0, 1).clone()  # (P, n)
        self.gradient = _gradient(problem, permutations)  # (P, n, n)
        self.rounding = _rounding(self.gradient)
        self.pair = problem.pair.reshape(-1, n * n)
        self.offset = _graph_of(permutations)[:, None] * n**2
        row = torch.arange(n, device=device)
        self.first_place = row * n
        self.rows_of = torch.cartesian_prod(row, row)  # (n², 2)
        self.signs = self.pair.new_tensor([-1.0, -1.0, 1.0, 1.0]).expand(len(self.offset), 4)
        every = row.expand_as(self.permutations)
        self.quadratic = self._quadratic(every, every * n + self.permutations + self.offset)  # (P, n, n)

    def gains(self) -> Tensor:
        """What each swap would add to the objective, (P, n, n); −∞ for a row with itself.

        With D the change of the permutation matrix, ⟨gradient, D⟩ + ½ ⟨D, pair · D⟩; pairs of one row or column are 0.
        """
        taken = self.under_swaps(self.gradient)
        now = taken.diagonal(dim1=1, dim2=2)
        return (taken + taken.mT) - (now[:, :, None] + now[:, None]) + self.quadratic

    def under_swaps(self, values: Tensor) -> Tensor:
        """Of values (P, n, n) at all places those that row i has in the column of row j: (P, n, n)."""
        return values.gather(2, self.permutations[:, None].expand_as(values))

    def swap(self, swaps: Tensor) -> Tensor:
        """Makes one swap (P,); the places of both rows before it, (P, 2)."""
        rows = self.rows_of[swaps]
        columns = self.permutations.gather(1, rows)
        swapped, first = columns.flip(1), self.first_place[rows]
        before, after = first + columns, first + swapped
        places = torch.cat((before, after), 1) + self.offset
        change = F.embedding_bag(places, self.pair, mode="sum", per_sample_weights=self.signs)
        self.gradient += change.view_as(self.gradient)
        self.permutations.scatter_(1, rows, swapped)
        quadratic = self._quadratic(rows, places[:, 2:])
        self.quadratic.scatter_(1, rows[:, :, None].expand_as(quadratic), quadratic)
        self.quadratic.scatter_(2, rows[:, None].expand_as(quadratic.mT), quadratic.mT)
        return before

    def _quadratic(self, rows: Tensor, places: Tensor) -> Tensor:
        """½ ⟨D, pair · D⟩ of the swaps of some rows (P, R) with all rows, (P, R, n); ``places`` (P, R) of these rows,
        as rows of ``self.pair``."""
        square, columns = self.pair.shape[1], self.permutations
        own = columns.gather(1, rows)
        now = (places * square)[:, :, None] + (self.first_place + columns)[:, None]
        then = ((places - own) * square + own)[:, :, None] + (columns * square + self.first_place)[:, None]
        found = self.pair.view(-1).index_select(0, torch.stack((now, then)).flatten())
        return found.view(2, *now.shape).sum(0).scatter_(2, rows[:, :, None], -torch.inf)


def _searched_by_kernel(problem: QuadraticProblem, permutations: Tensor, steps: int, *, tabu: bool) -> Tensor:
    from nnssl_plugin.objectives import quadratic_assignment_kernels  # needs Triton

    gradient = _gradient(problem, permutations).flatten(1)
    given = gradient, problem.pair, permutations, _rounding(gradient)
    return quadratic_assignment_kernels.search(*given, steps=steps, tabu=tabu).view_as(permutations)


def _gradient(problem: QuadraticProblem, permutations: Tensor) -> Tensor:
    """Of the objective at each permutation: (G, S, n) → (P, n, n)."""
    return (problem.node[:, None] + problem.products(permutations)).flatten(0, 1)


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
