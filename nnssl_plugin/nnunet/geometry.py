"""Where an image that nnU-Net's readers gave lies in the patient, and turning one image onto the axes of another."""

from collections.abc import Mapping
from typing import Any

import nibabel
import numpy as np

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine_of(properties: Mapping[str, Any]) -> np.ndarray | None:
    """The (4, 4) matrix from indices (x, y, z) of a reader's array (C, z, y, x) to RAS+ mm; None for pictures.

    Args:
        properties: what an nnU-Net reader returned beside the array. 2D images of ITK lie in the plane z = 0.
    """
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)
    if "sitk_stuff" not in properties:
        return None
    stuff = properties["sitk_stuff"]
    axes = len(stuff["spacing"])
    affine = np.eye(4)
    affine[:axes, :axes] = np.reshape(stuff["direction"], (axes, axes)) * np.asarray(stuff["spacing"])
    affine[:axes, 3] = stuff["origin"]
    return LPS_TO_RAS @ affine


def orientation_of(affine: np.ndarray) -> str:
    """Where the axes point, for example ``LPS``."""
    return "".join(code or "?" for code in nibabel.aff2axcodes(affine))


def turned_like(array: np.ndarray, affine: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image with its axes permuted and flipped such that they point as those of another.

    Args:
        array: (z, y, x).
        affine: (4, 4) of its indices (x, y, z).
        like: (4, 4) of the other image.

    Returns:
        array and affine; what they say of each voxel's place is the same as before.
    """
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.io_orientation(like))
    turned = nibabel.apply_orientation(array.T, turn).T
    return turned, affine @ nibabel.orientations.inv_ornt_aff(turn, array.T.shape)


def largest_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the places that two affines give a corner of an image (z, y, x)."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape[::-1]], indexing="ij")).reshape(3, -1)
    return float(np.linalg.norm((affine - other) @ np.vstack([corners, np.ones(corners.shape[1])]), axis=0).max())
