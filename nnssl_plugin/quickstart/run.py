"""Runs the pipeline step by step, each shown before it runs and timed, from wherever an earlier run has stopped."""

import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.quickstart.commands import (
    Stopped,
    continued,
    environment_for,
    run_step,
    shell_line,
    termination_as_interrupt,
)
from nnssl_plugin.quickstart.report import REPORT, write_report
from nnssl_plugin.quickstart.results import describe_dice
from nnssl_plugin.quickstart.scans import Setting, write_scans
from nnssl_plugin.quickstart.state import State, check_is_free, locked
from nnssl_plugin.quickstart.steps import (
    PRETRAINING,
    SECONDS,
    STOCK_PLAN,
    Step,
    finetuning_steps,
    planning_steps,
    pretraining_steps,
    titles,
)

LEAST_FREE_GIB = 0.5
NEEDED_MIB = 150
"""Disk that a finished folder takes, at most."""
SECONDS_PER_OWN_SCAN = 4
"""Reading and averaging a CT of 512×512×200 voxels."""


def run_quickstart(folder: Path, setting: Setting, *, device: str, trainers: str, say: Callable[[str], None]) -> Path:
    """Run the pipeline in a new folder, or go on in one where an earlier run has stopped.

    Args:
        folder: receives scans, nnU-Net's three folders, predictions, logs, ``quickstart.json`` and the report.
        setting: phantoms, or the user's scans.
        device: ``cpu`` or ``cuda``.
        trainers: value of ``nnUNet_extTrainer``.
        say: shows one line to the user.

    Returns:
        the report.

    Raises:
        UserError: for a folder in use or of another setting, scans that cannot be used, and a command that fails.
        Stopped: on Ctrl-C or SIGTERM; the same call goes on from there.
    """
    folder = Path(folder).resolve()
    check_is_free(folder)
    _check_folders(folder, setting)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as held, termination_as_interrupt():
        state = State(folder, setting)
        pipeline = _Pipeline(state, environment_for(folder, trainers), held, say)
        try:
            pipeline.run(device)
        except KeyboardInterrupt as interrupt:
            raise Stopped from interrupt
        for line in describe_dice(folder, state.selection):
            say(line)
    return folder / REPORT


class _Pipeline:
    """One run over the steps."""

    def __init__(self, state: State, environment: dict[str, str], held: int | None, say: Callable[[str], None]):
        self.state, self.folder = state, state.folder
        self.environment, self.held, self.say = environment, held, say
        self.titles = titles(labelled=state.setting.images is None or state.setting.labels is not None)

    def run(self, device: str) -> None:
        if all(map(self.state.is_done, self.titles)) and (self.folder / REPORT).is_file():
            self.say(f"Everything in {self.folder} is done already; remove the folder to start over.")
            return
        self._introduce()
        self._in_this_process("scans", "choose or generate the scans", self._write_scans)
        for note in self.state.selection.notes:
            self.say(f"  note: {note}")
        for step in planning_steps(self.folder, modality=self.state.selection.modality):
            self._command(step)
        plan = read_json(self.folder / "nnUNet_preprocessed" / PRETRAINING / f"{STOCK_PLAN}.json")
        for step in pretraining_steps(self.folder, plan, device=device):
            self._command(step)
        if self.state.selection.test:
            for step in finetuning_steps(self.folder, device=device):
                self._command(step)
        self._in_this_process(
            "report", "draw the pictures and write the report", lambda: write_report(self.folder, self.state)
        )

    def _introduce(self) -> None:
        """What it will cost, and the variables by which each command can be repeated by hand."""
        left = [title for title in self.titles if not self.state.is_done(title)]
        seconds = sum(SECONDS[title] for title in left)
        if "scans" in left and self.state.setting.images:
            count = len([path for path in Path(self.state.setting.images).rglob("*") if path.is_file()])
            seconds += SECONDS_PER_OWN_SCAN * min(count, 36)
        free = shutil.disk_usage(self.folder).free / 2**30
        if free < LEAST_FREE_GIB:
            raise UserError(
                f"The disk of {self.folder} has {free:.1f} GiB free; {LEAST_FREE_GIB} GiB are needed.",
                "Choose a folder on another disk with -o.",
            )
        begun = f"{len(self.titles) - len(left)} of {len(self.titles)} steps are done; " if self.state.seconds else ""
        self.say(
            f"{begun}{len(left)} steps to go: about {max(1, round(seconds / 60))} minutes on two CPU cores, "
            f"less than {NEEDED_MIB} MiB of disk ({free:.0f} GiB free) in {self.folder}"
        )
        self.say("Ctrl-C stops; the same command goes on from there. Each command is shown as you could type it:")
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            self.say(f"$ export {name}={shlex.quote(self.environment[name])}")
        self.say(f'$ eval "$(nnssl_plugin env)"   # nnUNet_extTrainer={self.environment["nnUNet_extTrainer"]}')

    def _write_scans(self) -> None:
        self.state.select(write_scans(self.folder, self.state.setting))

    def _in_this_process(self, title: str, does: str, work: Callable[[], object]) -> None:
        """A step of this process."""
        if self._announce(title, does):
            with self._timed(title, None):
                work()

    def _command(self, step: Step) -> None:
        if not self._announce(step.title, step.does):
            return
        step = continued(step)
        line = shell_line(step)
        self.say(f"$ {line}")
        log = self.folder / "logs" / f"{self.titles.index(step.title) + 1:02d}-{step.title}.log"
        with self._timed(step.title, line):
            run_step(step, log, environment=self.environment, say=self.say, held=self.held)

    def _announce(self, title: str, does: str) -> bool:
        """Show which step comes; whether it is still to be done."""
        done = self.state.is_done(title)
        self.say(
            f"[{self.titles.index(title) + 1}/{len(self.titles)}] {title}: {does}"
            + (f" (done before, in {self.state.seconds[title]:.0f} s)" if done else "")
        )
        return not done

    @contextmanager
    def _timed(self, title: str, command: str | None):
        start, done = time.monotonic(), False
        try:
            yield
            done = True
        finally:
            self.state.record(title, seconds=time.monotonic() - start, done=done, command=command)
        self.say(f"  done in {self.state.seconds[title]:.0f} s")


def _check_folders(folder: Path, setting: Setting) -> None:
    """The folder must not lie in what it reads, or the next run would take its own files for scans."""
    for name, source in (("--images", setting.images), ("--labels", setting.labels)):
        if source is not None and folder.is_relative_to(Path(source).resolve()):
            raise UserError(f"{folder} lies inside the folder of {name}.", "Choose a folder elsewhere with -o.")
    if setting.labels and not setting.images:
        raise UserError("--labels needs --images, the scans that were segmented.", "Add --images DIR.")
    if setting.labels and Path(setting.labels).resolve() == Path(setting.images).resolve():
        raise UserError("--images and --labels are the same folder.", "Keep segmentations in a folder of their own.")
