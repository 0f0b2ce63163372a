"""Channels, frames and slices of one network's inputs."""

import torch

from nnssl_plugin.methods.m3ret.inputs import as_volume, some_frames, unified, with_channels
from nnssl_plugin.methods.m3ret.settings import InputSettings


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_grey_image_is_repeated_and_colours_stay():
    grey, rgb = torch.randn(2, 1, 4, 5), torch.randn(2, 3, 4, 5)
    has = torch.ones(2, 3, dtype=torch.bool)
    repeated = with_channels(grey, has[:, :1], 3, colour=False, generator=draw())
    assert torch.equal(repeated, grey.expand(-1, 3, -1, -1))
    assert with_channels(rgb, has, 3, colour=True, generator=draw()) is rgb


def test_of_several_channels_one_that_the_case_has_is_drawn():
    image = torch.arange(4.0).reshape(1, 4, 1, 1).expand(400, 4, 2, 2)
    available = torch.tensor([True, False, True, False]).expand(400, 4)
    chosen = with_channels(image, available, 3, colour=False, generator=draw())
    assert chosen.shape == (400, 3, 2, 2) and (chosen == chosen[:, :1, :1, :1]).all()
    share = (chosen[:, 0, 0, 0] == 2).float().mean()
    assert set(chosen.unique().tolist()) == {0.0, 2.0} and 0.4 < share < 0.6


def test_three_modalities_are_not_three_colours():
    image = torch.arange(3.0).reshape(1, 3, 1, 1).expand(8, 3, 2, 2)
    chosen = with_channels(image, torch.ones(8, 3, dtype=torch.bool), 3, colour=False, generator=draw())
    assert (chosen == chosen[:, :1]).all() and len(chosen.unique()) > 1


def test_frames_are_different_and_in_their_order():
    video = torch.arange(20.0).reshape(1, 1, 20, 1, 1).expand(50, 3, 20, 2, 2)
    frames = some_frames(video, 5, generator=draw())
    assert frames.shape == (50, 3, 5, 2, 2)
    order = frames[:, 0, :, 0, 0]
    assert (order.diff(dim=1) > 0).all() and len(order.unique(dim=0)) > 40
    assert some_frames(video, 20, generator=draw()) is video


def test_a_flat_image_becomes_as_thick_as_a_patch_only_for_a_network_of_volumes():
    image = torch.randn(2, 3, 8, 8)
    thick = as_volume(image, (4, 2, 2))
    assert thick.shape == (2, 3, 4, 8, 8) and (thick == image[:, :, None]).all()
    assert as_volume(image, (2, 2)) is image and as_volume(thick, (4, 2, 2)) is thick


def test_a_batch_is_read_by_its_kind():
    settings = InputSettings(frames=4)
    video = torch.randn(2, 3, 9, 8, 8)
    batch = {"image": video, "available": torch.ones(2, 3, dtype=torch.bool), "kind": "video"}
    assert unified(batch, settings, 3, draw()).shape == (2, 3, 4, 8, 8)
    volume = unified(batch | {"kind": "CT"}, settings, 3, draw())
    assert volume.shape == (2, 3, 9, 8, 8) and (volume == volume[:, :1]).all()
    assert unified(batch | {"kind": "CT"}, settings, None, draw()) is video
    unit = unified(batch, InputSettings(intensity="unit"), 3, draw())
    assert unit.flatten(1).amin(1).eq(0).all() and unit.flatten(1).amax(1).eq(1).all()
