"""A folder and a table become a classification dataset; kinds are inferred; mistakes are named before work begins."""

import csv
from pathlib import Path

import numpy as np
import pytest
from in_process import command
from PIL import Image

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.label_tables import infer_targets, match_scans
from nnssl_plugin.intake.labelled import (
    describe,
    label_dataset,
    prepare_class_dataset,
    warn_of_rare_classes,
    warn_of_similar_classes,
)
from nnssl_plugin.intake.unlabelled import prepare_dataset
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, read_class_labels, read_targets


@pytest.fixture
def table(tmp_path):
    """A function (lines of text) → path of a csv."""

    def write(*lines):
        path = tmp_path / "labels.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def scans(source, save):
    save("siteA/p1/one.nii.gz", seed=1)
    save("siteA/p1/two.nii.gz", seed=2)
    save("siteB/three.nii.gz", seed=3)
    save("four.nii", seed=4)
    save("unnamed.nii.gz", seed=5)
    return source


ROWS = ("case,subject,diagnosis", "siteA/p1,,sick", "siteB/three.nii.gz,p3,healthy", "four,,sick")


def prepare(source, path, **options):
    return prepare_class_dataset(source, 501, "Classes", table=path, processes=1, **options)


def columns(*cells, name="x"):
    return [{"case": str(number), name: cell} for number, cell in enumerate(cells)]


def target(*cells, spec=None):
    (found,) = infer_targets(columns(*cells), [spec] if spec else [], where=Path("t.csv"))
    return found.kind, found.classes


def test_files_and_folders_of_a_table_become_cases_with_labels(raw, scans, table):
    summary, labelled = prepare(scans, table(*ROWS))
    assert sorted(summary.added) == ["four", "siteA_p1_one", "siteA_p1_two", "siteB_three"]  # and not the unnamed one
    labels = read_class_labels(raw / "Dataset501_Classes")
    assert labels == labelled.labels
    assert labels.targets[0].kind == "binary" and labels.targets[0].classes == ("healthy", "sick")
    assert labels.labels["diagnosis"] == {"four": 1, "siteA_p1_one": 1, "siteA_p1_two": 1, "siteB_three": 0}
    assert labels.subjects == {
        "four": "four",
        "siteA_p1_one": "siteA/p1",
        "siteA_p1_two": "siteA/p1",
        "siteB_three": "p3",
    }
    description = read_json(summary.folder / "dataset.json")
    assert description["numTraining"] == 4 and description["labels"] == {"background": 0, "body": 1}
    assert labelled.dropped == labelled.unlabelled == () and labelled.left_out == 1


def test_running_it_again_changes_nothing_and_takes_what_is_new(raw, scans, table):
    summary, _ = prepare(scans, table(*ROWS))
    before = (summary.folder / "classification.csv").read_bytes()
    again, labelled = prepare(scans, table(*ROWS))
    assert (again.added, again.known) == ((), 4) and labelled.path.read_bytes() == before
    more, labelled = prepare(scans, table(*ROWS, "unnamed.nii.gz,,healthy"))
    assert more.added == ("unnamed",) and "unnamed" in labelled.labels.cases
    fewer, labelled = prepare(scans, table(*ROWS))
    assert labelled.unlabelled == ("unnamed",) and fewer.known == 4


