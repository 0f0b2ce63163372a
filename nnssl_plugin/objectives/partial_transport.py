"""Entropic partial optimal transport under a learned Mahalanobis metric (Med3DInsight, section III-D, Algorithm 1).

Shapes: ``n`` rows (volumes), ``m`` columns (slices or texts), ``d`` dimensions of an embedding; ``...`` is any batch of
independent problems. Marginals are uniform, 1/n and 1/m.
"""

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

COST_EPSILON = 1e-8
"""Added under the square root of the cost, so that its gradient stays finite where two embeddings coincide."""

ABSORB_EVERY = 5
"""Iterations of the solver between two times that the plan is made anew and convergence is looked at."""

LARGEST = 64
"""Rows or columns of a problem that Triton's kernel solves: its plan stays in registers."""


def mahalanobis_cost(x: Tensor, y: Tensor, metric: Tensor) -> Tensor:
    """Mahalanobis distance of every row of ``x`` to every row of ``y`` (Algorithm 1: ``C_M``).

    C_ij = sqrt((x_i − y_j)ᵀ M (x_i − y_j) + 1e-8), the full bilinear form: entries of M off its diagonal take part and
    get a gradient. M enters by its symmetric part; the quadratic form is clamped at 0 against rounding.

    Args:
        x: (..., n, d).
        y: (..., m, d).
        metric: (d, d), positive semi-definite.

    Returns:
        (..., n, m), at least 1e-4.
    """
    metric = (metric + metric.mT) / 2
    # the cost does not change when both sides move together; moving them to the origin keeps the digits of small costs
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    x_metric = x @ metric
    own_x = (x_metric * x).sum(-1)[..., :, None]
    own_y = ((y @ metric) * y).sum(-1)[..., None, :]
    squared = own_x + own_y - 2 * x_metric @ y.mT
    return (squared.clamp(min=0) + COST_EPSILON).sqrt()


def log_partial_transport_plan(
    cost: Tensor, *, mass: float, epsilon: float, iterations: int, solver: str = "log"
) -> Tensor:
    """Logarithm of the entropic partial transport plan (Eq. 1 with the entropy's sign that makes it convex).

    π = argmin ⟨π, C⟩ + ε Σ π log π  subject to  π1 ≤ 1/n, πᵀ1 ≤ 1/m, 1ᵀπ1 = mass.

    The total mass is exact; the marginals hold in the limit. The gradient is that of the minimum, by the implicit
    function theorem (:func:`_through_the_minimum`), and knows nothing of the iterations: it equals the gradient through
    them where they have converged. It cannot be differentiated again.

    Args:
        cost: (..., n, m); solved in float64 where the device has it.
        mass: s in (0, 1], the mass to transport; never more than the marginals hold, so that 1 works for every n.
        epsilon: ε > 0, in units of the cost.
        iterations: greatest number of iterations, at least 1; they end once nothing changes any more, except in
            problems too large for the kernel on a GPU.
        solver: ``"log"`` solves all problems at once, on CUDA in one launch where they are of up to 64 × 64, and reads
            nothing on the host of a GPU; ``"pot"`` runs the entropic solver of the package POT, one problem at a time.

    Returns:
        (..., n, m) log π, finite also where π underflows; float32 for costs in half precision.

    Raises:
        ValueError: for an unknown solver, or mass, epsilon or iterations out of range.
    """
    _check(mass, epsilon, iterations, solver)
    return _LogPlan.apply(_full_precision(cost), mass, epsilon, iterations, solver)


def partial_transport_plan(
    cost: Tensor, *, mass: float, epsilon: float, iterations: int, solver: str = "log"
) -> Tensor:
    """Entropic partial transport plan (..., n, m), whose entries sum to ``mass``: :func:`log_partial_transport_plan`
    without the logarithm, with the same arguments and errors."""
    return log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=iterations, solver=solver).exp()


def mpot_loss(
    x: Tensor,
    y: Tensor,
    metric: Tensor,
    *,
    mass: float,
    epsilon: float,
    iterations: int = 100,
    solver: str = "log",
) -> Tensor:
    """Mini-batch partial transport loss of matching pairs (Eq. 2, one of its two terms).

    KL(π̂‖π) + log s with π̂ = I/b: the paper's divergence, whose smallest value is −log s because π holds the mass s and
    π̂ holds 1, shifted so that 0 is a perfect match; log b is the value of embeddings that tell nothing. The cost is
    divided by its largest entry, with gradient, so that ε is relative and the loss does not depend on the scale of M.
    Computed in float32 at least, with autocast off.

    Args:
        x: (..., b, d) embeddings of the volumes.
        y: (..., b, d) embeddings of their slices or texts, in the same order; batch dimensions broadcast, so that
            slices and texts (2, b, d) can be solved together.
        metric: (d, d) positive semi-definite M.
        mass: s in (0, 1].
        epsilon: ε > 0, relative to the largest cost.
        iterations: greatest number of iterations of the solver.
        solver: ``"log"`` or ``"pot"``, see :func:`log_partial_transport_plan`.

    Returns:
        (...) losses, a scalar for (b, d), at least 0; without signal (0, zero gradient) for b = 1.

    Raises:
        ValueError: for mass, epsilon, iterations or solver out of range, or different numbers of rows.
    """
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"x has {x.shape[-2]} rows and y has {y.shape[-2]}; pairs are needed")
    with torch.autocast(x.device.type, enabled=False):
        cost = mahalanobis_cost(_full_precision(x), _full_precision(y), _full_precision(metric))
        cost = cost / cost.amax((-2, -1), keepdim=True)
        log_plan = log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=iterations, solver=solver)
        matched = log_plan.diagonal(dim1=-2, dim2=-1)
        return math.log(mass) - math.log(x.shape[-2]) - matched.mean(-1)


