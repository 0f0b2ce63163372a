"""Folds with fewer labels: nested, in nnU-Net's own split file, and appended once."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets, read_fraction_folds, write_fraction_folds

NAME = "Dataset907_Fractions"
CASES = [f"case_{i:02d}" for i in range(23)]


@pytest.fixture
def dataset(nnunet_environment):
    """A preprocessed dataset as far as splitting looks: names of case files, one configuration."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    (Path(os.environ["nnUNet_raw"]) / NAME).mkdir()
    (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True)
    for case in reversed(CASES):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (folder / "nnUNetPlans_3d_fullres" / f"{case}{ending}").touch()
    (folder / "gt_segmentations").mkdir()
    return folder


def test_each_subset_holds_every_smaller_one():
    subsets = nested_subsets(CASES, [0.1, 0.35, 0.35000001, 0.8, 1.0])
    sets = [set(cases) for cases in subsets.values()]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert sets[-1] == set(CASES)
    assert all(cases == sorted(cases) for cases in subsets.values())


@pytest.mark.parametrize(
    ("total", "fraction", "expected"),
    [(10, 0.7, 7), (10, 0.01, 1), (1, 0.2, 1), (7, 0.5, 4), (25, 0.28, 7), (100, 0.07, 7)],
)
def test_counts_are_rounded_up_without_floating_point_surprises(total, fraction, expected):
    assert len(nested_subsets([str(i) for i in range(total)], [fraction])[fraction]) == expected


def test_a_subset_depends_on_cases_and_seed_alone():
    alone = nested_subsets(CASES, [0.4], seed=7)[0.4]
    assert nested_subsets(CASES[::-1], [0.1, 0.4, 1], seed=7)[0.4] == alone
    assert nested_subsets(CASES, [0.4], seed=8)[0.4] != alone


@pytest.mark.parametrize(
    ("cases", "fractions"), [([], [0.5]), (["a", "a"], [0.5]), (CASES, [0.0]), (CASES, [20]), (CASES, [float("nan")])]
)
def test_what_cannot_be_drawn_is_refused(cases, fractions):
    with pytest.raises(UserError):
        nested_subsets(cases, fractions)


def test_a_missing_split_file_becomes_that_of_nnunet(dataset):
    write_fraction_folds(NAME, fractions=[0.5])
    own = generate_crossval_split(list(np.sort(CASES)), seed=12345, n_splits=5)
    assert read_json(dataset / "splits_final.json")[:5] == json.loads(json.dumps(own))


def test_folds_are_appended_with_the_same_validation_cases(dataset):
    folds = write_fraction_folds("907", fold=2, fractions=[0.2, 0.6, 1.0], seed=4)
    splits = read_json(dataset / "splits_final.json")
    assert folds == {0.2: 5, 0.6: 6, 1.0: 7}
    assert [len(splits[n]["train"]) for n in (5, 6, 7)] == [4, 11, 18]
    assert set(splits[5]["train"]) < set(splits[6]["train"]) < set(splits[7]["train"]) == set(splits[2]["train"])
    assert all(splits[n]["val"] == splits[2]["val"] for n in (5, 6, 7))
    entry = read_fraction_folds(dataset)[1]
    assert (entry.fold, entry.base_fold, entry.fraction, entry.seed) == (6, 2, 0.6, 4)
    assert (entry.training_cases, entry.validation_cases) == (11, 5)


def test_asking_again_adds_nothing_and_asking_for_more_adds_the_rest(dataset):
    write_json(dataset / "splits_final.json", own := [{"train": CASES[:15], "val": CASES[15:]}])
    first = write_fraction_folds(NAME, fractions=[0.2, 0.4])
    written = (dataset / "splits_final.json").read_bytes()
    assert write_fraction_folds(NAME, fractions=[0.4, 0.2]) == {0.4: 2, 0.2: 1}
    assert (dataset / "splits_final.json").read_bytes() == written
    more = write_fraction_folds(NAME, fractions=[0.2, 0.3])
    assert (first[0.2], more) == (1, {0.2: 1, 0.3: 3})
    assert write_fraction_folds(NAME, fractions=[0.2], seed=1) == {0.2: 4}
    splits = read_json(dataset / "splits_final.json")
    assert (splits[:1], len(splits)) == (own, 5)


def test_the_same_fraction_twice_is_one_fold(dataset):
    assert write_fraction_folds(NAME, fractions=[0.5, 0.5]) == {0.5: 5}
    assert len(read_json(dataset / "splits_final.json")) == 6


def test_a_split_file_that_was_made_anew_is_noticed(dataset):
    write_fraction_folds(NAME, fractions=[0.5])
    write_json(dataset / "splits_final.json", [{"train": CASES[:15], "val": CASES[15:]}] * 6)
    with pytest.raises(UserError, match=r"Fold 5 .* is not what label_fractions\.json says"):
        write_fraction_folds(NAME, fractions=[0.5])


def test_a_fold_that_is_not_there_is_named(dataset):
    with pytest.raises(UserError, match="has no fold 9; it has 5"):
        write_fraction_folds(NAME, fold=9, fractions=[0.5])


def test_configurations_with_different_cases_are_noticed(dataset):
    (dataset / "nnUNetPlans_2d").mkdir()
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (dataset / "nnUNetPlans_2d" / f"case_00{ending}").touch()
    with pytest.raises(UserError, match="nnUNetPlans_2d: 1, nnUNetPlans_3d_fullres: 23"):
        write_fraction_folds(NAME, fractions=[0.5])


def test_a_dataset_without_cases_says_what_to_run(dataset):
    for path in (dataset / "nnUNetPlans_3d_fullres").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="nnUNetv2_plan_and_preprocess"):
        write_fraction_folds(NAME, fractions=[0.5])


