"""Metrics of a classifier: scikit-learn's numbers, what is not defined, and intervals that draw subjects."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.statistics.areas import areas
from nnssl_plugin.tasks.classification.metrics import class_metrics
from nnssl_plugin.tasks.classification.predictions import read_predictions, write_predictions
from nnssl_plugin.tasks.classification.summary import (
    class_summary,
    make_predictions,
    resampled_metrics,
    subject_intervals,
)

BINARY = Target("malignancy", "binary", ("benign", "malignant"))
THREE = Target("diagnosis", "multiclass", ("benign", "malignant", "normal"))
GRADES = Target("grade", "ordinal", ("I", "II", "III", "IV"))
FINDINGS = Target("findings", "multilabel", ("cyst", "mass", "stone"))
ALL = (BINARY, THREE, GRADES, FINDINGS)


def random_case(target, n=67, seed=0, decimals=1):
    """Labels and probabilities that know something; rounded, so that many scores are equal."""
    rng = np.random.default_rng(seed)
    classes = len(target.classes)
    if target.kind == "multilabel":
        labels = rng.random((n, classes)) < [0.2, 0.5, 0.7]
        return labels, np.round(np.clip(rng.random((n, classes)) * 0.7 + 0.3 * labels, 0, 1), decimals)
    labels = rng.integers(classes, size=n)
    probabilities = rng.dirichlet(np.ones(classes), size=n) + 0.4 * np.eye(classes)[labels]
    return labels, np.round(probabilities / probabilities.sum(axis=1, keepdims=True), decimals)


def summary_of(target, labels, probabilities, subjects=None):
    summary = class_summary(labels, probabilities, target=target, subjects=subjects or range(len(labels)))
    json.dumps(summary, allow_nan=False)  # ready for JSON, and nothing is NaN
    return summary


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.kind)
@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_those_of_scikit_learn(target, seed):
    labels, probabilities = random_case(target, seed=seed)
    multilabel = target.kind == "multilabel"
    answers = probabilities >= 0.5 if multilabel else probabilities.argmax(axis=1)
    truth = labels if multilabel else np.eye(len(target.classes))[labels].astype(bool)
    guessed = answers if multilabel else np.eye(len(target.classes))[answers].astype(bool)
    found = summary_of(target, labels, probabilities)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
    balanced = [metrics.balanced_accuracy_score(t, g) for t, g in zip(truth.T, guessed.T, strict=True)]
    expected = np.mean(balanced) if multilabel else metrics.balanced_accuracy_score(labels, answers)
    assert found["balanced_accuracy"] == pytest.approx(expected)
    if target.kind == "binary":
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities[:, 1]))
        assert found["average_precision"] == pytest.approx(metrics.average_precision_score(labels, probabilities[:, 1]))
    else:
        assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, probabilities, average="macro"))
        assert found["average_precision"] == pytest.approx(metrics.average_precision_score(truth, probabilities))
    reports = metrics.multilabel_confusion_matrix(truth, guessed)
    for k, name in enumerate(target.classes):
        (tn, fp), (fn, tp) = reports[k]
        of_class = found["per_class"][name]
        assert of_class["auroc"] == pytest.approx(metrics.roc_auc_score(truth[:, k], probabilities[:, k]))
        assert of_class["sensitivity"] == pytest.approx(tp / (tp + fn))
        assert of_class["specificity"] == pytest.approx(tn / (tn + fp))
        assert of_class["ppv"] == pytest.approx(tp / (tp + fp))
        assert of_class["npv"] == pytest.approx(tn / (tn + fn))
        assert (of_class["cases"], of_class["predicted"]) == (tp + fn, tp + fp)
    matrix = reports if multilabel else metrics.confusion_matrix(labels, answers)
    np.testing.assert_array_equal(found["confusion_matrix"], matrix)
    assert found["undefined"] == {}


def test_brier_score_equals_that_of_scikit_learn():
    labels, probabilities = random_case(BINARY)
    assert summary_of(BINARY, labels, probabilities)["brier"] == pytest.approx(
        metrics.brier_score_loss(labels, probabilities[:, 1])
    )
    labels, probabilities = random_case(THREE, decimals=9)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert summary_of(THREE, labels, probabilities)["brier"] == pytest.approx(
        metrics.brier_score_loss(labels, probabilities, labels=[0, 1, 2], scale_by_half=False)
    )
    labels, probabilities = random_case(FINDINGS)
    each = [metrics.brier_score_loss(labels[:, k], probabilities[:, k]) for k in range(3)]
    assert summary_of(FINDINGS, labels, probabilities)["brier"] == pytest.approx(np.mean(each))


def test_ordinal_measures_equal_those_of_scikit_learn():
    labels, probabilities = random_case(GRADES)
    answers = probabilities.argmax(axis=1)
    found = summary_of(GRADES, labels, probabilities)
    assert found["mean_absolute_error"] == pytest.approx(metrics.mean_absolute_error(labels, answers))
    assert found["quadratic_kappa"] == pytest.approx(metrics.cohen_kappa_score(labels, answers, weights="quadratic"))


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    labels, probabilities = random_case(BINARY, n=300, decimals=9)
    observed, claimed = calibration_curve(labels, probabilities[:, 1], n_bins=10)
    counts = np.histogram(probabilities[:, 1], bins=np.linspace(0, 1, 11))[0]
    expected = (np.abs(observed - claimed) * counts[counts > 0]).sum() / len(labels)
    assert summary_of(BINARY, labels, probabilities)["ece"] == pytest.approx(expected)


def test_calibration_error_of_several_classes_is_that_of_the_most_probable_one():
    labels, probabilities = random_case(THREE, n=200, decimals=9)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for low in np.arange(10) / 10:
        members = [i for i in range(200) if low <= confidence[i] < low + 0.1]
        if members:
            expected += abs(confidence[members].mean() - right[members].mean()) * len(members) / 200
    assert summary_of(THREE, labels, probabilities)["ece"] == pytest.approx(expected)


def test_certainty_that_is_right_is_calibrated_and_falls_into_the_last_bin():
    found = summary_of(THREE, np.array([0, 1, 2]), np.eye(3))
    assert (found["ece"], found["brier"], found["auroc"], found["accuracy"]) == (0, 0, 1, 1)


def test_one_class_alone_gives_null_and_a_reason_instead_of_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary_of(BINARY, np.zeros(5, dtype=int), np.tile([0.7, 0.3], (5, 1)))
    assert found["auroc"] is None and found["average_precision"] is None
    assert found["accuracy"] == 1.0 and found["per_class"]["malignant"]["sensitivity"] is None
    assert found["undefined"]["auroc"] == "all cases have one class"
    assert found["undefined"]["sensitivity/malignant"] == "no case has malignant"
    assert found["undefined"]["auroc/benign"] == "every case has benign"


def test_means_leave_out_a_class_that_no_case_has_and_say_so():
    labels, probabilities = random_case(THREE)
    probabilities = np.where(np.arange(3) == 2, 0.0, probabilities)
    few = np.where(labels == 2, 0, labels)
    found = summary_of(THREE, few, probabilities)
    both = [metrics.roc_auc_score(few == k, probabilities[:, k]) for k in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean(both))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(few, probabilities.argmax(axis=1), average="macro"))
    assert found["per_class"]["normal"]["auroc"] is None
    assert "leave out normal" in found["undefined"]["means"]


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.kind)
def test_one_case_does_not_crash(target):
    labels, probabilities = random_case(target, n=1)
    assert summary_of(target, labels, probabilities)["accuracy"] in (0.0, 1.0)


def test_kappa_of_one_class_is_null():
    found = summary_of(GRADES, np.ones(4, dtype=int), np.tile([0.1, 0.7, 0.1, 0.1], (4, 1)))
    assert found["quadratic_kappa"] is None and found["mean_absolute_error"] == 0


def test_probabilities_that_are_nan_are_refused_with_the_case():
    probabilities = np.full((3, 2), 0.5)
    probabilities[1] = np.nan
    with pytest.raises(UserError, match=r"1 cases have a probability that is NaN.*case_b"):
        make_predictions(BINARY, ["case_a", "case_b", "case_c"], "abc", [0, 1, 0], probabilities)


def test_tuples_of_classes_and_indicators_are_the_same_labels():
    _, probabilities = random_case(FINDINGS, n=3)
    indicators = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool)
    assert summary_of(FINDINGS, [(0, 2), (), (1,)], probabilities) == summary_of(FINDINGS, indicators, probabilities)


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.kind)
def test_a_weight_counts_a_case_as_often_as_repeating_it(target):
    labels, probabilities = random_case(target)
    times = np.random.default_rng(1).integers(0, 4, size=(5, len(labels)))
    weighted = class_metrics(labels, probabilities, times.astype(float), target=target)
    for row, repeats in enumerate(times):
        index = np.repeat(np.arange(len(labels)), repeats)
        repeated = class_metrics(labels[index], probabilities[index], np.ones((1, len(index))), target=target)
        for name, values in repeated.items():
            np.testing.assert_allclose(weighted[name][row], values[0], err_msg=name)


def test_areas_equal_those_of_scikit_learn_with_weights():
    rng = np.random.default_rng(2)
    scores, positives, weights = rng.integers(6, size=40) / 5, rng.random(40) < 0.3, rng.random((3, 40))
    roc, precision = areas(scores, positives, weights)
    for row in range(3):
        expected = metrics.roc_auc_score(positives, scores, sample_weight=weights[row])
        assert roc[row] == pytest.approx(expected)
        expected = metrics.average_precision_score(positives, scores, sample_weight=weights[row])
        assert precision[row] == pytest.approx(expected)


def test_cases_of_one_subject_are_drawn_together():
    """Ten copies of each case under its subject: the interval is that of the subjects, not ten times surer."""
    labels, probabilities = random_case(BINARY, n=40, decimals=9)
    names = [f"s{i:02d}" for i in range(40)]
    once = make_predictions(BINARY, names, names, labels, probabilities)
    copied = once.select(np.repeat(np.arange(40), 10))
    for name, values in resampled_metrics([once])[0].items():
        np.testing.assert_allclose(values, resampled_metrics([copied])[0][name], err_msg=name)
    alone = make_predictions(BINARY, copied.cases, [str(i) for i in range(400)], copied.labels, copied.probabilities)
    low, high = subject_intervals(copied)["accuracy"]
    sure_low, sure_high = subject_intervals(alone)["accuracy"]
    assert high - low > 2.5 * (sure_high - sure_low)


def test_the_interval_of_an_accuracy_is_that_of_the_binomial():
    labels = np.repeat([0, 1], 100)
    probabilities = np.where(np.arange(200)[:, None] % 5 == 0, [[0.2, 0.8]], [[0.8, 0.2]])
    names = [str(i) for i in range(200)]
    low, high = subject_intervals(make_predictions(BINARY, names, names, labels, probabilities))["accuracy"]
    error = np.sqrt(0.5 * 0.5 / 200)
    assert (low, high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=0.01)


def test_one_subject_has_no_interval():
    labels, probabilities = random_case(THREE, n=6)
    predictions = make_predictions(THREE, list("abcdef"), ["one"] * 6, labels, probabilities)
    assert set(map(tuple, subject_intervals(predictions).values())) == {(None, None)}


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.kind)
def test_a_table_comes_back_as_it_was_written(target, tmp_path):
    labels, probabilities = random_case(target, decimals=12)
    probabilities = probabilities.astype(np.float32).astype(float)
    names = [f"case {i}, left" for i in range(len(labels))]
    written = make_predictions(target, names, [f"s{i % 9}" for i in range(len(labels))], labels, probabilities)
    write_predictions(tmp_path / "predictions.csv", written)
    found = read_predictions(tmp_path / "predictions.csv", target)
    assert (found.cases, found.subjects) == (written.cases, written.subjects)
    np.testing.assert_array_equal(found.labels, written.labels)
    np.testing.assert_array_equal(found.probabilities.astype(np.float32), written.probabilities.astype(np.float32))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("case,label,p_benign,p_malignant\na,benign,0.5,0.5\na,benign,0.5,0.5\n", "case a occurs more than once"),
        ("case,label,p_benign\na,benign,0.5\n", "no column 'p_malignant'"),
        ("case,p_benign,p_malignant\na,0.5,0.5\n", "no column 'label'"),
        ("case,label,p_benign,p_malignant\na,lymphoma,0.5,0.5\n", "'lymphoma' is no class"),
        ("case,label,p_benign,p_malignant\na,benign,half,0.5\n", "no number"),
        ("case,label,p_benign,p_malignant\na,benign,nan,0.5\n", "NaN"),
        ("case,label,p_benign,p_malignant\n", "no rows"),
    ],
)
def test_a_damaged_table_is_refused_with_the_reason(text, problem, tmp_path):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_predictions(tmp_path / "predictions.csv", BINARY)
