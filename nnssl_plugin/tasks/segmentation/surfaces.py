"""Overlap and surface distances of two masks.

The surface of a mask is the set of its voxels that have a face neighbour outside it (MONAI's ``get_mask_edges``); what
lies beyond the image counts as outside. Distances are Euclidean, between voxel centres, in mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects

MARGIN = 1
"""Voxels kept around the masks where they are cut out."""


@dataclass(frozen=True)
class Scores:
    """What one prediction of one structure scores; NaN in all three where prediction and reference are both empty."""

    dice: float  # 0 to 1
    hd95_mm: float  # at most the diagonal of the image, which stands where exactly one of the two is empty
    nsd: float  # 0 to 1
    n_prediction: int  # voxels
    n_reference: int


def score_overlap(
    prediction: np.ndarray, reference: np.ndarray, *, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> Scores:
    """Dice alone, which needs no MONAI; HD95 and NSD are NaN. Arguments as of :func:`score_masks`."""
    counts = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    dice = 2 * int(np.count_nonzero(prediction & reference)) / sum(counts) if any(counts) else np.nan
    return Scores(dice, np.nan, np.nan, *counts)


def score_masks(
    prediction: np.ndarray, reference: np.ndarray, *, spacing: Sequence[float], tolerance_mm: float = 1.0
) -> Scores:
    """Dice, 95th percentile of the Hausdorff distance, and normalised surface distance.

    HD95 is the larger of the two directed 95th percentiles. NSD is the share of the voxels of both surfaces that lie
    within the tolerance of the other surface (Nikolov et al., https://arxiv.org/abs/1809.04430, counted in surface
    voxels as in Seidlitz et al., https://arxiv.org/abs/2111.05408, equation 2). Both masks empty: NaN. Exactly one
    empty: Dice 0, NSD 0, and the diagonal of the image as HD95, so that a missed structure costs and can be averaged.

    Args:
        prediction: bool, (D, H, W) or (H, W).
        reference: bool, of the same shape.
        spacing: mm, one per axis.
        tolerance_mm: distance that counts as no error.
    """
    counts = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    if not any(counts):
        return Scores(np.nan, np.nan, np.nan, *counts)
    if not all(counts):
        diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
        return Scores(0.0, diagonal, 0.0, *counts)
    box = _box_of_both(prediction, reference)
    prediction, reference = prediction[box], reference[box]
    dice = 2 * int(np.count_nonzero(prediction & reference)) / sum(counts)
    there, back = surface_distances(prediction, reference, spacing=spacing)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    nsd = np.mean(np.concatenate([there, back]) <= tolerance_mm)
    return Scores(dice, float(hd95), float(nsd), *counts)


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, *, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every surface voxel to the nearest surface voxel of the other mask.

    Args:
        prediction: bool, not empty.
        reference: bool, of the same shape, not empty.
        spacing: mm, one per axis.

    Returns:
        of the prediction's surface (P,) and of the reference's (R,), float32, in mm.
    """
    from monai.metrics import utils as monai

    # score_masks has cut the masks out already, faster than MONAI's own cropping does
    edges_prediction, edges_reference = monai.get_mask_edges(prediction, reference, crop=False)
    return (
        monai.get_surface_distance(edges_prediction, edges_reference, spacing=spacing),
        monai.get_surface_distance(edges_reference, edges_prediction, spacing=spacing),
    )


def _box_of_both(prediction: np.ndarray, reference: np.ndarray) -> tuple[slice, ...]:
    (tight,) = find_objects((prediction | reference).astype(np.uint8))
    return tuple(slice(max(0, axis.start - MARGIN), axis.stop + MARGIN) for axis in tight)
