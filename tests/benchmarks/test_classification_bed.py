"""Classification beds: which images each run sees, what it draws, and how runs are summed up, without a training."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STUDIES = sorted((BENCHMARKS / "studies" / "classification").glob("*.json"))
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
bed_script, study, results, forest_plot = (
    __import__(name) for name in ("classification_bed", "classification_study", "classification_results", "forest_plot")
)
CLASSES = ("benign", "malignant", "normal")


@pytest.fixture
def busi():
    return study.read_bed(BENCHMARKS / "studies" / "classification" / "busi.json")


@pytest.fixture
def adrenal():
    return study.read_bed(BENCHMARKS / "studies" / "classification" / "adrenal.json")


def labels_of(of_case, classes=CLASSES):
    kind = "binary" if len(classes) == 2 else "multiclass"
    return ClassLabels((Target("diagnosis", kind, classes),), {case: case for case in of_case}, {"diagnosis": of_case})


@pytest.fixture
def images():
    return labels_of({f"image_{number:03d}": number % 3 for number in range(120)})


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_the_beds_of_the_repository_can_be_read(path):
    bed = study.read_bed(path)
    assert bed.name == path.stem and bed.arms[-1] == "scratch" and bed.dataset.startswith(f"Dataset{bed.number}_")
    assert all(how.trainer.endswith("Pretrainer") for how in bed.pretrainings.values())


@pytest.mark.parametrize(("key", "value"), [("source", "elsewhere"), ("shuffled", "another arm")])
def test_a_bed_that_names_what_there_is_not_is_refused(key, value, tmp_path):
    write_json(tmp_path / "bed.json", read_json(STUDIES[-1]) | {key: value})
    with pytest.raises(KeyError, match=value):
        study.read_bed(tmp_path / "bed.json")


def test_every_image_is_held_out_once_and_chooses_nothing_where_it_is(busi, images):
    folds = study.rotating_folds(busi, images)
    held_out = [case for seed in busi.seeds for case in folds[f"{seed}-1.0"]["val"]]
    assert sorted(held_out) == list(images.cases)
    for seed in busi.seeds:
        evaluation = set(folds[f"{seed}-1.0"]["val"])
        pool, few, tuning = (folds[f"{seed}-{part}"] for part in ("pool", 0.1, "tuning"))
        assert evaluation == set(few["val"]) and evaluation.isdisjoint(pool["train"] + tuning["train"] + tuning["val"])
        assert sorted(tuning["train"] + tuning["val"]) == pool["train"] == folds[f"{seed}-1.0"]["train"]
        assert (len(few["train"]), len(tuning["val"]), len(evaluation)) == (10, 24, 24)
        assert set(few["train"]) < set(pool["train"])


def test_few_labels_hold_each_class_in_its_share(images):
    for seed in range(5):
        order = study.stratified_order(images.cases, images, np.random.default_rng(seed))
        assert sorted(order) == list(images.cases)
        counts = np.bincount([images.labels["diagnosis"][case] for case in order[:10]])
        assert sorted(counts) == [3, 3, 4]
    draws = [study.stratified_order(images.cases, images, np.random.default_rng(seed))[:10] for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_the_official_split_is_evaluated_under_every_seed(adrenal):
    of_case = {f"train_{number:04d}": int(number % 5 == 0) for number in range(60)}
    of_case |= {f"val_{number:04d}": number % 2 for number in range(10)}
    folds = study.official_folds(replace(adrenal, tuning=20), labels_of(of_case, ("normal", "hyperplasia")))
    tuning = set(folds["0-tuning"]["train"] + folds["0-tuning"]["val"])
    assert len(tuning) == 20 and "1-tuning" not in folds
    for seed in adrenal.seeds:
        assert folds[f"{seed}-pool"]["train"] == folds["0-pool"]["train"] and len(folds["0-pool"]["train"]) == 40
        for part in adrenal.fractions:
            assert all(case.startswith("val") for case in folds[f"{seed}-{part}"]["val"])
            assert tuning.isdisjoint(folds[f"{seed}-{part}"]["train"])
    assert folds["0-0.05"]["train"] != folds["1-0.05"]["train"]


def test_every_arm_tries_every_rate_and_runs_on_every_fraction(busi, images):
    folds = study.rotating_folds(busi, images)
    trials = study.tuning_runs(busi, folds)
    assert [len(group) for group in trials] == [9] * 5
    rates = {arm: {seed: 0.001 for seed in busi.seeds} for arm in busi.arms}
    groups, frozen = study.evaluation_runs(busi, folds, rates), study.frozen_runs(busi, folds)
    assert [len(group) for group in groups] == [3] * 5 + [4] * 5 and [len(group) for group in frozen] == [3] * 5
    runs = [run for group in (*trials, *groups, *frozen) for run in group]
    assert len({run["name"] for run in runs}) == len(runs)
    splits = list(folds.values())
    for run in runs:
        part = "tuning" if run["fraction"] is None else run["fraction"]
        assert splits[run["fold"]] == folds[f"{run['seed']}-{part}"]
    shuffled = [run for run in runs if run["control"] == study.SHUFFLED]
    assert {(run["arm"], run["fraction"]) for run in shuffled} == {("LVM-Med", 1.0)} and len(shuffled) == 5
    assert not study.frozen_runs(replace(busi, frozen=False), folds)


def test_rates_are_chosen_for_each_arm_and_seed_and_else_are_those_of_the_first_seed(busi, images):
    tuned = [
        {"arm": arm, "seed": seed, "lr": lr, "auroc": 0.5 + (lr == best)}
        for arm, seed, best in (("MAE", 0, 0.003), ("MAE", 1, 0.001), ("LVM-Med", 0, 0.003), ("scratch", 0, None))
        for lr in (0.003, 0.0003, 0.001)
    ]
    rates = study.best_rates(tuned)
    assert rates == {"MAE": {0: 0.003, 1: 0.001}, "LVM-Med": {0: 0.003}, "scratch": {0: 0.0003}}
    groups = study.evaluation_runs(busi, study.rotating_folds(busi, images), rates)
    found = {(run["arm"], run["seed"]): run["lr"] for group in groups for run in group}
    assert (found["MAE", 1], found["MAE", 2], found["LVM-Med", 1]) == (0.001, 0.003, 0.003)


def batches(number):
    for place in range(number):
        yield {"data": place, "target": [torch.tensor([0, 1])], "case": ["a", "b"]}


def test_arms_read_the_same_batches_and_the_end_of_a_stream_is_an_error():
    kept = bed_script.Again(batches(2))
    first = [next(kept), next(kept)]
    kept.place = 0
    assert [next(kept), next(kept)] == first
    with pytest.raises(RuntimeError, match="after 2 batches"):
        next(kept)


def test_labels_dealt_out_at_random_keep_images_and_counts():
    labels = {f"{number:02d}": number % 3 for number in range(30)}
    mixed = bed_script.dealt_out(labels, 0)
    assert list(mixed) == list(labels) and sorted(mixed.values()) == sorted(labels.values()) and mixed != labels
    assert mixed == bed_script.dealt_out(labels, 0) != bed_script.dealt_out(labels, 1)
    batch = next(bed_script.Relabelled(batches(1), {"a": 2, "b": 0}))
    assert batch["target"][0].tolist() == [2, 0] and batch["data"] == 0


# ---------------------------------------------------------------- results


def auroc(truth, probabilities):
    if probabilities.shape[1] == 2:
        return roc_auc_score(truth, probabilities[:, 1])
    return roc_auc_score(truth, probabilities, multi_class="ovr")


def made_runs(folder, bed, *, cases_of, classes=CLASSES, gain=0.8):
    """Runs of the smaller fraction for three seeds, whose pretrained arm is better; (arm, seed) → AUROC, accuracy."""
    rng, made, part = np.random.default_rng(0), {}, min(bed.fractions)
    write_json(folder / "folds.json", {"0-pool": {"train": [str(number) for number in range(100)], "val": []}})
    for arm, seed in ((arm, seed) for arm in ("MAE", "scratch") for seed in range(3)):
        truth = {case: number % len(classes) for number, case in enumerate(cases_of(seed))}
        sure = np.eye(len(classes))[list(truth.values())] * (gain if arm == "MAE" else 0.2)
        probabilities = np.exp(sure + 0.5 * rng.normal(size=sure.shape))
        probabilities /= probabilities.sum(1, keepdims=True)
        labels = np.array(list(truth.values()))
        made[arm, seed] = auroc(labels, probabilities), accuracy_score(labels, probabilities.argmax(1))
        run = {"name": f"{arm}{seed}", "arm": arm, "seed": seed, "fraction": part, "lr": 1e-3, "control": None}
        run |= {"kind": "binary" if len(classes) == 2 else "multiclass", "classes": classes, "truth": truth}
        run["probabilities"] = dict(zip(truth, probabilities.tolist(), strict=True))
        run |= {"auroc": made[arm, seed][0], "curve": [0.5] * 9 + [made[arm, seed][0]]}
        write_json(folder / "runs" / f"{arm}{seed}.json", run | {"seconds": 60, "cpu_seconds": 30})
    write_json(folder / "pretrained" / "MAE-0.json", {"arm": "MAE", "seed": 0, "losses": [1, 0.5], "cpu_seconds": 60})
    return made


@pytest.mark.parametrize("own_images", [False, True])
@pytest.mark.parametrize("classes", [CLASSES, ("normal", "hyperplasia")])
def test_a_bed_pairs_seeds_and_images(own_images, classes, busi, tmp_path):
    made = made_runs(
        tmp_path,
        busi,
        cases_of=lambda seed: [f"{seed if own_images else 0}-{number}" for number in range(30)],
        classes=classes,
    )
    found = results.summarise(busi, tmp_path)
    assert found["evaluation_cases"] == (90 if own_images else 30)
    mae = next(row for row in found["rows"] if row["arm"] == "MAE")
    assert (mae["labelled_cases"], mae["seeds"], {row["arm"] for row in found["rows"]}) == (10, 3, {"MAE", "scratch"})
    for metric, entry in enumerate((mae, mae["accuracy"])):
        expected = np.mean([made["MAE", seed][metric] - made["scratch", seed][metric] for seed in range(3)])
        difference = entry["difference_to_scratch"]
        assert difference["mean"] == pytest.approx(expected) and difference["low"] < expected < difference["high"]
        assert entry["per_seed"] == pytest.approx([made["MAE", seed][metric] for seed in range(3)])
        assert entry["interval"][0] < entry["mean"] < entry["interval"][1]
        assert entry["paired"][0] - entry["paired"][1] == pytest.approx(expected)
    (twin,) = found["calibration"]
    gains = [made["scratch", seed][0] - 0.5 for seed in range(3)]
    assert twin["gain_in_last_fifth"] == pytest.approx(np.mean(gains))
    assert twin["converged"] is bool(np.mean(gains) < np.std(gains, ddof=1) / 3)
    assert found["cost_minutes"]["fine-tuning"] == 3 and found["cost_minutes"]["pretraining MAE"] == 1
    text = results.table(found)
    assert "| 10 | MAE |" in text and "MAE, seed 0: loss 1.000 → 0.500" in text


def test_images_that_seeds_share_are_drawn_together(busi, tmp_path):
    run = {"kind": "multiclass", "classes": CLASSES, "truth": {str(n): n % 3 for n in range(12)}}
    run["probabilities"] = {case: np.roll([0.6, 0.3, 0.1], int(case) % 2).tolist() for case in run["truth"]}
    other = run | {"truth": {f"{n}x": n % 3 for n in range(12)}}
    other["probabilities"] = {f"{case}x": given for case, given in run["probabilities"].items()}
    drawn = results.drawn_metrics([run | {"name": "a"}, run | {"name": "b"}, other | {"name": "c"}])
    assert drawn["a"]["auroc"][0] == drawn["c"]["auroc"][0]
    np.testing.assert_array_equal(drawn["a"]["auroc"], drawn["b"]["auroc"])
    assert not np.array_equal(drawn["a"]["auroc"], drawn["c"]["auroc"])


def test_one_seed_has_no_interval():
    assert results.interval([np.linspace(0, 1, results.SAMPLES + 1)]) == [None, None]
    assert results.interval([np.full(results.SAMPLES + 1, 0.5)] * 2) == [0.5, 0.5]


def test_the_picture_of_all_beds_has_a_line_for_each_difference(busi, tmp_path):
    made_runs(tmp_path, busi, cases_of=lambda seed: [str(number) for number in range(30)])
    bed = results.summarise(busi, tmp_path)
    for name, converged in (("a", False), ("b", True)):
        calibration = [row | {"converged": converged} for row in bed["calibration"]]
        write_json(tmp_path / "beds" / f"{name}.json", bed | {"name": name, "calibration": calibration})
    lines = forest_plot.lines_of(tmp_path / "beds")
    assert [(line.title[0], line.converged) for line in lines] == [("b", True), ("a", False)]
    for line in lines:
        assert "10 labels" in line.title and "AUROC" in line.title
        assert line.arm == "MAE" and line.difference["low"] is not None
    forest_plot.draw(lines, tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000