def test_a_refused_scan_loses_its_row(raw, scans, table):
    (scans / "empty.nii.gz").touch()
    summary, labelled = prepare(scans, table(*ROWS, "empty.nii.gz,,healthy"))
    assert labelled.dropped == ("empty.nii.gz",) and len(summary.rejected) == 1
    assert "empty" not in labelled.labels.cases
    table_of_bad = table("case,x", "empty.nii.gz,1", "gone.nii.gz,0")
    (scans / "gone.nii.gz").touch()
    with pytest.raises(UserError, match=r"Every scan that .* was refused: empty.nii.gz, gone.nii.gz"):
        prepare(scans, table_of_bad)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((*ROWS, "five,,sick"), "not below .*: five"),
        ((*ROWS, "four.nii,,sick"), "'four' and 'four.nii' both name"),
        ((*ROWS, "siteA/p1/one,,sick"), "both name"),
        ((*ROWS, "four,,sick"), "'four' occurs twice"),
        ((*ROWS, "unnamed,,"), "no diagnosis for unnamed"),
        (ROWS[:2], "one class only"),
        (("case,subject", "four,p"), "no column of class labels"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_written(raw, scans, table, lines, words):
    with pytest.raises(UserError, match=words) as error:
        prepare(scans, table(*lines))
    assert error.value.remedy and list(raw.iterdir()) == []


def test_a_file_is_found_by_its_name_alone_where_there_is_one(scans, tmp_path):
    files = [scans / "a/x.nii.gz", scans / "b/x.nii.gz", scans / "b/y.nrrd"]
    found = match_scans([{"case": "y.nrrd"}, {"case": "a\\x"}], files, source=scans, where=tmp_path)
    assert {scan: row["case"] for scan, row in found.items()} == {files[2]: "y.nrrd", files[0]: "a\\x"}
    with pytest.raises(UserError, match="not below"):
        match_scans([{"case": "x.nii.gz"}], files, source=scans, where=tmp_path)


def test_kinds_and_classes_are_inferred():
    assert target("b", "a", "b", "c", "c", "a") == ("multiclass", ("a", "b", "c"))
    assert target("10", "9", "9", "10", "2", "2") == ("multiclass", ("2", "9", "10"))
    assert target("1", "0", "1") == ("binary", ("0", "1"))
    assert target("sick", "Normal", "sick") == ("binary", ("Normal", "sick"))
    assert target("benign", "malignant", "benign") == ("binary", ("benign", "malignant"))
    assert target("b;a", "none", "a; b", "a") == ("multilabel", ("a", "b"))


def test_what_is_given_goes_before_what_is_inferred():
    assert target("1", "2", "3", "1", "2", "3", spec="x:ordinal") == ("ordinal", ("1", "2", "3"))
    assert target("low", "high", spec="x:ordinal:low,mid,high") == ("ordinal", ("low", "mid", "high"))
    assert target("a", "b", spec="x::b,a") == ("binary", ("b", "a"))
    assert target("a", "b", "none", spec="x:multilabel") == ("multilabel", ("a", "b"))
    rows = [{"case": "1", "x": "a", "note": "hello"}, {"case": "2", "x": "b", "note": "you"}]
    assert [t.name for t in infer_targets(rows, ["x"], where=Path("t.csv"))] == ["x"]


@pytest.mark.parametrize(
    ("cells", "spec", "words"),
    [
        (("low", "mid", "high") * 2, "x:ordinal", "order of the classes of x is not known"),
        (("1.5", "2.7", "3.1", "4.4", "4.4"), None, "4 different values in 5 rows"),
        (("a", "b"), "x:nominal", "kind 'nominal'"),
        (("a", "b"), "y", "no column 'y'; it has: x"),
        (("a", "b"), "x:binary:a", "one class only"),
    ],
)
def test_a_target_that_cannot_be_inferred_is_refused(cells, spec, words):
    with pytest.raises(UserError, match=words):
        target(*cells, spec=spec)


def test_counts_and_rare_classes_are_told(raw, scans, table):
    _, labelled = prepare(scans, table(*ROWS))
    lines = describe(labelled.labels)
    assert lines[0] == "diagnosis (binary, positive: sick):"
    assert [line.split() for line in lines[1:]] == [
        ["healthy", "1", "cases", "of", "1", "subjects"],
        ["sick", "3", "cases", "of", "2", "subjects"],
    ]
    assert warn_of_rare_classes(labelled.labels, folds=2) == [
        "diagnosis: class healthy has 1 subjects, fewer than 2 folds; some will lack it."
    ]
    assert len(warn_of_rare_classes(labelled.labels)) == 2


def test_a_dataset_that_is_there_gets_labels_and_keeps_everything_else(raw, scans, table):
    folder = prepare_dataset(scans, 502, "Segmented", processes=1).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    path = table("case;grade", "four_0000.nii.gz;low", "siteB_three.nii.gz;high", "labelsTr/unnamed.nii.gz;mid")
    labelled = label_dataset("502", table=path, targets=["grade:ordinal:low,mid,high"])
    assert labelled.labels.labels["grade"] == {"four": 0, "siteB_three": 2, "unnamed": 1}
    assert labelled.unlabelled == ("siteA_p1_one", "siteA_p1_two")
    assert read_targets(folder)[0].classes == ("low", "mid", "high")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after if before.get(path) != after[path]} == {"classification.csv", "dataset.json"}


