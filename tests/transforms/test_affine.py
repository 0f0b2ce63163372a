"""Affine views: the image and its points move together, in mm where it matters, and padding is known."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_plugin.transforms.affine import (
    AffineRange,
    compose,
    invert_affine,
    random_affine,
    random_crop,
    transform_points,
    warp_image,
)

EVERYTHING = AffineRange(rotation=35, scale=(0.8, 1.25), translation=0.1, flip=0.5, in_plane=False)
WINDOWS = [((17, 24), (0.7, 1.3)), ((32, 31), (1.0, 1.0)), ((11, 18, 15), (2.5, 0.8, 1.1)), ((12, 12, 12), (1, 1, 1))]


def affines(batch, size, ranges=EVERYTHING, *, spacing=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spacing = spacing or (1.0,) * len(size)
    return random_affine(batch, size, ranges, spacing=spacing, generator=generator, device="cpu")


def about_centre(linear, size):
    """The affine (1, d, d+1) with this linear part that keeps the window's centre."""
    linear = torch.tensor(linear, dtype=torch.float32)
    centre = (torch.tensor(size, dtype=torch.float32) - 1) / 2
    return torch.cat((linear, (centre - linear @ centre)[:, None]), 1)[None]


def shift_by(*voxels):
    return torch.cat((torch.eye(len(voxels)), torch.tensor(voxels, dtype=torch.float32)[:, None]), 1)[None]


def voxels_of(size):
    """Coordinates (d, *size) of an image's voxels."""
    return torch.from_numpy(np.indices(size).astype(np.float32))


def source_points(affine, size):
    """Naive: where each voxel of the view comes from, (d, n_voxels) float64."""
    linear, offset = affine[:, :-1].double().numpy(), affine[:, -1].double().numpy()
    return np.linalg.solve(linear, np.indices(size).reshape(len(size), -1) - offset[:, None])


@pytest.mark.parametrize(("size", "spacing"), WINDOWS)
def test_the_view_equals_scipys_and_its_mask_a_test_of_every_point(size, spacing):
    image = torch.randn(3, 2, *size, dtype=torch.float64)
    moves = affines(3, size, spacing=spacing)
    view, valid = warp_image(image, moves)
    assert view.shape == image.shape and valid.shape == (3, 1, *size) and valid.dtype == torch.bool
    assert 0 < valid.float().mean() < 1
    for sample in range(3):
        points = source_points(moves[sample], size)
        inside = np.array([all(-0.5 <= x <= n - 0.5 for x, n in zip(p, size, strict=True)) for p in points.T])
        assert np.array_equal(valid[sample, 0].numpy().ravel(), inside)
        for channel in range(2):
            naive = map_coordinates(image[sample, channel].numpy(), points, order=1, mode="nearest")
            got = view[sample, channel].numpy().ravel()
            np.testing.assert_allclose(got, np.where(inside, naive, 0), atol=1e-10)


@pytest.mark.parametrize(("size", "spacing"), WINDOWS)
def test_what_the_view_shows_at_a_voxel_is_moved_there_by_transform_points(size, spacing):
    """An image of its own coordinates: the value of a voxel of the view is the point that it shows."""
    moves = affines(4, size, spacing=spacing)
    view, _ = warp_image(voxels_of(size).expand(4, -1, *size), moves)
    shown = view.flatten(2).transpose(1, 2)
    last = torch.tensor(size) - 1.0
    interior = ((shown > 0.01) & (shown < last - 0.01)).all(-1)  # not in the outer half voxel, whose value is constant
    assert interior.any(1).all()
    error = (transform_points(shown, moves) - voxels_of(size).flatten(1).T).norm(dim=-1)
    assert error[interior].max() < 1e-4


