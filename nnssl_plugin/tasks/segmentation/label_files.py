"""A prediction and its reference as read from their files, on one grid, with whole numbers, and what is odd of them."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.scans import NIFTI_ENDINGS, ending_of, nifti_unit_mm
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.geometry import affine_of, largest_shift, orientation_of, turned_like

UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, AssertionError, zlib.error, ImageFileError)
"""What nnU-Net's readers raise for damaged files and for colour."""
WHOLE = 1e-3
"""Values that are so close to whole numbers are rounded: compression and resampling leave 0.9999999 behind."""
SHIFT = 0.1
"""Of the smallest voxel edge: corners that lie farther apart than this belong to another place."""
AGAIN = "Predict the case again, from the image that the reference belongs to."


@dataclass(frozen=True)
class LabelFile:
    """A segmentation file."""

    path: Path
    array: np.ndarray  # (z, y, x) int32
    spacing: tuple[float, ...]  # mm, (z, y, x)
    affine: np.ndarray | None  # of the indices (x, y, z), RAS+ mm; None for pictures
    odd: tuple[str, ...] = ()  # what a user should know

    def values(self) -> set[int]:
        """The labels that occur."""
        low, high = int(self.array.min()), int(self.array.max())
        if high - low > 2**20:
            return set(np.unique(self.array).tolist())
        return set((np.flatnonzero(np.bincount(self.array.ravel() - low)) + low).tolist())


def read_label_file(path: Path, reader: type) -> LabelFile:
    """Read a segmentation with nnU-Net's reader of the dataset.

    Raises:
        UserError: it cannot be read, holds several channels, or values that are no labels.
    """
    try:
        array, properties = reader().read_seg(str(path))
        unit = _unit_mm(path, properties)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}", "Predict the case again, or restore the file.") from error
    if len(array) != 1:
        raise UserError(
            f"{path} holds {len(array)} channels; a segmentation holds one label per voxel.",
            "Write one channel of labels, not colours or a channel per class.",
        )
    whole, odd = _whole_numbers(array[0], path)
    affine = affine_of(properties)
    if affine is not None:
        affine = np.diag([unit, unit, unit, 1.0]) @ affine
    # headers hold single precision: 0.8 mm comes back as 0.80000001
    spacing = tuple(float(f"{size * unit:.6g}") for size in properties["spacing"])
    return LabelFile(path, whole, spacing, affine, odd)


def on_grid_of(prediction: LabelFile, reference: LabelFile) -> LabelFile:
    """The prediction on the grid of the reference: as it is, or with its axes permuted and flipped.

    Raises:
        UserError: the two differ in shape, spacing, direction or place.
    """
    odd = prediction.odd
    array, affine, spacing = prediction.array, prediction.affine, prediction.spacing
    if affine is not None and reference.affine is not None and _turnable(affine, reference.affine):
        axes = orientation_of(affine), orientation_of(reference.affine)
        if axes[0] != axes[1]:
            array, affine = turned_like(array, affine, reference.affine)
            spacing = tuple(float(f"{size:.6g}") for size in np.linalg.norm(affine[:3, :3], axis=0)[::-1])
            odd += (f"stored in another orientation than its reference ({axes[0]}, {axes[1]}): turned to it",)
    if array.shape != reference.array.shape:
        raise UserError(f"{prediction.path} has {array.shape} voxels, {reference.path} {reference.array.shape}.", AGAIN)
    if not np.allclose(spacing, reference.spacing, rtol=1e-3):
        raise UserError(
            f"{prediction.path} has a spacing of {spacing} mm, {reference.path} of {reference.spacing}.", AGAIN
        )
    if affine is not None and reference.affine is not None:
        _check_place(affine, prediction, reference)
    return LabelFile(prediction.path, array, reference.spacing, affine, odd)


def unknown_values(values: Iterable[int], known: Iterable[int]) -> list[int]:
    """Values of a file that are neither background nor one of the known labels."""
    return sorted(set(values) - set(known) - {0})


def shown_values(values: Iterable[int]) -> str:
    """The first of many values, for a message."""
    return some([str(value) for value in values])


def _unit_mm(path: Path, properties: dict) -> float:
    """nibabel, unlike ITK, leaves the header's unit of length to who reads it."""
    if "nibabel_stuff" not in properties or ending_of(path) not in NIFTI_ENDINGS:
        return 1.0
    import nibabel

    return nifti_unit_mm(nibabel.load(path).header)


def _whole_numbers(array: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds NaN or infinite values.", "Write whole numbers, one per label.")
    rounded = np.rint(array)
    off = np.abs(array - rounded)
    if off.max(initial=0) > WHOLE:
        example = float(array.ravel()[int(off.argmax())])
        raise UserError(
            f"{path} holds values between whole numbers, for example {example:.4g}: probabilities or an image, "
            "not labels.",
            "Write one whole number per voxel: its label (of probabilities the largest, or those above 0.5).",
        )
    if np.abs(rounded).max(initial=0) >= 2**31:
        raise UserError(f"{path} holds values beyond 2147483647.", "Write whole numbers, one per label.")
    odd = ("values that are not quite whole numbers were rounded",) if off.max(initial=0) > 0 else ()
    return rounded.astype(np.int32), odd


def _turnable(affine: np.ndarray, other: np.ndarray) -> bool:
    return all(np.isfinite(a).all() and abs(np.linalg.det(a[:3, :3])) > 0 for a in (affine, other))


def _check_place(affine: np.ndarray, prediction: LabelFile, reference: LabelFile) -> None:
    shift = largest_shift(affine, reference.affine, reference.array.shape)
    edges = np.linalg.norm(reference.affine[:3, :3], axis=0)
    if shift <= SHIFT * edges[edges > 0].min(initial=1.0):
        return
    origins = [", ".join(f"{value:.6g}" for value in a[:3, 3]) for a in (affine, reference.affine)]
    raise UserError(
        f"{prediction.path} does not lie where {reference.path} lies: a corner is {shift:.4g} mm away (origins "
        f"({origins[0]}) and ({origins[1]}) mm, orientations {orientation_of(affine)} and "
        f"{orientation_of(reference.affine)}).",
        f"{AGAIN} If only its header is wrong, give it the header of the reference.",
    )
