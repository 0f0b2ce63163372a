"""Queries and what they found as one picture and one page: a row each, slices at the same height, with distances."""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from PIL import Image, ImageDraw

from nnssl_plugin.data.images import UNREADABLE
from nnssl_plugin.intake.contact_sheet import CAPTION, EDGE, thumbnail, volume_thumbnail
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.nnunet.geometry import affine_of
from nnssl_plugin.tasks.retrieval.queries import Query

PNG_FILE, HTML_FILE = "neighbours.png", "neighbours.html"
MOST_QUERIES = 50
"""Rows of a sheet."""
LETTERS, LINE = 20, 15
"""Letters of a name that fit below a thumbnail, and pixels of a line."""
HIDDEN = ("rank", "distance", "case", "part", "image", "height")
"""Cells that the page does not list below a picture."""


def write_sheets(
    folder: Path, queries: Sequence[Query], answers: Sequence[dict[str, Any]], *, reader: str
) -> tuple[Path, Path]:
    """Write ``neighbours.png`` and ``neighbours.html``.

    A query is shown at its own height, where the middle of its body, window or lesion lies, and so is each neighbour.

    Args:
        folder: where to.
        queries: the first :data:`MOST_QUERIES` are shown.
        answers: theirs, of ``queries.answers``.
        reader: nnU-Net's reader of the images.
    """
    thumbnails = Thumbnails(reader)
    shown = []
    for query, answer in list(zip(queries, answers, strict=True))[:MOST_QUERIES]:
        picture = thumbnails.of(query.image, query.height) if query.image else _written(query.name)
        tiles = [Tile(query.name, "query", {}, picture)]
        for found in answer["neighbours"]:
            name = f"{found['case']}/{found['part']}" if found["part"] else found["case"]
            about = {key: value for key, value in found.items() if key not in HIDDEN and value}
            picture = thumbnails.of(found["image"], found.get("height") or "")
            tiles.append(Tile(name, f"{found['distance']:.4f}", about, picture))
        shown.append(tiles)
    _write_png(folder / PNG_FILE, shown)
    _write_html(folder / HTML_FILE, shown)
    return folder / PNG_FILE, folder / HTML_FILE


class Tile:
    """A picture with its name, what is said of it, and its cells.

    Args:
        name: of case and part.
        said: ``query``, or the distance.
        cells: of its row.
        picture: its slice.
    """

    def __init__(self, name: str, said: str, cells: dict[str, str], picture: Image.Image):
        self.name, self.said, self.cells, self.picture = name, said, cells, picture

    @property
    def data(self) -> str:
        """The picture as a data URL."""
        written = BytesIO()
        self.picture.save(written, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


class Thumbnails:
    """Slices of images, each image read once.

    Args:
        reader: nnU-Net's.
    """

    def __init__(self, reader: str):
        self._reader = recursive_find_reader_writer_by_name(reader)()
        self._known: dict[tuple[str, str], Image.Image] = {}

    def of(self, image: str, height: str) -> Image.Image:
        """The slice of a file at a height; an empty tile where it cannot be read any more."""
        key = (image, height)
        if key not in self._known:
            self._known[key] = self._drawn(image, height)
        return self._known[key]

    def _drawn(self, image: str, height: str) -> Image.Image:
        try:
            array, properties = self._reader.read_images([image])
        except UNREADABLE:
            empty = Image.new("RGB", (EDGE, EDGE), (60, 60, 60))
            ImageDraw.Draw(empty).text((8, EDGE // 2 - 6), "file not readable", fill=(255, 255, 255))
            return empty
        affine = affine_of(properties)
        if affine is None or array.shape[1] == 1:
            plane = np.moveaxis(array[:3, 0], 0, -1) if len(array) >= 3 else array[0, 0]
            return thumbnail(plane, np.zeros(plane.shape[:2], dtype=bool))
        volume = array[0].T
        return volume_thumbnail(volume, np.zeros(volume.shape, dtype=bool), affine, height=float(height or 0.5))


def _written(text: str) -> Image.Image:
    """A tile with a text, as much of it as fits."""
    tile = Image.new("RGB", (EDGE, EDGE), (60, 60, 60))
    lines = wrap(text, LETTERS)[: EDGE // LINE - 1]
    ImageDraw.Draw(tile).multiline_text((4, 4), "\n".join(lines), fill=(255, 255, 255))
    return tile


def _write_png(path: Path, shown: Sequence[Sequence[Tile]]) -> None:
    columns = max((len(tiles) for tiles in shown), default=1)
    high = EDGE + 2 * CAPTION
    sheet = Image.new("RGB", (columns * (EDGE + 4) + 8, len(shown) * high), (20, 20, 20))
    draw = ImageDraw.Draw(sheet)
    for line, tiles in enumerate(shown):
        for number, tile in enumerate(tiles):
            left = number * (EDGE + 4) + (8 if number else 0)
            sheet.paste(tile.picture, (left, line * high))
            colour = (255, 255, 255) if number else (230, 159, 0)
            draw.text((left + 2, line * high + EDGE), tile.name[-LETTERS:], fill=colour)
            draw.text((left + 2, line * high + EDGE + CAPTION - 2), tile.said, fill=colour)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _write_html(path: Path, shown: Sequence[Sequence[Tile]]) -> None:
    templates = Environment(loader=PackageLoader("nnssl_plugin.tasks.retrieval"), autoescape=True)
    with atomic_path(path) as temporary:
        temporary.write_text(templates.get_template("neighbours.html").render(shown=shown), encoding="utf-8")
