"""Generated scans: labelled, distinct, reproducible, and readable by other libraries."""

import numpy as np
import pytest
import SimpleITK
from scipy.ndimage import label

from nnssl_plugin.quickstart.phantoms import CONTRASTS, MODALITIES, head, phantom, write_heads, write_phantoms

SMALL = {"shape": (20, 24, 28), "spacing_mm": (2.0, 1.5, 1.0)}


def make(seed=0, **changes):
    return phantom(np.random.default_rng(seed), **SMALL | changes)


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 31, 23), (40, 56, 48)])
@pytest.mark.parametrize("seed", range(6))
def test_both_structures_are_present_and_lie_in_the_body(shape, seed):
    image, labels = make(seed, shape=shape)
    assert image.shape == (1, *shape) and image.dtype == np.float32
    assert labels.shape == shape and labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2}
    assert np.isfinite(image).all() and image.min() >= 0
    air = image[0, 0, 0, 0]
    assert all(np.median(image[0][labels == structure]) > 2 * air for structure in (1, 2))


@pytest.mark.parametrize(("structure", "organs"), [(1, 1), (2, 2)])
def test_an_organ_is_in_one_piece(structure, organs):
    for seed in range(5):
        _, labels = make(seed, shape=(40, 56, 48))
        pieces, count = label(labels == structure)
        largest = np.sort(np.bincount(pieces.ravel())[1:])[-organs:]
        assert largest.sum() > 0.95 * (labels == structure).sum(), count
        assert largest.min() > 0.2 * largest.max()


def test_subjects_differ_in_shape_and_intensity():
    (one, one_labels), (two, two_labels) = make(1), make(2)
    overlap = 2 * ((one_labels == 1) & (two_labels == 1)).sum() / ((one_labels == 1).sum() + (two_labels == 1).sum())
    assert 0.1 < overlap < 0.95
    assert not np.allclose(one.mean(), two.mean(), rtol=1e-3)


def test_volumes_vary_between_subjects():
    volumes = np.array([[(make(seed)[1] == structure).sum() for structure in (1, 2)] for seed in range(12)])
    variation = volumes.std(0) / volumes.mean(0)
    assert (variation > 0.1).all() and (variation < 0.5).all()


def test_channels_show_the_same_anatomy_in_another_contrast():
    image, labels = make(channels=3)
    alone, alone_labels = make(channels=1)
    assert image.shape[0] == 3
    np.testing.assert_array_equal(labels, alone_labels)
    np.testing.assert_array_equal(image[0], alone[0])
    # structure 1 is darker than structure 2 in the first contrast and brighter in the second
    sign = [np.sign(np.median(c[labels == 1]) - np.median(c[labels == 2])) for c in image[:2]]
    assert sign == [-1, 1]


def test_the_same_anatomy_is_sampled_whatever_the_spacing_unit():
    image, labels = make()
    scaled, scaled_labels = make(spacing_mm=(4.0, 3.0, 2.0))
    np.testing.assert_array_equal(labels, scaled_labels)
    np.testing.assert_allclose(image, scaled, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"shape": (15, 20, 20)}, {"channels": 0}, {"channels": len(CONTRASTS) + 1}])
def test_what_cannot_be_made_is_refused(wrong):
    with pytest.raises(ValueError, match="a phantom"):
        make(**wrong)


def test_files_depend_on_seed_and_index_alone(tmp_path):
    two = write_phantoms(tmp_path / "two", 2, seed=3, **SMALL)
    three = write_phantoms(tmp_path / "three", 3, seed=3, **SMALL)
    other = write_phantoms(tmp_path / "other", 2, seed=4, **SMALL)
    assert [p.read_bytes() for p in two] == [p.read_bytes() for p in three[:2]]
    assert two[0].read_bytes() != two[1].read_bytes() != other[1].read_bytes()


def test_files_are_read_by_another_library_with_their_grid(tmp_path):
    paths = write_phantoms(tmp_path / "images", 1, seed=0, labels_folder=tmp_path / "labels", channels=2, **SMALL)
    assert [p.name for p in paths] == ["phantom_000_0000.nii.gz", "phantom_000_0001.nii.gz"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "images",
        "labels",
        "phantom_000.nii.gz",
        "phantom_000_0000.nii.gz",
        "phantom_000_0001.nii.gz",
    ]
    image, labels = phantom(np.random.default_rng((0, 0)), channels=2, **SMALL)
    read = SimpleITK.ReadImage(str(paths[1]))
    assert read.GetSpacing() == (1.0, 1.5, 2.0)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read), image[1])
    read = SimpleITK.ReadImage(str(tmp_path / "labels" / "phantom_000.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read), labels)


@pytest.mark.parametrize("seed", range(3))
def test_heads_have_four_contrasts_of_one_anatomy_and_a_lesion(seed):
    image, labels = head(np.random.default_rng(seed), shape=(32, 36, 32), spacing_mm=(4, 4, 4))
    again, _ = head(np.random.default_rng(seed), shape=(32, 36, 32), spacing_mm=(4, 4, 4))
    assert image.shape == (4, 32, 36, 32) and image.dtype == np.float32 and np.array_equal(image, again)
    assert ((image > 0) == (image[:1] > 0)).all() and (image[:, labels > 0] > 0).all()
    oedema, core = (labels == 1), (labels == 2)
    assert oedema.sum() > core.sum() > 20
    t1, t1ce, _, flair = (each[core].mean() / each[image[0] > 0].mean() for each in image)
    assert t1ce > 1.3 and t1 < 1 and flair > 1, "the core takes up contrast agent"


def test_every_head_can_lack_another_modality(tmp_path):
    paths = write_heads(tmp_path, 5, seed=0, shape=(16, 18, 17), spacing_mm=(4, 4, 4), complete=False)
    there = [{path.name.removesuffix(".nii.gz") for path in folder.iterdir()} for folder in sorted(tmp_path.iterdir())]
    lacking = [set(MODALITIES) - names for names in there]
    assert lacking == [{"T1"}, {"T1CE"}, {"T2"}, {"FLAIR"}, {"T1"}] and len(paths) == 15
    with pytest.raises(ValueError, match="at least 16"):
        head(np.random.default_rng(0), shape=(8, 18, 17), spacing_mm=(4, 4, 4))
