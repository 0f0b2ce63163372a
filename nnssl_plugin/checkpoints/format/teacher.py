"""The teacher of a pretraining, which its checkpoint keeps beside the network."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

TEACHER = re.compile(r"(teacher(?:\.\w+)*?\.module\.network\.)")
"""Where the state of a task keeps the network of a ``networks.teacher.Teacher`` of its backbone."""


def teacher_weights(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The averaged network under the keys of the network itself; None where the method has no such teacher.

    Args:
        content: of a checkpoint.
    """
    state = (content.get("ssl_state") or {}).get("task") or {}
    prefixes = {match[1] for match in map(TEACHER.match, state) if match}
    if len(prefixes) != 1:
        return None
    (prefix,) = prefixes
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
