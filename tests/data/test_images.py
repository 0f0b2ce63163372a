"""Images of a folder: found by nnU-Net's names, preprocessed as nnU-Net does, refused with a reason."""

import nibabel
import numpy as np
import pytest
from fake_classifier import inference_plan
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnssl_plugin.data.images import UnusableCase, find_images, read_image
from nnssl_plugin.errors import UserError


def write(path, array=None, spacing=(1.0, 1.0, 1.0)):
    array = np.random.default_rng(0).normal(size=(9, 11, 7)) if array is None else array
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.diag([*spacing, 1])), path)
    return path


def read(files, *, channels=1, segmentation=None, **plan):
    manager = PlansManager(inference_plan(channels=channels, **plan))
    configuration = manager.get_configuration(next(iter(manager.plans["configurations"])))
    dataset_json = {"channel_names": {str(c): f"MR{c}" for c in range(channels)}, "labels": {"background": 0, "b": 1}}
    return read_image(
        tuple(files), plans=manager, configuration=configuration, dataset_json=dataset_json, segmentation=segmentation
    )


def test_files_are_grouped_by_case_in_the_order_of_the_channels(tmp_path):
    for name in ("b_0001", "b_0000", "a_0000", "a_b_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._b_0000.nii.gz").touch()
    cases, left_out = find_images(tmp_path, ".nii.gz")
    assert {case: [p.name[-11:-7] for p in files] for case, files in cases.items()} == {
        "a": ["0000"],
        "a_b": ["0000"],
        "b": ["0000", "0001"],
    }
    assert left_out == {}


def test_files_with_other_names_are_left_out_with_a_reason(tmp_path):
    for name in ("a_0000", "b_0001", "scan"):
        (tmp_path / f"{name}.nii.gz").touch()
    cases, left_out = find_images(tmp_path, ".nii.gz")
    assert list(cases) == ["a"]
    assert "one is missing" in left_out["b"] and "_0000.nii.gz" in left_out["scan.nii.gz"]


def test_a_folder_without_such_images_says_what_it_holds(tmp_path):
    (tmp_path / "a_0000.mha").touch()
    with pytest.raises(UserError, match=r"holds no \.nii\.gz file; it holds: \.mha"):
        find_images(tmp_path, ".nii.gz")
    with pytest.raises(UserError, match="no folder"):
        find_images(tmp_path / "nowhere", ".nii.gz")


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_case_is_preprocessed_as_nnunet_does(tmp_path, dimensions):
    files = [
        write(
            tmp_path / f"a_000{c}.nii.gz", np.random.default_rng(c).normal(size=(9, 11, 7)) + 5, spacing=(1.0, 2.0, 1.5)
        )
        for c in range(2)
    ]
    plan = {"dimensions": dimensions, "transpose": (1, 0, 2)}
    found = read(files, channels=2, **plan)
    manager = PlansManager(inference_plan(channels=2, **plan))
    configuration = manager.get_configuration("2d" if dimensions == 2 else "3d_fullres")
    expected, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(f) for f in files], None, manager, configuration, {"labels": {"background": 0}}
    )
    np.testing.assert_array_equal(found.data, expected)
    assert found.spacing == ((2.0, 1.0, 1.0) if dimensions == 2 else (1.0, 1.0, 1.0))
    assert found.segmentation is None and found.warnings == ()


def test_a_segmentation_goes_the_same_way(tmp_path):
    labels = np.zeros((9, 11, 7))
    labels[2:5, 3:6, 1:4] = 1
    image = write(tmp_path / "a_0000.nii.gz")
    found = read([image], segmentation=write(tmp_path / "a.nii.gz", labels))
    assert (found.segmentation[0] > 0).sum() == 27 and found.segmentation.shape[1:] == found.data.shape[1:]
    with pytest.raises(UnusableCase, match="differ in size"):
        read([image], segmentation=write(tmp_path / "b.nii.gz", labels[:-1]))


