"""Folders of predictions scored and compared: nnU-Net's numbers, its file layouts, and what is wrong with files."""

import csv
import json
import os
import pickle
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.statistics.bootstrap import paired_bootstrap
from nnssl_plugin.tasks.segmentation import evaluation as room
from nnssl_plugin.tasks.segmentation.evaluation import evaluate_segmentation

NAME = "Dataset908_Scored"
SPACING = (1.0, 0.8, 3.0)  # of the file's axes
LABELS = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "whole organ": [1, 2], "tumour": 2}


def write(path, array, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), np.diag([*spacing, 1])), path)


def segmentation(rng, shape=(12, 14, 9), labels=(1, 2)):
    array = np.zeros(shape, dtype=np.uint8)
    for label in labels:
        start = rng.integers(0, 5, len(shape))
        array[tuple(slice(s, s + 5) for s in start)] = label
    return array


def dataset_json(folder, labels=LABELS, **more):
    write_json(
        folder / "dataset.json",
        {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz", **more},
    )
    return folder / "dataset.json"


@pytest.fixture
def folders(tmp_path):
    """References of six cases and the predictions of two runs; the tumour of case 4 is in no file."""
    rng = np.random.default_rng(0)
    dataset_json(tmp_path)
    for case in range(6):
        labels = (1,) if case == 4 else (1, 2)
        for name in ("references", "a", "b"):
            write(tmp_path / name / f"case_{case}.nii.gz", segmentation(rng, labels=labels))
    return tmp_path


@pytest.fixture
def results(nnunet_environment):
    """Results of a trainer with two folds, and the preprocessed dataset that they belong to."""
    rng = np.random.default_rng(1)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / NAME
    home = Path(os.environ["nnUNet_results"]) / NAME / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (Path(os.environ["nnUNet_raw"]) / NAME).mkdir()
    splits = [{"train": ["c2", "c3"], "val": ["c0", "c1"]}, {"train": ["c0", "c1"], "val": ["c2", "c3"]}]
    for fold, split in enumerate(splits):
        for case in split["val"]:
            write(preprocessed / "gt_segmentations" / f"{case}.nii.gz", segmentation(rng))
            write(home / f"fold_{fold}" / "validation" / f"{case}.nii.gz", segmentation(rng))
    write_json(preprocessed / "splits_final.json", splits)
    write_json(
        home / "plans.json",
        {"dataset_name": NAME, "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO", "configurations": {}},
    )
    dataset_json(home)
    return home


@pytest.fixture
def undrawn(monkeypatch):
    """Without the picture, which takes a second."""
    monkeypatch.setattr(room, "draw_comparison", lambda *arguments: None)


def evaluate(folders, *names, **options):
    options = {"references": folders / "references", "processes": 1} | options
    return evaluate_segmentation({name: folders / name for name in names}, folders / "out", **options)


def rows(folder):
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def nnunet_summary(folders, run, monkeypatch, *, reader=None, ending=".nii.gz"):
    """What nnU-Net itself computes; in threads, because starting its processes takes seconds."""
    content = read_json(folders / "dataset.json")
    manager = PlansManager({"label_manager": "LabelManager"}).get_label_manager(content)
    monkeypatch.setattr(
        evaluate_predictions.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool)
    )
    evaluate_predictions.compute_metrics_on_folder(
        str(folders / "references"),
        str(folders / run),
        str(folders / "nnunet.json"),
        reader or SimpleITKIO(),
        ending,
        manager.foreground_regions if manager.has_regions else manager.foreground_labels,
        manager.ignore_label,
        num_processes=1,
    )
    return read_json(folders / "nnunet.json")


def assert_same_dice(ours, theirs):
    assert list(ours["mean"]) == list(theirs["mean"])
    for key in theirs["mean"]:
        assert ours["mean"][key]["Dice"] == pytest.approx(theirs["mean"][key]["Dice"], rel=1e-12, nan_ok=True)
    assert ours["foreground_mean"]["Dice"] == pytest.approx(theirs["foreground_mean"]["Dice"], rel=1e-12, nan_ok=True)
    for mine, other in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert mine["prediction_file"] == other["prediction_file"]
        assert mine["reference_file"] == other["reference_file"]
        for key, metrics in other["metrics"].items():
            assert np.array_equal(mine["metrics"][key]["Dice"], metrics["Dice"], equal_nan=True)
            assert (mine["metrics"][key]["n_pred"], mine["metrics"][key]["n_ref"]) == (
                metrics["n_pred"],
                metrics["n_ref"],
            )


