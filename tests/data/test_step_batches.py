"""Batches: functions of (seed, rank, step), windows inside the case, slices inside the window."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs, Place
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.triplets import (
    Embeddings,
    Triplet,
    by_case,
    place_of,
    read_embeddings,
    read_triplets,
    text_sha256,
    write_embeddings,
    write_triplets,
)
from nnssl_plugin.data.windows import random_origin, random_place, read_window, resize
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.planes import PLANES

NAMES = [f"case_{i:02d}" for i in range(6)]

SHAPE = (18, 20, 17)
AXES = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Axis (z, y, x) of the fake cases that each plane is normal to."""


def write_more_slices(raw, count):
    """``count`` slices per case, the planes in turn, each at another place, with embeddings."""
    triplets = []
    for name in NAMES:
        for number in range(count):
            plane = PLANES[number % 3]
            size = SHAPE[AXES[plane]]
            place = (5 * number + 2 * NAMES.index(name)) % size
            triplets.append(Triplet(name, plane, place, size, f"{name} {plane} {place}", "test"))
    write_triplets(raw, triplets)
    hashes = np.array([text_sha256(t.text) for t in triplets])
    vectors = np.random.default_rng(0).normal(size=(2, len(triplets), 8))
    places = np.array([place_of(t) for t in triplets])
    write_embeddings(raw, Embeddings(np.array([t.case for t in triplets]), hashes, hashes, *vectors, "test", places))


@pytest.fixture
def open_batches(nnunet_environment):
    def make(needs=None, *, channels=2, patch=(16, 16, 16), slices=1, shape=SHAPE, **kwargs):
        needs = needs or Needs()
        write_fake_dataset(channels=channels, shape=shape)
        folder = Path(nnunet_environment["nnUNet_preprocessed"]) / NAME / "fake_data"
        raw = Path(nnunet_environment["nnUNet_raw"]) / NAME
        if needs.triplets and slices > 1:
            write_more_slices(raw, slices)
        triplets = by_case(read_triplets(raw)) if needs.triplets else None
        return StepBatches(
            Cases(folder, NAMES, transpose_forward=(0, 1, 2), triplets=triplets),
            needs,
            patch_size=patch,
            batch_size=kwargs.pop("batch_size", 2),
            available=available_channels(raw, NAMES, channels),
            stream=kwargs.pop("stream", (1, 0)),
            embeddings=read_embeddings(raw, read_triplets(raw)) if triplets else None,
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


@pytest.mark.parametrize("patch", [(10, 12, 14), (12, 14)])
@pytest.mark.parametrize("window", ["crop", "whole"])
def test_places_are_whole_numbers_on_the_host_and_the_tensors_say_the_same(open_batches, patch, window):
    """They survive a worker, and name the piece of the case to the voxel, the slice of a 2D window included."""
    batches = open_batches(Needs(window=window), patch=patch)
    batch = batches[3]
    for i, (case, place) in enumerate(zip(batch["cases"], batch["places"], strict=True)):
        assert type(place) is Place and all(type(v) is int for three in vars(place).values() for v in three)
        assert place == pickle.loads(pickle.dumps(place)) and place.case_shape == SHAPE
        for name, three in vars(place).items():
            assert batch[name][i].tolist() == list(three)[-len(patch) :]
        if window == "crop":
            assert place.extent == (1,) * (3 - len(patch)) + patch
            box = tuple(slice(o, o + e) for o, e in zip(place.origin, place.extent, strict=True))
            shown = batches.cases.load(case)[0][:][(slice(None), *box)]
            np.testing.assert_array_equal(batch["image"][i], shown.reshape(batch["image"][i].shape))


def test_margin_makes_the_window_larger(open_batches):
    assert open_batches(Needs(margin=1.1))[0]["image"].shape == (2, 2, 18, 18, 18)


def test_slice_window_contains_the_slice(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), patch=(6, 6, 6))
    for step in range(20):
        batch = batches[step]
        for i, case in enumerate(batch["cases"]):
            axis = int(batch["slice_axis"][i])
            index = batches.triplets[case][0].slice  # axial, no flip, no crop: the first axis
            assert axis == 0 and batch["origin"][i, 0] <= index < batch["origin"][i, 0] + 6
            position = (index + 0.5 - float(batch["origin"][i, 0])) / 6
            assert float(batch["slice_position"][i]) == pytest.approx(position)


