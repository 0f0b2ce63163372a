"""MAE's loss, what it looks at, and what reaches the network; on U-Nets in 2D and 3D and on Primus."""

import math
from contextlib import nullcontext

import pytest
import torch
from method_checks import (
    assert_constant_input_is_harmless,
    assert_equals_naive_loop,
    assert_views_have_a_row_per_sample,
)
from small_mae import KINDS, SIZES, make_batch, small_backbone, views_of

from nnssl_plugin.methods.mae.objective import MAE
from nnssl_plugin.methods.mae.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.reconstruction import mean_square
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks


def make(kind="unet", channels=1, **settings):
    return MAE(small_backbone(kind, channels), Settings(**settings)).double()


def loss_of(restored, views, task, monkeypatch):
    monkeypatch.setattr(task, "reconstruct", lambda views: restored)
    return task.encode(views)[1]["reconstruction"]


def naive_mean_square(restored, image, counted):
    losses = []
    for one, true, counts in zip(restored, image, counted, strict=True):
        squares = [(x - y) ** 2 for x, y, c in zip(one.flatten(), true.flatten(), counts.flatten(), strict=True) if c]
        losses.append(sum(squares) / len(squares) if squares else 0 * one.sum())
    return torch.stack(losses)


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 3)])
def test_the_loss_is_the_mean_square_over_counted_voxels(size):
    def draw(generator):
        pair = [torch.randn(3, 2, *size, generator=generator, dtype=torch.float64) for _ in range(2)]
        counted = torch.rand(3, 2, *size, generator=generator) < 0.5
        counted[1] = False
        return [*pair, counted]

    assert_equals_naive_loop(mean_square, naive_mean_square, draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.8])
