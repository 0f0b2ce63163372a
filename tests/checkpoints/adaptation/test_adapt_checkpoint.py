"""A checkpoint and a target dataset become a plan, weights and a report."""

import json
import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.adaptation.options import AdaptationOptions
from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_pretraining, nnssl_adaptation_plan, weights_hash
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

TRAINED = ["encoder.", "decoder.encoder.", "decoder.transpconvs."]
PRETRAINING = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


@pytest.fixture
def folder(nnunet_environment) -> Path:
    write_fake_dataset(cases=1, pretraining={"epochs": 3})
    return Path(os.environ["nnUNet_preprocessed"], NAME)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint_final.pth", fake_plan())


def write_checkpoint(path: Path, plans: dict, dataset_json: dict = PRETRAINING, **more) -> Path:
    network = build_network(plans, "3d_fullres", dataset_json)
    weights = network.state_dict()
    provenance = describe_pretraining(
        method="toy",
        settings={"a": (1, 2)},
        training={"epochs": 3},
        plans=plans,
        configuration="3d_fullres",
        dataset_json=dataset_json,
        trained=TRAINED,
        steps=30,
        cases=4,
        citations=["a paper"],
        licence="CC-BY-4.0",
        weights=weights,
    )
    save_checkpoint(
        {
            "network_weights": weights,
            "provenance": provenance,
            "citations": ["a paper"],
            **more,
            "nnssl_adaptation_plan": nnssl_adaptation_plan(
                plans, "3d_fullres", network, len(dataset_json["channel_names"])
            ),
        },
        path,
    )
    return path


def target_network(folder: Path):
    return build_network(read_json(folder / "nnUNetPlans.json"), "3d_fullres", read_json(folder / "dataset.json"))


def test_plan_weights_and_report_are_written(folder, checkpoint):
    source = read_json(folder / "nnUNetPlans.json")
    adapted = adapt_checkpoint("901", name="toy", weights=checkpoint)
    plan = read_json(folder / "nnUNetPlans-toy.json")
    assert adapted.plan == folder / "nnUNetPlans-toy.json" and plan["plans_name"] == "nnUNetPlans-toy"
    assert plan["configurations"] == source["configurations"] and "pretraining" not in plan
    block = plan["finetuning"]
    assert block["weights"] == "nnUNetPlans-toy_3d_fullres.pth" and block["configuration"] == "3d_fullres"
    assert block["source"]["method"] == "toy" and block["source"]["licence"] == "CC-BY-4.0"
    assert block["source"]["weights_sha256"] == weights_hash(read_checkpoint(checkpoint)["network_weights"])
    assert read_json(folder / "nnUNetPlans-toy_3d_fullres_report.json")["coverage"]["encoder"] == 1.0
    assert read_json(folder / "nnUNetPlans.json") == source


def test_the_weights_file_is_complete_and_loads_with_stock_nnunet(folder, checkpoint):
    adapted = adapt_checkpoint(NAME, name="toy", weights=checkpoint)
    network = target_network(folder)
    heads = {key: value.clone() for key, value in network.state_dict().items() if ".seg_layers." in key}
    load_pretrained_weights(network, str(adapted.weights))
    pretrained = torch.load(checkpoint, weights_only=True)["network_weights"]
    for key, value in network.state_dict().items():
        if key in heads:
            assert torch.equal(value, heads[key])
        elif key.startswith(tuple(TRAINED)):
            assert torch.equal(value, pretrained[key]), key
    content = torch.load(adapted.weights, weights_only=True)
    assert set(content["network_weights"]) == set(network.state_dict())
    assert content["citations"] == ["a paper"] and content["provenance"]["method"] == "toy"


def test_untrained_tensors_are_not_listed_as_loaded(folder, checkpoint):
    adapted = adapt_checkpoint("901", name="toy", weights=checkpoint)
    loaded = read_checkpoint(adapted.weights)["adaptation"]["loaded"]
    assert "encoder.stages.0.0.convs.0.conv.weight" in loaded
    assert not any(key.startswith("decoder.stages.") or ".seg_layers." in key for key in loaded)
    assert 0 < adapted.report.coverage("decoder") < 1


def test_adapting_twice_writes_the_same(folder, checkpoint):
    first = adapt_checkpoint("901", name="toy", weights=checkpoint)
    plan, weights = first.plan.read_bytes(), torch.load(first.weights, weights_only=True)["network_weights"]
    torch.manual_seed(99)
    second = adapt_checkpoint("901", name="toy", weights=checkpoint)
    again = torch.load(second.weights, weights_only=True)["network_weights"]
    assert second.plan.read_bytes() == plan
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_the_twin_has_the_same_settings_and_no_weights(folder, checkpoint):
    adapted = adapt_checkpoint("901", name="toy", weights=checkpoint)
    plan = read_json(adapted.plan)
    plan["finetuning"]["epochs"] = 7
    write_json(adapted.plan, plan)
    scratch = adapt_checkpoint("901", name="scratch", plans_name="nnUNetPlans-toy", from_scratch=True)
    block = read_json(scratch.plan)["finetuning"]
    assert block == {"epochs": 7, "configuration": "3d_fullres", "weights": None}
    assert scratch.weights is None and scratch.plans_name == "nnUNetPlans-toy-scratch"
    assert read_json(adapt_checkpoint("901", name="scratch", from_scratch=True).plan)["finetuning"]["weights"] is None


