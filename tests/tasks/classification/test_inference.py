"""A folder classified: mean of folds and mirrorings, going on after an interruption, and cases that cannot be used."""

import csv
import itertools

import nibabel
import numpy as np
import pytest
import torch
from fake_classifier import BINARY, FINDINGS, FakeClassifier, inference_plan, trained_folds

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.tasks.classification import ensemble as module
from nnssl_plugin.tasks.classification.ensemble import Ensemble, find_trained_folds
from nnssl_plugin.tasks.classification.inference import classify_images
from nnssl_plugin.tasks.classification.runs import find_tables, read_tables, targets_of

SHAPE = (12, 14, 10)


def corner(x):
    """Log-odds of an image: the mean of one corner."""
    return x[..., :5, :5].mean(dim=tuple(range(1, x.ndim)))


def write(folder, case, seed=None, **changes):
    array = np.random.default_rng(len(case) if seed is None else seed).normal(size=SHAPE) + 3
    array[changes.get("where", ...)] += changes.get("add", 0)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), folder / f"{case}_0000.nii.gz")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Five images, a model folder of two folds whose log-odds are ±corner, and how often each was asked."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        write(tmp_path / "images", f"case_{number}", seed=number)
    trained_folds(tmp_path / "model")
    loaded = {}

    def load(folder, fold, *, checkpoint, device, trust):
        factor, more = {"0": 1.0, "1": 3.0}[str(fold)], load.more
        loaded[str(fold)] = FakeClassifier(inference_plan(), lambda x: factor * corner(x), mirroring=(0, 2), **more)
        return loaded[str(fold)]

    load.more = {}
    monkeypatch.setattr(module, "load_classifier", load)
    tmp_path.load, tmp_path.loaded = load, loaded
    return tmp_path


@pytest.fixture
def tmp_path(tmp_path):
    """A path that may carry attributes."""
    return type("Place", (type(tmp_path),), {})(tmp_path)


def classify(place, **options):
    return classify_images(place / "images", place / "out" / "predictions.csv", place / "model", **options)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_probabilities_are_the_mean_of_the_folds(place):
    found = classify(place)
    assert (found.done, found.skipped, found.failed) == (5, 0, {})
    table = rows(place / "out" / "predictions.csv")
    assert [row["case"] for row in table] == [f"case_{k}" for k in range(5)]
    model = place.loaded["0"]
    image = nibabel.load(place / "images" / "case_0_0000.nii.gz").get_fdata().T
    normalised = torch.from_numpy((image - image.mean()) / image.std()).float()[None]
    value = corner(model.inputs(normalised.numpy())[None])
    expected = float((torch.sigmoid(value) + torch.sigmoid(3 * value)) / 2)
    assert float(table[0]["p_malignant"]) == pytest.approx(expected, abs=1e-5)
    assert table[0]["predicted"] == BINARY.classes[expected > 0.5]


def test_chosen_folds_alone_are_asked(place):
    classify(place, folds=["1"])
    assert set(place.loaded) == {"1"}
    assert set(read_json(place / "out" / "predictions.json")["sha256_of_folds"]) == {"1"}


def test_mirrorings_are_every_combination_of_the_axes_that_training_mirrored():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 1, 6, 7, 8, generator=rng)
    model = FakeClassifier(inference_plan(), lambda x: x[..., :2, :3, :4].mean((1, 2, 3, 4, 5)), mirroring=(0, 2))
    found = Ensemble((model,), mirroring=True).probabilities(x)["malignancy"]
    flipped = []
    for first, last in itertools.product((False, True), repeat=2):
        turned = x.numpy()[:, :, :, :: -1 if first else 1, :, :: -1 if last else 1].copy()
        flipped.append(model.probabilities(torch.from_numpy(turned))["malignancy"])
    torch.testing.assert_close(found, torch.stack(flipped).mean(0))
    assert not torch.allclose(found, model.probabilities(x)["malignancy"])


def test_going_on_asks_only_about_cases_that_are_not_in_the_table(place):
    classify(place)
    path = place / "out" / "predictions.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])  # within the last row
    found = classify(place)
    assert (found.done, found.skipped) == (1, 4) and place.loaded["0"].images_seen == 1
    assert path.read_bytes() == whole


