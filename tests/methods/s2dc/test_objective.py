"""The task: samples apart in encode, gradients, teacher and queue, tiling, missing parts, every kind of network."""

import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nnssl_plugin.diagnostics.collapse import feature_std
from nnssl_plugin.methods.s2dc.correspondence import patch_to_patch_loss
from nnssl_plugin.methods.s2dc.heads import RunningNorm
from nnssl_plugin.methods.s2dc.objective import S2DC
from nnssl_plugin.methods.s2dc.settings import Settings
from nnssl_plugin.methods.s2dc.views import cut, join
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.contrastive import log_dual_softmax
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks
from nnssl_plugin.training.pictures import draw_pictures

SMALL = {"hidden": 16, "dim": 8, "queue": 12, "token_stride": 4}


def network(channels=1, *, dims=3, residual=False):
    kind, blocks = (ResidualEncoderUNet, "n_blocks_per_stage") if residual else (PlainConvUNet, "n_conv_per_stage")
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dims]
    return kind(
        input_channels=channels, n_stages=4, features_per_stage=[4, 6, 8, 10], conv_op=conv, kernel_sizes=3,
        strides=[1, 2, 2, 2], num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, **{blocks: 1},
    )  # fmt: skip


def make_task(channels=1, *, dims=3, residual=False, spacing=None, **settings):
    torch.manual_seed(0)
    backbone = Backbone(network(channels, dims=dims, residual=residual), channels)
    return S2DC(backbone, Settings(**(SMALL | settings)), spacing=spacing or (1.0,) * dims)


def make_batch(samples=2, channels=1, size=(16, 16, 16)):
    image = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(1))
    return {"image": image, "available": torch.ones(samples, channels, dtype=torch.bool)}


def make_views(task, batch, seed=2):
    return task.views(batch, torch.Generator().manual_seed(seed))


def one_step(task, views, progress=0.0, applied=True):
    terms = task(views, progress)
    terms["total"].backward()
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    task.after_step(progress, torch.tensor(applied))
    return terms


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels, dims, size", [(1, 3, (16, 16, 16)), (4, 3, (8, 24, 16)), (2, 2, (32, 24))])
def test_terms_are_finite_and_reach_the_whole_encoder_and_both_heads(residual, channels, dims, size):
    task = make_task(channels, dims=dims, residual=residual)
    task.queue.enqueue(torch.randn(12, 8), torch.tensor(True))  # an empty one has nothing to tell from
    terms = task(make_views(task, make_batch(2, channels, size)), 0.0)
    assert set(terms) == {"global", "p2p", "p2s", "total"}
    torch.testing.assert_close(terms["total"], terms["global"] + terms["p2p"] + terms["p2s"])
    terms["total"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == name.startswith(("backbone.network.encoder", "heads"))
        assert not parameter.requires_grad or (parameter.grad is not None and torch.isfinite(parameter.grad).all())
    reached = [p.grad.abs().sum() > 0 for n, p in task.backbone.network.encoder.named_parameters() if "weight" in n]
    assert all(reached)


def test_samples_do_not_meet_in_encode():
    task = make_task(2)
    views = make_views(task, make_batch(3, 2))
    outputs, own = task.encode(views)
    for sample in range(3):
        alone, losses = task.encode({name: value[sample : sample + 1] for name, value in views.items()})
        for together, single in ((outputs, alone), (own, losses)):
            for name, value in single.items():
                torch.testing.assert_close(together[name][sample : sample + 1], value, rtol=1e-4, atol=1e-5)


def test_encode_leaves_the_state_alone():
    task = make_task().train()
    before = copied(task.state_dict())
    task.encode(make_views(task, make_batch()))
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 1)])
def test_a_virtual_batch_has_the_same_gradients(grid):
    task = make_task(grid=grid)
    views = make_views(task, make_batch(3, size=tuple(16 * number for number in grid)))
    whole = task(views, 0.0)
    whole["total"].backward()
    expected = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    chunked = backward_in_chunks(
        task, views, 0.0, chunk_size=2, seed=0, precision=torch.enable_grad, scale=lambda total: total
    )
    torch.testing.assert_close(chunked["total"], whole["total"].detach())
    for name, parameter in task.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=3e-5)


