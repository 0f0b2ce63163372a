"""Pages on which a person reads slices and texts, and strikes bad ones: HTML files that need no server and no network.

The decisions are saved by the browser as a small table, which ``caption --strike FILE`` takes into the dataset.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from nnssl_plugin.captions.checks import suspicions
from nnssl_plugin.captions.overview import count_contents
from nnssl_plugin.captions.rendering import png
from nnssl_plugin.captions.triplets import described_modality, viewed_triplets
from nnssl_plugin.data.struck import SliceKey, read_struck
from nnssl_plugin.data.triplets import Triplet, all_triplets, by_case
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path

FOLDER = "captions_review"
TEMPLATE = "review.html"
PER_PAGE = 200
"""Triplets on a page, rounded up to whole cases."""
SIDE = 320
"""Length in pixels of the longer side of a slice."""


@dataclass(frozen=True)
class ReviewSummary:
    """What :func:`write_review` made."""

    pages: list[Path]
    triplets: int
    suspicious: int
    struck: int


@dataclass(frozen=True)
class _Entry:
    """A triplet as the page shows it."""

    triplet: Triplet
    suspicions: list[str]
    struck: bool
    base64: str


def write_review(raw_folder: Path, *, window: tuple[float, float] | None = None) -> ReviewSummary:
    """Write the pages into ``captions_review/`` of a raw dataset; cases with suspicious texts come first.

    Args:
        raw_folder: raw dataset with ``triplets.jsonl``.
        window: centre and width in which slices are shown; None: as the modality is read.

    Raises:
        UserError: the dataset has no triplets, or an image cannot be read.
    """
    triplets, struck, modality = all_triplets(raw_folder), read_struck(raw_folder), described_modality(raw_folder)
    if not triplets:
        raise UserError(f"{raw_folder} has no triplets to review.", f"Run: nnssl_plugin caption -d {raw_folder.name}")
    found = dict(zip((line.key for line in triplets), suspicions(triplets, modality), strict=True))
    parts = _parts(triplets, found)
    contents = count_contents([line for line in triplets if line.key not in struck], modality)
    paths = [raw_folder / FOLDER / f"page_{number:03d}.html" for number in range(1, len(parts) + 1)]
    for old in set((raw_folder / FOLDER).glob("page_*.html")) - set(paths):
        old.unlink()
    template = Environment(
        loader=PackageLoader("nnssl_plugin.captions"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(TEMPLATE)
    with tqdm(total=len(triplets), desc="review", unit="slice") as bar:
        for path, part in zip(paths, parts, strict=True):
            entries = _entries(raw_folder, part, found, struck, window)
            page = template.render(
                dataset=raw_folder.name,
                entries=entries,
                contents=contents,
                pages=[p.name for p in paths],
                own=path.name,
            )
            with atomic_path(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
            bar.update(len(part))
    return ReviewSummary(paths, len(triplets), sum(map(bool, found.values())), len(struck & found.keys()))


def _parts(triplets: Sequence[Triplet], found: dict[SliceKey, list[str]]) -> list[list[Triplet]]:
    """The triplets of each page: whole cases, those with suspicions first."""
    cases = sorted(by_case(triplets).values(), key=lambda case: not any(found[line.key] for line in case))
    parts: list[list[Triplet]] = [[]]
    for case in cases:
        if len(parts[-1]) >= PER_PAGE:
            parts.append([])
        parts[-1] += case
    return parts


def _entries(
    raw_folder: Path,
    triplets: Sequence[Triplet],
    found: dict[SliceKey, list[str]],
    struck: set[SliceKey],
    window: tuple[float, float] | None,
) -> list[_Entry]:
    return [
        _Entry(line, found[line.key], line.key in struck, base64.b64encode(png(picture, side=SIDE)).decode("ascii"))
        for line, picture in viewed_triplets(raw_folder, triplets, window=window)
    ]