def test_the_command_prints_folds_counts_and_what_to_run(dataset, capsys):
    assert main(["split", "-d", "907", "--fractions", "20", "100"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +5 +20% +4 +5$", printed, re.MULTILINE)
    assert re.search(r"^ +6 +100% +18 +5$", printed, re.MULTILINE)
    assert "nnUNetv2_train 907 3d_fullres 5" in printed


def test_the_command_refuses_more_than_everything(dataset, capsys):
    assert main(["split", "-d", "907", "--fractions", "120"]) == 2
    assert "100 %" in capsys.readouterr().err


def subject_table(folder, of_subject=3):
    """classification.csv of the raw dataset, ``of_subject`` cases in a row per subject."""
    rows = [f"{case},p{number // of_subject}" for number, case in enumerate(CASES)]
    path = folder / "subjects.csv"
    path.write_text("\n".join(["case,subject", *rows]) + "\n")
    return path


def test_subjects_are_drawn_with_all_of_their_cases():
    subjects = {case: f"p{number // 4}" for number, case in enumerate(CASES)}
    subsets = nested_subsets(CASES, [0.1, 0.5, 0.9, 1.0], seed=3, subjects=subjects)
    sets = [set(cases) for cases in subsets.values()]
    assert all(small <= large for small, large in itertools.pairwise(sets)) and sets[-1] == set(CASES)
    for fraction, cases in subsets.items():
        taken = {subjects[case] for case in cases}
        assert {case for case in CASES if subjects[case] in taken} == set(cases)
        assert fraction * len(CASES) <= len(cases) < fraction * len(CASES) + 4


def test_one_case_per_subject_is_drawn_as_cases_are():
    subjects = {case: f"p{number}" for number, case in enumerate(CASES[::-1])}
    assert nested_subsets(CASES, [0.3], seed=2, subjects=subjects) == nested_subsets(CASES, [0.3], seed=2)


def test_the_table_of_the_raw_dataset_or_of_the_command_names_the_subjects(dataset, capsys, caplog):
    write_json(dataset / "splits_final.json", [{"train": CASES[:15], "val": CASES[15:]}])
    assert write_fraction_folds(NAME, fractions=[0.2]) == {0.2: 1}
    table = subject_table(dataset)
    assert main(["split", "-d", "907", "--fractions", "20", "--subjects", str(table)]) == 0
    assert re.search(r"^ +2 +20% +3 +8$", capsys.readouterr().out, re.MULTILINE)
    (Path(os.environ["nnUNet_raw"]) / NAME / "classification.csv").write_bytes(table.read_bytes())
    assert write_fraction_folds(NAME, fractions=[0.2]) == {0.2: 2}
    assert [entry.drawn for entry in read_fraction_folds(dataset)] == ["cases", "subjects"]
    splits = read_json(dataset / "splits_final.json")
    assert len({CASES.index(case) // 3 for case in splits[2]["train"]}) == 1
    write_json(dataset / "splits_final.json", [*splits, {"train": CASES[:14], "val": CASES[14:]}])
    write_fraction_folds(NAME, fold=3, fractions=[1.0])
    assert "same subjects: p4" in caplog.text


def test_a_table_that_lacks_a_case_or_gives_two_subjects_is_refused(dataset):
    table = subject_table(dataset)
    whole = table.read_text()
    table.write_text(whole + "case_00,p9\n")
    with pytest.raises(UserError, match="gives case 'case_00' the subjects 'p0' and 'p9'"):
        write_fraction_folds(NAME, fractions=[0.2], subjects=table)
    table.write_text("case,subject\ncase_00,a\n")
    with pytest.raises(UserError, match="has no row for case_01"):
        write_fraction_folds(NAME, fractions=[0.2], subjects=table)
    table.write_text("case,patient\ncase_00,a\n")
    with pytest.raises(UserError, match="no column 'subject'"):
        write_fraction_folds(NAME, fractions=[0.2], subjects=table)


@pytest.mark.parametrize(
    ("fold", "said"),
    [
        ({"train": ["case_00.nii.gz"], "val": ["case_01"]}, r"not preprocessed: case_00\.nii\.gz(.|\n)*: case_00"),
        ({"train": ["case_00", "zz"], "val": ["case_01"]}, "not preprocessed: zz"),
        ({"train": ["case_00", "case_01"], "val": ["case_01"]}, "trains and validates on the same cases: case_01"),
        ({"train": ["case_00", "case_00"], "val": ["case_01"]}, "twice"),
        ({"train": ["case_00"], "validation": ["case_01"]}, 'under "val"'),
        ({"train": "case_00", "val": ["case_01"]}, 'under "train"'),
        (["case_00"], 'under "train"'),
    ],
)
def test_folds_that_cannot_be_right_are_not_copied(dataset, fold, said):
    write_json(dataset / "splits_final.json", [fold])
    with pytest.raises(UserError, match=said):
        write_fraction_folds(NAME, fractions=[0.5])
    assert read_json(dataset / "splits_final.json") == [fold] and not (dataset / "label_fractions.json").exists()


@pytest.mark.parametrize("content", [b"", b'[{"train": ["case_00"', b'{"train": [], "val": []}', b"[]"])
def test_a_damaged_split_file_is_named(dataset, content):
    (dataset / "splits_final.json").write_bytes(content)
    with pytest.raises(UserError, match=r"splits_final\.json is n"):
        write_fraction_folds(NAME, fractions=[0.5])


def test_a_split_file_with_a_byte_order_mark_is_read(dataset):
    text = json.dumps([{"train": CASES[:15], "val": CASES[15:]}])
    (dataset / "splits_final.json").write_text(text, encoding="utf-8-sig")
    assert write_fraction_folds(NAME, fractions=[0.5]) == {0.5: 1}
