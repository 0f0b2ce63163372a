"""Asking torch and nnU-Net about themselves, in a process with the same interpreter and environment."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_plugin.doctor.probe import MARK

PATIENCE = 120
"""Seconds after which a question is given up; a first import from a network drive takes a minute."""


@dataclass(frozen=True)
class Answer:
    """What a process told before it ended."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why it did not come to its end; empty when it did."""


def ask_torch(environment: Mapping[str, str], *, patience: float = PATIENCE) -> Answer:
    """Versions, builds, importability and GPUs (see :func:`nnssl_plugin.doctor.probe.torch_facts`)."""
    return _ask(["torch"], environment, patience)


def ask_nnunet(environment: Mapping[str, str], names: Sequence[str], *, patience: float = PATIENCE) -> Answer:
    """What nnU-Net's finder makes of trainer names (see :func:`nnssl_plugin.doctor.probe.trainer_facts`)."""
    return _ask(["trainers", json.dumps(list(names))], environment, patience)


def _ask(arguments: list[str], environment: Mapping[str, str], patience: float) -> Answer:
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *arguments]
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, timeout=patience
        )
    except subprocess.TimeoutExpired as expired:
        return Answer(_facts(expired.stdout), f"no answer within {patience:g} s")
    return Answer(_facts(done.stdout), _cause(done.returncode, done.stderr))


def _facts(output: bytes | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in (output or b"").decode(errors="replace").splitlines():
        if line.startswith(MARK):
            facts.update(json.loads(line[len(MARK) :]))
    return facts


def _cause(code: int, errors: bytes) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"the process was killed by signal {-code}"
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
