"""Entropic partial optimal transport under a learned Mahalanobis metric (Med3DInsight, section III-D, Algorithm 1).

Shapes: ``n`` rows (volumes), ``m`` columns (slices or texts), ``d`` dimensions of an embedding; ``...`` is any batch of
independent problems. Marginals are uniform, 1/n and 1/m.
"""

import math

import torch
from torch import Tensor

from nnssl_plugin.errors import UserError

COST_EPSILON = 1e-8
"""Added under the square root of the cost, so that its gradient stays finite where two embeddings coincide."""


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


def log_partial_transport_plan(cost: Tensor, *, mass: float, epsilon: float, iterations: int) -> Tensor:
    """Logarithm of the entropic partial transport plan (Eq. 1 with the entropy's sign that makes it convex).

    π = argmin ⟨π, C⟩ + ε Σ π log π  subject to  π1 ≤ 1/n, πᵀ1 ≤ 1/m, 1ᵀπ1 = mass.

    Dykstra's iterations of Benamou et al., "Iterative Bregman projections for regularized transportation problems",
    SIAM J. Sci. Comput. 37(2), 2015, proposition 5, written for the logarithms of the three scalings: f ≤ 0 of the
    rows, g ≤ 0 of the columns, h of the total, π = exp(−C/ε + f + g + h). The total mass is exact after every
    iteration; the marginals hold in the limit. Autograd goes through the loop, and nothing is read on the host.

    Args:
        cost: (..., n, m); float16 and bfloat16 are computed in float32.
        mass: s in (0, 1], the mass to transport; 1 is balanced transport.
        epsilon: ε > 0, in units of the cost.
        iterations: number of iterations, at least 1.

    Returns:
        (..., n, m) log π, finite also where π underflows.

    Raises:
        ValueError: for mass, epsilon or iterations out of range.
    """
    _check(mass, epsilon, iterations)
    kernel = -_full_precision(cost) / epsilon
    rows, columns = kernel.shape[-2:]
    log_mass = math.log(mass)
    g = torch.zeros_like(kernel[..., :1, :])
    h = log_mass - torch.logsumexp(kernel, (-2, -1), keepdim=True)
    for _ in range(iterations):
        f = (-math.log(rows) - h - torch.logsumexp(kernel + g, -1, keepdim=True)).clamp(max=0)
        column_sums = torch.logsumexp(kernel + f, -2, keepdim=True)
        g = (-math.log(columns) - h - column_sums).clamp(max=0)
        h = log_mass - torch.logsumexp(column_sums + g, -1, keepdim=True)
    return kernel + f + g + h


def partial_transport_plan(
    cost: Tensor, *, mass: float, epsilon: float, iterations: int, solver: str = "log"
) -> Tensor:
    """Entropic partial transport plan between uniform marginals (Eq. 1).

    Args:
        cost: (..., n, m).
        mass: s in (0, 1], the mass to transport; never more than the marginals hold, so that 1 works for every n.
        epsilon: ε > 0, in units of the cost.
        iterations: number of iterations, at least 1.
        solver: ``"log"`` is :func:`log_partial_transport_plan`; ``"pot"`` runs the solver of the package POT, one
            problem at a time (slow; for comparison).

    Returns:
        (..., n, m) plan whose entries sum to ``mass``.

    Raises:
        ValueError: for an unknown solver, or mass, epsilon or iterations out of range.
        UserError: for ``solver="pot"`` where POT is not installed.
    """
    if solver == "log":
        return log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=iterations).exp()
    if solver == "pot":
        _check(mass, epsilon, iterations)
        return _pot_plan(_full_precision(cost), mass=mass, epsilon=epsilon, iterations=iterations)
    raise ValueError(f"solver must be 'log' or 'pot', not {solver!r}")


def mpot_loss(x: Tensor, y: Tensor, metric: Tensor, *, mass: float, epsilon: float, iterations: int = 100) -> Tensor:
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
        iterations: iterations of the solver.

    Returns:
        (...) losses, a scalar for (b, d), at least 0; without signal (0, zero gradient) for b = 1.

    Raises:
        ValueError: for mass, epsilon or iterations out of range, or different numbers of rows.
    """
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"x has {x.shape[-2]} rows and y has {y.shape[-2]}; pairs are needed")
    with torch.autocast(x.device.type, enabled=False):
        cost = mahalanobis_cost(_full_precision(x), _full_precision(y), _full_precision(metric))
        cost = cost / cost.amax((-2, -1), keepdim=True)
        log_plan = log_partial_transport_plan(cost, mass=mass, epsilon=epsilon, iterations=iterations)
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


def _pot_plan(cost: Tensor, *, mass: float, epsilon: float, iterations: int) -> Tensor:
    try:
        from ot import partial
    except ImportError as error:
        raise UserError(
            "The solver 'pot' needs the package POT, which is not installed.",
            'pip install "nnssl_plugin[transport]"',
        ) from error
    solve = getattr(partial, "entropic_partial_wasserstein_logscale", partial.entropic_partial_wasserstein)
    rows, columns = cost.shape[-2:]
    a = cost.new_full((rows,), 1 / rows)
    b = cost.new_full((columns,), 1 / columns)
    # POT refuses a mass above Σ 1/n, which rounding puts below 1 for some n; and its log needs a tensor
    transported = torch.stack((cost.new_tensor(mass), a.sum(), b.sum())).min()
    problems = cost.reshape(-1, rows, columns)
    plans = [solve(a, b, problem, epsilon, m=transported, numItermax=iterations) for problem in problems]
    return torch.stack(plans).reshape(cost.shape)


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(mass: float, epsilon: float, iterations: int) -> None:
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], not {mass}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
