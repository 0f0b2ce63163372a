"""Folds pooled, tables scored against labels, runs compared: numbers, files, and what is wrong with them."""

import csv
import json

import numpy as np
import pytest
from sklearn import metrics

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import Target, targets_block
from nnssl_plugin.statistics.bootstrap import paired_permutation_p
from nnssl_plugin.statistics.delong import auroc_difference
from nnssl_plugin.tasks.classification.comparison import compare_classifiers
from nnssl_plugin.tasks.classification.evaluation import evaluate_classification
from nnssl_plugin.tasks.classification.predictions import read_predictions
from nnssl_plugin.tasks.classification.summary import make_predictions, resampled_metrics, write_validation

NAME = "Dataset921_Classes"
BINARY = Target("malignancy", "binary", ("benign", "malignant"))
THREE = Target("diagnosis", "multiclass", ("benign", "malignant", "normal"))
FINDINGS = Target("findings", "multilabel", ("cyst", "mass"))


def drawn(target, cases, *, knows=1.0, seed=0):
    """Labels that depend on the case's name alone, and probabilities that know them more or less."""
    rng, k = np.random.default_rng(seed), len(target.classes)
    if target.kind == "multilabel":
        labels = np.array([[(int(c[1:]) >> bit) % 2 for bit in range(k)] for c in cases], dtype=bool)
        return labels, 1 / (1 + np.exp(-rng.normal(size=labels.shape) - knows * (2 * labels - 1)))
    labels = np.array([int(c[1:]) * 7 % 5 % k for c in cases])
    logits = np.exp(rng.normal(size=(len(cases), k)) + knows * np.eye(k)[labels])
    return labels, logits / logits.sum(axis=1, keepdims=True)


