"""``plan --like``: a plan with a checkpoint's network, whose whole encoder then loads."""

import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset
from small_primus import with_primus

from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights
from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.adaptation.like import plan_like, training_bytes
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_pretraining
from nnssl_plugin.checkpoints.sources.source import Source, read_source
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.plans import build_network

ONE_CHANNEL = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
UNDER = "3d_fullres"


def source_plan(kind: str, **configuration) -> dict:
    """A pretraining's plan with a network that differs from the target's."""
    plan = with_primus(fake_plan()) if kind == "primus" else fake_plan(residual=kind == "residual")
    if kind != "primus":
        kwargs = plan["configurations"][UNDER]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"] = [6, 12, 12]
        kwargs["strides"] = [[1, 1, 1], [2, 2, 2], [1, 2, 2]]
    plan["configurations"][UNDER] |= configuration
    return plan


def write_checkpoint(path: Path, plan: dict) -> Path:
    torch.manual_seed(1)
    weights = build_network(plan, UNDER, ONE_CHANNEL).state_dict()
    provenance = describe_pretraining(
        method="toy",
        settings={},
        training={},
        plans=plan,
        configuration=UNDER,
        dataset_json=ONE_CHANNEL,
        trained=[""],
        steps=1,
        cases=1,
        citations=[],
        licence="CC0-1.0",
    )
    arguments = {"plans": plan, "configuration": UNDER, "dataset_json": ONE_CHANNEL}
    save_checkpoint({"network_weights": weights, "provenance": provenance, "init_args": arguments}, path)
    return path


@pytest.fixture
def folder(nnunet_environment) -> Path:
    write_fake_dataset(cases=1)
    return Path(os.environ["nnUNet_preprocessed"], NAME)


def like(tmp_path, plan, **arguments):
    source = read_source(write_checkpoint(tmp_path / "source.pth", plan))
    return plan_like("901", source, **{"name": "like"} | arguments)


@pytest.mark.parametrize("kind", ["plain", "residual", "primus"])
def test_the_network_is_the_checkpoints_and_its_whole_encoder_loads(folder, tmp_path, kind):
    plan = source_plan(kind)
    write_checkpoint(tmp_path / "source.pth", plan)
    assert main(["plan", "-d", "901", "-n", "like", "--like", str(tmp_path / "source.pth")]) == 0
    written = read_json(folder / "like.json")
    assert list(written["configurations"]) == [UNDER]
    before, after = (p["configurations"][UNDER]["architecture"] for p in (plan, written))
    assert after["network_class_name"] == before["network_class_name"]
    assert after["arch_kwargs"] == before["arch_kwargs"]
    target = fake_plan()["configurations"][UNDER]
    kept = ("spacing", "normalization_schemes", "data_identifier", "batch_size")
    assert all(written["configurations"][UNDER][key] == target[key] for key in kept)
    adapted = adapt_checkpoint("901", name="toy", weights=tmp_path / "source.pth", plans_name="like")
    assert adapted.report.coverage("encoder") == 1.0


def test_a_target_of_other_channels_and_classes_reaches_the_whole_encoder_too(folder, tmp_path):
    four = {"channel_names": {str(c): "MR" for c in range(4)}, "labels": {"background": 0, "a": 1, "b": 2}}
    write_json(folder / "dataset.json", four)
    like(tmp_path, source_plan("primus"))
    network = build_network(read_json(folder / "like.json"), UNDER, four)
    source = read_source(tmp_path / "source.pth")
    _, report = adapt_weights(source.weights, network, trained=None)
    assert report.coverage("encoder") == 1.0


@pytest.mark.parametrize(
    ("kind", "wanted", "shape", "expected"),
    [
        ("plain", [64, 64, 64], [18, 200, 200], [18, 64, 64]),  # strides 2, 4, 4: the axis of few slices is covered
        ("plain", [64, 64, 64], [17, 63, 200], [18, 64, 64]),
        ("plain", [33, 30, 64], [90, 90, 90], [32, 28, 64]),  # nearest divisible, the smaller of two
        ("plain", [16, 16, 16], [1, 2, 3], [2, 4, 8]),  # never a single voxel at the bottom
        ("primus", [16, 32, 32], [9, 200, 30], [12, 32, 32]),
    ],
)
def test_the_patch_is_cut_to_the_median_case_and_divisible(folder, tmp_path, kind, wanted, shape, expected):
    target = fake_plan()
    target["configurations"][UNDER]["median_image_size_in_voxels"] = shape
    write_json(folder / "nnUNetPlans.json", target)
    plan = source_plan(kind)
    write_checkpoint(tmp_path / "source.pth", plan)
    source = read_source(tmp_path / "source.pth")
    source.provenance["patch_size"] = wanted
    written = plan_like("901", source, name="like")
    configuration = read_json(folder / "like.json")["configurations"][UNDER]
    assert configuration["patch_size"] == expected
    if kind == "primus":
        assert configuration["architecture"]["arch_kwargs"]["input_shape"] == expected
    said = f"patch size: {'×'.join(map(str, wanted))} in the checkpoint → {'×'.join(map(str, expected))} here"
    assert any(note.startswith(said) for note in written.notes)


def test_the_patch_that_the_checkpoint_recommends_goes_before_that_of_its_pretraining(folder, tmp_path):
    file = write_checkpoint(tmp_path / "source.pth", source_plan("plain"))
    source = read_source(file)
    source.content["nnssl_adaptation_plan"] = {"recommended_downstream_patchsize": [8, 8, 12]}
    plan_like("901", source, name="like")
    assert read_json(folder / "like.json")["configurations"][UNDER]["patch_size"] == [8, 8, 12]