def test_dice_is_that_of_nnunet(folders, monkeypatch):
    evaluate(folders, "a")
    assert_same_dice(read_json(folders / "out" / "a" / "summary.json"), nnunet_summary(folders, "a", monkeypatch))


def test_dice_of_regions_and_with_an_ignore_label_is_that_of_nnunet(folders, monkeypatch):
    dataset_json(folders, REGIONS | {"ignore": 3}, regions_class_order=[1, 2])
    rng = np.random.default_rng(5)
    for case in range(6):
        reference = segmentation(rng)
        reference[:, :, :3] = 3
        write(folders / "references" / f"case_{case}.nii.gz", reference)
    summary = evaluate(folders, "a").summaries["a"]
    assert_same_dice(read_json(folders / "out" / "a" / "summary.json"), nnunet_summary(folders, "a", monkeypatch))
    assert summary["label_names"] == {"(1, 2)": "whole organ", "2": "tumour"}
    assert [row["label"] for row in rows(folders / "out")[:2]] == ["whole organ", "tumour"]


def test_predictions_in_the_ignored_part_cost_nothing(folders):
    dataset_json(folders, LABELS | {"ignore": 3})
    reference, prediction = np.zeros((2, 10, 10, 10), dtype=np.uint8)
    reference[2:5, 2:5, 2:5], reference[7:] = 1, 3
    prediction[2:5, 2:5, 2:5], prediction[8:] = 1, 1
    write(folders / "references" / "x.nii.gz", reference)
    write(folders / "c" / "x.nii.gz", prediction)
    liver = evaluate(folders, "c").summaries["c"]["mean"]["1"]
    assert (liver["Dice"], liver["HD95_mm"], liver["NSD"]) == (1.0, 0.0, 1.0)


