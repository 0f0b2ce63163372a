"""Partial transport against closed forms, POT and naive loops (properties 1 to 7 and 9 of the method's checks)."""

import math

import ot
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.objectives.partial_transport import (
    log_partial_transport_plan,
    mahalanobis_cost,
    mpot_loss,
    partial_transport_plan,
    project_psd,
)

MASSES = (0.5, 0.8, 0.9, 1.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def divergence(log_plan: torch.Tensor) -> torch.Tensor:
    """KL(I/b ‖ π), written out."""
    b = len(log_plan)
    return sum((math.log(1 / b) - log_plan[i, i]) / b for i in range(b))


def unrolled_log_plan(cost: torch.Tensor, *, mass: float, epsilon: float, iterations: int) -> torch.Tensor:
    """Dykstra's iterations on logarithms, which autograd follows."""
    kernel = -cost / epsilon
    rows, columns = kernel.shape[-2:]
    g = torch.zeros_like(kernel[..., :1, :])
    h = math.log(mass) - torch.logsumexp(kernel, (-2, -1), keepdim=True)
    for _ in range(iterations):
        f = (-math.log(rows) - h - torch.logsumexp(kernel + g, -1, keepdim=True)).clamp(max=0)
        sums = torch.logsumexp(kernel + f, -2, keepdim=True)
        g = (-math.log(columns) - h - sums).clamp(max=0)
        h = math.log(mass) - torch.logsumexp(sums + g, -1, keepdim=True)
    return kernel + f + g + h


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [2, 5, 16])
def test_property_1_full_mass_is_balanced_sinkhorn(b):
    cost = random(b, b)
    marginal = torch.full((b,), 1 / b, dtype=torch.float64)
    balanced = ot.sinkhorn(marginal, marginal, cost, 0.1, method="sinkhorn_log", numItermax=5000, stopThr=1e-14)
    plan = partial_transport_plan(cost, mass=1.0, epsilon=0.1, iterations=2000)
    torch.testing.assert_close(plan, balanced, atol=1e-10, rtol=0)


def test_property_1_full_mass_of_two_pairs_in_closed_form():
    cost = random(2, 2)
    ratio = math.exp((cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]).item() / (2 * 0.1))
    matched, crossed = 0.5 * ratio / (1 + ratio), 0.5 / (1 + ratio)
    plan = partial_transport_plan(cost, mass=1.0, epsilon=0.1, iterations=1000)
    expected = torch.tensor([[matched, crossed], [crossed, matched]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (9, 2)])
def test_property_2_total_is_exact_and_marginals_hold(mass, shape):
    plan = partial_transport_plan(random(*shape), mass=mass, epsilon=0.05, iterations=1000)
    assert abs(plan.sum().item() - mass) < 1e-12
    assert plan.sum(1).max().item() <= 1 / shape[0] + 1e-6
    assert plan.sum(0).max().item() <= 1 / shape[1] + 1e-6
    assert plan.min().item() >= 0


@pytest.mark.parametrize("mass", MASSES)
def test_property_3_two_by_two_is_a_softmax(mass):
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    plan = partial_transport_plan(cost, mass=mass, epsilon=0.05, iterations=100)
    torch.testing.assert_close(plan, mass * (-cost / 0.05).flatten().softmax(0).view(2, 2), atol=1e-12, rtol=0)


def test_property_3_inactive_marginals_give_a_softmax_and_its_gradient():
    mass, epsilon, b = 0.5, 0.5, 6
    cost = (0.2 * random(b, b)).requires_grad_()
    softmax = mass * (-cost.detach() / epsilon).flatten().softmax(0).view(b, b)
    assert softmax.sum(1).max() < 1 / b and softmax.sum(0).max() < 1 / b
    log_plan = log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=50)
    torch.testing.assert_close(log_plan.detach().exp(), softmax, atol=1e-12, rtol=0)
    divergence(log_plan).backward()
    expected = (torch.eye(b, dtype=torch.float64) / b - softmax / mass) / epsilon
    torch.testing.assert_close(cost.grad, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("b", [2, 4, 7])
def test_property_4_gradient_of_balanced_transport(b):
    cost = random(b, b).requires_grad_()
    log_plan = log_partial_transport_plan(cost, mass=1.0, epsilon=0.1, iterations=1500)
    divergence(log_plan).backward()
    expected = (torch.eye(b, dtype=torch.float64) / b - log_plan.detach().exp()) / 0.1
    torch.testing.assert_close(cost.grad, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["log", "pot"])
@pytest.mark.parametrize("mass", MASSES)
def test_property_4_gradcheck(mass, solver):
    cost = random(3, 3, seed=3).requires_grad_()
    settings = {"mass": mass, "epsilon": 0.3, "iterations": 200, "solver": solver}
    assert torch.autograd.gradcheck(lambda c: partial_transport_plan(c, **settings), (cost,), atol=1e-6)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (5, 7), (2, 3, 6, 4)])
