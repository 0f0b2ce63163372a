"""What a classifier sees: windows that depend on (seed, step) alone, of any size of case, in 2D and 3D."""

import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME
from labelled_dataset import DIAGNOSIS, GRADE, SIGNS, class_labels, write_class_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_plugin.nnunet.case_labels import ClassLabels, Target
from nnssl_plugin.tasks.classification.batches import (
    ClassCases,
    TrainingBatches,
    ValidationBatches,
    case_inputs,
    class_inputs,
    even_origins,
    foreground_box,
    global_seed,
    label_matrix,
    repeatable,
    sampling_weights,
)

PATCHES = {2: [12, 16], 3: [8, 12, 16]}


def volume(shape, channels=1, seed=0):
    return np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("shape", [(9, 13, 17), (3, 5, 4), (1, 40, 30)])
@pytest.mark.parametrize(("strategy", "expected"), [("resize", 1), ("windows", 5)])
@pytest.mark.parametrize("channels", [1, 4])
def test_inputs_have_the_patch_whatever_the_case(dimensions, shape, strategy, expected, channels):
    data, patch = volume(shape, channels), PATCHES[dimensions]
    even, again = (class_inputs(data, patch_size=patch, strategy=strategy, windows=5) for _ in range(2))
    assert even.shape == (expected, channels, *patch) and even.dtype == np.float32
    np.testing.assert_array_equal(even, again)
    drawn = class_inputs(data, patch_size=patch, strategy=strategy, windows=5, rng=np.random.default_rng(0))
    assert drawn.shape == even.shape and np.isfinite(drawn).all()


def test_a_case_of_the_size_of_the_patch_stays_as_it_is():
    data = volume((8, 12, 16))
    for strategy in ("resize", "windows"):
        windows = class_inputs(data, patch_size=[8, 12, 16], strategy=strategy, windows=2)
        np.testing.assert_allclose(windows, np.broadcast_to(data, windows.shape), atol=1e-6)


def test_a_slice_of_a_volume_is_the_middle_one():
    data = volume((7, 12, 16))
    np.testing.assert_allclose(
        class_inputs(data, patch_size=[12, 16], strategy="resize", windows=1)[0], data[:, 3], atol=1e-6
    )
    windows = class_inputs(data, patch_size=[12, 16], strategy="windows", windows=3)
    np.testing.assert_array_equal(windows[0], data[:, 3])
    assert len({tuple(np.flatnonzero([np.array_equal(w, data[:, z]) for z in range(7)])) for w in windows}) == 3


def test_a_case_smaller_than_the_patch_lies_in_its_middle():
    window = class_inputs(np.ones((1, 4, 4, 4), np.float32), patch_size=[8, 8, 8], strategy="windows", windows=1)[0, 0]
    expected = np.zeros((8, 8, 8))
    expected[2:6, 2:6, 2:6] = 1
    np.testing.assert_array_equal(window, expected)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_even_windows_stay_inside_and_begin_in_the_middle(count):
    shape, window = np.array([33, 20, 50]), [8, 20, 16]
    origins = even_origins(shape, window, count)
    assert (origins >= 0).all() and (origins + window <= shape).all()
    assert origins[0].tolist() == [13, 0, 17] and len({tuple(o) for o in origins}) == count


def test_even_windows_leave_no_part_of_the_case_out():
    origins = even_origins((64, 64, 64), (16, 16, 16), 8)
    assert ((origins < 24).any(0) & (origins > 24).any(0)).all()


def test_the_box_of_the_foreground_grows_by_the_margin_and_stops_at_the_case():
    segmentation = np.zeros((1, 20, 20, 20), np.int8)
    segmentation[0, 4:14, 0:3, 18:] = 2
    assert foreground_box(segmentation, margin=0.1) == (slice(3, 15), slice(0, 4), slice(17, 20))
    assert foreground_box(segmentation * 0 - 1, margin=0.1) == (slice(0, 20),) * 3


def test_cropping_shows_the_box_alone():
    data, segmentation = volume((20, 18, 16)), np.zeros((1, 20, 18, 16), np.int8)
    segmentation[0, 4:12, 2:14, 0:16] = 1
    how = {"crop_margin": 0.0, "patch_size": [8, 12, 16], "strategy": "resize", "windows": 1}
    cropped = case_inputs(data, segmentation, crop="foreground", **how)
    np.testing.assert_allclose(cropped[0], data[:, 4:12, 2:14], atol=1e-6)
    assert not np.allclose(case_inputs(data, None, crop="none", **how), cropped)


def test_sampling_draws_the_classes_equally_often():
    labels = class_labels((DIAGNOSIS, GRADE, SIGNS), cases=30)
    cases = [case for i, case in enumerate(labels.cases) if i % 3 or i < 6]  # one class is rarer
    weights = sampling_weights(labels, [DIAGNOSIS], cases)
    classes = label_matrix(labels, DIAGNOSIS, cases)
    np.testing.assert_allclose(np.bincount(classes, weights), np.full(3, 1 / 3))
    for targets in ([SIGNS], [DIAGNOSIS, GRADE, SIGNS]):
        weights = sampling_weights(labels, targets, cases)
        assert weights.sum() == pytest.approx(1) and (weights > 0).all()


