"""The body mask finds the body, and is never empty."""

import numpy as np
import pytest
from scipy import ndimage

from nnssl_plugin.intake.body_mask import _fill_slices, body_mask


def share_equal(mask, truth):
    return (mask.astype(bool) == truth).mean()


def two_balls(shape=(40, 30, 20)):
    grid = np.indices(shape).transpose(1, 2, 3, 0)
    left = np.linalg.norm(grid - [12, 15, 10], axis=-1) < 7
    right = np.linalg.norm(grid - [28, 15, 10], axis=-1) < 6
    return left, right


@pytest.mark.parametrize("scale", [1e-3, 1.0, 112 / 100, 1.7e4])
def test_mr_body_is_found_at_any_intensity_scale(scale):
    left, right = two_balls()
    array = ((left | right) * 100.0 + np.random.default_rng(0).uniform(0, 10, left.shape)) * scale
    assert share_equal(body_mask(array, np.eye(4), modality="MR"), left | right) > 0.999


def test_outliers_do_not_move_the_threshold():
    left, right = two_balls()
    array = (left | right) * 100.0
    array[0, 0, 0] = 1.7e6
    mask = body_mask(array, np.eye(4), modality="MR")
    assert share_equal(mask, left | right) > 0.999


def test_bright_fat_and_a_hot_bladder_leave_the_rest_of_the_body_in():
    """Otsu's threshold would cut the body at 30, for it lies nearer to air than to what is bright."""
    left, right = two_balls()
    noise = np.random.default_rng(1).uniform(0, 3, left.shape)
    fat = ndimage.binary_erosion(left | right, iterations=2)
    np.testing.assert_array_equal(
        body_mask((left | right) * 30 + fat * 170 + noise, np.eye(4), modality="MR"), left | right
    )
    hot = (left | right) * 1.0
    hot[11:14, 14:17, 9:12] = 200
    np.testing.assert_array_equal(body_mask(hot + noise / 100, np.eye(4), modality="PET"), left | right)


def test_an_image_without_air_is_taken_whole():
    tissue = np.random.default_rng(0).normal(100, 20, (20, 20, 20)).clip(1)
    tissue[5:8, 5:8, 5:8] = 2
    assert body_mask(tissue, np.eye(4), modality="MR").all()
    assert body_mask(tissue, np.eye(4), modality="CT").all()


def test_holes_are_filled_and_specks_dropped():
    left, right = two_balls()
    array = np.where(left | right, 100.0, 0.0)
    array[12, 15, 10] = 0.0
    array[1, 1, 1] = 100.0
    np.testing.assert_array_equal(body_mask(array, np.eye(4), modality="MR"), left | right)


def test_lungs_that_leave_the_volume_are_filled_in_axial_slices_of_any_storage():
    """A tube of air through a CT cylinder, open at both ends: filled where slices are axial."""
    cylinder = np.linalg.norm(np.indices((20, 20, 10))[:2].transpose(1, 2, 3, 0) - 9.5, axis=-1) < 8
    array = np.where(cylinder, 40.0, -1000.0)
    array[8:12, 8:12, :] = -900.0
    np.testing.assert_array_equal(body_mask(array, np.eye(4), modality="CT"), cylinder)
    sagittal = np.array([[0, 0, 1.0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # stored as (A, S, R)
    stored = array.transpose(1, 2, 0)
    np.testing.assert_array_equal(body_mask(stored, sagittal, modality="CT"), cylinder.transpose(1, 2, 0))


def test_ct_keeps_fat_and_drops_air():
    array = np.full((10, 10, 10), -1000.0)
    array[2:8, 2:8, 2:8] = -100.0
    array[4:6, 4:6, 4:6] = 1500.0
    np.testing.assert_array_equal(body_mask(array, np.eye(4), modality="CT"), array > -500)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_mask_is_never_empty(modality):
    array = np.full((6, 7, 8), -2000.0)
    array[3, 3, 3] = -1500.0  # below every threshold, and a share that the percentiles cut off
    mask = body_mask(array, np.eye(4), modality=modality)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(np.argwhere(mask), [[3, 3, 3]])


def test_mask_is_the_same_twice_and_one_region_of_noise_is_no_crash():
    array = np.random.default_rng(3).normal(size=(9, 10, 11))
    first = body_mask(array, np.eye(4), modality="MR")
    np.testing.assert_array_equal(first, body_mask(array.copy(), np.eye(4), modality="MR"))
    sizes = np.bincount(ndimage.label(first)[0].ravel())[1:]
    assert sizes.min() >= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(7, 9, 11), (1, 6, 5), (4, 1, 1)])
def test_holes_are_filled_slice_by_slice(axis, shape):
    mask = np.random.default_rng(axis).random(shape) < 0.6
    expected = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(mask, axis, 0)])
    np.testing.assert_array_equal(_fill_slices(mask, axis), np.moveaxis(expected, 0, axis))
