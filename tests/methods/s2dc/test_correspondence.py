"""Which patches correspond (Eqs. 2 and 3) and the losses on them (Eqs. 4 to 8), against loops and closed forms."""

import math

import numpy as np
import pytest
import torch

from nnssl_plugin.methods.s2dc.correspondence import (
    non_match_loss,
    patch_correspondence,
    patch_to_patch_loss,
    patch_to_structure_loss,
    patch_weights,
    sharpe_ratio,
    visible_patches,
)
from nnssl_plugin.networks.token_grid import TokenGrid
from nnssl_plugin.objectives.contrastive import dual_softmax, log_dual_softmax
from nnssl_plugin.transforms.affine import AffineRange, invert_affine, random_affine, warp_image

GRID, SIZE = (6, 6, 6), (96, 96, 96)


def cells(grid, size):
    """Tokens in the middle of the cells that a grid cuts an image into, as patch embeddings have them."""
    spacing = tuple(s // g for s, g in zip(size, grid, strict=True))
    return TokenGrid(grid, tuple((s - 1) / 2 for s in spacing), spacing)


TOKENS = cells(GRID, SIZE)
STRIDED = TokenGrid(GRID, (0.0, 0.0, 0.0), (16, 16, 16))
"""As strided convolutions with padding have them."""


def about_centre(linear, size, shift=None):
    """The affine (1, d, d+1) that applies ``linear`` about the centre of an image, then shifts it (voxels)."""
    linear = torch.as_tensor(linear, dtype=torch.float32)
    centre = (torch.tensor(size, dtype=torch.float32) - 1) / 2
    offset = centre - linear @ centre + (0 if shift is None else torch.tensor(shift, dtype=torch.float32))
    return torch.cat((linear, offset[:, None]), 1)[None]


def rotation(degrees, axes=(1, 2), dims=3):
    matrix, angle = torch.eye(dims, dtype=torch.float64), math.radians(degrees)
    first, second = axes
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def by_loops(affine, tokens, mutual=True):
    """Eqs. 2 and 3 as printed (half-open): one pair of patches after the other."""
    affine, cell = affine[0].double().numpy(), np.array(tokens.spacing)
    linear, offset = affine[:, :-1], affine[:, -1]
    centres = np.array([np.array(tokens.offset) + np.array(index) * cell for index in np.ndindex(*tokens.counts)])
    there, back = centres @ linear.T + offset, (centres - offset) @ np.linalg.inv(linear).T

    def near(first, second):
        return all(-half <= a - b < half for a, b, half in zip(first, second, cell / 2, strict=True))

    pairs = [
        [near(there[i], centres[j]) and (not mutual or near(back[j], centres[i])) for j in range(len(centres))]
        for i in range(len(centres))
    ]
    return torch.tensor(pairs)


def is_partial_permutation(matches):
    return matches.sum(1).max() <= 1 and matches.sum(2).max() <= 1


def test_the_identity_matches_every_patch_with_itself():
    matches = patch_correspondence(about_centre(torch.eye(3), SIZE), TOKENS)
    assert torch.equal(matches[0], torch.eye(216, dtype=torch.bool))


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_a_quarter_turn_is_a_permutation(axes):
    matches = patch_correspondence(about_centre(rotation(90, axes), SIZE), TOKENS)
    assert matches.sum() == 216 and is_partial_permutation(matches)
    turned = torch.arange(216).view(GRID).rot90(-1, axes)  # what stands where after the turn
    again = torch.arange(216).view(GRID).rot90(1, axes)
    found = matches[0].int().argmax(1).view(GRID)
    assert torch.equal(found, turned) or torch.equal(found, again)
    assert not torch.equal(found, torch.arange(216).view(GRID))


@pytest.mark.parametrize("axis", range(3))
def test_a_shift_by_one_patch_keeps_five_of_six_layers(axis):
    shift = [0.0, 0.0, 0.0]
    shift[axis] = 16.0
    matches = patch_correspondence(about_centre(torch.eye(3), SIZE, shift), TOKENS)
    assert matches.sum() == 180
    first, second = matches[0].nonzero(as_tuple=True)
    assert ((second - first) == (36, 6, 1)[axis]).all()


def test_the_way_back_matters():
    in_plane = 1.1 * rotation(17)
    in_plane[0, 0] = 1
    centred, shifted = (about_centre(in_plane, SIZE, shift) for shift in ((0, 0, 0), (0, -3, -1)))
    for affine in (centred, shifted):
        matches = patch_correspondence(affine, TOKENS)
        assert matches.sum() == 168 and is_partial_permutation(matches)
    assert by_loops(shifted, TOKENS, mutual=False).sum() == 174
    shrunk = by_loops(invert_affine(centred), TOKENS, mutual=False)
    assert shrunk.sum() == 216 and shrunk.sum(0).max() == 2  # two patches fall into one


def test_under_a_flip_strided_tokens_match_those_that_lie_where_they_go():
    """Token i of a strided convolution lies at 16 i, and a flip of 96 voxels moves it to 95 − 16 i, nearest to token
    6 − i: the first one goes to where there is none. Tokens in the middle of their cells would match 5 − i."""
    matches = patch_correspondence(about_centre(torch.diag(torch.tensor([-1.0, 1, 1])), SIZE), STRIDED)
    found = matches[0].nonzero().tolist()
    assert len(found) == 5 * 36
    for first, second in found:
        (i, *others), (j, *same) = np.unravel_index(first, GRID), np.unravel_index(second, GRID)
        assert i + j == 6 and others == same


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [(0.0, 0.0, 0.0), (3.75, 0.0, 7.5)])
def test_matches_of_strided_tokens_are_those_of_the_loop(seed, offset):
    ranges = AffineRange(rotation=30, scale=(0.9, 1.2), translation=0.0625, flip=0.5)
    generator = torch.Generator().manual_seed(seed)
    affine = random_affine(1, (64, 48, 48), ranges, spacing=(1, 1, 1), generator=generator, device="cpu")
    tokens = TokenGrid((4, 3, 3), offset, (16, 16, 16))
    matches = patch_correspondence(affine, tokens)
    assert torch.equal(matches[0], by_loops(affine, tokens)) and matches.sum() > 0