@pytest.mark.parametrize("size", [(33, 40), (21, 28, 25)])
def test_a_blob_is_found_where_its_centre_goes(size):
    moves = affines(4, size, AffineRange(rotation=30, scale=(0.9, 1.2), translation=0.03, flip=0.5, in_plane=False))
    centre = torch.tensor(size) / 2 + torch.linspace(-1.3, 1.7, len(size))
    distance = (voxels_of(size) - centre.view(-1, *[1] * len(size))).square().sum(0)
    view, _ = warp_image(torch.exp(-distance / (2 * 1.5**2)).expand(4, 1, *size), moves)
    weight = view.flatten(2)
    found = (weight * voxels_of(size).flatten(1)).sum(-1) / weight.sum(-1)
    assert (found - transform_points(centre[None], moves)[:, 0]).abs().max() < 0.05


@pytest.mark.parametrize("size", [(9, 8), (5, 8, 7), (1, 6, 6), (1, 1, 1)])
def test_without_ranges_nothing_moves(size):
    image = torch.randn(2, 4, *size)
    view, valid = warp_image(image, affines(2, size, AffineRange(), spacing=(3.3, 1.0, 0.4)[: len(size)]))
    torch.testing.assert_close(view, image, atol=1e-5, rtol=0)
    assert valid.all()


@pytest.mark.parametrize("plane", list(itertools.combinations(range(3), 2)))
def test_a_quarter_turn_of_a_cube_permutes_its_voxels(plane):
    first, second = plane
    linear = np.eye(3)
    linear[[first, second], [first, second]] = math.cos(math.pi / 2)
    linear[second, first], linear[first, second] = 1, -1
    image = torch.randperm(9**3).reshape(1, 1, 9, 9, 9).float()
    view, valid = warp_image(image, about_centre(linear, (9, 9, 9)))
    turned = torch.rot90(image, 1, (2 + first, 2 + second))
    assert valid.all()
    assert torch.equal(view.round(), turned) and (view - turned).abs().max() < 0.02  # of values up to 728


@pytest.mark.parametrize("voxels", [(2, -3), (0, 4, -1), (-2, 0, 3)])
def test_a_shift_by_whole_voxels_copies_them_and_pads_with_zeros(voxels):
    size = (9, 11, 10)[: len(voxels)]
    image = torch.rand(1, 2, *size) + 1
    view, valid = warp_image(image, shift_by(*voxels))
    expected = torch.zeros_like(image)
    to = tuple(slice(max(v, 0), n + min(v, 0)) for v, n in zip(voxels, size, strict=True))
    of = tuple(slice(max(-v, 0), n + min(-v, 0)) for v, n in zip(voxels, size, strict=True))
    expected[(..., *to)] = image[(..., *of)]
    torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)
    assert torch.equal(view != 0, (expected != 0)) and torch.equal(valid.expand_as(view), expected != 0)


@pytest.mark.parametrize("size", [(8, 7), (8, 7, 6)])
def test_a_certain_flip_mirrors_every_axis(size):
    image = torch.randn(2, 1, *size)
    view, valid = warp_image(image, affines(2, size, AffineRange(flip=1.0)))
    torch.testing.assert_close(view, image.flip(tuple(range(2, 2 + len(size)))), atol=1e-5, rtol=0)
    assert valid.all()


def test_each_axis_is_flipped_as_often_as_asked():
    linear = affines(2000, (8, 8, 8), AffineRange(flip=0.3))[..., :3]
    assert torch.equal(linear, torch.diag_embed(linear.diagonal(dim1=1, dim2=2)))
    share = (linear.diagonal(dim1=1, dim2=2) < 0).float().mean(0)
    assert (share - 0.3).abs().max() < 0.04


@pytest.mark.parametrize(("size", "spacing"), WINDOWS)
def test_inverse_and_composition(size, spacing):
    first, second = (affines(5, size, spacing=spacing, seed=seed) for seed in (1, 2))
    points = torch.randn(5, 13, len(size)) * 10
    both = transform_points(transform_points(points, first), second)
    torch.testing.assert_close(transform_points(points, compose(second, first)), both, atol=1e-4, rtol=0)
    back = transform_points(transform_points(points, first), invert_affine(first))
    torch.testing.assert_close(back, points, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        compose(first, invert_affine(first)), shift_by(*[0.0] * len(size)).expand(5, -1, -1), atol=1e-4, rtol=0
    )


