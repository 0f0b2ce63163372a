"""The voxel probe: every family of networks, its controls, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from labelled_structures import FOLD, rewrite, write_labelled
from small_patch_vit import with_patch_vit
from small_pretraining import pretrain_one_step
from small_primus import with_primus
from small_swin import with_swin

from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.features import voxels
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.probing.probe import RANDOM, evaluate_voxels, names_of, voxel_table

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


@pytest.mark.slow
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


def test_all_training_cases_are_drawn_once(nnunet_environment):
    write_labelled()
    result = evaluate_voxels("901", "nnUNetPlans", {}, fold=0, labelled=len(FOLD["train"]), seeds=(0, 1, 2))
    assert [sorted(draw) for draw in result["draws"]] == [sorted(FOLD["train"])]
    assert "draws" not in voxel_table(result) and np.array(result["arms"][RANDOM]["scores"]).shape[0] == 1


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
