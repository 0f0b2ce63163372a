"""Blocks of a window, the exact share that is masked, and which voxels lie in the case."""

import itertools
import math

import pytest
import torch

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.mae.views import block_edge, inside_case, visible_count


@pytest.mark.parametrize(
    "size, edge",
    [
        ((160, 160, 160), 16),
        ((192, 192, 192), 16),
        ((64, 64, 64), 16),
        ((63, 128, 128), 8),
        ((40, 56, 40), 8),
        ((32, 40, 32), 8),
        ((20, 256, 224), 4),
        ((16, 16), 4),
        ((12, 64), 4),
        ((512, 512), 16),
    ],
)
def test_four_blocks_fit_on_every_axis_where_they_can(size, edge):
    assert block_edge(size) == edge


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
def test_the_share_is_floor_of_n_times_the_ratio(ratio):
    for counts in itertools.product((3, 4, 5), repeat=2):
        size = [4 * count - 1 for count in counts]  # the last block of an axis is cut and counts as one
        total, visible = visible_count(size, (4, 4), ratio)
        tenths_of_a_percent = round(1000 * ratio)  # whole numbers do not round
        assert total == math.prod(counts) and total - visible == total * tenths_of_a_percent // 1000


def test_a_window_of_too_few_blocks_is_refused():
    with pytest.raises(UserError, match=r"Of 1 blocks of 32x32x32 voxels in a window of 16x32x32, a share of 0.75"):
        visible_count((16, 32, 32), (32, 32, 32), 0.75)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_voxels_of_the_case(dimensions):
    generator = torch.Generator().manual_seed(0)
    size = (5, 7, 6)[:dimensions]
    origin = torch.randint(-4, 4, (3, dimensions), generator=generator).float()
    shape = torch.randint(2, 9, (3, dimensions), generator=generator).float()
    inside = inside_case(origin, shape, size)
    assert inside.shape == (3, 1, *size)
    for sample in range(3):
        for voxel in itertools.product(*map(range, size)):
            place = [int(origin[sample, axis]) + voxel[axis] for axis in range(dimensions)]
            expected = all(0 <= p < shape[sample, axis] for axis, p in enumerate(place))
            assert bool(inside[(sample, 0, *voxel)]) == expected