def model_folder(
    home, *, plan="nnUNetPlans", targets=(BINARY,), folds=3, per_fold=20, knows=1.0, seed=0, checkpoint="final"
):
    """What a training leaves of each fold: two cases per subject, no subject in two folds."""
    folder = home / f"PretrainedClassificationTrainer__{plan}__3d_fullres"
    write_json(folder / "dataset.json", {"classification": targets_block(targets)})
    write_json(folder / "plans.json", {})
    for fold in range(folds):
        cases = [f"c{i:03d}" for i in range(fold * per_fold, (fold + 1) * per_fold)]
        subjects = [f"s{int(c[1:]) // 2}" for c in cases]
        for target in targets:
            labels, probabilities = drawn(target, cases, knows=knows, seed=seed + fold)
            write_validation(
                folder / f"fold_{fold}" / ("validation" if checkpoint == "final" else "validation_best"),
                target,
                cases,
                subjects,
                labels,
                probabilities,
                targets=targets,
                checkpoint=checkpoint,
            )
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They are drawn in test_class_figures.py."""
    monkeypatch.setattr("nnssl_plugin.tasks.classification.figures.draw_class_figures", lambda *a, **k: None)


def test_folds_are_pooled_into_a_folder_like_that_of_nnunet(tmp_path):
    folder = model_folder(tmp_path)
    evaluation = evaluate_classification({"run": folder})
    output = folder / "crossval_results_folds_0_1_2"
    assert evaluation.runs["run"].folder == output and (output / "dataset.json").exists()
    pooled, summary = read_predictions(output / "predictions.csv", BINARY), read_json(output / "summary.json")
    assert list(pooled.cases) == [f"c{i:03d}" for i in range(60)]
    assert summary["auroc"] == pytest.approx(metrics.roc_auc_score(pooled.labels, pooled.probabilities[:, 1]))
    assert summary["intervals"]["auroc"][0] < summary["auroc"] < summary["intervals"]["auroc"][1]
    assert (summary["cases"], summary["subjects"]) == (60, 30)
    per_fold = [read_json(folder / f"fold_{k}" / "validation" / "summary.json") for k in range(3)]
    assert [summary["folds"][str(k)]["auroc"] for k in range(3)] == pytest.approx([s["auroc"] for s in per_fold])
    expected = {"mean": np.mean([s["auroc"] for s in per_fold]), "sd": np.std([s["auroc"] for s in per_fold], ddof=1)}
    assert summary["mean_of_folds"]["auroc"] == pytest.approx(expected | {"folds": 3})


def test_chosen_folds_alone_are_pooled(tmp_path):
    folder = model_folder(tmp_path)
    evaluate_classification({"run": folder}, folds=[0, 2])
    assert read_json(folder / "crossval_results_folds_0_2" / "summary.json")["cases"] == 40


def test_several_targets_have_files_of_their_own(tmp_path):
    folder = model_folder(tmp_path, targets=(THREE, FINDINGS), folds=2)
    output = evaluate_classification({"run": folder}).runs["run"].folder
    assert sorted(p.name for p in output.glob("*.csv")) == ["predictions_diagnosis.csv", "predictions_findings.csv"]
    assert read_json(output / "summary_findings.json")["kind"] == "multilabel"


@pytest.mark.parametrize(("what", "problem"), [("case", "share cases: c000"), ("subject", "share subjects: s0")])
def test_folds_that_share_a_case_or_a_subject_are_refused(tmp_path, what, problem):
    folder = model_folder(tmp_path, folds=2)
    path = folder / "fold_1" / "validation" / "predictions.csv"
    rows = path.read_text().splitlines()
    changed = rows[1].split(",")
    changed[0 if what == "case" else 1] = "c000" if what == "case" else "s0"
    path.write_text("\n".join([rows[0], ",".join(changed), *rows[2:]]) + "\n")
    with pytest.raises(UserError, match=problem):
        evaluate_classification({"run": folder})


def test_a_fold_without_validation_is_named(tmp_path):
    folder = model_folder(tmp_path, folds=2)
    with pytest.raises(UserError, match="no validation of fold 4"):
        evaluate_classification({"run": folder}, folds=[0, 1, 4])
    with pytest.raises(UserError, match="no folder"):
        evaluate_classification({"run": tmp_path / "nowhere", "b": folder}, tmp_path / "out")


def test_a_fold_with_one_class_is_pooled_all_the_same(tmp_path):
    folder = model_folder(tmp_path, folds=2)
    write_validation(
        folder / "fold_2" / "validation", BINARY, ["c900"], ["s900"], [0], [[0.4, 0.6]], checkpoint="final"
    )
    evaluate_classification({"run": folder})
    summary = read_json(folder / "crossval_results_folds_0_1_2" / "summary.json")
    assert summary["folds"]["2"]["auroc"] is None and summary["mean_of_folds"]["auroc"]["folds"] == 2


@pytest.mark.parametrize("target", [BINARY, THREE, FINDINGS], ids=lambda t: t.kind)
def test_differences_are_those_of_the_metrics_and_of_delong(target):
    cases, subjects = [f"c{i:03d}" for i in range(80)], [f"s{i // 2}" for i in range(80)]
    runs = {}
    for name, knows in (("scratch", 0.3), ("pretrained", 1.5)):
        runs[name] = make_predictions(target, cases, subjects, *drawn(target, cases, knows=knows, seed=len(name)))
    shuffled = {"scratch": runs["scratch"], "pretrained": runs["pretrained"].select(range(79, -1, -1))}
    comparison = compare_classifiers(shuffled)
    json.dumps(comparison.as_dict(), allow_nan=False)
    found = comparison.differences["pretrained"]
    a, b = runs["pretrained"], runs["scratch"]
    k, metric = (1, "auroc") if target is BINARY else (0, f"auroc/{target.classes[0]}")
    truth = a.labels == 1 if target is BINARY else a.labels[:, 0] if target is FINDINGS else a.labels == 0
    expected = auroc_difference(a.probabilities[:, k], b.probabilities[:, k], truth, subjects=subjects)
    assert (found[metric].p, found[metric].low) == pytest.approx((expected.p, expected.low))
    drawn_a, drawn_b = resampled_metrics([a, b])
    expected = np.quantile(drawn_a["brier"] - drawn_b["brier"], [0.025, 0.975])
    assert (found["brier"].low, found["brier"].high) == pytest.approx(tuple(expected))
    assert found["accuracy"].value > 0 and found["accuracy"].p < 0.05


def test_the_permutation_test_equals_all_assignments():
    rng = np.random.default_rng(0)
    differences, subjects = rng.integers(-1, 2, size=16).astype(float), np.arange(16) // 2
    sums = [differences[subjects == s].sum() for s in range(8)]
    every = [abs(sum(s * (1 if code >> k & 1 else -1) for k, s in enumerate(sums))) for code in range(256)]
    exact = np.mean(np.array(every) >= abs(sum(sums)))
    assert paired_permutation_p(differences, subjects, samples=40_000) == pytest.approx(exact, abs=0.01)
    assert paired_permutation_p(-differences, subjects) == paired_permutation_p(differences, subjects)
    assert paired_permutation_p(np.zeros(5), np.arange(5)) == 1
    assert paired_permutation_p(np.ones(60), np.arange(60)) == pytest.approx(1 / 10_001)
    assert paired_permutation_p(np.ones(60), np.zeros(60)) == 1  # one subject proves nothing


def test_runs_that_disagree_about_a_label_are_refused():
    cases = ["c001", "c002", "c003", "c004"]
    labels, probabilities = drawn(BINARY, cases)
    first = make_predictions(BINARY, cases, cases, labels, probabilities)
    with pytest.raises(UserError, match=r"another label.*c001"):
        compare_classifiers({"a": first, "b": make_predictions(BINARY, cases, cases, 1 - labels, probabilities)})
    with pytest.raises(UserError, match="No case"):
        compare_classifiers({"a": first.select([0, 1]), "b": first.select([2, 3])})


def test_the_command_compares_two_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    for plan, knows, seed in (("nnUNetPlans-scratch", 0.5, 0), ("nnUNetPlans-s2dc", 2.0, 9)):
        model_folder(tmp_path / NAME, plan=plan, targets=(THREE,), knows=knows, seed=seed)
    code = main(
        [
            "evaluate",
            "classification",
            "-d",
            NAME,
            "-p",
            "nnUNetPlans-scratch",
            "nnUNetPlans-s2dc",
            "-c",
            "3d_fullres",
            "-o",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "nnUNetPlans-s2dc − nnUNetPlans-scratch: diagnosis, over 60 cases of 30 subjects" in printed
    comparison = read_json(tmp_path / "out" / "comparison.json")
    assert comparison["compared_to"] == "nnUNetPlans-scratch"
    assert comparison["differences"]["nnUNetPlans-s2dc"]["auroc"]["value"] > 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


def test_a_table_without_labels_is_scored_against_a_table_of_labels(tmp_path):
    cases = [f"c{i:03d}" for i in range(30)]
    labels, probabilities = drawn(BINARY, cases)
    with (tmp_path / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "target", "predicted", "p_benign", "p_malignant"])
        table.writerows(
            [c, "malignancy", BINARY.classes[p.argmax()], *p] for c, p in zip(cases, probabilities, strict=True)
        )
    write_json(tmp_path / "predictions.json", {"classification": targets_block([BINARY])})
    rows = [f"{c},s{i // 3},{BINARY.classes[label]}" for i, (c, label) in enumerate(zip(cases, labels, strict=True))]
    (tmp_path / "labels.csv").write_text("\n".join(["case,subject,malignancy", *rows]) + "\n")
    where = ["evaluate", "classification", "-i", f"test={tmp_path / 'predictions.csv'}", "-o", str(tmp_path / "out")]
    assert main(where) == 2  # no labels
    assert main([*where, "-ref", str(tmp_path / "labels.csv")]) == 0
    summary = read_json(tmp_path / "out" / "test" / "summary.json")
    assert summary["subjects"] == 10
    assert summary["accuracy"] == pytest.approx(metrics.accuracy_score(labels, probabilities.argmax(axis=1)))
    (tmp_path / "labels.csv").write_text("\n".join(["case,subject,malignancy", *rows[1:]]) + "\n")
    with pytest.raises(UserError, match=r"1 cases of .* have no label: c000"):
        evaluate_classification(
            {"test": tmp_path / "predictions.csv"}, tmp_path / "out", references=tmp_path / "labels.csv"
        )


def test_a_folder_without_a_description_asks_for_one(tmp_path):
    (tmp_path / "predictions.csv").write_text("case,target,label,predicted,p_a,p_b\nc,t,a,a,0.5,0.5\n")
    with pytest.raises(UserError, match="classes are unknown"):
        evaluate_classification({"test": tmp_path}, tmp_path / "out")
    with pytest.raises(UserError, match="No folder for the results"):
        evaluate_classification({"test": tmp_path})


def without_checkpoint(table):
    """A table as earlier versions wrote it."""
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    column = rows[0].index("checkpoint")
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*row[:column], *row[column + 1 :]] for row in rows)


def test_folds_of_the_best_epoch_are_pooled_apart_and_say_so(tmp_path, capsys):
    folder = model_folder(tmp_path)
    model_folder(tmp_path, checkpoint="best", knows=2.0)
    evaluate = ["evaluate", "classification", "-i", f"run={folder}"]
    assert main(evaluate) == 0
    assert "best epoch" not in capsys.readouterr().out
    assert main([*evaluate, "--checkpoint", "best"]) == 0
    assert "best epoch, chosen on validation cases" in capsys.readouterr().out
    final, best = (read_json(folder / f"crossval_results_folds_0_1_2{s}" / "summary.json") for s in ("", "_best"))
    assert (final["checkpoint"], best["checkpoint"]) == ("final", "best") and best["auroc"] > final["auroc"]
    assert "too good" in best["warning"] and "warning" not in final


def test_tables_of_earlier_versions_count_as_the_best_epoch(tmp_path, capsys):
    folder = model_folder(tmp_path)
    for fold in range(3):
        without_checkpoint(folder / f"fold_{fold}" / "validation" / "predictions.csv")
    assert main(["evaluate", "classification", "-i", f"run={folder}"]) == 0
    assert "best epoch" in capsys.readouterr().out
    where = ["evaluate", "classification", "-i", f"one={folder / 'fold_0'}", "-o", str(tmp_path / "out")]
    assert main(where) == 0
    assert "best epoch" in capsys.readouterr().out


def test_folds_of_different_checkpoints_are_not_pooled(tmp_path):
    folder = model_folder(tmp_path)
    without_checkpoint(folder / "fold_1" / "validation" / "predictions.csv")
    with pytest.raises(UserError, match=r"0: final, 1: best, 2: final"):
        evaluate_classification({"run": folder})


def test_a_comparison_with_a_best_epoch_says_so(tmp_path, capsys):
    first = model_folder(tmp_path / "a")
    second = model_folder(tmp_path / "b", seed=5)
    for fold in range(3):
        without_checkpoint(second / f"fold_{fold}" / "validation" / "predictions.csv")
    runs = ["-i", f"a={first}", f"b={second}"]
    assert main(["evaluate", "classification", *runs, "-o", str(tmp_path / "out")]) == 0
    assert "(b: best epoch" in capsys.readouterr().out
    assert read_json(tmp_path / "out" / "comparison.json")["checkpoints"] == {"a": "final", "b": "best"}


def test_the_checkpoint_of_classified_images_is_read_from_beside_their_table(tmp_path, capsys):
    labels, probabilities = drawn(BINARY, [f"c{i}" for i in range(8)])
    rows = [
        f"c{i},malignancy,{BINARY.classes[label]},{p[0]},{p[1]}"
        for i, (label, p) in enumerate(zip(labels, probabilities, strict=True))
    ]
    (tmp_path / "p.csv").write_text("\n".join(["case,target,label,p_benign,p_malignant", *rows]) + "\n")
    for file, said in (("checkpoint_best.pth", True), ("checkpoint_final.pth", False)):
        write_json(tmp_path / "p.json", {"classification": targets_block([BINARY]), "checkpoint": file})
        assert main(["evaluate", "classification", "-i", f"t={tmp_path / 'p.csv'}", "-o", str(tmp_path / "out")]) == 0
        assert ("best epoch" in capsys.readouterr().out) == said
