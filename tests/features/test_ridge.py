"""The ridge from sums against scikit-learn's on the data themselves, in float64."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from nnssl_plugin.features.ridge import LAMBDAS, RidgeSums, balanced_weights

CLASSES = 3


def toy(cases=6, features=7, seed=0):
    """Cases of features (n, D) that tell something about labels (n,), some classes rare."""
    rng = np.random.default_rng(seed)
    mixing, centres = rng.normal(size=(features, features)), rng.normal(size=(CLASSES, features))
    made = []
    for _ in range(cases):
        labels = rng.choice(CLASSES, p=[0.8, 0.15, 0.05], size=rng.integers(60, 120))
        made.append(((centres[labels] + rng.normal(size=(len(labels), features))) @ mixing + 5, labels))
    return made


def sums_of(cases, *, groups, classes=CLASSES):
    labels = np.concatenate([known for _, known in cases])
    weights = balanced_weights(torch.from_numpy(np.bincount(labels, minlength=classes)))
    sums = RidgeSums(cases[0][0].shape[1], weights, groups=groups)
    for number, (x, y) in enumerate(cases):
        for label in np.unique(y):
            chosen = torch.from_numpy(np.c_[x[y == label], np.ones((y == label).sum())])
            sums.add(chosen.mT @ chosen, chosen.sum(0), label=int(label), group=number % groups)
    return sums


def by_scikit_learn(cases, weights, ridge):
    """Weights (D, K) and bias (K,) on standardised features, brought back to the features; total mass 1."""
    x, labels = (np.concatenate(parts) for parts in zip(*cases, strict=True))
    sample_weight = weights[labels]
    mean = np.average(x, axis=0, weights=sample_weight)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=sample_weight))
    model = Ridge(alpha=ridge * sample_weight.sum(), solver="cholesky")
    model.fit((x - mean) / scale, np.eye(CLASSES)[labels], sample_weight=sample_weight)
    weight = model.coef_.T / scale[:, None]
    return weight, model.intercept_ - mean @ weight


def test_the_solution_is_scikit_learns_on_standardised_features_with_class_weights():
    cases = toy()
    for ridge in LAMBDAS:
        sums = sums_of(cases, groups=1)
        readout = sums.solve([ridge])
        weight, bias = by_scikit_learn(cases, sums.class_weights.numpy(), ridge)
        np.testing.assert_allclose(readout.weight.numpy(), weight, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(readout.bias.numpy(), bias, rtol=1e-8, atol=1e-10)
        assert readout.ridge == ridge


def test_lambda_has_the_smallest_error_on_the_cases_left_out():
    lambdas, chosen = (1e-6, 1e-2, 1.0, 100.0), set()
    for seed, features in ((1, 5), (2, 40)):
        cases = [(x[:25], y[:25]) for x, y in toy(cases=4, features=features, seed=seed)]
        cases[0][1][:3] = (0, 1, 2)
        sums = sums_of(cases, groups=4)
        weights, errors = sums.class_weights.numpy(), []
        for ridge in lambdas:
            errors.append(0.0)
            for left_out, (x, labels) in enumerate(cases):
                others = [case for number, case in enumerate(cases) if number != left_out]
                weight, bias = by_scikit_learn(others, weights, ridge)
                residual = x @ weight + bias - np.eye(CLASSES)[labels]
                errors[-1] += (weights[labels] * (residual**2).sum(1)).sum()
        assert sums.solve(lambdas).ridge == lambdas[int(np.argmin(errors))]
        chosen.add(sums.solve(lambdas).ridge)
    assert len(chosen) > 1 or chosen == {1.0}


def test_classes_without_voxels_are_never_predicted_and_constant_features_have_no_weight():
    cases = [(np.c_[x, np.full(len(x), 7.0)], np.minimum(y, 1)) for x, y in toy()]
    sums = sums_of(cases, groups=2, classes=4)
    readout = sums.solve()
    assert readout.weight[-1].abs().max() == 0
    assert readout.bias[2:].tolist() == [-np.inf, -np.inf]
    assert sums.class_weights[2:].tolist() == [0, 0] and readout.weight.isfinite().all()


def test_every_class_has_the_same_mass():
    counts = torch.tensor([1000, 0, 10, 5])
    np.testing.assert_allclose(balanced_weights(counts) * counts, [1 / 3, 0, 1 / 3, 1 / 3])


def test_one_case_takes_the_default_lambda():
    from nnssl_plugin.features.ridge import DEFAULT_LAMBDA

    assert sums_of(toy(cases=1), groups=1).solve().ridge == pytest.approx(DEFAULT_LAMBDA)
