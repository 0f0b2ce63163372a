"""classification.csv and its block: what is read, what is written, and what is refused with which words."""

import json

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import (
    ClassLabels,
    Target,
    read_class_labels,
    read_table,
    targets_block,
    targets_from_block,
    write_class_labels,
)

DIAGNOSIS = {"kind": "multiclass", "classes": ["benign", "malignant", "normal"]}
FINDINGS = {"kind": "multilabel", "classes": ["effusion", "nodule"]}
GRADE = {"kind": "ordinal", "classes": ["low", "mid", "high"]}
TABLE = """case,subject,diagnosis,findings,grade
a,p1,benign,none,low
b,p1,normal,nodule;effusion,high
c,,malignant,nodule,mid
"""


@pytest.fixture
def dataset(tmp_path):
    """A function (table, targets) → raw dataset folder."""

    def make(table=TABLE, targets=None, encoding="utf-8"):
        targets = {"diagnosis": DIAGNOSIS, "findings": FINDINGS, "grade": GRADE} if targets is None else targets
        folder = tmp_path / "Dataset501_Scans"
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps({"numTraining": 3, "classification": {"targets": targets}}))
        (folder / "classification.csv").write_bytes(table.encode(encoding))
        return folder

    return make


def problem(folder, **options):
    with pytest.raises(UserError) as error:
        read_class_labels(folder, **options)
    assert error.value.remedy
    return error.value.problem


def test_labels_of_every_kind_are_indices_into_the_classes(dataset):
    labels = read_class_labels(dataset())
    assert labels.labels == {
        "diagnosis": {"a": 0, "b": 2, "c": 1},
        "findings": {"a": (), "b": (0, 1), "c": (1,)},
        "grade": {"a": 0, "b": 2, "c": 1},
    }
    assert labels.subjects == {"a": "p1", "b": "p1", "c": "c"} and labels.cases == ("a", "b", "c")
    assert [target.outputs for target in labels.targets] == [3, 2, 2]
    assert labels.cases_of_class(labels.target("findings"), 1) == ["b", "c"]
    assert labels.cases_of_class(labels.target("grade"), 2) == ["b"]


def test_what_is_written_is_read_again_and_the_rest_of_dataset_json_stays(dataset, tmp_path):
    labels = read_class_labels(dataset())
    other = tmp_path / "Dataset502_Other"
    other.mkdir()
    (other / "dataset.json").write_text(json.dumps({"labels": {"background": 0}, "classification": {"old": 1}}))
    assert write_class_labels(other, labels) == other / "classification.csv"
    assert read_class_labels(other) == labels
    assert json.loads((other / "dataset.json").read_text())["labels"] == {"background": 0}
    assert targets_from_block(targets_block(labels.targets)) == labels.targets


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_as_spreadsheets_write_them(dataset, separator, encoding, newline):
    lines = [["case", "subject", "findings"], ["a", "", "none"], ["ü b", "p", '"nodule;effusion"'], ["", "", ""]]
    table = newline.join(separator.join(line) for line in lines)
    labels = read_class_labels(dataset(table, {"findings": FINDINGS}, encoding))
    assert labels.labels["findings"] == {"a": (), "ü b": (0, 1)}


def test_only_the_cases_that_are_used_need_a_label(dataset):
    folder = dataset(TABLE + "d,p4,,,\n")
    assert "no diagnosis for d" in problem(folder)
    assert read_class_labels(folder, cases=["a", "b"]).cases == ("a", "b")
    assert "no row for e" in problem(folder, cases=["a", "e"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,p9,benign,none,low", "'a' occurs twice"),
        ("d,,benin,none,low", "diagnosis of case d is benin"),
        ("d,,benign,nodule;cyst,low", "findings of case d is cyst"),
        ("d,,benign,,low", "no findings for d"),
        ("d,,benign,none", "line 5: 4 cells, the header has 5"),
        (",p,benign,none,low", "line 5: no case"),
    ],
)
def test_a_wrong_row_is_named(dataset, row, words):
    assert words in problem(dataset(TABLE + row + "\n"))


def test_one_class_only_is_refused(dataset):
    table = "case,diagnosis\na,benign\nb,benign\n"
    assert "one class only among 2 cases: benign" in problem(dataset(table, {"diagnosis": DIAGNOSIS}))
    table = "case,diagnosis\na,benign\nb,benign\nc,normal\n"
    assert "one class only" in problem(dataset(table, {"diagnosis": DIAGNOSIS}), cases=["a", "b"])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "no column 'case'"),
        ("case,subject,diagnosis\n", "holds no rows"),
        ("name,diagnosis\na,benign\n", "no column 'case'"),
        ("case,diagnosis,diagnosis\na,benign,benign\n", "'diagnosis' twice"),
        ("case,subject\na,p\nb,q\n", "no column 'diagnosis'"),
    ],
)
def test_a_table_without_its_columns_is_refused(dataset, table, words):
    assert words in problem(dataset(table, {"diagnosis": DIAGNOSIS}))


