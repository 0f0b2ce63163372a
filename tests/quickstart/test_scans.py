"""What the quickstart starts from: phantoms, or the user's scans cut down, with test cases kept out of pretraining."""

import math

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart import own_scans, scans
from nnssl_plugin.quickstart.own_scans import block_factors, coarsen
from nnssl_plugin.quickstart.scans import Selection, Setting, write_scans
from nnssl_plugin.quickstart.steps import TARGET

SHAPE = (12, 10, 8)


def save(path, array, spacing=(1.0, 1.0, 2.0), origin=(0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def image(seed, shape=SHAPE, offset=0):
    return (np.random.default_rng(seed).normal(100, 20, shape) + offset).astype(np.float32)


def segmentation(values=(1, 2), shape=SHAPE):
    labels = np.zeros(shape, np.uint8)
    for place, value in enumerate(values):
        labels[2 * place : 2 * place + 2] = value
    return labels


@pytest.fixture
def own(tmp_path):
    """Ten scans of which seven are labelled, in nnU-Net's naming for some."""
    for i in range(10):
        name = f"case{i}_0000.nii.gz" if i % 2 else f"case{i}.nii.gz"
        save(tmp_path / "images" / name, image(i))
        if i < 7:
            save(tmp_path / "labels" / f"case{i}.nii.gz", segmentation((3, 255)))
    return tmp_path


def write(folder, labels=True, **setting):
    where = Setting(str(folder / "images"), str(folder / "labels") if labels else None, **setting)
    return write_scans(folder / "quick", where)


def test_phantoms_are_written_as_a_user_would_bring_them(tmp_path):
    selection = write_scans(tmp_path, Setting())
    target = tmp_path / "nnUNet_raw" / TARGET
    assert len(list((tmp_path / "scans").glob("*.nii.gz"))) == len(selection.pretraining) == scans.UNLABELLED
    assert len(list((target / "imagesTs").iterdir())) == len(list((target / "labelsTs").iterdir())) == scans.TEST
    content = read_json(target / "dataset.json")
    assert content["numTraining"] == len(list((target / "imagesTr").iterdir())) == len(selection.training)
    assert content["labels"] == {"background": 0, **selection.labels}
    assert selection.modality == "MR" and len(selection.test) >= 4


def test_labelled_cases_are_split_and_test_cases_stay_out_of_pretraining(own):
    selection = write(own)
    assert len(selection.test) == 2 and len(selection.training) == 5
    assert set(selection.pretraining) == {f"case{i}" for i in range(10)} - set(selection.test)
    assert {p.name for p in (own / "quick" / "scans").iterdir()} == {f"{c}.nii.gz" for c in selection.pretraining}
    for path in (own / "quick" / "scans").iterdir():
        for test in (own / "quick" / "nnUNet_raw" / TARGET / "imagesTs").iterdir():
            assert not np.array_equal(nibabel.load(path).get_fdata(), nibabel.load(test).get_fdata())


def test_the_same_scans_are_split_alike(own):
    first, again = write(own), write(own)
    assert first == again == Selection.from_json(first.to_json())


def test_labels_are_numbered_in_the_order_of_their_values(own):
    selection = write(own)
    assert selection.labels == {"label_3": 1, "label_255": 2}
    target = own / "quick" / "nnUNet_raw" / TARGET
    stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(target / "labelsTs" / f"{selection.test[0]}.nii.gz")))
    np.testing.assert_array_equal(stored.T, np.array([0, 1, 2])[np.searchsorted([0, 3, 255], segmentation((3, 255)))])
    assert read_json(target / "dataset.json")["labels"] == {"background": 0, "label_3": 1, "label_255": 2}


def test_without_labels_every_scan_goes_into_pretraining(own):
    selection = write(own, labels=False)
    assert len(selection.pretraining) == 10 and not selection.test
    assert not (own / "quick" / "nnUNet_raw" / TARGET).exists()


def test_labels_inside_the_image_folder_are_no_scans(own):
    (own / "labels").rename(own / "images" / "masks")
    selection = write_scans(own / "quick", Setting(str(own / "images"), str(own / "images" / "masks")))
    assert len(selection.pretraining) + len(selection.test) == 10


def test_the_modality_is_guessed_from_air_and_said(own):
    assert write(own).modality == "MR"
    for path in (own / "images").iterdir():
        volume = nibabel.load(path)
        save(path, volume.get_fdata(dtype=np.float32) - 1000)
    selection = write(own)
    assert selection.modality == "CT"
    assert any("--modality" in note for note in selection.notes)
    assert write(own, modality="MR").modality == "MR"


def test_scans_of_two_modalities_are_noticed(own):
    save(own / "images" / "ct.nii.gz", image(50, offset=-1000))
    selection = write(own, labels=False)
    assert selection.modality == "MR"
    assert any("1 of 11 scans look like CT" in note for note in selection.notes)


