"""A network of one channel pretrained on a dataset of four, and what becomes of it."""

import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, write_fake_dataset
from pretraining_harness import run
from toy_variants import OneModalityPretrainer

import nnssl_plugin as nnssl
from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import build_network

STEM = "encoder.stages.0.0.convs.0.conv.weight"


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


@pytest.fixture
def checkpoint(quiet) -> Path:
    trainer = run(trainer_class=OneModalityPretrainer, channels=4, pretraining={"epochs": 1})
    return Path(trainer.output_folder, "checkpoint_final.pth")


def test_the_checkpoint_and_inspect_say_so(checkpoint):
    content = read_checkpoint(checkpoint)
    assert content["network_weights"][STEM].shape == (4, 1, 3, 3, 3)
    assert content["provenance"]["network_channels"] == 1 and content["provenance"]["channels"] == ["MR"] * 4
    assert content["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 1
    assert "1 channels, in pretraining 1, made of MR, MR, MR, MR" in " ".join(screen(inspect_file(checkpoint)).split())


@pytest.mark.parametrize("channels", [1, 4])
def test_adapt_takes_it_to_the_channels_of_the_target(checkpoint, channels):
    """An image that is the same in every channel gives the features of pretraining."""
    plan = write_fake_dataset(channels=channels)
    adapted = adapt_checkpoint("901", name="toy", weights=checkpoint)
    assert adapted.report.coverage("encoder") == 1.0
    assert any("network read 1 channel in pretraining" in line for line in adapted.report.warnings)
    before, after = (read_checkpoint(path)["network_weights"] for path in (checkpoint, adapted.weights))
    torch.testing.assert_close(after[STEM], before[STEM].expand(-1, channels, -1, -1, -1) / channels)
    dataset_json = read_json(Path(os.environ["nnUNet_preprocessed"], NAME, "dataset.json"))
    network = build_network(plan, "3d_fullres", dataset_json).eval()
    network.load_state_dict(after)
    image = torch.randn(2, 1, 16, 16, 16)
    expected = nnssl.load_backbone(checkpoint)(image)
    found = network.encoder(image.expand(-1, channels, -1, -1, -1))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert nnssl.load_backbone(adapted.weights).input_channels == channels


def test_an_image_of_four_channels_is_no_input_of_it_and_that_is_said(checkpoint):
    backbone = nnssl.load_backbone(checkpoint)
    assert backbone.input_channels == 1 and backbone.image_channels == 4
    with pytest.raises(UserError, match="reads 1 channels, which its method made of the 4") as error:
        backbone.embed(torch.zeros(4, 8, 8, 8).numpy(), spacing=(1, 1, 1))
    assert "nnssl_plugin adapt" in error.value.remedy
