"""From weights and network to state dict and report."""

import json
from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights, architecture_differences, check_coverage
from nnssl_plugin.checkpoints.adaptation.report import LoadReport, TensorRecord
from nnssl_plugin.errors import UserError

ENCODER = ["encoder.", "decoder.encoder."]


def unet(*, kind=PlainConvUNet, channels=1, classes=2, features=(4, 8, 16), dimensions=3):
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimensions]
    blocks = {PlainConvUNet: "n_conv_per_stage", ResidualEncoderUNet: "n_blocks_per_stage"}[kind]
    stages = len(features)
    return kind(
        channels,
        stages,
        features,
        conv,
        3,
        [1] + [2] * (stages - 1),
        num_classes=classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        **{blocks: [2] * stages},
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize(("dimensions", "channels"), [(2, 1), (3, 4)])
def test_equal_networks_give_equal_features_and_fresh_heads(kind, dimensions, channels):
    source = unet(kind=kind, dimensions=dimensions, channels=channels, classes=2)
    target = unet(kind=kind, dimensions=dimensions, channels=channels, classes=5)
    before = deepcopy(target.state_dict())
    state, report = adapt_weights(source.state_dict(), target, trained=None)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    assert list(state) == list(target.state_dict())
    target.load_state_dict(state)
    image = torch.randn(1, channels, *[16] * dimensions)
    for ours, theirs in zip(target.encoder(image), source.encoder(image), strict=True):
        assert torch.equal(ours, theirs)
    assert (report.coverage("encoder"), report.coverage("decoder"), report.coverage("head")) == (1.0, 1.0, 0.0)
    assert not report.unused
    fresh = target.state_dict()
    assert all(torch.equal(fresh[key], before[key]) for key in fresh if ".seg_layers." in key)


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_parameters_are_counted_once_though_they_are_stored_under_several_keys(kind):
    network = unet(kind=kind)
    _, report = adapt_weights(network.state_dict(), network, trained=None)
    heads = count(network.decoder.seg_layers)
    encoder = count(network.encoder)
    assert report.parameters("encoder") == (encoder, encoder)
    assert report.parameters("head") == (0, heads)
    assert report.parameters("decoder")[1] == count(network) - encoder - heads
    keys = [key for record in report.tensors for key in record.keys]
    assert sorted(keys) == sorted(network.state_dict())
    deepest = next(record for record in report.tensors if record.keys[0].startswith("encoder.stages.2."))
    assert len(deepest.keys) == 4


def test_what_was_not_trained_is_never_reported_as_loaded():
    source, target = unet(), unet()
    state, report = adapt_weights(source.state_dict(), target, trained=ENCODER)
    assert report.coverage("encoder") == 1.0 and report.coverage("decoder") == 0.0
    fresh = target.state_dict()
    for key, value in state.items():
        assert torch.equal(value, source.state_dict()[key] if key.startswith(tuple(ENCODER)) else fresh[key])
    assert {r.reason for r in report.initialised() if r.part == "decoder"} == {"not trained in pretraining"}


def test_an_encoder_alone_fills_every_alias():
    source, target = unet(), unet()
    encoder = {f"encoder.{key}": value for key, value in source.encoder.state_dict().items()}
    state, report = adapt_weights(encoder, target, trained=None)
    assert report.coverage("encoder") == 1.0
    for key, value in source.encoder.state_dict().items():
        assert torch.equal(state[f"encoder.{key}"], value) and torch.equal(state[f"decoder.encoder.{key}"], value)


def test_layers_of_another_width_stay_fresh_and_say_so():
    state, report = adapt_weights(unet(features=(4, 8, 24)).state_dict(), unet(), trained=None)
    fresh = [r for r in report.initialised() if r.part == "encoder"]
    assert {r.keys[0].split(".")[2] for r in fresh} == {"2"} and len(fresh) == 8
    assert fresh[0].reason == ("width 24×8 in the checkpoint, 16×8 here (--resize-width takes the first channels)")
    assert report.parameters("encoder")[0] == sum(
        r.parameters for r in report.tensors if r.part == "encoder" and r.status == "copied"
    )
    assert all(torch.isfinite(value).all() for value in state.values())


def test_too_little_coverage_is_an_error_that_names_the_difference_and_the_command():
    _, report = adapt_weights(unet(features=(8, 16, 32)).state_dict(), unet(), trained=None)
    differences = architecture_differences(
        {"class": "a.PlainConvUNet", "kwargs": {"features_per_stage": [8, 16, 32], "n_stages": 3}},
        {"class": "a.PlainConvUNet", "kwargs": {"features_per_stage": [4, 8, 16], "n_stages": 3}},
    )
    with pytest.raises(UserError, match=r"Only 0\.0% of the encoder") as error:
        check_coverage(report, differences=differences, mend="nnssl_plugin plan -d 7 --like WEIGHTS -n NAME")
    assert "features_per_stage is [8,16,32] in pretraining, [4,8,16] here" in error.value.problem
    assert error.value.remedy.endswith("  nnssl_plugin plan -d 7 --like WEIGHTS -n NAME")
    assert len(str(error.value).splitlines()) <= 10
    check_coverage(report, minimum=0.0)


@pytest.mark.parametrize(
    ("change", "trained", "cause"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, None, "prefix such as 'module.'"),
        (lambda state: state, ["decoder.stages."], "did not train the encoder"),
    ],
)
def test_the_likeliest_cause_is_named(change, trained, cause):
    _, report = adapt_weights(change(unet().state_dict()), unet(), trained=trained)
    with pytest.raises(UserError, match=cause):
        check_coverage(report)


