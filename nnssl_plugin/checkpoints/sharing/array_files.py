"""A checkpoint's spatial arrays as NIfTI images, which every viewer opens."""

import re
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.checkpoints.format.spatial_arrays import KNOWN_AXES, STORED_AXES, SpatialArray, resampled
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, disk_errors_in_words


def write_nifti(arrays: Mapping[str, SpatialArray], folder: str | Path) -> list[Path]:
    """Write ``NAME_CHANNEL.nii.gz`` for each volume of each array, float32, in the intensities that the network saw.

    The affine has the array's spacing, points to RAS, and puts the array's centre at the origin. Where the pretraining
    did not know the orientation of its images, the header's description says so.

    Args:
        arrays: of a checkpoint.
        folder: a folder for the files; files of these names are not replaced.

    Raises:
        UserError: when a file is there already, or cannot be written.
    """
    written = []
    for name, array in arrays.items():
        for channel, image in zip(array.names, _images(array), strict=True):
            path = Path(folder) / f"{file_name(name)}_{file_name(channel)}.nii.gz"
            if path.exists():
                raise UserError(f"{path} is there already.", "Name another folder, or remove this file.")
            with disk_errors_in_words(folder), atomic_path(path) as temporary:
                nibabel.save(image, temporary)
            written.append(path)
    return written


def file_name(text: str) -> str:
    """A name without what is no letter, number, dot, hyphen or underscore."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "array"


def _images(array: SpatialArray) -> list[nibabel.Nifti1Image]:
    known = set(array.axes) == set(KNOWN_AXES)
    turned = resampled(array, spacing_mm=_sorted_spacing(array), axes=KNOWN_AXES if known else STORED_AXES)
    spacing, size = np.array(turned.spacing_mm[::-1]), np.array(turned.grid[::-1])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (size - 1) / 2
    images = []
    for volume, scheme in zip(turned.values, turned.normalisation, strict=True):
        image = nibabel.Nifti1Image(volume.numpy().T, affine)  # (x, y, z)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = f"{scheme}; {'RAS' if known else 'orientation not known'}"[:79]
        images.append(image)
    return images


def _sorted_spacing(array: SpatialArray) -> list[float]:
    """The array's own spacing, in the order of an image's axes (z, y, x)."""
    order = KNOWN_AXES if set(array.axes) == set(KNOWN_AXES) else STORED_AXES
    return [array.spacing_mm[array.axes.index(axis)] for axis in order]
