"""Readouts voxel by voxel: hypercolumns against SciPy's interpolation, and voxels counted once."""

import numpy as np
import pytest
import torch
from labelled_structures import CASES, FOLD, opened, rewrite, write_labelled
from scipy.ndimage import map_coordinates
from small_patch_vit import with_patch_vit

from nnssl_plugin.features import hypercolumns, voxels
from nnssl_plugin.features.hypercolumns import encoded, slabs
from nnssl_plugin.features.voxels import UNKNOWN, Draw


def test_maps_are_read_between_tokens_as_scipy_does(nnunet_environment, monkeypatch):
    _, backbone = opened(*write_labelled())
    features = [
        torch.randn(2, c, *(16 // s for s in strides)) for c, strides in zip((4, 8, 16), backbone.strides, strict=True)
    ]
    monkeypatch.setattr(hypercolumns, "SLAB_VALUES", 2 * 28 * 16 * 16 * 5)  # five rows, then what is left
    pieces = list(slabs(backbone, features, (16, 16, 16)))
    assert [rows.stop - rows.start for rows, _ in pieces] == [5, 5, 5, 1]
    voxel = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij"))
    for stage, maps in enumerate(features):
        read = torch.cat([of_stages[stage] for _, of_stages in pieces], 2)
        grid = backbone.stage_grid(stage, maps.shape[2:])
        place = (voxel - np.reshape(grid.offset, (3, 1, 1, 1))) / np.reshape(grid.spacing, (3, 1, 1, 1))
        expected = map_coordinates(maps[1, 2].double().numpy(), place, order=1, mode="nearest")
        np.testing.assert_allclose(read[1, 2].numpy(), expected, atol=1e-5)
    chosen = torch.randint(16, (50, 3), dtype=torch.float32)
    columns = hypercolumns.hypercolumns(backbone, features, 1, chosen)
    whole = torch.cat([torch.cat([stages[stage] for _, stages in pieces], 2)[1] for stage in range(3)])
    torch.testing.assert_close(columns, whole[(slice(None), *chosen.long().T)].mT, rtol=1e-4, atol=1e-4)


def test_windows_that_overlap_count_every_voxel_once_and_show_the_whole_case(nnunet_environment):
    cases, backbone = opened(*write_labelled())
    data, labels = cases._cases.load("case_01")[0], cases.labels("case_01")
    left, counted, seen = labels.copy(), np.zeros(2, dtype=int), np.zeros(labels.shape, dtype=bool)
    for maps in encoded(backbone, data, (16, 16, 16), device=torch.device("cpu"), case="case_01"):
        taken = voxels._taken(left, maps, (16, 16, 16))
        counted += np.bincount(taken[taken >= 0], minlength=2)
        for box in maps.boxes:
            seen[box] = True
    assert seen.all() and (left == UNKNOWN).all()
    assert counted.tolist() == np.bincount(labels.ravel()).tolist()


def test_readouts_do_not_depend_on_pieces_or_on_windows_side_by_side(nnunet_environment, monkeypatch):
    cases, backbone = opened(*write_labelled())
    draws = [Draw(tuple(CASES[:3])), Draw(tuple(CASES[:1])), Draw(tuple(CASES[:3]), shuffled=True)]
    together = cases.fit(backbone, draws)
    monkeypatch.setattr(voxels, "SLAB_VALUES", 28 * 500)
    monkeypatch.setattr(hypercolumns, "WINDOW_VOXELS", 1)
    apart = [cases.fit(backbone, [draw])[0] for draw in draws]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-6)
        assert one.ridge == other.ridge


def test_dice_of_a_readout_is_that_of_hypercolumns_times_weights(nnunet_environment):
    cases, backbone = opened(*write_labelled(shape=(16, 16, 16)))  # one window
    readouts = cases.fit(backbone, [Draw(tuple(CASES[:2])), Draw(tuple(CASES[:2]), shuffled=True)])
    scores = cases.dice(backbone, readouts, ["case_05"])
    image = torch.from_numpy(np.asarray(cases._cases.load("case_05")[0][:]))[None]
    with torch.no_grad():
        (_, stages), *_ = slabs(backbone, backbone.features(image), (16, 16, 16))
    columns = torch.cat(stages, 1)[0].flatten(1).T.double()
    truth = cases.labels("case_05").ravel() == 1
    for readout, found in zip(readouts, scores, strict=True):
        predicted = (columns @ readout.weight + readout.bias).argmax(1).numpy() == 1
        assert found[0, 0] == pytest.approx(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()), abs=2e-3)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_map_that_holds_the_answer_is_read_and_shuffled_labels_are_not(nnunet_environment, dimensions):
    folder, plan, configuration = write_labelled(
        dimensions=dimensions, change=lambda plan: with_patch_vit(plan, "2d" if dimensions == 2 else "3d_fullres")
    )
    for case in CASES:  # the finest map of a PatchViT is the image itself
        rewrite(folder, case, lambda image, labels: labels + np.random.default_rng(0).normal(0, 0.1, labels.shape))
    cases, backbone = opened(folder, plan, configuration)
    readouts = cases.fit(backbone, [Draw(tuple(FOLD["train"])), Draw(tuple(FOLD["train"]), shuffled=True)])
    right, shuffled = cases.dice(backbone, readouts, FOLD["val"])
    assert right.min() > 0.99
    assert shuffled.max() < 0.5


def test_values_that_no_label_names_count_nowhere_and_minus_one_is_background(nnunet_environment):
    cases, _ = opened(*write_labelled(labels=("cube",)))
    segmentation = np.array([[[-1, 0, 1, 2, 9]]], dtype=np.int8)[None]
    cases._cases.load_labelled = lambda case: (None, segmentation, None)
    assert cases.labels("any").ravel().tolist() == [0, 0, 1, UNKNOWN, UNKNOWN]


def test_of_a_large_class_as_many_voxels_are_drawn_as_are_counted(nnunet_environment, monkeypatch):
    monkeypatch.setattr(voxels, "VOXELS", 300)
    cases, backbone = opened(*write_labelled())
    for shuffled in (False, True):
        sampled = cases._sampled("case_00", 0, shuffled)
        assert np.bincount(sampled[sampled >= 0]).tolist() == [300, 300]
    sums = cases._empty_sums(28, Draw(tuple(CASES[:2])), torch.device("cpu"))
    assert sums.class_weights.tolist() == pytest.approx([1 / 1200, 1 / 1200])
    assert cases.fit(backbone, [Draw(tuple(CASES[:2]))])[0].weight.isfinite().all()