def test_gradient_equals_that_through_the_iterations(shape, epsilon, mass):
    weights = normal(*shape, seed=5)
    gradients, plans = [], []
    for solve in (unrolled_log_plan, log_partial_transport_plan):
        cost = random(*shape, seed=1).requires_grad_()
        plan = solve(cost, mass=mass, epsilon=epsilon, iterations=700)
        (plan * weights).sum().backward()
        gradients.append(cost.grad)
        plans.append(plan.detach())
    torch.testing.assert_close(*plans, atol=1e-11, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=0)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("b", [1, 2, 4, 16])
def test_gradient_of_the_loss_equals_that_through_the_iterations_at_the_defaults(b, mass):
    x, noise, metric = normal(b, 32), normal(b, 32, seed=1), torch.eye(32, dtype=torch.float64)
    cost = mahalanobis_cost(x, x + 3 * noise, metric)
    cost = cost / cost.max()
    gradients = []
    for solve in (unrolled_log_plan, log_partial_transport_plan):
        variable = cost.clone().requires_grad_()
        divergence(solve(variable, mass=mass, epsilon=0.05, iterations=600)).backward()
        gradients.append(variable.grad)
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "cost",
    [
        torch.zeros(5, 5),
        1000 * (1 - torch.eye(5)),
        torch.eye(5),
        torch.tensor([[0.0, 1e-7], [1e-7, 0.0]]),
        torch.arange(25.0).view(5, 5) ** 3,
    ],
)
@pytest.mark.parametrize("mass", [0.5, 0.999999, 1.0])
@pytest.mark.parametrize("solver", ["log", "pot"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # POT's, of numerical errors
def test_ill_conditioned_and_unconverged_problems_have_a_finite_gradient(cost, dtype, mass, solver):
    cost = cost.detach().clone().to(dtype).requires_grad_()
    plan = log_partial_transport_plan(cost, mass=mass, epsilon=0.01, iterations=7, solver=solver)
    divergence(plan).backward()
    assert plan.isfinite().all() and cost.grad.isfinite().all()


def test_more_iterations_than_needed_change_nothing():
    cost = random(4, 4)
    few, many = (log_partial_transport_plan(cost, mass=0.8, epsilon=0.3, iterations=n) for n in (400, 10**9))
    torch.testing.assert_close(few, many, atol=1e-12, rtol=0)


def test_gradient_of_a_gradient_is_refused():
    cost = random(3, 3).requires_grad_()
    plan = partial_transport_plan(cost, mass=0.9, epsilon=0.1, iterations=50)
    (gradient,) = torch.autograd.grad(plan[0, 0], cost, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("b", [2, 4, 16])
def test_property_5_bounds_of_the_divergence(mass, b):
    perfect = 50 * (1 - torch.eye(b, dtype=torch.float64))
    plan = log_partial_transport_plan(perfect, mass=mass, epsilon=0.05, iterations=100)
    assert divergence(plan).item() == pytest.approx(-math.log(mass), abs=1e-10)
    constant = torch.full((b, b), 0.7, dtype=torch.float64)
    plan = log_partial_transport_plan(constant, mass=mass, epsilon=0.05, iterations=100)
    assert divergence(plan).item() == pytest.approx(math.log(b) - math.log(mass), abs=1e-10)


@pytest.mark.parametrize("epsilon", [0.05, 0.001])
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("b", [4, 16, 64])
def test_log_solver_equals_pot_iteration_by_iteration(b, mass, epsilon):
    cost = random(b, b, seed=b)
    settings = {"mass": mass, "epsilon": epsilon, "iterations": 20}
    ours = partial_transport_plan(cost, **settings)
    torch.testing.assert_close(ours, partial_transport_plan(cost, **settings, solver="pot"), atol=1e-13, rtol=0)


def test_gradient_equals_that_of_pot():
    gradients = []
    for solver in ("log", "pot"):
        cost = random(5, 5).requires_grad_()
        plan = partial_transport_plan(cost, mass=0.8, epsilon=0.05, iterations=500, solver=solver)
        (plan * random(5, 5, seed=9)).sum().backward()
        gradients.append(cost.grad)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", ["log", "pot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ot_6_full_mass_never_fails_for_rounding(solver, dtype):
    for b in (6, 7, 12, 23, 24, 28, 46, 47, 59, 61):
        cost = random(b, b).to(dtype)
        plan = partial_transport_plan(cost, mass=1.0, epsilon=0.05, iterations=5, solver=solver)
        assert plan.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("b", [2, 4, 16])
def test_ot_7_tiny_epsilon_is_finite_in_float32(b, mass):
    cost = random(b, b).float().requires_grad_()
    log_plan = log_partial_transport_plan(cost, mass=mass, epsilon=1e-3, iterations=100)
    assert log_plan.isfinite().all() and log_plan.exp().isfinite().all()
    divergence(log_plan).backward()
    assert cost.grad.isfinite().all()
    assert cost.grad.abs().max() > 0


@pytest.mark.parametrize("solver", ["log", "pot"])
def test_batched_problems_equal_a_loop(solver):
    cost = random(2, 3, 4, 5)
    settings = {"mass": 0.8, "epsilon": 0.05, "iterations": 40, "solver": solver}
    batched = partial_transport_plan(cost, **settings)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], partial_transport_plan(cost[i, j], **settings))


def test_half_precision_costs_are_solved_in_float32():
    cost = random(4, 4).to(torch.bfloat16)
    plan = partial_transport_plan(cost, mass=0.9, epsilon=0.05, iterations=50)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, partial_transport_plan(cost.float(), mass=0.9, epsilon=0.05, iterations=50))


