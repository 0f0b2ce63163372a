"""The contact sheet shows slices the right way round, in their proportions, with the outline of the mask."""

import itertools

import nibabel
import numpy as np
import pytest
from PIL import Image

from nnssl_plugin.intake.contact_sheet import CAPTION, EDGE, OUTLINE, thumbnail, volume_thumbnail, write_contact_sheet


def grey(image):
    return np.asarray(image).max(axis=-1)


@pytest.mark.parametrize("axes", [("R", "A", "S"), ("L", "P", "S"), ("A", "S", "R"), ("S", "L", "P")])
def test_the_patients_right_is_left_and_the_front_is_above_however_stored(axes):
    array = np.zeros((20, 16, 9), np.float32)  # along R, A, S
    array[12:18, 10:15, 4] = 1  # to the right, in front
    affine = np.diag([1.0, 1, 2, 1])
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes))
    stored = nibabel.apply_orientation(array, turn)
    stored_affine = affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)
    picture = grey(volume_thumbnail(stored, np.zeros(stored.shape), stored_affine))
    rows, columns = np.nonzero(picture > 128)
    assert rows.max() < EDGE / 2 and columns.max() < EDGE / 2


def test_proportions_are_those_in_mm():
    picture = grey(thumbnail(np.random.default_rng(0).uniform(1, 2, (10, 40)), np.zeros((10, 40)), spacing=(2, 1)))
    rows, columns = np.nonzero(picture)
    assert np.ptp(rows) == pytest.approx(EDGE / 2, abs=3) and np.ptp(columns) == pytest.approx(EDGE, abs=3)


@pytest.mark.parametrize("colour", [False, True])
def test_the_outline_of_the_mask_is_drawn(colour):
    plane, mask = np.full((EDGE, EDGE), 7.0), np.zeros((EDGE, EDGE))
    mask[20:40, 30:60] = 1
    pixels = np.asarray(thumbnail(np.dstack([plane] * 3) if colour else plane, mask))
    outline = (pixels == OUTLINE).all(axis=-1)
    expected = mask.copy()
    expected[21:39, 31:59] = 0
    np.testing.assert_array_equal(outline, expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (500, 3)])
def test_odd_shapes_give_a_square(shape):
    assert thumbnail(np.ones(shape), np.ones(shape)).size == (EDGE, EDGE)


def test_a_sheet_has_rows_of_ten_and_at_most_a_hundred(tmp_path):
    Image.new("RGB", (EDGE, EDGE), (9, 9, 9)).save(tmp_path / "a.png")
    for count, (columns, rows) in {3: (3, 1), 11: (10, 2), 130: (10, 10)}.items():
        files = itertools.islice(itertools.repeat(("case", tmp_path / "a.png")), count)
        write_contact_sheet(tmp_path / "sheet.png", list(files))
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.size == (columns * EDGE, rows * (EDGE + CAPTION))
