"""Body masks: the one label of an unlabelled scan, so that stock planning, normalisation and sampling work on it."""

import numpy as np
from scipy import ndimage

from nnssl_plugin.nnunet.planes import stored_axis

BODY_HU = -500.0
"""Between air (-1000 HU) and tissue (-100 HU and more)."""
COMPONENT_SHARE = 0.1
"""Components smaller than this share of the largest are dropped; both of two legs stay."""
ROBUST_PERCENTILES = (2, 98)
AIR_SHARE = 0.1
"""Of the range between these percentiles, what counts as air: t = t2 + 0.1 (t98 - t2), the first step of BET (Smith
2002). Otsu's threshold would part bright fat, or a bladder full of tracer, from the rest of the body."""
LEAST_AIR = 0.05
"""Share of the volume; where less would be outside, there is no air, and the dark voxels are tissue."""


def body_mask(array: np.ndarray, affine: np.ndarray, *, modality: str) -> np.ndarray:
    """The body in a scan: thresholded, largest components kept, holes filled in axial slices.

    CT is cut at :data:`BODY_HU`. Everything else is cut at :data:`AIR_SHARE` of the range between
    :data:`ROBUST_PERCENTILES`. Where that leaves nothing, all voxels above the minimum are taken; where it leaves less
    than :data:`LEAST_AIR` outside, the whole image.

    Args:
        array: (I, J, K) finite intensities of any range, not constant.
        affine: (4, 4) voxel-to-world matrix in RAS mm.
        modality: ``CT`` (intensities in HU) or another.

    Returns:
        (I, J, K) uint8, 1 inside the body; at least one voxel is 1.
    """
    foreground = array > BODY_HU if modality == "CT" else _above_air(array)
    if not foreground.any():
        return (array > array.min()).astype(np.uint8)
    axis, _ = stored_axis(affine, "axial")
    body = _fill_slices(_large_components(foreground), axis)
    return (body if body.mean() <= 1 - LEAST_AIR else np.ones(body.shape)).astype(np.uint8)


def _above_air(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, ROBUST_PERCENTILES)
    return array > low + AIR_SHARE * (high - low) if low < high else np.zeros(array.shape, dtype=bool)


def _large_components(foreground: np.ndarray) -> np.ndarray:
    components, _ = ndimage.label(foreground)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0  # the background
    return (sizes >= COMPONENT_SHARE * sizes.max())[components]


def _fill_slices(mask: np.ndarray, axis: int) -> np.ndarray:
    """Airways leave the volume at its border, so a hole in 3D is rare; in a slice, lungs and sinuses are holes.

    A hole is a piece of the outside that reaches no edge of its slice; pieces are joined within slices alone, so that
    all slices are labelled at once.
    """
    in_slice = ndimage.generate_binary_structure(3, 1)
    np.moveaxis(in_slice, axis, 0)[[0, 2]] = False
    pieces, number = ndimage.label(~mask, in_slice)
    reaching = np.zeros(number + 1, dtype=bool)
    for other in {0, 1, 2} - {axis}:
        reaching[np.take(pieces, (0, -1), axis=other)] = True
    return mask | ~reaching[pieces]
