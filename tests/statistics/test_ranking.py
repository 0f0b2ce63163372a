"""Rank metrics against a naive loop, scikit-learn, galleries worked out by hand, and simulated guessing."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from nnssl_plugin.statistics.ranking import (
    expected_by_chance,
    first_right_ranks,
    query_metrics,
    summarise_queries,
)


def naive(scores, right, among):
    """One query, candidate by candidate."""
    order = sorted((c for c in range(len(scores)) if among[c]), key=lambda c: (-scores[c], right[c]))
    ranks = [place for place, c in enumerate(order, 1) if right[c]]
    if not ranks:
        return dict.fromkeys(
            ("recall@1", "recall@5", "recall@10", "average_precision", "ndcg", "rank", "mean_rank_top10_paper"), np.nan
        )
    top = [rank for rank in ranks if rank <= 10]
    best = sum(1 / np.log2(1 + place) for place in range(1, len(ranks) + 1))
    return {
        **{f"recall@{k}": float(ranks[0] <= k) for k in (1, 5, 10)},
        "average_precision": np.mean([number / rank for number, rank in enumerate(ranks, 1)]),
        "ndcg": sum(1 / np.log2(1 + rank) for rank in ranks) / best,
        "rank": ranks[0],
        "mean_rank_top10_paper": np.mean(top) if top else 11,
        "median_rank_top10_paper": np.median(top) if top else 11,
    }


@pytest.mark.parametrize("candidates", [1, 7, 40])
def test_every_metric_is_that_of_a_loop_over_candidates(candidates):
    rng = np.random.default_rng(candidates)
    scores = rng.integers(0, 6, (30, candidates)).astype(float)  # many ties
    right, among = rng.random(scores.shape) < 0.2, rng.random(scores.shape) < 0.8
    found = query_metrics(scores, right, among)
    for query in range(len(scores)):
        for name, value in naive(scores[query], right[query] & among[query], among[query]).items():
            np.testing.assert_allclose(found[name][query], value, err_msg=name)


def test_without_ties_it_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, right = rng.random((20, 30)), rng.random((20, 30)) < 0.3
    found = query_metrics(scores, right)
    for query in range(20):
        np.testing.assert_allclose(
            found["average_precision"][query], average_precision_score(right[query], scores[query])
        )
        np.testing.assert_allclose(found["ndcg"][query], ndcg_score(right[[query]].astype(int), scores[[query]]))


def test_a_gallery_worked_out_by_hand():
    right = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    found = query_metrics(np.array([[4.0, 3, 2, 1]] * 3), right)
    np.testing.assert_allclose(found["rank"], [2, 1, np.nan])
    np.testing.assert_allclose(found["average_precision"], [(1 / 2 + 2 / 4) / 2, 1, np.nan])
    np.testing.assert_allclose(found["recall@1"], [0, 1, np.nan])
    np.testing.assert_allclose(found["mean_rank_top10_paper"], [3, 2.5, np.nan])


def test_perfect_retrieval_has_five_and_a_half_in_the_papers_tables_and_none_has_eleven():
    right = np.zeros((2, 100), dtype=bool)
    right[0, :20] = right[1, 50:] = True
    found = query_metrics(np.arange(100, 0, -1.0)[None].repeat(2, 0), right)
    np.testing.assert_allclose(found["mean_rank_top10_paper"], [5.5, 11])
    np.testing.assert_allclose(found["median_rank_top10_paper"], [5.5, 11])
    np.testing.assert_allclose(found["rank"], [1, 51])


def test_random_embeddings_of_five_classes_give_what_the_specification_expects():
    rng = np.random.default_rng(1)
    classes = np.arange(400) % 5
    vectors = rng.normal(size=(400, 64))
    found = query_metrics(vectors @ vectors.T, classes[:, None] == classes, ~np.eye(400, dtype=bool))
    np.testing.assert_allclose(found["recall@10"].mean(), 0.90, atol=0.03)
    np.testing.assert_allclose(found["mean_rank_top10_paper"].mean(), 6.14, atol=0.2)
    np.testing.assert_allclose(found["rank"].mean(), 4.9, atol=0.4)


def test_constant_and_nan_scores_come_out_last():
    right = np.array([[True, False, False]])
    for scores in (np.zeros((1, 3)), np.full((1, 3), np.nan)):
        assert query_metrics(scores, right)["rank"] == 3 == first_right_ranks(scores, right)
    half = query_metrics(np.array([[np.nan, 1.0, 0.5]]), np.array([[True, False, True]]))
    assert half["rank"] == 2 and half["average_precision"] == (1 / 2 + 2 / 3) / 2


def test_chance_is_the_mean_over_random_orders():
    rng = np.random.default_rng(0)
    right = np.zeros((4000, 12), dtype=bool)
    right[:2000, :3] = right[2000:, :1] = True
    found = query_metrics(rng.random(right.shape), right)
    chance = expected_by_chance(np.full(4000, 12), right.sum(1))
    for name in ("recall@1", "recall@5", "average_precision"):
        np.testing.assert_allclose(chance[name], found[name].mean(), atol=0.025)
    assert chance["recall@10"] <= 1 and expected_by_chance(np.array([5]), np.array([0]))["recall@1"] is None


def test_summaries_draw_subjects_and_leave_undefined_queries_out():
    values = {"rank": np.array([1.0, 3, 5, np.nan, 9]), "recall@1": np.array([1.0, 0, 0, np.nan, 0])}
    summary = summarise_queries(values, ["a", "a", "b", "b", "c"])
    assert summary["mean_rank"]["value"] == 4.5 and summary["median_rank"]["value"] == 4
    for low, high in (summary["mean_rank"]["interval"], summary["median_rank"]["interval"]):
        assert 2 <= low <= 4.5 <= high <= 9  # a alone has the mean 2, c alone 9
    assert summary["recall@1"]["value"] == 0.25
    assert summarise_queries({"rank": np.array([2.0, 4])}, ["a", "a"])["median_rank"]["interval"] == [None, None]
    assert summarise_queries({"rank": np.array([np.nan])}, ["a"])["mean_rank"]["value"] is None
