"""An examination as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nnssl_plugin import __version__
from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING, Finding

MARKS = {OK: "✓", WARNING: "!", PROBLEM: "✗", "remedy": "→"}
PLAIN_MARKS = {OK: "ok", WARNING: "! ", PROBLEM: "X ", "remedy": "->"}


def section_lines(findings: Sequence[Finding], *, encoding: str = "utf-8") -> list[str]:
    """Heading and lines of one section; none where nothing was found.

    Args:
        findings: of one section.
        encoding: of the terminal; one without ✓ gets plain marks, and ``?`` for other characters that it lacks.
    """
    if not findings:
        return []
    marks = MARKS if _has_marks(encoding) else PLAIN_MARKS
    width = max(len(finding.topic) for finding in findings)
    lines = [findings[0].section]
    for finding in findings:
        lines.append(f"  {marks[finding.status]} {finding.topic:<{width}}  {finding.message}")
        if finding.remedy:
            lines.append(f"      {marks['remedy']} {finding.remedy}")
    return [line.encode(encoding, "replace").decode(encoding) for line in lines]


def summary(findings: Sequence[Finding]) -> str:
    """One line: how many problems and warnings."""
    problems, warnings = (sum(f.status == status for f in findings) for status in (PROBLEM, WARNING))
    if not problems and not warnings:
        return "Everything is in order."
    counts = f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}".capitalize()
    return f"{counts}. The lines above mend them." if problems else f"{counts}: nothing that stops a run."


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The examination as plain types."""
    return {
        "nnssl_plugin": __version__,
        "problems": sum(finding.status == PROBLEM for finding in findings),
        "warnings": sum(finding.status == WARNING for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _has_marks(encoding: str) -> bool:
    try:
        "".join(MARKS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