def project_psd(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to ``matrix`` in the Frobenius norm (Algorithm 1: ``Proj``).

    Symmetrises and clamps the eigenvalues at 0, by taking the negative part away: a symmetric matrix without negative
    eigenvalues comes back bit for bit, so that repeated projection does not drift. A Cholesky factorisation tells
    whether there is anything to clamp, several times faster than the eigenvalues; on CUDA both wait for the device.

    Args:
        matrix: (..., d, d), float32 or float64.

    Returns:
        (..., d, d), symmetric.
    """
    symmetric = (matrix + matrix.mT) / 2
    if not torch.linalg.cholesky_ex(symmetric).info.any():  # positive definite
        return symmetric
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    negative = (vectors * eigenvalues.clamp(max=0)[..., None, :]) @ vectors.mT
    return symmetric - (negative + negative.mT) / 2


class _LogPlan(torch.autograd.Function):
    """log π of a solver that autograd does not see, with the gradient of the minimum."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, mass: float, epsilon: float, iterations: int, solver: str) -> Tensor:
        kernel = _widest(cost) / -epsilon
        if solver == "pot":
            log_plan = _pot(kernel, mass=mass, iterations=iterations)
        else:
            tolerance = max(4 * torch.finfo(cost.dtype).eps, 1e-13)
            kernels = _kernels(kernel)
            solve = _bregman_projections if kernels is None else kernels.bregman_projections
            log_plan = solve(kernel, mass=mass, iterations=iterations, tolerance=tolerance)
        ctx.save_for_backward(kernel, log_plan)
        ctx.balanced, ctx.epsilon = mass == 1, epsilon
        return log_plan.to(cost.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernel, log_plan = ctx.saved_tensors
        through = _through_the_minimum(gradient.to(kernel.dtype), kernel, log_plan, balanced=ctx.balanced)
        return (through / -ctx.epsilon).to(gradient.dtype), None, None, None, None


def _bregman_projections(kernel: Tensor, *, mass: float, iterations: int, tolerance: float) -> Tensor:
    """log π by Dykstra's iterations: Benamou et al., "Iterative Bregman projections for regularized transportation
    problems", SIAM J. Sci. Comput. 37(2), 2015, proposition 5.

    π = exp(−C/ε + f + g + h), f ≤ 0 of the rows, g ≤ 0 of the columns, h of the total. Between two absorptions the
    three are factors of the plan reached (Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized
    transport problems", SIAM J. Sci. Comput. 41(3), 2019): two products with it per iteration, and no underflow that
    matters. At the minimum an iteration changes nothing, so a problem that has converged can wait for the others.

    Args:
        kernel: −C/ε, (..., n, m).
        mass: s.
        iterations: greatest number of iterations.
        tolerance: on a CPU the iterations end when no entry of log π changed by more between two absorptions; on other
            devices they all run, as looking would wait.

    Returns:
        (..., n, m).
    """
    rows, columns = kernel.shape[-2:]
    shape, kernel = kernel.shape, kernel.reshape(-1, rows, columns)
    log_plan = kernel - torch.logsumexp(kernel, (-2, -1), keepdim=True) + math.log(mass)
    row_bound = torch.ones_like(kernel[..., :1])  # exp(−f), exp(−g): factors that keep f, g ≤ 0
    untouched = column_bound = torch.ones_like(kernel[..., :1, :])
    start = torch.full_like(kernel[..., :1, :1], 1 / rows)
    for done in range(0, iterations, ABSORB_EVERY):
        plan, v, room = log_plan.exp(), untouched, start  # room is exp(−h) / n
        for _ in range(min(ABSORB_EVERY, iterations - done)):
            u = torch.minimum(room / (plan @ v.mT), row_bound)
            sums = torch.baddbmm(room, u.mT, plan, beta=0, alpha=columns / rows)
            v = torch.minimum(room / sums, column_bound)
            room = torch.baddbmm(room, sums, v.mT, beta=0, alpha=1 / (columns * mass))
        row_bound, column_bound = row_bound / u, column_bound / v
        change = (u * v / (rows * room)).log()
        log_plan = log_plan + change
        if kernel.device.type == "cpu" and change.abs().amax().item() < tolerance:
            break
    return log_plan.reshape(shape)


def _kernels(kernel: Tensor) -> ModuleType | None:
    """Triton's kernel, where it can be used."""
    if kernel.device.type != "cuda" or max(kernel.shape[-2:]) > LARGEST or importlib.util.find_spec("triton") is None:
        return None
    from nnssl_plugin.objectives import partial_transport_kernels  # needs Triton

    return partial_transport_kernels


def _pot(kernel: Tensor, *, mass: float, iterations: int) -> Tensor:
    """log π by POT's entropic solver, which runs the same iterations on the plan."""
    from ot import partial  # slow to import

    solve = getattr(partial, "entropic_partial_wasserstein_logscale", partial.entropic_partial_wasserstein)
    rows, columns = kernel.shape[-2:]
    a = kernel.new_full((rows,), 1 / rows)
    b = kernel.new_full((columns,), 1 / columns)
    # POT refuses a mass above Σ 1/n, which rounding puts below 1 for some n; and its log needs a tensor
    transported = torch.stack((kernel.new_tensor(mass), a.sum(), b.sum())).min()
    costs = -kernel.reshape(-1, rows, columns)
    plans = torch.stack([solve(a, b, cost, 1.0, m=transported, numItermax=iterations) for cost in costs])
    return plans.clamp(min=torch.finfo(plans.dtype).tiny).log().reshape(kernel.shape)


def _through_the_minimum(gradient: Tensor, kernel: Tensor, log_plan: Tensor, *, balanced: bool) -> Tensor:
    """The gradient with respect to the kernel −C/ε, given that with respect to log π = −C/ε + f + g + h at the minimum.

    There f_i = 0 or Σ_j π_ij = 1/n, g_j = 0 or Σ_i π_ij = 1/m, and Σ π = s. With G the gradient given, it is
    G + π ⊙ (λ_i + μ_j + ν), where λ and μ of the marginals that bind, and ν, make its sums over these rows, over these
    columns and over all vanish: a symmetric system of size n + m + 1, reduced to m + 1 as the block of λ is diagonal.

    The system is positive semi-definite, and singular or nearly so where the multipliers are not unique: for s = 1, and
    for pairs that share no mass with others. A multiple of the identity is added, well above the rounding: the
    factorisation does not fail, and what is undetermined stays small, where it does not matter. A plan that has not
    converged is taken for the minimum under the marginals that it has.
    """
    plan = log_plan.exp()
    columns = plan.shape[-1]
    rounding = torch.finfo(plan.dtype).eps
    rows_bind, columns_bind = _binding(log_plan - kernel, balanced=balanced)
    row_shares = rows_bind / plan.sum(-1, keepdim=True).clamp(min=rounding)
    shares = plan * row_shares
    laplacian = torch.diag_embed(plan.sum(-2)) - plan.mT @ shares
    basis = F.pad(torch.diag_embed(columns_bind.squeeze(-2)), (0, 1), value=columns**-0.5)  # μ of those that bind, ν
    system = basis.mT @ laplacian @ basis
    system.diagonal(dim1=-2, dim2=-1).add_(16 * rounding * (columns + 1) / columns)
    row_sums = gradient.sum(-1, keepdim=True)
    residual = gradient.sum(-2).unsqueeze(-1) - shares.mT @ row_sums
    factor = torch.linalg.cholesky_ex(system).L
    of_columns = basis @ torch.cholesky_solve(basis.mT @ residual, factor)
    of_rows = row_shares * row_sums - shares @ of_columns
    return gradient - plan * (of_rows + of_columns.mT)


def _binding(multipliers: Tensor, *, balanced: bool) -> tuple[Tensor, Tensor]:
    """Marginals that bind, 1 or 0: rows (..., n, 1) and columns (..., 1, m), from f + g + h (..., n, m).

    Below full mass some f_i and some g_j are 0, the largest; the others are negative, and their marginals bind.
    """
    f, g = multipliers.amax(-1, keepdim=True), multipliers.amax(-2, keepdim=True)
    if balanced:
        return torch.ones_like(f), torch.ones_like(g)
    least = f.amax(-2, keepdim=True) - torch.finfo(f.dtype).eps ** 0.5
    return (f < least).to(f.dtype), (g < least).to(g.dtype)


def _widest(values: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return values if values.device.type == "mps" else values.double()


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(mass: float, epsilon: float, iterations: int, solver: str) -> None:
    if solver not in ("log", "pot"):
        raise ValueError(f"solver must be 'log' or 'pot', not {solver!r}")
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], not {mass}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
