"""Triplets of volume, slice and text, and their frozen embeddings: the files that lie in a raw dataset.

``triplets.jsonl`` holds one JSON object per case, ``clip_embeddings.npz`` one row per case. ``nnssl_plugin caption``
writes both; training reads them here, without open_clip.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.planes import PLANES

TRIPLETS_FILE = "triplets.jsonl"
EMBEDDINGS_FILE = "clip_embeddings.npz"


@dataclass(frozen=True)
class Triplet:
    """One volume, one of its slices, and the text that describes that slice (Med3DInsight, section III-A)."""

    case: str
    plane: str  # axial, coronal or sagittal
    slice: int  # 0-based index along the axis of the image as stored on disk (planes.stored_axis)
    n_slices: int  # length of that axis
    text: str
    captioner: str  # who wrote the text
    seed: int | None = None  # seed by which the slice was drawn; None: chosen by hand
    body_part: str = ""  # what the user said about the case when the text was written


@dataclass(frozen=True)
class Embeddings:
    """The rows of ``clip_embeddings.npz``; image and text are (N, E) float32 with rows of length 1."""

    case: np.ndarray  # (N,) str
    text_sha256: np.ndarray  # (N,) str
    key: np.ndarray  # (N,) str, over weights, pixels and text
    image: np.ndarray
    text: np.ndarray
    weights: str  # which model made them
    place: np.ndarray | None = None  # (N,) str, see :func:`place_of`; None in files of before there was one


def place_of(triplet: Triplet) -> str:
    """Which slice a triplet shows, for example ``axial 61/120``."""
    return f"{triplet.plane} {triplet.slice}/{triplet.n_slices}"


def text_sha256(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_triplets(raw_folder: Path) -> dict[str, Triplet]:
    """Read ``triplets.jsonl`` of a raw dataset.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.

    Returns:
        case name to triplet, in the order of the file. Keys that are not fields of :class:`Triplet` are ignored.

    Raises:
        UserError: the file is absent, a line is malformed, or a case occurs twice.
    """
    path = Path(raw_folder) / TRIPLETS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: no slices have been chosen and described.", _remedy(raw_folder))
    triplets: dict[str, Triplet] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        triplet = _parse_line(line, where=f"{path}, line {number}")
        if triplet.case in triplets:
            raise UserError(f"{path}, line {number}: case {triplet.case!r} occurs twice.", "Keep one line per case.")
        triplets[triplet.case] = triplet
    return triplets


def write_triplets(raw_folder: Path, triplets: Iterable[Triplet]) -> Path:
    """Write ``triplets.jsonl`` atomically, one line per triplet in the given order, and return its path."""
    path = Path(raw_folder) / TRIPLETS_FILE
    lines = [json.dumps(asdict(triplet), ensure_ascii=False) + "\n" for triplet in triplets]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return path


def read_embeddings(raw_folder: Path, triplets: dict[str, Triplet]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The frozen embeddings of the given triplets.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.
        triplets: what :func:`read_triplets` gave (or some of it).

    Returns:
        case name to (image (E,), text (E,)), float32, each of length 1.

    Raises:
        UserError: the file is absent or unreadable, a case has no row, or its text or slice has changed since.
    """
    path = Path(raw_folder) / EMBEDDINGS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: the slices and texts have not been embedded.", _remedy(raw_folder))
    stored = load_embeddings(raw_folder)
    row_of = {str(case): row for row, case in enumerate(stored.case)}
    missing = [case for case in triplets if case not in row_of]
    if missing:
        raise UserError(f"{path} holds no embedding of {_some(missing)}.", _remedy(raw_folder))
    stale = [c for c, t in triplets.items() if str(stored.text_sha256[row_of[c]]) != text_sha256(t.text)]
    if stale:
        raise UserError(f"The text of {_some(stale)} has changed since {path} was written.", _remedy(raw_folder))
    if stored.place is not None:
        moved = [case for case, triplet in triplets.items() if str(stored.place[row_of[case]]) != place_of(triplet)]
        if moved:
            raise UserError(f"{path} was written for another slice of {_some(moved)}.", _remedy(raw_folder))
    return {case: (stored.image[row_of[case]], stored.text[row_of[case]]) for case in triplets}


def load_embeddings(raw_folder: Path) -> Embeddings:
    """Every row of ``clip_embeddings.npz``; nothing is unpickled.

    Raises:
        UserError: the file is no such archive, or its arrays do not belong together.
    """
    path = Path(raw_folder) / EMBEDDINGS_FILE
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = ("case", "text_sha256", "key", "image", "text")
            rows = {name: archive[name] for name in (*names, *({"place"} & set(archive.files)))}
            weights = str(archive["weights"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise _unreadable(raw_folder, error) from error
    if len({len(rows[name]) for name in rows}) != 1 or rows["image"].shape != rows["text"].shape:
        raise _unreadable(raw_folder, "its arrays differ in length")
    rows["image"], rows["text"] = rows["image"].astype(np.float32), rows["text"].astype(np.float32)
    return Embeddings(**rows, weights=weights)


def write_embeddings(raw_folder: Path, embeddings: Embeddings) -> Path:
    """Write ``clip_embeddings.npz`` atomically and return its path."""
    path = Path(raw_folder) / EMBEDDINGS_FILE
    place = {} if embeddings.place is None else {"place": np.asarray(embeddings.place, dtype=str)}
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            case=np.asarray(embeddings.case, dtype=str),
            text_sha256=np.asarray(embeddings.text_sha256, dtype=str),
            key=np.asarray(embeddings.key, dtype=str),
            image=np.asarray(embeddings.image, dtype=np.float32),
            text=np.asarray(embeddings.text, dtype=np.float32),
            weights=np.asarray(embeddings.weights, dtype=str),
            **place,
        )
    return path


def _lines(path: Path) -> list[str]:
    """The lines of a file; ``str.splitlines`` would also end one at U+2028 or U+0085, which a text may hold."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return list(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from error


def _parse_line(line: str, *, where: str) -> Triplet:
    try:
        content = json.loads(line)
        triplet = Triplet(
            case=content["case"],
            plane=content["plane"],
            slice=int(content["slice"]),
            n_slices=int(content["n_slices"]),
            text=content["text"],
            captioner=content.get("captioner", "unknown"),
            seed=content.get("seed"),
            body_part=content.get("body_part", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = 'A line reads {"case": …, "plane": …, "slice": …, "n_slices": …, "text": …, "captioner": …}.'
        raise UserError(f"{where}: {type(error).__name__}: {error}", remedy) from error
    if triplet.plane not in PLANES:
        raise UserError(f"{where}: plane {triplet.plane!r}.", f"A plane is one of {', '.join(PLANES)}.")
    if not 0 <= triplet.slice < triplet.n_slices:
        raise UserError(f"{where}: slice {triplet.slice} of {triplet.n_slices}.", "Slices are counted from 0.")
    if not isinstance(triplet.text, str) or not triplet.text.strip():
        raise UserError(f"{where}: the text is empty.", "Describe the slice, or delete the line and caption again.")
    return triplet


def _unreadable(raw_folder: Path, why: object) -> UserError:
    path = Path(raw_folder) / EMBEDDINGS_FILE
    return UserError(f"{path} cannot be read: {why}.", f"Delete it. {_remedy(raw_folder)}")


def _some(cases: list[str]) -> str:
    rest = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
    return f"{', '.join(cases[:3])}{rest}"


def _remedy(raw_folder: Path) -> str:
    dataset = Path(raw_folder).name[len("Dataset") :].split("_")[0]
    return f"Run: nnssl_plugin caption -d {dataset}"
