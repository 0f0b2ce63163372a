"""Segmentations and images of another modality are told from scans, by names and by values."""

from pathlib import PurePath

import numpy as np
import pytest
from scipy import ndimage

from nnssl_plugin.intake.plausibility import (
    contradiction,
    is_label_like,
    named_as_another_modality,
    named_as_labels,
)


def regions(count, shape=(20, 21, 22), seed=0):
    """Labels 0 to ``count`` in smooth regions."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return np.digitize(noise, np.quantile(noise, np.linspace(0, 1, count + 2)[1:-1])).astype(np.float32)


@pytest.mark.parametrize(
    "name", ["labelsTr/a.nii.gz", "CT_mask.nii.gz", "deep/Segmentations/x/a.nrrd", "lesion-seg2.mha", "p1/GT/a.nii"]
)
def test_names_of_segmentations(name):
    assert "named as a segmentation" in named_as_labels(PurePath(name))


@pytest.mark.parametrize("name", ["unlabelled/a.nii.gz", "masked_T1.nii.gz", "segal/heroic.nii", "imagesTr/a_0000.nii"])
def test_names_that_only_hold_such_letters(name):
    assert named_as_labels(PurePath(name)) is None


@pytest.mark.parametrize(
    ("name", "modality", "contradicts"),
    [
        ("STS_002/PET_image.nii.gz", "MR", True),
        ("STS_002/PET_image.nii.gz", "PET", False),
        ("CT/patient.nii.gz", "MR", True),
        ("PET-CT/ct.nii.gz", "CT", False),
        ("PET-CT/scan.nii.gz", "CT", False),
        ("PET/T1.nii.gz", "MR", False),
        ("STS_002/MR_T1_image.nii.gz", "PET", True),
        ("mri/a.nii.gz", "CT", True),
        ("patient_t1.nii.gz", "CT", False),  # a point in time as well as a sequence
        ("CT/a.nii.gz", "noNorm", False),
        ("factory/petra.nii.gz", "MR", False),
    ],
)
def test_names_of_modalities(name, modality, contradicts):
    assert (named_as_another_modality(PurePath(name), modality) is not None) == contradicts


@pytest.mark.parametrize("count", [1, 3, 8])
def test_regions_of_whole_numbers_are_label_like(count):
    assert is_label_like(regions(count))
    assert not is_label_like(regions(count) - 1)
    assert not is_label_like(regions(count) + 0.5)


def test_every_binary_image_is_label_like_however_rough():
    assert is_label_like((np.random.default_rng(0).uniform(size=(9, 9, 9)) > 0.5) * 255)


@pytest.mark.parametrize("depth", [16, 200, 5000])
def test_images_of_few_grey_values_are_not_label_like(depth):
    rng = np.random.default_rng(1)
    body = np.pad(np.ones((14, 14, 14)), 4) * (0.5 + 0.2 * rng.normal(size=(22, 22, 22)).clip(-2, 2))
    assert not is_label_like(np.rint(body * depth))


def test_intensities_that_contradict_the_modality():
    ct = np.array([[[-1000.0, 40.0]]])
    mr = np.array([[[-3.0, 900.0]]])
    assert "looks like CT" in contradiction(ct, "MR") and "looks like CT" in contradiction(ct, "PET")
    assert "no CT in HU" in contradiction(mr, "CT")
    assert contradiction(ct, "CT") is contradiction(mr, "MR") is contradiction(ct, "noNorm") is None
