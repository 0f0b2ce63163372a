"""nnU-Net's three folders: set, there, writable, and with room for what will be written."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping

from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING, Finding, gib

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ROOM = 10 * GIB
"""Free space under which a drive is reported when no dataset is named."""


def folder_findings(environment: Mapping[str, str]) -> list[Finding]:
    """One finding per variable of nnU-Net; whether a folder is writable is tried, not asked for."""
    return [_folder(name, environment.get(name, "").strip()) for name in FOLDERS]


def disk_findings(
    environment: Mapping[str, str],
    need: Mapping[str, float] | None = None,
    *,
    free: Callable[[str], tuple[int, int]] | None = None,
) -> list[Finding]:
    """Free space against need on the drives of nnUNet_preprocessed and nnUNet_results.

    Args:
        environment: folders that are not set or not there are passed over (:func:`folder_findings` reports them).
        need: variable → bytes that will be written there; None: only little space in general is reported.
        free: path → (number of the drive, free bytes); default: of this machine.
    """
    drives: dict[int, dict] = {}
    for name in FOLDERS[1:]:
        path = environment.get(name, "").strip()
        if os.path.isdir(path):
            number, space = (free or free_space)(path)
            drive = drives.setdefault(number, {"names": [], "path": path, "free": space, "need": 0.0})
            drive["names"].append(name)
            drive["need"] += need.get(name, 0) if need else 0
    return [_drive(drive, known=need is not None) for drive in drives.values()]


def free_space(path: str) -> tuple[int, int]:
    """Number of the drive that holds a folder, and its free bytes."""
    return os.stat(path).st_dev, shutil.disk_usage(path).free


def _folder(name: str, path: str) -> Finding:
    if not path:
        return Finding(name, PROBLEM, "not set", f'export {name}="$HOME/nnunet/{name}" && mkdir -p "${name}"')
    if path.startswith("~"):
        return Finding(name, PROBLEM, f"{path}: nnU-Net does not expand '~'", f'export {name}="$HOME{path[1:]}"')
    if not os.path.lexists(path):
        return Finding(name, PROBLEM, f"{path} does not exist", f'mkdir -p "{path}"')
    if not os.path.isdir(path):
        return Finding(
            name,
            PROBLEM,
            f"{path} is no folder",
            f'export {name}="{os.path.dirname(os.path.abspath(path))}/{name}" && mkdir -p "${name}"',
        )
    error = _write(path)
    if error is not None:
        return _unwritable(name, path, error)
    if not os.path.isabs(path):
        return Finding(
            name,
            WARNING,
            f"{path} is relative: it changes with the working folder",
            f'export {name}="{os.path.abspath(path)}"',
        )
    return Finding(name, OK, path)


def _write(path: str) -> OSError | None:
    """Create, write and remove a file: permissions as asked for say little for root and on network drives."""
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".nnssl_plugin_doctor_") as trial:
            trial.write(b"x")
    except OSError as error:
        return error
    return None


def _unwritable(name: str, path: str, error: OSError) -> Finding:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Finding(name, PROBLEM, f"{path}: {reason}", f'du -sh "{path}"/*   (shows what to remove)')
    if name == "nnUNet_raw":  # raw data are often shared and read-only; training only reads them
        return Finding(
            name,
            WARNING,
            f"{path} cannot be written ({reason}): prepare and caption need that",
            f'chmod u+w "{path}"   (or ask its owner)',
        )
    return Finding(
        name, PROBLEM, f"{path} cannot be written: {reason}", f'chmod u+w "{path}"   (or: export {name}=ANOTHER_FOLDER)'
    )


def _drive(drive: Mapping, *, known: bool) -> Finding:
    topic = " and ".join(name.removeprefix("nnUNet_") for name in drive["names"])
    text = f"{gib(drive['free'])} free"
    remedy = f'du -sh "{drive["path"]}"/*   (shows what to remove; or move the folder to another drive)'
    if known:
        text += f", about {gib(drive['need'])} needed"
        short = drive["free"] < drive["need"]
        return Finding(topic, PROBLEM if short else OK, text, remedy if short else "")
    if drive["free"] < ROOM:
        return Finding(topic, WARNING, f"{text}; nnssl_plugin doctor -d ID holds it against a dataset", remedy)
    return Finding(topic, OK, text)
