"""Linear assignment against SciPy and every permutation."""

import itertools
from pathlib import Path

import pytest
import torch
from interpreter import run_interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.objectives.assignment import linear_assignment, shortest_augmenting_paths


def value(affinity: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return affinity.gather(-1, columns[..., None]).sum((-2, -1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solve", [linear_assignment, shortest_augmenting_paths])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_is_the_best_of_all_permutations(solve, n):
    affinity = random(20, n, n, seed=n)
    columns = torch.tensor(list(itertools.permutations(range(n))))
    best = affinity[:, torch.arange(n), columns].sum(-1).amax(-1)
    torch.testing.assert_close(value(affinity, solve(affinity)), best)


@pytest.mark.parametrize("n", [7, 16, 33])
def test_augmenting_paths_find_what_scipy_finds(n):
    affinity = random(3, 9, n, n, seed=n)
    assert torch.equal(shortest_augmenting_paths(affinity), linear_assignment(affinity))


@pytest.mark.parametrize("solve", [linear_assignment, shortest_augmenting_paths])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_ties(solve, levels):
    affinity = random(50, 8, 8).mul(100).long().remainder(levels).double()
    columns = solve(affinity)
    assert torch.equal(columns.sort(-1).values, torch.arange(8).expand(50, 8))
    torch.testing.assert_close(value(affinity, columns), value(affinity, linear_assignment(affinity)))


def test_problems_of_one_batch_do_not_see_each_other():
    affinity = torch.cat((random(5, 6, 6), 1e6 * random(1, 6, 6, seed=1), torch.zeros(1, 6, 6, dtype=torch.float64)))
    one_by_one = torch.stack([shortest_augmenting_paths(problem) for problem in affinity])
    assert torch.equal(shortest_augmenting_paths(affinity), one_by_one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions(dtype):
    affinity = random(10, 5, 5).to(dtype)
    wide = affinity.double()
    for solve in (linear_assignment, shortest_augmenting_paths):
        assert (value(wide, solve(affinity)) >= value(wide, linear_assignment(wide)) - 0.05).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 1, 1), (2, 0, 4, 4)])
def test_no_problems_and_one_row(shape):
    for solve in (linear_assignment, shortest_augmenting_paths):
        columns = solve(torch.zeros(shape))
        assert columns.shape == shape[:-1] and columns.dtype == torch.long
        assert not columns.any()


def test_problems_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="3 × 4"):
        linear_assignment(torch.zeros(3, 4))


def test_reads_nothing_on_the_host_of_a_gpu(monkeypatch):
    monkeypatch.setattr("nnssl_plugin.objectives.assignment._has_triton", lambda: False)
    with FakeTensorMode(), torch.device("cuda"):
        assert linear_assignment(torch.randn(4, 8, 8)).shape == (4, 8)


@pytest.mark.slow
def test_kernels_equal_the_operators_under_the_interpreter():
    assert run_interpreted(Path(__file__).with_name("interpreted_kernels.py")) == ["16", "cases"]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 16, 40])
def test_kernels_compile_for_gpus_that_are_not_here(nodes):
    triton = pytest.importorskip("triton", reason="Triton is not installed; PyTorch brings it for CUDA on Linux")
    if triton.knobs.runtime.interpret:
        pytest.skip("under the interpreter nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnssl_plugin.objectives import assignment_kernels, quadratic_assignment_kernels

    lanes = {"LANES": nodes, "NODES": nodes, "PLACES": nodes**2, "SWAPS": nodes * (nodes - 1) // 2}
    constants = {name: triton.next_power_of_2(count) for name, count in lanes.items()} | {"TABU": True}
    numbers = dict.fromkeys(("n", "steps", "starts", "swaps"), "i32") | dict.fromkeys(constants, "constexpr")
    whole = dict.fromkeys(("permutations", "best", "until", "rows"), "*i32") | {"columns": "*i64"}
    for kernel in (assignment_kernels._assign, quadratic_assignment_kernels._search):
        kinds = dict.fromkeys(kernel.arg_names, "*fp32") | whole | numbers
        signature = {name: kinds[name] for name in kernel.arg_names}
        chosen = {name: value for name, value in constants.items() if name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=chosen)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
