"""Random slices of every volume and their texts (Med3DInsight, section III-A), for any nnU-Net raw dataset."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from nnssl_plugin.captions.captioners import Captioner, PlacedCaptioner, SliceFacts, modality_of, signature
from nnssl_plugin.captions.describing import Draft, describe_all
from nnssl_plugin.captions.journal import Cost, Journal, Run, merge_journal, options_of
from nnssl_plugin.captions.rendering import Volume, grey_limits, load_volume, slice_image, viewed_extent, viewed_slice
from nnssl_plugin.data.cases import first_channels
from nnssl_plugin.data.struck import SliceKey, read_struck
from nnssl_plugin.data.triplets import TRIPLETS_FILE, Triplet, all_triplets, by_case
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.lock import locked
from nnssl_plugin.nnunet.dataset_json import read_dataset_file
from nnssl_plugin.nnunet.planes import PLANES, stored_axis
from nnssl_plugin.nnunet.raw_folders import training_files

log = logging.getLogger(__name__)

SLICES = 8
"""Slices per case. The paper takes one for ever: then whatever tells the case names its slice, and the volume need not
be looked at. Here a step sees one of several."""

LOCK_FILE = ".caption.lock"


@dataclass(frozen=True)
class CaptionSummary:
    """What :func:`caption_dataset` did."""

    path: Path
    added: int
    kept: int
    cost: Cost = field(default_factory=Cost)
    failed: tuple[str, ...] = ()
    """Slices that got no text, and why."""
    unknown: tuple[str, ...] = ()
    """Cases of which the captioner has no text."""


@dataclass(frozen=True)
class _Draw:
    """How slices are chosen and shown."""

    seed: int
    slices: int
    body_part: str
    modality_of_case: Callable[[str], str]
    window: tuple[float, float] | None


@dataclass(frozen=True)
class _Case:
    """A case that lacks slices."""

    name: str
    image: Path
    label: Path
    kept: list[Triplet]  # lines that stay and count
    lacking: int  # slices
    given: Sequence[tuple[str, int]] | None  # plane and index of what may be described; None: draw


def choose_slices(
    case: str, body: np.ndarray, affine: np.ndarray, *, seed: int, count: int = SLICES
) -> list[tuple[str, int, int]]:
    """Draw slices: the planes in turn, in random order, and uniformly among the slices of a plane that hold some body.

    The draw depends on (seed, case) and the mask alone, so adding cases leaves the others as they are; a larger count
    adds slices to those of a smaller one. The paper draws from all slices; here slices of air are left out, because
    nothing can be said about them.

    Args:
        case: name of the case.
        body: (I, J, K), true inside the body or any label; all false stands for the whole image.
        affine: (4, 4) voxel-to-world matrix in RAS mm.
        seed: of the dataset.
        count: number of slices.

    Returns:
        plane, index along the stored axis of that plane, and the length of that axis, of each slice; fewer than
        ``count`` where the case has no more.
    """
    digest = hashlib.sha256(f"{seed}:{case}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    first = PLANES[rng.integers(len(PLANES))]
    left = {plane: _slices_with_body(body, affine, plane) for plane in PLANES}
    drawn = [_take(left[first], rng)]
    planes = [first]
    others = [PLANES[number] for number in rng.permutation(len(PLANES)) if PLANES[number] != first]
    for plane in cycle((*others, first)):
        if len(drawn) >= count or not any(left.values()):
            break
        if left[plane]:
            drawn.append(_take(left[plane], rng))
            planes.append(plane)
    return [(p, index, body.shape[stored_axis(affine, p)[0]]) for p, index in zip(planes, drawn, strict=True)]


def _slices_with_body(body: np.ndarray, affine: np.ndarray, plane: str) -> list[int]:
    axis, _ = stored_axis(affine, plane)
    others = tuple(other for other in range(3) if other != axis)
    return (np.flatnonzero(np.any(body, axis=others)) if np.any(body) else np.arange(body.shape[axis])).tolist()


def _take(left: list[int], rng: np.random.Generator) -> int:
    return left.pop(rng.integers(len(left)))


def slice_facts(volume: Volume, triplet: Triplet, *, modality: str) -> SliceFacts:
    """What is known about the slice of a triplet without looking at it."""
    axis, reversed_ = stored_axis(volume.affine, triplet.plane)
    last = triplet.n_slices - 1
    index = last - triplet.slice if reversed_ else triplet.slice
    return SliceFacts(
        case=triplet.case,
        modality=modality,
        plane=triplet.plane,
        position=index / last if last else 0.5,
        extent_mm=viewed_extent(volume, triplet.plane),
        spacing_mm=float(nibabel.affines.voxel_sizes(volume.affine)[axis]),
        body_part=triplet.body_part,
        index=triplet.slice,
    )


def described_modality(raw_folder: Path) -> Callable[[str], str]:
    """Case → the modality that ``dataset.json`` names for the channel that is described, the first that it has."""
    dataset_json = read_dataset_file(raw_folder / "dataset.json", needed=("channel_names",))
    channels = first_channels(raw_folder)
    return lambda case: modality_of(dataset_json, channels.get(case, 0))


def caption_dataset(
    raw_folder: Path,
    captioner: Captioner,
    *,
    seed: int = 0,
    slices: int = SLICES,
    body_part: str | None = None,
    window: tuple[float, float] | None = None,
) -> CaptionSummary:
    """Choose and describe slices of every case, and write ``triplets.jsonl``.

    A line stays as it is where another captioner (or a person) wrote it, or where this captioner wrote it with this
    seed, these options and, if given, this body part. A case that only others described gets no further lines. A
    struck slice is never described again, and another is drawn in its place. A text is kept the moment it arrives:
    after a kill the same call goes on with those that are missing.

    Args:
        raw_folder: any nnU-Net raw dataset of 3D images; the first channel that a case has is described.
        captioner: who writes the new texts.
        seed: draws the slices.
        slices: per case; a case that has more keeps them.
        body_part: goes into the new texts; None leaves it out and keeps the lines that have one.
        window: centre and width of what the captioner sees; None: as the modality is read.

    Raises:
        UserError: the dataset has no training cases, an image cannot be read, the captioner fails, or another process
            describes the dataset.
    """
    files = training_files(raw_folder, first_channels(raw_folder))
    if not files:
        raise UserError(f"{raw_folder} has no training cases.", "Prepare some scans first: nnssl_plugin prepare")
    if slices < 1:
        raise UserError(f"--slices {slices}: every case needs one.", "Give 1 or more; 8 is the default.")
    draw = _Draw(seed, slices, body_part or "", described_modality(raw_folder), window)
    with locked(raw_folder / LOCK_FILE):
        struck = read_struck(raw_folder)
        merge_journal(raw_folder, struck)  # of a run that was killed
        run = Run(signature(captioner), seed, body_part)
        todo, kept, unknown = _plan(raw_folder, files, captioner, run, slices, struck)
        _announce(raw_folder, captioner, sum(case.lacking for case in todo))
        journal = Journal(raw_folder, run, {**options_of(captioner), "seed_of_slices": seed, "window": window})
        try:
            drafts = (_drafts(case, captioner, draw, struck) for case in tqdm(todo, desc="caption", unit="case"))
            failed = describe_all(captioner, drafts, journal.add)
        finally:  # cases that an interruption left undone keep the lines they had
            journal.close()
            merge_journal(raw_folder, struck)
    path = raw_folder / TRIPLETS_FILE
    return CaptionSummary(path, journal.cost.texts, kept, journal.cost, tuple(failed), tuple(unknown))


def triplet_pictures(raw_folder: Path, triplets: Sequence[Triplet]) -> Iterator[tuple[Triplet, np.ndarray]]:
    """Each triplet of a case that the dataset still has, with its picture; case by case."""
    for volume, of_case in _volumes(raw_folder, triplets):
        for triplet in of_case:
            yield triplet, slice_image(volume, triplet)


def viewed_triplets(
    raw_folder: Path, triplets: Sequence[Triplet], *, window: tuple[float, float] | None = None
) -> Iterator[tuple[Triplet, np.ndarray]]:
    """Like :func:`triplet_pictures`, with the pictures that captioners see."""
    modality_of_case = described_modality(raw_folder)
    for volume, of_case in _volumes(raw_folder, triplets):
        for triplet in of_case:
            modality = modality_of_case(triplet.case)
            limits = grey_limits(volume, modality=modality, body_part=triplet.body_part, window=window)
            yield triplet, viewed_slice(volume, triplet, limits)


def _volumes(raw_folder: Path, triplets: Iterable[Triplet]) -> Iterator[tuple[Volume, list[Triplet]]]:
    files = training_files(raw_folder, first_channels(raw_folder))
    for case, of_case in by_case(triplets).items():
        if case not in files:
            log.warning("%s names case %s, which the dataset does not have; it is left out.", TRIPLETS_FILE, case)
            continue
        yield load_volume(files[case][0]), of_case


def _announce(raw_folder: Path, captioner: Captioner, count: int) -> None:
    destination = getattr(captioner, "destination", None)
    if destination and count:
        log.warning("Up to %d pictures of %s leave this computer for %s.", count, raw_folder.name, destination)


def _plan(
    raw_folder: Path,
    files: dict[str, tuple[Path, Path]],
    captioner: Captioner,
    run: Run,
    slices: int,
    struck: set[SliceKey],
) -> tuple[list[_Case], int, list[str]]:
    """The cases that lack slices, the number of lines that stay, and the cases that the captioner does not know."""
    lines = by_case(all_triplets(raw_folder)) if (raw_folder / TRIPLETS_FILE).is_file() else {}
    todo, unknown, kept = [], [], 0
    for case, (image, label) in files.items():
        there = [line for line in lines.get(case, ()) if line.key not in struck]
        stay = [line for line in there if run.keeps(line)]
        kept += len(stay)
        foreign = bool(there) and not any(run.wrote(line) for line in there)
        if isinstance(captioner, PlacedCaptioner) and not captioner.knows(case):
            unknown.append(case)
            continue
        given = captioner.places(case) if isinstance(captioner, PlacedCaptioner) else None
        wanted = {(case, *place) for place in given or ()} - struck - {line.key for line in stay}
        lacking = slices - len(stay) if given is None else len(wanted)
        if lacking > 0 and not foreign:
            todo.append(_Case(case, image, label, stay, lacking, given))
    return todo, kept, unknown


def _drafts(case: _Case, captioner: Captioner, draw: _Draw, struck: set[SliceKey]) -> list[Draft]:
    """The slices of a case that lack a text, up to the number that is wanted."""
    volume = load_volume(case.image)
    taken = {line.key for line in case.kept} | struck
    struck_here = sum(key[0] == case.name for key in struck)
    found = _drawn(case, volume, draw.seed, draw.slices + struck_here) if case.given is None else _given(case, volume)
    places = [place for place in found if (case.name, *place[:2]) not in taken]
    modality = draw.modality_of_case(case.name)
    limits = grey_limits(volume, modality=modality, body_part=draw.body_part, window=draw.window)
    drafts = []
    for place in places[: case.lacking]:
        triplet = Triplet(
            case.name, *place, text="", captioner=signature(captioner), seed=draw.seed, body_part=draw.body_part
        )
        facts = slice_facts(volume, triplet, modality=modality)
        drafts.append(Draft(triplet, viewed_slice(volume, triplet, limits), facts))
    return drafts


def _drawn(case: _Case, volume: Volume, seed: int, count: int) -> list[tuple[str, int, int]]:
    body = load_volume(case.label).array > 0 if case.label.is_file() else np.zeros(volume.array.shape, dtype=bool)
    if body.shape != volume.array.shape:
        problem = f"Case {case.name}: label {body.shape} and image {volume.array.shape} differ."
        raise UserError(problem, "Mend the label.")
    return choose_slices(case.name, body, volume.affine, seed=seed, count=count)


def _given(case: _Case, volume: Volume) -> list[tuple[str, int, int]]:
    counts = {plane: volume.array.shape[stored_axis(volume.affine, plane)[0]] for plane in PLANES}
    beyond = [(plane, index) for plane, index in case.given if index >= counts[plane]]
    if beyond:
        plane, index = beyond[0]
        problem = f"Case {case.name} has a text of {plane} slice {index}, and {counts[plane]} such slices."
        raise UserError(problem, "Slices are counted from 0, along the axis of the image as stored.")
    return [(plane, index, counts[plane]) for plane, index in case.given]
