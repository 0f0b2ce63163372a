"""The voxel probe: hypercolumns against SciPy's interpolation, voxels counted once, and every family of networks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy.ndimage import map_coordinates
from small_patch_vit import with_patch_vit
from small_pretraining import pretrain_one_step
from small_primus import with_primus
from small_swin import with_swin

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.probing import hypercolumns, voxels
from nnssl_plugin.tasks.probing.hypercolumns import encoded, slabs
from nnssl_plugin.tasks.probing.probe import RANDOM, evaluate_voxels, names_of, voxel_table
from nnssl_plugin.tasks.probing.voxels import UNKNOWN, Draw, LabelledVoxels

CASES = [f"case_{number:02d}" for number in range(6)]
FOLD = {"train": CASES[:4], "val": CASES[4:]}


def write_labelled(*, change=lambda plan: plan, labels=("cube",), **options):
    """The fake dataset with its cubes as a structure, and one fold; its folder, plan and configuration."""
    plan = change(write_fake_dataset(**options))
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    write_json(folder / "nnUNetPlans.json", plan)
    described = read_json(folder / "dataset.json")
    described["labels"] = {"background": 0} | {name: value for value, name in enumerate(labels, 1)}
    write_json(folder / "dataset.json", described)
    write_json(folder / "splits_final.json", [FOLD])
    return folder, plan, next(iter(plan["configurations"]))


def opened(folder, plan, configuration):
    """The cases, and a backbone of the plan."""
    described = read_json(folder / "dataset.json")
    torch.manual_seed(0)
    network = build_network(plan, configuration, described)
    backbone = Backbone(network, len(described["channel_names"])).eval()
    return LabelledVoxels(folder, plan, configuration, described, CASES), backbone


def rewrite(folder, case, change):
    """Put another image in the place of a case's: ``change`` of image and labels."""
    path = folder / "fake_data" / case
    data, segmentation, _, properties = nnUNetDatasetBlosc2(str(path.parent), [case]).load_case(case)
    image, labels = np.array(data[:]), np.array(segmentation[:])
    for file in path.parent.glob(f"{case}*"):
        file.unlink()
    blocks = {"chunks": image.shape, "blocks": image.shape}
    nnUNetDatasetBlosc2.save_case(change(image, labels).astype(np.float32), labels, properties, str(path), **blocks)


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


FAMILIES = {
    "anisotropic": {"change": lambda plan: flattened(plan)},
    "residual, four channels": {"residual": True, "channels": 4},
    "2d": {"dimensions": 2},
    "primus": {"change": with_primus},
    "swin": {"change": with_swin},
    "patch-vit": {"change": with_patch_vit},
}


def flattened(plan):
    """The plan with slices three times as thick, which the network does not stride along at first."""
    planned = plan["configurations"]["3d_fullres"]
    planned |= {"patch_size": [6, 16, 20], "spacing": [3.0, 1.0, 1.0]}
    planned["architecture"]["arch_kwargs"] |= {
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    }
    return plan


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_probed(nnunet_environment, family):
    _, _, configuration = write_labelled(**FAMILIES[family])
    result = evaluate_voxels("901", "nnUNetPlans", {}, fold=0, configuration=configuration)
    arm = result["arms"][RANDOM]
    assert 0 <= arm["dice"] <= 1 and 0 <= arm["shuffled"] <= 1
    assert np.array(arm["scores"]).shape == (1, 2, 1)


def test_a_checkpoint_is_compared_with_a_random_encoder(nnunet_environment, tmp_path, capsys):
    write_labelled(channels=2)
    (tmp_path / "pretraining").mkdir()
    checkpoint = pretrain_one_step(tmp_path / "pretraining")
    output = tmp_path / "probe.json"
    command = ["evaluate", "probe", "-d", "901", "-f", "0", "-w", f"toy={checkpoint}", "-o", str(output)]
    assert main([*command, "--labelled", "2", "--seeds", "0", "1", "2"]) == 0
    result = json.loads(output.read_text())
    assert [len(draw) for draw in result["draws"]] == [2, 2, 2] and result["cases"] == FOLD["val"]
    assert set(result["arms"]) == {RANDOM, "toy"} and np.array(result["arms"]["toy"]["scores"]).shape == (3, 2, 1)
    over = result["over_random"]["toy"]
    means = {name: np.mean(arm["scores"]) for name, arm in result["arms"].items()}
    assert over["mean"] == pytest.approx(means["toy"] - means[RANDOM]) and over["low"] <= over["mean"] <= over["high"]
    printed = capsys.readouterr().out
    assert voxel_table(result) in printed and f"{RANDOM}: " in printed


def test_the_same_weights_as_the_random_encoder_differ_by_nothing(nnunet_environment, tmp_path):
    folder, plan, configuration = write_labelled()
    torch.manual_seed(voxels.SEED)
    network = build_network(plan, configuration, read_json(folder / "dataset.json"))
    torch.save({"network_weights": network.state_dict()}, tmp_path / "same.pth")
    result = evaluate_voxels("901", "nnUNetPlans", {"same": tmp_path / "same.pth"}, fold=0)
    assert result["over_random"]["same"] == {"mean": 0, "low": 0, "high": 0, "pairs": 2}


def test_a_structure_without_voxels_has_no_dice_and_leaves_the_mean_alone(nnunet_environment):
    write_labelled(labels=("cube", "never there"))
    arm = evaluate_voxels("901", "nnUNetPlans", {}, fold=0)["arms"][RANDOM]
    assert arm["by_label"]["never there"] is None
    assert arm["dice"] == arm["by_label"]["cube"]


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


def test_images_with_nan_are_refused(nnunet_environment):
    folder, *_ = write_labelled()
    rewrite(folder, "case_04", lambda image, labels: np.where(image == image.max(), np.nan, image))
    with pytest.raises(UserError, match="case_04 holds voxels that are NaN"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=0)


def test_what_cannot_be_probed_is_said(nnunet_environment, tmp_path, capsys):
    folder, *_ = write_labelled()
    with pytest.raises(UserError, match="no fold 3"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=3)
    with pytest.raises(UserError, match="4 training cases"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=0, labelled=5)
    write_json(folder / "splits_final.json", [FOLD | {"val": ["case_00"]}])
    with pytest.raises(UserError, match="same cases"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=0)
    (folder / "splits_final.json").unlink()
    with pytest.raises(UserError, match="which says which cases"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=0)
    write_fake_dataset()
    write_json(folder / "splits_final.json", [FOLD])
    with pytest.raises(UserError, match="name no structures"):
        evaluate_voxels("901", "nnUNetPlans", {}, fold=0)
    for command in (
        ["-d", "901"],
        ["-d", "901", "-w", "a", "-f", "0", "--index", "b", "--target", "c"],
        ["--index", "b"],
    ):
        assert main(["evaluate", "probe", *command]) == 2
        assert "not clear what is to be read" in capsys.readouterr().err


def test_encoders_are_called_after_their_training_unless_named():
    run = "results/MAEPretrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth"
    assert names_of([run, "b=other.pth", "weights.pth"]) == {
        "MAEPretrainer__nnUNetPlans__3d_fullres": run,
        "b": "other.pth",
        "weights": "weights.pth",
    }
    for twice in (["a=x.pth", "a=y.pth"], [f"{RANDOM}=x.pth"]):
        with pytest.raises(UserError, match="Two encoders are called"):
            names_of(twice)