def test_the_share_is_exact_in_every_sample_and_alike_in_all_channels(kind, ratio):
    task = make(kind, 4, ratio=ratio)
    views = assert_views_have_a_row_per_sample(task, make_batch(SIZES[kind], 3, 4))
    blocks = math.prod(math.ceil(length / 4) for length in SIZES[kind])
    assert views["masked"].shape == (3, 1, *SIZES[kind])
    expected = math.floor(blocks * ratio + 1e-9) * 4 ** len(SIZES[kind])
    assert views["masked"].flatten(1).sum(1).tolist() == [expected] * 3
    assert not torch.equal(views["masked"][0], views["masked"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_keys_give_equal_masks(kind):
    task, batch = make(kind), make_batch(SIZES[kind])
    first, again, other = (views_of(task, batch, seed)["masked"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_0_if_and_only_if_every_masked_voxel_is_exact(kind, monkeypatch):
    task = make(kind, 2)
    views = views_of(task, make_batch(SIZES[kind], 2, 2))
    image, masked = views["image"], views["masked"].expand_as(views["image"])
    exact = torch.where(masked, image, 100.0)  # what is said of visible voxels does not matter
    assert loss_of(exact, views, task, monkeypatch).tolist() == [0, 0]
    for voxel in masked.nonzero()[:: masked.sum() // 7]:
        wrong = exact.clone()
        wrong[tuple(voxel)] += 1e-3
        losses = loss_of(wrong, views, task, monkeypatch)
        assert losses[voxel[0]] > 0 and losses[1 - voxel[0]] == 0


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_no_gradient_comes_from_visible_voxels_nor_from_absent_channels_nor_from_padding(loss_on, monkeypatch):
    task = make(channels=2, loss_on=loss_on)
    batch = make_batch(SIZES["unet"], 2, 2)
    batch["available"][0, 1] = False
    batch["origin"][1, 0], batch["case_shape"][1, 0] = -3, 10  # the case is planes 3 to 12 of the window
    views = views_of(task, batch)
    restored = torch.zeros_like(views["image"], requires_grad=True)
    loss_of(restored, views, task, monkeypatch).sum().backward()
    expected = views["masked"].expand_as(restored).clone() if loss_on == "masked" else torch.ones_like(restored).bool()
    expected[0, 1] = False
    expected[1, :, :3], expected[1, :, 13:] = False, False
    assert torch.equal(restored.grad != 0, expected)


def test_a_window_without_anything_that_counts_costs_nothing():
    task, batch = make(), make_batch(SIZES["unet"])
    batch["available"][0] = False
    terms = task(views_of(task, batch), 0.0)
    terms["total"].backward()
    own = task.encode(views_of(task, batch))[1]["reconstruction"]
    assert own[0] == 0 and own[1] > 0 and all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("samples", [1, 2])
def test_masked_voxels_are_never_read_and_everything_learns(kind, channels, samples):
    task = make(kind, channels)
    views = views_of(task, make_batch(SIZES[kind], samples, channels))
    restored = task.reconstruct(views)
    assert restored.shape == views["image"].shape
    other = views | {"image": torch.where(views["masked"], 50.0, views["image"])}
    assert torch.equal(task.reconstruct(other), restored)
    task(views, 0.0)["total"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_sizes_that_blocks_do_not_divide():
    task = make("2d", block=5)
    views = views_of(task, make_batch((16, 28)))
    assert task.reconstruct(views).shape == (2, 1, 16, 28) and task.encode(views)[1]["reconstruction"].isfinite().all()


def test_the_convolutional_stem_of_a_transformer_does_not_look_across_the_border():
    from dynamic_network_architectures.architectures.primus import PrimusV2

    network = PrimusV2(1, 24, (8, 8, 8), 3, eva_depth=1, eva_numheads=2, input_shape=(32, 32, 32))
    task = MAE(Backbone(network, 1), Settings()).double()
    views = views_of(task, make_batch((32, 32, 32), 1))
    other = views | {"image": torch.where(views["masked"], 50.0, views["image"])}
    assert torch.equal(task.reconstruct(other), task.reconstruct(views))


@pytest.mark.parametrize("ratio, visible", [(0.25, 48), (0.75, 16), (0.8, 13)])
def test_the_transformer_encodes_visible_tokens_alone(ratio, visible):
    task, lengths = make("primus", ratio=ratio), []
    for block in task.backbone.network.eva.blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    views = views_of(task, make_batch(SIZES["primus"]))
    assert views["keep"].shape == (2, visible)
    task.encode(views)
    assert lengths == [visible, visible]


def test_masked_patches_of_a_transformer_are_told_apart_by_what_is_visible():
    task = make("primus")
    views = views_of(task, make_batch(SIZES["primus"], 1))
    image = views["image"].clone().requires_grad_()
    masked = views["masked"]
    task.reconstruct(views | {"image": image})[masked].square().sum().backward()
    assert (image.grad[~masked] != 0).all() and (image.grad[masked] == 0).all()
    patches = task.reconstruct(views)[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).unfold(2, 4, 4).reshape(64, -1)
    hidden = torch.ones(64, dtype=torch.bool).scatter(0, views["keep"][0], False)
    assert len(torch.unique(patches[hidden].detach(), dim=0)) == hidden.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_windows(kind, value):
    task, batch = make(kind), make_batch(SIZES[kind])
    assert_constant_input_is_harmless(task, batch, value=value)
    numbers = task.diagnostics(views_of(task, batch | {"image": torch.full_like(batch["image"], value)}))
    assert numbers["visible_mean_error"] == 0 and numbers["explained"].isnan()


@pytest.mark.slow
def test_a_constant_image_is_restored_to_its_value():
    task = make()
    views = views_of(task, make_batch(SIZES["unet"]))
    views["image"] = torch.full_like(views["image"], 1.5)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        total = task(views, 0.0)["total"]
        total.backward()
        optimizer.step()
    assert total < 0.02 * 1.5**2


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_gradient_of_the_whole_batch(kind):
    gradients = []
    for chunk in (5, 2):
        task = make(kind, 2)
        views = views_of(task, make_batch(SIZES[kind], 5, 2))
        backward_in_chunks(task, views, 0.0, chunk_size=chunk, seed=0, precision=nullcontext, scale=lambda total: total)
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_the_control_is_the_mean_of_the_visible_voxels():
    task = make(channels=2)
    batch = make_batch(SIZES["unet"], 3, 2)
    batch["available"][1, 0] = False
    batch["origin"][2, 1] = -6
    views = views_of(task, batch)
    numbers = task.diagnostics(views)
    restored, errors, controls = task.reconstruct(views), [], []
    for sample in range(3):
        masked, inside = views["masked"][sample, 0], views["inside"][sample, 0]
        channels = [c for c in range(2) if batch["available"][sample, c]]
        hidden = [(c, batch["image"][sample, c][masked & inside]) for c in channels]
        guesses = [batch["image"][sample, c][~masked & inside].mean() for c in channels]
        errors.append(torch.cat([restored[sample, c][masked & inside] - true for c, true in hidden]).square().mean())
        controls.append(torch.cat([g - true for g, (_, true) in zip(guesses, hidden, strict=True)]).square().mean())
    expected = {"masked_error": sum(errors) / 3, "visible_mean_error": sum(controls) / 3}
    expected["explained"] = 1 - expected["masked_error"] / expected["visible_mean_error"]
    torch.testing.assert_close(numbers, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_the_image_with_masked_blocks_blank_and_restored(kind):
    task = make(kind, 2)
    batch = make_batch(SIZES[kind], 2, 2)
    batch["available"][0, 0] = False
    views = views_of(task, batch)
    (volume, masked, restored) = (image for _, image in task.pictures(views)["reconstruction"])
    hidden = views["masked"][0, 0]
    assert torch.equal(volume, views["image"][0, 1].float())
    assert (masked[hidden] == 0).all() and torch.equal(masked[~hidden], volume[~hidden])
    assert torch.equal(restored[~hidden], volume[~hidden]) and not torch.equal(restored[hidden], volume[hidden])