def test_a_difference_in_what_the_network_sees_is_a_warning(folder, tmp_path):
    plans = fake_plan()
    plans["configurations"]["3d_fullres"] |= {"spacing": [2.0, 2.0, 2.0], "normalization_schemes": ["CTNormalization"]}
    two_channels = {**PRETRAINING, "channel_names": {"0": "CT", "1": "PET"}}
    adapted = adapt_checkpoint("901", name="ct", weights=write_checkpoint(tmp_path / "ct.pth", plans, two_channels))
    table = adapted.report.table()
    for said in (
        "normalised differently",
        "spacing differs",
        "channels differ: ['CT', 'PET']",
        "adapted: input channels 2 → 1 (1 tensor)",
    ):
        assert said in table
    assert "encoder.stages.0.0.convs.0.conv.weight" in read_checkpoint(adapted.weights)["adaptation"]["loaded"]


def test_ct_windows_and_what_a_file_does_not_say_are_warned_of(folder, tmp_path):
    plans = read_json(folder / "nnUNetPlans.json")
    network = target_network(folder)
    save_checkpoint({"network_weights": network.state_dict()}, tmp_path / "bare.pth")
    said = adapt_checkpoint("901", name="bare", weights=tmp_path / "bare.pth").report.table()
    assert "does not say its normalisation, voxel spacing, channels, orientation, axis order" in said

    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    window = {"mean": 50.0, "std": 100.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0}
    plans["foreground_intensity_properties_per_channel"] = {"0": window}
    path = write_checkpoint(tmp_path / "ct.pth", plans, init_args={"plans": plans, "configuration": "3d_fullres"})
    plans = read_json(folder / "nnUNetPlans.json") | {
        "configurations": plans["configurations"],
        "foreground_intensity_properties_per_channel": {"0": {**window, "mean": -600.0, "percentile_00_5": -1000.0}},
    }
    write_json(folder / "nnUNetPlans.json", plans)
    said = adapt_checkpoint("901", name="ct", weights=path).report.table()
    assert "CT channel 0 is normalised by another window: [-200, 300] HU, mean 50" in said


def test_a_changed_checkpoint_is_a_warning(folder, tmp_path):
    path = write_checkpoint(tmp_path / "edited.pth", fake_plan())
    content = read_checkpoint(path)
    content["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"][0, 0, 0, 0, 0] += 1
    save_checkpoint(content, path)
    assert "hash differs" in adapt_checkpoint("901", name="edited", weights=path).report.table()


def test_another_architecture_is_refused_with_the_command_that_mends_it(folder, tmp_path):
    plans = fake_plan()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 32]
    path = write_checkpoint(tmp_path / "a wide one.pth", plans)
    with pytest.raises(UserError, match=r"features_per_stage is \[8,16,32\] in pretraining") as error:
        adapt_checkpoint("901", name="wide", weights=path)
    assert (
        f"nnssl_plugin plan -d 901 -p nnUNetPlans --like '{path}' -n nnUNetPlans-like-pretraining" in error.value.remedy
    )
    assert "--resize-width" in error.value.problem and not list(folder.glob("*wide*"))
    assert adapt_checkpoint("901", name="wide", weights=path, min_coverage=0).report.coverage("encoder") == 0
    asked = adapt_checkpoint("901", name="narrow", weights=path, options=AdaptationOptions(resize_width=True))
    assert asked.report.coverage("encoder") == 1
    assert read_json(asked.plan)["finetuning"]["source"]["resize_width"] is True