def test_equal_networks_and_an_unmoved_view_match_every_patch():
    task = make_task(
        rotation=0.0, scale=(1.0, 1.0), translation=0.0, intensity_probability=0.0, matching_temperature=0.01
    )
    views = make_views(task, make_batch())
    numbers = task.diagnostics(views)
    assert numbers["matched_share"] == 1 and numbers["matching_accuracy"] == 1
    outputs, own = task.encode(views)
    torch.testing.assert_close(outputs["query"], outputs["key"], atol=1e-4, rtol=1e-3)  # teacher = student at first
    assert own["p2p"].max() < 0.5 * 2 * math.log(64)


def test_the_matches_of_a_flip_are_where_the_tokens_lie():
    """Tokens of stride 4 lie at voxels 0, 4, 8 and 12; a flip of 16 voxels moves them to 15, 11, 7 and 3, of which the
    cells of the tokens at 12, 8 and 4 hold the last three."""
    task = make_task(rotation=0.0, scale=(1.0, 1.0), translation=0.0, flip=1.0)
    views = make_views(task, make_batch(1))
    grid = task._read(task.backbone, views["image"]).grid
    assert sorted(set(grid.centres()[:, 0].tolist())) == [0, 4, 8, 12]
    found = task._matches(views, grid)[0].nonzero()
    assert len(found) == 27
    for first, second in found.tolist():
        there = 15 - grid.centres()[first]
        assert (there - grid.centres()[second]).abs().max() <= 2


def test_the_student_sees_the_window_and_the_teacher_its_copy():
    task = make_task(momentum=0.5)
    one_step(task, make_views(task, make_batch()))  # from now on the two networks differ
    views = make_views(task, make_batch(), seed=5)
    outputs, own = task.encode(views)
    teacher = task.teacher["backbone"].module
    for name, network, view in (("student", task.backbone, "image"), ("teacher", teacher, "warped")):
        torch.testing.assert_close(outputs[f"{name}_pooled"], network.pooled(network.features(views[view])))
    tokens = task.heads["tokens"](task.backbone.tokens(task.backbone.features(views["image"]), 4)[0])
    others = task.teacher["heads"].module["tokens"](teacher.tokens(teacher.features(views["warped"]), 4)[0])
    similarity = nn.functional.normalize(tokens, dim=-1) @ nn.functional.normalize(others, dim=-1).mT
    matches = task._matches(views, task._read(task.backbone, views["image"]).grid)
    expected = patch_to_patch_loss(log_dual_softmax(similarity, 0.1), matches)
    torch.testing.assert_close(own["p2p"], expected, rtol=1e-4, atol=1e-4)


