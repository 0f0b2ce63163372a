"""What student and teacher see: both views, the copy of a sub-volume, changes of intensity, cutting and joining."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.s2dc.heads import TokenNorm, global_head, token_head
from nnssl_plugin.methods.s2dc.settings import Settings
from nnssl_plugin.methods.s2dc.views import augmented_copy, cut, join, second_view, vary_intensity
from nnssl_plugin.settings import settings_from

STILL = Settings(
    rotation=0.0,
    scale=(1.0, 1.0),
    translation=0.0,
    intensity_probability=0.0,
    copy_rotation=0.0,
    copy_scale=(1.0, 1.0),
    copy_translation=0.0,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 2), (2, 2, 2), (2, 3)])
def test_cutting_and_joining(grid):
    block = torch.randn(2, 3, *(4 * number for number in grid))
    parts = cut(block, grid)
    assert parts.shape == (2, int(np.prod(grid)), 3, *([4] * len(grid)))
    assert torch.equal(join(parts, grid), block)
    tiles = {
        tuple(block[1][(slice(None), *(slice(4 * i, 4 * i + 4) for i in index))].flatten().tolist())
        for index in np.ndindex(*grid)
    }
    assert tiles == {tuple(part.flatten().tolist()) for part in parts[1]}


@pytest.mark.parametrize("size", [(12, 10, 14), (12, 11)])
def test_without_ranges_the_second_view_is_the_first(size):
    image = torch.randn(2, 2, *size)
    views = second_view(image, STILL, spacing=(1.0,) * len(size), generator=seeded())
    torch.testing.assert_close(views["warped"], image, atol=1e-5, rtol=1e-5)
    assert views["valid"].all() and views["affine"].shape == (2, len(size), len(size) + 1)


def test_the_same_seed_gives_the_same_view_and_each_sample_its_own():
    image = torch.randn(1, 1, 16, 16, 16).expand(2, 1, 16, 16, 16)
    first, again = (second_view(image, Settings(), spacing=(2, 1, 1), generator=seeded(5)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["warped"][0], first["warped"][1])


def test_the_copy_is_that_of_the_chosen_sub_volume():
    image = torch.randn(6, 1, 8, 16, 16)
    views = augmented_copy(image, (1, 2, 2), STILL, spacing=(1, 1, 1), generator=seeded())
    assert len(views["chosen"].unique()) > 1
    for sample, (copy, chosen) in enumerate(zip(views["copy"], views["chosen"], strict=True)):
        places = [image[sample, :, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] for i, j in np.ndindex(2, 2)]
        assert min((copy - place).abs().max() for place in places) < 1e-5
        assert (copy - cut(image, (1, 2, 2))[sample, int(chosen)]).abs().max() < 1e-5


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (250.0, -40.0)])
def test_changes_of_intensity_mean_the_same_on_any_scale(scale, offset):
    image = torch.randn(2, 3, 20, 20, 20).double() + 5
    settings = Settings(intensity_probability=1.0)
    changed = vary_intensity(image, settings, seeded())
    other = vary_intensity(scale * image + offset, settings, seeded())
    torch.testing.assert_close(other, scale * changed + offset)
    moved = changed - image
    assert moved.std() > 0.05 and moved.abs().mean() < 0.5


def test_padding_does_not_count_in_mean_and_spread():
    settings = replace(STILL, intensity_probability=1.0, intensity_scale=0.5, intensity_shift=0.5, intensity_noise=0.0)
    image = 3 + torch.rand(2, 2, 6, 6, 6, generator=seeded(4))
    padded = torch.nn.functional.pad(image, (0, 8, 3, 0))
    alone, beside = vary_intensity(image, settings, seeded()), vary_intensity(padded, settings, seeded())
    torch.testing.assert_close(beside[..., 3:, :6], alone)
    assert not torch.allclose(alone, image)


def test_what_is_zero_stays_zero():
    image = torch.randn(2, 2, 8, 8, 8)
    image[0, 1] = 0  # a channel that the case lacks
    image[:, :, :3] = 0  # padding
    changed = vary_intensity(image, Settings(intensity_probability=1.0), seeded())
    assert torch.equal(changed == 0, image == 0) and torch.isfinite(changed).all()
    assert torch.equal(vary_intensity(torch.zeros_like(image), Settings(), seeded()), torch.zeros_like(image))


def test_nothing_changes_with_probability_zero():
    image = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(vary_intensity(image, replace(Settings(), intensity_probability=0.0), seeded()), image)


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": (1, 1)},
        {"grid": (0, 1, 1)},
        {"scale": (1.2, 0.9)},
        {"momentum": 1.5},
        {"temperature": 0.0},
        {"assignment": "hungarian"},
        {"in_plane": 1},
        {"translation": 1.0},
        {"copy_scale": (1.0,)},
        {"queue": 0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        settings_from(wrong, Settings(), "plan")


# ---------------------------------------------------------------------- heads


def test_token_norm_is_batch_norm_of_each_sample_alone():
    tokens = torch.randn(3, 50, 6) * 4 + 2
    expected = torch.nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    torch.testing.assert_close(TokenNorm()(tokens), torch.stack([expected(sample) for sample in tokens]))
    assert torch.equal(TokenNorm()(tokens[:, :1]), torch.zeros(3, 1, 6))  # one token, nothing to compare it with


@pytest.mark.parametrize("head, features", [(token_head, torch.randn(4, 9, 5)), (global_head, torch.randn(4, 5))])
def test_heads_do_not_couple_samples(head, features):
    network = head(5, 16, 7).train()
    together = network(features)
    assert together.shape == (*features.shape[:-1], 7)
    torch.testing.assert_close(torch.cat([network(one) for one in features.split(1)]), together)