def test_the_same_points_serve_every_sample():
    moves = affines(3, (8, 9, 10))
    points = torch.rand(6, 3)
    assert torch.equal(transform_points(points, moves), transform_points(points.expand(3, 6, 3), moves))


@pytest.mark.parametrize(("size", "spacing"), [((20, 32), (2.7, 0.6)), ((12, 20, 16), (2.9, 0.7, 1.0))])
def test_a_rotation_keeps_lengths_in_mm(size, spacing):
    points = torch.rand(40, len(size)) * 20
    moved = transform_points(points, affines(8, size, AffineRange(rotation=90, in_plane=False), spacing=spacing))
    mm = torch.tensor(spacing)
    lengths = torch.stack([F.pdist(sample * mm) for sample in moved])
    torch.testing.assert_close(lengths, F.pdist(points * mm).expand_as(lengths), atol=1e-3, rtol=1e-4)
    assert ((moved - points) * mm).norm(dim=-1).mean() > 1


def test_a_scale_multiplies_all_lengths_in_mm_alike_and_stays_in_its_range():
    points, mm = torch.rand(20, 3) * 20, torch.tensor([2.0, 0.7, 1.0])
    ranges = AffineRange(rotation=20, scale=(0.7, 1.4))
    moved = transform_points(points, affines(200, (12, 20, 16), ranges, spacing=mm.tolist()))
    before, after = F.pdist(points * mm), torch.stack([F.pdist(sample * mm) for sample in moved])
    factors = after / before
    assert (factors.std(1) < 1e-3).all()
    assert factors.min() >= 0.7 - 1e-3 and factors.max() <= 1.4 + 1e-3
    assert factors.mean(1).min() < 0.75 and factors.mean(1).max() > 1.35


def test_angle_and_shift_fill_their_ranges_and_no_more():
    moves = affines(1000, (20, 40), AffineRange(rotation=30))
    angle = torch.rad2deg(torch.atan2(moves[:, 1, 0], moves[:, 0, 0]))
    assert angle.abs().max() <= 30.001 and angle.min() < -28 and angle.max() > 28
    centre = torch.tensor([[9.5, 19.5]])
    torch.testing.assert_close(transform_points(centre, moves), centre.expand(1000, 1, 2), atol=1e-4, rtol=0)
    shifts = affines(1000, (20, 40), AffineRange(translation=0.25))[..., -1]
    assert (shifts.abs() <= torch.tensor([5.0, 10.0])).all()
    assert (shifts.amax(0) > torch.tensor([4.5, 9.0])).all() and (shifts.amin(0) < torch.tensor([-4.5, -9.0])).all()


@pytest.mark.parametrize(
    ("size", "spacing", "in_plane", "kept"),
    [
        ((16, 32, 32), (5.0, 1.0, 1.0), None, 0),
        ((32, 32, 16), (1.0, 1.0, 3.1), None, 2),
        ((32, 32, 32), (3.0, 1.0, 1.0), None, None),
        ((32, 32, 32), (4.0, 4.0, 1.0), None, None),
        ((10, 32, 32), (1.0, 1.0, 1.0), None, 0),
        ((16, 32, 32), (5.0, 1.0, 1.0), False, None),
        ((32, 32, 32), (1.0, 1.2, 1.0), True, 1),
        ((32, 32, 32), (1.0, 1.0, 1.0), True, 0),
        ((4, 32), (5.0, 1.0), None, None),
        ((4, 32), (5.0, 1.0), True, None),
    ],
)
def test_a_coarse_axis_is_left_alone(size, spacing, in_plane, kept):
    ranges = AffineRange(rotation=30, scale=(0.8, 0.9), translation=0.2, in_plane=in_plane)
    moves = affines(20, size, ranges, spacing=spacing)
    unmoved = shift_by(*[0.0] * len(size))[0]
    for axis in range(len(size)):
        alone = torch.allclose(moves[:, axis], unmoved[axis].expand(20, -1), atol=1e-5)
        assert alone == (axis == kept)


