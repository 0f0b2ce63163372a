"""Folds by class and subject: nobody on both sides, classes in proportion, and files that are there are respected."""

import json
import logging

import numpy as np
import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, write_class_labels
from nnssl_plugin.tasks.classification.folds import (
    check_splits,
    class_splits,
    dataset_class_splits,
    has_class_labels,
    make_class_splits,
)


def random_labels(cases=120, per_subject=3, kind="multiclass", seed=0):
    rng = np.random.default_rng(seed)
    names = [f"c{number:03d}" for number in range(cases)]
    subjects = {name: f"p{number // per_subject}" for number, name in enumerate(names)}
    if kind == "multilabel":
        found = {name: tuple(np.flatnonzero(rng.uniform(size=3) < (0.6, 0.3, 0.02)).tolist()) for name in names}
    else:
        found = {name: int(rng.choice(3, p=(0.6, 0.3, 0.1))) for name in names}
    return ClassLabels((Target("x", kind, ("a", "b", "c")),), subjects, {"x": found})


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "multilabel"])
@pytest.mark.parametrize("per_subject", [1, 3])
def test_every_case_is_validated_once_and_no_subject_is_on_both_sides(kind, per_subject):
    labels = random_labels(per_subject=per_subject, kind=kind)
    splits = make_class_splits(labels, labels.cases)
    assert len(splits) == 5
    assert sorted(case for fold in splits for case in fold["val"]) == list(labels.cases)
    for fold in splits:
        train, val = ({labels.subjects[case] for case in fold[part]} for part in ("train", "val"))
        assert not train & val and sorted(fold["train"] + fold["val"]) == list(labels.cases)
        assert fold["train"] == sorted(fold["train"])


def test_classes_are_in_proportion():
    labels = random_labels(cases=300, per_subject=2)
    overall = np.bincount(list(labels.labels["x"].values())) / 300
    for fold in make_class_splits(labels, labels.cases):
        share = np.bincount([labels.labels["x"][case] for case in fold["val"]], minlength=3) / len(fold["val"])
        np.testing.assert_allclose(share, overall, atol=0.05)


