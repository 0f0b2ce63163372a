"""Slices go in, texts come out: one case after the other, or several slices at once where a captioner waits."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from nnssl_plugin.captions.captioners import (
    Answer,
    AskedCaptioner,
    Captioner,
    CaptionerStopped,
    SliceFacts,
    SliceFailed,
)
from nnssl_plugin.data.triplets import Triplet
from nnssl_plugin.errors import UserError

FAILURES_IN_A_ROW = 10
"""Slices without a text, one after the other, that end a run: the next ones would hardly fare better."""
SECONDS_TO_END = 10
"""What is being asked when no other slice would get a text has this long to be answered."""

Record = Callable[[Triplet, Answer], None]
"""Keeps a triplet that has its text; called from several threads."""


@dataclass(frozen=True)
class Draft:
    """A triplet that waits for its text."""

    triplet: Triplet
    picture: np.ndarray  # (H, W, 3) uint8
    facts: SliceFacts


def describe_all(captioner: Captioner, cases: Iterable[list[Draft]], record: Record) -> list[str]:
    """Describe every slice, and keep each text the moment it is there.

    Args:
        captioner: who describes.
        cases: the slices of each case; read as they are needed.
        record: keeps what is described.

    Returns:
        which slices got no text, and why.

    Raises:
        UserError: a case cannot be read, the captioner fails, or no slice gets a text any more.
    """
    if isinstance(captioner, AskedCaptioner):
        return _ask_all(captioner, (draft for case in cases for draft in case), record)
    for case in filter(None, cases):
        texts = captioner.describe([draft.picture for draft in case], [draft.facts for draft in case])
        _check_texts(texts, case, captioner)
        for draft, text in zip(case, texts, strict=True):
            record(_with_text(draft, text), Answer(text))
    return []


def _ask_all(captioner: AskedCaptioner, drafts: Iterator[Draft], record: Record) -> list[str]:
    failures: list[str] = []
    in_a_row = 0

    def ask(draft: Draft) -> None:
        answer = captioner.ask(draft.picture, draft.facts)
        record(_with_text(draft, answer.text), answer)

    def collect(pending: dict[Future, Draft]) -> None:
        nonlocal in_a_row
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            draft = pending.pop(future)
            try:
                future.result()
                in_a_row = 0
            except SliceFailed as error:
                failures.append(f"{draft.triplet.case} ({draft.triplet.plane} {draft.triplet.slice}): {error}")
                in_a_row += 1
        if in_a_row >= FAILURES_IN_A_ROW:
            problem = f"{in_a_row} slices in a row got no text, the last: {failures[-1]}"
            raise CaptionerStopped(problem, "What was answered is kept. When the server is well again, run this again.")

    pending: dict[Future, Draft] = {}
    with closing(captioner), ThreadPoolExecutor(captioner.concurrency) as pool:  # waits for what is being asked
        try:
            for draft in drafts:
                while len(pending) >= 2 * captioner.concurrency:
                    collect(pending)
                pending[pool.submit(ask, draft)] = draft
            while pending:
                collect(pending)
        except (KeyboardInterrupt, CaptionerStopped) as reason:
            pool.shutdown(wait=False, cancel_futures=True)
            asked = [future for future in pending if not future.cancelled()]
            wait(asked, timeout=SECONDS_TO_END if isinstance(reason, CaptionerStopped) else 0)
            captioner.close()
            raise
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failures


def _with_text(draft: Draft, text: str) -> Triplet:
    """The triplet; line breaks become blanks, and half a character (a lone surrogate) a question mark."""
    return replace(draft.triplet, text=" ".join(text.encode("utf-8", "replace").decode("utf-8").split()))


def _check_texts(texts: list[str], case: list[Draft], captioner: Captioner) -> None:
    name = case[0].triplet.case
    if len(texts) != len(case):
        problem = f"Captioner {captioner.name} gave {len(texts)} texts for {len(case)} slices of {name}."
        raise UserError(problem, "describe() returns one text per slice, in their order.")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"Captioner {captioner.name} gave an empty text for a slice of {name}.", "Mend the captioner.")
