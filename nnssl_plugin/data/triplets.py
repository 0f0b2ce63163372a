"""Triplets of volume, slice and text, and their frozen embeddings: the files that lie in a raw dataset.

``triplets.jsonl`` holds one JSON object per slice, ``clip_embeddings.npz`` one row per slice; a case has one slice or
several. ``nnssl_plugin caption`` writes both; training reads them here, without open_clip.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnssl_plugin.data.struck import SliceKey, read_struck
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, read_json
from nnssl_plugin.nnunet.planes import PLANES

TRIPLETS_FILE = "triplets.jsonl"
EMBEDDINGS_FILE = "clip_embeddings.npz"

PAIR_FOLDER = "clip_pair"
"""Folder in a raw dataset that holds the pair of encoders which was fine-tuned on its slices and texts."""
PAIR_RECORD = "clip_pair.json"
"""File in it that says what the pair was made of."""
RANDOM_PAIR = "random-small"
"""Beginning of the weights' name where no weights were given."""


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

    @property
    def key(self) -> SliceKey:
        """What tells this slice from every other one of the dataset."""
        return self.case, self.plane, self.slice


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


def read_triplets(raw_folder: Path) -> list[Triplet]:
    """The triplets of a raw dataset that may be used: those of :func:`all_triplets` that nobody struck.

    Raises:
        UserError: as :func:`all_triplets` and :func:`~nnssl_plugin.data.struck.read_struck`.
    """
    struck = read_struck(raw_folder)
    return [triplet for triplet in all_triplets(raw_folder) if triplet.key not in struck]


def all_triplets(raw_folder: Path) -> list[Triplet]:
    """Read ``triplets.jsonl`` of a raw dataset, struck triplets included.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.

    Returns:
        in the order of the file. Keys that are not fields of :class:`Triplet` are ignored.

    Raises:
        UserError: the file is absent, a line is malformed, or a slice of a case occurs twice.
    """
    path = Path(raw_folder) / TRIPLETS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: no slices have been chosen and described.", _remedy(raw_folder))
    triplets: dict[SliceKey, Triplet] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        triplet = _parse_line(line, where=f"{path}, line {number}")
        if triplet.key in triplets:
            problem = f"{path}, line {number}: {place_of(triplet)} of case {triplet.case!r} occurs twice."
            raise UserError(problem, "Keep one line per slice.")
        triplets[triplet.key] = triplet
    return list(triplets.values())


def by_case(triplets: Iterable[Triplet]) -> dict[str, list[Triplet]]:
    """Case name to its triplets, both in the order given."""
    cases: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        cases.setdefault(triplet.case, []).append(triplet)
    return cases


def write_triplets(raw_folder: Path, triplets: Iterable[Triplet]) -> Path:
    """Write ``triplets.jsonl`` atomically, one line per triplet in the given order, and return its path."""
    path = Path(raw_folder) / TRIPLETS_FILE
    lines = [json.dumps(asdict(triplet), ensure_ascii=False) + "\n" for triplet in triplets]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return path


def read_embeddings(raw_folder: Path, triplets: Iterable[Triplet]) -> dict[SliceKey, tuple[np.ndarray, np.ndarray]]:
    """The frozen embeddings of the given triplets.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.
        triplets: what :func:`read_triplets` gave (or some of it).

    Returns:
        :attr:`Triplet.key` to (image (E,), text (E,)), float32, each of length 1.

    Raises:
        UserError: the file is absent or unreadable, a slice has no row, or its text has changed since.
    """
    path, triplets = Path(raw_folder) / EMBEDDINGS_FILE, list(triplets)
    if not path.is_file():
        raise UserError(f"{path} does not exist: the slices and texts have not been embedded.", _remedy(raw_folder))
    stored = load_embeddings(raw_folder)
    row_of = _rows(stored, triplets)
    missing = [triplet for triplet in triplets if triplet.key not in row_of]
    if missing:
        raise UserError(f"{path} holds no embedding of {_some(missing)}.", _remedy(raw_folder))
    stale = [t for t in triplets if str(stored.text_sha256[row_of[t.key]]) != text_sha256(t.text)]
    if stale:
        raise UserError(f"The text of {_some(stale)} has changed since {path} was written.", _remedy(raw_folder))
    return {t.key: (stored.image[row_of[t.key]], stored.text[row_of[t.key]]) for t in triplets}


def _rows(stored: Embeddings, triplets: list[Triplet]) -> dict[SliceKey, int]:
    """Triplet to row. Files of before there was a place have one row per case, which serves a case with one slice."""
    if stored.place is not None:
        found = {
            (str(case), str(place)): row
            for row, (case, place) in enumerate(zip(stored.case, stored.place, strict=True))
        }
        return {t.key: found[t.case, place_of(t)] for t in triplets if (t.case, place_of(t)) in found}
    found = {str(case): row for row, case in enumerate(stored.case)}
    single = [slices[0] for slices in by_case(triplets).values() if len(slices) == 1]
    return {t.key: found[t.case] for t in single if t.case in found}


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


def describe_encoders(raw_folder: Path, weights: str) -> str:
    """Which encoders made embeddings, and what that means for a training on them, in one line.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX_NAME``.
        weights: of :class:`Embeddings`: a name and a hash.
    """
    if weights.startswith(RANDOM_PAIR):
        return f"random encoders ({weights}), which tell slices apart and know nothing of what they show"
    record = Path(raw_folder) / PAIR_FOLDER / PAIR_RECORD
    if not weights.startswith(f"{PAIR_FOLDER} ") or not record.is_file():
        return weights
    base = read_json(record).get("base_weights", "unknown weights")
    start = "from scratch, so it knows these slices and texts alone" if base.startswith(RANDOM_PAIR) else f"from {base}"
    return f"{weights}, a pair trained on slices and texts {start}"


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


def _some(triplets: list[Triplet]) -> str:
    rest = f" and {len(triplets) - 3} more" if len(triplets) > 3 else ""
    return ", ".join(f"{triplet.case} ({place_of(triplet)})" for triplet in triplets[:3]) + rest


def _remedy(raw_folder: Path) -> str:
    dataset = Path(raw_folder).name[len("Dataset") :].split("_")[0]
    return f"Run: nnssl_plugin caption -d {dataset}"
