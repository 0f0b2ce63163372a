"""M3Ret's MAE: the loss over masked patches, what it reaches, and its inputs of every kind."""

import math

import pytest
import torch
from fake_dataset import fake_plan
from method_checks import (
    assert_constant_input_is_harmless,
    assert_equals_naive_loop,
    assert_views_have_a_row_per_sample,
)
from small_patch_vit import small_patch_vit
from small_primus import with_primus

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.m3ret.mae.heads import PatchDecoder
from nnssl_plugin.methods.m3ret.mae.objective import M3RetMAE, masked_error
from nnssl_plugin.methods.m3ret.mae.patches import patchify
from nnssl_plugin.methods.m3ret.mae.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

LABELS = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
SMALL = {"decoder_width": 24, "decoder_blocks": 1, "decoder_heads": 2}
SIZE = (4, 8, 8)


def make_task(backbone=None, channels=None, **settings):
    return M3RetMAE(backbone or small_patch_vit(), Settings(**SMALL | settings), channels=channels)


def make_batch(samples=3, channels=1, size=SIZE, kind="CT"):
    image = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(1))
    return {"image": image, "available": torch.ones(samples, channels, dtype=torch.bool), "kind": kind}


def views_of(task, batch=None):
    return task.views(batch or make_batch(), torch.Generator().manual_seed(0))


def naive_error(restored, patches, keep):
    losses = []
    for sample in range(len(restored)):
        masked = [n for n in range(restored.shape[1]) if n not in keep[sample].tolist()]
        losses.append(sum((restored[sample, n] - patches[sample, n]).square().mean() for n in masked) / len(masked))
    return torch.stack(losses)


