"""What counts as right for a query: equal or shared labels, a number within a factor, another image of the subject.

A rule is written as on the command line: ``COLUMN`` (equal cells: class, region), ``COLUMN:any`` (one shared label of
several, ``a;b``), ``COLUMN:exact`` (the same set of labels), ``COLUMN:within=1.5`` (a number, such as a lesion's
volume, at most 1.5 times as large or small), and ``subject`` (another case of the same subject, for example of another
modality).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.case_labels import NONE, SEPARATOR, is_missing

SUBJECT = "subject"
RULE = re.compile(r"(?P<column>[^:]+)(?::(?P<how>any|exact|within=(?P<factor>[0-9.]+)))?")


@dataclass(frozen=True)
class Rule:
    """A kind of relevance.

    ``right(queries, gallery)`` takes cells (Q,) and (G,) and gives (Q, G) bool; ``known(cells)`` says which cells mean
    anything: rows without a label are neither queries nor found.
    """

    text: str
    column: str
    right: Callable[[np.ndarray, np.ndarray], np.ndarray]
    known: Callable[[np.ndarray], np.ndarray]

    @property
    def of_subjects(self) -> bool:
        """Whether images of one subject are what is looked for; else they are never found, as they prove nothing."""
        return self.column == SUBJECT


def parse_rule(text: str) -> Rule:
    """The rule that a text stands for.

    Raises:
        UserError: it is none.
    """
    match = RULE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"'{text}' says not what is right for a query.", EXAMPLES)
    column, how = match["column"], match["how"] or ""
    if how.startswith("within="):
        factor = _factor(match["factor"], text)
        return Rule(text, column, lambda a, b: _within(_numbers(a), _numbers(b), factor), lambda c: _numbers(c) > 0)
    if how == "any":
        return Rule(text, column, _share_any, _are_sets)
    if how == "exact":
        return Rule(text, column, lambda a, b: _equal(_sets(a), _sets(b)), _are_sets)
    return Rule(text, column, _equal, _are_labels)


EXAMPLES = "For example: --by class, --by findings:any, --by findings:exact, --by volume_ml:within=1.5, --by subject"


def _factor(given: str, text: str) -> float:
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if factor < 1:
        raise UserError(f"'{text}': the factor is a number of at least 1.", EXAMPLES)
    return factor


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    _, codes = np.unique(np.concatenate((a, b)).astype(str), return_inverse=True)
    return codes[: len(a), None] == codes[None, len(a) :]


def _are_labels(cells: np.ndarray) -> np.ndarray:
    return np.array([not is_missing(cell) for cell in cells], dtype=bool)


def _are_sets(cells: np.ndarray) -> np.ndarray:
    """``none`` is the set without any label."""
    return np.array([cell.strip() == NONE or not is_missing(cell) for cell in cells], dtype=bool)


def _labels(cell: str) -> frozenset[str]:
    return frozenset() if cell.strip() == NONE else frozenset(filter(None, map(str.strip, cell.split(SEPARATOR))))


def _sets(cells: np.ndarray) -> np.ndarray:
    """Each set in one spelling."""
    return np.array([SEPARATOR.join(sorted(_labels(cell))) for cell in cells], dtype=object)


def _share_any(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    names = sorted(frozenset().union(*map(_labels, (*a, *b))))
    first, second = (np.array([[name in _labels(cell) for name in names] for cell in cells]) for cells in (a, b))
    shared = first.reshape(len(a), -1).astype(np.float32) @ second.reshape(len(b), -1).astype(np.float32).T
    return shared > 0


def _numbers(cells: np.ndarray) -> np.ndarray:
    """(N,) float, NaN for what is no number."""
    found = np.full(len(cells), np.nan)
    for place, cell in enumerate(cells):
        try:
            found[place] = float(cell)
        except ValueError:
            continue
    return found


def _within(a: np.ndarray, b: np.ndarray, factor: float) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(np.log(a)[:, None] - np.log(b)[None]) <= np.log(factor) + 1e-9
