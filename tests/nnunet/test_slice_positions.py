"""A slice of the stored image is found again in nnU-Net's preprocessed case."""

import itertools

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from nnssl_plugin.nnunet.planes import PLANES, stored_axis
from nnssl_plugin.nnunet.slice_positions import slice_in_case

SHAPE = (22, 27, 31)
SPACING = (1.0, 1.5, 2.0)
ORIENTATIONS = ["RAS", "LPS", "PIR", "ASL", "SAR"]  # the last two store sagittal slices as the third or second axis


def stored_image(codes: str, path) -> nibabel.Nifti1Image:
    """An image stored with these axes, bright body in a margin of zeros."""
    rng = np.random.default_rng(3)
    data = np.zeros(SHAPE, dtype=np.float32)
    data[3:18, 4:25, 2:27] = rng.uniform(50, 100, (15, 21, 25))
    ras = nibabel.Nifti1Image(data, np.diag([*SPACING, 1.0]))
    target = nibabel.orientations.axcodes2ornt(codes)
    image = ras.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), target))
    nibabel.save(image, path)
    return image


def preprocess(path, reader, transpose, target_spacing):
    """nnU-Net's steps: read, transpose, crop, resample (DefaultPreprocessor.run_case_npy without normalisation)."""
    data, properties = reader().read_images([str(path)])
    data = data.transpose([0, *[i + 1 for i in transpose]])
    spacing = [properties["spacing"][i] for i in transpose]
    properties["shape_before_cropping"] = data.shape[1:]
    data, _, box = crop_to_nonzero(data, None)
    properties["bbox_used_for_cropping"] = box
    properties["shape_after_cropping_and_before_resampling"] = data.shape[1:]
    shape = compute_new_shape(data.shape[1:], spacing, target_spacing)
    return resample_data_or_seg_to_shape(data, shape, spacing, target_spacing, order=1), properties


@pytest.mark.parametrize(
    "codes, transpose, reader, plane",
    [
        *itertools.product(ORIENTATIONS, [(0, 1, 2), (2, 0, 1)], [NibabelIOWithReorient], PLANES),
        *itertools.product(["RAS", "ASL"], [(0, 1, 2), (1, 2, 0)], [NibabelIO, SimpleITKIO], PLANES),
    ],
)
def test_marked_slice_is_where_it_is_said_to_be(codes, transpose, reader, plane, tmp_path):
    path = tmp_path / "image.nii.gz"
    image = stored_image(codes, path)
    axis, _ = stored_axis(image.affine, plane)
    voxels = np.asarray(image.dataobj).copy()
    index = int(np.flatnonzero(voxels.any(tuple({0, 1, 2} - {axis})))[5])
    marked = [slice(None)] * 3
    marked[axis] = index
    voxels[tuple(marked)] = np.where(voxels[tuple(marked)] > 0, 1000, 0)
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)

    target_spacing = [0.8, 1.1, 1.3]
    case, properties = preprocess(path, reader, transpose, target_spacing)
    case_axis, coordinate = slice_in_case(
        index, plane, properties=properties, transpose_forward=transpose, case_shape=case.shape[1:]
    )

    profile = case[0].max(tuple({0, 1, 2} - {case_axis}))
    weights = np.clip(profile - 150, 0, None)
    found = (weights * np.arange(len(weights))).sum() / weights.sum()
    assert coordinate == pytest.approx(found, abs=0.3)