def test_labels_for_cases_that_a_dataset_lacks_are_refused(raw, scans, table):
    prepare_dataset(scans, 502, "Segmented", processes=1)
    with pytest.raises(UserError, match=r"does not have: five.") as error:
        label_dataset(502, table=table("case,x", "four,1", "five,0"))
    assert "'four'" in error.value.remedy
    with pytest.raises(UserError, match="'four' occurs twice"):
        label_dataset(502, table=table("case,x", "four,1", "four_0000.nii.gz,0"))
    with pytest.raises(UserError, match="no single dataset 503"):
        label_dataset(503, table=table("case,x", "four,1", "unnamed,0"))


def test_the_command_prints_the_classes(raw, scans, table, capsys):
    base = ["prepare", "-i", str(scans), "-d", "501", "-n", "Classes", "-np", "1"]
    assert main([*base, "--class-labels", str(table(*ROWS))]) == 0
    printed = capsys.readouterr().out
    expected = ("4 cases with class labels", "1 scans without a row", "positive: sick", "Warning: diagnosis")
    assert [words for words in expected if words not in printed] == []
    path = table("case,grade", "four,low", "siteB_three,high")
    assert main(["prepare", "-d", "501", "--class-labels", str(path), "--target", "grade:ordinal:low,high"]) == 0
    printed = capsys.readouterr().out
    assert "grade (ordinal):" in printed and "2 cases of the dataset have no row" in printed


@pytest.mark.parametrize("arguments", [[], ["--target", "x"], ["-i", "somewhere"], ["-i", "x", "-n", "y", "-d", "z"]])
def test_flags_that_do_not_make_a_whole_are_refused(raw, arguments, capsys):
    assert main(["prepare", "-d", "501", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.slow
def test_2d_images_pass_planning_and_preprocessing(nnunet_environment, raw, source, table):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 48), dtype=np.uint8)).save(source / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number % 2]}")
    prepare(source, table("case,x", *rows))
    flags = ("-d", "501", "-c", "2d", "--verify_dataset_integrity", "-np", "1", "-npfp", "1")
    command(raw.parent, "nnUNetv2_plan_and_preprocess", *flags)
    preprocessed = Path(nnunet_environment["nnUNet_preprocessed"]) / "Dataset501_Classes"
    assert len(list((preprocessed / "nnUNetPlans_2d").glob("*.pkl"))) == 6
    assert "classification" in read_json(preprocessed / "dataset.json")
    assert main(["split", "-d", "501"]) == 0


def test_real_ultrasound_images_become_a_three_class_dataset(raw, data_folder, tmp_path):
    images = data_folder / "busi_us_text"
    if not images.is_dir():
        pytest.skip(f"no busi_us_text below {data_folder}")
    chosen = [path for kind in ("benign", "malignant", "normal") for path in sorted((images / kind).iterdir())[:5]]
    with (tmp_path / "busi.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "diagnosis"), *((p.relative_to(images), p.parent.name) for p in chosen)])
    summary, labelled = prepare(images, tmp_path / "busi.csv")
    assert (len(summary.added), summary.rejected) == (15, ())
    assert labelled.labels.targets[0].classes == ("benign", "malignant", "normal")
    assert np.bincount(list(labelled.labels.labels["diagnosis"].values())).tolist() == [5, 5, 5]


def test_words_for_no_value_make_no_class():
    assert target("benign", "malignant", "NA", "benign") == ("binary", ("benign", "malignant"))
    assert target("benign", "malignant", "none") == ("binary", ("benign", "malignant"))
    assert target("none", "tumour", spec="x:binary:none,tumour") == ("binary", ("none", "tumour"))


def test_names_that_differ_in_case_and_signs_alone_are_warned_of():
    names = ("benign", "Benign", "grade 1", "grade_1", "malignant")
    labels = ClassLabels((Target("x", "multiclass", names),), {}, {"x": {}})
    first, second = warn_of_similar_classes(labels)
    assert "x: benign and Benign" in first and "grade 1 and grade_1" in second
    assert warn_of_similar_classes(ClassLabels((Target("x", "binary", ("0", "1")),), {}, {"x": {}})) == []


def test_absolute_paths_name_scans(scans, tmp_path):
    files = [scans / "a/x.nii.gz", scans / "b/y.nrrd", scans / "b/z.nrrd"]
    rows = [{"case": str(scans / "a/x.nii.gz")}, {"case": f"{scans}/b/y"}, {"case": f"{scans}/b/../b/z.nrrd"}]
    found = match_scans(rows, files, source=scans, where=tmp_path)
    assert [scan for scan, _ in found.items()] == files
    with pytest.raises(UserError, match="not below"):
        match_scans([{"case": "/elsewhere/a/x.nii.gz"}], files, source=scans, where=tmp_path)
