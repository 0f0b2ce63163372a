"""Figures of a classifier: drawn for every kind of target, with what a reader looks for in their legends."""

import matplotlib
import numpy as np
import pytest
from sklearn import metrics

from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification import figures as class_figures
from nnssl_plugin.tasks.classification.confusion_figure import draw_confusion
from nnssl_plugin.tasks.classification.curves import draw_precision, draw_roc
from nnssl_plugin.tasks.classification.reliability_figure import draw_reliability
from nnssl_plugin.tasks.classification.summary import make_predictions, subject_intervals, write_validation

matplotlib.use("agg")

BINARY = Target("malignancy", "binary", ("benign", "malignant"))
FINDINGS = Target("findings", "multilabel", ("cyst", "mass"))
MANY = Target("organ", "multiclass", tuple("abcdefghijkl"))


def drawn(target, n=60):
    rng, k = np.random.default_rng(0), len(target.classes)
    if target.kind == "multilabel":
        labels = rng.random((n, k)) < 0.4
        probabilities = 1 / (1 + np.exp(-rng.normal(size=(n, k)) - labels))
    else:
        labels = np.arange(n) % k
        logits = np.exp(rng.normal(size=(n, k)) + np.eye(k)[labels])
        probabilities = logits / logits.sum(axis=1, keepdims=True)
    names = [f"c{i}" for i in range(n)]
    return make_predictions(target, names, names, labels, probabilities)


@pytest.fixture
def axis():
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def labels(handles):
    return [handle.get_label() for handle in handles]


@pytest.mark.slow
@pytest.mark.parametrize("target", [BINARY, FINDINGS, MANY], ids=lambda t: t.kind)
def test_four_pictures_are_written(target, tmp_path):
    predictions = drawn(target)
    class_figures.draw_class_figures(tmp_path, predictions, {}, suffix="_x")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}_x.png" for name in ("roc", "precision_recall", "reliability", "confusion")
    }


def test_a_single_case_is_drawn(tmp_path):
    summary = write_validation(tmp_path, BINARY, ["c1"], ["s1"], [0], [[0.3, 0.7]])
    assert summary["auroc"] is None and summary["intervals"]["accuracy"] == [None, None]
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_the_roc_curve_is_that_of_scikit_learn_and_its_legend_has_the_interval(axis):
    predictions = drawn(BINARY)
    legend = labels(draw_roc(axis, predictions, subject_intervals(predictions)))
    alarms, found, _ = metrics.roc_curve(predictions.labels, predictions.probabilities[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(axis.lines[0].get_xdata(), alarms)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), found)
    area = metrics.roc_auc_score(predictions.labels, predictions.probabilities[:, 1])
    assert legend[0].startswith(f"malignant: AUROC {area:.3f} (95 %: 0.") and "30 of 60 cases" in legend[0]
    assert any("sensitivity" in text and "specificity" in text for text in legend)


def test_the_area_below_the_steps_is_the_average_precision(axis):
    predictions = drawn(BINARY)
    draw_precision(axis, predictions, {})
    line = axis.lines[0]
    assert line.get_drawstyle() == "steps-post"
    area = -(np.diff(line.get_xdata()) * line.get_ydata()[:-1]).sum()  # recall falls along the curve
    assert area == pytest.approx(metrics.average_precision_score(predictions.labels, predictions.probabilities[:, 1]))


def test_of_many_classes_the_worst_are_named_and_the_rest_is_counted(axis):
    predictions = drawn(MANY)
    legend = labels(draw_roc(axis, predictions, {}))
    aurocs = {
        name: metrics.roc_auc_score(predictions.labels == k, predictions.probabilities[:, k])
        for k, name in enumerate(MANY.classes)
    }
    worst = sorted(sorted(aurocs, key=aurocs.get)[:6])
    assert [text[0] for text in legend[:6]] == worst
    assert legend[6].startswith("6 other classes: AUROC")


def test_the_bins_hold_every_case_once(axis):
    predictions = drawn(BINARY)
    legend = labels(draw_reliability(axis, predictions, {}))
    assert sum(int(text.get_text()) for text in axis.texts) == 60
    assert any("expected calibration error" in text for text in legend)


def test_the_table_holds_the_counts():
    predictions = drawn(BINARY)
    figure = draw_confusion(predictions)
    counts = [int(text.get_text().split("\n")[0]) for text in figure.axes[0].texts]
    expected = metrics.confusion_matrix(predictions.labels, predictions.probabilities.argmax(axis=1))
    assert counts == expected.ravel().tolist()
