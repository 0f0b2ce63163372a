"""Triton's kernels on a CPU, by its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(script: Path) -> list[str]:
    """The words that a script prints under the interpreter, in a process of its own: Triton looks at the variable when
    it is first imported. Skips the test where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed; PyTorch brings it for CUDA on Linux")
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.split()
