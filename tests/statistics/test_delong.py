"""DeLong's test from midranks: the double loop of its definition, its invariances, and several cases per subject."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from nnssl_plugin.statistics.delong import auroc_difference, delong_covariance


def drawn(seed=0, n=60, tied=True):
    rng = np.random.default_rng(seed)
    positives = rng.random(n) < 0.4
    scores = rng.normal(size=(2, n)) + positives * [[0.6], [1.0]] + rng.normal(size=n)
    return (np.round(scores * 2) / 2 if tied else scores), positives


def naive(scores, positives):
    """Areas and covariance by the definition: every pair of a positive and a negative (DeLong et al., eq. 4 to 8)."""
    pairs = []
    for score in scores:
        up, down = score[positives][:, None], score[~positives][None]
        pairs.append((up > down) + 0.5 * (up == down))
    areas = np.array([p.mean() for p in pairs])
    by_positive, by_negative = np.array([p.mean(axis=1) for p in pairs]), np.array([p.mean(axis=0) for p in pairs])
    return areas, np.cov(by_positive) / positives.sum() + np.cov(by_negative) / (~positives).sum()


def naive_clustered(scores, positives, subjects):
    """Obuchowski's sums over subjects, written out."""
    pairs = [(s[positives][:, None] > s[~positives]) + 0.5 * (s[positives][:, None] == s[~positives]) for s in scores]
    areas = [p.mean() for p in pairs]
    m, n = positives.sum(), (~positives).sum()
    names = sorted(set(subjects))
    i10 = len({s for s, p in zip(subjects, positives, strict=True) if p})
    i01 = len({s for s, p in zip(subjects, positives, strict=True) if not p})
    covariance = np.zeros((len(scores), len(scores)))
    for a in range(len(scores)):
        for b in range(len(scores)):
            s10 = s01 = s11 = s11_turned = 0.0
            for name in names:
                mine_up = [k for k, who in enumerate(subjects[positives]) if who == name]
                mine_down = [k for k, who in enumerate(subjects[~positives]) if who == name]
                up = [sum(pairs[r].mean(axis=1)[k] - areas[r] for k in mine_up) for r in (a, b)]
                down = [sum(pairs[r].mean(axis=0)[k] - areas[r] for k in mine_down) for r in (a, b)]
                s10, s01 = s10 + up[0] * up[1], s01 + down[0] * down[1]
                s11, s11_turned = s11 + up[0] * down[1], s11_turned + up[1] * down[0]
            share = len(names) / (len(names) - 1)
            covariance[a, b] = (
                s10 * i10 / (i10 - 1) / m**2 + s01 * i01 / (i01 - 1) / n**2 + (s11 + s11_turned) * share / (m * n)
            )
    return covariance


def names(n):
    return np.array([f"s{i}" for i in range(n)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_areas_and_covariance_equal_the_double_loop(seed, tied):
    scores, positives = drawn(seed, tied=tied)
    areas, covariance = delong_covariance(scores, positives, subjects=names(60))
    expected = naive(scores, positives)
    np.testing.assert_allclose(areas, expected[0])
    np.testing.assert_allclose(covariance, expected[1], atol=1e-15)
    np.testing.assert_allclose(areas, [roc_auc_score(positives, score) for score in scores])


@pytest.mark.parametrize("seed", range(3))
def test_cases_of_one_subject_are_summed(seed):
    scores, positives = drawn(seed)
    subjects = names(60)[np.random.default_rng(seed).integers(25, size=60)]
    _, covariance = delong_covariance(scores, positives, subjects=subjects)
    np.testing.assert_allclose(covariance, naive_clustered(scores, positives, subjects), atol=1e-15)


def test_copies_of_cases_make_the_interval_no_narrower():
    scores, positives = drawn(n=40)
    once = auroc_difference(*scores, positives, subjects=names(40))
    index = np.repeat(np.arange(40), 5)
    copied = auroc_difference(*scores[:, index], positives[index], subjects=names(40)[index])
    assert (copied.low, copied.high, copied.p) == pytest.approx((once.low, once.high, once.p))
    careless = auroc_difference(*scores[:, index], positives[index], subjects=names(200))
    assert careless.high - careless.low < 0.5 * (once.high - once.low)


def test_the_test_is_the_difference_over_its_standard_error():
    scores, positives = drawn(tied=False)
    areas, covariance = naive(scores, positives)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = auroc_difference(*scores, positives, subjects=names(60))
    assert found.difference == pytest.approx(areas[0] - areas[1])
    assert found.p == pytest.approx(2 * (1 - norm.cdf(abs(areas[0] - areas[1]) / error)))
    assert (found.low, found.high) == pytest.approx(tuple(found.difference + s * 1.959964 * error for s in (-1, 1)))


def test_what_must_not_matter_does_not():
    scores, positives = drawn(tied=False)
    expected = auroc_difference(*scores, positives, subjects=names(60))
    order = np.random.default_rng(1).permutation(60)
    for found in (
        auroc_difference(np.exp(scores[0]), scores[1] ** 3, positives, subjects=names(60)),  # any rising function
        auroc_difference(-scores[0], -scores[1], ~positives, subjects=names(60)),  # the other class
        auroc_difference(*scores[:, order], positives[order], subjects=names(60)),  # the order of the cases
    ):
        assert vars(found) == pytest.approx(vars(expected))
    turned = auroc_difference(scores[1], scores[0], positives, subjects=names(60))
    assert turned.difference == pytest.approx(-expected.difference) and turned.p == pytest.approx(expected.p)


def test_the_same_scores_do_not_differ():
    scores, positives = drawn()
    found = auroc_difference(scores[0], scores[0], positives, subjects=names(60))
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_missing_class_or_a_single_subject_is_not_defined():
    scores, positives = drawn()
    assert np.isnan(list(vars(auroc_difference(*scores, np.zeros(60, bool), subjects=names(60))).values())).all()
    alone = positives & (np.cumsum(positives) == 1)
    found = auroc_difference(*scores, alone, subjects=names(60))
    assert not np.isnan(found.difference) and np.isnan([found.low, found.high, found.p]).all()


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(5)
    found = []
    for _ in range(300):
        positives = np.arange(80) < 40
        scores = rng.normal(size=(2, 80)) + positives
        found.append(auroc_difference(*scores, positives, subjects=names(80)).p)
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09
