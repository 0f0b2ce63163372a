"""Changes of intensity: one draw per sample, against naive loops, and what they leave alone."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnssl_plugin.transforms.intensity import random_blur, random_contrast, random_shift, to_unit_range


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=3, channels=2, size=(5, 6, 7)):
    return torch.randn(batch, channels, *size, generator=draw(1), dtype=torch.float64)


@pytest.mark.parametrize("size", [(6, 7), (5, 6, 7)])
def test_unit_range_is_of_each_image(size):
    image = images(size=size)
    image[1] = 4.0
    unit = to_unit_range(image)
    for sample, result in zip(image, unit, strict=True):
        low, high = sample.min(), sample.max()
        expected = (sample - low) / (high - low) if high > low else torch.zeros_like(sample)
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("size", [(6, 7), (5, 6, 7)])
def test_a_shift_is_one_number_per_image_within_its_share_of_the_range(size):
    image = images(batch=64, size=size)
    difference = (random_shift(image, 0.2, generator=draw()) - image).flatten(1)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
    share = difference[:, 0] / (image.flatten(1).amax(1) - image.flatten(1).amin(1))
    assert share.abs().max() <= 0.2 and share.min() < -0.1 and share.max() > 0.1
    assert torch.equal(random_shift(image, 0.0, generator=draw()), image)


@pytest.mark.parametrize("axes", [2, 3])
def test_a_blur_is_scipys_gaussian_on_the_axes_named(axes):
    image = images(size=(7, 9, 11))
    blurred = random_blur(image, (0.8, 0.8), axes=axes, generator=draw())
    deviation = (0,) * (4 - axes) + (0.8,) * axes
    expected = np.stack([gaussian_filter(sample.numpy(), deviation, mode="nearest", radius=2) for sample in image])
    torch.testing.assert_close(blurred, torch.from_numpy(expected))


def test_each_image_is_blurred_by_its_own_deviation_and_a_constant_one_stays():
    image = images(size=(16, 16)).expand(3, -1, -1, -1).clone()
    image[:] = image[:1]
    blurred = random_blur(image, (0.1, 2.0), axes=2, generator=draw())
    assert not torch.allclose(blurred[0], blurred[1]) and not torch.allclose(blurred[1], blurred[2])
    flat = torch.full((2, 1, 8, 8), 3.0)
    torch.testing.assert_close(random_blur(flat, (0.1, 2.0), axes=2, generator=draw()), flat)
    torch.testing.assert_close(random_blur(image, (0.0, 0.0), axes=2, generator=draw()), image)


def test_contrast_keeps_the_range_and_the_order_of_the_values():
    image = images(batch=16)
    changed = random_contrast(image, (0.5, 2.0), generator=draw())
    for before, after in zip(image.flatten(1), changed.flatten(1), strict=True):
        torch.testing.assert_close(after.aminmax().min, before.min())
        torch.testing.assert_close(after.aminmax().max, before.max())
        assert torch.equal(before.argsort(), after.argsort())
    torch.testing.assert_close(random_contrast(image, (1.0, 1.0), generator=draw()), image)
    assert random_contrast(torch.full((1, 1, 4, 4), 2.0), (0.5, 2.0), generator=draw()).eq(2).all()


@pytest.mark.parametrize("change", [
    lambda x: random_shift(x, 0.1, generator=draw()),
    lambda x: random_blur(x, (0.1, 1.0), axes=2, generator=draw()),
    lambda x: random_contrast(x, (0.7, 1.5), generator=draw()),
])  # fmt: skip
def test_a_broken_image_breaks_no_other(change):
    image = images()
    broken = image.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    torch.testing.assert_close(change(broken)[1:], change(image)[1:])
    assert change(broken)[0].isnan().any()
