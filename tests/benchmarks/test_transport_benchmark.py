"""The transport benchmark: what it calls accuracy holds, and its table is whole."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
transport = __import__("transport")

SOLVER = {"mass": 0.9, "epsilon": 0.05, "iterations": 100}


@pytest.fixture(scope="module")
def rows():
    return transport.measure([1, 4, 9], dim=16, rounds=2, **SOLVER)


@pytest.mark.slow
def test_both_sides_find_the_same_plan(rows):
    for row in rows:
        assert row["plan_difference"] < 1e-10
        assert row["objective_difference"] < 1e-10
        assert row["mass_error"] < 1e-12


@pytest.mark.slow
def test_the_exact_cost_is_a_lower_bound(rows):
    # up to what the marginals are overrun by when the iterations end
    assert all(row["cost_over_exact"] >= 1 - 1e-6 - max(0, row["marginal_excess"]) for row in rows)


def test_the_objective_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    plan, cost = rng.random((3, 4)), rng.random((3, 4))
    expected = sum(plan[i, j] * cost[i, j] + 0.05 * plan[i, j] * np.log(plan[i, j]) for i in range(3) for j in range(4))
    assert transport.entropic_objective(plan, cost, 0.05) == pytest.approx(expected)
    assert transport.entropic_objective(np.zeros((2, 2)), np.ones((2, 2)), 0.05) == 0


@pytest.mark.slow
def test_the_table_has_every_column_of_every_size(rows):
    lines = transport.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert {line.count("|") for line in lines} == {len(transport.COLUMNS) + 1}
    assert set(rows[0]) == set(transport.COLUMNS)
    assert all(row[name] > 0 for row in rows for name in row if name.startswith("ms_"))


@pytest.mark.slow
def test_the_loss_takes_fewer_operators_than_autograd_through_the_iterations(rows):
    assert all(0 < 5 * row["operators"] < row["operators_unrolled"] for row in rows)


def test_both_losses_are_the_same():
    embeddings = transport.problem(4, 16, noise=100.0)
    ours, unrolled = (loss(*embeddings, **SOLVER) for loss in (transport.mpot_loss, transport.unrolled_loss))
    assert ours.item() == pytest.approx(unrolled.item(), abs=1e-8)
