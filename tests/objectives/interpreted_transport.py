"""The kernel of the transport solver beside its loop: ``TRITON_INTERPRET=1 python interpreted_transport.py``.

Prints the number of cases.
"""

from itertools import product

import torch

from nnssl_plugin.objectives.partial_transport import _bregman_projections
from nnssl_plugin.objectives.partial_transport_kernels import bregman_projections

SHAPES = [(1, 1), (2, 2), (4, 4), (5, 5), (3, 7), (2, 3, 9, 2), (2, 17, 33), (1, 9), (2, 64, 64)]
SETTINGS = [(0.9, 0.05, 40), (1.0, 0.1, 23), (0.5, 1.0, 100), (0.9, 1e-3, 60), (1.0, 1e-4, 11), (0.3, 0.01, 1)]
"""Mass, ε and iterations: at an ε of 1e-3 and less the plan underflows."""


def compare(shape: tuple[int, ...], mass: float, epsilon: float, iterations: int) -> None:
    cost = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = {"mass": mass, "iterations": iterations, "tolerance": 1e-13}
    mine = bregman_projections(cost / -epsilon, **solver)
    other = _bregman_projections(cost / -epsilon, **solver)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-10)


if __name__ == "__main__":
    cases = list(product(SHAPES, SETTINGS))
    for shape, settings in cases:
        compare(shape, *settings)
    broken = torch.rand(2, 3, 4, dtype=torch.float64)
    broken[0, 1, 2] = torch.nan
    found = bregman_projections(-broken, mass=0.9, iterations=20, tolerance=1e-13)
    assert found[0].isnan().all() and found[1].isfinite().all()
    print(len(cases) + 1, "cases")