def test_a_copy_of_a_test_case_under_another_name_is_left_out(own, caplog):
    test = write(own).test[0]
    source = next(p for p in (own / "images").iterdir() if p.name.startswith(test))
    save(own / "images" / "copy.nii.gz", nibabel.load(source).get_fdata(dtype=np.float32))
    selection = write(own)
    assert "copy" not in selection.pretraining
    assert "A scan is left out: it has the voxels of another." in selection.notes
    assert "copy.nii.gz is left out" in caplog.text


def test_further_channels_of_a_case_are_left_out(own, caplog):
    save(own / "images" / "case1_0001.nii.gz", image(99))
    selection = write(own)
    assert not any("0001" in case for case in selection.pretraining)
    assert any("1 further channels" in note for note in selection.notes) and "case1_0001" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: save(p, segmentation(shape=(6, 5, 4))), "another grid"),
        (lambda p: save(p, segmentation(), origin=(5, 0, 0)), "another grid"),
        (lambda p: save(p, segmentation().astype(np.float32) / 2), "whole numbers"),
        (lambda p: p.write_bytes(b"no scan"), "unreadable"),
    ],
)
def test_a_bad_segmentation_is_left_out_with_its_reason(own, spoil, reason, caplog):
    save(own / "labels" / "case8.nii.gz", segmentation())  # enough without the bad one
    save(own / "labels" / "case9.nii.gz", segmentation())
    spoil(own / "labels" / "case4.nii.gz")
    selection = write(own)
    assert "case4" not in (*selection.pretraining, *selection.test)
    assert any(reason in note and "case4" not in note for note in selection.notes)  # notes go into the report
    assert "case4.nii.gz is left out" in caplog.text


def test_too_few_labels_are_refused(own):
    for path in sorted((own / "labels").iterdir())[3:]:
        path.unlink()
    with pytest.raises(UserError, match="3 labelled scans") as error:
        write(own)
    assert "--labels" in error.value.remedy


def test_labels_that_name_no_scan_are_refused(own):
    for path in (own / "labels").iterdir():
        path.rename(path.with_name(f"seg_{path.name}"))
    with pytest.raises(UserError, match="named like a scan"):
        write(own)


def test_a_folder_without_scans_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds no scans"):
        write(tmp_path, labels=False)


def test_more_scans_than_fit_are_left_out_by_a_seeded_choice(own, monkeypatch):
    monkeypatch.setattr(own_scans, "MOST_UNLABELLED", 4)
    selection = write(own, labels=False)
    assert len(selection.pretraining) == 4
    assert any("4 of 10 unlabelled" in note for note in selection.notes)


def test_only_the_largest_labels_are_kept(own, monkeypatch):
    monkeypatch.setattr(own_scans, "MOST_LABELS", 1)
    save(own / "labels" / "case0.nii.gz", segmentation((255, 255, 3)))
    selection = write(own)
    assert selection.labels == {"label_255": 1}
    assert any("Of 2 labels" in note for note in selection.notes)


def test_a_large_scan_is_averaged_and_stays_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(own_scans, "MOST_VOXELS", 6 * 6 * 6)
    ramp = np.indices((24, 12, 7)).sum(0).astype(np.float32)
    save(tmp_path / "images" / "big.nii.gz", ramp, spacing=(0.5, 1.0, 3.0), origin=(-3, 4, 5))
    selection = write(tmp_path, labels=False)
    small = nibabel.load(tmp_path / "quick" / "scans" / "big.nii.gz")
    assert math.prod(small.shape) <= 6 * 6 * 6
    assert any("coarser" in note for note in selection.notes)
    # a linear ramp in mm is the same function of the position on either grid
    index = np.argwhere(np.ones(small.shape))
    position = nibabel.affines.apply_affine(small.affine, index)
    expected = (position - (-3, 4, 5)) / (0.5, 1.0, 3.0)
    np.testing.assert_allclose(small.get_fdata()[tuple(index.T)], expected.sum(1), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((512, 512, 200), (0.8, 0.8, 3.0)), ((2, 900, 900), (5, 0.5, 0.5)), ((48,) * 3, (1,) * 3), ((9, 5, 3), (1, 1, 1))],
)
def test_block_factors_bound_the_voxels_and_even_out_the_spacing(shape, spacing):
    factors = block_factors(shape, spacing)
    left = [n // f for n, f in zip(shape, factors, strict=True)]
    assert math.prod(left) <= own_scans.MOST_VOXELS and min(left) >= 2
    if math.prod(shape) <= own_scans.MOST_VOXELS:
        assert factors == (1, 1, 1)
    coarse = [s * f for s, f in zip(spacing, factors, strict=True) if f > 1]
    assert not coarse or max(coarse) < 2 * max(min(coarse), 1)


def test_means_over_blocks_equal_a_loop():
    array = np.random.default_rng(0).normal(size=(7, 9, 4)).astype(np.float32)
    small = coarsen(array, (3, 2, 1))
    assert small.shape == (2, 4, 4)
    for i, j, k in np.ndindex(small.shape):
        np.testing.assert_allclose(small[i, j, k], array[3 * i : 3 * i + 3, 2 * j : 2 * j + 2, k].mean(), rtol=1e-5)
