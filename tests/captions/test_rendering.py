"""How slices look: the anatomical slice however it is stored, square pixels, and a window as a radiologist sets it."""

import io

import nibabel
import numpy as np
import pytest
from PIL import Image

from nnssl_plugin.captions.rendering import Volume, grey_limits, png, slice_image, viewed_slice
from nnssl_plugin.captions.triplets import slice_facts
from nnssl_plugin.data.triplets import Triplet
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS

ORIENTATIONS = ["RAS", "LPS", "PSR", "ASL", "IPR", "SRA"]
PLANES_OF = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}


def stored(ras_array, ras_affine, codes):
    """The same volume, stored in another orientation."""
    image = nibabel.Nifti1Image(ras_array, ras_affine)
    ras = nibabel.orientations.axcodes2ornt("RAS")
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(codes)))
    return Volume(turned.get_fdata(dtype=np.float32), turned.affine)


def draft(plane, index, volume, **fields):
    axis = [PLANES_OF[c] for c in nibabel.aff2axcodes(volume.affine)].index(plane)
    return Triplet("c", plane, index, volume.array.shape[axis], **{"text": "", "captioner": "t", **fields})


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("plane", PLANES)
def test_slice_is_the_anatomical_one_however_the_volume_is_stored(codes, plane):
    """The picture of an anatomical slice does not depend on the storage, and is the slice cut out of RAS by hand."""
    ras = np.random.default_rng(0).uniform(size=(5, 6, 7)).astype(np.float32)
    volume = stored(ras, np.eye(4), codes)
    position = 2
    axis = [PLANES_OF[code] for code in codes].index(plane)
    index = position if codes[axis] in "RAS" else volume.array.shape[axis] - 1 - position
    cut = np.take(ras, position, axis=RAS_AXIS[plane])
    expected = np.empty(cut.shape[::-1])
    for row, column in np.ndindex(*expected.shape):  # rows run down from S (axial: A), columns from R (sagittal: A)
        expected[row, column] = cut[cut.shape[0] - 1 - column, cut.shape[1] - 1 - row]
    expected = np.rint((expected - cut.min()) / (cut.max() - cut.min()) * 255)
    picture = slice_image(volume, draft(plane, index, volume))
    assert picture.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_allclose(picture[..., channel], expected, atol=1)
    facts = slice_facts(volume, draft(plane, index, volume), modality="MR")
    assert facts.position == pytest.approx(position / (ras.shape[RAS_AXIS[plane]] - 1))


def test_landmarks_lie_where_a_radiologist_expects_them():
    ras = np.zeros((9, 9, 9), dtype=np.float32)
    ras[8, 4, 4], ras[4, 8, 4], ras[4, 4, 8] = 1, 2, 3  # right, anterior, superior
    volume = Volume(ras, np.eye(4))
    corner = {plane: slice_image(volume, draft(plane, 4, volume))[..., 0] for plane in PLANES}
    assert corner["axial"][4, 0] > 0 and corner["axial"][0, 4] == 255  # right on the left, anterior on top
    assert corner["coronal"][4, 0] > 0 and corner["coronal"][0, 4] == 255  # right on the left, superior on top
    assert corner["sagittal"][4, 0] > 0 and corner["sagittal"][0, 4] == 255  # anterior on the left


def test_pixels_become_square():
    array = np.random.default_rng(0).uniform(size=(10, 20, 6)).astype(np.float32)
    volume = Volume(array, np.diag([1.0, 0.5, 4.0, 1.0]))
    assert slice_image(volume, draft("axial", 2, volume)).shape == (20, 20, 3)  # 10 mm by 10 mm at 0.5 mm
    assert slice_image(volume, draft("coronal", 2, volume)).shape == (24, 10, 3)  # 24 mm high, 10 mm wide, 1 mm
    assert slice_image(volume, draft("sagittal", 2, volume)).shape == (48, 20, 3)
    facts = slice_facts(volume, draft("coronal", 2, volume), modality="")
    assert facts.extent_mm == pytest.approx((10, 24)) and facts.spacing_mm == pytest.approx(0.5)