@pytest.fixture
def cases(nnunet_environment):
    def make(targets=(DIAGNOSIS, SIGNS), **dataset):
        write_class_dataset(targets=targets, **dataset)
        labels = class_labels(targets)
        folder = Path(os.environ["nnUNet_preprocessed"]) / NAME / "fake_data"
        return ClassCases(folder, labels.cases, labels=labels, targets=targets)

    return make


def training_batches(cases, *, dimensions=3, batch_size=2, strategy="windows", **arguments):
    patch = [16] * dimensions
    transform = repeatable(nnUNetTrainer.get_training_transforms(patch, (-0.5, 0.5), None, (0, 1), False))
    inputs = partial(
        case_inputs, crop="foreground", crop_margin=0.2, patch_size=[20] * dimensions, windows=3, strategy=strategy
    )
    return TrainingBatches(cases, inputs, transform=transform, batch_size=batch_size, seed=5, **arguments)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_batch_depends_on_its_step_alone(cases, dimensions):
    batches = training_batches(cases(), dimensions=dimensions)
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.random(), float(torch.rand(1))
    first, other = batches[3], batches[4]
    np.random.seed(2)
    again = pickle.loads(pickle.dumps(batches))[3]
    assert torch.equal(first["data"], again["data"]) and first["case"] == again["case"]
    assert not torch.equal(first["data"], other["data"])
    assert first["data"].shape == (2, 3, 1, *[16] * dimensions)
    assert first["target"][0].dtype == torch.int64 and first["target"][1].shape == (2, 2)
    np.random.seed(1)
    torch.manual_seed(1)
    with global_seed(9):
        np.random.random(), torch.rand(1)
    assert before == (np.random.random(), float(torch.rand(1)))


def test_a_pass_shows_each_case_once_and_labels_belong_to_their_case(cases):
    subject = cases()
    batches = training_batches(subject, strategy="resize")
    for first in (0, 3):
        names = [name for step in range(first, first + 3) for name in batches.cases_of_step(step)]
        assert sorted(names) == subject.names
    assert [batches.cases_of_step(step) for step in range(3)] != [batches.cases_of_step(step) for step in range(3, 6)]
    batch = batches[1]
    labels = subject.labels.labels
    assert batch["target"][0].tolist() == [labels["diagnosis"][case] for case in batch["case"]]
    assert [tuple(np.flatnonzero(row)) for row in batch["target"][1]] == [labels["signs"][c] for c in batch["case"]]


def test_drawing_with_weights_leaves_out_what_has_none(cases):
    subject = cases()
    weights = np.array([0.5, 0, 0, 0.5, 0, 0])
    batches = training_batches(subject, weights=weights, batch_size=4)
    drawn = {name for step in range(6) for name in batches.cases_of_step(step)}
    assert drawn == {"case_00", "case_03"}


def test_validation_shows_each_case_once_in_order(cases):
    subject = cases()
    inputs = partial(case_inputs, crop="none", crop_margin=0.0, patch_size=[16] * 3, windows=1, strategy="resize")
    batches = ValidationBatches(subject, inputs, batch_size=4)
    assert len(batches) == 2
    assert [name for k in range(2) for name in batches[k]["case"]] == subject.names
    assert batches[1]["data"].shape == (2, 1, 1, 16, 16, 16)
    assert torch.equal(batches[0]["data"], batches[0]["data"])


def test_a_multilabel_case_is_drawn_by_the_rarest_of_its_labels():
    """Label 0 is common and label 1 rare; the cases that have both are as rare as their rarest label."""
    target = Target("findings", "multilabel", ("common", "rare"))
    of_case = {f"c{i}": (0,) for i in range(6)} | {"c6": (0, 1), "c7": (0, 1), "c8": (), "c9": ()}
    names = list(of_case)
    labels = ClassLabels((target,), {name: name for name in names}, {"findings": of_case})
    expected = np.array([1 / 8] * 6 + [1 / 2] * 2 + [1 / 2] * 2)
    weights = sampling_weights(labels, (target,), names)
    np.testing.assert_allclose(weights, expected / expected.sum())
    by_name = dict(zip(names, weights, strict=True))
    assert by_name["c6"] == pytest.approx(4 * by_name["c0"])


@pytest.mark.parametrize("seed", range(5))
def test_sampling_weights_are_those_of_a_naive_loop(seed):
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(30)]
    findings = Target("findings", "multilabel", ("a", "b", "c", "d"))
    kind = Target("kind", "multiclass", ("x", "y", "z"))
    of_case = {
        "findings": {n: tuple(np.flatnonzero(rng.random(4) < (0.7, 0.3, 0.1, 0.02))) for n in names},
        "kind": {n: int(rng.choice(3, p=(0.7, 0.2, 0.1))) for n in names},
    }
    labels = ClassLabels((findings, kind), {name: name for name in names}, of_case)
    expected = np.zeros(len(names))
    for values in of_case.values():
        groups = {name: (v or ("none",)) if isinstance(v, tuple) else (v,) for name, v in values.items()}
        count = {g: sum(g in groups[name] for name in names) for name in names for g in groups[name]}
        rarity = np.array([1 / min(count[g] for g in groups[name]) for name in names])
        expected += rarity / rarity.sum() / 2
    np.testing.assert_allclose(sampling_weights(labels, (findings, kind), names), expected)
