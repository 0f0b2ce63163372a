"""Multi-crop: rows per sample, views of two sizes, and the affine that belongs to each view."""

import pytest
import torch

from nnssl_plugin.transforms.affine import warp_image
from nnssl_plugin.transforms.crops import Crops, multi_crop

KINDS = {
    "2d": ((24, 20), (1.0, 1.0), (12, 10), (6, 5)),
    "3d": ((16, 12, 20), (1.0, 1.0, 1.0), (8, 6, 10), (4, 3, 5)),
    "anisotropic": ((6, 32, 28), (5.0, 1.0, 1.0), (6, 16, 14), (3, 8, 7)),
}
"""Window, spacing, size of the global and of the local views."""


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_two_global_and_several_local_views(kind, channels):
    window, spacing, large, small = KINDS[kind]
    image, generator = torch.rand(3, channels, *window, dtype=torch.float64) + 1, torch.Generator().manual_seed(0)
    for crops in (Crops(2, large, (0.6, 1.0)), Crops(5, small, (0.2, 0.6), flip=0.5)):
        views, affines = multi_crop(image, crops, spacing=spacing, generator=generator)
        assert views.shape == (3, crops.number, channels, *crops.size)
        assert affines.shape == (3, crops.number, len(window), len(window) + 1)
        assert (views >= 1 - 1e-12).all()  # nothing but the window is shown
        for k in range(crops.number):
            expected = warp_image(image, affines[:, k], size=crops.size)[0]
            torch.testing.assert_close(views[:, k], expected, atol=1e-12, rtol=1e-12)
        assert len({tuple(affine.flatten().tolist()) for affine in affines.flatten(0, 1)}) == 3 * crops.number


def test_equal_seeds_agree_and_a_sample_does_not_depend_on_the_others_content():
    crops, image = Crops(2, (4, 4), (0.3, 0.9)), torch.randn(2, 1, 8, 8)
    changed = image.clone()
    changed[1] = torch.nan
    first, second = (
        multi_crop(x, crops, spacing=(1, 1), generator=torch.Generator().manual_seed(3))[0] for x in (image, changed)
    )
    assert torch.equal(first[0], second[0]) and second[1].isnan().all()
