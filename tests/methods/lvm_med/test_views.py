"""Views and where their cells lie: a bright point is found at the place that is tracked, in any channel number."""

import pytest
import torch

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.lvm_med.settings import Settings
from nnssl_plugin.methods.lvm_med.views import image_boxes, places_in_image, random_view, with_channels
from nnssl_plugin.transforms.affine import transform_points

STILL = {"jitter_probability": 0.0, "blur_probability": 0.0}


def views_of(image, size, seed=0, **settings):
    chosen, generator = Settings(**settings), torch.Generator().manual_seed(seed)
    boxes = image_boxes(image, chosen, spacing=(1.0, 1.0), generator=generator)
    return random_view(image, boxes, size, chosen, spacing=(1.0, 1.0), generator=generator)


def test_a_ramp_shows_at_every_cell_the_place_that_is_tracked():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(30.0), indexing="ij")
    image = torch.stack(((rows + 0.5) / 40, (columns + 0.5) / 30)).expand(6, 2, 40, 30)
    view, affine = views_of(image, (24, 20), **STILL)
    voxels = torch.cartesian_prod(torch.arange(24.0), torch.arange(20.0))
    places = places_in_image(voxels, affine, (40, 30))
    shown = view.flatten(2).mT
    inner = (places > 0.05).all(-1) & (places < 0.95).all(-1)  # at the border values do not fade
    torch.testing.assert_close(shown[inner], places[inner], atol=1e-4, rtol=0)
    assert affine[:, 0, 0].sign().unique().numel() == 2  # some are mirrored


def test_views_lie_inside_the_share_of_the_image_that_both_are_cut_from():
    image = torch.rand(50, 1, 32, 32)
    chosen, generator = Settings(image_share=(0.25, 0.25), view_share=(1.0, 1.0), **STILL), torch.Generator()
    boxes = image_boxes(image, chosen, spacing=(1, 1), generator=generator)
    corners = torch.tensor([[-0.5, -0.5], [15.5, 15.5]])
    places = []
    for _ in range(2):
        _, affine = random_view(image, boxes, (16, 16), chosen, spacing=(1, 1), generator=generator)
        places.append(places_in_image(corners, affine, (32, 32)).sort(1).values)
    torch.testing.assert_close(*places)  # mirrored or not, both show the same quarter
    torch.testing.assert_close(places[0][:, 1] - places[0][:, 0], torch.full((50, 2), 0.5))
    assert places[0].min() >= -1e-6 and places[0].max() <= 1 + 1e-6 and places[0][:, 0].std() > 0.05


@pytest.mark.parametrize("share", [(0.4, 0.4), (1.0, 1.0)])
def test_a_view_shows_the_share_that_is_set(share):
    _, affine = views_of(torch.rand(9, 1, 32, 32), (16, 16), view_share=share)
    scale = affine[:, :, :2].det().abs()
    torch.testing.assert_close(16 * 16 / scale / 32**2, torch.full((9,), share[0]))


def test_intensities_change_per_channel_padding_stays_and_a_constant_image_is_harmless():
    image = torch.rand(40, 3, 20, 20) + 0.5
    image[:, :, :, :6] = 0
    plain, affine = views_of(image, (20, 20), view_share=(1.0, 1.0), flip=0.0, **STILL)
    varied, _ = views_of(image, (20, 20), view_share=(1.0, 1.0), flip=0.0)
    torch.testing.assert_close(plain, image)
    assert varied[:, :, :, :6].eq(0).all() and varied.isfinite().all()
    changes = (varied - plain).flatten(2).mean(2)
    assert 0.5 < (changes.abs().sum(1) > 1e-6).float().mean() <= 1  # most images
    assert (changes.std(1) > 1e-3).any()  # channels differ
    constant, _ = views_of(torch.full((4, 1, 16, 16), 2.0), (8, 8))
    assert constant.isfinite().all()
    assert transform_points(torch.zeros(1, 2), affine).abs().max() < 1e-4


def test_other_numbers_of_channels_become_one_shown_in_all():
    image = torch.arange(4.0).view(1, 4, 1, 1).expand(200, 4, 5, 6)
    available = torch.tensor([True, False, True, True]).expand(200, 4)
    generator = torch.Generator().manual_seed(0)
    assert with_channels(image, available, 4, generator) is image
    three = with_channels(image, available, 3, generator)
    assert three.shape == (200, 3, 5, 6) and torch.equal(three[:, 0], three[:, 2])
    assert three.unique().tolist() == [0, 2, 3]
    grey = with_channels(image[:, 2:3], available[:, 2:3], 3, generator)
    assert torch.equal(grey, image[:, 2:3].expand(-1, 3, -1, -1))


def test_ranges_begin_with_their_smallest_number():
    with pytest.raises(UserError, match="smallest comes first"):
        Settings(view_share=(1.0, 0.4))
