"""nnU-Net's training entry point with the environment set, for schedulers, torchrun and time limits."""

import os
import re
import sys
import time

import torch.distributed as dist

from nnssl_plugin.errors import UserError
from nnssl_plugin.training.interruption import DEADLINE

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Seconds of a duration such as ``90m``, ``1.5h``, ``2d`` or ``3600`` (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise UserError(f"'{text}' is no duration.", "Write 90m, 1.5h, 2d or seconds.")
    return float(match[1]) * UNITS[match[2] or "s"]


def launch(arguments: list[str], *, search_path: str, time_limit: str | None = None) -> None:
    """Run ``nnUNetv2_train`` with these arguments in this process.

    Under torchrun (``WORLD_SIZE`` > 1) the ranks are joined first: NCCL on CUDA, gloo elsewhere; nnU-Net's own
    launcher serves CUDA on one machine only.
    """
    os.environ["nnUNet_extTrainer"] = search_path
    if time_limit:
        os.environ[DEADLINE] = str(time.time() + seconds_of(time_limit))
    joined = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if joined:
        _join_ranks(arguments)
    from nnunetv2.run.run_training import run_training_entry  # takes seconds to import

    sys.argv = ["nnUNetv2_train", *arguments]
    try:
        run_training_entry()
    finally:
        if joined:
            dist.destroy_process_group()


def _join_ranks(arguments: list[str]) -> None:
    device = arguments[arguments.index("-device") + 1] if "-device" in arguments else "cuda"
    if device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
