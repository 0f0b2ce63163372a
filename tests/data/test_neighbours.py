"""Several slices or windows of one case in a step (``slices_per_case``)."""

import os
from pathlib import Path

import numpy as np
import pytest
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels

NAMES = [f"case_{i:02d}" for i in range(6)]


@pytest.fixture
def batches(nnunet_environment):
    def make(neighbours, *, patch, batch_size, shape=(18, 20, 17), **named):
        write_fake_dataset(shape=shape)
        folder = Path(os.environ["nnUNet_preprocessed"], NAME, "fake_data")
        return StepBatches(
            Cases(folder, NAMES, transpose_forward=(0, 1, 2)),
            Needs(slices_per_case=neighbours),
            patch_size=patch,
            batch_size=batch_size,
            available=available_channels(Path(os.environ["nnUNet_raw"], NAME), NAMES, 1),
            stream=(1, 0),
            **named,
        )

    return make


def groups(batch, neighbours):
    rows = list(zip(batch["cases"], batch["places"], strict=True))
    return [rows[i : i + neighbours] for i in range(0, len(rows), neighbours)]


@pytest.mark.parametrize("batch_size", [6, 7, 1])
def test_slices_of_one_case_follow_one_another(batches, batch_size):
    drawn = batches(3, patch=(16, 12), batch_size=batch_size)
    for step in range(8):
        batch = drawn[step]
        assert len(batch["cases"]) == len(batch["image"]) == batch_size
        for group in groups(batch, 3):
            (case, first), *_ = group
            for number, (name, place) in enumerate(group):
                assert name == case and place.origin == (first.origin[0] + number, *first.origin[1:])
                assert 0 <= place.origin[0] < 18
        names = batch["cases"][::3]
        assert len(set(names)) == len(names)


def test_windows_of_one_case_lie_near_and_inside(batches):
    drawn = batches(2, patch=(8, 12, 16), batch_size=4)
    moved = []
    for step in range(12):
        for (case, first), (name, second) in groups(drawn[step], 2):
            assert name == case
            shift = np.subtract(second.origin, first.origin)
            assert (np.abs(shift) <= (2, 3, 4)).all()
            assert (np.add(second.origin, second.extent) <= second.case_shape).all() and min(second.origin) >= 0
            moved.append(shift.any())
    assert np.mean(moved) > 0.8


def test_a_case_with_fewer_slices_repeats_its_last(batches):
    batch = batches(4, patch=(16, 12), batch_size=4, shape=(2, 20, 17))[0]
    assert [place.origin[0] for place in batch["places"]] == [0, 1, 1, 1]


def test_a_pass_uses_every_case_once_and_ranks_have_cases_of_their_own(batches):
    ranks = [batches(2, patch=(16, 12), batch_size=3, rank=rank, ranks=2) for rank in range(2)]
    first, second = (drawn.cases_of_step(0) for drawn in ranks)
    assert first + second == ranks[0].cases_of_all_ranks(0) and not set(first) & set(second)
    assert first[0] == first[1] != first[2] and list(ranks[0][0]["cases"]) == first
    alone = batches(2, patch=(16, 12), batch_size=4)
    assert sorted({case for step in range(3) for case in alone.cases_of_step(step)}) == NAMES


@pytest.mark.parametrize(
    "wrong",
    [
        {"slices_per_case": 2, "triplets": True},
        {"slices_per_case": 2, "window": "whole"},
        {"slices_per_case": 2, "window": "fit"},
        {"slices_per_case": 0},
        {"foreground_share": 1.1},
        {"foreground_share": -0.1},
        {"foreground_share": float("nan")},
    ],
)
def test_what_cannot_be_brought_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Needs(**wrong)
