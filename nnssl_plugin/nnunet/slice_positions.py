"""Where a slice of the stored image lies in nnU-Net's preprocessed case."""

from collections.abc import Sequence

import numpy as np

from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS, stored_axis

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def slice_in_case(
    index: float, plane: str, *, properties: dict, transpose_forward: Sequence[int], case_shape: Sequence[int]
) -> tuple[int, float]:
    """Follow a slice through reorientation, transpose, crop and resampling.

    Args:
        index: slice along the stored axis of the image that is normal to ``plane`` (voxels, 0-based).
        plane: one of ``planes.PLANES``.
        properties: nnU-Net's properties of the preprocessed case.
        transpose_forward: of the plan.
        case_shape: spatial shape of the preprocessed case, in voxels.

    Returns:
        the spatial axis of the case that the slice is normal to, and the slice's continuous coordinate along it, in
        voxels with the centre of the first voxel at 0. It lies outside the case where the slice was cropped away.
    """
    affine, reoriented = _stored_affine(properties)
    axis, against_ras = stored_axis(affine, plane)
    read_axis = 2 - (RAS_AXIS[plane] if reoriented else axis)  # readers return (z, y, x)
    case_axis = list(transpose_forward).index(read_axis)
    if reoriented and against_ras:
        index = properties["shape_before_cropping"][case_axis] - 1 - index
    first = properties["bbox_used_for_cropping"][case_axis][0]
    cropped = properties["shape_after_cropping_and_before_resampling"][case_axis]
    scale = case_shape[case_axis] / cropped
    return case_axis, (index - first + 0.5) * scale - 0.5


def axes_of_planes(properties: dict, *, transpose_forward: Sequence[int]) -> dict[str, tuple[int, bool]]:
    """How a preprocessed case lies in the patient.

    Args:
        properties: nnU-Net's properties of the case.
        transpose_forward: of the plan.

    Returns:
        plane → the spatial axis of the case that is normal to it, and whether this axis runs against the RAS direction
        (right, anterior, superior). Empty for images without orientation, such as PNG.
    """
    if not {"nibabel_stuff", "sitk_stuff"} & set(properties):
        return {}
    affine, reoriented = _stored_affine(properties)
    axes = {}
    for plane in PLANES:
        axis, against_ras = (RAS_AXIS[plane], False) if reoriented else stored_axis(affine, plane)
        axes[plane] = (list(transpose_forward).index(2 - axis), against_ras)
    return axes


def _stored_affine(properties: dict) -> tuple[np.ndarray, bool]:
    """Voxel-to-world matrix of the stored image (RAS+), and whether the reader turned the image into RAS."""
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff["original_affine"]), "reoriented_affine" in stuff
    direction = np.asarray(properties["sitk_stuff"]["direction"]).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ direction @ np.diag(properties["sitk_stuff"]["spacing"])
    return affine, False
