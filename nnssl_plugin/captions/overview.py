"""What the triplets of a dataset show, counted as in the paper's Table I (Med3DInsight).

The plane is the triplet's, the modality the case's, or what the text names where the dataset does not say. The other
rows count texts that name something, and the body part that the user gave.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from nnssl_plugin.captions.vocabulary import BODY_PARTS, CHANNELS, MODALITIES, ORGANS, TARGETS, named
from nnssl_plugin.data.triplets import Triplet

ROWS = {"Body parts": BODY_PARTS, "Internal organs": ORGANS, "Target types": TARGETS}


def count_contents(triplets: Sequence[Triplet], modality_of_case: Callable[[str], str]) -> dict[str, dict[str, int]]:
    """The rows of the table: category → name → number of triplets; names that never occur are left out.

    Args:
        triplets: those that count.
        modality_of_case: what a case shows by its header, empty where it is not known.
    """
    modalities = Counter(name for triplet in triplets for name in _modalities(triplet, modality_of_case(triplet.case)))
    planes = Counter(triplet.plane.capitalize() for triplet in triplets)
    table = {"Modalities": _ordered(modalities, MODALITIES), "Planes": dict(sorted(planes.items()))}
    for row, words in ROWS.items():
        counts = Counter(name for triplet in triplets for name in named(f"{triplet.text} {triplet.body_part}", words))
        table[row] = _ordered(counts, words)
    return table


def describe_contents(table: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line per row: ``Planes: Axial (120), Coronal (119)``."""
    rows = {row: ", ".join(f"{name} ({count:,})" for name, count in counts.items()) for row, counts in table.items()}
    return [f"{row}: {text or 'none named'}" for row, text in rows.items()]


def _modalities(triplet: Triplet, stated: str) -> Collection[str]:
    known = sorted(named(stated, CHANNELS)) or ([stated] if stated else [])
    return known or named(triplet.text, MODALITIES)


def _ordered(counts: Counter, words: Mapping[str, str]) -> dict[str, int]:
    """Counts in the order of the category, and behind them what it does not know."""
    order = [*words, *(name for name in counts if name not in words)]
    return {name: counts[name] for name in order if counts[name]}
