"""The benchmark of LVM-Med's matching runs and gives shares of a step."""

import runpy
import sys

import pytest

from nnssl_plugin.io.files import read_json


def test_shares_of_a_step(repository, tmp_path, monkeypatch, capsys):
    output = tmp_path / "share.json"
    small = ["--batch", "4", "--size", "64", "--blocks", "1", "1", "1", "1", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["matching_share.py", *small])
    runpy.run_path(str(repository / "benchmarks" / "matching_share.py"), run_name="__main__")
    (result,) = read_json(output)["results"]
    assert len(result["rounds"]) == 2
    for seconds in result["rounds"]:
        assert 0 < seconds["solver"] < seconds["step"] and 0 < seconds["matching"] < seconds["step"]
    assert result["shares"]["matching"] == pytest.approx(
        sum(each["matching"] / each["step"] for each in result["rounds"]) / 2
    )
    assert "of the step" in capsys.readouterr().out