def test_whole_case_is_resized_and_keeps_the_relative_position(open_batches):
    batches = open_batches(Needs(window="whole", triplets=True))
    batch = batches[0]
    assert batch["image"].shape == (2, 2, 16, 16, 16)
    for i, case in enumerate(batch["cases"]):
        (triplet,) = batches.triplets[case]
        assert float(batch["slice_position"][i]) == pytest.approx((triplet.slice + 0.5) / triplet.n_slices)
        assert batch["extent"][i].tolist() == batch["case_shape"][i].tolist() == [18, 20, 17]


def test_2d_windows(open_batches):
    batch = open_batches(patch=(16, 12))[0]
    assert batch["image"].shape == (2, 2, 16, 12) and batch["origin"].shape == (2, 2)
    assert batch["case_shape"].tolist() == [[20, 17], [20, 17]]


def test_triplets_bring_the_embeddings_of_the_slice_that_is_shown(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), slices=6)
    for step in range(8):
        batch = batches[step]
        for i, (case, number) in enumerate(zip(batch["cases"], batches.slices_of_step(step), strict=True)):
            triplet = batches.triplets[case][number]
            image, text = batches.embeddings[triplet.key]
            np.testing.assert_array_equal(batch["image_embedding"][i], image)
            np.testing.assert_array_equal(batch["text_embedding"][i], text)
            assert int(batch["plane"][i]) == PLANES.index(triplet.plane)
            assert int(batch["slice_axis"][i]) == AXES[triplet.plane]


def test_a_case_shows_another_slice_from_step_to_step_and_a_step_shows_one_plane(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), slices=8, batch_size=3)
    seen = {case: set() for case in NAMES}
    planes = []
    for step in range(200):
        drawn = list(zip(batches.cases_of_step(step), batches.slices_of_step(step), strict=True))
        (plane,) = {batches.triplets[case][number].plane for case, number in drawn}
        planes.append(plane)
        for case, number in drawn:
            seen[case].add(number)
    assert all(numbers == set(range(8)) for numbers in seen.values())
    assert all(40 < planes.count(plane) < 95 for plane in PLANES)


def test_ranks_of_a_step_share_its_plane_and_know_each_others_slices(open_batches):
    one, two = (
        open_batches(Needs(window="slice", triplets=True), slices=8, ranks=2, rank=rank, batch_size=3)
        for rank in (0, 1)
    )
    for step in range(20):
        assert one.cases_of_all_ranks(step) == one.cases_of_step(step) + two.cases_of_step(step)
        assert one.slices_of_all_ranks(step) == one.slices_of_step(step) + two.slices_of_step(step)
        assert len(set(one[step]["plane"].tolist() + two[step]["plane"].tolist())) == 1


def test_a_case_that_comes_twice_in_a_step_shows_different_slices(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), slices=6, batch_size=12)  # two slices per plane
    for step in range(5):
        drawn = list(zip(batches.cases_of_step(step), batches.slices_of_step(step), strict=True))
        assert len(set(drawn)) == 12


def test_cases_without_a_common_plane_show_what_they_have(open_batches):
    batches = open_batches(Needs(window="slice", triplets=True), slices=1)
    batches.triplets = {
        name: [Triplet(name, PLANES[n % 3], 0, 9, "x", "test")] for n, name in enumerate(batches.triplets)
    }
    assert batches.slices_of_all_ranks(0) == [0, 0]