def test_differences_between_networks_are_named():
    residual, plain = {"class": "a.Residual", "kwargs": {"n": 1}}, {"class": "a.Plain", "kwargs": {}}
    assert architecture_differences(residual, plain) == ["Residual in pretraining, Plain here"]
    assert architecture_differences(residual, {"class": "a.Residual", "kwargs": {"n": 1, "m": [2]}}) == [
        "m is null in pretraining, [2] here"
    ]
    assert architecture_differences(None, plain) == architecture_differences(plain, plain) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_refused(value):
    state = unet().state_dict()
    state["encoder.stages.0.0.convs.0.conv.bias"][0] = value
    with pytest.raises(UserError, match="not finite"):
        adapt_weights(state, unet(), trained=None)


def test_half_precision_becomes_the_precision_of_the_target():
    state, report = adapt_weights({k: v.half() for k, v in unet().state_dict().items()}, unet(), trained=None)
    assert {value.dtype for value in state.values()} == {torch.float32} and report.coverage("encoder") == 1.0


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("backwards", [False, True])
def test_of_copies_that_differ_the_networks_own_name_wins_and_the_report_says_so(kind, backwards):
    """nnssl's Spark trainer writes copies of the encoder that share no memory, of which one was trained."""
    source = {key: value.clone() for key, value in unet(kind=kind).state_dict().items()}
    expected = {key: value.clone() for key, value in source.items() if key.startswith("encoder.")}
    for key, value in source.items():
        if key.startswith("decoder.encoder."):
            value.add_(1)
    target = unet(kind=kind)
    state, report = adapt_weights(dict(reversed(source.items())) if backwards else source, target, trained=None)
    target.load_state_dict(state)
    loaded = target.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert len(report.warnings) == 1 and "copies that differ" in report.warnings[0]
    assert "encoder.st" in report.warnings[0] and "not decoder.encoder." in report.warnings[0]
    _, report = adapt_weights({k: v.clone() for k, v in unet(kind=kind).state_dict().items()}, target, trained=None)
    assert not report.warnings  # copies that are equal are no news


def test_tensors_below_the_encoder_without_a_place_count_against_the_weights():
    source = unet().state_dict()
    extra = {"encoder.stages.1.attention.weight": torch.ones(10**6), "teacher.weight": torch.ones(10**6)}
    _, report = adapt_weights({**source, **extra}, unet(), trained=None)
    encoder = sum(p.numel() for p in unet().encoder.parameters())
    assert (report.placed, report.unplaced) == (encoder, 10**6)
    assert report.coverage("encoder") == 1.0 and report.checkpoint_coverage == encoder / (encoder + 10**6)
    assert f"{encoder:,} of {encoder + 10**6:,} parameters" in report.table()
    with pytest.raises(
        UserError, match=r"of the checkpoint's encoder has a place .*1,000,000 parameters have none"
    ) as error:
        check_coverage(report, tables=["right"], mend="nnssl_plugin plan --like FILE --mapping right")
    assert "--mapping right" in error.value.remedy
    check_coverage(report, minimum=0.0)
    _, report = adapt_weights({**source, **extra}, unet(), trained=["encoder.stages.0.", "encoder.stages.2."])
    assert report.unplaced == 0  # what was not trained is no loss


def test_stages_and_blocks_that_a_smaller_network_leaves_out_are_no_loss():
    source, target = unet(features=(4, 8, 16, 32)), unet(features=(4, 8, 16))
    _, report = adapt_weights(source.state_dict(), target, trained=None)
    assert report.coverage("encoder") == report.checkpoint_coverage == 1.0 and report.unused
    check_coverage(report)


def test_every_tensor_that_is_not_finite_is_named():
    state = {key: value.clone() for key, value in unet().state_dict().items()}
    for stage in (0, 2):
        state[f"encoder.stages.{stage}.0.convs.0.conv.bias"][0] = float("nan")
    state["teacher.weight"] = torch.full((2,), float("nan"))  # not taken, so it does no harm
    with pytest.raises(UserError, match=r"in 2 of its tensors: encoder\.stages\.0.*, encoder\.stages\.2"):
        adapt_weights(state, unet(), trained=None)


def test_tensors_without_a_place_are_listed():
    _, report = adapt_weights({**unet().state_dict(), "teacher.weight": torch.ones(1)}, unet(), trained=None)
    assert report.unused == ("teacher.weight",) and "teacher.weight" in report.table()


def test_the_report_is_a_short_table_and_a_whole_json(tmp_path):
    network = unet()
    _, report = adapt_weights(network.state_dict(), network, trained=ENCODER)
    report = report.with_warnings(["voxel spacing differs"])
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["coverage"] == {"encoder": 1.0, "decoder": 0.0, "head": 0.0}
    assert len(saved["tensors"]) == len({id(t) for t in network.state_dict(keep_vars=True).values()})
    table = report.table().splitlines()
    assert len(table) == 5 and "100.0%" in table[1] and table[-1] == "warning: voxel spacing differs"


def test_a_tensor_that_is_loaded_in_part_counts_in_part():
    record = TensorRecord(("encoder.a",), "encoder", "adapted", "width 2 → 4", (4,), 4, 2, "encoder.a")
    report = LoadReport((record, TensorRecord(("encoder.b",), "encoder", "copied", "", (4,), 4, 4, "encoder.b")))
    assert report.parameters("encoder") == (6, 8) and report.adapted() == (record,)
    assert "adapted: width 2 → 4 (1 tensor)" in report.table()


def test_an_exact_copy_shares_the_memory_of_the_checkpoint():
    source = unet().state_dict()
    state, _ = adapt_weights(source, unet(), trained=None)
    shared = [key for key in state if state[key].data_ptr() == source[key].data_ptr()]
    assert len(shared) == len([key for key in state if ".seg_layers." not in key])
