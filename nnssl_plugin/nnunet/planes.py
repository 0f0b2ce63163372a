"""Anatomical planes: which axis of a stored image is the normal of a plane, and in which direction it runs."""

from collections.abc import Mapping
from typing import Any

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
    from nibabel import io_orientation  # here: workers of a training import this module, and need no reader of files

    orientation = io_orientation(affine)
    axis = int(np.flatnonzero(orientation[:, 0] == RAS_AXIS[plane])[0])
    return axis, bool(orientation[axis, 1] < 0)


def axis_letters(plans: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Where each axis of nnU-Net's preprocessed arrays begins and ends in the patient.

    Args:
        plans: content of a plan.

    Returns:
        two letters per axis, ``"IS"`` for one that runs from inferior to superior; ``None`` where the plan's reader
        keeps the orientation that each file has.
    """
    if plans["image_reader_writer"] != "NibabelIOWithReorient":
        return None
    read = ("IS", "PA", "LR")  # RAS, as the reader returns it: (z, y, x)
    return tuple(read[axis] for axis in plans["transpose_forward"])


def grid_axes(plans: Mapping[str, Any]) -> tuple[str, ...]:
    """Which axis of an image each axis of nnU-Net's preprocessed arrays is: anatomical ones (:func:`axis_letters`)
    where they are known, else those of the reader's array, ``"z"``, ``"y"`` and ``"x"``."""
    return axis_letters(plans) or tuple("zyx"[axis] for axis in plans["transpose_forward"])