@pytest.mark.parametrize("window", ["slice", "whole"])
@pytest.mark.parametrize("patch", [(8, 8, 8), (24, 26, 22)])
def test_free_windows_hold_the_slice_at_a_place_that_says_nothing_of_its_place_in_the_case(open_batches, window, patch):
    """Whichever slice: its place in the window is drawn uniformly, and is the place where its voxels are."""
    batches = open_batches(Needs(window=window, placement="free", triplets=True), patch=patch, slices=9)
    places: dict[tuple[str, int], set[float]] = {}
    for step in range(150):
        batch = batches[step]
        for i, (case, number) in enumerate(zip(batch["cases"], batches.slices_of_step(step), strict=True)):
            triplet, axis = batches.triplets[case][number], int(batch["slice_axis"][i])
            position = float(batch["slice_position"][i])
            shown = float(batch["origin"][i, axis]) + position * float(batch["extent"][i, axis]) - 0.5
            assert abs(shown - triplet.slice) <= 0.5  # the voxel of the slice
            assert 0.25 <= position <= 0.75
            places.setdefault((triplet.plane, triplet.slice), set()).add(round(position * patch[axis] - 0.5, 3))
    few = [plane for plane in PLANES if not {p for (name, _), found in places.items() if name == plane for p in found}]
    assert few == []
    for plane in PLANES:
        size = patch[AXES[plane]]
        allowed = set(range(size // 4, size - size // 4))
        together = set().union(*(found for (name, _), found in places.items() if name == plane))
        assert together == allowed
    first, last = (
        np.concatenate([list(found) for (plane, index), found in places.items() if chosen(index, SHAPE[AXES[plane]])])
        for chosen in (lambda index, size: index < size / 3, lambda index, size: index >= 2 * size / 3)
    )
    assert abs(first.mean() - last.mean()) < max(patch) / 16  # slices of both ends lie alike


def test_free_windows_read_what_they_claim_and_pad_with_zeros(open_batches):
    batches = open_batches(Needs(window="slice", placement="free", triplets=True), patch=(12, 30, 12), slices=3)
    batch = batches[3]
    for i, case in enumerate(batch["cases"]):
        data = np.asarray(batches.cases.load(case)[0][:])
        padded = np.pad(data, ((0, 0), *[(40, 40)] * 3))
        start = (batch["origin"][i].int() + 40).tolist()
        piece = padded[:, start[0] : start[0] + 12, start[1] : start[1] + 30, start[2] : start[2] + 12]
        np.testing.assert_array_equal(batch["image"][i], piece)


def test_free_crops_move_where_the_case_is_smaller_and_are_repeatable(open_batches):
    batches = open_batches(Needs(placement="free"), patch=(24, 16, 24))
    origins = np.array([origin for step in range(60) for origin in batches[step]["origin"].tolist()])
    assert set(origins[:, 0]) == set(range(-6, 1)) and set(origins[:, 2]) == set(range(-7, 1))
    assert origins[:, 1].min() == 0 and origins[:, 1].max() == 4
    assert same(batches[7], open_batches(Needs(placement="free"), patch=(24, 16, 24))[7])
    centred = open_batches(patch=(24, 16, 24))[7]
    assert set(centred["origin"][:, 0].tolist()) == {-3}


@pytest.mark.parametrize(
    ("size", "expected"), [(1, {0}), (2, {0, 1}), (4, {1, 2}), (7, {1, 2, 3, 4, 5}), (8, {2, 3, 4, 5})]
)
def test_places_lie_in_the_middle_half(size, expected):
    rng = np.random.default_rng(0)
    assert {random_place(size, rng) for _ in range(200)} == expected


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
    np.testing.assert_array_equal(resize(image, image.shape[1:]), image)


def test_absent_channels_are_zero_whatever_was_stored_and_the_others_as_before(open_batches, nnunet_environment):
    before = open_batches()[0]
    raw = Path(nnunet_environment["nnUNet_raw"]) / NAME
    write_json(raw / "modalities.json", {before["cases"][0]: [1]})
    after = open_batches()[0]
    assert after["available"].tolist() == [[False, True], [True, True]]
    assert not after["image"][0, 0].any()  # stored as noise
    assert torch.equal(after["image"][0, 1], before["image"][0, 1])
    assert torch.equal(after["image"][1], before["image"][1])


@pytest.mark.parametrize("present", ["01", [-1], [0.5], 0])
def test_channels_that_are_none_are_refused(tmp_path, present):
    write_json(tmp_path / "modalities.json", {"a": present})
    with pytest.raises(UserError, match="gives case a the channels"):
        available_channels(tmp_path, ["a"], 2)
