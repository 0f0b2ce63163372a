"""Names of classes in descriptions of networks: what may be looked up, and that nothing else is run."""

from pathlib import Path

import pytest
import torch
from damaged_checkpoints import DATASET_JSON, nnssl_checkpoint, nnunet_checkpoint, own_checkpoint
from dynamic_network_architectures.architectures import primus, unet
from fake_dataset import fake_plan, write_fake_dataset
from torch import nn

from nnssl_plugin.checkpoints.format.shared_folder import file_hash
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.network_classes import check_architecture, is_layer, is_network
from nnssl_plugin.nnunet.plans import build_network

UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("torch.nn.modules.conv.Conv3d", True),
        ("torch.nn.Conv2d", True),
        ("torch.nn.modules.instancenorm.InstanceNorm3d", True),
        ("torch.nn.BatchNorm3d", True),
        ("torch.nn.LayerNorm", True),
        ("torch.nn.modules.dropout.Dropout3d", True),
        ("torch.nn.LeakyReLU", True),
        ("torch.nn.modules.activation.GELU", True),
        ("torch.nn.init.kaiming_normal_", True),
        ("dynamic_network_architectures.building_blocks.residual.BottleneckD", True),
        ("subprocess.Popen", False),
        ("os.system", False),
        ("builtins.eval", False),
        ("torch.load", False),
        ("torch.hub.load", False),
        ("torch.nn.modules.module.Module", False),
        ("torch.nn.Module", False),
        ("torch.nn.Sequential", False),
        ("torch.nn.modules.conv.torch", False),
        ("torch.nn.modules.conv.Conv3d.__init__", False),
        ("torch.nn.modules.activation.Conv3d", False),
        ("torch.nn.modules.conv.LeakyReLU", False),
        ("torch.nn.init.math", False),
        ("torch.nn.init.missing_", False),
        ("torch.nn.LeakyReLU ", False),
        ("torch.nn.LeakyReLU\n", False),
        ("LeakyReLU", False),
        ("", False),
    ],
)
def test_layers_and_initialisers_of_pytorch_are_known(name, known):
    assert is_layer(name) is known


def test_every_network_of_the_library_is_known_and_nothing_else_of_its_modules():
    for module in (unet, primus):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        assert len(classes) >= 3 and all(is_network(f"{module.__name__}.{name}") for name in classes)
    assert is_network("nnssl_plugin.networks.swin_unetr.SwinUNETR")
    assert is_network("nnssl_plugin.networks.segresnet.SegResNetDS")
    for name in (
        "dynamic_network_architectures.architectures.unet.torch",
        "dynamic_network_architectures.architectures.unet.convert_conv_op_to_dim",
        "dynamic_network_architectures.architectures.none.PlainConvUNet",
        "nnssl_plugin.networks.family.importlib",
        "nnssl_plugin.errors.UserError",
        "subprocess.Popen",
        "PlainConvUNet",
        "torch.nn.Linear",
        "evil.PlainConvUNet",
    ):
        assert not is_network(name), name


class PlainConvUNet(nn.Module):
    """Of a known family's name, in a module that is imported already."""


