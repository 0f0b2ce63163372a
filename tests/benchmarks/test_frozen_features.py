"""Studies of frozen features: which cases they take, the order of their runs, and their statistics by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
frozen_study = __import__("frozen_study")
frozen_features = __import__("frozen_features")
frozen_results = __import__("frozen_results")

STUDIES = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "studies").glob("frozen-*.json"))
CASES = 30


@pytest.fixture
def data(tmp_path):
    """Empty files of 30 cases."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for number in range(CASES):
            (tmp_path / kind / f"case_{number:02d}.nii.gz").touch()
    return tmp_path


def study_of(tmp_path, **changes):
    content = {
        "name": "toy",
        "question": "?",
        "data": {
            "title": "toy",
            "licence": "none",
            "label_kind": "phantom",
            "images": "images",
            "labels": "labels",
            "label_names": ["a"],
        },
        "cases": {"evaluation": 6, "tuning": 4, "pool": 10},
        "labelled": [2, 5],
        "draws": 3,
        "pretraining": {"epochs": 4, "iterations_per_epoch": 10},
        "arms": [
            {"name": "random", "seeds": 3},
            {"name": "MAE", "trainer": "MAEPretrainer", "seeds": 3},
            {
                "name": "MAE-80",
                "trainer": "MAEPretrainer",
                "edits": {"epochs": 8},
                "priority": 2,
                "snapshots": [20, 40],
            },
        ],
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content | changes))
    return frozen_study.read_frozen_study(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_can_be_read(path):
    study = frozen_study.read_frozen_study(path)
    assert {"random", "MAE"} <= {arm.name for arm in study.arms}
    assert len({arm.name for arm in study.arms}) == len(study.arms)


def test_evaluation_cases_are_in_nothing_else_and_small_draws_lie_in_large_ones(data):
    study = study_of(data)
    (part,) = frozen_study.parts_of(study, data)
    assert (len(part.evaluation), len(part.tuning), len(part.pool), len(part.pretraining)) == (6, 4, 10, 20)
    assert not set(part.evaluation) & {*part.pretraining, *part.tuning, *part.pool}
    assert not set(part.tuning) & set(part.pretraining) and set(part.pool) <= set(part.pretraining)
    draws = frozen_study.label_draws(study, part)
    assert [len(draws[number]) for number in (2, 5)] == [3, 3]
    assert all(set(few) <= set(more) <= set(part.pool) for few, more in zip(draws[2], draws[5], strict=True))
    assert len(set(draws[5])) == 3


def test_in_cross_validation_every_case_is_scored_once(data):
    study = study_of(data, cases={"parts": 3}, labelled=[5, 20])
    parts = frozen_study.parts_of(study, data)
    assert sorted(case for part in parts for case in part.evaluation) == [f"case_{n:02d}" for n in range(CASES)]
    assert all(not set(part.evaluation) & {*part.pretraining, *part.pool} for part in parts)
    assert len(frozen_study.label_draws(study, parts[0])[20]) == 1  # all there are: there is one draw


def test_important_runs_come_first_and_arms_share_seeds(data):
    runs = frozen_features.runs_of(study_of(data), 1)
    order = [(arm.name, seed) for arm, seed, _ in runs]
    assert order[:4] == [(name, seed) for seed in (0, 1) for name in ("random", "MAE")]
    assert order[4:7] == [("MAE-80", 0), ("random", 2), ("MAE", 2)]
    assert len(runs) == 3 + 3 + 5


def test_differences_are_paired_by_seed_draw_and_case():
    rng = np.random.default_rng(0)
    runs = [run(arm, seed, rng) for arm in ("random", "MAE") for seed in range(3)] + [run("MAE", 7, rng)]
    row = frozen_results.summarise(runs, "MAE", 5)
    own, other = (
        np.array([r["dice"]["5"] for r in runs if r["arm"] == arm and r["seed"] < 3]) for arm in ("MAE", "random")
    )
    over = row["over_random"]
    assert over["mean"] == pytest.approx((own - other).mean()) and over["seeds"] == 3
    assert over["per_seed"] == pytest.approx((own - other).mean(axis=(1, 2)))
    assert over["low"] < over["mean"] < over["high"] and row["over_MAE"] is None
    assert len(row["per_seed"]) == 4 and frozen_results.summarise(runs, "S2DC", 5) is None


def test_arms_are_compared_with_each_other_on_both_kinds_of_cases(data):
    rng = np.random.default_rng(2)
    names = ("random", "MAE", "full", "part")
    study = study_of(data, arms=[{"name": name, "trainer": "MAEPretrainer", "seeds": 3} for name in names])
    runs = [run(arm, seed, rng) for arm in names for seed in range(3)]
    rows = frozen_results.comparisons(study, runs)
    assert [(row["arm"], row["beside"], row["labelled"]) for row in rows] == [("part", "full", 2), ("part", "full", 5)]
    for split in ("dice", "tuning"):
        part, full = (np.mean([r[split]["5"] for r in runs if r["arm"] == arm]) for arm in ("part", "full"))
        assert rows[1][split]["mean"] == pytest.approx(part - full) and rows[1][split]["seeds"] == 3
    assert frozen_results.comparisons(study, [r for r in runs if r["arm"] != "part"]) == []


def test_a_seed_counts_once_all_parts_of_a_cross_validation_are_there():
    rng = np.random.default_rng(0)
    runs = [run("MAE", 0, rng, part=0), run("MAE", 0, rng, part=1), run("MAE", 1, rng, part=0)]
    found = frozen_results.scores_of(runs, "MAE", 5)
    assert list(found) == [0] and found[0].shape == (3, 12)


def test_what_is_logged_is_ranked_across_lengths_and_along_one_run(data, tmp_path):
    study, rng = study_of(data), np.random.default_rng(1)
    runs = [run("MAE", seed, rng, epochs=4) for seed in range(3)] + [
        run("MAE-80", seed, rng, epochs=8, snapshots=(20, 40)) for seed in range(2)
    ]
    rows = {row["name"]: row for row in frozen_results.predictions(study, runs)}
    last, ends = [r["log"]["loss"][-1] for r in runs], [np.mean(r["dice"]["5"]) for r in runs]
    assert rows["loss"]["across"] == pytest.approx(spearmanr(last, ends).statistic)
    assert rows["loss"]["along"] is None  # three points say nothing
    assert rows["steps"]["runs"] == 5
    result = frozen_results.write_results(study, runs, tmp_path, study_file=Path("toy.json"), device="cpu", jobs=1)
    assert "| MAE-80 | 2 |" in (tmp_path / "table.md").read_text() and (tmp_path / "lengths.png").is_file()
    assert json.loads((tmp_path / "result.json").read_text())["cost"]["runs"] == len(runs) == result["cost"]["runs"]


def run(arm, seed, rng, *, part=0, epochs=4, snapshots=()):
    """What a run of this arm writes, with random scores."""

    def scores():
        return {"2": rng.uniform(size=(3, 6)).tolist(), "5": rng.uniform(size=(3, 6)).tolist()}

    return {
        "arm": arm,
        "seed": seed,
        "part": part,
        "dice": scores(),
        "tuning": scores(),
        "shuffled": rng.uniform(size=6).tolist(),
        "log": {"loss": rng.uniform(size=epochs).tolist()},
        "snapshots": {str(step): {"evaluation": scores()} for step in snapshots},
        "seconds_training": 1.0,
        "seconds_probing": 1.0,
    }