def test_images_of_pixels_are_measured_in_their_plane(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    dataset_json(tmp_path, file_ending=".png")
    for name in ("references", "a"):
        (tmp_path / name).mkdir()
        io.imsave(tmp_path / name / "x.png", segmentation(rng, (30, 40)), check_contrast=False)
    square = np.zeros((30, 40), dtype=np.uint8)
    square[5:15, 5:15] = 1
    io.imsave(tmp_path / "references" / "y.png", square, check_contrast=False)
    io.imsave(tmp_path / "a" / "y.png", np.roll(square, 3, axis=1), check_contrast=False)
    evaluate(tmp_path, "a")
    theirs = nnunet_summary(tmp_path, "a", monkeypatch, reader=NaturalImage2DIO(), ending=".png")
    assert_same_dice(read_json(tmp_path / "out" / "a" / "summary.json"), theirs)
    liver, tumour = rows(tmp_path / "out")[2:]
    assert float(liver["hd95_mm"]) == 3.0
    # of an outline of 36 pixels: 8 of the upper row, 8 of the lower, and 2 of the inner column lie within 1 pixel
    assert float(liver["nsd"]) == 18 / 36
    assert tumour["dice"] == tumour["hd95_mm"] == tumour["nsd"] == ""


def test_spacing_follows_the_axes_of_the_file(folders):
    masks = np.zeros((2, 8, 8, 8), dtype=np.uint8)
    masks[0, 1, 4, 4], masks[1, 3, 4, 6] = 1, 1  # 2 voxels of 1 mm and 2 of 3 mm apart
    write(folders / "references" / "x.nii.gz", masks[0])
    write(folders / "c" / "x.nii.gz", masks[1])
    evaluate(folders, "c")
    assert float(rows(folders / "out")[0]["hd95_mm"]) == pytest.approx((2**2 + 6**2) ** 0.5, rel=1e-5)


def test_missed_and_spurious_structures_cost_and_are_counted(folders):
    empty, full = np.zeros((4, 5, 6)), np.ones((4, 5, 6))
    for case, (reference, prediction) in enumerate([(full, full), (full, empty), (empty, full), (empty, empty)]):
        write(folders / "references" / f"x{case}.nii.gz", reference)
        write(folders / "c" / f"x{case}.nii.gz", prediction)
    summary = evaluate(folders, "c").summaries["c"]
    diagonal = np.linalg.norm(np.multiply((4, 5, 6), SPACING))
    liver = summary["mean"]["1"]
    assert (liver["Dice"], liver["NSD"]) == pytest.approx((1 / 3, 1 / 3))
    assert liver["HD95_mm"] == pytest.approx(2 * diagonal / 3)
    assert (liver["n"], liver["n_missed"], liver["n_spurious"], liver["n_both_empty"]) == (3, 1, 1, 1)
    assert np.isnan(summary["mean"]["2"]["Dice"])


def test_runs_are_compared_case_by_case_with_the_first(folders, undrawn):
    (folders / "b" / "case_0.nii.gz").unlink()
    evaluate(folders, "a", "b")
    content = read_json(folders / "out" / "comparison.json")
    assert (content["compared_to"], content["cases"]) == ("a", 5)
    found = {(row["run"], row["case"], row["label"]): row for row in rows(folders / "out")}
    cases = [f"case_{i}" for i in range(1, 6)]
    for field, key in (("dice", "Dice"), ("hd95_mm", "HD95_mm"), ("nsd", "NSD")):
        value = {k: float(row[field] or "nan") for k, row in found.items()}
        expected = {
            label: [[value[run, case, label] for case in cases] for run in ("b", "a")] for label in ("liver", "tumour")
        }
        expected["foreground_mean"] = np.nanmean([expected["liver"], expected["tumour"]], axis=0)
        for label, (later, first) in expected.items():
            interval = paired_bootstrap(later, first)
            shown = content["differences"]["b"][label][key]
            assert shown["mean"] == pytest.approx(interval.mean, abs=1e-4)
            assert (shown["low"], shown["high"]) == pytest.approx((interval.low, interval.high), abs=1e-4)
            assert shown["pairs"] == (4 if label == "tumour" else 5)


def test_a_comparison_is_drawn_and_is_plain_json(folders):
    dataset_json(folders, LABELS | {"never there": 3})
    evaluate(folders, "a", "b")
    picture = io.imread(folders / "out" / "comparison.png")
    assert picture.shape[0] > 500
    assert picture.std() > 5
    text = (folders / "out" / "comparison.json").read_text()
    content = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert content["differences"]["b"]["never there"]["Dice"] == {"mean": None, "low": None, "high": None, "pairs": 0}


def test_what_goes_to_workers_and_back_can_be_pickled(folders, monkeypatch):
    evaluate(folders, "a")
    alone, score_case = rows(folders / "out"), room._score_case

    def there_and_back(task):
        return pickle.loads(pickle.dumps(score_case(pickle.loads(pickle.dumps(task)))))

    monkeypatch.setattr(room, "_score_case", there_and_back)
    evaluate(folders, "a")
    assert rows(folders / "out") == alone
    assert str(pickle.loads(pickle.dumps(UserError("what", "how")))) == "what\nhow"


@pytest.mark.slow  # each worker imports torch, nnU-Net and MONAI
def test_worker_processes_give_the_same_table(folders):
    evaluate(folders, "a")
    alone = rows(folders / "out")
    evaluate(folders, "a", processes=2)
    assert rows(folders / "out") == alone


def test_cases_without_a_prediction_are_listed(folders):
    (folders / "a" / "case_1.nii.gz").unlink()
    evaluation = evaluate(folders, "a")
    assert evaluation.runs[0].missing == ("case_1",)
    assert read_json(folders / "out" / "a" / "summary.json")["missing_predictions"] == ["case_1"]


def test_folds_of_a_result_folder_are_pooled(results, tmp_path):
    evaluation = evaluate_segmentation({"run": results}, tmp_path / "out", processes=1)
    assert list(evaluation.runs[0].predictions) == ["c0", "c1", "c2", "c3"]
    assert evaluation.summaries["run"]["metric_per_case"][0]["reference_file"].endswith("gt_segmentations/c0.nii.gz")


@pytest.mark.parametrize("below", ["fold_1", "fold_1/validation"])
def test_one_fold_is_evaluated_alone(results, tmp_path, below):
    (results / "fold_1" / "validation" / "c2.nii.gz").unlink()
    evaluation = evaluate_segmentation({"run": results / below}, tmp_path / "out", processes=1)
    assert list(evaluation.runs[0].predictions) == ["c3"]
    assert evaluation.runs[0].missing == ("c2",)


def test_folds_can_be_chosen_and_must_share_no_case(results, tmp_path):
    write(results / "fold_2" / "validation" / "c0.nii.gz", np.zeros((12, 14, 9)))
    with pytest.raises(UserError, match=r"case c0 is in .*fold_0.* and in .*fold_2(.|\n)*-f 0 1"):
        evaluate_segmentation({"run": results}, tmp_path / "out", processes=1)
    chosen = evaluate_segmentation({"run": results}, tmp_path / "out", folds=[1, 2], processes=1)
    assert list(chosen.runs[0].predictions) == ["c0", "c2", "c3"]
    with pytest.raises(UserError, match="fold_7"):
        evaluate_segmentation({"run": results}, tmp_path / "out", folds=[7], processes=1)


def test_the_reader_is_the_one_of_the_plan(results, tmp_path):
    """NibabelIOWithReorient turns a flipped file over, as nnU-Net does; SimpleITK leaves it."""
    plans = read_json(results / "plans.json")
    array = nibabel.load(results / "fold_0" / "validation" / "c0.nii.gz").get_fdata()
    references = Path(os.environ["nnUNet_preprocessed"]) / NAME / "gt_segmentations"
    affine = np.diag([-1.0, 0.8, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(array[::-1].astype(np.uint8), affine), references / "c0.nii.gz")
    dice = {}
    for reader in ("SimpleITKIO", "NibabelIOWithReorient"):
        write_json(results / "plans.json", plans | {"image_reader_writer": reader})
        evaluation = evaluate_segmentation({"run": results / "fold_0"}, tmp_path / "out", processes=1)
        dice[reader] = evaluation.summaries["run"]["metric_per_case"][0]["metrics"]["1"]["Dice"]
    assert dice["NibabelIOWithReorient"] == 1.0 != dice["SimpleITKIO"]


@pytest.mark.parametrize(
    ("array", "spacing", "said"),
    [
        (np.zeros((12, 14, 8)), SPACING, "voxels"),
        (np.zeros((12, 14, 9)), (1.0, 0.8, 3.1), "spacing"),
    ],
)
def test_files_that_do_not_fit_are_named(folders, array, spacing, said):
    write(folders / "a" / "case_3.nii.gz", array, spacing)
    with pytest.raises(UserError, match=rf"a/case_3\.nii\.gz has .*{said}.*") as error:
        evaluate(folders, "a")
    assert "references/case_3.nii.gz" in str(error.value)
    assert not (folders / "out").exists()


def test_a_damaged_file_is_named(folders):
    path = folders / "a" / "case_2.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a/case_2\.nii\.gz cannot be read"):
        evaluate(folders, "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"references": None}, "-ref"),
        ({"references": "absent"}, "no folder absent"),
        ({"tolerance_mm": -1}, "tolerance"),
        ({"dataset_json": "absent.json"}, r"no absent\.json"),
    ],
)
def test_what_is_missing_is_named(folders, options, said):
    with pytest.raises(UserError, match=said):
        evaluate(folders, "a", **options)


