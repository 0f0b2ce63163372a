"""Weights of a fine-tuning plan at the start of training: exactly as adapt wrote them, or refused."""

from copy import deepcopy

import pytest
import torch
from fake_dataset import fake_plan

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.errors import UserError
from nnssl_plugin.finetuning.weights import load_planned_weights
from nnssl_plugin.nnunet.plans import build_network

DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


def network(seed, plan=None):
    torch.manual_seed(seed)
    return build_network(plan or fake_plan(), "3d_fullres", DATASET_JSON)


def write(path, weights, loaded):
    content = {"network_weights": weights, "adaptation": {"loaded": loaded, "encoder_coverage": 1.0}, "provenance": {}}
    save_checkpoint(content, path)
    return path


def test_what_came_from_the_pretraining_is_loaded_and_the_rest_keeps_its_initialisation(tmp_path):
    written, target = network(0), network(1)
    before, weights = deepcopy(target.state_dict()), written.state_dict()
    loaded = [key for key in weights if key.startswith(("encoder.", "decoder.encoder."))]
    report = load_planned_weights(target, write(tmp_path / "a.pth", weights, loaded), plans_name="p")
    state = target.state_dict()
    for key in state:
        assert torch.equal(state[key], weights[key] if key in loaded else before[key]), key
    assert [report.coverage(part) for part in ("encoder", "decoder", "head")] == [1.0, 0.0, 0.0]


def test_a_head_is_never_loaded_and_a_file_without_a_list_goes_by_its_provenance(tmp_path):
    written, target = network(0), network(1)
    before = deepcopy(target.state_dict())
    save_checkpoint(
        {"network_weights": written.state_dict(), "provenance": {"trained": ["encoder.", "decoder."]}},
        tmp_path / "a.pth",
    )
    load_planned_weights(target, tmp_path / "a.pth", plans_name="p")
    state, weights = target.state_dict(), written.state_dict()
    assert torch.equal(state["decoder.seg_layers.0.weight"], before["decoder.seg_layers.0.weight"])
    assert torch.equal(state["decoder.stages.0.convs.0.conv.weight"], weights["decoder.stages.0.convs.0.conv.weight"])


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {k: v for k, v in weights.items() if k != "decoder.stages.0.convs.0.conv.bias"},
        lambda weights: weights | {"teacher.w": torch.ones(2)},
        lambda weights: weights | {"decoder.seg_layers.0.weight": torch.ones(3, 8, 1, 1, 1)},
        lambda weights: {f"module.{k}": v for k, v in weights.items()},
    ],
    ids=["a key less", "a key more", "another shape", "a prefix"],
)
def test_a_file_for_another_network_is_refused(change, tmp_path):
    weights = change(dict(network(0).state_dict()))
    path = write(tmp_path / "a.pth", weights, list(weights))
    with pytest.raises(UserError, match="were not written for the network of plan mine") as error:
        load_planned_weights(network(1), path, plans_name="mine")
    assert "nnssl_plugin adapt" in error.value.remedy


def test_values_that_are_not_finite_are_named(tmp_path):
    weights = {key: value.clone() for key, value in network(0).state_dict().items()}
    weights["encoder.stages.1.0.convs.0.conv.weight"][0] = float("nan")
    path = write(tmp_path / "a.pth", weights, list(weights))
    with pytest.raises(UserError, match=r"not finite .* encoder\.stages\.1\.0\.convs\.0\.conv\.weight"):
        load_planned_weights(network(1), path, plans_name="p")


def test_a_missing_file_and_one_without_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="are not there"):
        load_planned_weights(network(1), tmp_path / "a.pth", plans_name="p")
    save_checkpoint({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no network_weights"):
        load_planned_weights(network(1), tmp_path / "a.pth", plans_name="p")
