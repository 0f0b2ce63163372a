"""Encoders in torchvision's and timm's names reach a 2D plan, also of another number of channels, and pretraining."""

import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from small_planar import NETWORKS, with_planar
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torchvision.models.resnet import Bottleneck, ResNet

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer


def published(name, path):
    """A file as torchvision and timm write it, of the small network."""
    torch.manual_seed(1)
    arguments = NETWORKS[name][1]
    if name == "ResNetUNet":
        network = ResNet(Bottleneck, arguments["blocks"], width_per_group=arguments["width_per_group"])
    else:
        options = {key: value for key, value in arguments.items() if key != "decoder_width"}
        network = VisionTransformerSAM(in_chans=3, num_classes=0, use_rel_pos=True, neck_chans=0, **options)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.2)
    torch.save(network.state_dict(), path)
    return network.state_dict()


TABLES = {"ResNetUNet": ("torchvision-resnet50", "encoder."), "SAMUNet": ("sam-vit-b", "vit.")}


@pytest.fixture
def folder(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)
    write_fake_dataset(cases=4, dimensions=2)
    return Path(os.environ["nnUNet_preprocessed"], NAME)


def adapted(name, folder, tmp_path):
    """The file that ``adapt`` makes of a published one, its tensors, and those of the published one."""
    plan = with_planar(read_json(folder / "nnUNetPlans.json"), name) | {"plans_name": "planar"}
    write_json(folder / "planar.json", plan)
    weights = published(name, tmp_path / "published.pth")
    command = ["adapt", "-d", "901", "-w", str(tmp_path / "published.pth"), "-p", "planar", "-n", "theirs"]
    assert main([*command, "--mapping", TABLES[name][0], "-c", "2d"]) == 0
    return torch.load(folder / "planar-theirs_2d.pth", weights_only=True)["network_weights"], weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_file_is_adapted_to_images_of_one_channel(name, folder, tmp_path):
    ours, weights = adapted(name, folder, tmp_path)
    assert read_json(folder / "planar-theirs_2d_report.json")["coverage"]["encoder"] == 1.0
    wanted = {f"{TABLES[name][1]}{key}": value for key, value in weights.items() if not key.startswith("fc.")}
    changed = {key for key, value in wanted.items() if not ours[key].equal(value)}
    first = {"ResNetUNet": "encoder.conv1.weight", "SAMUNet": "vit.patch_embed.proj.weight"}[name]
    assert changed == {first}
    torch.testing.assert_close(ours[first], wanted[first].sum(1, keepdim=True))  # a grey image, shown in three channels


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pretraining_starts_from_a_published_file(name, folder, tmp_path):
    ours, _ = adapted(name, folder, tmp_path)
    block = {"epochs": 1, "batch_size": 2, "warmup_epochs": 0, "weights": "planar-theirs_2d.pth"}
    plan = with_planar(read_json(folder / "planar.json"), name) | {"pretraining": block, "continue_training": False}
    dataset_json = read_json(folder / "dataset.json")
    trainer = LVMMedPretrainer(plan, "2d", "all", dataset_json, torch.device("cpu"))
    trainer.on_train_start()
    trainer.interruption.release()
    state = trainer.task.backbone.network.state_dict()
    encoder = [key for key in state if key.startswith(TABLES[name][1])]
    assert encoder and all(state[key].equal(ours[key]) for key in encoder)
