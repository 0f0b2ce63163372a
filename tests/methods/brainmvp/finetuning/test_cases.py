"""Cases with their templates: where a template lies, what a crop holds, intensities, both kinds of files, processes."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.methods.brainmvp.finetuning.cases import TemplatedCase, TemplatedDataset, channel_templates

SCHEMES = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "CTNormalization")
CT = {"mean": 3.0, "std": 2.0, "percentile_00_5": -50.0, "percentile_99_5": 50.0}


def array(names=("T1", "T2", "FLAIR", "PD"), grid=(7, 12, 9), seed=0):
    values = torch.randn(len(names), *grid, generator=torch.Generator().manual_seed(seed))
    return SpatialArray(values, tuple(names), (1.0,) * 3, ("IS", "PA", "LR"), ("ZScoreNormalization",) * len(names))


def naive(template, shape):
    """A template on a case, voxel by voxel: centre on centre, index start (T_dim − vol_dim) // 2."""
    placed = np.zeros(shape, np.float32)
    for voxel in np.ndindex(*shape):
        index = [v + (t - s) // 2 for v, t, s in zip(voxel, template.shape, shape, strict=True)]
        if all(0 <= i < t for i, t in zip(index, template.shape, strict=True)):
            placed[voxel] = template[tuple(index)]
    return placed


def case(templates, image, segmentation):
    return TemplatedCase(image, segmentation, templates, templates.scaling(image.shape[1:], segmentation))


def segmentation(shape, seed=0):
    """−1 outside an odd-shaped mask, 0 and 1 in it."""
    return np.random.default_rng(seed).integers(-1, 2, (1, *shape)).astype(np.int8)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("shape", [(9, 10, 11), (6, 12, 5), (1, 30, 30), (7, 12, 9)])
def test_a_case_holds_its_image_and_the_template_of_each_channel_centre_on_centre(channels, shape):
    names = ("FLAIR", "t1", "PD", "T2")[:channels]
    source = array()
    templates = channel_templates(source, names, ["NoNormalization"], [False])
    image = np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32)
    both = case(templates, image, None)[:]
    assert both.dtype == np.float32 and both.shape == (2 * channels, *shape)
    np.testing.assert_array_equal(both[:channels], image)
    for name, placed in zip(names, both[channels:], strict=True):
        np.testing.assert_array_equal(placed, naive(source.values[source.number_of(name)].numpy(), shape))


def test_every_crop_of_nnunets_is_that_of_a_plain_array():
    shape, rng = (9, 8, 7), np.random.default_rng(2)
    image, labels = rng.normal(size=(4, *shape)).astype(np.float32), segmentation(shape)
    templates = channel_templates(array(), ("T1", "T2", "FLAIR", "PD"), SCHEMES, [True, False, False, True])
    lazy = case(templates, image, labels)
    dense = lazy[:]
    for _ in range(50):
        low = rng.integers(-6, 6, 3)
        box = [[int(a), int(a + b)] for a, b in zip(low, rng.integers(7, 12, 3), strict=True)]
        np.testing.assert_array_equal(crop_and_pad_nd(lazy, box, 0), crop_and_pad_nd(dense, box, 0))
    np.testing.assert_array_equal(lazy[:, 4], dense[:, 4])
    np.testing.assert_array_equal(lazy[:, 2:5, 1:3, -2:], dense[:, 2:5, 1:3, -2:])
    with pytest.raises(TypeError, match="all channels"):
        lazy[0]


@pytest.mark.parametrize("inside", [False, True])
def test_a_template_has_the_intensities_that_nnunets_preprocessing_would_give_it(inside):
    shape, labels = (9, 10, 8), segmentation((9, 10, 8))
    source = array()
    templates = channel_templates(source, source.names, SCHEMES, [inside] * 4)
    found = case(templates, np.zeros((4, *shape), np.float32), labels)[:][4:]
    classes = (ZScoreNormalization, NoNormalization, RescaleTo01Normalization, CTNormalization)
    for number, scheme in enumerate(classes):
        placed = naive(source.values[number].numpy(), shape)
        if scheme is CTNormalization:  # of one pair of numbers for all images: stands in normalised values already
            expected = scheme(inside, CT).run(placed * CT["std"] + CT["mean"], labels[0])
        elif scheme is RescaleTo01Normalization and inside:
            kept = placed[labels[0] >= 0]
            expected = (placed - kept.min()) / (kept.max() - kept.min())
        else:
            expected = scheme(inside, {}).run(placed.copy(), labels[0])
        if inside:
            expected = np.where(labels[0] >= 0, expected, 0)
        np.testing.assert_allclose(found[number], expected, atol=2e-6, err_msg=scheme.__name__)


def test_what_has_no_template_or_an_empty_one_is_zero():
    source = array()
    source.values[1] = 0
    templates = channel_templates(source, ("ADC", "T2"), ["ZScoreNormalization"] * 2, [False, False])
    assert templates.known == (False, True)
    both = case(templates, np.ones((2, 4, 5, 6), np.float32), None)[:]
    assert not both[2:].any() and both[:2].all()
    masked = channel_templates(source, ("T1",), ["ZScoreNormalization"], [True])
    nothing = np.full((1, 4, 5, 6), -1, np.int8)  # a case whose mask is empty
    assert np.isfinite(case(masked, np.ones((1, 4, 5, 6), np.float32), nothing)[:]).all()


def write(folder, kind):
    rng, shape = np.random.default_rng(3), (9, 10, 11)
    for name in ("a", "b"):
        image, labels = rng.normal(size=(2, *shape)).astype(np.float32), segmentation(shape)
        more = {"chunks": (1, *shape), "blocks": (1, *shape)} if kind is nnUNetDatasetBlosc2 else {}
        kind.save_case(image, labels, {"class_locations": {}}, str(folder / name), **more)
    return kind(str(folder), ["b", "a"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nnUNetDatasetBlosc2, nnUNetDatasetNumpy])
def test_both_kinds_of_files_and_processes_that_start_anew(tmp_path, kind):
    plain = write(tmp_path, kind)
    templates = channel_templates(array(), ("T1", "T2"), ["ZScoreNormalization"], [False])
    dataset = TemplatedDataset(plain, templates)
    image, labels, previous, properties = dataset["a"]
    assert dataset.identifiers == ["a", "b"] and previous is None and properties == {"class_locations": {}}
    assert image.shape == (4, 9, 10, 11) and labels.shape == (1, 9, 10, 11)
    np.testing.assert_array_equal(image[:][:2], np.asarray(plain.load_case("a")[0][:]))
    again = pickle.loads(pickle.dumps(TemplatedDataset(plain, templates))).load_case("a")[0]
    np.testing.assert_array_equal(again[:], image[:])
    if kind is nnUNetDatasetNumpy:
        return  # one process is enough: it takes seconds
    labels = LabelManager({"background": 0, "body": 1}, regions_class_order=None)
    loader = nnUNetDataLoader(TemplatedDataset(plain, templates), 2, (9, 10, 11), (9, 10, 11), labels)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        batch = pool.apply(nnUNetDataLoader.generate_train_batch, (loader,))
        found = {str(case): data.clone() for case, data in zip(batch["keys"], batch["data"], strict=True)}
    for name, data in found.items():
        np.testing.assert_array_equal(data, dataset[name][0][:])
