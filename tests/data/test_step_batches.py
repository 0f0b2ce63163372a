"""Batches: functions of (seed, rank, step), windows inside the case, slices inside the window."""

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import BatchStream, StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.triplets import read_embeddings, read_triplets
from nnssl_plugin.data.windows import random_origin, read_window, resize
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json

NAMES = [f"case_{i:02d}" for i in range(6)]


@pytest.fixture
def open_batches(nnunet_environment):
    def make(needs=None, *, channels=2, patch=(16, 16, 16), **kwargs):
        needs = needs or Needs()
        write_fake_dataset(channels=channels)
        from pathlib import Path

        folder = Path(nnunet_environment["nnUNet_preprocessed"]) / NAME / "fake_data"
        raw = Path(nnunet_environment["nnUNet_raw"]) / NAME
        triplets = read_triplets(raw) if needs.triplets else None
        return StepBatches(
            Cases(folder, NAMES, transpose_forward=(0, 1, 2), triplets=triplets),
            needs,
            patch_size=patch,
            batch_size=kwargs.pop("batch_size", 2),
            available=available_channels(raw, NAMES, channels),
            stream=kwargs.pop("stream", (1, 0)),
            embeddings=read_embeddings(raw, triplets) if triplets else None,
            triplets=triplets,
            **kwargs,
        )

    return make


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_batch_depends_on_the_step_alone(open_batches):
    batches = open_batches()
    first = [batches[k] for k in (4, 0, 4)]
    assert same(first[0], first[2]) and same(first[0], open_batches()[4])
    assert not same(first[0], first[1])


def test_rank_and_seed_and_purpose_change_the_batch(open_batches):
    reference = open_batches(ranks=2)[3]
    assert not torch.equal(reference["image"], open_batches(ranks=2, rank=1)[3]["image"])
    assert not torch.equal(reference["image"], open_batches(ranks=2, stream=(2, 0))[3]["image"])
    assert not torch.equal(reference["image"], open_batches(ranks=2, stream=(1, 1))[3]["image"])


def test_every_pass_uses_every_case_once(open_batches):
    batches = open_batches()
    for first in (0, 3, 30):
        assert sorted(c for k in range(first, first + 3) for c in batches.cases_of_step(k)) == NAMES


def test_batch_larger_than_the_dataset_still_works(open_batches):
    assert len(open_batches(batch_size=8)[0]["cases"]) == 8


def test_window_is_the_piece_of_the_case_it_claims_to_be(open_batches):
    batches = open_batches()
    batch = batches[2]
    for i, case in enumerate(batch["cases"]):
        data, _ = batches.cases.load(case)
        origin = batch["origin"][i].int().tolist()
        inside = tuple(slice(max(o, 0), o + 16) for o in origin)
        piece = data[:][(slice(None), *inside)]
        np.testing.assert_array_equal(batch["image"][i, :, : piece.shape[1], : piece.shape[2], : piece.shape[3]], piece)


def test_margin_makes_the_window_larger(open_batches):
    assert open_batches(Needs(margin=1.1))[0]["image"].shape == (2, 2, 18, 18, 18)


def test_slice_window_contains_the_slice(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), patch=(6, 6, 6))
    for step in range(20):
        batch = batches[step]
        for i, case in enumerate(batch["cases"]):
            axis = int(batch["slice_axis"][i])
            index = batches.triplets[case].slice  # axial, no flip, no crop: the first axis
            assert axis == 0 and batch["origin"][i, 0] <= index < batch["origin"][i, 0] + 6
            position = (index + 0.5 - float(batch["origin"][i, 0])) / 6
            assert float(batch["slice_position"][i]) == pytest.approx(position)


def test_whole_case_is_resized_and_keeps_the_relative_position(open_batches):
    batches = open_batches(Needs(window="whole", triplets=True))
    batch = batches[0]
    assert batch["image"].shape == (2, 2, 16, 16, 16)
    for i, case in enumerate(batch["cases"]):
        triplet = batches.triplets[case]
        assert float(batch["slice_position"][i]) == pytest.approx((triplet.slice + 0.5) / triplet.n_slices)
        assert batch["extent"][i].tolist() == [18, 20, 17]


def test_2d_windows(open_batches):
    batch = open_batches(patch=(16, 12))[0]
    assert batch["image"].shape == (2, 2, 16, 12) and batch["origin"].shape == (2, 2)


def test_triplets_bring_the_embeddings_of_their_case(open_batches, nnunet_environment):
    batches = open_batches(Needs(window="slice", triplets=True))
    batch = batches[1]
    for i, case in enumerate(batch["cases"]):
        np.testing.assert_array_equal(batch["image_embedding"][i], batches.embeddings[case][0])
        np.testing.assert_array_equal(batch["text_embedding"][i], batches.embeddings[case][1])


@pytest.mark.slow
def test_workers_keep_the_order(open_batches):
    batches = open_batches()
    stream = BatchStream(batches, range(3, 7), workers=2)
    got = [next(stream) for _ in range(4)]
    stream.close()
    assert all(same(batch, batches[k]) for batch, k in zip(got, range(3, 7), strict=True))
    assert stream.waited > 0


def test_absent_channels_are_said(nnunet_environment, tmp_path):
    write_json(tmp_path / "modalities.json", {"a": [1]})
    available = available_channels(tmp_path, ["a", "b"], 2)
    assert available["a"].tolist() == [False, True] and available["b"].tolist() == [True, True]
    write_json(tmp_path / "modalities.json", {"a": [2]})
    with pytest.raises(UserError, match="case a"):
        available_channels(tmp_path, ["a"], 2)


@pytest.mark.parametrize("case, window", [((9, 4, 7), (4, 6, 7)), ((5, 5), (2, 9))])
def test_random_windows_stay_inside_and_reach_every_place(case, window):
    rng = np.random.default_rng(0)
    origins = np.array([random_origin(case, window, rng) for _ in range(400)])
    for axis, (size, wanted) in enumerate(zip(case, window, strict=True)):
        expected = set(range(size - wanted + 1)) if size >= wanted else {(size - wanted) // 2}
        assert set(origins[:, axis].tolist()) == expected


def test_anchored_windows_contain_the_anchor():
    rng = np.random.default_rng(0)
    for anchor in [(0, 3.2), (8, None), (20, 0)]:
        origins = np.array([random_origin((9, 7), (3, 4), rng, anchor) for _ in range(100)])
        assert (origins >= 0).all() and (origins <= [6, 3]).all()
        inside = (origins[:, 0] <= min(anchor[0], 8)) & (min(anchor[0], 8) < origins[:, 0] + 3)
        assert inside.all()


def test_reading_outside_gives_zeros():
    data = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 4)
    np.testing.assert_array_equal(read_window(data, (-1, 2), (3, 3)), [[[0, 0, 0], [3, 4, 0], [7, 8, 0]]])


def test_resize_averages_where_it_shrinks_and_keeps_constants():
    image = np.random.default_rng(0).normal(size=(1, 8, 6, 4)).astype(np.float32)
    small = resize(image, (4, 3, 2))
    np.testing.assert_allclose(small, image.reshape(1, 4, 2, 3, 2, 2, 2).mean((2, 4, 6)), rtol=1e-5)
    np.testing.assert_allclose(resize(np.full((2, 5, 7, 3), 1.5, np.float32), (9, 2, 3)), 1.5, rtol=1e-6)