def test_nan_in_the_cost_gives_nan_and_does_not_raise():
    cost = random(3, 3)
    cost[0, 1] = math.nan
    assert partial_transport_plan(cost, mass=0.9, epsilon=0.05, iterations=5).isnan().any()


def test_nothing_is_read_on_the_host_of_other_devices():
    cost = torch.rand(2, 4, 4, device="meta", requires_grad=True)  # a tensor without values: reading one raises
    divergence(log_partial_transport_plan(cost, mass=0.9, epsilon=0.05, iterations=20)[0]).backward()
    assert cost.grad.shape == (2, 4, 4)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        x, y = torch.randn(2, 65, 8)  # too many for the kernel, which no fake tensor can launch
        loss = mpot_loss(x, y, torch.eye(8), mass=0.9, epsilon=0.05, iterations=20)
    assert loss.shape == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"mass": 0.0},
        {"mass": 1.01},
        {"mass": -1},
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"mass": math.nan},
        {"iterations": 0},
        {"solver": "simplex"},
    ],
)
@pytest.mark.parametrize("solver", ["log", "pot"])
def test_values_out_of_range_are_refused(wrong, solver):
    settings = {"mass": 0.9, "epsilon": 0.05, "iterations": 5, "solver": solver} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        partial_transport_plan(random(3, 3), **settings)


def test_older_pot_without_log_scale_serves_too(monkeypatch):
    monkeypatch.delattr(ot.partial, "entropic_partial_wasserstein_logscale")
    settings = {"mass": 0.9, "epsilon": 0.1, "iterations": 20}
    pot = partial_transport_plan(random(4, 4), **settings, solver="pot")
    torch.testing.assert_close(pot, partial_transport_plan(random(4, 4), **settings), atol=1e-10, rtol=0)


# --- the cost ---------------------------------------------------------------------------------------------------------


def test_cost_equals_a_naive_loop():
    x, y, root = normal(3, 6), normal(5, 6, seed=1), normal(6, 6, seed=2)
    metric = root @ root.T
    naive = torch.tensor([[((a - b) @ metric @ (a - b) + 1e-8).sqrt() for b in y] for a in x], dtype=torch.float64)
    torch.testing.assert_close(mahalanobis_cost(x, y, metric), naive)


