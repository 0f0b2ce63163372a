"""Intensities of the plan as the teacher knows them: rules per channel, against nnU-Net's own normalisation."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import fake_plan
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization

from nnssl_plugin.checkpoints.sources.source import Source
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.distillation.normalisation import (
    OtherWindow,
    for_teacher,
    rules_for,
    standardised,
    unchanged,
)

WINDOWS = [
    {"mean": 50.0, "std": 40.0, "percentile_00_5": -300.0, "percentile_99_5": 200.0},
    {"mean": -20.0, "std": 90.0, "percentile_00_5": -150.0, "percentile_99_5": 180.0},
]


def plan_of(*schemes, masks=False, windows=()):
    plan = deepcopy(fake_plan())
    plan["configurations"]["3d_fullres"] |= {
        "normalization_schemes": [f"{scheme}Normalization" for scheme in schemes],
        "use_mask_for_norm": [masks] * len(schemes),
    }
    plan["foreground_intensity_properties_per_channel"] = {str(n): window for n, window in enumerate(windows)}
    return plan


def source_of(plan=None, channels=1, **provenance):
    configuration = None if plan is None else "3d_fullres"
    path = Path("teacher.pth")
    return Source(
        {}, None, provenance, None, "nnssl", path, input_channels=channels, plans=plan, configuration=configuration
    )


def rules(source, plan, normalisation="file"):
    channels = len(plan["configurations"]["3d_fullres"]["normalization_schemes"])
    return rules_for(source, normalisation, plan, "3d_fullres", channels)


def test_a_z_score_of_cases_that_are_z_scored_changes_nothing():
    assert rules(source_of(normalisation=["ZScoreNormalization"]), plan_of("ZScore", "ZScore")) == [unchanged] * 2
    assert rules(source_of(), plan_of("ZScore"), "zscore") == [unchanged]
    assert rules(source_of(), plan_of("ZScore", "CT"), "zscore") == [unchanged, standardised]


def test_a_z_score_within_a_mask_is_another_one():
    assert rules(source_of(normalisation=["ZScoreNormalization"]), plan_of("ZScore", masks=True)) == [standardised]
    assert rules(source_of(plan_of("ZScore", masks=True)), plan_of("ZScore", masks=True)) == [unchanged]


def test_the_plans_own_values_where_asked_for():
    assert rules(source_of(normalisation=["CTNormalization"]), plan_of("ZScore"), "plan") == [unchanged]


def test_ct_of_another_window_equals_nnunets_normalisation_by_that_window():
    before, now = WINDOWS
    (rule,) = rules(source_of(plan_of("CT", windows=[now])), plan_of("CT", windows=[before]))
    assert rule == OtherWindow(before, now)
    hu = np.random.default_rng(0).normal(0, 120, (5, 6, 7)).astype(np.float32)
    planned, expected = (CTNormalization(False, window).run(hu.copy()) for window in WINDOWS)
    got = rule(torch.from_numpy(planned)[None, None], torch.ones(1, 1, 5, 6, 7, dtype=torch.bool))
    torch.testing.assert_close(got[0, 0], torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_a_teacher_of_one_channel_knows_every_channel_by_its_own():
    teacher = source_of(plan_of("CT", windows=WINDOWS[1:]), channels=1)
    assert rules(teacher, plan_of("CT", "CT", windows=[WINDOWS[0]] * 2)) == [OtherWindow(*WINDOWS)] * 2


def test_ct_of_unknown_windows_is_taken_as_it_is():
    assert rules(source_of(normalisation=["CTNormalization"]), plan_of("CT", windows=WINDOWS[:1])) == [unchanged]


def test_what_cannot_be_had_is_refused_with_what_helps():
    with pytest.raises(UserError, match=r"knows channel 0 by CTNormalization, .*by ZScoreNormalization") as refused:
        rules(source_of(normalisation=["CTNormalization"]), plan_of("ZScore"))
    assert "method.normalisation=plan" in refused.value.remedy
    with pytest.raises(UserError, match="does not say how its images were normalised"):
        rules(source_of(), plan_of("ZScore"))


def test_standardised_equals_nnunets_z_score_of_the_voxels_in_the_case():
    generator = torch.Generator().manual_seed(0)
    channel = 4 * torch.randn(3, 1, 5, 6, 7, generator=generator) + 2
    inside = torch.ones_like(channel, dtype=torch.bool)
    inside[0, :, :2], inside[2] = False, False
    channel[1] = 3.5
    got = for_teacher(channel, inside, [standardised])
    expected = ZScoreNormalization(False, {}).run(channel[0, 0, 2:].numpy().copy())
    torch.testing.assert_close(got[0, 0, 2:], torch.from_numpy(expected))
    assert (got[0, 0, :2] == 0).all() and (got[1:] == 0).all()


def test_every_channel_has_its_rule():
    image, inside = torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4, dtype=torch.bool)
    got = for_teacher(image, inside, [unchanged, lambda channel, inside: 2 * channel])
    assert got[:, 0].eq(1).all() and got[:, 1].eq(2).all()
