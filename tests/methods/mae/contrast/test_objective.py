"""MAE with aligned contrast: points that agree exactly, what they are compared with, and what learns from it."""

import math
from contextlib import nullcontext

import pytest
import torch
from method_checks import assert_constant_input_is_harmless, assert_views_have_a_row_per_sample
from small_mae import KINDS, SIZES, make_batch, small_backbone, views_of
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.mae.contrast.objective import MAEContrast, contrast_stage, negatives
from nnssl_plugin.methods.mae.contrast.settings import Settings
from nnssl_plugin.methods.mae.contrast.views import lattice
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks


def make(kind="unet", channels=1, **settings):
    settings = {"cells": 3, "dim": 8} | settings
    return MAEContrast(small_backbone(kind, channels), Settings(**settings), patch_size=SIZES[kind]).double()


def batch_for(kind, samples=2, channels=1, seed=0):
    """Windows with room for two crops, the first of which begins before its case."""
    window = [math.ceil(1.6 * length) for length in SIZES[kind]]
    batch = make_batch(window, samples, channels, seed)
    batch["origin"] += 3
    batch["case_shape"] += 10
    batch["origin"][0, 0] = -2
    return batch


def same_crops(views):
    """The views with the first crop in both places."""
    return views | {f"second_{k.removeprefix('first_')}": v for k, v in views.items() if k.startswith("first_")}


