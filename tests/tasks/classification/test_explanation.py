"""Where a model looks: maps of models whose answer is known in closed form, and pictures that stand the right way."""

import nibabel
import numpy as np
import pytest
import torch
from fake_classifier import BINARY, FINDINGS, FakeClassifier, inference_plan, trained_folds
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl_plugin.data.images import Image
from nnssl_plugin.errors import UserError
from nnssl_plugin.tasks.classification import ensemble as module
from nnssl_plugin.tasks.classification import explanation
from nnssl_plugin.tasks.classification.ensemble import Ensemble
from nnssl_plugin.tasks.classification.explanation import explain, mask_size
from nnssl_plugin.tasks.classification.explanation_figure import _views, most_evident_slice
from nnssl_plugin.tasks.classification.inference import classify_images

pytest.importorskip("monai")

ANSWERS = {"malignancy": np.array([0.2, 0.8]), "findings": np.array([0.9, 0.1])}


def image_of(data, properties=None, spacing=(2.0, 1.0, 1.0)):
    return Image(data.astype(np.float32), None, properties or {}, spacing, ())


def linear(weights):
    """A model whose log-odds are Σ weights · x of the one window that it sees."""
    return lambda x: (x[:, 0] * torch.as_tensor(weights)).flatten(1).sum(1)


def test_evidence_is_that_of_hiding_each_part_by_itself():
    """Naive: hide every overlapping box behind the mean, take the difference, average over the boxes of a voxel."""
    rng = np.random.default_rng(0)
    data, weights = rng.normal(size=(1, 1, 16, 16)), rng.normal(size=(1, 16, 16)).astype(np.float32) / 10
    model = FakeClassifier(inference_plan(dimensions=2), linear(weights), targets=(BINARY, FINDINGS))
    found = explain(Ensemble((model,), False), image_of(data), ANSWERS)
    size = mask_size((1, 16, 16))
    assert size == [1, 2, 2]
    lost, times = np.zeros((16, 16)), np.zeros((16, 16))
    for row in range(15):
        for column in range(15):
            hidden = data.copy()
            hidden[0, 0, row : row + 2, column : column + 2] = data.mean()
            lost[row : row + 2, column : column + 2] += ((data - hidden)[0, 0] * weights[0]).sum()
            times[row : row + 2, column : column + 2] += 1
    np.testing.assert_allclose(found["malignancy"].evidence[0], lost / times, atol=1e-4)
    assert (found["malignancy"].class_index, found["findings"].class_index) == (1, 0)
    np.testing.assert_allclose(found["findings"].evidence, -found["malignancy"].evidence, atol=2e-4)


@pytest.mark.parametrize("strategy", ["resize", "windows"])
def test_evidence_lies_where_the_model_looks(strategy):
    data = np.random.default_rng(0).normal(size=(2, 20, 16, 24)) * 0.1
    data[1, 12:18, 2:7, 14:20] += 5

    def bright(x):  # how much of the second channel is bright
        return 20 * torch.relu(x[:, :, 1] - 1).flatten(1).mean(1)

    model = FakeClassifier(inference_plan(channels=2), bright, strategy=strategy, channels=2)
    evidence = explain(Ensemble((model,), False), image_of(data), ANSWERS)["malignancy"].evidence
    assert evidence.shape == (20, 16, 24)
    inside = evidence[12:18, 2:7, 14:20]
    assert inside.mean() > 5 * np.abs(evidence).mean()
    for axis, (first, last) in enumerate(((12, 18), (2, 7), (14, 20))):
        assert first - 1 <= most_evident_slice(evidence, axis) <= last


def test_what_speaks_against_the_answer_is_negative():
    data = np.zeros((1, 16, 16, 16))
    data[:, :5, :5, :5], data[:, 11:, 11:, 11:] = 4, 4
    weights = np.zeros((1, 16, 16, 16), dtype=np.float32)
    weights[:, :5, :5, :5], weights[:, 11:, 11:, 11:] = 0.01, -0.01
    model = FakeClassifier(inference_plan(), linear(weights))
    evidence = explain(Ensemble((model,), False), image_of(data), ANSWERS)["malignancy"].evidence
    assert evidence[2, 2, 2] > 0 > evidence[13, 13, 13]


def test_a_model_that_looks_nowhere_has_no_evidence_and_a_picture_all_the_same(tmp_path):
    model = FakeClassifier(inference_plan(), lambda x: torch.full((len(x),), 20.0))  # surer than log-odds can say
    found = explain(Ensemble((model,), False), image_of(np.random.rand(1, 8, 9, 10)), ANSWERS)["malignancy"]
    assert np.abs(found.evidence).max() == 0 and most_evident_slice(found.evidence, 1) == 4


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL"])
@pytest.mark.parametrize("reader", [NibabelIOWithReorient, SimpleITKIO])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_pictures_stand_as_their_letters_say(tmp_path, codes, reader, transpose):
    """Each voxel holds its own position in the patient, so a picture's rows and columns can be read off."""
    shape = (5, 6, 7)
    target = nibabel.orientations.axcodes2ornt(codes)
    affine = nibabel.orientations.inv_ornt_aff(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), target), shape
    )
    grid = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"), -1)
    position = nibabel.affines.apply_affine(affine, grid)  # right, anterior, superior
    views = {}
    for way, letters in enumerate(("LR", "PA", "IS")):
        path = tmp_path / f"{letters}_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(position[..., way].astype(np.float32), affine), path)
        data, properties = reader().read_images([str(path)])
        data = data.transpose([0, *(1 + axis for axis in transpose)])
        for view in _views(image_of(data, properties), transpose):
            views.setdefault(view.name, {})[letters] = (view, view.cut(data[0], 2))
    assert set(views) == {"axial", "coronal", "sagittal"}
    for shown in views.values():
        view = shown["LR"][0]
        left, right, top, bottom = view.letters
        for (start, end), axis in (((left, right), 1), ((top, bottom), 0)):
            letters = next(pair for pair in shown if start in pair)
            steps = np.diff(shown[letters][1], axis=axis)
            towards = letters[1] == end  # the second letter is where the coordinate grows
            assert (steps > 0).all() if towards else (steps < 0).all()


@pytest.mark.slow
def test_pictures_are_written_with_the_rows_and_made_up_for(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    array = np.random.default_rng(0).normal(size=(12, 14, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "images" / "a_0000.nii.gz")
    monkeypatch.setattr(
        module,
        "load_classifier",
        lambda *_, **__: FakeClassifier(
            inference_plan(), lambda x: x[..., :4].mean((1, 2, 3, 4, 5)), targets=(BINARY, FINDINGS)
        ),
    )
    where = (tmp_path / "images", tmp_path / "p.csv", trained_folds(tmp_path / "model", ("0",)))
    classify_images(*where)
    found = classify_images(*where, explanations=tmp_path / "pictures")
    assert (found.done, found.skipped) == (1, 0)
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"a_malignancy.png", "a_findings.png"}
    assert len((tmp_path / "p_findings.csv").read_text().splitlines()) == 2
    assert classify_images(*where, explanations=tmp_path / "pictures").skipped == 1


def test_without_monai_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(explanation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nnssl_plugin\[evaluation\]"):
        classify_images(tmp_path, tmp_path / "p.csv", tmp_path, explanations=tmp_path / "pictures")