def test_a_class_that_is_imported_and_of_a_known_family_is_known(monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("networks_of_a_test")
    module.PlainConvUNet, module.Linear = PlainConvUNet, nn.Linear
    monkeypatch.setitem(sys.modules, "networks_of_a_test", module)
    assert is_network("networks_of_a_test.PlainConvUNet") and not is_network("networks_of_a_test.Linear")


def architecture(**changes):
    block = fake_plan()["configurations"]["3d_fullres"]["architecture"]
    arguments = block["arch_kwargs"] | changes.pop("arch_kwargs", {})
    return block | {"arch_kwargs": arguments} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"network_class_name": "subprocess.Popen"},
        {"arch_kwargs": {"nonlin": "subprocess.Popen"}},
        {"arch_kwargs": {"block": "os.system"}, "_kw_requires_import": ["block"]},
        {"arch_kwargs": {"norm_op_kwargs": {"device": {"a": ["x", "os.system"]}}}},
        {"arch_kwargs": {"nonlin_kwargs": {"os.system": 1}}},
    ],
)
def test_a_name_anywhere_in_the_description_counts(changes):
    with pytest.raises(UserError, match=r"names (subprocess\.Popen|os\.system)") as error:
        check_architecture(architecture(**changes), "FILE")
    assert "--trust" in error.value.remedy
    check_architecture(architecture(**changes), "FILE", trust=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_class_name": 3},
        {"network_class_name": None},
        {"arch_kwargs": {"conv_op": 3}},
        {"arch_kwargs": {"n_stages": 10**9}},
        {"arch_kwargs": {"n_conv_per_stage": [1, 10**6, 1]}},
        {"arch_kwargs": {"features_per_stage": [4, 10**12, 8]}},
        {"_kw_requires_import": "conv_op"},
        {"_kw_requires_import": [3]},
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_description_of_another_form_or_of_absurd_size_is_refused_whoever_vouches(changes, trust):
    with pytest.raises(UserError, match="cannot be built"):
        check_architecture(architecture(**changes), "FILE", trust=trust)
    for other in ({}, [], None, "text", architecture() | {"arch_kwargs": []}):
        with pytest.raises(UserError, match="cannot be built"):
            check_architecture(other, "FILE", trust=trust)


def evil(arguments: dict, marker: Path) -> None:
    """Make a network's non-linearity a process that leaves a trace."""
    arguments |= {"nonlin": "subprocess.check_call", "nonlin_kwargs": {"args": ["touch", str(marker)]}}


def in_own(file, marker):
    content = own_checkpoint()
    evil(content["provenance"]["network"]["kwargs"], marker)
    torch.save(content, file)


def in_the_plan(file, marker):
    content = nnunet_checkpoint()
    evil(content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"], marker)
    torch.save(content, file)


def in_nnssls_block(file, marker):
    content = nnssl_checkpoint()
    evil(content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"], marker)
    torch.save(content, file)


def in_a_shared_folder(file, marker):
    torch.save(own_checkpoint(), file.with_name("clean.pth"))
    export_checkpoint(file.with_name("clean.pth"), file)
    provenance, hashes = read_json(file / "provenance.json"), read_json(file / "hashes.json")
    evil(provenance["network"]["kwargs"], marker)
    write_json(file / "provenance.json", provenance)
    write_json(
        file / "hashes.json",
        hashes | {"files": hashes["files"] | {"provenance.json": file_hash(file / "provenance.json")}},
    )


@pytest.mark.parametrize("write", [in_own, in_the_plan, in_nnssls_block, in_a_shared_folder])
def test_no_command_runs_what_a_file_names(write, nnunet_environment, tmp_path, capsys):
    write_fake_dataset(cases=1)
    file, marker = tmp_path / "evil.pth", tmp_path / "ran"
    write(file, marker)
    assert main(["plan", "-d", "901", "-n", "like", "--like", str(file)]) == 2
    said = capsys.readouterr().err
    assert "names subprocess.check_call" in said and "--trust" in said
    assert main(["inspect", str(file)]) == 0
    assert "CAUTION: its network names subprocess.check_call" in capsys.readouterr().out
    assert main(["adapt", "-d", "901", "-n", "x", "-w", str(file)]) == 0  # builds the target's network alone
    main(["export", "-w", str(file), "-o", str(tmp_path / "out")])
    assert not marker.exists()


def test_a_plan_that_names_it_is_not_built_without_trust(tmp_path):
    plan, marker = fake_plan(), tmp_path / "ran"
    evil(plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"], marker)
    with pytest.raises(UserError, match=r"names subprocess\.check_call"):
        build_network(plan, "3d_fullres", DATASET_JSON)
    assert not marker.exists()
    with pytest.raises(UserError, match="cannot be built"):  # PyTorch takes no process for a layer
        build_network(plan, "3d_fullres", DATASET_JSON, trust=True)
    assert marker.exists()