@pytest.mark.parametrize("kind", KINDS)
def test_both_crops_read_the_same_places_of_the_case(kind):
    task = make(kind)
    batch = batch_for(kind, 5)
    views = assert_views_have_a_row_per_sample(task, batch)
    centres = task.grid.centres().double().mT.reshape(1, -1, *task.grid.counts)
    places = [
        task.grid.read(centres.expand(5, -1, *centres.shape[2:]), views[f"{crop}_points"].unbind(1)).flatten(2).mT
        for crop in ("first", "second")
    ]
    spacing = torch.tensor(task.grid.spacing)
    where = views["points"].double() * spacing - batch["origin"][:, None]  # in the window
    for crop, place in zip(("first", "second"), places, strict=True):
        torch.testing.assert_close(lattice(views[f"{crop}_points"]).double(), place, rtol=0, atol=1e-5)
        shift = where - place
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-5)
        start = shift[:, 0].round().long()
        for sample in range(5):
            box = tuple(slice(first, first + n) for first, n in zip(start[sample].tolist(), SIZES[kind], strict=True))
            assert torch.equal(views[f"{crop}_image"][sample], batch["image"][(sample, slice(None), *box)])
    assert not torch.equal(views["first_image"], views["second_image"])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_either_crop_does_not_count(kind):
    task, batch = make(kind, loss_on="all"), batch_for(kind)
    batch["origin"][:, 0], batch["case_shape"][:, 0] = -10, 5  # voxels 10 to 14 of the window
    views = views_of(task, batch)
    area = math.prod(SIZES[kind][1:])
    for crop in ("first", "second"):
        assert views[f"{crop}_inside"].flatten(1).sum(1).tolist() == [5 * area] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_equal_crops_have_positives_of_cosine_1(kind):
    task = make(kind)
    outputs, _ = task.encode(same_crops(views_of(task, batch_for(kind))))
    first, second = outputs["first"], outputs["second"]
    assert first.shape == (2, 4 ** len(SIZES[kind]), 8)
    torch.testing.assert_close((first * second).sum(2), torch.ones(first.shape[:2], dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_contrast_rises_when_cases_are_shuffled(kind):
    task = make(kind, ratio=0.3)
    outputs, _ = task.encode(same_crops(views_of(task, batch_for(kind, 4))))
    shuffled = outputs | {"second": outputs["second"].roll(1, 0)}
    assert task.loss(shuffled, 0.5)["contrast"] > task.loss(outputs, 0.5)["contrast"]


def naive_negatives(outputs):
    points = [
        (case, point) for case, of_case in zip(outputs["case"], outputs["points"], strict=True) for point in of_case
    ]
    return torch.tensor([[bool(c != other or ((p - q).abs() > 1).any()) for other, q in points] for c, p in points])


def test_negatives_are_other_cases_and_points_more_than_a_token_apart():
    generator = torch.Generator().manual_seed(0)
    outputs = {"points": 3 * torch.rand(3, 8, 3, generator=generator), "case": torch.tensor([7, 4, 7])}
    found = negatives(outputs)
    assert torch.equal(found, naive_negatives(outputs)) and torch.equal(found, found.mT)
    assert found[:8, 8:16].all() and not found.diagonal().any()
    assert not found[:8, 16:].all() and found[:8, 16:].any()  # a case that comes twice is one case


def test_points_of_one_case_in_two_samples_are_compared_by_their_place_in_the_case():
    task, batch = make(), batch_for("unet")
    batch = {
        name: value if isinstance(value, list) else value[:1].repeat_interleave(2, 0) for name, value in batch.items()
    }
    batch["cases"] = ["twice", "twice"]
    views = views_of(task, batch)
    assert views["case"][0] == views["case"][1]
    far = views | {"points": views["points"] + torch.tensor([0.0, 100.0])[:, None, None]}
    assert not negatives(views)[:64, 64:].all() and negatives(far)[:64, 64:].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("samples", [1, 2])
def test_everything_learns_and_masked_voxels_are_never_read(kind, channels, samples):
    task = make(kind, channels, contrast_from=0.0)
    views = views_of(task, batch_for(kind, samples, channels))
    terms = task(views, 0.5)
    terms["total"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)
    assert torch.equal(terms["total"], terms["reconstruction"] + 0.1 * terms["contrast"])
    blanked = {f"{c}_image": views[f"{c}_image"].masked_fill(views[f"{c}_masked"], 50.0) for c in ("first", "second")}
    torch.testing.assert_close(task.encode(views | blanked)[0]["second"], task.encode(views)[0]["second"])


def test_the_reconstruction_is_the_mean_of_both_crops():
    task = make()
    views = views_of(task, batch_for("unet"))
    for crop in ("first", "second"):
        assert views[f"{crop}_masked"].float().mean() == 0.75
    each = [task.encode(same_crops(views))[1]["reconstruction"]]
    swapped = {f"first_{k.removeprefix('second_')}": v for k, v in views.items() if k.startswith("second_")}
    each.append(task.encode(same_crops(views | swapped))[1]["reconstruction"])
    torch.testing.assert_close(task.encode(views)[1]["reconstruction"], sum(each) / 2)
    assert not torch.equal(*each)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_gradient_of_the_whole_batch(kind):
    gradients = []
    for chunk in (3, 2):
        task = make(kind, 2)
        views = views_of(task, batch_for(kind, 3, 2))
        backward_in_chunks(task, views, 0.5, chunk_size=chunk, seed=0, precision=nullcontext, scale=lambda total: total)
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_windows(kind, value):
    assert_constant_input_is_harmless(make(kind), batch_for(kind), value=value)


def test_a_batch_of_one_case_without_distant_points_costs_nothing():
    task = make()
    outputs, _ = task.encode(views_of(task, batch_for("unet", 1)))
    outputs["points"] = 0 * outputs["points"]
    assert task.loss(outputs, 0.5)["contrast"] == 0


@pytest.mark.parametrize(
    "progress, weight, temperature",
    [(0.0, 0.0, 0.2), (0.09, 0.0, 0.2), (0.1, 0.1, 0.2), (0.15, 0.1, 0.15), (0.6, 0.1, 0.1)],
)
def test_the_contrast_sets_in_after_a_tenth_of_the_run_and_its_temperature_falls(progress, weight, temperature):
    task = make()
    assert task.weights(progress) == {"contrast": weight}
    assert task.temperature(progress) == pytest.approx(temperature)


def test_a_temperature_that_settles_before_the_contrast_is_refused():
    with pytest.raises(UserError, match=r"settles at 0\.1 .* sets in at 0\.3"):
        Settings(contrast_from=0.3, settled_from=0.1)
    assert Settings(contrast_from=0.3, settled_from=0.3)


def test_points_are_read_from_the_coarsest_stage_with_enough_tokens():
    unet = small_backbone("unet")
    assert [unet.strides[contrast_stage(unet, size, 4)][0] for size in ((16, 16, 16), (15, 16, 16), (6, 64, 64))] == [
        4,
        2,
        2,
    ]
    assert contrast_stage(small_backbone("primus"), (16, 16, 16), 9) == 0


def test_diagnostics_count_the_points_that_are_found(monkeypatch):
    task = make()
    views = same_crops(views_of(task, batch_for("unet")))
    numbers = task.diagnostics(views)
    others = naive_negatives(views)
    torch.testing.assert_close(numbers["point_retrieval_chance"], (1 / (1 + others.sum(1))).mean())
    assert numbers["positive_cosine"] == pytest.approx(1) and numbers["point_retrieval"] == 1
    assert numbers["features"].shape == (2, 8) and numbers["masked_error"] > 0
    encoded = task.encode(views)
    turned = encoded[0] | {"second": encoded[0]["second"].roll(1, 0)}
    monkeypatch.setattr(task, "encode", lambda views: (turned, encoded[1]))
    assert task.diagnostics(views)["point_retrieval"] < 0.1


def test_pictures_are_those_of_mae():
    task = make("2d")
    pictures = task.pictures(views_of(task, batch_for("2d")))
    assert [title for title, _ in pictures["reconstruction"]] == ["volume", "masked", "masked blocks reconstructed"]


def test_nothing_waits_for_the_device():
    task, batch = make(), batch_for("unet")
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: reading one raises
        views = views_of(
            task, {k: v if k == "cases" else torch.empty(v.shape, dtype=v.dtype) for k, v in batch.items()}
        )
        task(views, 0.5)
