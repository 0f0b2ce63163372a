"""Weights as other programs write them: their wrappers, prefixes and files beside them, and versions without a way."""

import argparse
import json
import pickle

import pytest
import torch
from damaged_checkpoints import DATASET_JSON, nnssl_checkpoint, own_checkpoint
from fake_dataset import fake_plan, write_fake_dataset
from torch import nn

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.adaptation.like import plan_like
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.checkpoints.sharing.importing import import_weights
from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
from nnssl_plugin.checkpoints.sources.source import NNSSL, PLAIN, read_source
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

WEIGHTS = {"encoder.stem.weight": torch.arange(6.0).reshape(2, 3), "encoder.stem.bias": torch.ones(2)}


def prefixed(prefix):
    return {f"{prefix}{key}": value for key, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"net": prefixed("module.backbone."), "optimizer": {"state": {}}, "epoch": 3},  # SuPreM
        {"net": WEIGHTS},
        {"network": WEIGHTS},
        {"state_dict": prefixed("model."), "pytorch-lightning_version": "2"},
        {"state_dict": prefixed("model.module.")},
        {"state_dict": prefixed("model.net.") | {"criterion.weight": torch.ones(1)}},
        prefixed("module.backbone."),
        prefixed("net."),
    ],
    ids=["SuPreM", "net", "network", "Lightning", "Lightning in DDP", "beside a loss", "bare backbone", "bare net"],
)
def test_wrappers_and_prefixes_of_other_programs_are_taken_off(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    source = read_source(tmp_path / "a.pth")
    assert source.kind == PLAIN and list(source.weights) == list(WEIGHTS)
    assert all(torch.equal(source.weights[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("place", ["beside", "two folders up"])
def test_a_checkpoint_of_nnssl_takes_its_adaptation_plan_from_the_folder(place, tmp_path):
    content = nnssl_checkpoint()
    block = content.pop("nnssl_adaptation_plan")
    fold = tmp_path / "SparkTrainer" / "fold_all"
    fold.mkdir(parents=True)
    torch.save(content, fold / "checkpoint_final.pth")
    assert read_source(fold / "checkpoint_final.pth").network is None
    write_json((fold if place == "beside" else fold.parent) / "adaptation_plan.json", block)
    source = read_source(fold / "checkpoint_final.pth")
    assert source.kind == NNSSL and source.network["kwargs"] == block["architecture_plans"]["arch_kwargs"]
    path = import_weights(fold / "checkpoint_final.pth", tmp_path / "elsewhere.pth")
    assert read_source(path).network == source.network


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"other": 1}'])
def test_a_file_beside_it_that_is_no_plan_is_named_or_passed_over(text, tmp_path):
    content = nnssl_checkpoint()
    del content["nnssl_adaptation_plan"]
    (tmp_path / "fold_all").mkdir()
    torch.save(content, tmp_path / "fold_all" / "a.pth")
    (tmp_path / "adaptation_plan.json").write_text(text)
    if text in ("[]", '{"other": 1}'):
        assert read_source(tmp_path / "fold_all" / "a.pth").kind == PLAIN
    else:
        with pytest.raises(UserError, match=r"adaptation_plan\.json is"):
            read_source(tmp_path / "fold_all" / "a.pth")


def version_1():
    keys = ("conv_blocks_context.0.blocks.0.conv.weight", "conv_blocks_localization.0.0.blocks.0.conv.weight")
    return {key: torch.ones(2, 1, 3, 3, 3) for key in (*keys, "tu.0.weight", "seg_outputs.0.weight")}


def test_nnunet_version_1_is_refused_in_words(tmp_path):
    torch.save({"epoch": 3, "state_dict": version_1(), "plot_stuff": []}, tmp_path / "model_final_checkpoint.model")
    for read in (read_source, inspect_file, lambda path: import_weights(path, tmp_path / "x.pth")):
        with pytest.raises(UserError, match=r"nnU-Net v1.*conv_blocks_context\.0"):
            read(tmp_path / "model_final_checkpoint.model")
    with open(tmp_path / "model_final_checkpoint.model.pkl", "wb") as file:
        pickle.dump({"init": (1, 2), "name": "nnUNetTrainerV2", "plans": {}}, file)
    with pytest.raises(UserError, match="nnU-Net v1's description"):
        read_source(tmp_path / "model_final_checkpoint.model.pkl")
    table = {"format": 1, "name": "mine", "rename": [["^conv_blocks_context\\.(\\d+)\\.", "encoder.stages.\\1."]]}
    write_json(tmp_path / "table.json", table)
    mapped = read_source(tmp_path / "model_final_checkpoint.model", mapping=tmp_path / "table.json")
    assert "encoder.stages.0.blocks.0.conv.weight" in mapped.weights


def test_a_trusted_import_writes_nothing_that_adapt_cannot_read(tmp_path):
    holder = argparse.Namespace(weights=WEIGHTS)
    torch.save({"object": holder, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no weights that could be found; its entries: 'epoch'"):
        import_weights(tmp_path / "a.pth", tmp_path / "b.pth", trust=True)
    torch.save({"state_dict": WEIGHTS, "model": nn.Linear(2, 1), "object": holder}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds weights under 'state_dict', 'model'"):
        import_weights(tmp_path / "a.pth", tmp_path / "b.pth", trust=True)
    assert not (tmp_path / "b.pth").exists()


@pytest.fixture
def folder(nnunet_environment, tmp_path):
    write_fake_dataset(cases=1)
    return tmp_path / "nnUNet_preprocessed" / "Dataset901_Fake"


def test_keys_that_match_nothing_are_shown_with_the_tables_that_there_are(folder, tmp_path):
    torch.save({f"enc.{n}.weight": torch.ones(3) for n in range(5)}, tmp_path / "a.pth")
    with pytest.raises(UserError) as error:
        adapt_checkpoint("901", name="x", weights=tmp_path / "a.pth")
    assert "first keys: enc.0.weight, enc.1.weight, enc.2.weight and 2 more" in error.value.problem
    assert "--mapping TABLE" in error.value.remedy and "voco-b" in error.value.remedy
    with pytest.raises(UserError, match=r"its first keys: enc\.0\.weight") as error:
        plan_like("901", read_source(tmp_path / "a.pth"), name="y")
    assert "voco-b" in error.value.remedy


def test_weights_that_are_not_finite_are_named(folder, tmp_path):
    content = own_checkpoint()
    weights = {key: value.clone() for key, value in content["network_weights"].items()}
    bad = "encoder.stages.2.0.convs.0.conv.weight"
    for key in weights:
        if key.startswith(("encoder.stages.2.0.convs.0.", "decoder.encoder.stages.2.0.convs.0.")) and "weight" in key:
            weights[key][0] = float("nan")
    torch.save(content | {"network_weights": weights}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"not finite .*{bad}"):
        adapt_checkpoint("901", name="x", weights=tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"not finite|hash differs"):
        export_checkpoint(tmp_path / "a.pth", tmp_path / "out")
    report = inspect_file(tmp_path / "a.pth")
    assert bad in report["not_finite"] and "NaN OR INFINITE VALUES" in screen(report)


def test_exported_and_imported_weights_say_how_the_training_ended(tmp_path):
    content = own_checkpoint()
    content["logging"] |= {"feature_std": [0.2, 0.9], "effective_rank": [3.0, 7.5]}
    torch.save(content, tmp_path / "own.pth")
    expected = inspect_file(tmp_path / "own.pth")["health"]
    assert expected["feature_std"] == 0.9 and expected["skipped_steps"] == 1
    folder = export_checkpoint(tmp_path / "own.pth", tmp_path / "shared").folder
    assert "feature_std 0.9" in (folder / "README.md").read_text()
    nnunet = export_checkpoint(tmp_path / "own.pth", tmp_path / "stock", layout="nnunet").folder
    nnssl = export_checkpoint(tmp_path / "own.pth", tmp_path / "nnssl", layout="nnssl").folder
    files = [folder, import_weights(folder, tmp_path / "back.pth")]
    files += [nnunet / "pretrained_weights.pth", nnssl / "checkpoint_final.pth"]
    for file in files:
        report = inspect_file(file)
        assert report["health"] == expected, file
        assert "feature spread (1 is healthy, 0 collapsed) 0.9" in screen(report)


def test_inspect_and_plan_agree_on_the_patch(folder, tmp_path):
    content = nnssl_checkpoint()
    content["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] = [8, 16, 8]
    torch.save(content, tmp_path / "a.pth")
    report = inspect_file(tmp_path / "a.pth")
    assert report["patch_size"] == [8, 16, 8] and "patch 8, 16, 8 voxels" in screen(report)
    plan_like("901", read_source(tmp_path / "a.pth"), name="like")
    assert read_json(folder / "like.json")["configurations"]["3d_fullres"]["patch_size"] == [8, 16, 8]


def test_the_orientation_is_taken_over_with_the_reader(folder, tmp_path, capsys):
    content = own_checkpoint()
    torch.save(content, tmp_path / "a.pth")
    plan = read_json(folder / "nnUNetPlans.json") | {"image_reader_writer": "SimpleITKIO"}
    write_json(folder / "nnUNetPlans.json", plan)
    arguments = ["plan", "-d", "901", "--like", str(tmp_path / "a.pth")]
    assert main([*arguments, "-n", "without"]) == 0
    assert read_json(folder / "without.json")["image_reader_writer"] == "SimpleITKIO"
    assert main([*arguments, "-n", "ras", "--orientation"]) == 0
    written = read_json(folder / "ras.json")
    assert written["image_reader_writer"] == "NibabelIOWithReorient"
    assert written["configurations"]["3d_fullres"]["data_identifier"] == "ras_3d_fullres"
    assert "nnUNetv2_preprocess -d 901 -plans_name ras" in capsys.readouterr().out
    torch.save(content | {"provenance": content["provenance"] | {"reader": "os.system"}}, tmp_path / "a.pth")
    assert main([*arguments, "-n", "other", "--orientation"]) == 2
    assert "images read by os.system" in capsys.readouterr().err
    assert main(["plan", "-d", "901", "-n", "x", "--orientation"]) == 2


def test_a_network_description_survives_as_text(tmp_path):
    """Nothing of what is read is changed on the way: the description that comes back is the one that was written."""
    content = own_checkpoint()
    torch.save(content, tmp_path / "a.pth")
    source = read_source(tmp_path / "a.pth")
    assert source.provenance == json.loads(json.dumps(content["provenance"]))
    network = build_network(fake_plan(), "3d_fullres", DATASET_JSON)
    assert source.weights.keys() == network.state_dict().keys()
    assert read_checkpoint(tmp_path / "a.pth")["logging"] == content["logging"]
