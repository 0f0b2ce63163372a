"""``nnssl_plugin export`` and ``import``: what they print and how they fail."""

import importlib
from pathlib import Path

import pytest
import torch
from small_pretraining import pretrain_one_step

from nnssl_plugin.checkpoints.sharing.export import WRITERS
from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import write_json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretrain_one_step(tmp_path_factory.mktemp("pretraining"))


def test_out_and_in_again(checkpoint, tmp_path, capsys):
    write_json(tmp_path / "summary.json", {"foreground_mean": {"Dice": 0.5}, "mean": {"1": {"Dice": 0.5}}})
    arguments = [
        "-w",
        str(checkpoint),
        "-o",
        str(tmp_path / "shared"),
        "--licence",
        "MIT",
        "--results",
        f"test={tmp_path / 'summary.json'}",
    ]
    assert main(["export", *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'shared' / 'model.safetensors'}" in printed and "read README.md" in printed
    assert "| test | 0.5000 |" in (tmp_path / "shared" / "README.md").read_text()
    assert main(["import", str(tmp_path / "shared"), "-o", str(tmp_path / "back.pth")]) == 0
    assert f"nnssl_plugin adapt -d TARGET_ID -w {tmp_path / 'back.pth'}" in capsys.readouterr().out
    before, after = (
        torch.load(path, weights_only=True)["network_weights"] for path in (checkpoint, tmp_path / "back.pth")
    )
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "-w", "gone.pth", "-o", "out"],
        ["export", "-w", "gone.pth", "-o", "out", "--zip", "x.zip"],
        ["export", "--stock", "-w", "gone", "-o", "out"],
        ["import", "gone.pth", "-o", "out.pth"],
        ["import", "--trust", "gone.pth", "-o", "out.pth"],
        ["import", ".", "-o", "out.pth"],
    ],
)
def test_mistakes_are_a_few_lines_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"nnssl_plugin {arguments[0]}: ") and len(captured.err.splitlines()) <= 10
    assert not captured.out and list(tmp_path.iterdir()) == []


def test_the_flag_offers_every_layout():
    assert tuple(WRITERS) == importlib.import_module("nnssl_plugin.cli.export").FORMATS