def test_equal_seeds_agree_and_samples_and_seeds_differ():
    first, again, other = (affines(3, (8, 9, 10), seed=seed) for seed in (4, 4, 5))
    assert first.shape == (3, 3, 4) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_a_nan_spreads_to_its_neighbours_and_never_to_the_padding():
    image = torch.ones(1, 1, 9, 9)
    image[..., 4, 4] = torch.nan
    view, valid = warp_image(image, shift_by(2.5, 0.25))
    assert view.isnan().sum() == 4 and view[..., 6:8, 4:6].isnan().all()
    assert torch.equal(view[~valid], torch.zeros(int((~valid).sum())))
    view, valid = warp_image(torch.full((1, 1, 9, 9), torch.nan), shift_by(3.0, 0.0))
    assert torch.equal(view.isnan(), valid)


def test_autocast_changes_nothing_and_half_precision_images_are_read():
    image, moves = torch.randn(2, 1, 10, 12, 11), affines(2, (10, 12, 11))
    points = torch.rand(5, 3) * 10
    view, _ = warp_image(image, moves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(affines(2, (10, 12, 11)), moves)
        assert torch.equal(warp_image(image, moves)[0], view)
        inside = transform_points(points, compose(moves, invert_affine(moves)))
    torch.testing.assert_close(inside, points.expand(2, -1, -1), atol=1e-4, rtol=0)
    coarse, _ = warp_image(image.bfloat16(), moves)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), view, atol=0.05, rtol=0.02)


CROPS = [
    ((17, 24), (9, 11), (0.7, 1.3)),
    ((12, 20, 16), (8, 8, 10), (1.1, 0.7, 1.0)),
    ((9, 30, 28), (4, 12, 15), (5, 1, 1)),
]
"""Window, view and spacing: 2D, 3D, and an anisotropic patch whose slices are not resampled."""


