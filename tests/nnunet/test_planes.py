"""The letters of nnU-Net's preprocessed axes, against what its reader makes of a marked image."""

import itertools

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

from nnssl_plugin.nnunet.planes import axis_letters


@pytest.mark.parametrize("transpose", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("stored", ["RAS", "LPI", "SAL"])
def test_letters_name_the_side_of_the_patient(tmp_path, transpose, stored):
    shape = (7, 8, 9)
    ends = {}
    for letter, axis, index in (("R", 0, -1), ("A", 1, -1), ("S", 2, -1), ("L", 0, 0), ("P", 1, 0), ("I", 2, 0)):
        array = np.zeros(shape, np.float32)
        array[tuple(index if a == axis else size // 2 for a, size in enumerate(shape))] = 1
        image = nibabel.Nifti1Image(array, np.eye(4))  # in RAS
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(stored)
        )
        nibabel.save(image.as_reoriented(turn), tmp_path / "a.nii.gz")
        read = NibabelIOWithReorient().read_images([str(tmp_path / "a.nii.gz")])[0][0].transpose(transpose)
        place = np.argwhere(read)[0]
        (case_axis,) = [a for a in range(3) if place[a] in (0, read.shape[a] - 1)]
        ends[case_axis, bool(place[case_axis])] = letter
    plans = {"image_reader_writer": "NibabelIOWithReorient", "transpose_forward": list(transpose)}
    assert axis_letters(plans) == tuple(ends[axis, False] + ends[axis, True] for axis in range(3))


def test_other_readers_keep_the_orientation_of_each_file():
    assert axis_letters({"image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2]}) is None
