"""Blocks of a window, and the exact share that is masked."""

import itertools
import math

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.mae.views import block_edge, visible_count


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