def test_a_coloured_picture_is_one_file_of_three_channels(tmp_path):
    io.imsave(tmp_path / "a_0000.png", np.random.default_rng(0).integers(256, size=(20, 24, 3)).astype(np.uint8))
    found = read([tmp_path / "a_0000.png"], channels=3, dimensions=2, reader="NaturalImage2DIO")
    assert found.data.shape == (3, 1, 20, 24)
    with pytest.raises(UnusableCase, match="it has 3 channels, the model reads 1: MR0"):
        read([tmp_path / "a_0000.png"], channels=1, dimensions=2, reader="NaturalImage2DIO")


def test_what_training_would_refuse_is_refused(tmp_path):
    broken = np.ones((9, 11, 7))
    with pytest.raises(UnusableCase, match="constant"):
        read([write(tmp_path / "a_0000.nii.gz", broken)])
    broken[0, 0, :3] = (np.nan, np.inf, 2)
    with pytest.raises(UnusableCase, match="2 voxels are NaN or infinite"):
        read([write(tmp_path / "a_0000.nii.gz", broken)])
    whole = write(tmp_path / "b_0000.nii.gz")
    whole.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(UnusableCase, match="cannot be read"):
        read([whole])
    with pytest.raises(UnusableCase, match="it has 1 channels, the model reads 2"):
        read([write(tmp_path / "c_0000.nii.gz")], channels=2)


def test_channels_of_different_size_are_refused(tmp_path):
    with pytest.raises(UnusableCase, match="cannot be read"):
        read([write(tmp_path / "a_0000.nii.gz"), write(tmp_path / "a_0001.nii.gz", np.ones((5, 5, 5)))], channels=2)


def test_voxels_of_another_size_than_in_training_are_told(tmp_path):
    found = read([write(tmp_path / "a_0000.nii.gz", spacing=(1.0, 1.0, 2.5))])
    assert "2.5 x 1 x 1 mm" in found.warnings[0] and "1 x 1 x 1 mm (median)" in found.warnings[0]


def test_colour_and_other_units_are_named(tmp_path):
    colour = np.zeros((9, 11, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colour["R"][4:] = 90
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "c_0000.nii.gz")
    with pytest.raises(UnusableCase, match="cannot be read"):
        read([tmp_path / "c_0000.nii.gz"])
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(9, 11, 7)), np.diag([1000.0, 1000, 1000, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "m_0000.nii.gz")
    with pytest.raises(UnusableCase, match=r"unit of length of 0\.001 mm"):
        read([tmp_path / "m_0000.nii.gz"])
    assert read([tmp_path / "m_0000.nii.gz"], reader="SimpleITKIO").data.shape == (1, 7, 11, 9)  # ITK converts it


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("change", [np.diag([-1.0, 1, 1, 1]), np.eye(4) + np.eye(4, k=3) * 9])
def test_a_segmentation_of_another_place_is_refused(tmp_path, reader, change):
    labels = np.zeros((9, 11, 7), dtype=np.uint8)
    labels[2:5] = 1
    nibabel.save(nibabel.Nifti1Image(labels, change), tmp_path / "a.nii.gz")
    with pytest.raises(UnusableCase, match="does not lie on it"):
        read([write(tmp_path / "a_0000.nii.gz")], segmentation=tmp_path / "a.nii.gz", reader=reader)


def test_an_absent_channel_is_zeros_and_no_constant_image(tmp_path):
    zeros = np.zeros((9, 11, 7))
    files = [write(tmp_path / "a_0000.nii.gz", zeros), write(tmp_path / "a_0001.nii.gz")]
    assert not read(files, channels=2).data[0].any()
    with pytest.raises(UnusableCase, match="constant image"):
        read([write(tmp_path / "a_0000.nii.gz", zeros), write(tmp_path / "a_0001.nii.gz", zeros)], channels=2)
    with pytest.raises(UnusableCase, match="constant image"):
        read([write(tmp_path / "a_0000.nii.gz", zeros + 1), write(tmp_path / "a_0001.nii.gz")], channels=2)
