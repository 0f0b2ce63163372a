"""Encoders exported for torchvision and timm: their own models take them, and see what the pretraining saw."""

import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import make_trainer
from small_planar import NETWORKS, with_planar
from small_pretraining import pretrain_one_step
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet

from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer

BLOCK = {
    "epochs": 1,
    "iterations_per_epoch": 1,
    "validation_iterations": 1,
    "batch_size": 2,
    "warmup_epochs": 0,
    "method": {"nodes": 2, "neighbours": 1, "dim": 8},
}


def pretrained(name, channels, monkeypatch):
    """The checkpoint of a pretraining of one step, and its network."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for drawing in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{drawing}", lambda *arguments, **named: None)
    write_fake_dataset(cases=2, dimensions=2, channels=channels)
    planned = make_trainer(trainer_class=LVMMedPretrainer, dimensions=2, channels=channels, cases=2, pretraining=BLOCK)
    plan = with_planar(planned.plans_manager.plans, name) | {"continue_training": False}
    trainer = LVMMedPretrainer(plan, "2d", "all", planned.dataset_json, torch.device("cpu"))
    trainer.run_training()
    return f"{trainer.output_folder}/checkpoint_final.pth", trainer.task.backbone.network.eval().requires_grad_(False)


def small_resnet():
    arguments = NETWORKS["ResNetUNet"][1]
    return ResNet(Bottleneck, arguments["blocks"], width_per_group=arguments["width_per_group"]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_resnet_and_detector_take_the_encoder(channels, nnunet_environment, monkeypatch, tmp_path):
    checkpoint, network = pretrained("ResNetUNet", channels, monkeypatch)
    assert main(["export", "-w", checkpoint, "-o", str(tmp_path / "out"), "--format", "torchvision"]) == 0
    weights = torch.load(tmp_path / "out" / "encoder.pth", weights_only=True)
    resnet = small_resnet().requires_grad_(False)
    missing, unexpected = resnet.load_state_dict(weights, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and unexpected == []
    image = torch.randn(1, channels, 64, 64)
    shown = image.expand(1, 3, 64, 64)
    maps = network.encoder(image)
    layers = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(resnet, layers, [256, 512, 1024, 2048], 256)
    for number, found in enumerate(backbone.body(shown).values()):
        torch.testing.assert_close(found, maps[number + 1], rtol=1e-4, atol=1e-5)
    detector = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64).eval()
    assert set(detector([shown[0]])[0]) == {"boxes", "labels", "scores"}


def test_timms_own_network_takes_the_encoder(nnunet_environment, monkeypatch, tmp_path):
    checkpoint, network = pretrained("SAMUNet", 1, monkeypatch)
    folder = export_checkpoint(checkpoint, tmp_path / "out", layout="timm").folder
    options = {key: value for key, value in NETWORKS["SAMUNet"][1].items() if key != "decoder_width"}
    theirs = VisionTransformerSAM(in_chans=3, num_classes=0, use_rel_pos=True, neck_chans=0, **options)
    theirs.eval().requires_grad_(False).load_state_dict(torch.load(folder / "encoder.pth", weights_only=True))
    image = torch.randn(1, 1, 64, 64)
    found = theirs.forward_features(image.expand(1, 3, 64, 64))
    torch.testing.assert_close(found, network.vit(image), rtol=1e-4, atol=1e-5)
    assert "samvit_base_patch16" in (folder / "README.md").read_text()


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_another_network_is_refused_with_the_preset_that_would_do(layout, tmp_path):
    checkpoint = pretrain_one_step(tmp_path)
    with pytest.raises(UserError, match=f"whose encoder is not {layout}'s") as error:
        export_checkpoint(checkpoint, tmp_path / "out", layout=layout)
    assert "--preset" in error.value.remedy and not (tmp_path / "out").exists()
