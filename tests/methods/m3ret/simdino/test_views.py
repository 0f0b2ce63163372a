"""Global and local views: their sizes, what moves, and that each sample has its own."""

import pytest
import torch

from nnssl_plugin.methods.m3ret.simdino.settings import Settings
from nnssl_plugin.methods.m3ret.simdino.views import global_views, local_size, local_views

STILL = {"shift": 0.0, "blur": (0.0, 0.0), "gamma_range": (1.0, 1.0), "flip": 0.0, "global_side": (1.0, 1.0)}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("window", "strides", "video", "size"),
    [
        ((256, 256), (4, 16, 16), False, (96, 96)),
        ((16, 256, 256), (4, 16, 16), True, (16, 96, 96)),
        ((64, 256, 256), (4, 16, 16), False, (32, 96, 96)),
        ((64, 64, 64), (32, 32, 32), False, (64, 64, 64)),
        ((4, 8, 8), (2, 4, 4), False, (4, 8, 8)),
    ],
)
def test_a_local_view_has_the_papers_size_and_always_two_tokens_per_axis(window, strides, video, size):
    assert local_size(window, 0.375, strides, video=video) == size


@pytest.mark.parametrize(("size", "video"), [((16, 24), False), ((8, 16, 24), True), ((8, 16, 24), False)])
def test_views_have_a_row_per_sample_and_differ_from_each_other(size, video):
    image = torch.randn(3, 2, *size)
    views = global_views(image, Settings(), video=video, generator=draw())
    assert views.shape == (3, 2, 2, *size)
    assert not torch.allclose(views[:, 0], views[:, 1]) and torch.isfinite(views).all()
    local = local_views(image, Settings(), (4, 4, 4)[-len(size) :], video=video, generator=draw())
    assert local.shape[:3] == (3, 2, 2)


def test_without_any_change_a_global_view_is_the_image():
    image = torch.randn(2, 1, 4, 6, 8)
    views = global_views(image, Settings(**STILL), video=False, generator=draw())
    torch.testing.assert_close(views, image[:, None].expand(-1, 2, -1, -1, -1, -1), atol=1e-5, rtol=1e-5)


def test_time_is_neither_cropped_nor_blurred():
    frames = torch.arange(6.0).reshape(1, 1, 6, 1, 1).expand(2, 3, 6, 16, 16)
    changed = Settings(shift=0.0, gamma_range=(1.0, 1.0), flip=0.0)
    views = global_views(frames, changed, video=True, generator=draw())
    torch.testing.assert_close(views, frames[:, None].expand(-1, 2, -1, -1, -1, -1), atol=1e-5, rtol=1e-5)
    local = local_views(frames, changed, (2, 4, 4), video=True, generator=draw())
    torch.testing.assert_close(local[0, 0, 0, :, 0, 0], torch.arange(6.0), atol=1e-5, rtol=1e-5)


def test_volumes_may_have_fewer_local_views_and_none_are_no_view():
    image, volume = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 8, 16, 16)
    settings = Settings(local_views=5, local_views_of_volumes=3)
    assert local_views(image, settings, (4, 4), video=False, generator=draw()).shape[1] == 5
    assert local_views(volume, settings, (4, 4, 4), video=False, generator=draw()).shape[1] == 3
    assert local_views(image, Settings(local_views=0), (4, 4), video=False, generator=draw()) is None


def test_samples_draw_apart_and_the_generator_alone_decides():
    image = torch.randn(1, 1, 8, 16, 16).expand(4, -1, -1, -1, -1)
    views = global_views(image, Settings(), video=False, generator=draw())
    assert len(views.flatten(1).unique(dim=0)) == 4
    assert torch.equal(views, global_views(image, Settings(), video=False, generator=draw()))
