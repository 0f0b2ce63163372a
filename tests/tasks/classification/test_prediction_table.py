"""The table that grows: whatever byte an interruption stopped at, going on gives the table of an undisturbed run."""

import numpy as np
import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification.prediction_table import PredictionTable, check_same_model
from nnssl_plugin.tasks.classification.runs import read_references

TARGET = Target("tumour", "multiclass", ("höher, gut", "b", "c"))
FINDINGS = Target("findings", "multilabel", ("cyst", "mass"))
CASES = ["scan, left", "zwölf", "scan_3"]


def fill(path, target=TARGET):
    table = PredictionTable(path, target)
    rng = np.random.default_rng(0)
    for case in CASES:
        probabilities = rng.dirichlet(np.ones(len(target.classes)))
        if case not in table.finished:
            table.add(case, probabilities)
    return path.read_bytes()


def test_a_table_cut_off_anywhere_is_completed_to_the_same_bytes(tmp_path):
    path = tmp_path / "predictions.csv"
    whole = fill(path)
    assert whole.count(b"\n") == 4
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert fill(path) == whole, length


def test_zeros_at_the_end_after_a_power_cut_are_removed(tmp_path):
    path = tmp_path / "predictions.csv"
    whole = fill(path)
    path.write_bytes(whole[:-20] + bytes(20))
    assert fill(path) == whole


def test_a_finished_case_is_in_the_table_at_once(tmp_path):
    path = tmp_path / "predictions.csv"
    table = PredictionTable(path, FINDINGS)
    assert not path.exists()
    table.add("one", np.array([0.7, 0.5]))
    table.add("two", np.array([0.1, 0.4]))
    assert path.read_text().splitlines() == [
        "case,target,predicted,p_cyst,p_mass",
        "one,findings,cyst;mass,0.7,0.5",
        "two,findings,none,0.1,0.4",
    ]
    assert PredictionTable(path, FINDINGS).finished == {"one", "two"}


def test_another_table_is_not_touched(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("case,age\na,3\n")
    with pytest.raises(UserError, match="another table"):
        PredictionTable(path, TARGET)
    fill(tmp_path / "other.csv")
    with pytest.raises(UserError, match="another table"):
        PredictionTable(tmp_path / "other.csv", FINDINGS)
    assert path.read_text() == "case,age\na,3\n"


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    path = tmp_path / "predictions.csv"
    lines = fill(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"broken\n", *lines[2:]]))
    with pytest.raises(UserError, match="line 3"):
        PredictionTable(path, TARGET)


def test_a_table_of_another_model_is_not_continued(tmp_path):
    path, description = tmp_path / "predictions.csv", {"model": "a", "tta": False}
    check_same_model(tmp_path / "p.json", description, tables=[path])
    fill(path)
    check_same_model(tmp_path / "p.json", description, tables=[path])
    with pytest.raises(UserError, match="another tta"):
        check_same_model(tmp_path / "p.json", description | {"tta": True}, tables=[path])
    with pytest.raises(UserError, match="which model made it"):
        check_same_model(tmp_path / "absent.json", description, tables=[path])


def test_labels_of_a_test_set_may_all_be_of_one_class(tmp_path):
    (tmp_path / "labels.csv").write_text("case,tumour\na,b\nc,b\nd,\n")
    assert read_references(tmp_path / "labels.csv", [TARGET, FINDINGS]) == {"tumour": {"a": ("a", 1), "c": ("c", 1)}}
    (tmp_path / "labels.csv").write_text("case,tumour\na,x\n")
    with pytest.raises(UserError, match="'x' is no class"):
        read_references(tmp_path / "labels.csv", [TARGET])
    with pytest.raises(UserError, match="no column findings"):
        read_references(tmp_path / "labels.csv", [FINDINGS])


def test_a_case_twice_in_the_table_of_labels_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("case,tumour\na,b\na,c\n")
    with pytest.raises(UserError, match="more than once: a"):
        read_references(tmp_path / "labels.csv", [TARGET])


def test_words_for_no_value_are_no_labels_of_a_test_set(tmp_path):
    (tmp_path / "labels.csv").write_text("case,subject,tumour\na,NA,b\nb,p,N/A\nc,p,nan\n")
    assert read_references(tmp_path / "labels.csv", [TARGET]) == {"tumour": {"a": ("a", 1)}}
