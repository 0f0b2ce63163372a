"""Collapse measures against closed forms and naive loops."""

import math

import numpy as np
import pytest
import torch

from nnssl_plugin.diagnostics.collapse import effective_rank, feature_std


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_isotropic_features_have_spread_one_and_collapsed_ones_none():
    assert feature_std(normal(4000, 64)).item() == pytest.approx(1, abs=0.01)
    assert feature_std(normal(1, 64).expand(50, 64)).item() == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.zeros(8, 16)).item() == 0


def test_spread_equals_a_naive_loop():
    features = normal(7, 5)
    rows = [row / np.linalg.norm(row) for row in features.numpy()]
    naive = math.sqrt(5) * np.mean([np.std([row[j] for row in rows], ddof=1) for j in range(5)])
    assert feature_std(features).item() == pytest.approx(naive, rel=1e-5)


def test_spread_ignores_the_length_of_the_features():
    features, lengths = normal(30, 8), normal(30, 1).abs() + 0.1
    assert feature_std(features * lengths).item() == pytest.approx(feature_std(features).item(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_singular_values(rank):
    left, _ = torch.linalg.qr(normal(20, rank))
    right, _ = torch.linalg.qr(normal(12, rank))
    assert effective_rank(5 * left @ right.T).item() == pytest.approx(rank, rel=1e-2)


def test_effective_rank_equals_numpy():
    features = normal(9, 6)
    singular = np.linalg.svd(features.numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(features).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_collapsed_features_have_effective_rank_one():
    assert effective_rank(normal(1, 64).expand(50, 64)).item() == pytest.approx(1, abs=1e-2)
    assert effective_rank(torch.zeros(8, 16)).item() == pytest.approx(1)


def test_a_single_sample_has_no_spread_and_rank_one():
    assert feature_std(normal(1, 8)).isnan()
    assert effective_rank(normal(1, 8)).item() == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_give_nan(bad):
    features = normal(6, 4)
    features[2, 1] = bad
    assert feature_std(features).isnan()
    assert effective_rank(features).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_are_float32_scalars(dtype):
    features = normal(6, 4).to(dtype).requires_grad_()
    for value in (feature_std(features), effective_rank(features)):
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