def test_each_side_is_normalised_by_its_own_statistics():
    task = make_task()
    generator, applied = torch.Generator().manual_seed(0), torch.tensor(True)
    for name, mean, scale in (("student", 2.0, 3.0), ("teacher", -5.0, 0.5)):
        task.norms[name].update(mean + scale * torch.randn(50, 10, generator=generator), applied)
    outputs, _ = task.encode(make_views(task, make_batch()))
    for side, name, head in (
        ("student", "query", task.heads["pooled"]),
        ("teacher", "key", task.teacher["heads"].module["pooled"]),
    ):
        norm, pooled = task.norms[side], outputs[f"{side}_pooled"]
        mean, square = norm.mean / norm.weight, norm.square / norm.weight
        expected = head((pooled - mean) / (square - mean**2 + 1e-6).sqrt())
        torch.testing.assert_close(outputs[name], nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_nothing_in_sight_gives_zero_with_a_graph():
    task = make_task()
    batch = make_batch()
    batch["image"][0] = 0  # a window outside the case
    _, own = task.encode(make_views(task, batch))
    assert own["p2p"][0] == 0 and own["p2s"][0] == 0 and own["p2p"][1] > 0
    (own["p2p"][0] + own["p2s"][0]).backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_a_missing_channel_and_a_nan_reach_only_their_sample():
    task = make_task(2)
    batch = make_batch(3, 2)
    batch["image"][0, 1] = 0
    batch["image"][1, 0, 3, 3, 3] = float("nan")
    _, own = task.encode(make_views(task, batch))
    assert torch.isfinite(own["p2p"][[0, 2]]).all() and torch.isfinite(own["p2s"][[0, 2]]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"assignment": "sinkhorn", "sinkhorn_iterations": 5},
        {"negatives": True},
        {"detach_weights": False},
        {"matching_temperature": 1.0},
        {"in_plane": True},
        {"flip": 0.5},
        {"token_stride": 64},
    ],
)
def test_every_option_trains(options):
    task = make_task(**options)
    views = make_views(task, make_batch(2, size=(16, 16, 24)))
    terms = task(views, 0.0)
    terms["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_weights_carry_a_gradient_only_where_asked():
    gradients = []
    for detach in (True, False):
        task = make_task(detach_weights=detach, p2p_weight=0.0, global_weight=0.0)
        task(make_views(task, make_batch()), 0.0)["total"].backward()
        gradients.append(task.heads["tokens"][0].weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1])