def test_spacing_and_normalisation_are_taken_over_with_data_of_their_own(folder, tmp_path, capsys):
    plan = source_plan(
        "plain", spacing=[2.0, 1.0, 0.5], normalization_schemes=["CTNormalization"], use_mask_for_norm=[True]
    )
    plan["foreground_intensity_properties_per_channel"] = {"0": {"mean": 40.0, "std": 80.0}}
    write_json(folder / "dataset.json", ONE_CHANNEL | {"channel_names": {"0": "CT", "1": "CT"}})
    target = fake_plan()
    target["configurations"][UNDER] |= {
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [False] * 2,
    }
    write_json(folder / "nnUNetPlans.json", target)
    file = write_checkpoint(tmp_path / "source.pth", plan)
    assert main(["plan", "-d", "901", "-n", "like", "--like", str(file), "--spacing", "--normalisation"]) == 0
    written = read_json(folder / "like.json")
    configuration = written["configurations"][UNDER]
    assert configuration["spacing"] == [2.0, 1.0, 0.5]
    assert configuration["median_image_size_in_voxels"] == [9.0, 20.0, 34.0]
    assert configuration["normalization_schemes"] == ["CTNormalization"] * 2
    assert configuration["use_mask_for_norm"] == [True] * 2
    assert written["foreground_intensity_properties_per_channel"] == {c: {"mean": 40.0, "std": 80.0} for c in "01"}
    assert configuration["data_identifier"] == "like_3d_fullres"
    printed = capsys.readouterr().out
    assert "nnUNetv2_preprocess -d 901 -plans_name like -c 3d_fullres" in printed
    assert f"nnssl_plugin adapt -d 901 -w {file} -c 3d_fullres -p like -n NAME" in printed


def test_without_being_asked_the_data_stay_as_they_are(folder, tmp_path):
    written = like(tmp_path, source_plan("plain", spacing=[2.0, 1.0, 0.5]))
    assert written.to_preprocess == []
    assert read_json(folder / "like.json")["configurations"][UNDER]["data_identifier"] == "fake_data"


def test_settings_come_last_and_other_weights_stay_behind(folder, tmp_path):
    write_json(
        folder / "nnUNetPlans.json",
        fake_plan() | {"finetuning": {"weights": "other.pth", "configuration": UNDER, "source": {}, "epochs": 7}},
    )
    like(tmp_path, source_plan("plain"), assignments=["configurations.3d_fullres.batch_size=3", "finetuning.lr=0.001"])
    written = read_json(folder / "like.json")
    assert written["configurations"][UNDER]["batch_size"] == 3
    assert written["finetuning"] == {"epochs": 7, "lr": 0.001}


def test_a_batch_that_may_not_fit_is_said(folder, tmp_path):
    wide = source_plan("plain")
    wide["configurations"][UNDER]["architecture"]["arch_kwargs"]["features_per_stage"] = [40, 80, 80]
    notes = like(tmp_path, wide).notes
    assert any("memory" in note and "configurations.3d_fullres.batch_size=1" in note for note in notes)
    assert not any("memory" in note for note in like(tmp_path, fake_plan(), name="same").notes)


@pytest.mark.parametrize("kind", ["plain", "residual", "primus"])
def test_the_memory_is_what_a_step_keeps(kind):
    plan = with_primus(fake_plan()) if kind == "primus" else fake_plan(residual=kind == "residual")
    network = build_network(plan, UNDER, ONE_CHANNEL)
    kept, weights = {}, {p.data_ptr() for p in network.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(torch.randn(1, 1, 16, 16, 16))
    del outputs
    parameters = 4 * sum(p.numel() for p in network.parameters())
    expected = 2 * sum(size for place, size in kept.items() if place not in weights) + 3 * parameters
    assert training_bytes(plan, UNDER, ONE_CHANNEL) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"network": None}, {}, "does not say which network"),
        ({"provenance": {}}, {"spacing": True}, "does not say its spacing_mm"),
        ({"provenance": {}}, {"normalisation": True}, "does not say its normalisation"),
        ({"provenance": {"patch_size": [16, 16]}}, {}, "2D patches"),
        ({"provenance": {"normalisation": ["A", "B"]}}, {"normalisation": True}, "in different ways"),
        ({}, {"configuration": "2d"}, "no configuration 2d"),
        ({}, {"name": "nnUNetPlans"}, "never edited in place"),
    ],
)
def test_what_the_checkpoint_cannot_answer_is_refused(folder, tmp_path, change, arguments, said):
    source = read_source(write_checkpoint(tmp_path / "source.pth", source_plan("plain")))
    source = Source(**{field: getattr(source, field) for field in source.__dataclass_fields__} | change)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=said):
        plan_like("901", source, **{"name": "like"} | arguments)
    assert sorted(folder.iterdir()) == before


def test_a_cascade_is_refused(folder, tmp_path):
    plan = fake_plan()
    plan["configurations"]["3d_cascade_fullres"] = deepcopy(plan["configurations"][UNDER]) | {"previous_stage": UNDER}
    write_json(folder / "nnUNetPlans.json", plan)
    with pytest.raises(UserError, match="second stage of a cascade"):
        like(tmp_path, source_plan("plain"), configuration="3d_cascade_fullres")


def test_flags_for_a_checkpoint_need_one(folder, capsys):
    assert main(["plan", "-d", "901", "-n", "x", "--spacing"]) == 2
    assert "Add --like CHECKPOINT" in capsys.readouterr().err
