"""The images of a case on one grid: recognised, turned, resampled where asked, or refused."""

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform
from nibabel.processing import resample_from_to

from nnssl_plugin.io.refusals import RejectedScan
from nnssl_plugin.io.scans import Scan, read_volume
from nnssl_plugin.nnunet.geometry import largest_shift

ANOTHER_GRID = "another grid: "
"""Begins the reason of a case whose images do not lie on one; resampling mends it."""
SHIFT = 0.1
"""Of the smallest voxel edge: images whose corners lie nearer to each other share their grid."""
EQUAL_MM = 1e-4
"""Corners that lie nearer need not be written anew to be one for nnU-Net."""
MOST_LABELS = 255
"""Highest value of a segmentation."""


@dataclass(frozen=True)
class Aligned:
    """An image on the grid of its case."""

    array: np.ndarray  # (I, J, K) float32
    image: nibabel.Nifti1Image
    as_stored: bool  # whether the file itself lies there, to the last digit that counts


def aligned(scan: Scan, like: Scan, *, names: tuple[str, str], resample: bool) -> Aligned:
    """An image on the grid of another: as it is, with its axes turned, or resampled.

    Args:
        scan: the image.
        like: an image that lies on the grid.
        names: of both, for the message.
        resample: whether an image on another grid is interpolated (trilinear; outside of it: its lowest value).

    Raises:
        RejectedScan: it lies on another grid, and is not to be resampled.
    """
    turned = _turned(scan.image, like.image.affine)
    if turned.shape == like.array.shape:
        shift = largest_shift(turned.affine, like.image.affine, turned.shape[::-1])
        if turned is scan.image and shift <= EQUAL_MM:
            return Aligned(scan.array, scan.image, as_stored=True)
        if shift <= SHIFT * min(like.spacing):
            moved = type(turned)(turned.dataobj, like.image.affine, turned.header)
            return Aligned(moved.get_fdata(dtype=np.float32, caching="unchanged"), moved, as_stored=False)
    if not resample:
        raise RejectedScan(f"{ANOTHER_GRID}{names[0]} {_grid(scan)}, {names[1]} {_grid(like)}")
    array = _resampled(scan, like, order=1, outside=float(scan.array.min()))
    return Aligned(array, header_like(like, array), as_stored=False)


def read_labels(path: Path, like: Scan, *, resample: bool) -> np.ndarray:
    """A segmentation (I, J, K) uint8 on the grid of an image; resampled, every voxel takes the nearest label.

    Raises:
        RejectedScan: it cannot be read, lies on another grid, or its values are no labels.
    """
    array, affine = read_volume(path)
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > MOST_LABELS or (array != np.rint(array)).any():
        raise RejectedScan(f"no segmentation: its values are no whole numbers from 0 to {MOST_LABELS}")
    labels = Scan(array, nibabel.Nifti1Image(array, affine))
    try:
        return aligned(labels, like, names=("the segmentation", "the image"), resample=False).array.astype(np.uint8)
    except RejectedScan:
        if not resample:
            raise
    return _resampled(labels, like, order=0, outside=0.0).astype(np.uint8)


def header_like(scan: Scan, array: np.ndarray) -> nibabel.Nifti1Image:
    """An array with the header of a scan, so that both have the same geometry to the last bit."""
    header = scan.image.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"], header["cal_min"] = 0, 0
    header.extensions.clear()
    return type(scan.image)(array, scan.image.affine, header)


def _turned(image: nibabel.Nifti1Image, affine: np.ndarray) -> nibabel.Nifti1Image:
    """The image with its axes permuted and flipped as those of ``affine``; itself where they are already."""
    turn = ornt_transform(io_orientation(image.affine), io_orientation(affine))
    return image.as_reoriented(turn)


def _resampled(scan: Scan, like: Scan, *, order: int, outside: float) -> np.ndarray:
    image = nibabel.Nifti1Image(scan.array, scan.image.affine)
    moved = resample_from_to(image, (like.array.shape, like.image.affine), order=order, cval=outside)
    return np.asarray(moved.dataobj, dtype=np.float32)


def _grid(scan: Scan) -> str:
    size, spacing = (" x ".join(f"{value:.4g}" for value in values) for values in (scan.array.shape, scan.spacing))
    corner = ", ".join(f"{value:.4g}" for value in scan.image.affine[:3, 3])
    return f"has {size} voxels of {spacing} mm from ({corner}) mm"
