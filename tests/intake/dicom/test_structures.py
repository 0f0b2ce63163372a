"""RTSTRUCT and SEG become labels on the grid of their image."""

import nibabel
import numpy as np
import pytest
from dicom_export import phantom, segmentation, structure_set, write_series
from pydicom.uid import generate_uid

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.structures import label_names, parse_structures
from nnssl_plugin.intake.dicom.table import LEFT_OUT, TAKEN

ORIGIN, STEP, ROWS, COLUMNS = (-30.0, -20.0, 5.0), 3.0, 1.5, 1.25  # of write_series
SHAPE = (8, 20, 24)


def labels_of(converted):
    (row,) = converted.with_status(TAKEN)
    image, labels = (nibabel.load(folder / row["scan"]) for folder in (converted.places.scans, converted.places.labels))
    assert np.array_equal(image.affine, labels.affine) and labels.get_data_dtype() == np.uint8
    return np.asarray(labels.dataobj).T


def circle(k, centre, radius, points=90):
    """A contour on slice k about a centre (x, y), mm."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)
    return np.stack([x, y, np.full(points, ORIGIN[2] + STEP * k)], axis=1)


def disc(k, centre, radius):
    """The voxels whose centres lie within a circle, drawn naively."""
    mask = np.zeros(SHAPE, dtype=bool)
    for j in range(SHAPE[1]):
        for i in range(SHAPE[2]):
            x, y = ORIGIN[0] + i * COLUMNS, ORIGIN[1] + j * ROWS
            mask[k, j, i] = np.hypot(x - centre[0], y - centre[1]) <= radius
    return mask


def test_contours_are_filled_as_a_naive_loop_does_with_holes(export, convert):
    images = write_series(export, phantom())
    centre = (-16.1, -6.3)
    contours = [circle(k, centre, 7.7) for k in (2, 3)] + [circle(3, centre, 3.2)]
    structure_set(export / "rs.dcm", images, {"Tumour": contours})
    found = labels_of(convert("MR", structures=["tumour=1"]))
    expected = disc(2, centre, 7.7) | (disc(3, centre, 7.7) & ~disc(3, centre, 3.2))
    assert np.mean(found[expected]) > 0.98 and (found > 0).sum() == pytest.approx(expected.sum(), abs=2)
    assert not found[[0, 1, 4, 5, 6, 7]].any()


def test_contours_follow_an_oblique_series(export, convert):
    row, column, normal = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].T
    normal = np.cross(row, column)
    origin = np.array([12.0, -40.0, 80.0])
    images = write_series(export, phantom(), orientation=(*row, *column), step=3 * normal, origin=origin)
    corners = [(4.6, 3.6), (12.4, 3.6), (12.4, 9.4), (4.6, 9.4)]  # columns and rows, 0.4 beyond the voxels' centres
    points = [origin + i * COLUMNS * row + j * ROWS * column + 4 * STEP * normal for i, j in corners]
    structure_set(export / "rs.dcm", images, {"A": [np.array(points)]})
    expected = np.zeros(SHAPE, dtype=np.uint8)
    expected[4, 4:10, 5:13] = 1
    assert np.array_equal(labels_of(convert("MR", structures=["A=1"])), expected)


def test_names_kinds_and_the_order_of_overlaps(export, convert):
    images = write_series(export, phantom())
    inner, outer = [circle(3, (-16, -6), 3)], [circle(3, (-16, -6), 8)]
    structure_set(
        export / "rs.dcm", images, {"Boost 2": inner, "Lung_L": outer, "Spine": outer}, kinds={"Boost 2": "GTV"}
    )
    found = labels_of(convert("MR", structures=["lung*=1", "GTV=2"]))
    assert set(np.unique(found)) == {0, 1, 2} and (found == 2).sum() < (found == 1).sum()
    assert found[3, 9, 11] == 2
    found = labels_of(convert("MR", structures=["GTV=2", "lung*=1"]))
    assert set(np.unique(found)) == {0, 1}  # the one named later covers the other


def test_a_segmentation_is_placed_by_its_geometry(export, convert):
    images = write_series(export, phantom())
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:6, 5:11, 7:13] = True
    crop = mask[1:7, 2:14, 4:20]  # on a grid of its own, and without its empty planes
    segmentation(
        export / "seg.dcm", images, {"Liver": crop, "Lesion": crop & (np.arange(16) > 6)},
        origin=(ORIGIN[0] + 4 * COLUMNS, ORIGIN[1] + 2 * ROWS, ORIGIN[2] + STEP),
    )  # fmt: skip
    found = labels_of(convert("MR", structures=["Liver=1", "Lesion=2"]))
    assert np.array_equal(found > 0, mask) and np.array_equal(found == 2, mask & (np.arange(24) > 10))


def test_a_finer_segmentation_is_sampled_at_the_voxels_of_the_image(export, convert):
    images = write_series(export, phantom())
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:5, 5:11, 7:13] = True
    fine = mask.repeat(3, axis=1).repeat(3, axis=2)  # 3 x 3 pixels about the centre of each voxel
    origin = (ORIGIN[0] - COLUMNS / 3, ORIGIN[1] - ROWS / 3, ORIGIN[2])
    segmentation(export / "seg.dcm", images, {"A": fine}, spacing=(ROWS / 3, COLUMNS / 3), origin=origin)
    assert np.array_equal(labels_of(convert("MR", structures=["A=1"])) > 0, mask)


def test_structures_are_put_on_the_series_that_they_name(export, convert):
    study = generate_uid()
    series = [write_series(export / s, phantom(), uids=(study, generate_uid())) for s in "ab"]
    structure_set(export / "rs.dcm", series[1], {"A": [circle(3, (-16, -6), 5)]})
    converted = convert("MR", structures=["A=1"])
    assert [row["folder"][-1] for row in converted.with_status(TAKEN)] == ["b"]
    assert "no structures were drawn on it" in {row["reason"] for row in converted.with_status(LEFT_OUT)}


def test_structures_without_a_series_follow_the_frame_of_reference(export, convert):
    images = write_series(export, phantom())
    structure_set(export / "rs.dcm", images, {"A": [circle(3, (-16, -6), 5)]}, referenced=False)
    assert labels_of(convert("MR", structures=["A=1"])).any()


def test_of_two_structure_sets_the_newest_counts_and_that_is_told(export, convert):
    images = write_series(export, phantom())
    structure_set(export / "z.dcm", images, {"A": [circle(2, (-16, -6), 5)]}, date="20200101")
    structure_set(export / "a.dcm", images, {"A": [circle(5, (-16, -6), 5)]}, date="20210101")
    converted = convert("MR", structures=["A=1"])
    assert labels_of(converted)[5].any() and not labels_of(converted)[2].any()
    assert any("the newest is taken" in note for note in converted.told)


def test_what_is_missing_or_beside_the_slices_is_told(export, convert):
    images = write_series(export, phantom())
    contours = [circle(1, (-16, -6), 5), circle(3, (-16, -6), 5), circle(30, (-16, -6), 5)]
    structure_set(export / "rs.dcm", images, {"A": contours})
    told = " ".join(convert("MR", structures=["A=1", "B=2"]).told)
    assert "1 contours lie outside" in told and "drawn on 2 of 3 slices" in told and "without B" in told


def test_a_damaged_structure_set_is_named_and_the_rest_goes_on(export, convert):
    images = write_series(export, phantom())
    structure_set(export / "rs.dcm", images, {"A": [circle(3, (-16, -6), 5)]})
    broken = structure_set(export / "broken.dcm", images, {"A": [circle(3, (-16, -6), 5)]})
    del (
        broken.ReferencedFrameOfReferenceSequence[0]
        .RTReferencedStudySequence[0]
        .RTReferencedSeriesSequence[0]["SeriesInstanceUID"]
    )
    broken.save_as(export / "broken.dcm", enforce_file_format=True)
    converted = convert("MR", structures=["A=1"])
    assert labels_of(converted)[3].any() and len(converted.unreadable) == 1 and "broken" in converted.unreadable[0]


def test_a_series_without_the_wanted_structure_is_refused(export, convert):
    images = write_series(export, phantom())
    structure_set(export / "rs.dcm", images, {"A": [circle(3, (-16, -6), 5)]})
    with pytest.raises(UserError, match="no structure is named B"):
        convert("MR", structures=["B=1"])


@pytest.mark.parametrize("texts", [["GTV"], ["=1"], ["A=0"], ["A=1", "B=3"], ["A=x"]])
def test_labels_have_to_be_numbers_without_a_gap(texts):
    with pytest.raises(UserError, match="--structures"):
        parse_structures(texts)


def test_labels_are_named_by_their_patterns():
    wanted = parse_structures(["*lung_l*=1", "*lung_r*=1", "GTV-1=2", "*=3"])
    assert label_names(wanted) == {"background": 0, "lung_l": 1, "GTV-1": 2, "label3": 3}
