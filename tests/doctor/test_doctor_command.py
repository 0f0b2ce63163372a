"""The command: a readable report, JSON, exit codes, and no import of what may be broken."""

import json
import os
import subprocess
import sys

import pytest

from nnssl_plugin.cli.main import main
from nnssl_plugin.doctor import asking
from nnssl_plugin.doctor.asking import Answer
from nnssl_plugin.doctor.examination import examine
from nnssl_plugin.doctor.finding import OK, PROBLEM, STATUSES, WARNING, Finding
from nnssl_plugin.doctor.report import section_lines, summary
from nnssl_plugin.doctor.trainers import expected_trainers, own_folder

TORCH = Answer(
    {
        "torch": {"version": "2.14.1", "requires": []},
        "torch_error": "",
        "torchvision_error": "",
        "gpus": [],
        "torchvision": {"version": "0.29.1", "requires": ["torch>=2.14"]},
    }
)


@pytest.fixture
def answers(monkeypatch):
    """torch and nnU-Net as they answer when all is well, without the seconds that asking takes."""
    trainers = {
        name: {"module": module, "file": "f.py", "error": ""}
        for name, module in expected_trainers(own_folder()).items()
    }
    monkeypatch.setattr(asking, "ask_torch", lambda environment: TORCH)
    monkeypatch.setattr(asking, "ask_nnunet", lambda environment, names: Answer({"trainers": trainers}))
    monkeypatch.setenv("nnUNet_extTrainer", str(own_folder()))


def test_a_machine_in_order_exits_with_0_and_writes_the_findings(answers, nnunet_environment, capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "Med3DInsightPretrainer" in printed and "torchvision 0.29.1 fit and import" in printed
    assert len(printed.splitlines()) <= 50
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == 0 and {f["status"] for f in report["findings"]} <= set(STATUSES)
    assert report["warnings"] == sum(f["status"] == WARNING for f in report["findings"])


def test_a_problem_exits_with_1_and_shows_what_mends_it(answers, nnunet_environment, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "export nnUNet_results=" in printed and printed.splitlines()[-1].startswith("1 problem,")


def test_cuda_asked_for_and_absent_exits_with_1(answers, nnunet_environment):
    assert main(["doctor", "-device", "cpu"]) == 0
    assert main(["doctor", "-device", "cuda"]) == 1


def test_an_unknown_dataset_is_a_finding_and_not_a_crash(answers, nnunet_environment, capsys):
    assert main(["doctor", "-d", "999"]) == 1
    assert "there is no dataset 999" in capsys.readouterr().out


def test_json_that_cannot_be_written_is_a_mistake(answers, nnunet_environment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--json", str(tmp_path / "file" / "report.json")]) == 2
    assert "--json" in capsys.readouterr().err


def test_lines_are_aligned_and_plain_where_the_terminal_is():
    findings = [Finding("a", OK, "fine", section="Heading"), Finding("long", PROBLEM, "bad: é", "mend", "Heading")]
    assert section_lines(findings) == ["Heading", "  ✓ a     fine", "  ✗ long  bad: é", "      → mend"]
    plain = section_lines(findings, encoding="ascii")
    assert plain == ["Heading", "  ok a     fine", "  X  long  bad: ?", "      -> mend"]
    assert section_lines([]) == []


def test_the_summary_counts():
    fine, warned, broken = (Finding("t", status, "") for status in (OK, WARNING, PROBLEM))
    assert summary([fine]) == "Everything is in order."
    assert summary([fine, warned]) == "No problems, 1 warning: nothing that stops a run."
    assert summary([broken, broken, warned]).startswith("2 problems, 1 warning.")


def test_neither_torch_nor_nnunet_is_imported():
    code = (
        "import sys, nnssl_plugin.doctor.examination, nnssl_plugin.cli.doctor\n"
        "sys.exit(' '.join({'torch', 'torchvision', 'nnunetv2', 'batchgenerators'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.slow
def test_a_broken_torchvision_and_unset_folders_are_found_in_one_run(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment |= {"PYTHONPATH": str(tmp_path), "nnUNet_extTrainer": str(own_folder())}
    problems = {f.topic: f for f in examine(environment) if f.status == PROBLEM}
    assert {"nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "torch + torchvision", "none found"} <= set(problems)
    assert "torchvision::nms" in problems["torch + torchvision"].message
    assert "torchvision::nms" in problems["none found"].message
