"""Block masks: exact counts, whole blocks, kept voxels untouched."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.transforms.masks import (
    fill_masked,
    inside_case,
    mask_all_but,
    random_block_mask,
    random_cubes_mask,
    random_ids,
)


def mask_of(batch, spatial, *, block, ratio, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_block_mask(batch, spatial, block=block, ratio=ratio, generator=generator, device="cpu")


def blocks_of(mask, edges):
    """Naive loop: the set of values in each block of one sample's mask."""
    ranges = [range(0, size, edge) for size, edge in zip(mask.shape, edges, strict=True)]
    for corner in itertools.product(*ranges):
        yield set(mask[tuple(slice(c, c + e) for c, e in zip(corner, edges, strict=True))].flatten().tolist())


@pytest.mark.parametrize(
    ("spatial", "block"),
    [((16, 16), 4), ((17, 9), 4), ((40, 56, 40), 8), ((10, 13, 7), (2, 4, 3)), ((5, 33, 32), 8), ((1, 7), 3)],
)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 0.75, 0.9, 1.0])
def test_whole_blocks_are_masked_and_their_number_is_exact(spatial, block, ratio):
    edges = (block,) * len(spatial) if isinstance(block, int) else block
    mask = mask_of(3, spatial, block=block, ratio=ratio)
    assert mask.shape == (3, 1, *spatial) and mask.dtype == torch.bool
    n_blocks = math.prod(math.ceil(size / edge) for size, edge in zip(spatial, edges, strict=True))
    for sample in mask[:, 0]:
        values = list(blocks_of(sample, edges))
        assert all(len(value) == 1 for value in values)
        assert len(values) == n_blocks
        assert values.count({False}) == math.floor(round(n_blocks * (1 - ratio), 6))


@pytest.mark.parametrize(("ratio", "kept"), [(0.9, 1), (0.7, 3), (0.6, 4), (0.1, 9)])
def test_rounding_does_not_lose_a_block(ratio, kept):
    assert (~mask_of(1, (10,), block=1, ratio=ratio)).sum().item() == kept


def test_samples_and_seeds_differ_and_equal_seeds_agree():
    first, again, other = (mask_of(2, (16, 16, 16), block=4, ratio=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_every_block_is_masked_equally_often():
    share = mask_of(4000, (4, 4), block=2, ratio=0.5).float().mean((0, 1))
    assert (share - 0.5).abs().max() < 0.04


def test_a_block_larger_than_the_image_is_one_block():
    assert mask_of(1, (3, 3), block=8, ratio=0.5).all()


@pytest.mark.parametrize("wrong", [{"ratio": -0.1}, {"ratio": 1.1}, {"block": 0}, {"block": (4, 4)}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mask_of(1, (8, 8, 8), **({"block": 4, "ratio": 0.5} | wrong))


def test_nothing_is_read_on_the_host():
    with FakeTensorMode():  # tensors without values: reading one raises
        mask = mask_of(2, (9, 9, 9), block=4, ratio=0.5)
        filled = fill_masked(torch.randn(2, 4, 9, 9, 9), mask, 0.0)
    assert filled.shape == (2, 4, 9, 9, 9)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("spatial", [(9, 8), (6, 7, 8)])
def test_kept_voxels_stay_bit_for_bit(channels, spatial):
    image = torch.randn(2, channels, *spatial)
    image[0, 0].view(-1)[0] = math.nan
    mask = mask_of(2, spatial, block=3, ratio=0.5).expand_as(image)
    filled = fill_masked(image, mask, -3.0)
    assert torch.equal(filled[~mask].view(torch.int32), image[~mask].view(torch.int32))
    assert (filled[mask] == -3).all()


@pytest.mark.parametrize("spatial", [(9, 8), (6, 7, 8)])
def test_the_image_itself_fills_nothing_no_share_leaves_it_and_a_full_share_leaves_the_filler(spatial):
    image, filler = torch.randn(2, 2, 3, *spatial).unbind()
    none, some, all_of_it = (mask_of(2, spatial, block=3, ratio=ratio) for ratio in (0.0, 0.6, 1.0))
    assert torch.equal(fill_masked(image, some, image), image)
    assert torch.equal(fill_masked(image, none, filler), image)
    assert torch.equal(fill_masked(image, all_of_it, filler), filler)


def test_a_tensor_fills_by_channel_and_keeps_the_type():
    image = torch.randn(2, 4, 8, 8)
    filler = torch.arange(4, dtype=torch.float64).view(1, 4, 1, 1)
    filled = fill_masked(image, torch.ones(2, 1, 8, 8, dtype=torch.bool), filler)
    assert filled.dtype == torch.float32
    assert torch.equal(filled, filler.float().expand(2, 4, 8, 8))
    assert fill_masked(image.half(), image > 0, 0.0).dtype == torch.float16


def test_the_mask_of_chosen_blocks_leaves_exactly_them():
    visible = torch.tensor([[0, 5], [3, 2]])
    mask = mask_all_but(visible, (5, 6), (2, 3))  # 3 x 2 blocks, the last row of them cut
    expected = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    for sample, blocks in enumerate(visible.tolist()):
        for block in blocks:
            row, column = divmod(block, 2)
            expected[sample, 0, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3] = False
    assert torch.equal(mask, expected)


def test_random_numbers_of_a_sample_are_different():
    drawn = random_ids(50, 10, 4, generator=torch.Generator().manual_seed(0), device="cpu")
    assert drawn.shape == (50, 4) and all(len(set(row)) == 4 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(10))


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


def cubes_one_by_one(drawn, edge, ratio):
    """BrainMVP's Algorithm 1 as printed, whose random places come in the order of ``drawn``."""
    mask = torch.zeros(drawn.shape, dtype=torch.bool)
    for place in drawn.flatten().argsort().tolist():
        if mask.sum() >= ratio * mask.numel() - 1e-9:
            break
        centre = [int(c) for c in np.unravel_index(place, drawn.shape)]
        mask[tuple(slice(max(c - edge // 2, 0), c - edge // 2 + edge) for c in centre)] = True
    return mask


@pytest.mark.parametrize(("spatial", "edge"), [((9, 14), 4), ((8, 11, 7), 3), ((12, 9, 16), 8), ((5, 4, 3), 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.875, 1.0])
def test_cubes_are_masked_until_their_share_is_reached(spatial, edge, ratio):
    arguments = {"edge": edge, "ratio": ratio, "device": "cpu"}
    masks = random_cubes_mask(2, spatial, generator=torch.Generator().manual_seed(3), **arguments)
    drawn = torch.rand(2, 1, *spatial, generator=torch.Generator().manual_seed(3))
    assert masks.shape == (2, 1, *spatial) and masks.dtype == torch.bool
    for mask, each in zip(masks, drawn, strict=True):
        assert torch.equal(mask[0], cubes_one_by_one(each[0], edge, ratio))


def test_cubes_differ_between_samples_and_bring_little_more_than_their_share():
    mask = random_cubes_mask(
        3, (32, 32, 32), edge=8, ratio=0.875, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    share = mask.flatten(1).double().mean(1)
    assert (share >= 0.875).all() and (share <= 0.875 + 8**3 / 32**3).all()
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("wrong", [{"edge": 0}, {"ratio": 1.1}])
def test_cubes_that_cannot_be_are_refused(wrong):
    arguments = {"edge": 4, "ratio": 0.5} | wrong
    with pytest.raises(ValueError, match="edge"):
        random_cubes_mask(1, (8, 8), **arguments, generator=torch.Generator(), device="cpu")