def test_negatives_and_weights_enter_the_sum():
    views = None
    totals = {}
    for options in ({}, {"negatives": True}, {"global_weight": 0.5, "p2p_weight": 2.0, "p2s_weight": 3.0}):
        task = make_task(**options)
        views = views or make_views(task, make_batch())
        totals[str(options)] = task(views, 0.0)
    plain, negatives, weighted = totals.values()
    assert negatives["p2p"] > plain["p2p"]
    torch.testing.assert_close(weighted["total"], 0.5 * plain["global"] + 2 * plain["p2p"] + 3 * plain["p2s"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, options",
    [
        ((1, 1, 1), {}),
        ((1, 2, 2), {"assignment": "sinkhorn", "sinkhorn_iterations": 3, "negatives": True}),
    ],
)
def test_a_step_reads_no_value_on_the_host(grid, options):
    task = make_task(grid=grid, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: reading one is an error
        image = torch.empty(2, 1, *(16 * number for number in grid))
        with pytest.raises(DataDependentOutputException):
            image.sum().item()
        terms = task(task.views({"image": image}, torch.Generator()), 0.0)
        terms["total"].backward()
        task.after_step(0.0, torch.ones((), dtype=torch.bool))


# ---------------------------------------------------------------------- teacher and queue


def test_the_teacher_follows_and_the_keys_are_queued():
    task = make_task(momentum=0.5)
    views = make_views(task, make_batch())
    teacher = copied(task.teacher.state_dict())
    one_step(task, views)
    for name, module in (("backbone", task.backbone), ("heads", task.heads)):
        for key, value in module.state_dict().items():
            old = teacher[f"{name}.module.{key}"]
            torch.testing.assert_close(task.teacher[name].module.state_dict()[key], (old + value) / 2)
    keys = task._step["key"]
    torch.testing.assert_close(task.queue.features[:2], keys)
    assert (keys.norm(dim=1) - 1).abs().max() < 1e-5 and not keys.requires_grad


def test_a_skipped_step_changes_neither_teacher_nor_queue():
    task = make_task(momentum=0.5)
    before = {"teacher": copied(task.teacher.state_dict()), "queue": copied(task.queue.state_dict())}
    one_step(task, make_views(task, make_batch()), applied=False)
    for name, state in before.items():
        assert all(torch.equal(value, state[key]) for key, value in getattr(task, name).state_dict().items())


def test_loaded_weights_reach_the_teacher():
    task = make_task()
    torch.manual_seed(7)
    task.backbone.network.load_state_dict(network().state_dict())
    task.on_weights_loaded()
    taught = task.teacher["backbone"].module.network.state_dict()
    assert all(torch.equal(value, taught[key]) for key, value in task.backbone.network.state_dict().items())


def test_equal_logits_give_the_logarithm_of_the_queue():
    task = make_task(queue=12)
    task.queue.features.zero_()
    task.queue.filled.fill_(12)
    outputs = {"query": torch.zeros(3, 8), "key": torch.zeros(3, 8)}
    assert task.loss(outputs, 0.0)["global"].item() == pytest.approx(math.log(13), abs=1e-6)


def test_training_lowers_the_loss_and_finds_more_matches():
    task = make_task(momentum=0.9, matching_temperature=0.1, rotation=10.0, p2s_weight=1.0)
    batch = make_batch(4)
    before = task.diagnostics(make_views(task, batch, seed=99))["matching_accuracy"]
    losses = [one_step(task, make_views(task, batch, seed=step))["p2p"].item() for step in range(25)]
    after = task.diagnostics(make_views(task, batch, seed=99))["matching_accuracy"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert after >= before


# ---------------------------------------------------------------------- several sub-volumes, labels, pictures


def test_tokens_of_a_tiled_window_are_those_of_its_parts():
    task = make_task(grid=(1, 2, 3))
    assert task.needs.margin == (1.0, 2.0, 3.0)
    block = torch.randn(2, 1, 16, 32, 48)
    reading = task._read(task.backbone, block)
    assert reading.grid.counts == (4, 8, 12) and reading.pooled.shape == (2, 6, 10)
    one = task.backbone.features(block[1:, :, :, 16:32, 32:48])  # row 1, column 2
    tokens = reading.tokens[1].view(4, 8, 12, 8)[:, 4:, 8:]
    torch.testing.assert_close(tokens.movedim(-1, 0), one[2][0], rtol=1e-4, atol=1e-5)
    order = join(torch.arange(6.0).view(1, 6, 1, 1, 1, 1), (1, 2, 3)).view(2, 3)
    torch.testing.assert_close(reading.pooled[1, int(order[1, 2])], task.backbone.pooled(one)[0], rtol=1e-4, atol=1e-5)


def test_a_tiled_window_compares_one_chosen_sub_volume():
    task = make_task(grid=(1, 2, 2), momentum=0.5)
    views = make_views(task, make_batch(3, size=(16, 32, 32)))
    assert views["copy"].shape == (3, 1, 16, 16, 16) and views["chosen"].shape == (3,)
    views["chosen"] = torch.tensor([3, 0, 2])
    outputs, _ = task.encode(views)
    for sample, number in enumerate(views["chosen"].tolist()):
        window = cut(views["image"], (1, 2, 2))[sample, number][None]
        pooled = task.backbone.pooled(task.backbone.features(window))
        torch.testing.assert_close(outputs["student_pooled"][sample : sample + 1], pooled, rtol=1e-4, atol=1e-5)
        part = task.backbone.features(views["copy"][sample : sample + 1])
        key = nn.functional.normalize(task.heads["pooled"](task.backbone.pooled(part)), dim=1)
        torch.testing.assert_close(outputs["key"][sample : sample + 1], key, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(one_step(task, views)["total"])


def test_the_grid_of_a_2d_plan_is_that_of_its_axes():
    task = make_task(dims=2, grid=(1, 2, 3))
    assert task.needs.margin == (2.0, 3.0)
    assert torch.isfinite(task(make_views(task, make_batch(2, size=(32, 48))), 0.0)["total"])


@pytest.mark.parametrize("spacing, moves", [((5.0, 0.7, 0.7), False), ((1.0, 1.0, 1.0), True)])
def test_thick_slices_are_not_mixed(spacing, moves):
    task = make_task(spacing=spacing)
    affine = make_views(task, make_batch(size=(16, 24, 24)))["affine"]
    in_slices = torch.equal(affine[:, 0], torch.tensor([[1.0, 0, 0, 0]]).expand(2, 4))
    assert in_slices != moves


def test_labels_give_numbers_and_their_absence_none():
    task = make_task()
    batch = make_batch()
    numbers = task.diagnostics(make_views(task, batch))
    assert set(numbers) == {"matching_accuracy", "matched_share", "token_std", "features"}
    torch.testing.assert_close(numbers["features"].norm(dim=1), torch.ones(2))
    labels = torch.zeros(2, 16, 16, 16, dtype=torch.int16)
    labels[:, 8:] = 1
    batch["image"] += 5 * labels[:, None]
    numbers = task.diagnostics(make_views(task, batch | {"labels": labels}))
    assert 0 < numbers["silhouette_with_background"] <= 1 and 0 < numbers["cosine_gap_with_background"] <= 2
    assert numbers["silhouette"].isnan() and numbers["cosine_gap"].isnan()  # one structure has no other
    labels[:, :, 8:] *= 2
    numbers = task.diagnostics(make_views(task, batch | {"labels": labels}))
    assert -1 <= numbers["silhouette"] <= 1 and -2 <= numbers["cosine_gap"] <= 2


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 2)])
def test_pictures_show_both_views_and_the_tokens(grid):
    task = make_task(2, grid=grid)
    size = tuple(16 * number for number in grid)
    pictures = task.pictures(make_views(task, make_batch(2, 2, size)))
    assert set(pictures) == {"views", "similarity", "components"}
    assert all(image.shape == size for _, image in pictures["views"])


def test_running_norm_is_a_batch_norm_of_earlier_steps():
    norm, generator = RunningNorm(5, momentum=0.5), torch.Generator().manual_seed(0)
    first = 3 + torch.tensor([0.01, 0.1, 1, 2, 0]) * torch.randn(64, 5, generator=generator)
    torch.testing.assert_close(norm(first), first)  # nothing is known yet
    norm.update(first, torch.tensor(False))
    torch.testing.assert_close(norm(first), first)
    norm.update(first * float("nan"), torch.tensor(False))
    norm.update(first, torch.tensor(True))
    expected = (first - first.mean(0)) / (first.var(0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(norm(first), expected, rtol=1e-2, atol=1e-2)
    norm.update(first + 4, torch.tensor(True))  # the newer step weighs twice as much as the older one
    torch.testing.assert_close((norm.mean / norm.weight), first.mean(0) + 4 * 2 / 3)


def test_running_norm_keeps_its_share_of_the_statistics():
    norm = RunningNorm(2, momentum=0.9)
    steps = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    for features in steps:
        norm.update(features, torch.tensor(True))
    weights = torch.tensor([0.81, 0.9, 1.0])  # of old and new steps
    mean = (weights[:, None] * steps.mean(1)).sum(0) / weights.sum()
    square = (weights[:, None] * steps.square().mean(1)).sum(0) / weights.sum()
    torch.testing.assert_close(
        norm(steps[0]), (steps[0] - mean) / (square - mean**2 + 1e-6).sqrt(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("spoiled", [(0,), (0, 1)])
def test_a_case_with_nan_does_not_stop_the_validation(spoiled, tmp_path):
    task, batch = make_task(), make_batch()
    for sample in spoiled:
        batch["image"][sample, 0, 3, 4, 5] = float("nan")
    labels = torch.zeros(2, 16, 16, 16, dtype=torch.int16)
    labels[:, 8:], labels[:, :, 8:] = 1, 2
    views = make_views(task, batch | {"labels": labels})
    task(views, 0.0)
    numbers = task.diagnostics(views)
    assert numbers["silhouette_with_background"].isfinite() == (len(spoiled) == 1)
    assert numbers["cosine_gap_with_background"].isfinite() == (len(spoiled) == 1)
    for name, pictures in task.pictures(views).items():
        draw_pictures(pictures, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").is_file()


def test_the_global_features_of_instance_normalised_images_do_not_collapse():
    task = make_task(queue=24)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    for step in range(40):
        image = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(step % 6))
        views = make_views(task, {"image": image, "available": torch.ones(4, 1, dtype=torch.bool)}, seed=step)
        optimizer.zero_grad()
        task(views, 0.0)["total"].backward()
        optimizer.step()
        task.after_step(0.0, torch.tensor(True))
    assert feature_std(task.diagnostics(views)["features"]) > 0.3