def test_property_6_identity_and_factored_metrics_are_euclidean():
    x, y, root = normal(4, 6), normal(5, 6, seed=1), normal(6, 6, seed=2)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(mahalanobis_cost(x, y, identity), torch.cdist(x, y), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        mahalanobis_cost(x, y, root @ root.T), torch.cdist(x @ root, y @ root), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_property_6_moving_both_sides_changes_nothing(dtype, tolerance):
    x, y = normal(4, 6).to(dtype), normal(5, 6, seed=1).to(dtype)
    metric = torch.eye(6, dtype=dtype)
    moved = mahalanobis_cost(x + 100, y + 100, metric)
    torch.testing.assert_close(moved, mahalanobis_cost(x, y, metric), atol=tolerance, rtol=0)


def test_cost_takes_the_symmetric_part_of_the_metric():
    x, y, metric = normal(4, 6), normal(5, 6, seed=1), torch.eye(6, dtype=torch.float64)
    skew = normal(6, 6, seed=2)
    torch.testing.assert_close(mahalanobis_cost(x, y, metric + skew - skew.T), mahalanobis_cost(x, y, metric))


def test_cost_is_batched():
    x, y, metric = normal(2, 4, 6), normal(2, 5, 6, seed=1), torch.eye(6, dtype=torch.float64)
    batched = mahalanobis_cost(x, y, metric)
    torch.testing.assert_close(batched[1], mahalanobis_cost(x[1], y[1], metric))


def test_cost_gradcheck():
    x, y, metric = normal(3, 4), normal(2, 4, seed=1), torch.eye(4, dtype=torch.float64) + 0.1
    inputs = [value.requires_grad_() for value in (x, y, metric)]
    assert torch.autograd.gradcheck(mahalanobis_cost, inputs)


def test_coinciding_embeddings_and_indefinite_metrics_stay_finite():
    x = normal(3, 4).float().requires_grad_()
    mahalanobis_cost(x, x.detach(), torch.eye(4)).sum().backward()
    assert x.grad.isfinite().all()
    assert mahalanobis_cost(x, x.detach() + 1, -torch.eye(4)).max().item() == pytest.approx(1e-4)


def test_md_1_off_diagonals_of_the_metric_get_a_gradient():
    metric = torch.eye(6, dtype=torch.float64, requires_grad=True)
    mpot_loss(normal(4, 6), normal(4, 6, seed=1), metric, mass=0.9, epsilon=0.05).backward()
    off_diagonal = metric.grad[~torch.eye(6, dtype=torch.bool)]
    assert off_diagonal.abs().min() > 0


def test_md_1_metric_is_semi_definite_after_a_step_from_an_indefinite_start():
    metric = torch.nn.Parameter(normal(6, 6))
    optimiser = torch.optim.Adam([metric], lr=0.1)
    mpot_loss(normal(4, 6), normal(4, 6, seed=1), metric, mass=0.9, epsilon=0.05).backward()
    optimiser.step()
    projected = project_psd(metric.detach())
    assert torch.linalg.eigvalsh(projected).min() >= -1e-10


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", MASSES)
def test_loss_is_zero_for_a_perfect_match_and_log_b_without_information(mass):
    axes = torch.eye(5, dtype=torch.float64)
    assert mpot_loss(axes, axes, axes, mass=mass, epsilon=0.05).item() == pytest.approx(0, abs=1e-6)
    nothing = torch.zeros(5, 5, dtype=torch.float64)
    assert mpot_loss(nothing, axes, axes, mass=mass, epsilon=0.05).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("mass", [0.3, *MASSES])
def test_loss_is_never_negative(mass):
    for seed in range(20):
        loss = mpot_loss(
            normal(4, 6, seed=seed), normal(4, 6, seed=seed + 50), torch.eye(6).double(), mass=mass, epsilon=0.05
        )
        assert loss.item() >= -1e-12


def test_loss_is_the_divergence_under_pots_plan():
    x, y, root = normal(5, 6), normal(5, 6, seed=1), normal(6, 6, seed=2)
    metric = root @ root.T
    cost = mahalanobis_cost(x, y, metric)
    plan = partial_transport_plan(cost / cost.max(), mass=0.8, epsilon=0.05, iterations=100, solver="pot")
    expected = divergence(plan.log()) + math.log(0.8)
    torch.testing.assert_close(mpot_loss(x, y, metric, mass=0.8, epsilon=0.05), expected)


def test_loss_gradcheck():
    inputs = [normal(4, 5).requires_grad_(), torch.eye(5, dtype=torch.float64).requires_grad_()]
    y = normal(4, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, metric: mpot_loss(x, y, metric, mass=0.9, epsilon=0.2, iterations=500), inputs
    )


def test_loss_does_not_depend_on_the_scale_of_the_metric():
    x, y = normal(4, 6), normal(4, 6, seed=1)
    metric = torch.eye(6, dtype=torch.float64, requires_grad=True)
    loss = mpot_loss(x, y, metric, mass=0.9, epsilon=0.05)
    loss.backward()
    assert (metric.grad * metric.detach()).sum().item() == pytest.approx(0, abs=1e-7)
    assert mpot_loss(x, y, 7 * metric, mass=0.9, epsilon=0.05).item() == pytest.approx(loss.item(), abs=1e-6)


def test_property_9_order_of_the_pairs_does_not_matter_but_their_match_does():
    x, noise = normal(6, 8), normal(6, 8, seed=1)
    y, metric = x + 0.3 * noise, torch.eye(8, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = mpot_loss(x, y, metric, mass=0.9, epsilon=0.05).item()
    assert mpot_loss(x[order], y[order], metric, mass=0.9, epsilon=0.05).item() == pytest.approx(loss)
    assert mpot_loss(x, y[order], metric, mass=0.9, epsilon=0.05).item() > loss + 1


def test_batch_of_one_carries_no_signal():
    x, metric = normal(1, 6).requires_grad_(), torch.eye(6, dtype=torch.float64, requires_grad=True)
    loss = mpot_loss(x, normal(1, 6, seed=1), metric, mass=0.9, epsilon=0.05)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert x.grad.abs().max().item() == pytest.approx(0, abs=1e-12)
    assert metric.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_autocast_is_off_inside_the_loss():
    x, y, metric = normal(4, 16).float(), normal(4, 16, seed=1).float(), torch.eye(16)
    outside = mpot_loss(x, y, metric, mass=0.9, epsilon=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mpot_loss(x, y, metric, mass=0.9, epsilon=0.05)
        half = mpot_loss(x.bfloat16(), y.bfloat16(), metric, mass=0.9, epsilon=0.05)
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_slices_and_texts_solved_together_equal_two_calls():
    x, y, metric = normal(4, 6), normal(2, 4, 6, seed=1), torch.eye(6, dtype=torch.float64)
    together = mpot_loss(x, y, metric, mass=0.9, epsilon=0.05)
    apart = [mpot_loss(x, target, metric, mass=0.9, epsilon=0.05) for target in y]
    assert apart[0].shape == ()
    torch.testing.assert_close(together, torch.stack(apart))


def test_unpaired_embeddings_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        mpot_loss(normal(3, 4), normal(4, 4), torch.eye(4), mass=0.9, epsilon=0.05)


def test_t_1_free_embeddings_reach_a_perfect_match():
    target = torch.nn.functional.normalize(normal(8, 16).float(), dim=1)
    x = torch.nn.Parameter(normal(8, 16, seed=1).float())
    metric = torch.nn.Parameter(torch.eye(16))
    optimiser = torch.optim.Adam([x, metric], lr=0.05)
    for _ in range(40):
        embedding = torch.nn.functional.normalize(x, dim=1)
        loss = mpot_loss(embedding, target, metric, mass=0.9, epsilon=0.05, iterations=50)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        metric.data = project_psd(metric.data)
    assert loss.item() < 0.05


# --- the projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_property_7_projection_is_symmetric_semi_definite_and_idempotent(dtype, tolerance):
    projected = project_psd(normal(12, 12).to(dtype))
    assert torch.equal(projected, projected.T)
    assert torch.linalg.eigvalsh(projected.double()).min() >= -tolerance
    torch.testing.assert_close(project_psd(projected), projected, atol=tolerance, rtol=0)


def test_property_7_projection_is_the_nearest():
    matrix = normal(12, 12)
    symmetric = (matrix + matrix.T) / 2
    negative = torch.linalg.eigvalsh(symmetric).clamp(max=0)
    distance = torch.linalg.matrix_norm(project_psd(matrix) - symmetric) ** 2
    assert distance.item() == pytest.approx(negative.square().sum().item())


def test_property_7_projection_leaves_a_semi_definite_matrix_alone():
    root = normal(12, 12)
    matrix = root @ root.T + torch.eye(12)
    matrix = (matrix + matrix.T) / 2
    assert torch.equal(project_psd(matrix), matrix)
    assert torch.equal(project_psd(torch.eye(512)), torch.eye(512))


def test_projection_is_batched():
    matrices = normal(3, 5, 5)
    torch.testing.assert_close(project_psd(matrices)[2], project_psd(matrices[2]))


def test_a_positive_definite_matrix_costs_no_eigenvalues(monkeypatch):
    factor = normal(6, 6)
    matrix = factor @ factor.mT + torch.eye(6)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("eigenvalues were computed"))
    torch.testing.assert_close(project_psd(matrix), matrix, rtol=0, atol=1e-15)
