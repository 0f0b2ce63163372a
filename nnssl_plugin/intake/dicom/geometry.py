"""Where the planes of a stack lie: their order along the normal, gaps, doubles, gantry tilt, and the affine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from nnssl_plugin.io.refusals import RejectedScan

SAME_PLACE_MM = 1e-3
"""Positions nearer than this along the normal are one."""
STEP_TOLERANCE = 0.05
"""Of the distance between planes, what one of them may lie beside its place in an even stack."""
DRIFT_VOXELS = 0.5
"""Planes that shift within their plane by more, from the first to the last, are tilted against their stack."""
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Grid:
    """An even stack of planes."""

    order: tuple[int, ...]  # of the planes, along the normal
    affine: np.ndarray  # (4, 4): (column, row, plane) → mm in LPS; sheared where the stack is tilted
    tilt_degrees: float = 0.0  # between the stack's direction and the planes' normal; 0 where they are parallel


def normal_of(orientation: ArrayLike) -> np.ndarray:
    """The planes' unit normal: the vector product of the direction along a row and that along a column."""
    row, column = np.reshape(np.asarray(orientation, dtype=np.float64), (2, 3))
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def depths(positions: ArrayLike, orientation: ArrayLike) -> np.ndarray:
    """Each position projected onto the normal, mm."""
    return np.asarray(positions, dtype=np.float64) @ normal_of(orientation)


def stack_grid(
    positions: ArrayLike, orientation: Sequence[float], spacing: Sequence[float], size: Sequence[int]
) -> Grid:
    """The grid of planes of one orientation, each at a place of its own.

    Args:
        positions: (N, 3) centres of the planes' first voxels, LPS mm, in any order; N at least 2.
        orientation: six cosines, along a row and along a column.
        spacing: mm between rows, between columns.
        size: rows, columns of a plane.

    Raises:
        RejectedScan: the directions are none, planes are missing, or their distances differ.
    """
    points, (along_row, along_column) = np.asarray(positions, dtype=np.float64), _directions(orientation)
    if min(spacing) <= 0 or not np.isfinite([*spacing, *points.ravel()]).all():
        raise RejectedScan(f"no geometry: pixel spacing {spacing[0]:g} x {spacing[1]:g} mm")
    depth = depths(points, orientation)
    order = np.argsort(depth)
    _check_even(depth[order])
    last, first = points[order[-1]], points[order[0]]
    step = (last - first) / (len(points) - 1)
    normal = normal_of(orientation)
    sideways = step - (step @ normal) * normal
    drift = np.abs([sideways @ along_row / spacing[1], sideways @ along_column / spacing[0]]) * (len(points) - 1)
    tilted = bool(drift.max() > DRIFT_VOXELS)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * spacing[1], along_column * spacing[0]
    affine[:3, 2] = step if tilted else (step @ normal) * normal
    affine[:3, 3] = first
    angle = np.degrees(np.arctan2(np.linalg.norm(sideways), step @ normal)) if tilted else 0.0
    return Grid(tuple(int(index) for index in order), affine, float(angle))


def straighten(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tilted stack on a grid at right angles: every plane is moved within itself, by linear interpolation.

    Args:
        array: (I, J, K) with axes column, row, plane.
        affine: (4, 4), of :class:`Grid`.

    Returns:
        the array, wider by as much as the planes shift and filled with its lowest value, and its affine.
    """
    axes = affine[:3, :3]
    normal = np.cross(axes[:, 0], axes[:, 1])
    normal /= np.linalg.norm(normal)
    step = (axes[:, 2] @ normal) * normal
    straight = affine.copy()
    straight[:3, 2] = step
    # voxels by which plane k lies beside plane 0, along columns and rows
    shift = np.linalg.lstsq(axes[:, :2], axes[:, 2] - step, rcond=None)[0]
    total = shift * (array.shape[2] - 1)
    before, after = np.ceil(np.maximum(-total, 0)).astype(int), np.ceil(np.maximum(total, 0)).astype(int)
    straight[:3, 3] -= axes[:, :2] @ before
    shape = (array.shape[0] + before[0] + after[0], array.shape[1] + before[1] + after[1])
    planes = [
        ndimage.affine_transform(
            array[..., k].astype(np.float32), np.ones(2), offset=-before - k * shift, output_shape=shape, order=1,
            mode="constant", cval=float(array.min()),
        )
        for k in range(array.shape[2])
    ]  # fmt: skip
    return np.stack(planes, axis=-1), straight


def _directions(orientation: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.asarray(orientation[:3], dtype=np.float64), np.asarray(orientation[3:], dtype=np.float64)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not np.allclose(lengths, 1, atol=1e-3) or abs(row @ column) > 1e-3:
        raise RejectedScan("no geometry: ImageOrientationPatient does not hold two directions at a right angle")
    return row / lengths[0], column / lengths[1]


def _check_even(depth: np.ndarray) -> None:
    steps = np.diff(depth)
    step = np.median(steps)
    if steps.min() < SAME_PLACE_MM:
        raise RejectedScan("several planes at one place")
    wholes = np.rint(steps / step)
    off = np.abs(steps - wholes * step) > STEP_TOLERANCE * step
    if (wholes > 1).any() and not off.any():
        at = int(np.argmax(wholes))
        raise RejectedScan(
            f"missing slices: {int((wholes - 1).sum())} of {int(wholes.sum()) + 1}, the first after slice "
            f"{int(np.flatnonzero(wholes > 1)[0]) + 1} (a gap of {steps[at]:.3g} mm among steps of {step:.3g} mm)"
        )
    even = depth[0] + np.arange(len(depth)) * (depth[-1] - depth[0]) / (len(depth) - 1)
    if np.abs(depth - even).max() > STEP_TOLERANCE * step:
        raise RejectedScan(f"uneven distances between slices: {steps.min():.4g} to {steps.max():.4g} mm")