def test_half_a_patch_of_shift_matches_nothing_twice():
    for shift in (8.0, -8.0):
        matches = patch_correspondence(about_centre(torch.eye(3), SIZE, (shift, 0, 0)), TOKENS)
        assert is_partial_permutation(matches)


@pytest.mark.parametrize(
    "grid, size, spacing",
    [
        ((4, 5, 3), (24, 40, 27), (3.0, 1.0, 1.0)),
        ((1, 4, 4), (5, 32, 32), (5.0, 0.7, 0.7)),
        ((6, 5), (30, 20), (1.0, 2.0)),
    ],
)
def test_equals_a_loop_over_pairs_for_random_affines(grid, size, spacing):
    ranges = AffineRange(rotation=30, scale=(0.9, 1.2), translation=0.2, flip=0.3)
    affine = random_affine(6, size, ranges, spacing=spacing, generator=torch.Generator().manual_seed(0), device="cpu")
    matches = patch_correspondence(affine, cells(grid, size))
    assert is_partial_permutation(matches)
    for one, found in zip(affine, matches, strict=True):
        assert torch.equal(found, by_loops(one[None], cells(grid, size)))


def test_swapping_the_views_transposes_the_matches():
    ranges = AffineRange(rotation=40, scale=(0.8, 1.3), translation=0.1)
    affine = random_affine(8, SIZE, ranges, spacing=(1, 1, 1), generator=torch.Generator().manual_seed(3), device="cpu")
    there = patch_correspondence(affine, TOKENS)
    back = patch_correspondence(invert_affine(affine), TOKENS)
    assert torch.equal(there, back.mT) and there.sum() > 0


