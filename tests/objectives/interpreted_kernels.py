"""Triton's kernels beside PyTorch's operators on the CPU: ``TRITON_INTERPRET=1 python interpreted_kernels.py``.

Prints the number of cases.
"""

import torch

from nnssl_plugin.objectives import assignment, assignment_kernels, quadratic_assignment
from nnssl_plugin.objectives.quadratic_assignment import QuadraticProblem


def assign(n: int, levels: int | None) -> None:
    """Random numbers, or whole ones with ties."""
    generator = torch.Generator().manual_seed(n)
    affinity = torch.randn(3, n, n, generator=generator)
    if levels is not None:
        affinity = torch.randint(0, levels, (3, n, n), generator=generator).float()
    mine, other = (module.shortest_augmenting_paths(affinity) for module in (assignment_kernels, assignment))
    assert mine.dtype == torch.int64 and torch.equal(mine.sort(-1).values, torch.arange(n).expand(3, n))
    torch.testing.assert_close(*(affinity.gather(-1, p[..., None]).sum((-2, -1)) for p in (mine, other)))
    assert levels is not None or torch.equal(mine, other)


def search(n: int, starts: int, *, tabu: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    pair = torch.randn(2, n, n, n, n, generator=generator)
    same = torch.eye(n, dtype=torch.bool)
    pair[:, same[:, None, :, None] | same[None, :, None, :]] = 0
    pair = pair.flatten(3, 4).flatten(1, 2)
    problem = QuadraticProblem(torch.randn(2, n, n, generator=generator), pair + pair.mT)
    permutations = torch.rand(2, starts, n, generator=generator).argsort(-1)
    before = permutations.clone()
    found = quadratic_assignment._searched_by_kernel(problem, permutations, 12, tabu=tabu)
    operators = quadratic_assignment.tabu_search if tabu else quadratic_assignment.ascend
    assert torch.equal(found, operators(problem, permutations, 12)) and torch.equal(permutations, before)


if __name__ == "__main__":
    cases = [(n, levels) for n in (1, 2, 3, 6, 11) for levels in (None, 2)]
    for case in cases:
        assign(*case)
    searches = [(2, 1), (3, 2), (5, 2)]
    for case in searches:
        search(*case, tabu=True)
        search(*case, tabu=False)
    print(len(cases) + 2 * len(searches), "cases")
