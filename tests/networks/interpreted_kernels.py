"""Triton's kernels beside PyTorch's operators on the CPU: ``TRITON_INTERPRET=1 python interpreted_kernels.py``.

Tiles and chunks are made small, so that small maps are cut into several of each. Prints the number of cases.
"""

from itertools import product

import torch

from nnssl_plugin.networks import instance_norm
from nnssl_plugin.networks import instance_norm_kernels as kernels

SHAPES = [(1, 1, 7, 5), (2, 3, 5, 3, 4), (1, 18, 2, 3)]


def drawn(shape, *, affine, residual, dtype):
    """Input, weight, bias, residual and gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    x, r, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator) if affine else None for _ in range(2))
    return 2 * x + 3, weight, bias, r if residual else None, gradient


def both_ways(module, x, weight, bias, residual, gradient, *, slope):
    """Everything that a module gives, forward and backward."""
    y, mean, scale = module.normalised(x, weight, bias, residual, eps=1e-5, slope=slope)
    told = None if residual is None else y
    found = module.gradients(gradient, x, weight, bias, told, mean=mean, scale=scale, slope=slope)
    return [each for each in (y, mean, scale, *found) if each is not None]


def compare(shape, affine, residual, slope, dtype=torch.float32) -> None:
    given = drawn(shape, affine=affine, residual=residual, dtype=dtype)
    mine, other = (both_ways(module, *given, slope=slope) for module in (kernels, instance_norm))
    step = max(1e-5, 2 * torch.finfo(dtype).eps)
    assert [each.dtype for each in mine] == [each.dtype for each in other]
    torch.testing.assert_close(mine, other, rtol=step, atol=step)


if __name__ == "__main__":
    kernels.TILE, kernels.MOST_CHANNELS, kernels.MOST_CHUNKS = 64, 16, 3
    cases = list(product(SHAPES, (False, True), (False, True), (0.01, 1.0)))
    for case in cases:
        compare(*case)
    for dtype in (torch.float16, torch.bfloat16):
        compare(SHAPES[1], True, True, 0.01, dtype)
    print(len(cases) + 2, "cases")
