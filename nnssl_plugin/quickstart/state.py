"""Keeps what a quickstart has done so far in ``quickstart.json``, by which an interrupted run goes on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.quickstart.scans import Selection, Setting

FILE = "quickstart.json"
LOCK = ".quickstart.lock"
FORMAT = 1


class State:
    """Setting, selection of scans, and finished steps of a folder; every change is on disk at once.

    Args:
        folder: the quickstart's folder.
        setting: what this run is asked to work on.

    Raises:
        UserError: the folder holds other things, or was begun with another setting.
    """

    def __init__(self, folder: Path, setting: Setting):
        self.folder, self.path = folder, folder / FILE
        if not self.path.is_file():
            check_is_free(folder)
            self._content: dict[str, Any] = {
                "format": FORMAT,
                "setting": asdict(setting),
                "selection": None,
                "steps": {},
            }
            write_json(self.path, self._content)
            return
        self._content = _read(self.path)
        begun = Setting(**self._content["setting"])
        if begun != setting:
            raise UserError(
                f"{folder} was begun with {_flags(begun)}, this run has {_flags(setting)}.",
                "Give the same flags to go on there, or another folder: -o DIR",
            )

    @property
    def setting(self) -> Setting:
        return Setting(**self._content["setting"])

    @property
    def selection(self) -> Selection | None:
        """Which scans are used for what, once the first step is done."""
        content = self._content["selection"]
        return None if content is None else Selection.from_json(content)

    @property
    def seconds(self) -> dict[str, float]:
        """Title of each finished step → seconds, interrupted attempts included."""
        return {title: step["seconds"] for title, step in self._content["steps"].items() if step["done"]}

    @property
    def commands(self) -> dict[str, str]:
        """Title of each step that is a command and was begun → the line that a shell runs."""
        return {title: step["command"] for title, step in self._content["steps"].items() if step["command"]}

    def is_done(self, title: str) -> bool:
        """Whether a step has been finished."""
        return title in self.seconds

    def record(self, title: str, *, seconds: float, done: bool, command: str | None = None) -> None:
        """Record an attempt at a step; its seconds add to those of earlier attempts."""
        before = self._content["steps"].get(title, {"seconds": 0.0})
        self._content["steps"][title] = {
            "seconds": round(before["seconds"] + seconds, 1), "done": done, "command": command,
        }  # fmt: skip
        write_json(self.path, self._content)

    def select(self, selection: Selection) -> None:
        """Record which scans are used."""
        self._content["selection"] = selection.to_json()
        write_json(self.path, self._content)


def check_is_free(folder: Path) -> None:
    """Refuse a folder that holds anything but a quickstart.

    Raises:
        UserError: naming one thing that lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file.", "Choose a folder with -o.")
    present = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
    if present and FILE not in present:
        raise UserError(
            f"{folder} is not empty and holds no quickstart (there is {present[0]}).",
            "Choose another folder with -o, or empty this one.",
        )


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold a folder for this process, and for the commands that inherit the yielded file descriptor.

    A command that outlives its killed quickstart thus keeps the folder until it ends. Without ``fcntl`` (Windows)
    nothing is held.

    Raises:
        UserError: another process works there.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise UserError(
            f"Another quickstart, or a command that one left running, works in {folder}.",
            "Wait until it has ended (ps shows it), or choose another folder with -o.",
        ) from error
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        Setting(**content["setting"])
        known = content["format"] == FORMAT
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Choose another folder with -o.") from error
    if not known:
        raise UserError(f"{path} was written by another version of this package.", "Choose another folder with -o.")
    return content


def _flags(setting: Setting) -> str:
    given = [f"--{name} {value}" for name, value in asdict(setting).items() if value is not None]
    return " ".join(given) or "generated phantoms"