def test_a_view_that_left_the_window_has_no_matches():
    assert patch_correspondence(about_centre(torch.eye(3), SIZE, (200.0, 0, 0)), TOKENS).sum() == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.0)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_matched_patches_show_the_same_blob(spacing, flip):
    """Every patch is a blob of a brightness of its own; the centre of its match shows this brightness."""
    size, grid, edge = (45, 54, 54), (5, 6, 6), 9
    brightness = torch.from_numpy(np.random.default_rng(0).permutation(180) + 50.0).float()
    blobs = brightness.view(grid)
    for axis in range(3):
        blobs = blobs.repeat_interleave(edge, axis)
    ranges = AffineRange(rotation=25, scale=(0.9, 1.2), translation=0.1, flip=flip, in_plane=False)
    affine = random_affine(4, size, ranges, spacing=spacing, generator=torch.Generator().manual_seed(1), device="cpu")
    view, valid = warp_image(blobs.expand(4, 1, *size), affine)
    matches = (
        patch_correspondence(affine, cells(grid, size)) & visible_patches(view, valid, cells(grid, size))[:, None, :]
    )
    back = invert_affine(affine).double()
    found = wrong = 0
    for sample, first, second in matches.nonzero().tolist():
        centre, home = (torch.tensor(np.unravel_index(index, grid)) * edge + edge // 2 for index in (second, first))
        seen = back[sample, :, :3] @ centre.double() + back[sample, :, 3]
        if (seen - home).abs().max() > edge / 2 - 0.5:
            continue  # between two blobs, where interpolation mixes them
        found += 1
        wrong += abs(view[sample, 0][tuple(centre)] - brightness[first]).item() > 0.01
    assert found > 150 and wrong == 0


def test_padding_shows_nothing():
    image = torch.randn(2, 3, 16, 16, 16)
    image[0, :, :8] = 0  # outside the case
    valid = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    valid[1, :, :, :5] = False  # 3 of 8 voxels are left of the first patches
    seen = visible_patches(image, valid, cells((2, 2, 2), (16, 16, 16))).view(2, 2, 2, 2)
    assert not seen[0, 0].any() and seen[0, 1].all()
    assert not seen[1, :, 0].any() and seen[1, :, 1].all()


def test_of_a_patch_that_leaves_the_image_what_the_image_holds_counts():
    tokens = TokenGrid((2, 2), (0.0, 0.0), (8, 8))  # the first patches reach from voxel −4 to 4
    image, valid = torch.ones(2, 1, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    assert visible_patches(image, valid, tokens).all()
    valid[0, :, :3] = False  # 3 of the 4.5 voxels that the first patches have in the image
    valid[1, :, :2] = False
    seen = visible_patches(image, valid, tokens).view(2, 2, 2)
    assert not seen[0, 0].any() and seen[0, 1].all() and seen[1].all()


# ---------------------------------------------------------------------- losses


@pytest.fixture
def example():
    """Log assignment, matches and similarities of three samples; the last has no match."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(3, 7, 7, generator=generator, dtype=torch.float64) * 2 - 1
    matches = torch.zeros(3, 7, 7, dtype=torch.bool)
    for i, j in ((0, 2), (3, 3), (5, 0)):
        matches[0, i, j] = True
    matches[1] = torch.eye(7, dtype=torch.bool)
    return log_dual_softmax(similarity, 0.1), matches, similarity


def test_patch_to_patch_equals_a_loop(example):
    log_assignment, matches, similarity = example
    expected = []
    for sample in range(3):
        terms = [
            math.log(
                torch.softmax(similarity[sample, i] / 0.1, 0)[j] * torch.softmax(similarity[sample, :, j] / 0.1, 0)[i]
            )
            for i, j in matches[sample].nonzero().tolist()
        ]
        expected.append(-sum(terms) / max(len(terms), 1))
    torch.testing.assert_close(patch_to_patch_loss(log_assignment, matches), torch.tensor(expected).double())


def test_identical_separable_features_have_no_loss_and_constant_ones_twice_log_n():
    matches = torch.eye(144, dtype=torch.bool)[None]
    perfect = log_dual_softmax(torch.eye(144, dtype=torch.float64)[None], 0.01)
    assert patch_to_patch_loss(perfect, matches).item() < 1e-20
    constant = log_dual_softmax(torch.ones(1, 144, 144, dtype=torch.float64), 0.1)
    assert patch_to_patch_loss(constant, matches).item() == pytest.approx(2 * math.log(144), abs=1e-12)


def test_without_a_temperature_144_tokens_keep_a_large_loss():
    simplex = torch.full((144, 144), -1 / 143, dtype=torch.float64).fill_diagonal_(1)[None]
    matches = torch.eye(144, dtype=torch.bool)[None]
    assert patch_to_patch_loss(log_dual_softmax(simplex, 1.0), matches).item() == pytest.approx(7.95, abs=0.01)
    assert patch_to_patch_loss(log_dual_softmax(simplex, 0.1), matches).item() == pytest.approx(0.012, abs=1e-3)


def test_patch_to_structure_equals_a_loop(example):
    log_assignment, matches, similarity = example
    expected = []
    for each, sims, found in zip(log_assignment, similarity, matches, strict=True):
        rows = [(row.max() - row.mean()) / row.std() for row in sims]
        columns = [(column.max() - column.mean()) / column.std() for column in sims.T]
        first, second = torch.stack(rows).softmax(0), torch.stack(columns).softmax(0)
        expected.append(-sum((first[i] + second[j]) / 2 * each[i, j] for i, j in found.nonzero().tolist()))
    torch.testing.assert_close(patch_to_structure_loss(*example), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_no_matches_give_zero_with_a_graph(example):
    _, matches, similarity = example
    similarity = similarity.float().requires_grad_()
    log_assignment = log_dual_softmax(similarity, 0.1)
    loss = (
        patch_to_patch_loss(log_assignment, matches)[2]
        + patch_to_structure_loss(log_assignment, matches, similarity)[2]
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(similarity.grad[2], torch.zeros(7, 7))


def test_non_matches_are_pushed_apart_by_their_mean(example):
    log_assignment, matches, similarity = example
    assigned = dual_softmax(similarity, 0.1)
    expected = [-torch.log(1 - a[~m]).mean() for a, m in zip(assigned, matches, strict=True)]
    torch.testing.assert_close(non_match_loss(log_assignment, matches), torch.stack(expected))
    certain = torch.zeros(1, 2, 2, requires_grad=True)  # log 1 where nothing corresponds
    loss = non_match_loss(certain, torch.eye(2, dtype=torch.bool)[None])
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(certain.grad).all()


def test_sharpe_ratio_of_one_peak():
    one_hot = torch.eye(144, dtype=torch.float64)[None]
    assert sharpe_ratio(one_hot).mean().item() == pytest.approx(143 / 12, rel=1e-6)  # 11.9167
    above_mean, variance = 1 - 1 / 144, one_hot[0, 0].var(correction=0)
    assert (above_mean / variance.sqrt()).item() == pytest.approx(math.sqrt(143), abs=1e-9)  # with a population's σ
    assert (above_mean / variance).item() == pytest.approx(144, abs=1e-9)  # with the variance of the paper's text


def test_sharpe_ratio_ignores_scale_and_offset_and_is_low_for_several_peaks():
    similarity = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sharpe_ratio(3.7 * similarity - 2), sharpe_ratio(similarity), rtol=1e-6, atol=0)
    peaks = torch.zeros(2, 40, dtype=torch.float64)
    peaks[0, 0], peaks[1, :6] = 1, 1
    single, several = sharpe_ratio(peaks)
    assert single > 2 * several


def test_sharpe_ratio_of_a_constant_row_is_zero_with_a_finite_gradient():
    constant = torch.full((1, 4, 9), 0.3, requires_grad=True)
    ratio = sharpe_ratio(constant)
    ratio.sum().backward()
    assert ratio.abs().max() < 1e-3 and torch.isfinite(constant.grad).all()
    assert sharpe_ratio(torch.ones(1, 1, 1)).item() == 0


def test_weights_sum_to_one_and_swap_with_the_views(example):
    similarity = example[2]
    first, second = patch_weights(similarity)
    weights = first[:, :, None] + second[:, None, :]
    rows = 2 * weights.mean(2) - 1 / 7  # the mean over the other view leaves this view's softmax
    torch.testing.assert_close(rows.sum(1), torch.ones(3).double())
    torch.testing.assert_close(weights.sum((1, 2)), torch.full((3,), 7.0).double())
    for swapped, expected in zip(patch_weights(similarity.mT), (second, first), strict=True):
        torch.testing.assert_close(swapped, expected)


def test_gathered_pairs_have_the_losses_and_gradients_of_the_whole_matrix(example):
    _, matches, similarity = example

    def whole(log_assignment, similarity):
        first, second = patch_weights(similarity)
        found = torch.where(matches, log_assignment, 0.0)
        p2p = -found.sum((1, 2)) / matches.sum((1, 2)).clamp(min=1)
        return p2p, -((first[:, :, None] + second[:, None, :]) * found).sum((1, 2))

    def gathered(log_assignment, similarity):
        return (
            patch_to_patch_loss(log_assignment, matches),
            patch_to_structure_loss(log_assignment, matches, similarity),
        )

    results = []
    for losses in (whole, gathered):
        variable = similarity.clone().requires_grad_()
        terms = torch.stack(losses(log_dual_softmax(variable, 0.1), variable))
        (terms * torch.arange(1.0, 7.0).double().view(2, 3)).sum().backward()
        results.append((terms.detach(), variable.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_equal_sharpe_ratios_make_it_the_mean_over_all_tokens(example):
    log_assignment, matches, _ = example
    circulant = torch.stack([torch.arange(7.0).double().roll(shift) for shift in range(7)])[None]
    ours = patch_to_structure_loss(log_assignment, matches, circulant.expand(3, 7, 7))
    torch.testing.assert_close(ours, patch_to_patch_loss(log_assignment, matches) * matches.sum((1, 2)) / 7)
