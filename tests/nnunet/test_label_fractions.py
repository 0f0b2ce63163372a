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