def test_constant_nan_and_huge_slices_are_pictures():
    array = np.zeros((4, 4, 4), dtype=np.float32)
    array[0, 0, 1], array[1, 1, 1], array[2, 2, 2] = np.nan, 1.7e6, np.inf
    volume = Volume(array, np.eye(4))
    assert slice_image(volume, draft("axial", 0, volume)).max() == 0
    middle = slice_image(volume, draft("axial", 1, volume))
    assert middle.max() == 255 and (middle > 0).sum() == 3
    assert slice_image(volume, draft("axial", 2, volume)).max() == 0


def test_triplet_that_does_not_fit_the_image_is_refused(phantom):
    volume = Volume(phantom(), np.eye(4))
    with pytest.raises(UserError, match="counts 99 axial slices"):
        slice_image(volume, Triplet("c", "axial", 3, 99, "text", "t"))


@pytest.mark.parametrize(
    ("body_part", "low", "high"),
    [("", -160, 240), ("brain", 0, 80), ("the head of an adult", 0, 80), ("Lung", -1350, 150), ("spine", -500, 1300)],
)
def test_ct_is_seen_in_the_window_of_its_body_part(body_part, low, high):
    array = np.linspace(-1000, 2000, 4**3, dtype=np.float32).reshape(4, 4, 4)
    volume = Volume(array, np.eye(4))
    limits = grey_limits(volume, modality="CT", body_part=body_part)
    assert limits == (low, high)
    picture = viewed_slice(volume, draft("axial", 2, volume), limits)[..., 0]
    values = array[:, :, 2].T[::-1, ::-1]
    np.testing.assert_allclose(picture, np.clip((values - low) / (high - low), 0, 1) * 255, atol=1)


def test_a_window_of_ones_own_holds_for_every_modality():
    volume = Volume(np.zeros((2, 2, 2), np.float32), np.eye(4))
    assert grey_limits(volume, modality="CT", window=(50, 100)) == grey_limits(volume, modality="MR", window=(50, 100))


def test_mr_is_seen_between_percentiles_of_the_volume_whatever_its_outliers():
    array = np.random.default_rng(0).uniform(10, 110, size=(20, 20, 20)).astype(np.float32)
    array[3, 3, 3], array[4, 4, 4], array[5, 5, 5] = 1.7e6, np.nan, np.inf
    volume = Volume(array, np.eye(4))
    low, high = grey_limits(volume, modality="MR")
    assert 10 <= low < 11 and 109 < high <= 110
    pictures = {index: viewed_slice(volume, draft("axial", index, volume), (low, high)) for index in (3, 4, 5)}
    assert all(100 < picture.mean() < 155 for picture in pictures.values())  # min to max, slice 3 would be black
    assert pictures[4][15, 15, 0] == 0  # NaN


@pytest.mark.parametrize("array", [np.zeros((3, 3, 3)), np.full((3, 3, 3), np.nan), np.full((3, 3, 3), 7.0)])
def test_volumes_without_contrast_are_pictures(array):
    volume = Volume(array.astype(np.float32), np.eye(4))
    limits = grey_limits(volume, modality="")
    assert viewed_slice(volume, draft("coronal", 1, volume), limits).shape == (3, 3, 3)


def test_a_few_voxels_in_air_are_seen():
    array = np.zeros((20, 20, 20), np.float32)
    array[10, 10, 10] = 5
    volume = Volume(array, np.eye(4))
    assert viewed_slice(volume, draft("axial", 10, volume), grey_limits(volume, modality="PET")).max() == 255


@pytest.mark.parametrize(("shape", "size"), [((20, 40), (64, 32)), ((300, 100), (21, 64)), ((1, 500), (64, 1))])
def test_a_png_has_the_size_that_is_asked_for_keeps_the_aspect_and_carries_nothing_else(shape, size):
    picture = np.repeat(np.random.default_rng(0).integers(0, 256, size=(*shape, 1), dtype=np.uint8), 3, axis=2)
    raw = png(picture, side=64)
    image = Image.open(io.BytesIO(raw))
    assert (image.format, image.mode, image.size, image.info) == ("PNG", "L", size, {})
    assert raw == png(picture, side=64)