def test_an_interrupted_run_leaves_the_rows_of_finished_cases(place, monkeypatch):
    asked = FakeClassifier.probabilities

    def interrupted(self, x):
        if self.images_seen == 2:
            raise KeyboardInterrupt
        return asked(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(FakeClassifier, "probabilities", interrupted)
        with pytest.raises(KeyboardInterrupt):
            classify(place)
    assert len(rows(place / "out" / "predictions.csv")) == 2
    assert (classify(place).done, len(rows(place / "out" / "predictions.csv"))) == (3, 5)


def test_other_weights_do_not_continue_a_table(place):
    classify(place)
    (place / "model" / "fold_1" / "checkpoint_final.pth").write_text("trained on")
    with pytest.raises(UserError, match="another sha256_of_folds"):
        classify(place)


def test_a_bad_file_does_not_stop_the_others_and_the_exit_code_tells(place, capsys):
    images = place / "images"
    write(images, "nan", where=(0, 0, 0), add=np.nan)
    (images / "torn_0000.nii.gz").write_bytes((images / "case_0_0000.nii.gz").read_bytes()[:500])
    (images / "unnamed.nii.gz").write_bytes((images / "case_0_0000.nii.gz").read_bytes())
    command = ["classify", "-i", str(images), "-o", str(place / "p.csv"), "-m", str(place / "model")]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "nan: left out, 1 voxels are NaN" in printed and "torn: left out, it cannot be read" in printed
    assert "unnamed.nii.gz: left out" in printed and "5 cases classified, 0 were there, 3 left out" in printed
    assert len(rows(place / "p.csv")) == 5
    for name in ("nan_0000", "torn_0000", "unnamed"):
        (images / f"{name}.nii.gz").unlink()
    assert main(command) == 0


def test_a_model_that_answers_nan_writes_no_row(place):
    place.load.more = {}
    for path in (place / "images").iterdir():
        path.unlink()
    write(place / "images", "a")
    original = module.load_classifier

    def load(*args, **options):
        model = original(*args, **options)
        model.log_odds = lambda x: corner(x) * float("nan")
        return model

    module.load_classifier = load
    assert "NaN" in classify(place).failed["a"]
    assert not (place / "out" / "predictions.csv").exists()


def test_several_targets_have_a_table_each_that_can_be_scored(place):
    place.load.more = {"targets": (BINARY, FINDINGS)}
    classify(place)
    output = place / "out" / "predictions.csv"
    tables = find_tables(output)
    assert [path.name for path in tables] == ["predictions_findings.csv", "predictions_malignancy.csv"]
    references = {
        "malignancy": {f"case_{k}": ("s", k % 2) for k in range(5)},
        "findings": {f"case_{k}": ("s", (0,)) for k in range(5)},
    }
    found = read_tables(tables, targets_of(output), references=references)
    assert found["findings"].labels.tolist() == [[True, False]] * 5


def test_a_model_that_crops_wants_segmentations(place):
    place.load.more = {"crop": "foreground"}
    with pytest.raises(UserError, match="box around the labels"):
        classify(place)
    (place / "labels").mkdir()
    labels = np.zeros(SHAPE)
    labels[3:9, 3:9, 3:9] = 1
    for number in range(4):
        nibabel.save(
            nibabel.Nifti1Image(labels.astype(np.uint8), np.eye(4)), place / "labels" / f"case_{number}.nii.gz"
        )
    found = classify(place, segmentations=place / "labels")
    assert found.done == 4 and "no segmentation" in found.failed["case_4"]


def test_folds_that_see_different_things_are_not_averaged(place, monkeypatch):
    original = module.load_classifier

    def load(folder, fold, **options):
        model = original(folder, fold, **options)
        if fold == "1":
            model.targets = (FINDINGS,)
        return model

    monkeypatch.setattr(module, "load_classifier", load)
    with pytest.raises(UserError, match=r"Folds 0 and 1 .* differ"):
        classify(place)


def test_folds_are_found_by_their_checkpoint(tmp_path):
    trained_folds(tmp_path, ("0", "10", "2", "all"))
    trained_folds(tmp_path, ("3",), checkpoint="checkpoint_best.pth")
    assert find_trained_folds(tmp_path, "checkpoint_final.pth") == ["0", "2", "10"]
    assert find_trained_folds(trained_folds(tmp_path / "only", ("all",)), "checkpoint_final.pth") == ["all"]
    with pytest.raises(UserError, match=r"No fold of .* has a x\.pth"):
        find_trained_folds(tmp_path, "x.pth")


def test_the_output_must_be_a_table(place):
    with pytest.raises(UserError, match="no name of a table"):
        classify_images(place / "images", place / "out", place / "model")
