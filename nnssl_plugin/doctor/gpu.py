"""What torch can compute on."""

import shutil
import subprocess
from collections.abc import Mapping

from nnssl_plugin.doctor.asking import Answer
from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING, Finding, gib

PLANNED_FOR = 8 * GIB
"""GPU memory for which nnU-Net's default planner sizes patch and batch."""


def driver_says(environment: Mapping[str, str], *, patience: float = 15) -> list[str]:
    """``NAME, driver VERSION`` of each GPU that NVIDIA's driver shows; empty without driver or GPU."""
    command = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, env=dict(environment), capture_output=True, text=True, timeout=patience)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [f"{row[0].strip()}, driver {row[-1].strip()}" for row in rows if len(row) > 1]


def gpu_findings(
    answer: Answer, driver: list[str], environment: Mapping[str, str], *, device: str | None = None
) -> list[Finding]:
    """Whether training can use a GPU.

    Args:
        answer: of :func:`~nnssl_plugin.doctor.asking.ask_torch`.
        driver: of :func:`driver_says`.
        environment: for CUDA_VISIBLE_DEVICES.
        device: ``cuda`` makes a missing GPU a problem; otherwise it is a warning.
    """
    facts = answer.facts
    if "gpus" not in facts:
        status = PROBLEM if device == "cuda" else WARNING
        why = answer.error or "torch cannot be imported"
        return [Finding("GPU", status, f"unknown: {why}", "Mend torch first.")]
    if device == "cpu":
        return [_on_cpu("not used, as asked with -device cpu")]
    if facts["gpus"]:
        build = f"torch for CUDA {facts.get('cuda_build') or 'none'}"
        about = Finding("driver", OK, "; ".join([*dict.fromkeys(driver), build]))
        return [*(_gpu(index, gpu) for index, gpu in enumerate(facts["gpus"])), about]
    missing = _missing(facts, driver, environment)
    if device == "cuda":
        return [Finding("GPU", PROBLEM, missing[0], missing[1] or "Use a machine with a GPU, or -device cpu.")]
    if missing[1]:
        return [Finding("GPU", WARNING, missing[0], missing[1])]
    return [_on_cpu(missing[0], mps=facts.get("mps", False))]


def _gpu(index: int, gpu: Mapping) -> Finding:
    precision = "bf16" if gpu["bf16"] else "no bf16 (fp16 is what nnU-Net uses)"
    text = f"{gpu['name']}, {gib(gpu['free'])} free of {gib(gpu['total'])}, {precision}"
    if gpu["free"] < gpu["total"] / 2:
        return Finding(f"GPU {index}", WARNING, f"{text}: other processes hold the rest", "nvidia-smi   (shows which)")
    if gpu["total"] < 0.9 * PLANNED_FOR:  # a card sold as 8 GB shows a little less
        return Finding(
            f"GPU {index}",
            WARNING,
            f"{text}; nnU-Net plans for {gib(PLANNED_FOR)}",
            f"nnUNetv2_plan_and_preprocess -d ID -gpu_memory_target {max(1, gpu['total'] // GIB - 1)} ...",
        )
    return Finding(f"GPU {index}", OK, text)


def _missing(facts: Mapping, driver: list[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Why torch sees no GPU, and what mends it where something does."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if facts.get("gpu_error"):
        return f"a first computation failed: {facts['gpu_error']}", "pip install --force-reinstall torch torchvision"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES"
    if driver and not facts.get("cuda_build"):
        return (
            f"{driver[0]} is there, but this torch is built without CUDA",
            "pip install --force-reinstall torch torchvision",
        )
    if driver:
        return (
            f"{driver[0]} is there, but torch for CUDA {facts['cuda_build']} cannot use it",
            "Update the driver, or install a torch for an older CUDA (https://pytorch.org/get-started).",
        )
    return "none that torch can use", ""


def _on_cpu(why: str, *, mps: bool = False) -> Finding:
    other = "; Apple's mps is there, which nnU-Net takes as -device mps" if mps else ""
    return Finding(
        "GPU",
        WARNING,
        f"{why}: a step of a planned 3D network takes seconds, a training days{other}",
        "Give -device cpu to nnU-Net's commands; to see the whole pipeline in minutes: nnssl_plugin quickstart",
    )
