"""Schedules: closed forms, end points, and the ratios of the groups."""

import math

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.training.schedules import (
    CosineSchedule,
    HalvingSchedule,
    PolySchedule,
    Schedules,
    WeightDecaySchedule,
)


def optimizer(*groups):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **group} for group in groups or ({},)], lr=1.0)


def rates(schedule, steps):
    result = []
    for step in steps:
        schedule.step(step)
        result.append(schedule.get_last_lr()[0])
    return result


def test_cosine_without_warm_up_starts_at_lr_halves_in_the_middle_and_ends_at_0():
    schedule = CosineSchedule(optimizer(), lr=0.4, total=100)
    assert rates(schedule, [0, 50, 100]) == pytest.approx([0.4, 0.2, 0.0], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3, 10, 2.5])
def test_cosine_against_a_naive_loop(warmup):
    expected = [
        0.1 * (k + 1) / (warmup + 1)
        if k < warmup
        else 0.1 * 0.5 * (1 + math.cos(math.pi * (k - warmup) / (40 - warmup)))
        for k in range(41)
    ]
    assert rates(CosineSchedule(optimizer(), lr=0.1, total=40, warmup=warmup), range(41)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [CosineSchedule, PolySchedule])
def test_the_rate_rises_to_lr_at_the_end_of_the_warm_up_and_falls_after_it(kind):
    curve = rates(kind(optimizer(), lr=1.0, total=50, warmup=10), range(51))
    assert curve[0] > 0 and curve[10] == 1.0 and curve[50] == 0.0
    assert curve[:11] == sorted(curve[:11]) and curve[10:] == sorted(curve[10:], reverse=True)


def test_poly_without_warm_up_is_nnunets():
    ours, theirs = optimizer(), optimizer()
    schedule, reference = PolySchedule(ours, lr=1e-2, total=1000), PolyLRScheduler(theirs, 1e-2, 1000)
    for epoch in (0, 1, 500, 999):
        schedule.step(epoch)
        reference.step(epoch)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("kind", [CosineSchedule, PolySchedule])
def test_the_ratio_of_the_groups_is_kept(kind):
    groups = optimizer({}, {"lr_scale": 0.25}, {"lr_scale": 3.0})
    schedule = kind(groups, lr=0.1, total=20, warmup=5)
    for step in range(20):
        schedule.step(step)
        first, second, third = schedule.get_last_lr()
        assert (second / first, third / first) == pytest.approx((0.25, 3.0))


def test_a_frozen_group_starts_at_its_step_at_the_scheduled_rate():
    schedule = PolySchedule(optimizer({}, {"lr_scale": 0.5, "frozen_until": 3}), lr=0.1, total=10)
    for step in range(10):
        schedule.step(step)
        rate, frozen = schedule.get_last_lr()
        assert frozen == (0.0 if step < 3 else pytest.approx(rate / 2))


def test_the_rate_depends_on_the_step_alone():
    schedule = CosineSchedule(optimizer(), lr=0.1, total=30, warmup=4)
    forward = rates(schedule, range(30))
    assert rates(schedule, reversed(range(30))) == forward[::-1]
    assert schedule.get_last_lr() == [CosineSchedule(optimizer(), lr=0.1, total=30, warmup=4).get_last_lr()[0]]


def test_steps_after_the_end_stay_at_0():
    assert rates(PolySchedule(optimizer(), lr=0.1, total=3), [3, 4, 100]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("warmup", [5, 6, -1])
def test_a_warm_up_that_does_not_fit_is_refused(warmup):
    with pytest.raises(UserError, match="warm-up"):
        CosineSchedule(optimizer(), lr=0.1, total=5, warmup=warmup)


@pytest.mark.parametrize("warmup", [0, 5, 2.5])
@pytest.mark.parametrize("total", [10, 13, 100])
def test_halving_against_a_naive_loop(total, warmup):
    expected = []
    for k in range(total):
        rate = 0.4
        for fifth in (1, 2, 3, 4):
            if 5 * (k - warmup) >= fifth * (total - warmup):
                rate /= 2
        expected.append(0.4 * (k + 1) / (warmup + 1) if k < warmup else rate)
    curve = rates(HalvingSchedule(optimizer(), lr=0.4, total=total, warmup=warmup), range(total))
    assert curve == pytest.approx(expected)
    assert curve[-1] == pytest.approx(0.4 / 16)


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.1, 0.0)])
def test_the_weight_decay_moves_along_half_a_cosine_and_spares_what_has_its_own(start, end):
    ours = optimizer({"weight_decay": 0.5}, {"weight_decay": 0.0})
    schedule = WeightDecaySchedule(ours, start=start, end=end, total=20, spared={1})
    for step in (0, 3, 10, 20, 25):
        schedule.step(step)
        expected = end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step, 20) / 20))
        assert ours.param_groups[0]["weight_decay"] == pytest.approx(expected)
        assert ours.param_groups[1]["weight_decay"] == 0.0


def test_schedules_move_rate_and_weight_decay_together():
    ours = optimizer()
    decay = WeightDecaySchedule(ours, start=0.0, end=1.0, total=10)
    both = Schedules(CosineSchedule(ours, lr=1.0, total=10), decay)
    both.step(5)
    assert both.get_last_lr() == pytest.approx([0.5]) and ours.param_groups[0]["weight_decay"] == pytest.approx(0.5)
