"""Run a console command inside the test's process, which has nnU-Net imported already: an import takes 6 to 12 s.

A command of which one test runs the true executable can be run this way in all others.
"""

import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Thread

import pytest
import torch

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.quickstart.commands import environment_for


class WorkerThreads:
    """In the place of the context ``spawn``, whose workers import nnU-Net anew."""

    Pool, Process = ThreadPool, Thread


@contextmanager
def nnunet_folders(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """Make nnU-Net's folders below ``root`` and set their variables until the block ends; others can be set in what
    it yields."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        yield patch


def command(root: Path, *words: str) -> str:
    """Run a command on nnU-Net's folders below ``root``, as from a shell; what it printed. It must succeed."""
    code, printed = attempt(root, *words)
    assert code == 0, printed[-6000:]
    return printed


def predict(
    root: Path, images: Path, predictions: Path, *, dataset: str, plan: str, configuration: str = "3d_fullres"
) -> None:
    """Predict a folder of images with fold 0 of what was fine-tuned, in the fewest steps that nnU-Net knows."""
    folders = ("-i", str(images), "-o", str(predictions))
    model = ("-d", dataset, "-c", configuration, "-f", "0", "-tr", "PretrainedSegmentationTrainer", "-p", plan)
    fast = ("-device", "cpu", "-step_size", "1", "--disable_tta", "-npp", "0", "-nps", "0")
    command(root, "nnUNetv2_predict", *folders, *model, *fast)


def attempt(root: Path, *words: str) -> tuple[int, str]:
    """The exit code of a command on nnU-Net's folders below ``root``, and what it printed, errors included."""
    environment = environment_for(root, search_path())
    if words[0] == "nnUNetv2_train":
        environment["nnUNet_n_proc_DA"] = "0"  # planning fails on it
    return run_with(environment, words)


def run_with(environment: dict[str, str], words: tuple[str, ...]) -> tuple[int, str]:
    """The exit code of a command under an environment of its own, and what it printed."""
    (script,) = entry_points(group="console_scripts", name=words[0])
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", list(words))
        patch.setattr(multiprocessing, "get_context", lambda method=None: WorkerThreads)
        # forked workers would inherit handlers of SIGTERM, by which a pool ends them
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        for name in ("set_num_threads", "set_num_interop_threads"):  # as many as there are cores, for ever
            patch.setattr(torch, name, lambda number: None)
        return _exit_code(script.load()), printed.getvalue()


def _exit_code(entry_point) -> int:
    """What the interpreter would exit with."""
    try:
        code = entry_point()
    except SystemExit as error:
        code = error.code
    except Exception:
        traceback.print_exc()
        return 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0