def draw(generator):
    tokens = [torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [*tokens, torch.rand(2, 6, generator=generator).argsort(1)[:, :2]]


def test_the_loss_equals_a_naive_loop():
    assert_equals_naive_loop(masked_error, naive_error, draw)


def test_it_is_zero_where_masked_patches_are_exact_and_no_visible_one_has_a_gradient():
    restored, patches, keep = draw(torch.Generator().manual_seed(0))
    visible = torch.zeros(2, 6, 1, dtype=torch.bool).scatter(1, keep[:, :, None], True)
    assert masked_error(torch.where(visible, restored, patches), patches, keep).eq(0).all()
    restored.requires_grad_()
    masked_error(restored, patches, keep).sum().backward()
    assert torch.equal(restored.grad.ne(0).all(2, keepdim=True), ~visible)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_the_share_of_masked_patches_is_exact(ratio):
    keep = views_of(make_task(ratio=ratio))["keep"]
    assert keep.shape == (3, 8 - math.floor(8 * ratio))
    assert all(len(set(row.tolist())) == len(row) for row in keep)


@pytest.mark.parametrize(("slices", "masked"), [(4, 192), (16, 768), (64, 3072)])
def test_of_the_papers_inputs_192_768_and_3072_patches_are_masked(slices, masked):
    task = make_task(small_patch_vit(patch_size=(4, 16, 16)))
    keep = views_of(task, make_batch(samples=1, size=(slices, 256, 256)))["keep"]
    assert keep.shape == (1, masked // 3)


def test_encoded_tokens_stand_in_their_places_and_the_mask_token_in_all_others():
    decoder = PatchDecoder(5, 6, 1, 1, 6)
    decoder.blocks, decoder.predict = torch.nn.Identity(), torch.nn.Identity()
    decoder.blocks.forward = lambda tokens, grid: tokens
    tokens, _, keep = draw(torch.Generator().manual_seed(0))
    tokens = tokens.float()
    visible = tokens.gather(1, keep[:, :, None].expand(-1, -1, 5))
    expected = decoder.mask_token.repeat(2, 6, 1)
    for sample in range(2):
        for place in keep[sample].tolist():
            expected[sample, place] = decoder.embed(tokens[sample, place])
    torch.testing.assert_close(decoder(visible, keep, (6,)), expected)


def test_a_restored_image_does_not_depend_on_the_others_of_its_batch():
    task = make_task().double().eval()
    views = {name: view.double() if view.is_floating_point() else view for name, view in views_of(task).items()}
    alone = task.restore({name: view[1:2] for name, view in views.items()})
    torch.testing.assert_close(alone, task.restore(views)[1:2].contiguous())


def test_the_network_sees_nothing_of_a_masked_patch():
    task = make_task().double()
    views = views_of(task)
    views["image"] = views["image"].double().requires_grad_()
    task.restore(views).sum().backward()
    seen = patchify(views["image"].grad, (2, 4, 4)).ne(0).any(2)
    assert torch.equal(seen, torch.zeros(3, 8, dtype=torch.bool).scatter(1, views["keep"], True))


def test_the_sum_is_the_mean_times_the_numbers_of_a_patch():
    mean, summed = (make_task(reduction=reduction) for reduction in ("mean", "sum"))
    summed.load_state_dict(mean.state_dict())
    one, other = (task.encode(views_of(task))[1]["reconstruction"] for task in (mean, summed))
    torch.testing.assert_close(other, one * 2 * 4 * 4)


def test_normalised_patches_have_no_brightness():
    task = make_task(normalised_patches=True)
    views = views_of(task)
    brighter = views | {"image": views["image"] * 3 + 5}
    restored = task.restore(views)
    task.restore = lambda views: restored
    torch.testing.assert_close(task.encode(views)[1], task.encode(brighter)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (make_batch(channels=1, size=(8, 8), kind="ultrasound"), (2, 8, 8)),
        (make_batch(channels=3, size=(6, 8, 12), kind="video"), (4, 8, 12)),
        (make_batch(channels=2, size=(8, 4, 4), kind="MR"), (8, 4, 4)),
        (make_batch(samples=1), SIZE),
    ],
    ids=["image", "video", "two modalities", "one sample"],
)
def test_every_kind_is_an_input_of_one_network(batch, size):
    task = make_task(small_patch_vit(3), channels=3, frames=4)
    views = assert_views_have_a_row_per_sample(task, batch)
    assert views["image"].shape == (len(batch["image"]), 3, *size)
    assert task(views, 0.5)["reconstruction"].isfinite()
    assert_constant_input_is_harmless(task, batch)


def test_flat_networks_and_primus_are_transformers_too():
    flat = make_task(small_patch_vit(patch_size=(4, 4)))
    assert flat(views_of(flat, make_batch(size=(8, 12))), 0.5)["total"].isfinite()
    primus = make_task(Backbone(build_network(with_primus(fake_plan()), "3d_fullres", LABELS), 1))
    assert primus(views_of(primus, make_batch(size=(16, 16, 16))), 0.5)["total"].isfinite()


def test_a_network_of_convolutions_is_sent_to_the_plain_trainer():
    with pytest.raises(UserError, match="PlainConvUNet cannot do") as error:
        make_task(Backbone(build_network(fake_plan(), "3d_fullres", LABELS), 1))
    assert "-tr MAEPretrainer" in error.value.remedy and "patch-vit-s m3ret-mae" in error.value.remedy


@pytest.mark.slow
def test_training_explains_what_a_constant_does_not():
    task = make_task(ratio=0.5)
    ramp = torch.linspace(-1, 1, 8).expand(4, 1, *SIZE) * torch.tensor([1.0, -1, 0.5, -0.5]).reshape(4, 1, 1, 1, 1)
    batch = {"image": ramp, "available": torch.ones(4, 1, dtype=torch.bool), "kind": "CT"}
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        task(task.views(batch, generator), 0.5)["total"].backward()
        optimizer.step()
    numbers = task.diagnostics(task.views(batch, generator))
    assert numbers["explained"] > 0.8 and numbers["features"].shape == (4, 24)


def test_a_constant_image_has_no_share_to_explain():
    task = make_task()
    views = views_of(task, make_batch() | {"image": torch.ones(3, 1, *SIZE)})
    assert task.diagnostics(views)["explained"].isnan()


@pytest.mark.parametrize(("normalised", "number"), [(False, 3), (True, 2)])
def test_pictures_show_the_first_sample(normalised, number):
    task = make_task(normalised_patches=normalised)
    pictures = task.pictures(views_of(task))["reconstruction"]
    assert [tuple(image.shape) for _, image in pictures] == [SIZE] * number