@pytest.mark.parametrize("residual", [False, True])
def test_one_isotropic_channel_is_adapted_to_four_anisotropic_ones_and_loads_with_stock_nnunet(
    nnunet_environment, tmp_path, residual
):
    plans = write_fake_dataset(cases=1, channels=4, residual=residual)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    architecture |= {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    plans["configurations"]["3d_fullres"]["normalization_schemes"] *= 4
    write_json(folder / "nnUNetPlans.json", plans)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    write_json(folder / "dataset.json", read_json(folder / "dataset.json") | {"labels": labels})
    adapted = adapt_checkpoint(
        "901", name="toy", weights=write_checkpoint(tmp_path / "one.pth", fake_plan(residual=residual))
    )
    report = adapted.report
    assert report.coverage("encoder") == 1.0 and report.coverage("head") == 0.0
    assert {r.reason for r in report.adapted()} == {
        "input channels 1 → 4; kernel 3×3×3 → 1×3×3",
        "kernel 3×3×3 → 1×3×3",
        "upsampling stride 2×2×2 → 1×2×2",
    } - ({"kernel 3×3×3 → 1×3×3"} if not residual else set())
    network = target_network(folder)
    load_pretrained_weights(network, str(adapted.weights))
    assert network(torch.randn(1, 4, 8, 16, 16))[0].shape == (1, 4, 8, 16, 16)


@pytest.mark.parametrize("name", ["a__b", "a/b", "a\\b", "", "..", "-x", "a b", "_x"])
def test_bad_names_are_refused(folder, checkpoint, name):
    with pytest.raises(UserError):
        adapt_checkpoint("901", name=name, weights=checkpoint)


def test_a_plan_of_another_origin_is_never_replaced(folder, checkpoint):
    write_json(folder / "nnUNetPlans-toy.json", {"plans_name": "nnUNetPlans-toy", "configurations": {}})
    with pytest.raises(UserError, match="was not written by adapt"):
        adapt_checkpoint("901", name="toy", weights=checkpoint)


def test_a_plan_with_results_keeps_what_it_says(folder, checkpoint, tmp_path):
    adapt_checkpoint("901", name="toy", weights=checkpoint)
    other = write_checkpoint(tmp_path / "other.pth", fake_plan())
    adapt_checkpoint("901", name="toy", weights=other)
    results = Path(os.environ["nnUNet_results"], NAME, "nnUNetTrainer__nnUNetPlans-toy__3d_fullres")
    results.mkdir(parents=True)
    with pytest.raises(UserError, match="was trained with"):
        adapt_checkpoint("901", name="toy", weights=checkpoint)
    adapt_checkpoint("901", name="toy", weights=other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dataset": "77"}, "no dataset 77"),
        ({"dataset": "Dataset077_Gone"}, "no folder"),
        ({"plans_name": "Gone"}, "here are: nnUNetPlans"),
        ({"configuration": "2d"}, "has no configuration 2d"),
    ],
)
def test_what_is_missing_is_named_with_nnunets_command(folder, checkpoint, arguments, said):
    arguments = {"dataset": "901", "name": "toy", "weights": checkpoint} | arguments
    with pytest.raises(UserError, match=said) as error:
        adapt_checkpoint(arguments.pop("dataset"), **arguments)
    assert "nnUNetv2_plan_and_preprocess -d" in error.value.remedy


def test_a_checkpoint_is_needed_unless_from_scratch(folder):
    with pytest.raises(UserError, match="No checkpoint"):
        adapt_checkpoint("901", name="toy")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"network_weights": {"a": 3}}])
def test_files_without_weights_are_refused(folder, tmp_path, content):
    save_checkpoint(content, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="holds no weights"):
        adapt_checkpoint("901", name="toy", weights=tmp_path / "bare.pth")


def test_provenance_is_plain_and_says_where_the_weights_come_from(checkpoint):
    provenance = torch.load(checkpoint, weights_only=True)["provenance"]
    json.dumps(provenance)
    assert provenance["data"] == {"dataset": NAME, "cases": 4} and provenance["channels"] == ["MR"]
    assert provenance["orientation"] == "RAS" and provenance["spacing_mm"] == [1.0, 1.0, 1.0]
    assert provenance["network"]["class"].endswith("PlainConvUNet")
    assert set(provenance["packages"]) >= {"nnssl_plugin", "nnunetv2", "torch"}


def test_nnssls_plan_names_parts_that_are_in_the_weights(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    json.dumps(plan)
    for place in (plan["key_to_encoder"], plan["key_to_stem"], *plan["keys_to_in_proj"]):
        assert any(key.startswith(f"{place}.") for key in content["network_weights"]), place
    assert list(plan["pretrain_plan"]["configurations"]) == ["3d_fullres"]
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert plan["recommended_downstream_patchsize"] == [16, 16, 16] and plan["pretrain_num_input_channels"] == 1


def test_the_hash_depends_on_values_keys_and_shapes_but_not_on_order():
    a, b = torch.arange(4.0), torch.ones(2, dtype=torch.bfloat16)
    reference = weights_hash({"a": a, "b": b})
    assert reference == weights_hash({"b": b.clone(), "a": a.clone()})
    for other in ({"a": a + 1, "b": b}, {"a": a.view(2, 2), "b": b}, {"c": a, "b": b}, {"a": a, "b": b.half()}):
        assert weights_hash(other) != reference
    assert weights_hash({"scalar": torch.tensor(1.0)}) != weights_hash({"scalar": torch.tensor(2.0)})
