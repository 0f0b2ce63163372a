"""nnU-Net's folders and the disk: each thing that may be wrong is made wrong."""

import os
import sys

import pytest

from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING
from nnssl_plugin.doctor.folders import disk_findings, folder_findings, free_space

NAMES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def environment(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    return {name: str(tmp_path / name) for name in NAMES}


@pytest.fixture
def unwritable(tmp_path):
    """A folder in which nothing can be created, for root too."""
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        return str(tmp_path / "closed")
    if sys.platform == "linux":
        return "/proc"  # permissions say that root may write there, trying says no
    pytest.skip("no folder here that an administrator cannot write")


def results(environment):
    return folder_findings(environment)[2]


def test_three_good_folders_stay_as_they_were(environment):
    assert [(f.topic, f.status) for f in folder_findings(environment)] == [(name, OK) for name in NAMES]
    assert all(os.listdir(environment[name]) == [] for name in NAMES)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_unset_folders_are_problems_with_the_export(value):
    findings = folder_findings({} if value is None else dict.fromkeys(NAMES, value))
    assert [f.status for f in findings] == [PROBLEM] * 3
    assert all(f.remedy.startswith(f"export {f.topic}=") and "mkdir -p" in f.remedy for f in findings)


def test_a_missing_folder_is_a_problem_that_mkdir_mends(environment, tmp_path):
    missing = str(tmp_path / "with space" / "results")
    finding = results({**environment, "nnUNet_results": missing})
    assert finding.status == PROBLEM and "does not exist" in finding.message
    assert finding.remedy == f'mkdir -p "{missing}"'
    assert os.system(finding.remedy) == 0
    assert results({**environment, "nnUNet_results": missing}).status == OK


def test_a_file_and_a_path_below_a_file_are_problems(environment, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is no folder" in results({**environment, "nnUNet_results": str(tmp_path / "file")}).message
    assert results({**environment, "nnUNet_results": str(tmp_path / "file" / "below")}).status == PROBLEM


def test_an_unwritable_folder_is_found_by_trying(environment, unwritable):
    finding = results({**environment, "nnUNet_results": unwritable})
    assert finding.status == PROBLEM and "cannot be written" in finding.message
    assert f'chmod u+w "{unwritable}"' in finding.remedy


def test_read_only_raw_data_are_a_warning(environment, unwritable):
    finding = folder_findings({**environment, "nnUNet_raw": unwritable})[0]
    assert finding.status == WARNING and "prepare and caption" in finding.message


def test_a_tilde_and_a_relative_path_are_reported(environment):
    tilde = results({**environment, "nnUNet_results": "~/results"})
    assert tilde.status == PROBLEM and tilde.remedy == 'export nnUNet_results="$HOME/results"'
    relative = results({**environment, "nnUNet_results": "."})
    assert relative.status == WARNING and os.getcwd() in relative.remedy


def test_little_space_is_a_warning_without_a_dataset(environment):
    (finding,) = disk_findings(environment, free=lambda path: (1, 9 * GIB))
    assert finding.status == WARNING and "9.0 GiB free" in finding.message and "du -sh" in finding.remedy
    (finding,) = disk_findings(environment, free=lambda path: (1, 11 * GIB))
    assert finding.status == OK and finding.topic == "preprocessed and results"


def test_the_need_of_both_folders_adds_up_on_one_drive(environment):
    need = {"nnUNet_preprocessed": 3 * GIB, "nnUNet_results": GIB}
    assert disk_findings(environment, need, free=lambda path: (1, int(3.9 * GIB)))[0].status == PROBLEM
    assert disk_findings(environment, need, free=lambda path: (1, 4 * GIB))[0].status == OK
    two = disk_findings(environment, need, free=lambda path: (len(path), 2 * GIB))
    assert [(f.topic, f.status) for f in two] == [("preprocessed", PROBLEM), ("results", OK)]


def test_folders_that_are_not_there_are_passed_over(environment, tmp_path):
    assert disk_findings({}) == []
    assert len(disk_findings({**environment, "nnUNet_preprocessed": str(tmp_path / "absent")})) == 1
    assert free_space(str(tmp_path))[1] > 0
