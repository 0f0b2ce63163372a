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
from nnssl_plugin.tasks.segmentation import evaluation as module
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
    monkeypatch.setattr(module, "draw_comparison", lambda *arguments: None)


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
    alone, score_case = rows(folders / "out"), module._score_case

    def there_and_back(task):
        return pickle.loads(pickle.dumps(score_case(pickle.loads(pickle.dumps(task)))))

    monkeypatch.setattr(module, "_score_case", there_and_back)
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


def test_a_flipped_file_lies_where_it_lies_with_every_reader(results, tmp_path):
    """NibabelIOWithReorient turns a flipped file over itself; SimpleITK leaves it."""
    plans = read_json(results / "plans.json")
    array = nibabel.load(results / "fold_0" / "validation" / "c0.nii.gz").get_fdata()
    references = Path(os.environ["nnUNet_preprocessed"]) / NAME / "gt_segmentations"
    affine = np.diag([-1.0, 0.8, 3.0, 1.0])
    affine[0, 3] = 11
    nibabel.save(nibabel.Nifti1Image(array[::-1].astype(np.uint8), affine), references / "c0.nii.gz")
    dice = {}
    for reader in ("SimpleITKIO", "NibabelIOWithReorient"):
        write_json(results / "plans.json", plans | {"image_reader_writer": reader})
        evaluation = evaluate_segmentation({"run": results / "fold_0"}, tmp_path / "out", processes=1)
        dice[reader] = evaluation.summaries["run"]["metric_per_case"][0]["metrics"]["1"]["Dice"]
    assert dice == {"NibabelIOWithReorient": 1.0, "SimpleITKIO": 1.0}


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
    write(folders / "a" / "unreferenced.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(UserError, match="unreferenced"):
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


@pytest.mark.slow
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


OBLIQUE = np.array([[0.1, -0.79, 0.2, 4.0], [0.99, 0.08, -0.3, -7.0], [0.05, 0.1, 2.97, 30.0], [0, 0, 0, 1]])


def oblique_affine():
    """Right-angled axes near OBLIQUE with the voxel sizes of SPACING."""
    rotation, _ = np.linalg.qr(OBLIQUE[:3, :3])
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(SPACING)
    affine[:3, 3] = OBLIQUE[:3, 3]
    return affine


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_another_orientation_of_the_same_place_scores_the_same(tmp_path, ending, order, flips):
    import SimpleITK

    rng, affine = np.random.default_rng(3), oblique_affine()
    reference, prediction = segmentation(rng), segmentation(rng)
    turn = np.stack([order, flips], axis=1).astype(float)
    turned = nibabel.apply_orientation(prediction, turn)
    turned_affine = affine @ nibabel.orientations.inv_ornt_aff(turn, prediction.shape)
    for name, array, matrix in (
        ("references", reference, affine),
        ("same", prediction, affine),
        ("turned", turned, turned_affine),
    ):
        save(tmp_path / name / "x.nii.gz", array, matrix)
        if ending == ".mha":
            image = SimpleITK.ReadImage(str(tmp_path / name / "x.nii.gz"))
            SimpleITK.WriteImage(image, str(tmp_path / name / "x.mha"))
    dataset_json(tmp_path, file_ending=ending)
    same, other = (evaluate(tmp_path, name).summaries[name] for name in ("same", "turned"))
    for label in ("1", "2"):
        for key in ("Dice", "HD95_mm", "NSD"):
            expected = same["mean"][label][key]
            assert other["mean"][label][key] == pytest.approx(expected, rel=1e-5), (label, key)
    assert same["mean"]["1"]["Dice"] < 1 and not same["warnings"]
    is_turned = (order, flips) != ((0, 1, 2), (1, 1, 1))
    assert any("another orientation" in text for text in other["warnings"]) == is_turned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (np.array([[1, 0, 0, 50], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "50 mm away"),
        (np.diag([-1.0, 1, 1, 1]), "does not lie where"),
        (np.diag([-1.0, -1, 1, 1]), "does not lie where"),
        (np.array([[1, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "0.3 mm away"),
        (np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "does not lie where"),
    ],
)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_predictions_that_lie_elsewhere_are_refused(folders, change, said, reader):
    dataset_json(folders, overwrite_image_reader_writer=reader)
    array = segmentation(np.random.default_rng(0))
    save(folders / "references" / "x.nii.gz", array, np.diag([1.0, 1, 1, 1]))
    save(folders / "c" / "x.nii.gz", array, change)
    with pytest.raises(UserError, match=said) as error:
        evaluate(folders, "c")
    assert "origins" in error.value.problem and "orientations" in error.value.problem


def test_the_rounding_of_headers_is_no_other_place(folders):
    affine = oblique_affine()
    save(folders / "references" / "x.nii.gz", segmentation(np.random.default_rng(0)), affine)
    save(folders / "c" / "x.nii.gz", segmentation(np.random.default_rng(0)), np.round(affine, 4))
    assert evaluate(folders, "c").summaries["c"]["mean"]["1"]["Dice"] == 1


@pytest.mark.parametrize("reader", ["NibabelIO", "SimpleITKIO"])
def test_distances_are_in_mm_whatever_unit_the_header_states(folders, reader):
    dataset_json(folders, overwrite_image_reader_writer=reader)
    for name, at in (("references", 1), ("c", 4)):
        array = np.zeros((8, 8, 8), dtype=np.uint8)
        array[at, 4, 4] = 1
        image = nibabel.Nifti1Image(array, np.diag([500.0, 500, 500, 1]))
        image.header.set_xyzt_units("micron")
        (folders / name).mkdir(exist_ok=True)
        nibabel.save(image, folders / name / "x.nii.gz")
    assert evaluate(folders, "c").summaries["c"]["mean"]["1"]["HD95_mm"] == pytest.approx(1.5)


def float_prediction(folders, change, name="c"):
    for case in range(6):
        array = nibabel.load(folders / "references" / f"case_{case}.nii.gz").get_fdata()
        save(folders / name / f"case_{case}.nii.gz", change(array).astype(np.float32), np.diag([*SPACING, 1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a / 3, "between whole numbers, for example 0.(3333|6667)"),
        (lambda a: np.where(a == 1, np.nan, a), "NaN"),
        (lambda a: a * 127.5 + (a == 1) * 0.0, "between whole numbers"),
        (lambda a: (a > 0) * 255, r"hold the values 0, 255 and no label of dataset.json \(liver 1, tumour 2\)"),
        (lambda a: a * 1e12, "beyond"),
        (lambda a: -a, "hold the values -2, -1, 0 and no label"),
    ],
)
def test_files_that_hold_no_labels_are_refused(folders, change, said):
    dataset_json(folders, overwrite_image_reader_writer="NibabelIO")  # ITK reads NaN as 0
    float_prediction(folders, change)
    with pytest.raises(UserError, match=said):
        evaluate(folders, "c")


def test_references_that_hold_no_labels_are_refused(folders):
    for case in range(6):
        path = folders / "references" / f"case_{case}.nii.gz"
        write(path, (nibabel.load(path).get_fdata() > 0) * 255)
    with pytest.raises(UserError, match=r"The references in .* hold the values 0, 255"):
        evaluate(folders, "a")


def test_values_that_are_almost_whole_are_rounded_and_told(folders):
    float_prediction(folders, lambda a: a * 0.9999999)
    evaluation = evaluate(folders, "c")
    assert evaluation.summaries["c"]["foreground_mean"]["Dice"] == 1
    (text,) = evaluation.odd["c"]
    assert "rounded" in text and len(evaluation.odd["c"][text]) == 6


def test_labels_that_dataset_json_does_not_name_are_told(folders, capsys):
    path = folders / "a" / "case_3.nii.gz"
    array = nibabel.load(path).get_fdata()
    array[0, 0, :2] = 7, 9
    write(path, array)
    arguments = ["evaluate", "segmentation", "-i", f"a={folders / 'a'}", "-ref", str(folders / "references")]
    assert main([*arguments, "-o", str(folders / "out"), "-np", "1"]) == 0
    assert "Warning: a: holds 7, 9, which dataset.json does not name" in capsys.readouterr().out
    warnings = read_json(folders / "out" / "a" / "summary.json")["warnings"]
    assert list(warnings.values()) == [["case_3"]]


def test_a_colour_picture_and_a_volume_per_class_are_refused(tmp_path, folders):
    dataset_json(tmp_path, file_ending=".png")
    for name in ("references", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        shape = (9, 9, 3) if name == "a" else (9, 9)
        io.imsave(tmp_path / name / "x.png", np.ones(shape, dtype=np.uint8), check_contrast=False)
    with pytest.raises(UserError, match="holds 3 channels"):
        evaluate(tmp_path, "a")


@pytest.mark.parametrize(
    ("labels", "more", "expected"),
    [
        (REGIONS, {}, {"(1, 2)": "whole organ", "2": "tumour"}),
        (LABELS | {"ignore": 9}, {}, {"1": "liver", "2": "tumour"}),
        ({"background": 0, "ignore": 1, "tumour": 2}, {}, {"2": "tumour"}),
        ({"background": "0", "liver": "1", "tumour": "2"}, {}, {"1": "liver", "2": "tumour"}),
        ({"background": 0, "liver": [1], "tumour": 2.0}, {}, {"1": "liver", "2": "tumour"}),
    ],
)
def test_labels_that_training_would_not_take_are_scored(folders, labels, more, expected):
    dataset_json(folders, labels, **more)
    summary = evaluate(folders, "references").summaries["references"]
    assert summary["label_names"] == expected
    assert all(mean["Dice"] == 1 for mean in summary["mean"].values())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"background": 0, "liver": "one"}, "label 'liver' is 'one'"),
        ({"background": 0, "liver": 1.5}, "label 'liver' is 1.5"),
        ({"background": 0, "liver": True}, "label 'liver' is True"),
        ({"background": 0}, "names no label besides the background"),
        ({"background": 0, "liver": 1, "ignore": 1}, "ignore label is 1"),
        ({"background": 0, "liver": 1, "ignore": [2, 3]}, "ignore label is"),
        (["background", "liver"], "is no object"),
        ({"0": "background", "1": "liver"}, "nnU-Net v1"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(folders, labels, said):
    dataset_json(folders, labels)
    with pytest.raises(UserError, match=said):
        evaluate(folders, "a")


def test_without_monai_dice_alone_is_scored(folders, monkeypatch, capsys):
    whole = evaluate(folders, "a").summaries["a"]
    monkeypatch.setattr("nnssl_plugin.tasks.segmentation.metrics.find_spec", lambda name: None)
    arguments = ["-i", f"a={folders / 'a'}", f"b={folders / 'b'}", "-ref", str(folders / "references")]
    assert main(["evaluate", "segmentation", *arguments, "-o", str(folders / "dice"), "-np", "1"]) == 0
    assert 'pip install "nnssl_plugin[evaluation]"' in capsys.readouterr().out
    alone = read_json(folders / "dice" / "a" / "summary.json")
    assert alone["mean"]["1"]["Dice"] == whole["mean"]["1"]["Dice"] and "NSD" not in alone["mean"]["1"]
    assert {row["nsd"] for row in rows(folders / "dice")} == {""}
    assert list(read_json(folders / "dice" / "comparison.json")["differences"]["b"]["liver"]) == ["Dice"]


def test_intervals_draw_subjects(folders, undrawn, tmp_path):
    subjects = {f"case_{case}": f"p{case // 3}" for case in range(6)}
    table = tmp_path / "subjects.csv"
    table.write_text("case,subject\n" + "".join(f"{case},{subject}\n" for case, subject in subjects.items()))
    found = evaluate(folders, "a", "b", subjects=table).comparison
    by_case = evaluate(folders, "a", "b").comparison
    assert (found.subjects, by_case.subjects) == (2, 6)
    value = {(row["run"], row["case"]): float(row["dice"]) for row in rows(folders / "out") if row["label"] == "liver"}
    b, a = ([value[run, case] for case in subjects] for run in ("b", "a"))
    expected = paired_bootstrap(b, a, subjects=list(subjects.values()))
    shown = found.differences["b"]["liver"]["dice"]
    assert (shown.low, shown.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    (folders / "classification.csv").write_bytes(table.read_bytes())
    assert evaluate(folders, "a", "b").comparison == found
    assert read_json(folders / "out" / "comparison.json")["subjects"] == 2
