"""Losses and probabilities of class labels, beside scikit-learn, torch and closed forms."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from nnssl_plugin.nnunet.case_labels import KINDS, Target
from nnssl_plugin.tasks.classification.losses import (
    balanced_weights,
    class_loss,
    class_probabilities,
    joint_loss,
    joint_probabilities,
)

K = 4


def problem(kind, *, batch=7, classes=K, seed=0):
    """Random logits and labels of a kind, float64, and K."""
    generator = torch.Generator().manual_seed(seed)
    classes = 2 if kind == "binary" else classes
    logits = 3 * torch.randn(batch, classes - (kind == "ordinal"), generator=generator, dtype=torch.float64)
    if kind == "multilabel":
        return logits, (torch.rand(batch, classes, generator=generator) > 0.5).double(), classes
    return logits, torch.randint(classes, (batch,), generator=generator), classes


def negative_log_likelihood(probabilities, labels, kind):
    """(B, …), by hand from the probabilities."""
    if kind == "multilabel":
        return -torch.where(labels > 0.5, probabilities, 1 - probabilities).log()
    return -probabilities.log()[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 7])
def test_the_loss_is_the_likelihood_of_the_probabilities(kind, batch):
    logits, labels, classes = problem(kind, batch=batch)
    probabilities = class_probabilities(logits, kind=kind, classes=classes)
    assert probabilities.shape == (batch, classes)
    expected = negative_log_likelihood(probabilities, labels, kind).mean()
    assert float(class_loss(logits, labels, kind=kind, classes=classes)) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_classes_is_that_of_scikit_learn():
    logits, labels, classes = problem("multiclass")
    probabilities = class_probabilities(logits, kind="multiclass", classes=classes).double()
    expected = log_loss(labels, probabilities / probabilities.sum(1, keepdim=True), labels=range(classes))
    assert float(class_loss(logits, labels, kind="multiclass", classes=classes)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "ordinal"])
@pytest.mark.parametrize("scale", [1, 100])
def test_probabilities_are_not_negative_and_sum_to_one(kind, scale):
    logits, _, classes = problem(kind, batch=50)
    probabilities = class_probabilities(scale * logits, kind=kind, classes=classes)
    assert probabilities.min() >= 0
    torch.testing.assert_close(probabilities.sum(1), torch.ones(50))


def test_ordinal_probabilities_are_products_of_conditional_ones():
    logits, _, _ = problem("ordinal", batch=1)
    more = [1 / (1 + math.exp(-float(z))) for z in logits[0]]
    expected = [1 - more[0], more[0] * (1 - more[1]), more[0] * more[1] * (1 - more[2]), math.prod(more)]
    assert class_probabilities(logits, kind="ordinal", classes=K)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_an_ordinal_target_of_two_classes_is_a_logistic_regression():
    logits, labels, _ = problem("ordinal", classes=2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.double())
    assert float(class_loss(logits, labels, kind="ordinal", classes=2)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equal_weights_change_nothing(kind, smoothing):
    logits, labels, classes = problem(kind)
    ones = torch.ones((2, classes) if kind == "multilabel" else classes)
    plain, weighted = (
        class_loss(logits, labels, kind=kind, classes=classes, weights=w, smoothing=smoothing) for w in (None, ones)
    )
    assert float(plain) == float(weighted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_multiplies_the_loss_of_its_class_even_in_a_batch_of_that_class(kind):
    logits, labels, classes = problem(kind)
    labels = torch.ones_like(labels)
    weights = torch.ones((2, classes) if kind == "multilabel" else classes)
    weights[1] = 3.0
    plain, weighted = (class_loss(logits, labels, kind=kind, classes=classes, weights=w) for w in (None, weights))
    assert float(weighted) == pytest.approx(3 * float(plain), rel=1e-6)


def test_smoothing_of_classes_is_a_mixture_with_all_classes():
    logits, labels, classes = problem("multiclass")
    spread = -torch.log_softmax(logits, 1).mean(1).mean()
    plain = class_loss(logits, labels, kind="multiclass", classes=classes)
    smooth = class_loss(logits, labels, kind="multiclass", classes=classes, smoothing=0.3)
    assert float(smooth) == pytest.approx(0.7 * float(plain) + 0.3 * float(spread), rel=1e-5)


@pytest.mark.parametrize("kind", ["multilabel", "ordinal"])
def test_smoothing_of_yes_and_no_is_a_mixture_with_the_opposite(kind):
    logits, labels, classes = problem(kind, classes=2)
    plain, opposite = (class_loss(logits, answers, kind=kind, classes=classes) for answers in (labels, 1 - labels))
    smooth = class_loss(logits, labels, kind=kind, classes=classes, smoothing=0.4)
    assert float(smooth) == pytest.approx(0.8 * float(plain) + 0.2 * float(opposite), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_finite_losses_and_gradients(kind):
    logits, labels, classes = problem(kind)
    logits = (1e4 * logits).float().requires_grad_(True)
    loss = class_loss(logits, labels, kind=kind, classes=classes)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.random.default_rng(0).choice(3, 40, p=[0.7, 0.2, 0.1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = balanced_weights(torch.from_numpy(labels), kind="multiclass", classes=3)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert float(weights[labels].mean()) == pytest.approx(1.0)


def test_balanced_weights_of_labels_are_those_of_each_as_a_problem_of_its_own():
    labels = (np.random.default_rng(0).random((40, 3)) < [0.5, 0.1, 0.8]).astype(np.float32)
    weights = balanced_weights(torch.from_numpy(labels), kind="multilabel", classes=3)
    for k in range(3):
        expected = compute_class_weight("balanced", classes=np.arange(2), y=labels[:, k].astype(int))
        np.testing.assert_allclose(weights[:, k], expected, rtol=1e-6)


@pytest.mark.parametrize(("kind", "labels"), [("multiclass", [0, 0, 2]), ("multilabel", [[1.0, 0], [1, 0], [1, 1]])])
def test_a_class_that_does_not_occur_has_a_finite_weight(kind, labels):
    weights = balanced_weights(torch.tensor(labels), kind=kind, classes=3 if kind == "multiclass" else 2)
    assert torch.isfinite(weights).all()
    expected = [[1.0, 0.75], [1.0, 1.5]] if kind == "multilabel" else [0.75, 1, 1.5]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_several_targets_count_alike():
    targets = [Target("grade", "ordinal", ("1", "2", "3", "4")), Target("signs", "multilabel", ("a", "b", "c", "d"))]
    problems = [problem(target.kind) for target in targets]
    logits = {target.name: z for target, (z, _, _) in zip(targets, problems, strict=True)}
    labels = [y for _, y, _ in problems]
    expected = [
        class_loss(z, y, kind=target.kind, classes=k) for target, (z, y, k) in zip(targets, problems, strict=True)
    ]
    assert float(joint_loss(logits, labels, targets=targets, weights=[None, None])) == pytest.approx(
        float(sum(expected)) / 2
    )
    for target, (z, _, k) in zip(targets, problems, strict=True):
        torch.testing.assert_close(
            joint_probabilities(logits, targets)[target.name], class_probabilities(z, kind=target.kind, classes=k)
        )
