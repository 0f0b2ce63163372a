"""The graph matching benchmark: what it calls best is best, pygmtools gets the same problem, and its table is whole."""

import sys
from pathlib import Path

import pygmtools
import pytest
import torch
from graph_instances import brute_force

from nnssl_plugin.objectives.graph_matching import matching_affinity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
benchmark = __import__("graph_matching")


@pytest.mark.parametrize("largest", [8, 0])
def test_the_best_is_that_of_all_permutations(largest, monkeypatch):
    monkeypatch.setattr(benchmark, "LARGEST_BRUTE_FORCE", largest)
    arguments, _ = benchmark.instances(5, 5, apart=1.0, noise=0.3)
    torch.testing.assert_close(benchmark.best_affinity(arguments), brute_force(**arguments)[1])


def test_pygmtools_gets_the_same_problem():
    arguments, truth = benchmark.instances(4, 6, apart=0.3, noise=0.05)
    matrix = benchmark.pygmtools_matrix(arguments)
    assert torch.equal(matrix, matrix.mT) and matrix.min() >= 0
    scores = []
    for p in (truth, truth.roll(1, 1)):
        hard = torch.nn.functional.one_hot(p, 6).float()
        score = pygmtools.utils.compute_affinity_score(hard, matrix, backend="pytorch")
        scores.append(score - matching_affinity(p, **arguments))
    torch.testing.assert_close(*scores)  # one constant for every matching
    assert torch.equal(benchmark.pygmtools_matching(matrix, solver="rrwm"), truth)


def test_every_solver_has_a_row_and_the_table_a_cell():
    rows = benchmark.measure(6, 5, apart=0.3, noise=0.05, others=3, rounds=1)
    assert [row["solver"] for row in rows] == ["ours", "ours, no edges", "sm", "ipfp", "rrwm"]
    assert all(row["gap"] >= 0 and 0 <= row["optimal"] <= 1 and row["milliseconds"] > 0 for row in rows)
    assert rows[0]["gap"] < 1e-6 and rows[0]["correct"] == 1
    lines = benchmark.table(rows).splitlines()
    assert len(lines) == 3
    assert {line.count("|") for line in lines} == {9}
