"""Queries of an index: images, or cases that are in it; and what they found, as rows of a table and as JSON."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.data.images import UnusableCase
from nnssl_plugin.errors import UserError
from nnssl_plugin.tasks.retrieval.embedding import BATCH, Batches, check_same_encoder
from nnssl_plugin.tasks.retrieval.encoder import ALIGNED, Alignments, Encoder, load_encoder
from nnssl_plugin.tasks.retrieval.index import Index, Neighbours
from nnssl_plugin.tasks.retrieval.inputs import prepare_case

CHANNEL = re.compile(r"(.+)_0000(\.[^/]+)")


@dataclass(frozen=True)
class Query:
    """What neighbours are looked for."""

    name: str
    vector: np.ndarray
    """(E,) raw."""
    subject: str | None
    """Whose rows it does not find; None: unknown."""
    image: str
    """The file of its first channel; empty for a text."""
    height: str = ""
    """See ``inputs``: where its slice lies."""


def queries_of(
    given: Sequence[str | Path],
    index: Index,
    *,
    model: str | Path | None = None,
    subject: str | None = None,
    segmentations: str | Path | None = None,
    device: str = "cpu",
    trust: bool = False,
    alignments: Alignments | None = None,
) -> list[Query]:
    """A query for each row that the images, or cases of the index, make.

    Args:
        given: image files (of several channels the first, ``CASE_0000…``), or names of cases in the index.
        index: to be searched.
        model: of the index's encoder; None: the file that made the index.
        subject: of all images; None: the subject that the index knows for a case of that name.
        segmentations: folder with ``CASE.nii.gz``, for an index of lesions.
        device: ``cpu``, ``cuda`` or ``mps``.
        trust: build the network whatever class the file names.
        alignments: see ``encoder``; needed for images where the index lies in the space of texts.

    Raises:
        UserError: an image cannot be read, or the model is not the index's.
    """
    encoder: Encoder | None = None
    queries = []
    for each in given:
        if not Path(each).is_file() and (index.column("case") == str(each)).any():
            queries += _of_index(str(each), index)
            continue
        encoder = encoder or _encoder_of(index, model, device, trust, alignments)
        queries += _of_image(Path(each), index, encoder, subject, segmentations)
    return queries


def answers(index: Index, queries: Sequence[Query], found: Neighbours) -> list[dict[str, Any]]:
    """For each query its name, and its neighbours with rank, distance and the cells of their rows."""
    return [
        {
            "query": query.name,
            "subject": query.subject,
            "image": query.image,
            "neighbours": [
                {**index.table[row], "rank": rank, "distance": round(float(distance), 6)}
                for rank, (row, distance) in enumerate(zip(rows, distances, strict=True), start=1)
                if row >= 0
            ],
        }
        for query, rows, distances in zip(queries, found.rows, found.distances, strict=True)
    ]


def table_of(given: Sequence[dict[str, Any]]) -> str:
    """The answers as lines for a terminal."""
    lines = []
    for answer in given:
        lines += [answer["query"], f"  {'':>4}{'distance':>10}  case"]
        for neighbour in answer["neighbours"]:
            known = [neighbour["part"], *(f"{k}={v}" for k, v in neighbour.items() if k not in _SHOWN and v)]
            about = "  ".join(text for text in known if text)
            lines.append(
                f"  {neighbour['rank']:>4}{neighbour['distance']:>10.4f}  {neighbour['case']}  {about}".rstrip()
            )
    return "\n".join(lines)


_SHOWN = ("rank", "distance", "case", "part", "image", "height")


def _of_index(case: str, index: Index) -> list[Query]:
    rows = np.flatnonzero(index.column("case") == case)
    cells = [index.table[row] for row in rows]
    return [
        Query(_name(case, of["part"]), np.array(index.vectors[row]), of["subject"], of["image"], of.get("height") or "")
        for row, of in zip(rows, cells, strict=True)
    ]


def _of_image(
    path: Path, index: Index, encoder: Encoder, subject: str | None, segmentations: str | Path | None
) -> list[Query]:
    ending = encoder.backbone.preprocessing.file_ending
    case = path.name.removesuffix(ending).removesuffix("_0000")
    segmentation = None if segmentations is None else Path(segmentations) / f"{case}{ending}"
    facts = index.store.facts["encoder"]
    batches = Batches(encoder, BATCH)
    try:
        prepared = prepare_case(
            case,
            _channels(path),
            encoder.backbone.preprocessing,
            rows=facts["rows_are"],
            view=facts["view"],
            segmentation=segmentation,
        )
        done = [*batches.add(prepared), *batches.flush()]
    except UnusableCase as reason:
        raise UserError(
            f"{path}: {reason}.", f"Give a readable {ending} file, as the model was trained on."
        ) from reason
    known = index.table[int(np.argmax(index.column("case") == case))] if case in index.column("case") else {}
    whose = subject or known.get("subject")
    return [
        Query(_name(case, row["part"]), vector, whose, str(path.resolve()), row.get("height") or "")
        for finished in done
        for row, vector in zip(finished.rows, finished.vectors, strict=True)
    ]


def _encoder_of(
    index: Index, model: str | Path | None, device: str, trust: bool, alignments: Alignments | None
) -> Encoder:
    made = index.store.facts["made"]["model"]
    if model is None and not Path(made).exists():
        raise UserError(f"The model that made the index is no longer at {made}.", "Name it with -m.")
    aligned = alignments if ALIGNED in index.store.facts["encoder"]["parts"] else None
    encoder = load_encoder(model or made, device=device, trust=trust, alignments=aligned)
    rows = {name: index.store.facts["encoder"][name] for name in ("rows_are", "view")}
    check_same_encoder(index.store, encoder.facts | rows)
    return encoder


def _channels(path: Path) -> list[Path]:
    """The files of all channels, where the first one's name says that there are several."""
    named = CHANNEL.fullmatch(path.name)
    if named is None:
        return [path]
    files = [path]
    while (more := path.with_name(f"{named[1]}_{len(files):04d}{named[2]}")).is_file():
        files.append(more)
    return files


def _name(case: str, part: str) -> str:
    return f"{case}/{part}" if part else case
