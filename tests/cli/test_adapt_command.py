"""``nnssl_plugin adapt``: what it prints and how it fails."""

import json
import os
from pathlib import Path

import pytest
import torch
from fake_dataset import NAME, fake_plan, write_fake_dataset

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray, as_state
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet.plans import build_network


@pytest.fixture
def folder(nnunet_environment, tmp_path) -> Path:
    write_fake_dataset(cases=1)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    network = build_network(fake_plan(), "3d_fullres", read_json(folder / "dataset.json"))
    save_checkpoint({"network_weights": network.state_dict()}, tmp_path / "source.pth")
    return folder


def test_it_prints_the_table_the_files_and_the_next_command(folder, tmp_path, capsys):
    assert main(["adapt", "-d", "901", "-w", str(tmp_path / "source.pth"), "-n", "toy"]) == 0
    printed = capsys.readouterr().out
    assert "encoder" in printed and "100.0%" in printed
    assert str(folder / "nnUNetPlans-toy_3d_fullres.pth") in printed
    assert "nnUNetv2_train 901 3d_fullres 0 -p nnUNetPlans-toy -tr PretrainedSegmentationTrainer" in printed


@pytest.mark.parametrize(
    ("names", "trainer"),
    [(("T2", "mr"), "BrainMVPSegmentationTrainer"), (("T2", "FLAIR"), "PretrainedSegmentationTrainer")],
)
def test_the_next_command_names_the_method_s_own_trainer_where_its_arrays_serve(
    folder, tmp_path, capsys, names, trainer
):
    source = tmp_path / "source.pth"
    array = SpatialArray(torch.zeros(2, 8, 8, 8), names, (1.0,) * 3, ("IS", "PA", "LR"), ("ZScoreNormalization",) * 2)
    provenance = {"method": "brainmvp", "network": describe_network(fake_plan(), "3d_fullres")}
    content = read_checkpoint(source) | {"provenance": provenance}
    save_checkpoint(content | as_state({"templates": array}), source)
    assert main(["adapt", "-d", "901", "-w", str(source), "-n", "toy"]) == 0
    assert capsys.readouterr().out.endswith(f"0 -p nnUNetPlans-toy -tr {trainer}\n")
    assert main(["adapt", "-d", "901", "-w", str(source), "-n", "twin", "--from-scratch"]) == 0
    assert capsys.readouterr().out.endswith("-tr PretrainedSegmentationTrainer\n")


def test_from_scratch_needs_no_checkpoint(folder, capsys):
    assert main(["adapt", "-d", NAME, "-n", "scratch", "--from-scratch"]) == 0
    assert read_json(folder / "nnUNetPlans-scratch.json")["finetuning"]["weights"] is None
    assert "-p nnUNetPlans-scratch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "a__b", "--from-scratch"],
        ["-n", "toy"],
        ["-n", "toy", "-w", "gone.pth"],
        ["-n", "toy", "--from-scratch", "-c", "2d"],
    ],
)
def test_mistakes_are_a_few_lines_and_exit_code_2(folder, capsys, arguments):
    assert main(["adapt", "-d", "901", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nnssl_plugin adapt: ") and len(captured.err.splitlines()) <= 10
    assert not captured.out


def test_wider_weights_are_taken_when_asked_for(folder, tmp_path, capsys):
    plan = fake_plan()
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 10, 20]
    network = build_network(plan, "3d_fullres", read_json(folder / "dataset.json"))
    save_checkpoint({"network_weights": network.state_dict()}, tmp_path / "wide.pth")
    arguments = ["adapt", "-d", "901", "-w", str(tmp_path / "wide.pth"), "-n", "wide"]
    assert main(arguments) == 2 and "--resize-width" in capsys.readouterr().err
    assert main([*arguments, "--resize-width"]) == 0 and "adapted: width " in capsys.readouterr().out


def test_keys_are_renamed_by_a_table(folder, tmp_path, capsys):
    network = build_network(fake_plan(), "3d_fullres", read_json(folder / "dataset.json"))
    renamed = {
        key.replace("encoder.", "enc_"): value for key, value in network.encoder.state_dict(prefix="encoder.").items()
    }
    save_checkpoint({"state_dict": renamed}, tmp_path / "other.pth")
    table = {"format": 1, "name": "mine", "rename": [["^enc_", "encoder."]]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    arguments = ["adapt", "-d", "901", "-w", str(tmp_path / "other.pth"), "-n", "other"]
    assert main(arguments) == 2 and "keys do not match" in capsys.readouterr().err
    assert main([*arguments, "--mapping", str(tmp_path / "table.json")]) == 0
    assert "100.0%" in capsys.readouterr().out
