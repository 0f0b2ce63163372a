"""Slices as pictures: cut out of the stored volume, turned and scaled as a radiologist sees them.

In axial and coronal slices the patient's right is on the left side of the picture; the top is anterior (axial) or
superior (coronal, sagittal); in sagittal slices anterior is on the left. Encoders get the whole range of a slice
(:func:`slice_image`), whoever reads it gets a window (:func:`viewed_slice`).
"""

import io
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from skimage.transform import resize

from nnssl_plugin.data.triplets import TRIPLETS_FILE, Triplet
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.refusals import RejectedScan
from nnssl_plugin.io.scans import ending_of, read_volume
from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS, stored_axis

CT_WINDOWS = {
    ("brain", "head", "skull"): (40.0, 80.0),
    ("lung", "lungs"): (-600.0, 1500.0),
    ("bone", "bones", "spine"): (400.0, 1800.0),
}
"""Words of the body part → centre and width in HU, as workstations preset them."""
SOFT_TISSUE = (40.0, 400.0)
"""Centre and width in HU of every other CT."""
PERCENTILES = (0.5, 99.5)
"""Of the volume: what is black and white in everything else than CT."""
SMALLEST_RANGE = float(np.finfo(np.float32).tiny)

# axes of a RAS slice (after its normal is dropped) are ascending: sagittal (A, S), coronal (R, S), axial (R, A)
_DROPPED_AXES = {plane: tuple(axis for axis in range(3) if axis != RAS_AXIS[plane]) for plane in PLANES}


@dataclass(frozen=True)
class Volume:
    """A 3D image as stored on disk."""

    array: np.ndarray  # (I, J, K) float32
    affine: np.ndarray  # (4, 4), voxels to RAS mm


def load_volume(path: Path) -> Volume:
    """Read an image of a raw dataset as stored.

    Raises:
        UserError: it is no readable 3D volume with a position in space (2D datasets have no planes).
    """
    if ending_of(path) is None:
        raise UserError(f"{path} is no 3D volume with a position in space.", "Triplets need .nii.gz, .nrrd or .mha.")
    try:
        return Volume(*read_volume(path))
    except RejectedScan as error:
        raise UserError(f"{path}: {error}", "Mend or remove the case, then caption again.") from error


def slice_image(volume: Volume, triplet: Triplet) -> np.ndarray:
    """The slice of a triplet as encoders get it: oriented for viewing, square pixels, its range stretched to 0–255.

    Args:
        volume: the image as stored.
        triplet: gives plane and slice.

    Returns:
        (H, W, 3) uint8, three equal channels; pixels as large as the smaller voxel edge in the slice.

    Raises:
        UserError: the triplet's slice does not fit the image.
    """
    pixels = _as_viewed(volume, triplet)
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return _picture(volume, triplet.plane, pixels, float(low), float(high))


def viewed_slice(volume: Volume, triplet: Triplet, limits: tuple[float, float]) -> np.ndarray:
    """The slice of a triplet as a person or a model reads it: like :func:`slice_image`, within the limits of a window.

    Args:
        volume: the image as stored.
        triplet: gives plane and slice.
        limits: values that become black and white (see :func:`grey_limits`).

    Returns:
        (H, W, 3) uint8, three equal channels; NaN is black.

    Raises:
        UserError: the triplet's slice does not fit the image.
    """
    return _picture(volume, triplet.plane, _as_viewed(volume, triplet), *limits)


def grey_limits(
    volume: Volume, *, modality: str, body_part: str = "", window: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The values that are shown black and white, for all slices of a volume.

    Args:
        volume: the image as stored; CT in HU.
        modality: name of the channel; ``CT`` is shown in a window, everything else between percentiles.
        body_part: chooses the window of CT (:data:`CT_WINDOWS`).
        window: centre and width, in the image's values, in place of either.
    """
    if window is None and modality.casefold() == "ct":
        words = set(body_part.casefold().split())
        window = next((found for names, found in CT_WINDOWS.items() if words & set(names)), SOFT_TISSUE)
    if window is not None:
        centre, width = window
        return centre - width / 2, centre + width / 2
    finite = volume.array[np.isfinite(volume.array)]
    low, high = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
    if high <= low and finite.size:  # a volume that is air but for a few voxels
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def png(picture: np.ndarray, *, side: int) -> bytes:
    """A picture as a PNG file without metadata.

    Args:
        picture: (H, W, 3) uint8 of equal channels.
        side: length of its longer side in pixels.
    """
    grey = Image.fromarray(picture[..., 0])
    scale = side / max(grey.size)
    size = (max(round(grey.width * scale), 1), max(round(grey.height * scale), 1))
    written = io.BytesIO()
    grey.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS).save(written, "PNG")
    return written.getvalue()


def viewed_extent(volume: Volume, plane: str) -> tuple[float, float]:
    """Width and height of a slice in mm."""
    stored = [stored_axis(volume.affine, other)[0] for other in sorted(PLANES, key=RAS_AXIS.get)]
    extent = nibabel.affines.voxel_sizes(volume.affine) * volume.array.shape
    width, height = (float(extent[stored[ras_axis]]) for ras_axis in _DROPPED_AXES[plane])
    return width, height


def _as_viewed(volume: Volume, triplet: Triplet) -> np.ndarray:
    """(rows, columns): rows from superior (axial: anterior) down, columns from right (sagittal: anterior)."""
    axis, _ = stored_axis(volume.affine, triplet.plane)
    if volume.array.shape[axis] != triplet.n_slices:
        raise UserError(
            f"Case {triplet.case}: the triplet counts {triplet.n_slices} {triplet.plane} slices, "
            f"the image has {volume.array.shape[axis]}.",
            f"Delete its line in {TRIPLETS_FILE} and caption again.",
        )
    start = [slice(None)] * 3
    start[axis] = slice(triplet.slice, triplet.slice + 1)
    ras = nibabel.apply_orientation(volume.array[tuple(start)], nibabel.io_orientation(volume.affine))
    return np.squeeze(ras, axis=RAS_AXIS[triplet.plane]).T[::-1, ::-1]


def _picture(volume: Volume, plane: str, pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """(H, W, 3) uint8 with square pixels from (rows, columns); what is not finite is shown as ``low``."""
    pixels = (np.where(np.isfinite(pixels), pixels, low) - low) / max(high - low, SMALLEST_RANGE)
    width_mm, height_mm = viewed_extent(volume, plane)
    edge = min(height_mm / pixels.shape[0], width_mm / pixels.shape[1])
    shape = (max(round(height_mm / edge), 1), max(round(width_mm / edge), 1))
    pixels = resize(np.clip(pixels, 0, 1), shape, order=1, mode="edge", anti_aliasing=False, preserve_range=True)
    return np.repeat(np.rint(pixels * 255).astype(np.uint8)[..., None], 3, axis=2)
