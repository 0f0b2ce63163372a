"""What each rule of adaptation preserves, on random weights and images in double precision."""

from math import lcm

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_plugin.checkpoints.adaptation import rules

CONV = {2: F.conv2d, 3: F.conv3d}
UPSAMPLE = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def padded(size):
    return [(k - 1) // 2 for k in size]


def respond(image, weight):
    """A convolution padded as nnU-Net's are."""
    return CONV[weight.dim() - 2](image, weight, padding=padded(weight.shape[2:]))


def by_area(values, axis, size):
    """One axis resampled by area: repeated to the common multiple, then averaged."""
    values = values.movedim(axis, -1)
    common = lcm(values.shape[-1], size)
    fine = values.repeat_interleave(common // values.shape[-1], -1)
    return fine.unflatten(-1, (size, common // size)).mean(-1).movedim(-1, axis)


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("before", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_replicated_channels_get_the_same_response(before, after):
    weight, image = random(4, before, 3, 3, 3), random(2, 1, 6, 5, 4)
    adapted = rules.input_channels(weight, after)
    assert adapted.shape == (4, after, 3, 3, 3)
    close(respond(image.expand(-1, after, -1, -1, -1), adapted), respond(image.expand(-1, before, -1, -1, -1), weight))
    if before == after:
        assert torch.equal(adapted, weight)


def test_channels_are_repeated_in_turn_and_summed_in_turn():
    weight = random(4, 2, 3, 3)
    more = rules.input_channels(weight, 3)
    assert torch.equal(more, torch.stack((weight[:, 0] / 2, weight[:, 1], weight[:, 0] / 2), 1))
    fewer = rules.input_channels(more, 2)
    close(fewer, weight)
    close(rules.input_channels(random(1, 4, 1, 1).fill_(1), 1), torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 3, 3), (3, 3, 3)), ((3, 3), (7, 5)), ((1, 1, 1), (3, 3, 3)), ((2, 3), (3, 4)), ((3, 3, 3), (3, 3, 3))],
)
def test_a_larger_kernel_answers_every_image_alike(before, after):
    weight, image = random(3, 2, *before), random(1, 2, *[9] * len(before))
    adapted = rules.kernel(weight, after)
    assert adapted.shape[2:] == after
    size = [9 + 2 * p - k + 1 for p, k in zip(padded(after), after, strict=True)]
    expected = respond(image, weight)[(..., *[slice(0, s) for s in size])]  # even kernels lose the last positions
    close(respond(image, adapted)[(..., *[slice(0, s) for s in expected.shape[2:]])], expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, 3, 3), (1, 3, 3)),
        ((5, 3, 3), (3, 1, 3)),
        ((7, 7), (3, 3)),
        ((4, 3, 3), (3, 3, 3)),
        ((3, 3, 3), (2, 3, 3)),
        ((3, 3), (1, 1)),
    ],
)
def test_a_smaller_kernel_answers_images_alike_that_are_constant_along_the_shortened_axes(before, after):
    weight = random(3, 2, *before)
    varying = [1 if b != a else 12 for b, a in zip(before, after, strict=True)]
    image = random(1, 2, *varying).expand(1, 2, *[12] * len(before))
    inside = (..., *[slice(4, 7)] * len(before))  # away from the border, where padding is seen
    close(respond(image, rules.kernel(weight, after))[inside], respond(image, weight)[inside])


def test_taps_that_fall_outside_are_added_to_the_nearest():
    weight = torch.tensor([1.0, 2, 4, 8, 16]).view(1, 1, 5, 1)
    assert rules.kernel(weight, (3, 1)).flatten().tolist() == [3, 4, 24]
    assert rules.kernel(weight, (1, 1)).flatten().tolist() == [31]
    assert rules.kernel(weight, (7, 1)).flatten().tolist() == [0, 1, 2, 4, 8, 16, 0]


@pytest.mark.parametrize(
    ("before", "after"),
    [((8, 8, 8), (16, 16, 16)), ((4, 4, 4), (1, 2, 8)), ((6, 6), (4, 9)), ((8, 8, 8), (2, 12, 5)), ((4, 4), (4, 4))],
)
def test_a_patch_gets_the_response_of_the_patch_resampled_to_the_old_size(before, after):
    weight, patch = random(5, 2, *before), random(3, 2, *after)
    resampled = patch
    for axis, size in enumerate(before, start=2):
        resampled = by_area(resampled, axis, size)
    adapted = rules.patch_kernel(weight, after)
    close(torch.einsum("oi...,bi...->bo", adapted, patch), torch.einsum("oi...,bi...->bo", weight, resampled))
    close(adapted.flatten(2).sum(-1), weight.flatten(2).sum(-1))  # constant images
    assert before != after or torch.equal(adapted, weight)


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2, 2), (1, 2, 2)), ((1, 2, 2), (2, 2, 2)), ((2, 2), (4, 3)), ((2, 2, 2), (2, 2, 2))]
)
def test_upsampling_gives_the_old_cells_resampled(before, after):
    weight, maps = random(3, 2, *before), random(1, 3, *[3] * len(before))
    old = UPSAMPLE[len(before)](maps, weight, stride=before)
    expected = old
    for axis, size in enumerate(after, start=2):
        expected = by_area(expected, axis, 3 * size)
    adapted = rules.upsampling(weight, after)
    new = UPSAMPLE[len(before)](maps, adapted, stride=after)
    close(new, expected)
    close(new.flatten(2).mean(-1), old.flatten(2).mean(-1))
    constant = rules.upsampling(torch.full_like(weight, 0.5), after)
    assert torch.equal(constant, torch.full_like(constant, 0.5))


