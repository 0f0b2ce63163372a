"""What the log says of slices and texts before they are matched, and the floor that equal ones leave."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.triplets import by_case, load_embeddings, read_embeddings, read_triplets, write_embeddings
from nnssl_plugin.objectives.partial_transport import mpot_loss
from nnssl_plugin.pretraining.batches import embedding_size, lowest_loss, matching_notes


@pytest.fixture
def notes(nnunet_environment):
    """Notes on the fake dataset (one slice per case, all axial) with texts and cases as given."""

    def make(texts=None, *, cases=6, batch_size=4):
        write_fake_dataset(cases=6)
        raw = Path(os.environ["nnUNet_raw"]) / NAME
        triplets = read_triplets(raw)[:cases]
        embeddings = read_embeddings(raw, triplets)
        if texts is not None:
            triplets = [replace(triplet, text=text) for triplet, text in zip(triplets, texts, strict=True)]
        names = [triplet.case for triplet in triplets]
        folder = Path(os.environ["nnUNet_preprocessed"]) / NAME / "fake_data"
        batches = StepBatches(
            Cases(folder, names, transpose_forward=(0, 1, 2), triplets=by_case(triplets)),
            Needs(window="slice", triplets=True),
            patch_size=(16, 16, 16),
            batch_size=batch_size,
            available=available_channels(raw, names, 1),
            stream=(1, 0),
            embeddings=embeddings,
            triplets=by_case(triplets),
        )
        return matching_notes(batches, NAME, batch_size=batch_size)

    return make


def test_the_first_line_says_how_many_and_by_which_encoders(notes):
    first, single = notes()
    assert first == "Slices and texts: 6 of 6 cases, embedded by test."
    assert "6 of 6 cases have a single slice" in single and f"caption -d {NAME}" in single


def test_random_encoders_are_called_that(notes, nnunet_environment):
    notes()
    raw = Path(os.environ["nnUNet_raw"]) / NAME
    write_embeddings(raw, replace(load_embeddings(raw), weights="random-small sha256:1"))
    assert "random encoders" in notes()[0]


def test_equal_texts_are_warned_of_with_the_loss_that_they_leave(notes):
    (*_, warning) = notes(["same"] * 6)
    assert "texts" in warning and "mpot_text cannot fall below 1.39" in warning and "1.39 tells nothing" in warning


def test_a_dataset_smaller_than_a_step_is_warned_of(notes):
    warnings = notes(cases=2)[2:]
    assert ["mpot_image cannot fall below 0.69" in warnings[0], "mpot_text cannot fall below 0.69" in warnings[1]] == [
        True,
        True,
    ]
    assert "steps of 4, 2 cases" in warnings[0]


@pytest.mark.parametrize(("groups", "slack"), [("abcd", 0), ("aabb", 0), ("aaaa", 0), ("a", 0), ("aabc", 0.01)])
def test_the_floor_is_the_loss_of_a_perfect_match(groups, slack):
    """Embeddings equal to their targets: what the solver gives, more where it shares the mass unevenly among groups."""
    rng = np.random.default_rng(0)
    corners = {name: torch.from_numpy(rng.normal(size=6)) for name in "abcd"}
    targets = torch.nn.functional.normalize(torch.stack([corners[name] for name in groups]), dim=1)
    metric = torch.eye(6, dtype=torch.float64)
    loss = mpot_loss(targets, targets, metric, mass=0.9, epsilon=0.005, iterations=3000).item()
    assert lowest_loss(groups) - 1e-6 <= loss <= lowest_loss(groups) + slack + 1e-6


def test_embedding_size_is_that_of_the_file(nnunet_environment):
    write_fake_dataset()
    assert embedding_size(NAME) == 8
