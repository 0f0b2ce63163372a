"""Co-registered images of one case become its channels, and those that it lacks are zeros."""

import json

import nibabel
import numpy as np
import pytest

from nnssl_plugin.data.cases import available_channels, first_channels
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.grouping import parse_modalities
from nnssl_plugin.intake.ledger import Origin, read_rows
from nnssl_plugin.intake.unlabelled import prepare_dataset

T1_T2 = ("T1=*_t1*", "T2=*_t2*")
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])


def prepare(source, specs=T1_T2, *, dataset_id=501, **options):
    modalities = parse_modalities(
        specs, **{k: options.pop(k) for k in ("labels", "resample", "cases_by") if k in options}
    )
    return prepare_dataset(source, dataset_id, "Cases", **{"modalities": modalities, "processes": 1, **options})


def read(folder, case):
    """The case as nnU-Net reads it: (C, z, y, x), and its label."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    files = sorted(str(path) for path in (folder / "imagesTr").glob(f"{case}_*"))
    image, _ = NibabelIOWithReorient().read_images(files)
    return image, NibabelIOWithReorient().read_seg(str(folder / "labelsTr" / f"{case}.nii.gz"))[0]


def reasons(summary):
    return {row.source.rsplit("/", 1)[1]: row.reason for row in summary.rejected}


def test_channels_that_a_case_lacks_are_zeros_and_told(raw, source, save, phantom, capsys):
    save("a_t1.nii.gz", seed=1)
    save("a_t2.nii.gz", seed=2)
    save("b_t2.nii.gz", seed=3)
    save("c_t1.nii.gz", seed=4)
    summary = prepare(source)
    assert summary.added == ("a", "b", "c") and summary.rejected == ()
    assert summary.absent == (("T1", 1), ("T2", 1))
    assert json.loads((summary.folder / "modalities.json").read_text()) == {"a": [0, 1], "b": [1], "c": [0]}
    content = json.loads((summary.folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "T1", "1": "T2"} and content["numTraining"] == 3
    image, label = read(summary.folder, "b")
    assert image.shape[0] == 2 and not image[0].any() and set(np.unique(label)) == {0, 1}
    np.testing.assert_array_equal(image[1], phantom(3).T)
    assert capsys.readouterr().out == ""  # nnU-Net's reader warns of affines that differ
    assert (summary.folder / "imagesTr" / "b_0001.nii.gz").is_symlink()
    again = prepare(source)
    assert (again.added, again.known) == ((), 3)
    present = available_channels(summary.folder, ["a", "b", "c"], 2)
    assert [present[case].tolist() for case in "abc"] == [[True, True], [False, True], [True, False]]
    assert first_channels(summary.folder) == {"a": 0, "b": 1, "c": 0}


def test_a_modality_that_comes_later_completes_its_case(raw, source, save):
    save("a_t1.nii.gz", seed=1)
    assert prepare(source).absent == (("T2", 1),)
    save("a_t2.nii.gz", seed=2)
    summary = prepare(source)
    assert summary.added == ("a",) and summary.absent == ()
    (source / "a_t1.nii.gz").unlink()
    summary = prepare(source)
    assert summary.absent == (("T1", 1),) and summary.missing == ()
    assert not read(summary.folder, "a")[0][0].any()


def test_an_image_that_cannot_be_used_leaves_its_channel_absent(raw, source, save, phantom):
    save("a_t1.nii.gz", seed=1)
    (source / "a_t2.nii.gz").write_bytes(b"damaged")
    save("b_t1.nii.gz", (phantom(2) > 50).astype(np.uint8))
    save("b_t2.nii.gz", seed=3)
    summary = prepare(source)
    assert summary.added == ("a", "b") and summary.absent == (("T1", 1), ("T2", 1))
    told = reasons(summary)
    assert "damaged" in told["a_t2.nii.gz"] and "segmentation" in told["b_t1.nii.gz"]
    assert prepare(source).added == ()
    save("a_t2.nii.gz", seed=5)
    assert prepare(source).added == ("a",)
    assert prepare(source, keep=["b_*"]).absent == ()


def test_axes_in_another_order_are_turned_and_another_grid_is_refused_or_resampled(raw, source, save, phantom):
    first = phantom(1)
    save("a_t1.nii.gz", first, affine=LPS)
    image = nibabel.Nifti1Image(first * 2, LPS).as_reoriented([[2, 1], [0, -1], [1, 1]])
    nibabel.save(image, source / "a_t2.nii.gz")
    save("b_t1.nii.gz", phantom(2), affine=LPS)
    save("b_t2.nii.gz", phantom(3, (10, 9, 8)), affine=np.diag([-2.0, -2.0, 4.0, 1.0]))
    summary = prepare(source)
    assert summary.added == ("a",)
    data, _ = read(summary.folder, "a")
    np.testing.assert_array_equal(data[1], 2 * data[0])
    told = reasons(summary)["b_t2.nii.gz"]
    assert "another grid: T2 has 10 x 9 x 8 voxels of 2 x 2 x 4 mm" in told and len(summary.rejected) == 2
    assert prepare(source).rejected == summary.rejected
    summary = prepare(source, resample=True)
    assert summary.added == ("b",) and summary.rejected == ()
    data, _ = read(summary.folder, "b")
    assert data.shape == (2, 16, 18, 20)
    # LPS with an even number of voxels: those of the coarse grid lie on every second of the fine one
    coarse = nibabel.Nifti1Image(phantom(3, (10, 9, 8)), np.diag([-2.0, -2.0, 4.0, 1.0]))
    turned = nibabel.as_closest_canonical(coarse).get_fdata().T
    np.testing.assert_allclose(data[1][::2, 1::2, 1::2], turned, rtol=1e-5)


def test_a_shift_of_a_tenth_of_a_voxel_is_another_grid(raw, source, save):
    save("a_t1.nii.gz", seed=1)
    for shift, added in ((0.2, ()), (0.05, ("a",))):
        affine = np.eye(4)
        affine[0, 3] = shift
        save("a_t2.nii.gz", seed=2, affine=affine)
        assert prepare(source).added == added
    image = nibabel.load(raw / "Dataset501_Cases" / "imagesTr" / "a_0001.nii.gz")
    np.testing.assert_array_equal(image.affine, np.eye(4))


def test_segmentations_become_the_labels_on_the_grid_of_the_image(raw, source, save, phantom):
    labels = ((phantom(1) > 50) + 2 * (phantom(1) < 5)).astype(np.int16)
    save("a_t1.nii.gz", seed=1, affine=LPS)
    nibabel.save(nibabel.Nifti1Image(labels, LPS).as_reoriented([[0, -1], [1, -1], [2, 1]]), source / "a_seg.nii.gz")
    save("b_t2.nii.gz", seed=2)
    save("b_seg.nii.gz", phantom(3))
    summary = prepare(source, labels=["*_seg*"])
    assert summary.added == ("a",) and "whole numbers" in reasons(summary)["b_seg.nii.gz"]
    content = json.loads((summary.folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    stored = nibabel.load(summary.folder / "labelsTr" / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(stored.dataobj), labels)
    assert {row.channel for row in read_rows(summary.folder / "provenance.csv", Origin)} == {"0", "label"}
    assert prepare(source, labels=["*_seg*"]).known == 1
    save("b_seg.nii.gz", (phantom(3) > 50).astype(np.uint8) * 4)
    assert prepare(source, labels=["*_seg*"]).added == ("b",)
    assert json.loads((summary.folder / "dataset.json").read_text())["labels"]["label_4"] == 4
    with pytest.raises(UserError, match="was made with --labels"):
        prepare(source)


def test_the_body_is_what_any_channel_shows(raw, source, phantom, save):
    left, right = np.zeros((2, 20, 18, 16), dtype=np.float32)
    left[2:8, 4:14, 4:12] = phantom(1)[2:8, 4:14, 4:12] + 100
    right[10:18, 4:14, 4:12] = phantom(2)[10:18, 4:14, 4:12] + 100
    save("a_t1.nii.gz", left)
    save("a_t2.nii.gz", right)
    label = read(prepare(source).folder, "a")[1][0].T
    np.testing.assert_array_equal(label > 0, (left > 0) | (right > 0))


def test_two_cases_with_the_same_voxels_are_one(raw, source, save):
    for case in "ab":
        save(f"{case}_t1.nii.gz", seed=1)
        save(f"{case}_t2.nii.gz", seed=2)
    summary = prepare(source)
    assert summary.added == ("a",) and len(summary.rejected) == 2
    assert all("duplicate content" in reason for reason in reasons(summary).values())


def test_other_channels_than_before_are_refused(raw, source, save):
    save("a_t1.nii.gz", seed=1)
    prepare(source)
    with pytest.raises(UserError, match="was made with --modalities T1=… T2=…"):
        prepare(source, ["T1=*_t1*", "PD=*_t2*"])
    with pytest.raises(UserError, match="--modality MR and --modalities"):
        prepare(source, modality="MR")


def test_real_cases_with_missing_modalities(raw, data_folder):
    folder = data_folder / "brain_mpmri"
    if not folder.is_dir():
        pytest.skip(f"no brain_mpmri below {data_folder}")
    summary = prepare(folder, ["T1=*t1n*", "T1CE=*t1c*", "T2=*t2w*", "FLAIR=*t2f*"], include=["BTP*", "MS-L*"])
    assert summary.absent == (("T1", 1), ("T1CE", 1)) and summary.rejected == ()
    image, label = read(summary.folder, "BTP-PGBM-006")
    assert not image[0].any() and all(channel.any() for channel in image[1:]) and 0.3 < label.mean() < 0.6
