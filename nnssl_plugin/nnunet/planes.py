"""Anatomical planes: which axis of a stored image is the normal of a plane, and in which direction it runs."""

import nibabel
import numpy as np

PLANES = ("coronal", "sagittal", "axial")
"""Order of the paper's plane index i (Med3DInsight, section III-C: coronal is i = 0)."""

RAS_AXIS = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The axis of an image in RAS orientation that is normal to the plane: sagittal slices are stacked left to right."""


def stored_axis(affine: np.ndarray, plane: str) -> tuple[int, bool]:
    """The axis of an image as stored that is normal to an anatomical plane.

    Args:
        affine: (4, 4) voxel-to-world matrix of the stored image in RAS+ mm (the convention of nibabel).
        plane: one of :data:`PLANES`.

    Returns:
        the axis (0 to 2) of the stored array (i, j, k), and whether it runs against the RAS direction.
    """
    orientation = nibabel.io_orientation(affine)
    axis = int(np.flatnonzero(orientation[:, 0] == RAS_AXIS[plane])[0])
    return axis, bool(orientation[axis, 1] < 0)
