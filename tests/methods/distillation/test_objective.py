"""Distillation: equal networks cost nothing, the teacher never changes, tokens are compared at one place."""

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
from small_mae import KINDS, SIZES, make_batch, small_backbone, views_of
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.methods.distillation.normalisation import unchanged
from nnssl_plugin.methods.distillation.objective import Distillation, _mean, _standard, nearest_stage
from nnssl_plugin.methods.distillation.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

LABELS = {"labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}


def wider(kind, channels=1, seed=1):
    """A frozen U-Net of other weights and widths."""
    torch.manual_seed(seed)
    plan = fake_plan(dimensions=len(SIZES[kind]), residual=True)
    configuration = next(iter(plan["configurations"]))
    plan["configurations"][configuration]["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 10, 20]
    names = {"channel_names": {str(c): "MR" for c in range(channels)}}
    return frozen(build_network(plan, configuration, LABELS | names), channels)


def frozen(network, channels=1):
    teacher = Backbone(network, channels)
    teacher.train_only(())
    return teacher.double().eval()


def make(kind="unet", channels=1, teacher=None, **settings):
    teacher = teacher or wider(kind, channels)
    settings = Settings(**{"stride": 4} | settings)
    return Distillation(
        small_backbone(kind, channels), settings, teacher=teacher, rules=[unchanged] * channels
    ).double()


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_costs_nothing_with_the_identity_as_projection(kind):
    task = make(kind, teacher=frozen(small_backbone(kind).network))
    with torch.no_grad():
        task.projection.weight.copy_(torch.eye(len(task.projection.weight)))
        task.projection.bias.zero_()
    _, terms = task.encode(assert_views_have_a_row_per_sample(task, make_batch(SIZES[kind])))
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(terms, {"cosine": zero, "values": zero}, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_student_learns_and_the_teacher_stays_as_it_was_bit_for_bit(kind, channels, samples):
    task = make(kind, channels, values_weight=0.5)
    before = state(task.teacher)
    task.train()
    views = views_of(task, make_batch(SIZES[kind], samples, channels))
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append(task(views, 0.0)["total"])
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not task.teacher.training and not any(module.training for module in task.teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_the_teacher_is_no_part_of_the_tasks_state():
    task = make()
    own = {f"backbone.{name}" for name in task.backbone.state_dict()} | {"projection.weight", "projection.bias"}
    assert set(task.state_dict()) == own
    assert not {id(p) for p in task.teacher.parameters()} & {id(p) for p in task.parameters()}


def test_batch_statistics_of_the_teacher_are_not_touched():
    teacher = wider("unet")
    norm = torch.nn.BatchNorm3d(10).double()
    teacher.network.encoder.stages[1] = torch.nn.Sequential(teacher.network.encoder.stages[1], norm).eval()
    teacher.requires_grad_(False)
    task = make(teacher=teacher).train()
    one, two = (make_batch(SIZES["unet"], 1, seed=seed) for seed in (0, 1))
    both = {k: [*one[k], *two[k]] if isinstance(one[k], list) else torch.cat((one[k], two[k])) for k in one}
    before = state(norm)
    together, alone = (task.tokens(views_of(task, batch))[1][0] for batch in (both, one))
    torch.testing.assert_close(together, alone)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_tokens_of_both_are_read_at_the_places_of_the_teachers():
    """A student whose map holds the centres of its tokens is read at those of the teacher, where they lie inside."""
    task = make("primus", teacher=wider("primus"))
    assert task.backbone.strides[task.stage] == (4, 4, 4)
    for student, teacher in ((task.backbone, task.teacher), (task.teacher, task.backbone)):
        own = student.stage_grid(-1, (4, 4, 4))
        theirs = teacher.stage_grid(-1, (4, 4, 4))
        centres = own.centres().double().mT.reshape(1, 3, 4, 4, 4)
        read = own.read(centres, [axis[None] for axis in theirs.axes()]).flatten(2)[0].mT
        inside = theirs.centres().double().clamp(own.centres().amin(0), own.centres().amax(0))
        torch.testing.assert_close(read, inside, check_dtype=False)


def naive_losses(predicted, target, counted):
    cosines, values = [], []
    for p, t, c in zip(predicted, target, counted, strict=True):
        chosen = [n for n in range(len(c)) if c[n]]
        cosines.append(sum(1 - p[n] @ t[n] / (p[n].norm() * t[n].norm()) for n in chosen) / len(chosen))
        pair = []
        for tokens in (p, t):
            rows = torch.stack([tokens[n] for n in chosen])
            pair.append((rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-6).sqrt())
        values.append((pair[0] - pair[1]).square().mean())
    return torch.stack(cosines), torch.stack(values)


def test_the_losses_equal_a_naive_loop(monkeypatch):
    task = make()

    def draw(generator):
        counted = torch.rand(3, 10, generator=generator) < 0.6
        counted[:, :2] = True
        return [*(torch.randn(3, 10, 5, generator=generator, dtype=torch.float64) for _ in range(2)), counted]

    def vectorised(*tokens):
        monkeypatch.setattr(task, "tokens", lambda views: tokens)
        return torch.cat(list(task.encode({})[1].values()))

    assert_equals_naive_loop(vectorised, lambda *tokens: torch.cat(naive_losses(*tokens)), draw)


def test_tokens_of_padding_do_not_count():
    task, batch = make(), make_batch(SIZES["unet"])
    batch["origin"][0, 0], batch["case_shape"][0, 0] = -8, 4  # planes 8 to 11 of 16; tokens at 0, 4, 8, 12
    _, _, counted = task.tokens(views_of(task, batch))
    planes = counted.reshape(2, 4, 5, 3).any(3).any(2)
    centres = task.teacher.stage_grid(task.teacher_stage, (4, 5, 3)).axes()[0]
    expected = [bool(centre - 2 < 11.5 and centre + 2 > 7.5) for centre in centres.tolist()]
    assert planes.tolist() == [expected, [True] * 4]


def test_a_window_without_a_voxel_of_the_case_costs_nothing():
    task, batch = make(values_weight=1.0), make_batch(SIZES["unet"])
    batch["origin"][0, 0] = 100
    terms = task(views_of(task, batch), 0.0)
    terms["total"].backward()
    assert all(value[0] == 0 and value[1] > 0 for value in task.encode(views_of(task, batch))[1].values())
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_windows(kind, value):
    assert_constant_input_is_harmless(make(kind, values_weight=1.0), make_batch(SIZES[kind]), value=value)


def test_a_teacher_of_one_channel_sees_the_first_that_the_case_has():
    task = Distillation(small_backbone("unet", 3), Settings(stride=4), teacher=wider("unet"), rules=[unchanged] * 3)
    batch = make_batch(SIZES["unet"], 3, 3)
    batch["available"] = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    seen = views_of(task.double(), batch)["seen"]
    assert seen.shape[1] == 1
    for sample in range(3):
        assert torch.equal(seen[sample, 0], batch["image"][sample, sample])


@pytest.mark.parametrize(
    "stride, stage", [([1, 1, 1], 0), ([4, 4, 4], 2), ([8, 8, 8], 2), ([2, 3, 2], 1), ([1, 2, 2], 1)]
)
def test_the_nearest_stage(stride, stage):
    assert nearest_stage(small_backbone("unet"), stride) == stage


def test_the_control_is_the_cosine_of_the_teachers_mean_token():
    task = make()
    views = views_of(task, make_batch(SIZES["unet"], 2))
    numbers = task.diagnostics(views)
    target = task.tokens(views)[1]
    mean = target.flatten(0, 1).mean(0)
    expected = (1 - F.cosine_similarity(mean.expand_as(target), target, dim=2)).mean()
    torch.testing.assert_close(numbers["constant_cosine"], expected)
    assert numbers["features"].shape == (2, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_where_the_student_agrees(kind):
    task = make(kind)
    pictures = dict(task.pictures(views_of(task, make_batch(SIZES[kind])))["agreement"])
    assert pictures["volume"].shape == SIZES[kind]
    values = pictures["cosine"].values
    assert values.shape == SIZES[kind] and values.abs().max() <= 1 and values.std() > 0


def test_means_and_standardised_values_of_counted_tokens():
    tokens = torch.randn(2, 6, 3, dtype=torch.float64)
    counted = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    kept = _standard(tokens, counted)[0, :4]
    torch.testing.assert_close(kept.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(kept.square().mean(0), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(_mean(tokens, counted)[0], tokens[0, :4].mean(0))
    assert math.isfinite(_mean(tokens, torch.zeros_like(counted)).sum())


def test_nothing_waits_for_the_device():
    task, batch = make(), make_batch(SIZES["unet"])
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: reading one raises
        fake = {k: v if k == "cases" else torch.empty(v.shape, dtype=v.dtype) for k, v in batch.items()}
        task(views_of(task, fake), 0.5)
