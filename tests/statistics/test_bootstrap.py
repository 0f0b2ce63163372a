"""The paired bootstrap against a naive loop, and against what an interval promises."""

import itertools

import numpy as np
import pytest

from nnssl_plugin.statistics import bootstrap as comparison
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap, paired_bootstrap, paired_permutation_p


def test_the_interval_is_that_of_a_naive_loop():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=23), rng.normal(size=23)
    drawn, means = np.random.default_rng(5), []
    for _ in range(2000):
        picked = drawn.integers(23, size=23)
        means.append(sum(a[i] - b[i] for i in picked) / 23)
    interval = paired_bootstrap(a, b, samples=2000, confidence=0.9, seed=5)
    assert interval.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))
    assert interval.pairs == 23


def test_the_interval_covers_a_known_shift_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        difficulty = rng.normal(0, 1, 40)  # shared by both runs: pairing takes it out
        a, b = difficulty + 0.1 + rng.normal(0, 0.1, 40), difficulty + rng.normal(0, 0.1, 40)
        interval = paired_bootstrap(a, b, samples=400, seed=trial)
        assert interval.high - interval.low < 0.15
        hits += interval.low <= 0.1 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_pairs_with_a_nan_on_either_side_are_left_out():
    a, b = [0.5, np.nan, 0.7, 0.9], [0.4, 0.1, np.nan, 0.6]
    assert paired_bootstrap(a, b) == paired_bootstrap([0.5, 0.9], [0.4, 0.6])


def test_one_pair_has_a_mean_and_no_interval_and_none_has_neither():
    one = paired_bootstrap([0.75], [0.5])
    assert (one.mean, one.pairs) == (0.25, 1)
    assert np.isnan([one.low, one.high]).all()
    none = paired_bootstrap([np.nan], [0.5])
    assert none.pairs == 0
    assert np.isnan([none.mean, none.low, none.high]).all()


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    a, b = np.random.default_rng(1).normal(size=(2, 11))
    whole = paired_bootstrap(a, b, samples=500)
    monkeypatch.setattr(comparison, "CHUNK", 100)
    assert paired_bootstrap(a, b, samples=500) == whole


def test_equal_runs_differ_by_nothing():
    interval = paired_bootstrap([0.1, 0.9, 0.5], [0.1, 0.9, 0.5])
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ([1.0, 2.0], [1.0], {}),
        ([[1.0]], [[1.0]], {}),
        ([1.0], [1.0], {"confidence": 95}),
        ([1.0], [1.0], {"samples": 0}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(a, b, options):
    with pytest.raises(ValueError):
        paired_bootstrap(a, b, **options)


def test_subjects_are_drawn_with_all_of_their_cases():
    rng = np.random.default_rng(3)
    a, b, subjects = rng.normal(size=17), rng.normal(size=17), rng.integers(6, size=17)
    names, drawn, means = np.unique(subjects), np.random.default_rng(5), []
    for _ in range(1000):
        picked = names[drawn.integers(len(names), size=len(names))]
        means.append(np.mean(np.concatenate([(a - b)[subjects == name] for name in picked])))
    interval = paired_bootstrap(a, b, subjects=[f"p{s}" for s in subjects], samples=1000, seed=5)
    assert interval.mean == pytest.approx(np.mean(a - b)) and interval.pairs == 17
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_repeating_every_case_of_a_subject_does_not_narrow_the_interval():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=20), rng.normal(size=20)
    once = paired_bootstrap(a, b)
    repeated = [np.repeat(x, 4) for x in (a, b)]
    by_subject = paired_bootstrap(*repeated, subjects=np.repeat(np.arange(20), 4))
    assert (by_subject.low, by_subject.high) == pytest.approx((once.low, once.high))
    by_case = paired_bootstrap(*repeated)
    assert by_case.high - by_case.low < 0.7 * (once.high - once.low)


def test_one_subject_has_no_interval():
    one = paired_bootstrap([0.5, 0.9], [0.4, 0.6], subjects=["p", "p"])
    assert one.mean == pytest.approx(0.2) and np.isnan([one.low, one.high]).all()


def test_few_subjects_are_permuted_in_every_way():
    rng = np.random.default_rng(1)
    differences, subjects = rng.normal(0.4, 1, 16), np.repeat(np.arange(8), 2)
    sums = differences.reshape(8, 2).sum(1)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    expected = np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12)
    assert paired_permutation_p(differences, subjects) == pytest.approx(expected)
    assert paired_permutation_p(np.zeros(4), np.arange(4)) == paired_permutation_p([1.0, 2.0], [0, 0]) == 1.0


def test_the_hierarchical_interval_is_that_of_a_naive_loop_over_seeds_and_subjects():
    rng = np.random.default_rng(7)
    differences = rng.normal(size=(4, 3, 9)) + rng.normal(size=(4, 1, 1)) + rng.normal(size=9)
    differences[1, 2, 4] = np.nan
    subjects = np.array(list("aabbccdde"))
    members = [np.flatnonzero(subjects == name) for name in "abcde"]
    means = []
    for _ in range(6000):
        pretrainings, draws, drawn = (rng.integers(n, size=n) for n in (4, 3, 5))
        cases = np.concatenate([members[i] for i in drawn])
        means.append(np.nanmean(differences[np.ix_(pretrainings, draws, cases)]))
    interval = hierarchical_bootstrap(differences, subjects=subjects, samples=6000)
    assert interval.mean == pytest.approx(np.nanmean(differences))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.06)
    assert interval.pairs == 4 * 3 * 9 - 1


def test_the_hierarchical_interval_covers_a_known_shift_where_one_over_cases_does_not():
    rng = np.random.default_rng(1)
    hits, naive = 0, 0
    for trial in range(300):
        differences = 0.1 + rng.normal(0, 0.1, (10, 1)) + rng.normal(0, 0.1, (10, 30))
        wide = hierarchical_bootstrap(differences, samples=400, seed=trial)
        narrow = paired_bootstrap(differences.mean(axis=0), np.zeros(30), samples=400, seed=trial)
        hits += wide.low <= 0.1 <= wide.high
        naive += narrow.low <= 0.1 <= narrow.high
    assert 0.88 <= hits / 300 <= 0.98
    assert naive / 300 < 0.7


def test_the_order_of_seeds_and_chunks_change_nothing_but_one_seed_gives_no_interval(monkeypatch):
    differences = np.random.default_rng(2).normal(size=(5, 8))
    whole = hierarchical_bootstrap(differences, samples=3000)
    turned = hierarchical_bootstrap(differences[::-1], samples=3000)
    assert (turned.low, turned.high) == pytest.approx((whole.low, whole.high), abs=0.1)
    monkeypatch.setattr(comparison, "CHUNK", 100 * differences.size)
    assert hierarchical_bootstrap(differences, samples=3000).low == pytest.approx(whole.low, abs=0.1)
    one = hierarchical_bootstrap(differences[:1])
    assert one.mean == pytest.approx(differences[0].mean())
    assert np.isnan([one.low, one.high]).all()
    assert hierarchical_bootstrap(np.full((3, 4), np.nan)).pairs == 0


def test_differences_without_repeats_or_with_other_subjects_are_refused():
    for values, subjects in ((np.zeros(4), None), (np.zeros((2, 4)), ["a", "b"])):
        with pytest.raises(ValueError, match="subjects"):
            hierarchical_bootstrap(values, subjects=subjects)
    with pytest.raises(ValueError, match="confidence"):
        hierarchical_bootstrap(np.zeros((2, 4)), confidence=1.0)
