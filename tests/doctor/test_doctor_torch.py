"""A torch and a torchvision that do not fit are found by really importing them; what torch computes on is reported."""

import os

import pytest

from nnssl_plugin.doctor.asking import Answer, ask_torch
from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING
from nnssl_plugin.doctor.gpu import driver_says, gpu_findings
from nnssl_plugin.doctor.torch_pair import pair_findings

TORCH = """
from types import SimpleNamespace
__version__ = {version!r}
version = SimpleNamespace(cuda=None)
backends = SimpleNamespace()
cuda = SimpleNamespace(is_available=lambda: False)
"""


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}


def install(folder, name, version, source, *, requires=(), build=""):
    """A package and its metadata, as pip would leave them."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    (folder / name / "version.py").write_text(f"__version__ = '{version}{build}'\n")
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (information / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def pair(environment):
    (finding,) = pair_findings(ask_torch(environment))
    return finding


def test_a_matching_pair_is_in_order(tmp_path, environment):
    install(tmp_path, "torch", "2.13.0", TORCH.format(version="2.13.0+cpu"))
    install(tmp_path, "torchvision", "0.28.0", "", requires=["numpy", "torch==2.13.0"], build="+cpu")
    finding = pair(environment)
    assert finding.status == OK and "torch 2.13.0+cpu, torchvision 0.28.0+cpu" in finding.message


def test_a_cpu_torch_beside_a_cuda_torchvision_is_named_with_its_remedy(tmp_path, environment):
    """The metadata agree: only the import tells (nnU-Net's own trainers then hide every external one)."""
    install(tmp_path, "torch", "2.13.0", TORCH.format(version="2.13.0+cpu"))
    install(
        tmp_path,
        "torchvision",
        "0.28.0",
        "raise RuntimeError('operator torchvision::nms does not exist')",
        requires=["torch==2.13.0"],
        build="+cu130",
    )
    finding = pair(environment)
    assert finding.status == PROBLEM
    for part in ("torch 2.13.0+cpu", "torchvision 0.28.0+cu130", "operator torchvision::nms does not exist"):
        assert part in finding.message
    assert finding.remedy == "pip install --force-reinstall torch==2.13.0 torchvision==0.28.0"


def test_the_remedy_takes_the_torch_that_torchvision_asks_for(tmp_path, environment):
    install(tmp_path, "torch", "2.12.0", TORCH.format(version="2.12.0"))
    install(tmp_path, "torchvision", "0.28.0", "import torch.absent", requires=["torch (==2.13.0)"])
    finding = pair(environment)
    assert finding.status == PROBLEM
    assert finding.remedy == "pip install --force-reinstall torch==2.13.0 torchvision==0.28.0"


@pytest.mark.parametrize(("asked", "mend"), [("torch==2.13.0", "torch==2.13.0"), ("torch>=2.13", '"torch>=2.13"')])
def test_metadata_that_disagree_are_a_warning_where_the_pair_imports(asked, mend, tmp_path, environment):
    install(tmp_path, "torch", "2.12.0", TORCH.format(version="2.12.0"))
    install(tmp_path, "torchvision", "0.28.0", "", requires=[asked])
    finding = pair(environment)
    assert finding.status == WARNING and asked in finding.message and "torch 2.12.0" in finding.message
    assert finding.remedy == f"pip install --force-reinstall {mend} torchvision==0.28.0"


def test_a_torch_that_does_not_import_or_kills_its_process_is_a_problem(tmp_path, environment):
    install(tmp_path, "torch", "2.13.0", "raise OSError('libcudart.so.13: cannot open shared object file')")
    install(tmp_path, "torchvision", "0.28.0", "", requires=["torch==2.13.0"])
    assert "libcudart.so.13" in pair(environment).message
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    finding = pair(environment)
    assert finding.status == PROBLEM and "killed by signal 11" in finding.message


def test_a_process_that_hangs_is_given_up(tmp_path, environment):
    install(tmp_path, "torch", "2.13.0", "import time\ntime.sleep(60)")
    answer = ask_torch(environment, patience=1)
    assert answer.error == "no answer within 1 s" and answer.facts["torch"]["version"] == "2.13.0"


@pytest.mark.slow
def test_the_real_torch_beside_a_broken_torchvision(tmp_path, environment):
    install(tmp_path, "torchvision", "0.1.0", "import torch\ntorch.ops.torchvision.nms.default")
    answer = ask_torch(environment)
    (finding,) = pair_findings(answer)
    assert finding.status == PROBLEM and "torchvision 0.1.0" in finding.message and "nms" in finding.message
    assert answer.facts["gpus"] == []


def gpu(**changes):
    return {"name": "NVIDIA H100", "free": 78 * GIB, "total": 80 * GIB, "bf16": True, **changes}


def test_a_gpu_is_described():
    answer = Answer({"gpus": [gpu()], "cuda_build": "13.0"})
    first, driver = gpu_findings(answer, ["NVIDIA H100, driver 580.1"], {}, device="cuda")
    assert first.status == OK and "78.0 GiB free of 80.0 GiB, bf16" in first.message
    assert driver.status == OK and "580.1" in driver.message and "CUDA 13.0" in driver.message


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [({"free": 3 * GIB}, "nvidia-smi"), ({"free": 5.9 * GIB, "total": 6 * GIB}, "-gpu_memory_target 5")],
)
def test_a_full_or_small_gpu_is_a_warning(changes, remedy):
    first = gpu_findings(Answer({"gpus": [gpu(**changes)]}), [], {})[0]
    assert first.status == WARNING and remedy in first.remedy


@pytest.mark.parametrize(
    ("facts", "driver", "environment", "message", "remedy"),
    [
        ({"cuda_build": "13.0"}, [], {"CUDA_VISIBLE_DEVICES": ""}, "hidden", "unset CUDA_VISIBLE_DEVICES"),
        ({"cuda_build": None}, ["A100, driver 1"], {}, "without CUDA", "pip install --force-reinstall torch"),
        ({"cuda_build": "13.0"}, ["A100, driver 1"], {}, "cannot use it", "Update the driver"),
        ({"gpu_error": "RuntimeError: no kernel image"}, [], {}, "no kernel image", "pip install"),
        ({}, [], {}, "none that torch can use", "-device cpu"),
    ],
)
def test_a_missing_gpu_is_a_problem_only_where_it_is_asked_for(facts, driver, environment, message, remedy):
    answer = Answer({"gpus": [], **facts})
    (asked,) = gpu_findings(answer, driver, environment, device="cuda")
    (unasked,) = gpu_findings(answer, driver, environment)
    assert asked.status == PROBLEM and unasked.status == WARNING
    assert message in asked.message and message in unasked.message
    assert remedy in asked.remedy and remedy in unasked.remedy


def test_cpu_on_purpose_and_apple_say_what_to_expect():
    assert "seconds" in gpu_findings(Answer({"gpus": [gpu()]}), [], {}, device="cpu")[0].message
    assert "-device mps" in gpu_findings(Answer({"gpus": [], "mps": True}), [], {})[0].message


def test_the_driver_is_asked(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert driver_says({"PATH": str(tmp_path)}) == ["NVIDIA H100, driver 580.65"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'failed to communicate'\nexit 9\n")
    assert driver_says({"PATH": str(tmp_path)}) == [] and driver_says({"PATH": ""}) == []
