"""Token separation of a dataset before and after pretraining: against features and labels gathered by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from sklearn.metrics import silhouette_score
from small_pretraining import pretrain_one_step

from nnssl_plugin.cli.main import main
from nnssl_plugin.data.cases import Cases
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.probing.tokens import SEED, _read_windows, evaluate_tokens, measure, table

ARGUMENTS = {"stride": 4}


@pytest.fixture
def labelled(nnunet_environment):
    """The fake dataset of two channels, its cubes labelled as a structure; its folder and plan."""
    return write_labelled(channels=2)


def write_labelled(**options):
    plan = write_fake_dataset(**options)
    folder = Path(os.environ["nnUNet_preprocessed"]) / NAME
    described = read_json(folder / "dataset.json")
    described["labels"] = {"background": 0, "cube": 1}
    write_json(folder / "dataset.json", described)
    return folder, plan


def initialised(folder, plan):
    torch.manual_seed(SEED)
    return build_network(plan, next(iter(plan["configurations"])), read_json(folder / "dataset.json"))


def test_random_features_agree_with_a_direct_calculation(labelled):
    folder, plan = labelled
    result = evaluate_tokens("901", "nnUNetPlans", cases=3, **ARGUMENTS)
    assert result["cases"] == ["case_00", "case_02", "case_04"] and result["grid"] == [4, 4, 4]
    planned = plan["configurations"]["3d_fullres"]
    windows = _read_windows(folder, plan, planned, chosen=result["cases"], known=[0, 1])
    network = initialised(folder, plan).eval()
    with torch.no_grad():
        maps = Backbone(network, 2).eval().features(windows.images)[2]
    features = maps.permute(0, 2, 3, 4, 1).reshape(-1, maps.shape[1]).numpy()
    weights = np.zeros((4, 16))  # tokens lie at voxels 0, 4, 8 and 12, and half of the outermost voxel is theirs
    for token, voxel in np.ndindex(4, 16):
        weights[token, voxel] = {0: 1, 1: 1, 2: 0.5}.get(abs(voxel - 4 * token), 0)
    weights /= weights.sum(1, keepdims=True)
    share = torch.from_numpy(np.einsum("ix,jy,kz,bxyz->bijk", *[weights] * 3, windows.labels.numpy()).flatten())
    labels = (share > 0.5).long().numpy()  # every voxel is 0 or 1: the case is larger than the window
    assert result["before"]["labels"]["silhouette"] == pytest.approx(
        silhouette_score(features, labels, metric="cosine"), abs=1e-4
    )
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines, alike = unit @ unit.T, labels[:, None] == labels
    pairs = ~np.eye(len(labels), dtype=bool)
    gap = cosines[alike & pairs].mean() - cosines[~alike].mean()
    assert result["before"]["labels"]["cosine_gap"] == pytest.approx(gap, abs=1e-4)
    assert result["tokens"] == {"background": int((labels == 0).sum()), "cube": int((labels == 1).sum())}
    assert result["before"]["structures"] == {"silhouette": None, "cosine_gap": None}  # one structure has no other
    assert result["before"]["tokens"]["spread"] == pytest.approx(unit.std(0, ddof=1).mean() * unit.shape[1] ** 0.5)
    shares = np.linalg.svd(features, compute_uv=False)
    shares = shares / shares.sum()
    assert result["before"]["tokens"]["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_windows_are_pieces_of_the_cases_that_hold_a_labelled_voxel(labelled):
    folder, plan = labelled
    windows = _read_windows(folder, plan, plan["configurations"]["3d_fullres"], chosen=["case_01"], known=[0, 1])
    data, segmentation, _ = Cases(folder / "fake_data", ["case_01"], transpose_forward=(0, 1, 2)).load_labelled(
        "case_01"
    )
    pieces = [tuple(slice(o, o + 16) for o in origin) for origin in np.ndindex(3, 5, 2)]
    found = [piece for piece in pieces if np.array_equal(data[:][(slice(None), *piece)], windows.images[0])]
    assert len(found) == 1
    np.testing.assert_array_equal(windows.labels[0], segmentation[:][0][found[0]])
    assert (windows.labels == 1).any()


def test_weights_equal_to_the_initialisation_change_nothing(labelled, tmp_path):
    folder, plan = labelled
    torch.save({"network_weights": initialised(folder, plan).state_dict()}, tmp_path / "same.pth")
    result = evaluate_tokens("901", "nnUNetPlans", weights=tmp_path / "same.pth", cases=2, **ARGUMENTS)
    assert result["after"] == result["before"]


def test_a_pretraining_checkpoint_is_measured_beside_its_initialisation(labelled, tmp_path, capsys):
    (tmp_path / "pretraining").mkdir()
    checkpoint = pretrain_one_step(tmp_path / "pretraining")
    output = tmp_path / "tokens.json"
    command = ["evaluate", "tokens", "-d", "901", "-w", str(checkpoint), "--stride", "4", "-o", str(output)]
    assert main(command) == 0
    result = json.loads(output.read_text())
    assert result["after"]["labels"] != result["before"]["labels"] and len(result["cases"]) == 6
    assert table(result) in capsys.readouterr().out


def test_two_dimensions_and_folds(nnunet_environment):
    folder, _ = write_labelled(dimensions=2)
    write_json(folder / "splits_final.json", [{"train": ["case_00"], "val": ["case_03", "case_05"]}])
    result = evaluate_tokens("901", "nnUNetPlans", configuration="2d", fold=0, **ARGUMENTS)
    assert result["cases"] == ["case_03", "case_05"] and result["grid"] == [4, 4]
    with pytest.raises(UserError, match="no fold 1"):
        evaluate_tokens("901", "nnUNetPlans", configuration="2d", fold=1)


def test_a_body_mask_is_refused(nnunet_environment):
    write_fake_dataset()
    with pytest.raises(UserError, match="name no structures"):
        evaluate_tokens("901", "nnUNetPlans")


def test_weights_of_another_network_are_refused(labelled, tmp_path):
    torch.save({"network_weights": {"encoder.other.weight": torch.zeros(3, 3)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"0\.0% of the encoder"):
        evaluate_tokens("901", "nnUNetPlans", weights=tmp_path / "other.pth", cases=1, **ARGUMENTS)


def test_structures_are_measured_without_the_background():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens = torch.eye(3)[[0, 1, 1, 1, 2, 2]]
    measured = measure(tokens, labels)
    assert measured["structures"] == {"silhouette": pytest.approx(1), "cosine_gap": pytest.approx(1)}
    assert measured["labels"]["cosine_gap"] == pytest.approx(2 / 3 - 2 / 12)
