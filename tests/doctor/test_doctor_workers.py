"""Worker counts against cores and memory, control groups included."""

import pytest

from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING
from nnssl_plugin.doctor.workers import Machine, core_quota, memory_quota, this_machine, worker_findings

LARGE = Machine(cores=16, cores_of_machine=16, memory=128 * GIB, shared_memory=64 * GIB)
SMALL = Machine(cores=2, cores_of_machine=64, memory=3 * GIB, shared_memory=GIB // 16)


def by_topic(environment, machine):
    return {finding.topic: finding for finding in worker_findings(environment, machine)}


def test_nnunets_own_numbers_fit_a_large_machine():
    assert {finding.status for finding in by_topic({}, LARGE).values()} == {OK}


def test_two_cores_of_a_cluster_node_are_not_sixty_four():
    findings = by_topic({}, SMALL)
    assert "2 of 64 may be used" in findings["CPU cores"].message
    assert (
        findings["nnUNet_n_proc_DA"].status == WARNING
        and "12 processes on 2 cores" in findings["nnUNet_n_proc_DA"].message
    )
    assert findings["nnUNet_def_n_proc"].remedy == "export nnUNet_def_n_proc=2"
    assert findings["memory"].remedy == "export nnUNet_n_proc_DA=1 nnUNet_def_n_proc=1"
    assert findings["/dev/shm"].status == WARNING and "--shm-size" in findings["/dev/shm"].remedy


def test_zero_training_workers_are_a_warning_as_planning_fails_on_them():
    finding = by_topic({"nnUNet_n_proc_DA": "0"}, LARGE)["nnUNet_n_proc_DA"]
    assert finding.status == WARNING and "planning" in finding.message
    assert finding.remedy.startswith("unset nnUNet_n_proc_DA")
    assert "/dev/shm" not in by_topic({"nnUNet_n_proc_DA": "0"}, SMALL)


@pytest.mark.parametrize(
    ("name", "value"),
    [("nnUNet_n_proc_DA", "many"), ("nnUNet_n_proc_DA", ""), ("nnUNet_def_n_proc", "-1"), ("nnUNet_def_n_proc", "0")],
)
def test_no_number_is_a_problem(name, value):
    finding = by_topic({name: value}, LARGE)[name]
    assert finding.status == PROBLEM and finding.remedy == f"export {name}=16"


def test_unknown_memory_is_passed_over():
    assert "memory" not in by_topic({}, Machine(4, 4, None, None))


def test_the_strictest_quota_of_version_2_counts(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("5000\n")
    (tmp_path / "a" / "b" / "memory.current").write_text("2000\n")
    assert core_quota(tmp_path / "cgroup", tmp_path) == 1.5
    assert memory_quota(tmp_path / "cgroup", tmp_path) == 3000


def test_the_quota_of_version_1_counts(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cgroup").write_text("3:cpuset:/x\n2:cpu,cpuacct:/job\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert core_quota(tmp_path / "cgroup", tmp_path) == 4
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert core_quota(tmp_path / "cgroup", tmp_path) is None
    assert core_quota(tmp_path / "absent", tmp_path) is None


def test_this_machine_has_cores():
    machine = this_machine()
    assert 1 <= machine.cores <= machine.cores_of_machine
