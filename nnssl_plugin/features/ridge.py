"""Ridge regression of voxels' classes on their features, from sums that grow case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 5
"""Most groups of cases of which each is left out in turn to choose λ."""
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""λ to choose from: what is added to the diagonal of the features' correlation matrix."""
DEFAULT_LAMBDA = 1.0
"""Where there is one case alone, so that none can be left out."""
CONSTANT = 1e-12
"""Channels whose variance is a smaller share of their mean square say nothing and get no weight."""


@dataclass(frozen=True)
class Readout:
    """A linear map from features (..., D) to a score for each class (..., K)."""

    weight: Tensor
    """(D, K) float64."""
    bias: Tensor
    """(K,) float64; -inf for classes that no training case has."""
    ridge: float
    """The λ that was chosen."""


class RidgeSums:
    """Weighted second moments of features and classes, in float64, from which the ridge is solved in closed form.

    Least squares onto one-hot classes, min_W Σ_i w(y_i) ‖Wᵀx̃_i − onehot(y_i)‖² + λ‖W_std‖² with x̃ = (x, 1), where
    the penalty is on standardised features and never on the bias. Only XᵀX and XᵀY are kept, of each of a few groups of
    cases, so that memory depends neither on voxels nor on cases.

    Args:
        features: D.
        class_weights: w (K,); 0 for classes that do not occur.
        groups: of cases; :meth:`solve` leaves each out in turn.
        device: where the sums are.
    """

    def __init__(self, features: int, class_weights: Tensor, *, groups: int, device: torch.device | str = "cpu"):
        self.class_weights, self.groups, self.device = class_weights.double().cpu(), groups, torch.device(device)
        size = features + 1
        self._moments = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self._targets = torch.zeros(groups, size, len(class_weights), dtype=torch.float64, device=device)

    def add(self, moments: Tensor, total: Tensor, *, label: int, group: int) -> None:
        """Add voxels of one class: Σ x̃x̃ᵀ (D + 1, D + 1) and Σ x̃ (D + 1,), the last entry being the bias's 1."""
        weight = float(self.class_weights[label])
        self._moments[group] += weight * moments
        self._targets[group, :, label] += weight * total

    def solve(self, lambdas: Sequence[float] = LAMBDAS) -> Readout:
        """The ridge at the λ whose squared error on the groups left out is smallest; with one group at the default."""
        moments, targets = self._moments.cpu(), self._targets.cpu()
        all_moments, all_targets = moments.sum(0), targets.sum(0)
        ridge = lambdas[0] if len(lambdas) == 1 else DEFAULT_LAMBDA
        if self.groups > 1 and len(lambdas) > 1:
            errors = torch.zeros(len(lambdas), dtype=torch.float64)
            for left_out, wanted in zip(moments, targets, strict=True):
                solutions = _solutions(all_moments - left_out, all_targets - wanted, lambdas)
                errors += torch.stack([_error(solution, left_out, wanted) for solution in solutions])
            ridge = lambdas[int(errors.argmin())]
        solution = _solutions(all_moments, all_targets, [ridge])[0]
        bias = solution[-1].masked_fill(self.class_weights == 0, -torch.inf)
        return Readout(solution[:-1], bias, ridge)


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights (K,) that give each class that occurs the same mass, all together 1, from voxels per class (K,)."""
    present = counts > 0
    return torch.where(present, 1 / (counts.clamp(min=1) * present.sum()), 0.0)


def _solutions(moments: Tensor, targets: Tensor, lambdas: Sequence[float]) -> list[Tensor]:
    """(D + 1, K) with the bias last, for each λ, by one eigendecomposition."""
    mass = moments[-1, -1]
    mean, share = moments[:-1, -1] / mass, targets[-1] / mass
    covariance = moments[:-1, :-1] / mass - mean[:, None] * mean
    variance = covariance.diagonal()
    known = variance > CONSTANT * moments.diagonal()[:-1] / mass
    scale = torch.where(known, variance.clamp(min=0).sqrt(), torch.inf)
    values, vectors = torch.linalg.eigh(covariance / (scale[:, None] * scale))
    projected = vectors.mT @ ((targets[:-1] / mass - mean[:, None] * share) / scale[:, None])
    found = []
    for ridge in lambdas:
        weight = vectors @ (projected / (values.clamp(min=0) + ridge)[:, None]) / scale[:, None]
        found.append(torch.cat((weight, (share - mean @ weight)[None])))
    return found


def _error(solution: Tensor, moments: Tensor, targets: Tensor) -> Tensor:
    """Σ w ‖Wᵀx̃ − onehot(y)‖² () of the voxels that the sums hold."""
    return (solution * (moments @ solution)).sum() - 2 * (solution * targets).sum() + targets[-1].sum()
