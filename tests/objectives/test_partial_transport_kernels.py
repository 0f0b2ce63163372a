"""The kernel of the transport solver beside the loop: under Triton's interpreter, compiled, and on CUDA."""

import math
from pathlib import Path

import pytest
import torch
from interpreter import run_interpreted

from nnssl_plugin.objectives.partial_transport import log_partial_transport_plan


@pytest.mark.slow
def test_kernel_equals_the_loop_under_the_interpreter():
    assert run_interpreted(Path(__file__).with_name("interpreted_transport.py")) == ["55", "cases"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (16, 16)])
def test_kernel_compiles_for_gpus_that_are_not_here(capability, rows, columns):
    triton = pytest.importorskip("triton", reason="Triton is not installed; PyTorch brings it for CUDA on Linux")
    if triton.knobs.runtime.interpret:
        pytest.skip("under the interpreter nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnssl_plugin.objectives.partial_transport_kernels import _project

    constants = {"N": rows, "M": columns, "MASS": 0.9, "LOG_MASS": math.log(0.9), "TOLERANCE": 1e-13, "EVERY": 5}
    constants |= {"ROWS": triton.next_power_of_2(rows), "COLUMNS": triton.next_power_of_2(columns)}
    kinds = {"kernel": "*fp64", "log_plan_of": "*fp64", "iterations": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=_project, signature={name: kinds[name] for name in _project.arg_names}, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("shape", "mass", "epsilon"),
    [
        ((1, 1), 0.9, 0.05),
        ((2, 4, 4), 0.9, 0.05),
        ((2, 4, 4), 1.0, 0.5),
        ((3, 7), 0.5, 1e-3),
        ((2, 3, 17, 33), 0.9, 0.05),
        ((2, 64, 64), 1.0, 0.01),
        ((65, 65), 0.9, 0.05),
    ],
)
def test_plan_and_gradient_on_cuda_are_those_of_a_cpu_and_nothing_waits(shape, mass, epsilon):
    found = []
    for device in ("cpu", "cuda"):
        cost = (
            torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            .to(device)
            .requires_grad_()
        )
        weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(device)
        log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=60)  # makes what is made once
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            plan = log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=60)
            (gradient,) = torch.autograd.grad((plan.exp() * weights).sum(), cost)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((plan.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-8, rtol=1e-8)