def test_several_targets_are_stratified_together():
    names = [f"c{number}" for number in range(80)]
    labels = ClassLabels(
        (Target("x", "binary", ("a", "b")), Target("y", "binary", ("0", "1"))),
        {name: name for name in names},
        {"x": {name: n % 2 for n, name in enumerate(names)}, "y": {name: n // 2 % 2 for n, name in enumerate(names)}},
    )
    for fold in make_class_splits(labels, names):
        pairs = {(labels.labels["x"][case], labels.labels["y"][case]) for case in fold["val"]}
        assert len(fold["val"]) == 16 and len(pairs) == 4


def test_folds_depend_on_the_seed_and_not_on_the_order_of_the_cases():
    labels = random_labels()
    first = make_class_splits(labels, labels.cases)
    assert first == make_class_splits(labels, labels.cases[::-1])
    assert first != make_class_splits(labels, labels.cases, seed=1)
    assert json.loads(json.dumps(first)) == first


def test_a_rare_class_is_a_warning(caplog):
    labels = random_labels(per_subject=1)
    labels.labels["x"].update({case: 0 for case in labels.cases if labels.labels["x"][case] == 2})
    labels.labels["x"]["c007"] = 2
    with caplog.at_level(logging.WARNING):
        make_class_splits(labels, labels.cases)
    assert "no case of class c among the validation cases of fold" in caplog.text
    assert "no case of class c among the training cases of fold" in caplog.text


def test_classes_that_are_all_rare_are_split_by_subject_alone():
    names = [f"c{number}" for number in range(6)]
    labels = ClassLabels(
        (Target("x", "multiclass", ("a", "b", "c")),),
        {name: name for name in names},
        {"x": {name: number % 3 for number, name in enumerate(names)}},
    )
    assert all(fold["val"] for fold in make_class_splits(labels, names))


def test_too_few_subjects_are_refused():
    labels = random_labels(cases=12, per_subject=3)
    with pytest.raises(UserError, match="4 subjects are too few for 5 folds"):
        make_class_splits(labels, labels.cases)
    assert len(make_class_splits(labels, labels.cases, folds=4)) == 4


def test_a_case_without_a_label_is_refused():
    labels = random_labels()
    with pytest.raises(UserError, match="No class label for stranger"):
        make_class_splits(labels, [*labels.cases, "stranger"])


def test_leaks_are_named_with_their_cases():
    labels = random_labels()
    with pytest.raises(UserError, match=r"Fold 1 has subjects on both sides: p0 .*c000 trains, c001 validates"):
        check_splits([{"train": ["c000"], "val": ["c003"]}, {"train": ["c000"], "val": ["c001"]}], labels)
    with pytest.raises(UserError, match="on both sides"):
        check_splits([{"train": ["c000"], "val": ["c000"]}], labels)
    with pytest.raises(UserError, match="no validation cases"):
        check_splits([{"train": ["c000"], "val": []}], labels)


def test_folds_are_written_once_and_then_respected(tmp_path):
    labels = random_labels()
    made = class_splits(tmp_path, labels, labels.cases)
    assert json.loads((tmp_path / "splits_final.json").read_text()) == made == make_class_splits(labels, labels.cases)
    own = [{"train": ["c000", "elsewhere"], "val": ["c003", "unlabelled"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(own))
    assert class_splits(tmp_path, labels, labels.cases) == [{"train": ["c000"], "val": ["c003"]}]
    assert json.loads((tmp_path / "splits_final.json").read_text()) == own


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON, line 1"),
        ("[]", "is no list"),
        ('[{"train": []}]', 'no list of names of cases under "val"'),
        ('{"train": 1}', "is no list"),
        ('[{"train": ["c000"], "val": ["c001"]}]', "splits_final.json: Fold 0 has subjects on both sides"),
    ],
)
def test_a_split_file_that_is_damaged_or_leaks_is_refused(tmp_path, content, words):
    (tmp_path / "splits_final.json").write_text(content)
    labels = random_labels()
    with pytest.raises(UserError, match=words) as error:
        class_splits(tmp_path, labels, labels.cases)
    assert f"rm {tmp_path}" in error.value.remedy


@pytest.fixture
def classification_dataset(nnunet_environment, tmp_path):
    name = "Dataset511_Classes"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        (tmp_path / variable / name).mkdir()
    (tmp_path / "nnUNet_raw" / name / "dataset.json").write_text("{}")
    write_class_labels(tmp_path / "nnUNet_raw" / name, random_labels())
    return tmp_path / "nnUNet_preprocessed" / name


def test_a_dataset_is_split_by_its_number(classification_dataset):
    assert has_class_labels("511")
    splits, labels = dataset_class_splits("511")
    assert splits == make_class_splits(random_labels(), labels.cases)
    assert (classification_dataset / "splits_final.json").is_file()


def test_the_command_shows_the_folds(classification_dataset, capsys):
    from nnssl_plugin.cli.main import main

    assert main(["split", "-d", "511"]) == 0
    printed = capsys.readouterr().out
    assert "splits_final.json" in printed and "a 1" in printed and len(printed.splitlines()) == 8


def test_folds_with_fewer_labels_are_cut_from_folds_by_subject(classification_dataset):
    from nnssl_plugin.cli.main import main

    assert main(["split", "-d", "511", "--fractions", "10"]) == 0
    splits = json.loads((classification_dataset / "splits_final.json").read_text())
    labels = random_labels()
    assert splits[:5] == make_class_splits(labels, labels.cases)
    chosen = {labels.subjects[case] for case in splits[5]["train"]}
    assert splits[5]["val"] == splits[0]["val"] and 10 <= len(splits[5]["train"]) < 20
    assert splits[5]["train"] == [case for case in splits[0]["train"] if labels.subjects[case] in chosen]


def test_a_dataset_without_class_labels_cannot_be_split_by_class(classification_dataset, tmp_path, capsys):
    from nnssl_plugin.cli.main import main

    (tmp_path / "nnUNet_raw" / classification_dataset.name / "dataset.json").write_text("{}")
    assert main(["split", "-d", "511"]) == 2
    assert "no class labels" in capsys.readouterr().err
