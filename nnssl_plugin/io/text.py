"""Pieces of the messages that a user reads."""

from collections.abc import Sequence
from unicodedata import category

HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
"""Categories of Unicode of what is not shown but acted upon."""


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"


def printable(text: str) -> str:
    """``text`` as a terminal may show it: control, format and surrogate characters become their escapes.

    A file may hold sequences that move the cursor, colour or overwrite what stands there, or turn the reading
    direction; line breaks stay.
    """
    return "".join(char if char == "\n" or category(char) not in HIDDEN else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
