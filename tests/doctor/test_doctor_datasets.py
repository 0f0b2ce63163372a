"""A dataset from raw scans to preprocessed cases: what is there, what is missing, and how much room it needs."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnssl_plugin.data.triplets import Embeddings, Triplet, text_sha256, write_embeddings, write_triplets
from nnssl_plugin.doctor.datasets import CHECKPOINTS, dataset_findings, find_dataset, room_needed
from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING

NAME = "Dataset501_Scans"
SHAPES = [(8, 9, 10), (7, 5, 3), (6, 6, 6)]


@pytest.fixture
def environment(tmp_path):
    """Three cases with two channels, not planned, without triplets."""
    raw = tmp_path / "raw" / NAME
    (raw / "imagesTr").mkdir(parents=True)
    (tmp_path / "pre").mkdir()
    for number, shape in enumerate(SHAPES):
        for channel in range(2):
            image = nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4))
            nibabel.save(image, raw / "imagesTr" / f"c{number}_000{channel}.nii.gz")
    describe(raw)
    return {"nnUNet_raw": str(tmp_path / "raw"), "nnUNet_preprocessed": str(tmp_path / "pre")}


def describe(raw, **changes):
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "body": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        **changes,
    }
    (raw / "dataset.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def raw_of(environment):
    return dataset(environment).raw


def dataset(environment, name="501"):
    found, findings = find_dataset(environment, name)
    assert [finding.status for finding in findings] == [OK]
    return found


def look(environment):
    return {finding.topic: finding for finding in dataset_findings(dataset(environment))}


def write_plan(environment, name, configurations, cases=()):
    folder = Path(environment["nnUNet_preprocessed"], NAME)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"plans_name": name, "configurations": configurations}))
    for case in cases:
        (folder / "data").mkdir(exist_ok=True)
        for ending in (".pkl", ".b2nd", "_seg.b2nd"):
            (folder / "data" / f"{case}{ending}").write_text("")


def write_captions(environment, cases, *, embedded=True, weights="tiny"):
    triplets = [Triplet(case, "axial", 1, 3, f"Text of {case}", "template") for case in cases]
    write_triplets(raw_of(environment), triplets)
    if embedded:
        rows = np.eye(len(cases), 4, dtype=np.float32)
        hashes = np.array([text_sha256(t.text) for t in triplets])
        write_embeddings(raw_of(environment), Embeddings(np.array(cases), hashes, hashes, rows, rows, weights))


@pytest.mark.parametrize("name", ["501", NAME])
def test_a_dataset_is_found_by_number_and_name(name, environment):
    assert dataset(environment, name).name == NAME


@pytest.mark.parametrize("name", ["502", "50", "Dataset502_Scans", "1.5", "[0-9]*"])
def test_an_unknown_dataset_is_a_problem(name, environment):
    found, (finding,) = find_dataset(environment, name)
    assert found is None and finding.status == PROBLEM and "nnssl_plugin prepare" in finding.remedy


def test_two_datasets_of_one_number_are_a_problem(environment, tmp_path):
    (tmp_path / "pre" / "Dataset501_Other").mkdir()
    found, (finding,) = find_dataset(environment, "501")
    assert found is None and finding.status == PROBLEM and "Dataset501_Other" in finding.message


def test_a_dataset_that_is_only_preprocessed_is_a_warning(environment, tmp_path):
    (tmp_path / "pre" / "Dataset007_Target").mkdir()
    found, (finding,) = find_dataset(environment, "7")
    assert found.number == "7" and finding.status == WARNING
    assert room_needed(found) == ({"nnUNet_results": CHECKPOINTS}, [])


def test_a_fresh_dataset_lacks_triplets_and_plans(environment):
    findings = look(environment)
    assert findings["images"].status == OK and "3 training cases" in findings["images"].message
    assert findings["triplets"].status == WARNING and findings["triplets"].remedy == "nnssl_plugin caption -d 501"
    assert findings["plans"].status == WARNING and "nnUNetv2_plan_and_preprocess -d 501" in findings["plans"].remedy


def test_triplets_and_embeddings_are_held_against_the_cases(environment):
    write_captions(environment, ["c0", "c1", "c2"])
    assert look(environment)["triplets"].status == OK and "tiny" in look(environment)["triplets"].message
    write_captions(environment, ["c0", "c1", "c2"], weights="random-small sha256:1")
    assert look(environment)["triplets"].status == WARNING
    write_captions(environment, ["c0", "c1"])
    assert "none for 1 of 3 cases, such as c2" in look(environment)["triplets"].message


def test_class_labels_are_held_against_the_cases(environment):
    assert "class labels" not in look(environment)
    block = {"targets": {"x": {"kind": "binary", "classes": ["no", "yes"]}}}
    describe(raw_of(environment), classification=block)
    assert look(environment)["class labels"].status == PROBLEM  # a block without a table
    table = raw_of(environment) / "classification.csv"
    table.write_text("case,subject,x\nc0,p,no\nc1,p,yes\nc2,q,no\n")
    finding = look(environment)["class labels"]
    assert finding.status == OK and finding.message == "x (binary, 2 classes); 3 of 3 cases, 2 subjects"
    table.write_text("case,subject,x\nc0,p,no\nc1,p,yes\n")
    assert look(environment)["class labels"].status == WARNING
    table.write_text("case,subject,x\nc0,p,no\nc9,p,yes\n")
    finding = look(environment)["class labels"]
    assert finding.status == PROBLEM and "c9" in finding.message
    assert finding.remedy == "nnssl_plugin prepare -d 501 --class-labels FILE.csv"


def test_triplets_without_embeddings_or_with_a_broken_line_are_problems(environment):
    write_captions(environment, ["c0", "c1", "c2"], embedded=False)
    finding = look(environment)["triplets"]
    assert finding.status == PROBLEM and finding.remedy == "nnssl_plugin caption -d 501"
    with open(raw_of(environment) / "triplets.jsonl", "a") as file:
        file.write("{no json\n")
    assert "line 4" in look(environment)["triplets"].message


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list"), ('{"labels": {}}', "numTraining")]
)
def test_a_damaged_description_is_a_problem(text, message, environment):
    (raw_of(environment) / "dataset.json").write_text(text)
    (finding,) = dataset_findings(dataset(environment))
    assert finding.status == PROBLEM and message in finding.message
    assert room_needed(dataset(environment)) == (None, [])


def test_channel_names_that_are_a_list_are_a_problem(environment):
    describe(raw_of(environment), channel_names=["T1", "T2"])
    (finding,) = dataset_findings(dataset(environment))
    assert finding.status == PROBLEM and "channel_names" in finding.message


def test_missing_images_and_a_wrong_count_are_reported(environment):
    describe(raw_of(environment), numTraining=5)
    assert look(environment)["images"].status == WARNING
    describe(raw_of(environment), file_ending=".mha")
    assert look(environment)["images"].status == PROBLEM


def test_plans_say_what_is_preprocessed_with_inherited_folders(environment):
    configurations = {
        "2d": {"data_identifier": "flat"},
        "3d_fullres": {"data_identifier": "data"},
        "mine": {"inherits_from": "3d_fullres"},
    }
    write_plan(environment, "nnUNetPlans", configurations)
    assert look(environment)["plans"].status == WARNING and "not preprocessed" in look(environment)["plans"].message
    write_plan(environment, "nnUNetPlans-x", {"3d_fullres": {"data_identifier": "data"}}, cases=["c0", "c1", "c2"])
    findings = look(environment)
    assert findings["nnUNetPlans"].status == OK
    assert findings["nnUNetPlans"].message == "2d: not preprocessed; 3d_fullres: 3 cases; mine: 3 cases"
    assert findings["nnUNetPlans-x"].status == OK


def test_preprocessing_that_broke_off_is_a_warning(environment):
    write_plan(environment, "nnUNetPlans", {"3d_fullres": {"data_identifier": "data"}}, cases=["c0"])
    finding = look(environment)["nnUNetPlans"]
    assert finding.status == WARNING and "1 of 3 cases" in finding.message
    assert finding.remedy == "nnUNetv2_preprocess -d 501 -plans_name nnUNetPlans -c 3d_fullres"


def test_the_room_is_voxels_times_channels_times_four(environment):
    need, wrong = room_needed(dataset(environment))
    assert need["nnUNet_preprocessed"] == pytest.approx((720 + 105 + 216) * 2 * 4) and wrong == []
    write_plan(environment, "nnUNetPlans", {"3d_fullres": {"data_identifier": "data"}}, cases=["c0"])
    assert room_needed(dataset(environment))[0] == {"nnUNet_results": CHECKPOINTS}


def test_large_datasets_are_estimated_from_some_headers(environment, monkeypatch):
    monkeypatch.setattr("nnssl_plugin.doctor.datasets.HEADERS", 2)
    need, _ = room_needed(dataset(environment))
    assert need["nnUNet_preprocessed"] == pytest.approx((720 + 216) / 2 * 3 * 2 * 4)


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08\x00truncated"])
def test_an_image_that_cannot_be_read_is_a_problem(content, environment):
    (raw_of(environment) / "imagesTr" / "c1_0000.nii.gz").write_bytes(content)
    need, (finding,) = room_needed(dataset(environment))
    assert finding.status == PROBLEM and "c1_0000.nii.gz" in finding.message and need is not None


def test_cases_listed_in_the_description_are_found(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("SCANS", str(raw_of(environment) / "imagesTr"))
    listed = {
        f"x{n}": {"images": [f"$SCANS/c{n}_000{channel}.nii.gz" for channel in (0, 1)], "label": "label.nii.gz"}
        for n in (0, 2)
    }
    describe(raw_of(environment), dataset=listed, numTraining=2)
    assert look(environment)["images"].status == OK
    assert room_needed(dataset(environment))[0]["nnUNet_preprocessed"] == pytest.approx((720 + 216) * 2 * 4)
