"""What a prepared dataset holds, in a few lines: sizes, spacings, shares of the body masks, and what was left out."""

import re
from collections.abc import Sequence

import numpy as np

from nnssl_plugin.intake.ledger import LABEL, Origin, Rejection
from nnssl_plugin.io.text import some

FAR_MADS = 3.5
"""Scaled median absolute deviations from the median beyond which a share is an outlier (Iglewicz and Hoaglin 1993)."""
FAR_SHARE = 0.15
"""What an outlier differs by at least, however alike the others are."""
SMALL_SHARE = 0.02
"""A body mask that takes less of its image is told in any case."""


def describe_cases(origins: Sequence[Origin]) -> list[str]:
    """Lines with the ranges of size, spacing and share of the body mask, outliers by name; none for no cases."""
    if not origins:
        return []
    first = first_images(origins)
    lines = [f"size     {ranges([row.shape for row in first])} voxels"]
    spacings = [row.spacing_mm for row in first if row.spacing_mm]
    lines += [f"spacing  {ranges(spacings)} mm"] if spacings else []
    shares = body_shares(origins)
    if shares:
        values = np.array(list(shares.values()))
        lines.append(f"mask     {values.min():.0%} to {values.max():.0%} of the image, median {np.median(values):.0%}")
        far = [f"{case} ({shares[case]:.1%})" for case in far_shares(shares)]
        lines += [f"look at {some(far)}: the mask takes far more or less than in the others"] if far else []
    return lines


def first_images(origins: Sequence[Origin]) -> list[Origin]:
    """The row of each case's first image, on whose grid the others lie."""
    rows: dict[str, Origin] = {}
    for row in sorted(origins, key=lambda row: row.channel):
        if row.channel != LABEL:
            rows.setdefault(row.case, row)
    return [rows[case] for case in sorted(rows)]


def body_shares(origins: Sequence[Origin]) -> dict[str, float]:
    """Case → share of its image that the body mask takes, 0 to 1, where the table says it."""
    return {row.case: float(row.body_share) for row in origins if row.body_share}


def far_shares(shares: dict[str, float]) -> list[str]:
    """Cases whose share is far from the others', the farthest first."""
    values = np.array(list(shares.values()))
    median = float(np.median(values)) if values.size else 0.0
    spread = 1.4826 * float(np.median(np.abs(values - median))) if values.size else 0.0
    limit = max(FAR_MADS * spread, FAR_SHARE)
    far = [case for case, share in shares.items() if abs(share - median) > limit or share < SMALL_SHARE]
    return sorted(far, key=lambda case: -abs(shares[case] - median))


def count_reasons(rejected: Sequence[Rejection]) -> list[tuple[int, str, Rejection]]:
    """How many files were left out for which reason, the most frequent first, with the first file of each."""
    groups: dict[str, list[Rejection]] = {}
    for row in rejected:
        groups.setdefault(reason_kind(row.reason), []).append(row)
    return sorted(
        ((len(rows), kind, rows[0]) for kind, rows in groups.items()), key=lambda group: (-group[0], group[1])
    )


def reason_kind(reason: str) -> str:
    """A reason without what is particular to one file: numbers at its start, and all after a colon or bracket."""
    text = re.sub(r"^set aside: ", "", reason)
    return re.sub(r"^\d+ (?!.*image)", "", re.split(r":| \(", text, maxsplit=1)[0])


def axes_of(rows: Sequence[str]) -> np.ndarray:
    """``["10x20", "12x20"]`` → (cases, axes) float64; of rows with other numbers of axes, those they have in common."""
    return np.array(list(zip(*([float(part) for part in row.split("x")] for row in rows), strict=False))).T


def ranges(rows: Sequence[str]) -> str:
    """``["10x20", "12x20"]`` → ``10-12 x 20``, on the axes that all rows have."""
    pairs = [(_number(float(axis.min())), _number(float(axis.max()))) for axis in axes_of(rows).T]
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in pairs)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else f"{value:.4g}"
