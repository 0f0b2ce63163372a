"""Dice, HD95 and NSD of two masks: against brute force, MONAI's own metrics, and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from nnssl_plugin.tasks.segmentation import surfaces
from nnssl_plugin.tasks.segmentation.surfaces import score_masks, score_overlap, surface_distances

SPACINGS = {2: (0.7, 1.9), 3: (3.0, 0.8, 1.1)}


def blobs(rng, shape):
    """Two overlapping ragged masks, touching the border now and then."""
    grids = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    masks = []
    for _ in range(2):
        centre = rng.uniform(-0.4, 0.4, len(shape))
        radius = sum((grid - c) ** 2 for grid, c in zip(grids, centre, strict=True)) ** 0.5
        masks.append(radius + rng.normal(0, 0.15, shape) < 0.7)
    return masks


def naive_surface(mask):
    """Voxels of the mask with a face neighbour that is outside it or outside the image."""
    found = []
    for index in map(tuple, np.argwhere(mask)):
        neighbours = [
            tuple(i + step * (a == axis) for a, i in enumerate(index)) for axis in range(mask.ndim) for step in (-1, 1)
        ]
        inside = [all(0 <= i < n for i, n in zip(near, mask.shape, strict=True)) and mask[near] for near in neighbours]
        found += [] if all(inside) else [index]
    return found


def naive_distances(surface, other, spacing):
    return [
        min(sum(((i - j) * s) ** 2 for i, j, s in zip(p, q, spacing, strict=True)) ** 0.5 for q in other)
        for p in surface
    ]


@pytest.mark.parametrize("shape", [(13, 9), (3, 12), (7, 8, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_brute_force(shape, seed):
    prediction, reference = blobs(np.random.default_rng(seed), shape)
    spacing = SPACINGS[len(shape)]
    surface_p, surface_r = naive_surface(prediction), naive_surface(reference)
    there, back = naive_distances(surface_p, surface_r, spacing), naive_distances(surface_r, surface_p, spacing)
    scores = score_masks(prediction, reference, spacing=spacing, tolerance_mm=1.0)
    overlap = sum(prediction[i] and reference[i] for i in np.ndindex(shape))
    assert scores.dice == 2 * overlap / (prediction.sum() + reference.sum())
    assert scores.hd95_mm == pytest.approx(max(np.quantile(there, 0.95), np.quantile(back, 0.95)), rel=1e-5)
    assert scores.nsd == pytest.approx(sum(d <= 1.0 for d in there + back) / len(there + back))


@pytest.mark.parametrize("shape", [(31, 27), (15, 20, 17)])
@pytest.mark.parametrize("tolerance", [0.0, 0.8, 2.5])
def test_scores_are_those_of_monai(shape, tolerance):
    prediction, reference = blobs(np.random.default_rng(8), shape)
    spacing = SPACINGS[len(shape)]
    scores = score_masks(prediction, reference, spacing=spacing, tolerance_mm=tolerance)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    hd95 = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=spacing)
    assert scores.hd95_mm == pytest.approx(hd95.item(), rel=1e-5)
    assert scores.nsd == pytest.approx(nsd.item(), rel=1e-5)


def test_a_shifted_cube_has_the_distances_of_the_shift():
    reference = np.zeros((20, 20, 20), dtype=bool)
    reference[5:11, 5:11, 5:11] = True
    prediction = np.roll(reference, 2, axis=0)  # 6 voxels of edge, 2 * 1.5 mm further along the first axis
    scores = score_masks(prediction, reference, spacing=(1.5, 1, 1), tolerance_mm=2.9)
    assert scores.dice == 4 / 6
    assert scores.hd95_mm == 3.0
    # on either surface only the protruding face (6 * 6 voxels) is 3 mm away; no other voxel is more than 2 mm
    surface = 6**3 - 4**3
    assert scores.nsd == pytest.approx(1 - 36 / surface)
    assert score_masks(prediction, reference, spacing=(1.5, 1, 1), tolerance_mm=3.0).nsd == 1.0


def test_two_voxels_are_as_far_apart_as_their_centres():
    prediction, reference = np.zeros((2, 9, 9), dtype=bool)
    prediction[1, 2], reference[4, 6] = True, True
    scores = score_masks(prediction, reference, spacing=(2.0, 0.5), tolerance_mm=6.0)
    assert (scores.dice, scores.nsd) == (0.0, 0.0)
    assert scores.hd95_mm == pytest.approx(np.hypot(6.0, 2.0))


def test_equal_masks_score_best():
    mask, _ = blobs(np.random.default_rng(0), (9, 9, 9))
    scores = score_masks(mask, mask, spacing=(5.0, 1.0, 1.0), tolerance_mm=0.0)
    assert (scores.dice, scores.hd95_mm, scores.nsd) == (1.0, 0.0, 1.0)


def test_both_empty_is_not_defined():
    empty = np.zeros((4, 5, 6), dtype=bool)
    scores = score_masks(empty, empty, spacing=(1, 1, 1))
    assert np.isnan([scores.dice, scores.hd95_mm, scores.nsd]).all()


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_costs_the_diagonal_of_the_image(missed):
    empty, full = np.zeros((4, 5, 6), dtype=bool), np.ones((4, 5, 6), dtype=bool)
    pair = (empty, full) if missed else (full, empty)
    scores = score_masks(*pair, spacing=(3.0, 1.0, 0.5))
    assert (scores.dice, scores.nsd) == (0.0, 0.0)
    assert scores.hd95_mm == pytest.approx((12**2 + 5**2 + 3**2) ** 0.5)
    assert (scores.n_prediction == 0, scores.n_reference == 0) == (missed, not missed)


def test_no_error_costs_more_than_a_missed_structure():
    shape, spacing = (6, 7, 8), (2.0, 1.0, 1.0)
    first, last = np.zeros((2, *shape), dtype=bool)
    first[0, 0, 0], last[-1, -1, -1] = True, True
    missed = score_masks(np.zeros(shape, dtype=bool), last, spacing=spacing).hd95_mm
    assert score_masks(first, last, spacing=spacing).hd95_mm < missed


@pytest.mark.parametrize("shape", [(40, 33), (22, 25, 24)])
def test_cutting_the_masks_out_changes_no_number(shape):
    rng = np.random.default_rng(4)
    for corner in itertools.product((0, 5), repeat=2):
        small = blobs(rng, tuple(n // 2 for n in shape))
        masks = np.zeros((2, *shape), dtype=bool)
        place = tuple(slice(at, at + n // 2) for at, n in zip((*corner, 3), shape, strict=False))
        masks[0][place], masks[1][place] = small
        spacing = SPACINGS[len(shape)]
        there, back = surface_distances(*masks, spacing=spacing)  # in the whole image
        scores = score_masks(*masks, spacing=spacing, tolerance_mm=1.2)
        assert scores.hd95_mm == max(np.percentile(there, 95), np.percentile(back, 95))
        assert scores.nsd == np.mean(np.concatenate([there, back]) <= 1.2)


def test_distances_are_measured_in_the_small_box_only(monkeypatch):
    measured = []
    masks = np.zeros((2, 60, 60, 60), dtype=bool)
    masks[0, 10:14, 20:25, 30:36], masks[1, 11:15, 20:25, 59:60] = True, True
    original = surfaces.surface_distances
    monkeypatch.setattr(
        surfaces, "surface_distances", lambda p, r, **options: measured.append(p.shape) or original(p, r, **options)
    )
    score_masks(*masks, spacing=(1, 1, 1))
    assert measured == [(7, 7, 31)]  # one voxel more on each side, except where the image ends


def test_dice_alone_is_the_dice_of_all():
    masks = blobs(np.random.default_rng(0), (9, 8, 7))
    alone, all_metrics = (score(*masks, spacing=(1, 1, 1)) for score in (score_overlap, score_masks))
    assert (alone.dice, alone.n_prediction) == (all_metrics.dice, all_metrics.n_prediction)
    empty = np.zeros((9, 8, 7), dtype=bool)
    assert score_overlap(masks[0], empty, spacing=(1, 1, 1)).dice == 0
    assert np.isnan(score_overlap(empty, empty, spacing=(1, 1, 1)).dice)
