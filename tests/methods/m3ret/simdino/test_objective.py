"""SimDINO: alignment and coding rate against loops, the teacher, networks with a summary token and without."""

import math

import pytest
import torch
import torch.nn.functional as F
from fake_dataset import fake_plan
from method_checks import (
    assert_constant_input_is_harmless,
    assert_equals_naive_loop,
    assert_views_have_a_row_per_sample,
)
from small_patch_vit import small_patch_vit

from nnssl_plugin.methods.m3ret.simdino.objective import SimDINO, alignment, summary
from nnssl_plugin.methods.m3ret.simdino.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.objectives.coding_rate import coding_rate, official_weight

SMALL = {"hidden": 16, "width": 8}
SIZE = (4, 8, 8)
DONE, SKIPPED = torch.tensor(True), torch.tensor(False)


def planned(dimensions=3, residual=False):
    labels = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
    plan = fake_plan(dimensions=dimensions, residual=residual)
    (configuration,) = (name for name in plan["configurations"] if name.startswith(f"{dimensions}d"))
    return Backbone(build_network(plan, configuration, labels), 1)


def make_task(backbone=None, channels=None, **settings):
    torch.manual_seed(0)
    return SimDINO(backbone or small_patch_vit(), Settings(**SMALL | settings), channels=channels)


def make_batch(samples=3, channels=1, size=SIZE, kind="CT"):
    image = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(1))
    return {"image": image, "available": torch.ones(samples, channels, dtype=torch.bool), "kind": kind}


def views_of(task, batch=None):
    return task.views(batch or make_batch(), torch.Generator().manual_seed(0))


def units(*shape, generator):
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def naive_alignment(student, teacher):
    terms = []
    for sample in range(len(student)):
        for t in range(teacher.shape[1]):
            for v in range(student.shape[1]):
                if v != t:
                    terms.append(0.5 * (student[sample, v] - teacher[sample, t]).square().sum())
    assert len(terms) == len(student) * (2 * student.shape[1] - 2)
    return sum(terms) / len(terms)


def test_alignment_is_the_mean_over_pairs_of_different_views():
    def draw(generator):
        return [units(3, 5, 4, generator=generator), units(3, 2, 4, generator=generator)]

    def on_the_sphere(function):
        return lambda *vectors: function(*(F.normalize(vector, dim=-1) for vector in vectors))

    assert_equals_naive_loop(on_the_sphere(alignment), on_the_sphere(naive_alignment), draw)


@pytest.mark.parametrize(("settings", "weight"), [({}, official_weight(8, 4)), ({"gamma": 1.0}, 1.0)])
@pytest.mark.parametrize("rate_of", ["mean", "student"])
def test_the_loss_of_a_batch(settings, weight, rate_of):
    generator = torch.Generator().manual_seed(0)
    student, teacher = units(4, 3, 8, generator=generator), units(4, 2, 8, generator=generator)
    task = make_task(rate_of=rate_of, **settings)
    terms = task.loss({"student": student, "teacher": teacher}, 0.5)
    spread = student[:, :2] if rate_of == "student" else (student[:, :2] + teacher) / 2
    rates = [coding_rate(spread[:, view], 0.5) for view in range(2)]
    torch.testing.assert_close(terms["expansion"], -weight * (rates[0] + rates[1]) / 2)
    torch.testing.assert_close(terms["alignment"], naive_alignment(student, teacher))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (small_patch_vit, SIZE),
        (lambda: small_patch_vit(summary_token=False), SIZE),
        (lambda: small_patch_vit(patch_size=(4, 4)), (8, 8)),
        (planned, (16, 16, 16)),
        (lambda: planned(residual=True), (16, 16, 16)),
        (lambda: planned(2), (16, 16)),
    ],
    ids=["summary", "no summary", "flat transformer", "U-Net", "ResEnc", "flat U-Net"],
)
@pytest.mark.parametrize("samples", [1, 2])
def test_every_network_is_compared_by_what_it_has(make, size, samples):
    task, batch = make_task(make()), make_batch(samples, size=size)
    views = assert_views_have_a_row_per_sample(task, batch)
    outputs, _ = task.encode(views)
    assert outputs["student"].shape == (samples, 4, 8) and outputs["teacher"].shape == (samples, 2, 8)
    torch.testing.assert_close(outputs["student"].norm(dim=-1), torch.ones(samples, 4))
    assert task(views, 0.5)["total"].isfinite()
    assert_constant_input_is_harmless(task, batch)