def crops(batch, window, size, spacing, *, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return random_crop(
        batch, window, size, spacing=spacing, generator=generator, device="cpu", **{"side": (0.3, 1.0)} | more
    )


@pytest.mark.parametrize(("window", "size", "spacing"), CROPS)
def test_a_view_of_another_size_equals_scipys(window, size, spacing):
    image = torch.randn(3, 2, *window, dtype=torch.float64)
    for moves in (affines(3, window, spacing=spacing), crops(3, window, size, spacing, flip=0.5)):
        view, valid = warp_image(image, moves, size=size)
        assert view.shape == (3, 2, *size) and valid.shape == (3, 1, *size)
        for sample in range(3):
            points = source_points(moves[sample], size)
            inside = np.array([all(-0.5 <= x <= n - 0.5 for x, n in zip(p, window, strict=True)) for p in points.T])
            assert np.array_equal(valid[sample, 0].numpy().ravel(), inside)
            for channel in range(2):
                naive = map_coordinates(image[sample, channel].numpy(), points, order=1, mode="nearest")
                np.testing.assert_allclose(
                    view[sample, channel].numpy().ravel(), np.where(inside, naive, 0), atol=1e-10
                )


@pytest.mark.parametrize(("window", "size", "spacing"), CROPS)
def test_points_move_with_the_crop(window, size, spacing):
    """An image of its own coordinates: the value of a voxel of the view is the point that it shows."""
    moves = crops(4, window, size, spacing, flip=0.5)
    shown = warp_image(voxels_of(window).expand(4, -1, *window), moves, size=size)[0].flatten(2).transpose(1, 2)
    interior = ((shown > 0.01) & (shown < torch.tensor(window) - 1.01)).all(-1)
    assert interior.any(1).all()
    error = (transform_points(shown, moves) - voxels_of(size).flatten(1).T).norm(dim=-1)
    assert error[interior].max() < 1e-4
    turned = compose(affines(4, size, AffineRange(rotation=20), spacing=spacing), moves)
    assert warp_image(torch.zeros(4, 1, *window), turned, size=size)[0].shape == (4, 1, *size)


@pytest.mark.parametrize(("window", "size", "spacing"), CROPS)
def test_crops_lie_in_the_window_with_one_share_of_each_axis(window, size, spacing):
    moves = crops(500, window, size, spacing, side=(0.4, 0.8), flip=0.5)
    _, valid = warp_image(torch.zeros(500, 1, *window), moves, size=size)
    assert valid.all()
    faces = torch.stack([-torch.ones(len(size)) / 2, torch.tensor(size) - 0.5])
    box = transform_points(faces, invert_affine(moves)).sort(1).values
    assert (box[:, 0] > -0.501).all() and (box[:, 1] < torch.tensor(window) - 0.499).all()
    share = (box[:, 1] - box[:, 0]) / torch.tensor(window)
    in_plane = share[:, -2:]
    torch.testing.assert_close(in_plane[:, 0], in_plane[:, 1], atol=1e-4, rtol=0)
    assert 0.399 < share[:, -1].min() < 0.42 and 0.78 < share[:, -1].max() < 0.801
    centre = box.mean(1)[:, -2:] - (torch.tensor(window)[-2:] - 1) / 2
    assert (centre.mean(0).abs() < 0.06 * torch.tensor(window)[-2:]).all() and (centre.std(0) > 0.5).all()


def test_slices_of_a_coarse_axis_are_copied_and_all_of_them_are_drawn():
    image = torch.arange(9.0)[None, None, :, None, None].expand(300, 1, 9, 30, 28)
    for flip, step in ((0.0, 1.0), (1.0, -1.0)):
        view, _ = warp_image(image, crops(300, (9, 30, 28), (4, 12, 15), (5, 1, 1), flip=flip), size=(4, 12, 15))
        torch.testing.assert_close(view, view.round(), atol=1e-4, rtol=0)
        torch.testing.assert_close(view.diff(dim=2), torch.full((300, 1, 3, 12, 15), step), atol=1e-4, rtol=0)
        assert set(view[:, 0].round().amin((1, 2, 3)).int().tolist()) == set(range(6))


def test_the_whole_window_is_only_resized():
    image = torch.rand(2, 1, 6, 9)
    view, _ = warp_image(image, crops(2, (6, 9), (3, 4), (1, 1), side=(1.0, 1.0)), size=(3, 4))
    torch.testing.assert_close(view, F.interpolate(image, size=(3, 4), mode="bilinear"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"size": (4, 8)}, {"side": (0.0, 0.5)}, {"side": (0.5, 1.1)}, {"side": (0.9, 0.5)}, {"size": (10, 8, 8)}],
)
def test_crops_that_cannot_be_made_are_refused(wrong):
    with pytest.raises(ValueError, match=r"side|size"):
        crops(1, **{"window": (9, 30, 28), "size": (4, 8, 8), "spacing": (5, 1, 1)} | wrong)


@pytest.mark.parametrize(
    "wrong", [{"rotation": -1}, {"scale": (0, 1)}, {"scale": (1.2, 1.0)}, {"translation": -0.1}, {"flip": 1.5}]
)
def test_ranges_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AffineRange(**wrong)


def test_a_spacing_of_other_dimension_is_refused():
    with pytest.raises(ValueError, match="spacing"):
        affines(1, (8, 8, 8), spacing=(1.0, 1.0))


def one_step(device, generator):
    ranges = AffineRange(rotation=30, scale=(0.9, 1.2), translation=0.1, flip=0.5)
    moves = random_affine(2, (8, 8, 8), ranges, spacing=(1.0, 1.0, 1.0), generator=generator, device=device)
    centres = torch.zeros(8, 3, device=device)
    crop = random_crop(2, (8, 8, 8), (4, 4, 4), side=(0.4, 0.9), spacing=(1.0,) * 3, generator=generator, device=device)
    warp_image(torch.zeros(2, 1, 8, 8, 8, device=device), crop, size=(4, 4, 4))
    return *warp_image(torch.zeros(2, 1, 8, 8, 8, device=device), moves), transform_points(centres, moves)


def test_nothing_is_read_on_the_host():
    with FakeTensorMode():  # tensors without values: reading one raises
        view, valid, points = one_step("cpu", torch.Generator())
    assert view.shape == valid.shape == (2, 1, 8, 8, 8) and points.shape == (2, 8, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    generator = torch.Generator("cuda")
    one_step("cuda", generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step("cuda", generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