def test_inflated_kernels_answer_images_constant_along_the_new_axis_as_slices():
    weight, image = random(4, 2, 3, 3), random(1, 2, 8, 8)
    volume = image.unsqueeze(2).expand(-1, -1, 7, -1, -1)
    for depth in (1, 3, 5):
        inflated = rules.inflate(weight, depth, mean=True)
        close(respond(volume, inflated)[:, :, 3], respond(image, weight))
        close(rules.flatten(inflated, mean=False), weight)


def test_inflated_upsampling_repeats_and_flattens_back():
    weight, maps = random(4, 2, 2, 2), random(1, 4, 5, 5)
    inflated = rules.inflate(weight, 2, mean=False)
    volume = F.conv_transpose3d(maps.unsqueeze(2), inflated, stride=2)
    expected = F.conv_transpose2d(maps, weight, stride=2)
    close(volume[:, :, 0], expected)
    close(volume[:, :, 1], expected)
    close(rules.flatten(inflated, mean=True), weight)


def test_flattened_kernels_answer_a_slice_as_the_volume_that_repeats_it():
    weight, image = random(4, 2, 3, 3, 3), random(1, 2, 8, 8)
    volume = image.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    close(respond(image, rules.flatten(weight, mean=False)), respond(volume, weight)[:, :, 2])


def linear(values, size):
    """Linear interpolation of the first axis between cell centres, held at the ends, by NumPy."""
    before = len(values)
    places = (np.arange(size) + 0.5) * before / size - 0.5
    flat = values.reshape(before, -1)
    columns = [np.interp(places, np.arange(before), column) for column in flat.T]
    return np.stack(columns, 1).reshape(size, *values.shape[1:])


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3, 4), (5, 3, 7)), ((4, 4, 4), (2, 6, 3)), ((3, 5), (4, 4)), ((1, 3, 3), (4, 3, 3))]
)
def test_positions_are_interpolated_axis_by_axis(before, after):
    embedding = random(1, int(np.prod(before)), 6)
    expected = embedding.numpy().reshape(*before, 6)
    for axis, size in enumerate(after):
        expected = np.moveaxis(linear(np.moveaxis(expected, axis, 0), size), 0, axis)
    close(rules.positions(embedding, before, after), torch.from_numpy(expected.reshape(1, -1, 6)))


def test_positions_constant_along_an_axis_stay_so_and_equal_grids_change_nothing():
    embedding = random(1, 1, 4, 3, 8).expand(1, 5, 4, 3, 8).reshape(1, 60, 8)
    resampled = rules.positions(embedding, (5, 4, 3), (9, 2, 3)).reshape(9, 2, 3, 8)
    close(resampled, resampled[:1].expand_as(resampled))
    assert torch.equal(rules.positions(embedding, (5, 4, 3), (5, 4, 3)), embedding)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_wider_layer_answers_as_before_in_its_first_channels_whatever_the_new_inputs(parts):
    weight, fresh = random(4, 6, 3, 3), random(7, 10, 3, 3)
    old, new = random(1, 6, 5, 5), random(1, 10, 5, 5)
    widened, taken = rules.first_channels(weight, fresh, parts=parts)
    for part in range(parts):
        new[:, part * 10 // parts : part * 10 // parts + 6 // parts] = old.chunk(parts, 1)[part]
    close(respond(new, widened)[:, :4], respond(old, weight))
    assert torch.equal(widened[4:], fresh[4:]) and taken == weight.numel()


def test_wider_upsampling_answers_as_before_in_its_first_channels():
    weight, fresh, new = random(3, 2, 2, 2), random(5, 4, 2, 2), random(1, 5, 3, 3)
    widened, taken = rules.first_channels(weight, fresh, out_axis=1)
    close(F.conv_transpose2d(new, widened, stride=2)[:, :2], F.conv_transpose2d(new[:, :3], weight, stride=2))
    assert torch.equal(widened[:, 2:], fresh[:, 2:]) and taken == weight.numel()


def test_a_narrower_layer_has_the_first_channels():
    weight, bias = random(6, 8, 3, 3), random(6)
    narrowed, taken = rules.first_channels(weight, random(4, 6, 3, 3), parts=2)
    assert torch.equal(narrowed, torch.cat((weight[:4, :3], weight[:4, 4:7]), 1)) and taken == narrowed.numel()
    assert torch.equal(rules.first_channels(bias, random(4))[0], bias[:4])
    fresh = random(9)
    wider, taken = rules.first_channels(bias, fresh)
    assert torch.equal(wider, torch.cat((bias, fresh[6:]))) and taken == 6


def test_nothing_is_changed_in_place():
    weight, fresh = random(4, 4, 3, 3), random(8, 8, 3, 3)
    before = weight.clone(), fresh.clone()
    rules.input_channels(weight, 2)
    rules.kernel(weight, (1, 5))
    rules.patch_kernel(weight, (2, 4))
    rules.upsampling(weight, (2, 4))
    rules.first_channels(weight, fresh)
    assert torch.equal(weight, before[0]) and torch.equal(fresh, before[1])


def test_grids_of_tokens_are_counted_with_their_order():
    assert rules.grids(27, 3) == [(3, 3, 3)] and rules.grids(49, 2) == [(7, 7)]
    assert sorted(rules.grids(12, 3)) == [(2, 2, 3), (2, 3, 2), (3, 2, 2)]
    assert rules.grids(13, 3) == [] and len(rules.grids(512, 3)) > 1
