"""Labels of batches: the segmentation of the image's own window, read only where asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases
from nnssl_plugin.data.windows import read_labels, resize_labels
from nnssl_plugin.nnunet.labels import structure_labels

NAMES = [f"case_{i:02d}" for i in range(6)]


@pytest.fixture
def open_batches(nnunet_environment):
    def make(needs, *, patch=(16, 16, 16), structures=(1,)):
        write_fake_dataset(channels=2)
        folder = Path(nnunet_environment["nnUNet_preprocessed"]) / NAME / "fake_data"
        return StepBatches(
            Cases(folder, NAMES, transpose_forward=(0, 1, 2)),
            needs,
            patch_size=patch,
            batch_size=2,
            available={name: np.ones(2, bool) for name in NAMES},
            stream=(1, 0),
            structures=structures,
        )

    return make


def test_labels_are_the_segmentation_of_the_image_window(open_batches):
    batches = open_batches(Needs(labels=True, margin=1.2))  # 20 voxels: larger than the case of 18 x 20 x 17
    batch = batches[1]
    assert batch["labels"].shape == batch["image"].shape[:1] + batch["image"].shape[2:]
    assert batch["labels"].dtype == torch.int16
    for sample, case in enumerate(batch["cases"]):
        _, segmentation, _ = batches.cases.load_labelled(case)
        padded = np.pad(segmentation[:][0], 20, constant_values=-1)
        start = batch["origin"][sample].int().numpy() + 20
        window = tuple(slice(first, first + 20) for first in start)
        np.testing.assert_array_equal(batch["labels"][sample], padded[window])


def test_labels_change_nothing_else_in_a_batch(open_batches):
    plain, labelled = open_batches(Needs())[3], open_batches(Needs(labels=True))[3]
    assert set(labelled) - set(plain) == {"labels"}
    assert torch.equal(plain["image"], labelled["image"]) and torch.equal(plain["origin"], labelled["origin"])


def test_labels_of_flat_windows_and_of_whole_cases(open_batches):
    assert open_batches(Needs(labels=True), patch=(16, 12))[0]["labels"].shape == (2, 16, 12)
    whole = open_batches(Needs(window="whole", labels=True))[0]["labels"]
    assert whole.shape == (2, 16, 16, 16) and set(whole.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(("needs", "structures"), [(Needs(), (1,)), (Needs(labels=True), ())])
def test_no_labels_where_none_are_asked_for_or_none_name_structures(open_batches, needs, structures):
    assert "labels" not in open_batches(needs, structures=structures)[0]


def test_values_that_name_no_structure_are_unknown(open_batches):
    labels = open_batches(Needs(labels=True, margin=1.2), structures=(2, 3))[0]["labels"]
    assert set(labels.unique().tolist()) == {-1, 0}


def test_labels_outside_the_case_are_unknown_and_keep_their_values_when_resized():
    segmentation = np.arange(12, dtype=np.int8).reshape(1, 3, 4)
    np.testing.assert_array_equal(read_labels(segmentation, (-1, 2), (3, 3)), [[-1, -1, -1], [2, 3, -1], [6, 7, -1]])
    np.testing.assert_array_equal(resize_labels(segmentation, (6, 8)), segmentation[0].repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("labels", "structures"),
    [
        ({"background": 0, "body": 1}, {}),
        ({"background": 0, "tumour": 1}, {1: "tumour"}),
        ({"background": 0, "body": 1, "liver": 2}, {1: "body", 2: "liver"}),
        ({"background": 0, "liver": 1, "ignore": 2}, {1: "liver"}),
        ({"background": 0, "whole": [1, 2], "core": [2]}, {1: "whole", 2: "whole"}),
        ({"background": 0}, {}),
    ],
)
def test_a_body_mask_names_no_structures(labels, structures):
    assert structure_labels({"labels": labels}) == structures


@pytest.mark.parametrize(("names", "in_validation"), [(("body",), False), (("anterior", "posterior"), True)])
def test_only_validation_batches_bring_labels_and_only_of_structures(nnunet_environment, names, in_validation):
    from pretraining_harness import make_trainer
    from toy_method import Toy, ToyPretrainer

    from nnssl_plugin.pretraining.batches import TRAIN, VALIDATE

    class Labelled(Toy):
        needs = Needs(modalities=2, labels=True)

    class LabelledPretrainer(ToyPretrainer):
        def build_task(self, backbone):
            return Labelled(backbone, self.method_settings)

    trainer = make_trainer(trainer_class=LabelledPretrainer, pretraining={"epochs": 1, "iterations_per_epoch": 1})
    trainer.dataset_json["labels"] = {"background": 0} | {name: value for value, name in enumerate(names, 1)}
    trainer.initialize()
    assert "labels" not in trainer.open_batches(trainer.datasets[0], NAMES, (0, TRAIN))[0]
    assert ("labels" in trainer.open_batches(trainer.datasets[0], NAMES, (0, VALIDATE))[0]) == in_validation
