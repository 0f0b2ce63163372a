"""Versions are held against what the package's own metadata ask for; numbers stand nowhere else."""

import re
from importlib import metadata

import pytest

from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING
from nnssl_plugin.doctor.packages import command_findings, installed_versions, own_requirements, package_findings

REQUIRES = [
    "nnunetv2<3,>=2.8.1",
    "torch>=2.6",
    "open_clip_torch>=3.0",
    "tqdm",
    'monai>=1.5; extra == "evaluation"',
    'winonly; sys_platform == "another"',
]
INSTALLED = {
    "nnssl-plugin": "0.1.0",
    "nnunetv2": "2.8.1",
    "torch": "2.14.1+cu130",
    "open-clip-torch": "3.3.0",
    "tqdm": "4.0",
}


def by_topic(findings):
    assert len({finding.topic for finding in findings}) == len(findings)
    return {finding.topic: finding for finding in findings}


def test_everything_in_range_is_in_order():
    findings = by_topic(package_findings(INSTALLED, ">=3.10", REQUIRES, python="3.11.7"))
    assert {finding.status for finding in findings.values()} == {OK}
    assert findings["torch"].message == "2.14.1+cu130" and "winonly" not in findings
    assert "not installed (optional)" in findings["monai"].message and "1 more" in findings["others"].message


@pytest.mark.parametrize(
    ("name", "version", "range_"),
    [
        ("nnunetv2", "2.5.0", "<3,>=2.8.1"),
        ("nnunetv2", "3.0", "<3"),
        ("torch", "2.5.1", ">=2.6"),
        ("tqdm", None, "tqdm"),
    ],
)
def test_too_old_too_new_or_missing_is_a_problem_with_the_install_command(name, version, range_):
    installed = {**INSTALLED, name: version}
    if version is None:
        del installed[name]
    finding = by_topic(package_findings(installed, "", REQUIRES))[name]
    assert finding.status == PROBLEM and finding.remedy.startswith(f'pip install "{name}') and range_ in finding.remedy
    assert (version or "not installed") in finding.message


def test_old_python_missing_self_and_old_optional_are_found():
    installed = {**INSTALLED, "monai": "0.8"}
    del installed["nnssl-plugin"]
    findings = by_topic(package_findings(installed, ">=3.10", REQUIRES, python="3.9.1"))
    assert findings["Python"].status == PROBLEM and ">=3.10" in findings["Python"].message
    assert findings["nnssl_plugin"].status == PROBLEM
    assert findings["monai"].status == WARNING and findings["monai"].remedy == 'pip install "monai>=1.5"'


def test_the_ranges_are_those_of_the_installed_metadata():
    _, requires = own_requirements()
    assert requires == metadata.requires("nnssl_plugin")
    assert any(re.match(r"nnunetv2\b.*2\.", line) for line in requires)
    assert installed_versions()["nnunetv2"] == metadata.version("nnunetv2")


def test_nnunet_of_another_environment_on_path_is_found(tmp_path):
    for place in ("own", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "nnUNetv2_train").write_text("#!/bin/sh\n")
        (tmp_path / place / "nnUNetv2_train").chmod(0o755)
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    assert command_findings({"PATH": f"{own}:{other}"}, own)[0].status == OK
    (wrong,) = command_findings({"PATH": f"{other}:{own}"}, own)
    assert wrong.status == WARNING and other in wrong.message and wrong.remedy == f'export PATH="{own}:$PATH"'
    assert "not on PATH" in command_findings({"PATH": ""}, own)[0].message
    assert command_findings({"PATH": other}, str(tmp_path)) == []
