"""Images in, an index of vectors out: in batches over cases, the next images read while the encoder computes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnssl_plugin.data.images import UnusableCase, find_images
from nnssl_plugin.data.vector_store import StoreWriter, VectorStore, writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.features.preprocessing import Preprocessing
from nnssl_plugin.intake.workers import ahead_in_processes
from nnssl_plugin.tasks.retrieval.encoder import Alignment, Alignments, Encoder, Sums, joined, load_encoder, vector_of
from nnssl_plugin.tasks.retrieval.inputs import CASE, LESION, WHOLE, WINDOWS, Prepared, Row, cut, prepare_case
from nnssl_plugin.tasks.retrieval.standardisation import statistics_of
from nnssl_plugin.tasks.retrieval.text_space import ALIGNMENT_FILE, TextSpace, facts_of, keep_space, text_space

BATCH = 4
"""Windows of one pass."""
SECONDS = 5.0
"""Between two commits; a killed run repeats what came after the last."""
FEW = 8
"""Images up to which no process is started: that takes some seconds."""
SMALL = 4 * 2**20
"""Bytes of a file up to which images are small: of these a pass takes several, so more of them are read ahead."""


@dataclass(frozen=True)
class Cases:
    """The images of an index, and what is known of them."""

    files: dict[str, tuple[Path, ...]]
    """Case → one file per channel."""
    metadata: Mapping[str, Mapping[str, str]]
    """Case → cells of the table, among them perhaps ``subject``."""
    segmentations: dict[str, Path]
    left_out: dict[str, str]
    """Case or file → why it is not taken."""


@dataclass(frozen=True)
class Finished:
    """The vectors of a case, without its voxels."""

    case: str
    rows: tuple[dict[str, str], ...]
    vectors: np.ndarray
    """(rows, dimensions)."""


@dataclass(frozen=True)
class Embedded:
    """What was done."""

    folder: Path
    done: int
    """Cases embedded now."""
    skipped: int
    """Cases that were there."""
    rows: int
    """Vectors in the index."""
    failed: dict[str, str]
    warnings: dict[str, tuple[str, ...]]
    images_per_second: float
    drift: float | None
    """How far the new vectors lie from the frozen statistics, see :func:`drift_of`; None for a new index."""


def embed_images(
    images: str | Path,
    folder: str | Path,
    model: str | Path,
    *,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    segmentations: str | Path | None = None,
    rows: str = CASE,
    view: str = WINDOWS,
    device: str = "cpu",
    batch_size: int = BATCH,
    processes: int = 2,
    trust: bool = False,
    new: bool = True,
    alignments: Alignments | None = None,
) -> Embedded:
    """Add the vectors of a folder of images to an index, and make it where there is none.

    Cases that are in it are skipped, so that an interrupted command goes on. When the cases of a new index are all
    done, mean and standard deviation of its vectors are frozen: they stay when it grows, so that distances stay.

    Args:
        images: with ``CASE_0000.nii.gz`` and so on, one file per channel.
        folder: of the index.
        model: checkpoint, shared folder or model folder.
        metadata: case → cells of the table, ``subject`` among them; a case without is a subject of its own.
        segmentations: folder with ``CASE.nii.gz``, for lesions.
        rows: what a row stands for: ``case``, ``window`` or ``lesion``.
        view: ``windows`` at the plan's spacing, pooled inside the body, or the ``whole`` image fitted into one.
        device: ``cpu``, ``cuda`` or ``mps``.
        batch_size: windows of one pass.
        processes: that read and preprocess images beside this one, where there are more than :data:`FEW`; 0: this one.
        trust: build the network whatever class the file names.
        new: False: refuse where there is no index, or one whose first build was interrupted.
        alignments: vectors shall lie in the space of the texts that the encoder was aligned with; see ``encoder``.

    Raises:
        UserError: the index was made by another encoder or of other rows, another process writes to it, or no case
            can be used.
    """
    if rows == LESION and segmentations is None:
        raise UserError("Lesions need segmentations.", "Name their folder (CASE.nii.gz) with -seg, or a dataset by -d.")
    encoder = load_encoder(model, device=device, trust=trust, alignments=alignments)
    space = None
    if encoder.alignment is not None:
        _check_alignment(encoder.alignment, rows, view)
        if not (Path(folder) / ALIGNMENT_FILE).is_file():
            space = _space_of(encoder, encoder.alignment)
    preprocessing = encoder.backbone.preprocessing
    cases = _cases_of(images, preprocessing.file_ending, metadata or {}, segmentations)
    facts = encoder.facts | {"rows_are": rows, "view": view if rows == CASE else WINDOWS}
    failed, start = dict(cases.left_out), {"dimensions": encoder.dimensions, "encoder": facts, "made": _made(encoder)}
    if space is not None:
        start["alignment"] = facts_of(space)
    with writing(folder, start if new else None) as store:
        check_same_encoder(store, facts)
        if space is not None:
            keep_space(store.folder, space)
        if not new and not store.facts["frozen"]:
            raise UserError(
                f"{store.folder} is not finished: embed was interrupted, and statistics are those of the first images.",
                "Run the same nnssl_plugin embed again, then add.",
            )
        there = {row["case"] for row in store.table()}
        waiting = [case for case in cases.files if case not in there]
        prepare = partial(_prepare, preprocessing=preprocessing, rows=rows, view=facts["view"])
        scans = [_Scan(case, cases.files[case], cases.segmentations.get(case)) for case in waiting]
        prepared = _ahead(scans, prepare, processes, batch_size)
        before, started = store.rows, time.perf_counter()
        warnings = _embed(waiting, prepared, Batches(encoder, batch_size), store, cases, failed)
        done = len(waiting) - len(failed.keys() & set(waiting))
        rate = done / max(time.perf_counter() - started, 1e-9)
        drift = _settle(store, before, failed)
        return Embedded(store.folder, done, len(cases.files) - len(waiting), store.rows, failed, warnings, rate, drift)


def _check_alignment(alignment: Alignment, rows: str, view: str) -> None:
    if rows == LESION:
        raise UserError("Vectors in the space of texts stand for images or windows.", "Leave --rows lesion out.")
    if alignment.whole and view != WHOLE:
        raise UserError("The alignment was trained on whole images.", "Embed them so: --view whole")


def _space_of(encoder: Encoder, alignment: Alignment) -> TextSpace:
    """The texts that an encoder was aligned with."""
    if encoder.dataset is None:
        raise UserError(
            f"{encoder.path} does not say which dataset's texts it was aligned with.",
            "Use the checkpoint that the training itself wrote.",
        )
    return text_space(encoder.dataset, alignment)


def _settle(store: StoreWriter, before: int, failed: Mapping[str, str]) -> float | None:
    """Freeze the statistics of a new index; of one that was there, how far its new rows have drifted."""
    if not store.rows:
        reasons = "; ".join(f"{case}: {reason}" for case, reason in list(failed.items())[:3])
        raise UserError("No case could be embedded.", reasons)
    frozen = store.statistics()
    if frozen is None:
        store.freeze(statistics_of(store.vectors()))
        return None
    return drift_of(store.vectors()[before:], frozen) if store.rows > before else None


def _cases_of(images: str | Path, ending: str, metadata: Mapping, segmentations: str | Path | None) -> Cases:
    files, left_out = find_images(images, ending)
    if metadata and files and not metadata.keys() & files.keys():
        raise UserError(
            f"The metadata name none of the cases of {images}: {next(iter(metadata))} is not {next(iter(files))}.",
            f"The column case holds names without _0000{ending}.",
        )
    masks = {case: Path(segmentations) / f"{case}{ending}" for case in files} if segmentations is not None else {}
    return Cases(files, metadata, masks, left_out)


def check_same_encoder(store: VectorStore, facts: Mapping[str, Any]) -> None:
    """Refuse vectors that an index cannot be compared with.

    Raises:
        UserError: naming what differs.
    """
    differing = [name for name, value in facts.items() if store.facts["encoder"].get(name) != value]
    if differing:
        name, made = differing[0], store.facts["encoder"].get(differing[0])
        raise UserError(
            f"{store.folder} was made with {name} {made!r}, not {facts[name]!r}: vectors of both cannot be compared.",
            f"Use the model and options that made it (nnssl_plugin index info --index {store.folder}), or another -o.",
        )


def drift_of(vectors: np.ndarray, statistics: np.ndarray) -> float:
    """Root mean square over the dimensions of how far the mean of vectors (n, E) lies from the frozen mean, in frozen
    standard deviations; chance alone gives about 1/√n."""
    mean, deviation = statistics
    usable = deviation > 0
    shift = (np.asarray(vectors, dtype=np.float64).mean(axis=0) - mean)[usable] / deviation[usable]
    return float(np.sqrt(np.mean(shift**2))) if usable.any() else 0.0


def _made(encoder: Encoder) -> dict[str, Any]:
    return {"model": str(encoder.path.resolve()), "reader": encoder.backbone.preprocessing.reader}


_Place = tuple[int, int]
"""Number of a case, and of the row in it that a window belongs to."""


@dataclass(frozen=True)
class _Scan:
    """What another process is told of a case."""

    case: str
    files: tuple[Path, ...]
    segmentation: Path | None


def _prepare(scan: _Scan, *, preprocessing: Preprocessing, rows: str, view: str) -> Prepared | UnusableCase:
    """The case, or why it cannot be used."""
    segmentation = scan.segmentation if rows == LESION else None
    try:
        if rows == LESION and (segmentation is None or not segmentation.is_file()):
            raise UnusableCase(f"it has no segmentation {segmentation or ''}".rstrip())
        return prepare_case(scan.case, scan.files, preprocessing, rows=rows, view=view, segmentation=segmentation)
    except UnusableCase as reason:
        return reason


def _ahead(
    scans: Sequence[_Scan], prepare: Callable[[_Scan], Prepared | UnusableCase], processes: int, batch_size: int
) -> Iterator[Prepared | UnusableCase]:
    """The prepared cases in their order, read ahead by other processes: of small images those of two passes more."""
    if len(scans) <= FEW or processes < 1:
        return map(prepare, scans)
    sizes = (file.stat().st_size for scan in scans for file in scan.files if file.is_file())
    ahead = 2 * processes + (2 * batch_size if max(sizes, default=0) <= SMALL else 0)
    return ahead_in_processes(prepare, scans, processes, killed=_killed, ahead=ahead)


def _killed(scan: _Scan) -> UnusableCase:
    return UnusableCase("the process that read it was ended, likely for want of memory")


def _embed(
    waiting: Sequence[str],
    prepared: Iterator[Prepared | UnusableCase],
    batches: "Batches",
    store: StoreWriter,
    cases: Cases,
    failed: dict[str, str],
) -> dict[str, tuple[str, ...]]:
    """Embed the cases, commit what is done every few seconds; case → what is odd about it."""
    warnings, pending, committed = {}, [], time.perf_counter()
    for case, found in tqdm(zip(waiting, prepared, strict=True), total=len(waiting), desc="embed", unit="image"):
        if isinstance(found, UnusableCase):
            failed[case] = str(found)
            continue
        if found.warnings:
            warnings[case] = found.warnings
        pending += batches.add(found)
        if time.perf_counter() - committed > SECONDS:
            _commit(pending, store, cases, failed)
            pending, committed = [], time.perf_counter()
    _commit(pending + batches.flush(), store, cases, failed)
    return warnings


def _commit(finished: Sequence[Finished], store: StoreWriter, cases: Cases, failed: dict[str, str]) -> None:
    usable = [found for found in finished if np.isfinite(found.vectors).all()]
    failed |= dict.fromkeys(
        {found.case for found in finished} - {found.case for found in usable},
        "the model gives NaN: was its training finished?",
    )
    rows = []
    for found in usable:
        known = cases.metadata.get(found.case, {})
        about = dict(known) | {
            "case": found.case,
            "subject": known.get("subject") or found.case,
            "image": str(cases.files[found.case][0].resolve()),
        }
        rows += [about | row for row in found.rows]
    if rows:
        store.append(np.concatenate([found.vectors for found in usable]), rows)


class Batches:
    """Windows of several cases in one pass; a case is finished when all of its windows are.

    What a pass found is asked for when the next one has been started, so that windows are cut while a device computes.

    Args:
        encoder: reads them.
        size: windows of a pass.
    """

    def __init__(self, encoder: Encoder, size: int):
        self.encoder, self.size = encoder, size
        self._cut: list[tuple[_Place, np.ndarray, np.ndarray]] = []  # data and what counts in it
        self._running: tuple[list[_Place], Sums] | None = None
        self._open: dict[int, tuple[Prepared, list[Sums | None]]] = {}
        self._number = 0

    def add(self, prepared: Prepared) -> list[Finished]:
        """Take the windows of a case; the cases that are finished by then."""
        self._open[self._number] = (prepared, [None] * len(prepared.rows))
        for number, row in enumerate(prepared.rows):
            self._add_row(number, row, prepared)
        self._number += 1
        running = self._running[0] if self._running else []
        waiting = {case for case, _ in [*running, *(place for place, *_ in self._cut)]}
        return [self._finish(number) for number in list(self._open) if number not in waiting]

    def flush(self) -> list[Finished]:
        """The rest."""
        self._read()
        self._read()
        return [self._finish(number) for number in list(self._open)]

    def _add_row(self, number: int, row: Row, prepared: Prepared) -> None:
        for window in range(len(row.places)):
            pieces = cut(prepared, row, window, self.encoder.backbone.patch_size)
            self._cut.append(((self._number, number), *pieces))
            if len(self._cut) == self.size:
                self._read()

    def _read(self) -> None:
        """Start a pass over the windows that were cut, and take what the one before found."""
        before, self._running = self._running, None
        if self._cut:
            places, data, inside = zip(*self._cut, strict=True)
            sums = self.encoder.read(torch.from_numpy(np.stack(data)), torch.from_numpy(np.stack(inside)))
            self._running, self._cut = (list(places), sums), []
        if before is None:
            return
        places, sums = before[0], before[1].cpu()
        for place, (case, row) in enumerate(places):
            own = Sums(sums.weight[place], {name: value[place] for name, value in sums.parts.items()})
            rows = self._open[case][1]
            rows[row] = joined(rows[row], own)

    def _finish(self, number: int) -> Finished:
        prepared, rows = self._open.pop(number)
        about = tuple(row.facts | {"part": row.part} for row in prepared.rows)
        return Finished(prepared.case, about, np.stack([vector_of(sums).numpy() for sums in rows]))
