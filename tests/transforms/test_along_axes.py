"""Maps along one axis beside loops over its places, on every axis, in 2D and 3D."""

import pytest
import torch

from nnssl_plugin.transforms.along_axes import along, convolution, interpolation

SIZES = [(7, 5), (4, 6, 3)]
AXES = [(size, axis) for size in SIZES for axis in range(2, 2 + len(size))]


def images(size, channels=2):
    return torch.randn(3, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "axis"), AXES)
def test_each_image_is_multiplied_by_its_own_matrix(size, axis):
    image, length = images(size), size[axis - 2]
    matrix = torch.randn(3, length + 2, length, dtype=torch.float64)
    expected = torch.stack([torch.tensordot(m, x, ([1], [axis - 1])) for m, x in zip(matrix, image, strict=True)])
    torch.testing.assert_close(along(image, matrix, axis), expected.movedim(1, axis), atol=1e-12, rtol=1e-12)


def test_a_convolution_goes_on_with_the_last_value_beyond_the_border():
    row, kernel = torch.tensor([1.0, 5.0, 2.0, 8.0]), torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0, 0, 1, 0, 0]])
    padded = [1.0, 1.0, *row.tolist(), 8.0, 8.0]
    expected = [sum(k * v for k, v in zip(kernel[0].tolist(), padded[i : i + 5], strict=True)) for i in range(4)]
    blurred, kept = convolution(kernel, 4) @ row
    torch.testing.assert_close(blurred, torch.tensor(expected))
    assert torch.equal(kept, row)


def test_an_interpolation_is_linear_between_voxels_and_constant_beyond_them():
    row, places = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([[-3.0, 0.0, 0.25, 1.0, 1.5, 2.0, 9.0]])
    (found,) = interpolation(places, 3) @ row
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 2.0, 5.0, 3.5, 2.0, 2.0]))


def test_a_single_voxel_is_shown_everywhere():
    assert torch.equal(interpolation(torch.tensor([[-1.0, 0.0, 0.4, 7.0]]), 1), torch.ones(1, 4, 1))
