"""The coding rate against the determinant, its closed forms, and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl_plugin.objectives.coding_rate import coding_rate, official_weight


def units(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def naive(features, eps):
    m, d = features.shape
    covariance = sum(torch.outer(row, row) for row in features) / m
    return 0.5 * torch.linalg.slogdet(torch.eye(d, dtype=features.dtype) + d / eps * covariance).logabsdet


@pytest.mark.parametrize("eps", [0.05, 0.25, 0.5])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 8), (8, 8), (40, 8), (3, 1)])
def test_it_is_half_the_logarithm_of_the_determinant(rows, width, eps):
    features = units(rows, width)
    torch.testing.assert_close(coding_rate(features, eps), naive(features, eps))


def test_closed_forms():
    d = 256
    same = units(1, d).expand(32, d)
    assert coding_rate(same, 0.25).item() == pytest.approx(0.5 * math.log(1 + d / 0.25), rel=1e-9)
    assert coding_rate(same, 0.25).item() == pytest.approx(3.46622, abs=1e-5)
    assert coding_rate(same - same.mean(0), 0.25).item() == pytest.approx(0, abs=1e-9)
    orthonormal = torch.eye(32, d, dtype=torch.float64)
    assert coding_rate(orthonormal, 0.25).item() == pytest.approx(55.94412, abs=1e-5)
    assert coding_rate(orthonormal, 0.5).item() == pytest.approx(45.33141, abs=1e-5)
    assert coding_rate(torch.eye(d, dtype=torch.float64), 0.25).item() == pytest.approx(128 * math.log(5), rel=1e-9)


def test_neither_a_rotation_nor_the_order_of_the_rows_changes_it():
    features = units(6, 10)
    rotation = torch.linalg.qr(units(10, 10, seed=1))[0]
    torch.testing.assert_close(coding_rate(features @ rotation), coding_rate(features))
    torch.testing.assert_close(coding_rate(features[torch.randperm(6)]), coding_rate(features))


@pytest.mark.parametrize(("rows", "width"), [(3, 5), (5, 3)])
def test_its_gradient(rows, width):
    assert torch.autograd.gradcheck(coding_rate, units(rows, width).requires_grad_())


def test_it_is_computed_in_float32_where_the_network_is_not():
    features = units(4, 64).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rate = coding_rate(features)
    assert rate.dtype == torch.float32
    torch.testing.assert_close(rate, coding_rate(features.double()).float())


def test_not_a_number_stays_one():
    features = units(4, 8)
    features[1, 2] = torch.nan
    assert coding_rate(features).isnan()


def test_the_official_weight():
    assert official_weight(256, 32) == pytest.approx(0.03515625)
    assert official_weight(256, 16, ranks=2) == official_weight(256, 32)
