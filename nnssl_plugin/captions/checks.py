"""What is suspicious in a text, found without understanding it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from nnssl_plugin.captions.vocabulary import CHANNELS, MODALITIES, PLANES, named
from nnssl_plugin.data.triplets import Triplet

REFUSALS = re.compile(
    r"\b(?:i(?:'| a)m (?:sorry|unable|not able)|i (?:can'?t|cannot|can not|won'?t) |as an ai\b|"
    r"unable to (?:assist|help|provide|analy[sz]e)|can(?:no|')t (?:assist|help|provide))",
    re.IGNORECASE,
)
WINDOW, LARGEST_SHARE = 4, 0.3
"""A text repeats itself where more than this share of its sequences of so many words occurred before in it."""
SEVERAL_CASES = 3
"""A text that stands word for word with so many cases says little of any."""
FEWEST_WORDS = 4


def suspicions(triplets: Sequence[Triplet], modality_of_case: Callable[[str], str]) -> list[list[str]]:
    """For each triplet what is suspicious in its text, in words; usually nothing.

    Args:
        triplets: of one dataset.
        modality_of_case: what a case shows by its header, empty where it is not known.
    """
    cases = Counter(text for text, _ in {(triplet.text, triplet.case) for triplet in triplets})
    return [
        [*_contradictions(triplet, modality_of_case(triplet.case)), *_form(triplet.text), *_shared(cases[triplet.text])]
        for triplet in triplets
    ]


def _contradictions(triplet: Triplet, modality: str) -> list[str]:
    found = []
    planes, modalities = named(triplet.text, PLANES), named(triplet.text, MODALITIES)
    true = named(modality, CHANNELS)
    if planes and triplet.plane not in planes:
        found.append(f"names another plane: {', '.join(sorted(planes))} (the slice is {triplet.plane})")
    if modalities and true and not modalities & true:
        found.append(f"names another modality: {', '.join(sorted(modalities))} (the scan is {', '.join(sorted(true))})")
    return found


def _form(text: str) -> list[str]:
    found = []
    if REFUSALS.search(text.replace("’", "'")):
        found.append("reads like a refusal")
    words = re.findall(r"\w+", text.lower())
    runs = Counter(zip(*(words[start:] for start in range(WINDOW)), strict=False))
    repeated = sum(count - 1 for count in runs.values())
    if runs and repeated / runs.total() > LARGEST_SHARE:
        found.append("repeats itself")
    if len(words) < FEWEST_WORDS:
        found.append("hardly says anything")
    elif text[-1].isalnum() or text[-1] in ",;:":
        found.append("breaks off")
    return found


def _shared(cases: int) -> list[str]:
    return [f"stands word for word with {cases} cases"] if cases >= SEVERAL_CASES else []
