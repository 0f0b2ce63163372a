"""Normalisation, residual and LeakyReLU in one, beside PyTorch's own operators, forward and backward; its kernels."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted

from nnssl_plugin.networks.instance_norm import normalise

SHAPES = [(1, 1, 7, 5), (3, 4, 5, 9), (2, 3, 7, 5, 6), (1, 5, 1, 9, 4), (2, 4, 1, 1, 3)]
"""2D and 3D, a batch of one, a single channel, odd sizes, one slice."""
SLOPES = [0.01, 0.0, 1.0]


def inputs(shape, *, affine, residual, dtype=torch.float32, channels_last=False):
    """Input, weight, bias and residual; the input is far from its mean."""
    generator = torch.Generator().manual_seed(0)
    maps = [(torch.randn(shape, generator=generator) * 2 + 3 * first).to(dtype) for first in (1, 0)]
    if channels_last:
        memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        maps = [each.contiguous(memory_format=memory) for each in maps]
    numbers = [torch.randn(shape[1], generator=generator) for _ in range(2)] if affine else [None, None]
    if dtype == torch.float64 and affine:
        numbers = [each.double() for each in numbers]
    return [
        each if each is None else each.requires_grad_() for each in (maps[0], *numbers, maps[1] if residual else None)
    ]


def stock(x, weight, bias, residual, *, slope, eps=1e-5):
    z = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    return F.leaky_relu(z if residual is None else z + residual, slope)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("affine", "residual"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_stock_operators_forward_and_backward(shape, affine, residual, channels_last):
    for slope in SLOPES:
        given = inputs(shape, affine=affine, residual=residual, channels_last=channels_last)
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        results = [normalise(*given, slope=slope), stock(*given, slope=slope)]
        wanted = [each for each in given if each is not None]
        gradients = [torch.autograd.grad(result, wanted, gradient) for result in results]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_statistics_of_many_voxels_far_from_zero_are_those_of_float64():
    x = torch.randn(1, 2, 40, 40, 40, generator=torch.Generator().manual_seed(0)) + 100
    exact = stock(x.double(), None, None, None, slope=0.01)
    assert (normalise(x, slope=0.01) - exact).abs().max() < 5e-5  # an input near 100 is rounded to 8e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_wrong_by_its_rounding_alone(dtype):
    given = inputs((2, 4, 6, 7, 5), affine=True, residual=True, dtype=dtype)
    wide = [each.detach().float().requires_grad_() for each in given]
    results = [normalise(*each, slope=0.01) for each in (given, wide)]
    assert results[0].dtype == dtype
    for found, exact in zip(
        [results[0], *torch.autograd.grad(results[0].float().square().sum(), given)],
        [results[1], *torch.autograd.grad(results[0].detach().float().mul(2).mul(results[1]).sum(), wide)],
        strict=True,
    ):
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), exact, rtol=2 * step, atol=4 * step)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 2, 3, 2, 3)])
def test_gradients_by_finite_differences(shape, affine, residual):
    given = inputs(shape, affine=affine, residual=residual, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: normalise(*args, slope=0.1), given)


def test_memory_format_is_kept_forward_and_backward():
    x, *_ = inputs((2, 3, 4, 5, 6), affine=False, residual=False, channels_last=True)
    y = normalise(x, slope=0.01)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    for maps in (y, gradient):
        assert maps.is_contiguous(memory_format=torch.channels_last_3d) and not maps.is_contiguous()


def test_a_single_voxel_is_refused_as_by_pytorch():
    for operation in (normalise, F.instance_norm):
        with pytest.raises(ValueError, match=r"(?i)more than (one|1)"):
            operation(torch.zeros(2, 3, 1, 1))


def test_it_keeps_the_input_and_two_numbers_per_map():
    kept = []
    x = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()), lambda each: each):
        normalise(x, slope=0.01)
    assert sorted(kept) == [6, 6, x.numel()]


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
def test_compiled_without_a_break(residual):
    given = inputs((2, 3, 4, 5, 6), affine=True, residual=residual)
    compiled = torch.compile(lambda *args: normalise(*args, slope=0.01), backend="aot_eager", fullgraph=True)
    results = [function(*given).square().sum() for function in (compiled, lambda *args: normalise(*args, slope=0.01))]
    wanted = [each for each in given if each is not None]
    torch.testing.assert_close(*[torch.autograd.grad(result, wanted) for result in results])


@pytest.mark.slow
def test_kernels_equal_the_operators_under_the_interpreter():
    assert run_interpreted(Path(__file__).with_name("interpreted_kernels.py")) == ["26", "cases"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("block", [1, 32, 64])
def test_kernels_compile_for_gpus_that_are_not_here(capability, block):
    triton = pytest.importorskip("triton", reason="Triton is not installed; PyTorch brings it for CUDA on Linux")
    if triton.knobs.runtime.interpret:
        pytest.skip("under the interpreter nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnssl_plugin.networks import instance_norm_kernels

    maps = dict.fromkeys(("x", "y", "gradient", "residual", "of_x", "of_residual"), "*fp16")
    numbers = dict.fromkeys(("voxels", "channels", "chunks", "chunk"), "i32") | {"slope": "fp32", "eps": "fp32"}
    chosen = {"ROWS": 4096 // block, "BLOCK": block, "MANY": 64, "AFFINE": True, "RESIDUAL": True, "ACTIVATED": True}
    for name in ("_statistics_of_chunks", "_statistics", "_apply", "_sums_of_chunks", "_apply_backward"):
        kernel = getattr(instance_norm_kernels, name)
        constants = {key: value for key, value in chosen.items() if key in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, "*fp32") | maps | numbers | dict.fromkeys(constants, "constexpr")
        signature = {key: kinds[key] for key in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7, 5), (2, 32, 24, 40, 20), (1, 320, 5, 6, 5), (2, 48, 64, 64)])
def test_kernels_on_cuda_equal_float64(shape, dtype):
    settings = [
        (False, False, 0.01, True),
        (True, False, 1.0, True),
        (True, True, 0.01, True),
        (True, False, 0.0, False),
    ]
    for affine, residual, slope, channels_last in settings:
        given = inputs(shape, affine=affine, residual=residual, channels_last=channels_last, dtype=dtype)
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = []
        for device, kind in (("cuda", None), ("cpu", torch.float64)):
            there = [
                each
                if each is None
                else each.detach().to(device, each.dtype if kind is None else kind).requires_grad_()
                for each in given
            ]
            operation = normalise if device == "cuda" else stock
            result = operation(*there, slope=slope)
            wanted = [each for each in there if each is not None]
            backward = torch.autograd.grad(result, wanted, gradient.to(device, result.dtype))
            found.append([each.detach().cpu().double() for each in (result, *backward)])
        for mine, exact in zip(*found, strict=True):
            assert (mine - exact).norm() <= max(1e-5, torch.finfo(dtype).eps) * exact.norm() + 1e-6
