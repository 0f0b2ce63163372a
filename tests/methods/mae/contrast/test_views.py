"""Two crops of a window: how far apart, where in the case, and which points both show."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.methods.mae.contrast.views import crop_at, draw_starts, largest_shifts, lattice, shared_points
from nnssl_plugin.networks.token_grid import TokenGrid

GRIDS = {
    (16, 20, 12): TokenGrid((4, 5, 3), (0.0, 0.5, 1.5), (4, 4, 4)),
    (15, 33): TokenGrid((5, 11), (1.0, 0.0), (3, 3)),
    (64, 8): TokenGrid((16, 1), (1.5, 3.5), (4, 8)),
}


def starts_of(size, samples, *, overlap=0.4, origin=None, case_shape=None, seed=0):
    window = [-(-length * 16 // 10) for length in size]
    origin = torch.zeros(samples, len(size)) if origin is None else torch.tensor([origin] * samples).float()
    case = torch.tensor([case_shape or window] * samples).float()
    placed = {"window": window, "size": size, "shifts": largest_shifts(size, overlap, GRIDS[size])}
    return draw_starts(origin, case, **placed, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("overlap", [0.4, 0.75, 1.0])
def test_crops_share_their_part_of_every_side(size, overlap):
    starts = starts_of(size, 500, overlap=overlap)
    assert starts.shape == (2, 500, len(size)) and torch.equal(starts, starts.round())
    apart = (starts[0] - starts[1]).abs().amax(0)
    shares = [1 - float(a) / length for a, length in zip(apart, size, strict=True)]
    assert min(shares) >= overlap - 1e-6
    assert apart.tolist() == list(largest_shifts(size, overlap, GRIDS[size]))  # as far as it may be, some time


def test_crops_lie_in_the_case_or_in_the_middle_of_a_small_one():
    size = (16, 20, 12)  # window 26 x 32 x 20; the case is long, has just the size of a crop, and is too small
    starts = starts_of(size, 300, origin=(2, -6, -8), case_shape=(40, 20, 5))
    assert starts[..., 0].amin() == 0 and starts[..., 0].amax() == 10
    assert (starts[..., 1] == 6).all()
    assert (starts[..., 2] == 4).all()  # voxels 8 to 12 of the window in 4 to 15


def test_equal_seeds_give_equal_crops():
    first, again, other = (starts_of((15, 33), 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("window, size", [((7, 6, 5), (3, 4, 5)), ((9, 8), (4, 1))])
def test_a_crop_is_cut_from_its_own_voxel_on(window, size):
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(3, 2, *window, generator=generator)
    room = torch.tensor([whole - length + 1 for whole, length in zip(window, size, strict=True)])
    starts = (torch.rand(3, len(size), generator=generator) * room).floor()
    got = crop_at(volume, starts, size)
    for sample, start in enumerate(starts.int().tolist()):
        where = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        assert torch.equal(got[sample], volume[(sample, slice(None), *where)])


@pytest.mark.parametrize("size", GRIDS)
def test_points_lie_between_the_outermost_tokens_of_both_crops_and_spread_over_what_these_share(size):
    grid = GRIDS[size]
    starts = starts_of(size, 200)
    points = shared_points(starts, grid, 4)
    for axis, (count, offset, spacing) in enumerate(zip(grid.counts, grid.offset, grid.spacing, strict=True)):
        first = starts[..., axis] + offset
        low, high = first.amax(0), first.amin(0) + spacing * (count - 1)
        assert (high >= low).all()
        expected = torch.stack([low + (number + 0.5) / 4 * (high - low) for number in range(4)], 1)
        torch.testing.assert_close(points[:, axis], expected)


def test_points_of_large_crops_agree_to_a_hundred_thousandth_of_a_voxel():
    grid = TokenGrid((20, 20), (3.5, 0.0), (8, 8))
    centres = grid.centres().mT.reshape(1, 2, 20, 20).expand(50, -1, -1, -1)
    starts = (96 * torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0))).floor() + 300
    points = shared_points(starts, grid, 4)
    read = [grid.read(centres, (points - start[..., None]).unbind(1)) + start[..., None, None] for start in starts]
    torch.testing.assert_close(*read, rtol=0, atol=1e-5)
    torch.testing.assert_close(read[0].flatten(2).mT, lattice(points), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_lattice_runs_as_a_flattened_map(dimensions):
    axes = torch.randn(2, dimensions, 3)
    for sample in range(2):
        expected = [list(point) for point in itertools.product(*axes[sample].tolist())]
        torch.testing.assert_close(lattice(axes)[sample], torch.tensor(expected))


def test_nothing_waits_for_the_device():
    with FakeTensorMode():  # tensors without values: reading one raises
        size = (16, 20, 12)
        starts = starts_of(size, 2)
        shared_points(starts, GRIDS[size], 4), crop_at(torch.zeros(2, 1, 26, 32, 20), starts[0], size)