def test_a_table_in_another_encoding_is_refused(dataset):
    folder = dataset("case,diagnosis\nMüller,benign\nb,normal\n", {"diagnosis": DIAGNOSIS}, "latin-1")
    assert "not UTF-8" in problem(folder)
    dataset("case,diagnosis\na,benign\nb,normal\n", {"diagnosis": DIAGNOSIS}, "utf-16")
    assert "not UTF-8" in problem(folder)


def test_absent_files_and_blocks_are_named_with_the_command(dataset, tmp_path):
    folder = dataset()
    (folder / "classification.csv").unlink()
    assert "classification.csv" in problem(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)no 'classification' block.*prepare --class-labels FILE.csv -d 501"):
        read_class_labels(folder)
    (folder / "dataset.json").unlink()
    assert "There is no" in problem(folder)


@pytest.mark.parametrize("block", [[], {}, {"targets": {}}, {"targets": {"x": {"kind": "binary"}}}, {"targets": 3}])
def test_a_damaged_block_is_refused(block):
    with pytest.raises(UserError):
        targets_from_block(block)


@pytest.mark.parametrize(
    ("name", "kind", "classes", "words"),
    [
        ("grade", "nominal", ("a", "b"), "kind 'nominal'"),
        ("grade", "binary", ("a", "b", "c"), "binary but has"),
        ("grade", "multiclass", ("a",), "one class only"),
        ("grade", "multiclass", ("a", "a"), "Name each class once"),
        ("grade", "multilabel", ("a", "none"), "'none'"),
        ("a/b", "binary", ("a", "b"), "cannot be named"),
        ("subject", "binary", ("a", "b"), "cannot be named"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused(name, kind, classes, words):
    with pytest.raises(UserError, match=words):
        Target(name, kind, classes)


def test_an_unknown_target_names_those_that_there_are():
    labels = ClassLabels((Target("grade", "binary", ("a", "b")),), {}, {"grade": {}})
    with pytest.raises(UserError, match="there are: grade"):
        labels.target("stage")


def test_cells_are_stripped_and_blank_lines_left_out(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("case , x\n a ,1\n\n , \nb,2")
    assert read_table(path) == [{"case": "a", "x": "1"}, {"case": "b", "x": "2"}]


@pytest.mark.parametrize("word", ["NA", "N/A", "nan", "NaN", "none", "None", "NULL", "#N/A", "<NA>", "missing"])
def test_words_for_no_value_are_missing_labels_and_no_classes(dataset, word):
    table = f"case,diagnosis\na,benign\nb,normal\nc,{word}\n"
    assert "no diagnosis for c" in problem(dataset(table, {"diagnosis": DIAGNOSIS}))
    named = {"diagnosis": {"kind": "multiclass", "classes": ["benign", "normal", word]}}
    assert read_class_labels(dataset(table, named)).labels["diagnosis"]["c"] == 2


def test_none_is_no_class_of_a_multilabel_target_and_other_words_are_missing(dataset):
    table = "case,findings\na,none\nb,nodule\nc,{}\n"
    assert read_class_labels(dataset(table.format("none"), {"findings": FINDINGS})).labels["findings"]["c"] == ()
    for word in ("None", "NA", ""):
        assert "no findings for c" in problem(dataset(table.format(word), {"findings": FINDINGS}))


def test_a_missing_subject_is_the_case_itself(dataset):
    table = "case,subject,diagnosis\na,NA,benign\nb,NA,normal\nc,,benign\nd,p,benign\n"
    subjects = read_class_labels(dataset(table, {"diagnosis": DIAGNOSIS})).subjects
    assert subjects == {"a": "a", "b": "b", "c": "c", "d": "p"}


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_what_ends_no_line_of_a_csv_may_stand_in_a_cell(tmp_path, inside, newline):
    path = tmp_path / "t.csv"
    text = newline.join(["case,note", f'a,"left{inside}right"', "b,x", ""])
    path.write_bytes(text.encode())
    assert read_table(path) == [{"case": "a", "note": f"left{inside}right"}, {"case": "b", "note": "x"}]


def test_a_cell_beyond_the_limit_of_csv_is_told(tmp_path):
    (tmp_path / "t.csv").write_text(f'case,note\na,"{"x" * 200_000}"\n')
    with pytest.raises(UserError, match=r"t\.csv, line .*field larger"):
        read_table(tmp_path / "t.csv")