@pytest.mark.parametrize(
    ("channels", "size", "kind"), [(1, (8, 8), "ultrasound"), (3, (6, 8, 8), "video"), (2, SIZE, "MR")]
)
def test_every_kind_is_an_input_of_one_network(channels, size, kind):
    task = make_task(small_patch_vit(3), channels=3, frames=4)
    views = views_of(task, make_batch(channels=channels, size=size, kind=kind))
    assert views["global"].shape[2] == 3
    outputs, _ = task.encode(views)
    assert outputs["student"].shape == (3, 4, 8)


def test_a_feature_does_not_depend_on_the_others_of_its_batch():
    task = make_task()
    views = views_of(task)
    alone = {name: view[1:2] for name, view in views.items()}
    for name, together in task.eval().encode(views)[0].items():
        torch.testing.assert_close(task.encode(alone)[0][name], together[1:2])


def test_what_stands_for_an_image():
    image = torch.randn(2, 1, *SIZE)
    with_token, without = small_patch_vit(), small_patch_vit(summary_token=False)
    torch.testing.assert_close(summary(with_token, image), with_token.network.encoder(image)[0])
    map_ = without.features(image)[-1].flatten(2)
    torch.testing.assert_close(summary(without, image), torch.cat((map_.mean(2), map_.amax(2)), 1))


def test_the_teacher_follows_more_and_more_slowly_and_has_no_gradient():
    task = make_task()
    task(views_of(task), 0.5)["total"].backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    start = {name: p.clone() for name, p in task.teacher["head"].module.named_parameters()}
    moved = {}
    for progress in (0.0, 0.5, 1.0):
        task.teacher["head"].module.load_state_dict(start)
        with torch.no_grad():
            for p in task.head.parameters():
                p.copy_(torch.ones_like(p))
        task.after_step(progress, DONE)
        name, after = next(iter(task.teacher["head"].module.named_parameters()))
        moved[progress] = ((after - start[name]) / (1 - start[name])).mean().item()
    assert moved == pytest.approx({0.0: 1 - 0.996, 0.5: (1 - 0.996) / 2, 1.0: 0.0}, abs=1e-6)
    task.after_step(0.0, SKIPPED)
    assert torch.equal(next(iter(task.teacher["head"].module.parameters())), start[name])


def test_drop_path_is_the_students_alone():
    task = make_task(small_patch_vit(drop_path_rate=0.5)).train()
    views = views_of(task)
    first, second = (task.encode(views)[0] for _ in range(2))
    assert torch.equal(first["teacher"], second["teacher"])
    assert not torch.allclose(first["student"], second["student"])


def test_two_halves_of_a_batch_gathered_are_the_batch():
    task = make_task()
    views = views_of(task, make_batch(4))
    whole, own = task.encode(views)
    halves = [task.encode({k: v[part] for k, v in views.items()})[0] for part in (slice(0, 2), slice(2, 4))]
    task.gather = lambda outputs: {k: torch.cat([half[k] for half in halves]) for k in outputs}
    gathered = task.terms(halves[0], own, 0.5)
    task.gather = lambda outputs: outputs
    torch.testing.assert_close(gathered, task.terms(whole, own, 0.5))


def test_numbers_and_pictures():
    task = make_task()
    views = views_of(task)
    numbers = task.diagnostics(views)
    assert numbers["features"].shape == (3, 8) and numbers["coding_rate"] > 0
    assert -1 <= numbers["other_images"] <= 1 and -1 <= numbers["same_image"] <= 1
    alone = task.diagnostics({name: view[:1] for name, view in views.items()})
    torch.testing.assert_close(alone["coding_rate"], torch.tensor(1.0), atol=1e-4, rtol=0)
    assert alone["other_images"].isnan() and math.isfinite(alone["same_image"])
    assert {name: len(pictures) for name, pictures in task.pictures(views).items()} == {
        "global_views": 2,
        "local_views": 2,
    }
