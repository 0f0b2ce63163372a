"""Windows that fit a case with its proportions kept, and how many windows contain foreground."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.triplets import by_case, read_embeddings, read_triplets
from nnssl_plugin.data.windows import fitted_extent, read_window, resize

NAMES = [f"case_{i:02d}" for i in range(6)]


@pytest.fixture
def open_batches(nnunet_environment):
    def make(needs, *, patch, shape=(18, 20, 17), channels=1, batch_size=2, structures=()):
        write_fake_dataset(channels=channels, shape=shape)
        folder = Path(nnunet_environment["nnUNet_preprocessed"]) / NAME / "fake_data"
        raw = Path(nnunet_environment["nnUNet_raw"]) / NAME
        triplets = by_case(read_triplets(raw)) if needs.triplets else None
        return StepBatches(
            Cases(folder, NAMES, transpose_forward=(0, 1, 2), triplets=triplets),
            needs,
            patch_size=patch,
            batch_size=batch_size,
            available=available_channels(raw, NAMES, channels),
            stream=(1, 0),
            embeddings=read_embeddings(raw, read_triplets(raw)) if triplets else None,
            triplets=triplets,
            structures=structures,
        )

    return make


@pytest.mark.parametrize(
    ("case", "window", "flat", "expected"),
    [
        ((30, 512, 512), (64, 256, 256), False, (30, 512, 512)),
        ((30, 512, 400), (16, 256, 256), False, (30, 512, 512)),
        ((30, 100, 200), (16, 256, 128), False, (30, 400, 200)),
        ((30, 100, 200), (1, 64, 64), True, (1, 200, 200)),
        ((5, 17, 13), (4, 8, 8), False, (5, 17, 17)),
        ((5, 3, 2), (8, 12, 12), False, (5, 3, 3)),
        ((1, 1, 1), (16, 16, 16), False, (1, 1, 1)),
    ],
)
def test_the_plane_fits_at_the_largest_factor(case, window, flat, expected):
    extent = fitted_extent(case, window, flat=flat)
    assert extent.tolist() == list(expected)
    assert (extent[1:] >= case[1:]).all() and (extent[1:] == case[1:]).any()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("patch", "shape"), [((16, 16, 16), (18, 20, 17)), ((8, 24, 16), (18, 20, 17)), ((9, 11), (18, 20, 17))]
)
def test_the_window_shows_the_piece_that_it_names_and_zeros_beside_it(open_batches, patch, shape, channels):
    batches = open_batches(Needs(window="fit"), patch=patch, shape=shape, channels=channels)
    batch, flat = batches[2], len(patch) == 2
    assert batch["image"].shape == (2, channels, *patch) and batch["image"].isfinite().all()
    for i, case in enumerate(batch["cases"]):
        data, _ = batches.cases.load(case)
        extent, origin = (batch[name][i].int().tolist() for name in ("extent", "origin"))
        if flat:
            continue
        shown = resize(read_window(data, origin, extent), patch)
        np.testing.assert_allclose(batch["image"][i], shown, atol=1e-6)
        voxels = max(shape[1] / patch[1], shape[2] / patch[2])
        assert (np.abs(extent[1:] - np.array(patch[1:]) * voxels) <= 0.5).all()  # one factor in the plane
        assert (origin[0], extent[0]) == (0, shape[0])  # all slices
        beside = -origin[2] * patch[2] // extent[2]
        assert beside == 0 or (batch["image"][i, ..., : beside - 1] == 0).all()


def test_a_2d_window_shows_one_whole_slice_undistorted(open_batches):
    batches = open_batches(Needs(window="fit", foreground_share=1.0), patch=(20, 20))
    for step in range(4):
        batch = batches[step]
        assert batch["origin"].tolist() == [[0.0, -2.0]] * 2 and batch["extent"].tolist() == [[20.0, 20.0]] * 2
        for i, case in enumerate(batch["cases"]):
            data, _ = batches.cases.load(case)
            slices = np.asarray(data[:])[0]
            (found,) = (z for z in range(18) if np.allclose(slices[z], batch["image"][i, 0, :, 2:19], atol=1e-5))
            assert 5 <= found < 12  # where the body is
            assert (batch["image"][i, 0, :, [0, 1, 19]] == 0).all()


def test_labels_fit_alike(open_batches):
    batches = open_batches(Needs(window="fit", labels=True), patch=(20, 20, 20), structures=(1,))
    labels = batches[0]["labels"]
    assert labels.shape == (2, 20, 20, 20) and set(labels.unique().tolist()) == {-1, 0, 1}
    assert (labels[..., :2] == -1).all() and (batches[0]["image"][..., :2] == 0).all()


def test_the_slice_of_a_triplet_is_in_the_window(open_batches):
    batches = open_batches(Needs(window="fit", triplets=True), patch=(4, 16, 16))
    for step in range(6):
        batch = batches[step]
        for i, case in enumerate(batch["cases"]):
            _, facts = batches.cases.load(case)
            axis, coordinate = facts.slices[0]
            assert batch["slice_axis"][i] == axis
            shown = batch["slice_position"][i] * batch["extent"][i, axis] + batch["origin"][i, axis] - 0.5
            assert shown == pytest.approx(coordinate, abs=0.01)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.2, 0.6), (1.0, 1.0, 1.0)])
def test_the_share_of_windows_with_foreground(open_batches, share, low, high):
    """A slice of a 2D window has foreground by chance in 7 of 18."""
    batches = open_batches(Needs(foreground_share=share, labels=True), patch=(20, 17), structures=(1,))
    has = torch.cat([(batches[step]["labels"] == 1).flatten(1).any(1) for step in range(60)])
    assert low <= has.float().mean() <= high


def test_a_case_without_foreground_is_shown_anywhere(open_batches):
    batches = open_batches(Needs(foreground_share=1.0), patch=(8, 8))
    load = batches.cases.load_labelled

    def empty(case):
        data, segmentation, facts = load(case)
        return data, segmentation, type(facts)(np.empty((0, 3), dtype=int))

    batches.cases.load_labelled = empty
    assert len({tuple(batches[step]["origin"][0].tolist()) for step in range(8)}) > 4