def test_predictions_without_a_reference_are_named(folders):
    write(folders / "a" / "stranger.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(UserError, match="stranger"):
        evaluate(folders, "a")


def test_runs_with_other_labels_are_not_compared(folders, undrawn):
    dataset_json(folders / "b", {"background": 0, "kidney": 1})
    with pytest.raises(UserError, match=r"b: .*other labels"):
        evaluate(folders, "a", "b")
    assert evaluate(folders, "a", "b", dataset_json=folders / "dataset.json").comparison is not None


def test_runs_without_a_common_case_are_not_compared(folders):
    for case in range(6):
        (folders / ("a" if case < 3 else "b") / f"case_{case}.nii.gz").unlink()
    with pytest.raises(UserError, match="No case is in all of a, b"):
        evaluate(folders, "a", "b")


def test_the_command_prints_a_table_and_writes_the_files(folders, capsys):
    (folders / "b" / "case_5.nii.gz").unlink()
    arguments = [
        "evaluate",
        "segmentation",
        "-i",
        f"first={folders / 'a'}",
        f"second={folders / 'b'}",
        "-ref",
        str(folders / "references"),
        "-o",
        str(folders / "out"),
        "-np",
        "1",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    mean = read_json(folders / "out" / "first" / "summary.json")["mean"]["1"]
    assert re.search(rf"^first +liver +6 +{mean['Dice']:.4f} ", printed, re.MULTILINE)
    assert "second − first" in printed
    assert "second: 1 cases were not predicted and count nowhere: case_5" in printed
    written = {str(p.relative_to(folders / "out")) for p in (folders / "out").rglob("*") if p.is_file()}
    assert written == {"scores.csv", "first/summary.json", "second/summary.json", "comparison.json", "comparison.png"}


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["only_a_folder"], "NAME=DIR"),
        (["a=x", "a=y"], "Two runs"),
        (["a/b=x"], "cannot be called"),
        (["a=absent"], "no folder"),
    ],
)
def test_the_command_refuses_runs_that_it_cannot_name(runs, said, tmp_path, capsys):
    assert main(["evaluate", "segmentation", "-i", *runs, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
