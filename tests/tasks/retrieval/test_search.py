"""Search against a naive loop over rows, exact and approximate; statistics, filters, subjects."""

import numpy as np
import pytest
from small_index import make_index

import nnssl_plugin as nnssl
from nnssl_plugin.data.vector_store import writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.tasks.retrieval import approximate, index
from nnssl_plugin.tasks.retrieval.approximate import load_approximate
from nnssl_plugin.tasks.retrieval.standardisation import Standardisation, statistics_of


def naive(vectors, queries, k, standardise):
    moved = vectors.astype(np.float64)
    queries = queries.astype(np.float64)
    if standardise:
        mean, deviation = moved.mean(0), moved.std(0)
        moved, queries = (moved - mean) / deviation, (queries - mean) / deviation
    found = []
    for query in queries:
        cosines = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in moved]
        found.append(sorted((1 - cosine, number) for number, cosine in enumerate(cosines))[:k])
    return found


@pytest.mark.parametrize("parts", [("mean", "maximum"), ("summary", "mean")])
@pytest.mark.parametrize("most", [2**22, 40])
def test_exact_search_is_that_of_a_loop(tmp_path, monkeypatch, parts, most):
    monkeypatch.setattr(index, "MOST_SCORES", most)  # blocks of a few rows
    rng = np.random.default_rng(0)
    vectors = rng.normal(3, 5, (150, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    queries = rng.normal(3, 5, (4, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    found = make_index(tmp_path / "i", vectors, parts).search(queries, 7)
    expected = naive(vectors, queries, 7, parts == ("mean", "maximum"))
    np.testing.assert_array_equal(found.rows, [[row for _, row in each] for each in expected])
    np.testing.assert_allclose(found.distances, [[d for d, _ in each] for each in expected], atol=1e-5)


def test_equal_rows_come_in_their_order_and_missing_ones_are_told(tmp_path):
    made = make_index(tmp_path / "i", np.ones((5, 3), dtype=np.float32), ("mean",))
    found = made.search(np.ones(3), 8)
    np.testing.assert_array_equal(found.rows, [[0, 1, 2, 3, 4, -1, -1, -1]])
    assert np.isinf(found.distances[0, 5:]).all() and np.allclose(found.distances[0, :5], 0, atol=1e-6)


def test_an_empty_index_finds_nothing(tmp_path):
    make_index(tmp_path / "i", np.eye(3, dtype=np.float32))
    with writing(tmp_path / "i") as store:
        store.remove(np.zeros(3, dtype=bool))
    made = nnssl.load_index(tmp_path / "i")
    assert (made.search(np.eye(3), 2).rows == -1).all()
    with pytest.raises(UserError, match="empty"):
        load_approximate(made)


def test_a_constant_number_says_nothing_and_standardisation_ends_there(tmp_path):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(40, 4)).astype(np.float32)
    vectors[:, 2] = 1e6
    made = make_index(tmp_path / "i", vectors)
    assert made.standardise.scale[2] == 0 and np.isfinite(made.search(vectors[:3], 3).distances).all()
    np.testing.assert_array_equal(made.search(vectors, 1).rows[:, 0], np.arange(40))
    assert (Standardisation(np.zeros((2, 4)), 4)(vectors) == 0).all()  # one image: no deviation at all


def test_statistics_are_numpys_over_blocks():
    vectors = np.random.default_rng(0).normal(100, 3, (9000, 5)).astype(np.float32)
    np.testing.assert_allclose(
        statistics_of(vectors), (vectors.mean(0, dtype=float), vectors.std(0, dtype=float)), rtol=1e-6
    )


def test_filters_and_subjects(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 6)).astype(np.float32)
    modality = ["CT" if n % 3 else "MR" for n in range(30)]
    made = make_index(tmp_path / "i", vectors, modality=modality)
    among = made.chosen(["modality=CT", "case!=case_0001"])
    found = made.search(vectors[4:5], 30, among=among, subjects=["subject_2"])
    rows = found.rows[0][found.rows[0] >= 0]
    assert set(rows) == {n for n in range(30) if n % 3 and n not in (1, 4, 5)}
    assert made.search(vectors[4:5], 1).rows[0, 0] == 4
    assert made.search(vectors[4:5], 1, subjects=[None]).rows[0, 0] == 4
    assert made.search(vectors[4:5], 1, subjects=["somebody"]).rows[0, 0] == 4
    for wrong in ("modality", "age=3"):
        with pytest.raises(UserError):
            made.chosen([wrong])


def test_queries_that_do_not_fit_are_refused(tmp_path):
    made = make_index(tmp_path / "i", np.eye(3, dtype=np.float32))
    for vectors, k in ((np.ones((1, 4)), 1), (np.full((1, 3), np.nan), 1), (np.ones((1, 3)), 0)):
        with pytest.raises(UserError):
            made.search(vectors, k)
    with writing(tmp_path / "unfinished", {"dimensions": 3, "encoder": {"parts": ["mean"]}}):
        pass
    with pytest.raises(UserError, match="interrupted"):
        nnssl.load_index(tmp_path / "unfinished")


@pytest.mark.parametrize("most_in_a_graph", [100_000, 100])
def test_approximate_neighbours_find_the_true_ones_grow_and_are_built_anew(tmp_path, monkeypatch, most_in_a_graph):
    monkeypatch.setattr(approximate, "MOST_IN_A_GRAPH", most_in_a_graph)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    vectors = (centres[rng.integers(0, 20, 1000)] + 0.3 * rng.normal(size=(1000, 16))).astype(np.float32)
    made = make_index(tmp_path / "i", vectors, modality=["CT" if n % 2 else "MR" for n in range(1000)])
    near, built = load_approximate(made)
    assert (
        built and near.facts["kind"] == ("hnsw" if most_in_a_graph > 1000 else "ivf") and near.facts["recall"] >= 0.99
    )
    subjects = [f"subject_{n // 2}" for n in range(50)]
    exact = made.search(vectors[:50], 10, subjects=subjects)
    close = near.search(vectors[:50], 10, subjects=subjects)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.rows, close.rows, strict=True)]
    assert np.mean(shared) >= 9.7 and not (close.rows // 2 == np.arange(50)[:, None] // 2).any()
    chosen = near.search(vectors[:5], 5, among=made.chosen(["modality=CT"]))
    assert (chosen.rows % 2 == 1).all()
    few = np.arange(1000) < 30
    np.testing.assert_array_equal(
        near.search(vectors[:5], 5, among=few).rows, made.search(vectors[:5], 5, among=few).rows
    )
    assert not load_approximate(made)[1]
    with writing(tmp_path / "i") as store:
        store.append(vectors[:1] + 0.01, [{"case": "new", "subject": "new"}])
    grown, built = load_approximate(nnssl.load_index(tmp_path / "i"))
    assert built and 1000 in grown.search(vectors[:1], 3).rows
    with writing(tmp_path / "i") as store:
        store.remove(np.arange(1001) != 0)
    shrunk, built = load_approximate(nnssl.load_index(tmp_path / "i"))
    assert built and shrunk.faiss_index.ntotal == 1000


def test_without_faiss_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    made = make_index(tmp_path / "i", np.eye(3, dtype=np.float32))
    with pytest.raises(UserError, match=r"nnssl_plugin\[retrieval\]"):
        load_approximate(made)
    assert made.search(np.eye(3), 1).rows.tolist() == [[0], [1], [2]]
