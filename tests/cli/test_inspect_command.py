"""`nnssl_plugin inspect` prints one screen, writes the JSON that it is asked for, and runs nothing."""

import os
import subprocess
import sys

import torch

from nnssl_plugin.cli.main import main
from nnssl_plugin.io.files import read_json


class Calls:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_is_described_and_the_report_written(tmp_path, capsys):
    torch.save({"state_dict": {"module.a.weight": torch.zeros(3)}, "epoch": 7}, tmp_path / "a.pth")
    assert main(["inspect", str(tmp_path / "a.pth"), "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "a file of PyTorch with a state dict" in printed and "7 epochs" in printed and "report.json" in printed
    assert read_json(tmp_path / "report.json")["parameters"] == 3


def test_a_file_that_would_run_code_is_refused_with_a_way_out(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(3)}, "x": Calls(tmp_path / "ran")}, tmp_path / "a.pth")
    assert main(["inspect", str(tmp_path / "a.pth")]) == 2
    said = capsys.readouterr().err
    assert "posix.mkdir" in said and "nnssl_plugin import --trust" in said and len(said.splitlines()) <= 10
    assert not (tmp_path / "ran").exists()


def test_a_wrong_table_is_refused(tmp_path, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    assert main(["inspect", str(tmp_path / "a.pth"), "--mapping", "absent"]) == 2
    assert "no table 'absent'" in capsys.readouterr().err


def test_the_verb_does_not_hide_pythons_own_inspect():
    check = "import nnssl_plugin.cli.inspect, inspect; print(inspect.__file__)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert "nnssl_plugin" not in found
