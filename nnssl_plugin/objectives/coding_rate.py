"""The coding rate of a set of features: what keeps a representation from collapsing without negatives.

Yu et al. 2020, "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
Reduction"; Wu et al. 2025, "Simplifying DINO via Coding Rate Regularization" (SimDINO), equation 6; M3Ret, equation 4.
"""

import torch
from torch import Tensor


def coding_rate(features: Tensor, eps: float = 0.5) -> Tensor:
    """R(Z) = ½ log det(I + d / (m · ε) · ZᵀZ) of m features of width d, a scalar in float32 or float64.

    Half the logarithm of the determinant is the sum of the logarithms of the Cholesky factor's diagonal. ZᵀZ is not
    centred: of a collapsed set, whose rows are one unit vector, R is ½ log(1 + d / ε), of a single feature too, while
    centred it would be 0 for both. By Sylvester's identity the smaller of ZᵀZ (d, d) and ZZᵀ (m, m) gives the same.

    Args:
        features: Z (m, d), unit vectors in the papers; of all ranks where there are several.
        eps: ε, the distortion; SimDINO's code calls it so (0.5), M3Ret writes its square root.
    """
    m, d = features.shape
    with torch.autocast(features.device.type, enabled=False):
        z = features if features.dtype == torch.float64 else features.float()
        gram = z @ z.mT if m < d else z.mT @ z
        eye = torch.eye(len(gram), dtype=z.dtype, device=z.device)
        factor, _ = torch.linalg.cholesky_ex(eye + d / (m * eps) * gram)
        return factor.diagonal().log().sum()


def official_weight(width: int, number: int, ranks: int = 1) -> float:
    """γ = (d + N · m) / (d · N · m), with which SimDINO's code weighs the coding rate of m features on each of N ranks.

    At d = 256 and 32 features in all it is 0.035; M3Ret's equation 4 has 1.
    """
    total = ranks * number
    return (width + total) / (width * total)
