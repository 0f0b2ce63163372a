"""Who describes slices: the contract of a captioner, the table of those that the command knows, and how one is made."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.settings import settings_from

CAPTIONERS = {
    "template": "nnssl_plugin.captions.template:TemplateCaptioner",
    "openai": "nnssl_plugin.captions.openai_server:OpenAICaptioner",
    "file": "nnssl_plugin.captions.existing_texts:ExistingTexts",
}
"""Name on the command line → ``package.module:Class``; the class's ``Options`` are what ``--set`` changes."""

NORMALISERS = {"nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
"""Channel names by which nnU-Net chooses a normalisation; they say nothing about the modality."""

TRANSPORT: Mapping[str, Any] = {"shapes_text": False}
"""Metadata of an option that has no influence on the texts, only on the way to them."""
LONGEST_IN_SIGNATURE = 60
"""Characters of an option's value that stand in a captioner's signature; a longer one is named by its hash."""


@dataclass(frozen=True)
class SliceFacts:
    """What is known about a slice without looking at it."""

    case: str
    modality: str  # the name of the channel, empty where it names a normalisation
    plane: str
    position: float  # 0 at the inferior, posterior or left end of the volume to 1 at the other
    extent_mm: tuple[float, float]  # width and height of the slice as viewed
    spacing_mm: float  # distance between neighbouring slices of this plane
    body_part: str  # as the user gave it, or empty
    index: int = 0  # of the slice, along the axis as stored


@dataclass(frozen=True)
class Answer:
    """A text, and what it cost to get it."""

    text: str
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class SliceFailed(Exception):
    """One slice got no text; the others may."""


class CaptionerStopped(UserError):
    """The captioner cannot go on: no other slice would get a text either."""


class Captioner(Protocol):
    """Describes slices in words; made as ``Class(options)``.

    Any class with these members is one, in any package: ``caption --captioner package.module:Class``.
    """

    name: ClassVar[str]
    """One word; every text says who wrote it."""
    Options: ClassVar[type]
    """Frozen dataclass of the options, each with a default. One that sends slices to another computer has a field
    ``host``, and sends nothing anywhere else: it is only made where the user names the host."""

    def describe(self, slices: Sequence[np.ndarray], facts: Sequence[SliceFacts]) -> list[str]:
        """The texts of some slices of one case.

        Args:
            slices: (H, W, 3) uint8 each, as a radiologist sees them (see ``rendering.viewed_slice``).
            facts: what the file knows of each.

        Returns:
            one text per slice; line breaks become blanks.
        """
        ...


@runtime_checkable
class AskedCaptioner(Captioner, Protocol):
    """A captioner that waits for its texts, and so is asked for several slices at once.

    It may have a ``destination``, the computer to which slices are sent; None where they stay on this one.
    """

    concurrency: int
    """From how many threads :meth:`ask` is called."""

    def ask(self, picture: np.ndarray, facts: SliceFacts) -> Answer:
        """The text of one slice.

        Raises:
            SliceFailed: this slice gets none.
            CaptionerStopped: no slice does.
        """
        ...

    def close(self) -> None:
        """Break off what is being asked; may be called twice, and ``ask`` works again afterwards."""
        ...


@runtime_checkable
class PlacedCaptioner(Captioner, Protocol):
    """A captioner that has texts of certain cases or slices alone."""

    def places(self, case: str) -> Sequence[tuple[str, int]] | None:
        """Plane and index of the slices that have a text; None: any slice of the case has."""
        ...

    def knows(self, case: str) -> bool:
        """Whether there is a text of the case."""
        ...


def open_captioner(name: str, values: Mapping[str, Any] | None = None) -> Captioner:
    """Make a captioner.

    Args:
        name: of :data:`CAPTIONERS`, or ``package.module:Class``.
        values: options that differ from their defaults.

    Raises:
        UserError: there is no such captioner, it is none, an option is unknown or of the wrong type, or it would send
            slices to a host that the user has not named.
    """
    values = dict(values or {})
    captioner = _captioner_class(name)
    options = settings_from(values, captioner.Options(), f"the options of captioner {name}")
    if hasattr(options, "host") and not values.get("host"):
        raise UserError(
            f"Captioner {name} sends slices of your scans to another computer, and none is named.",
            f"If that is what you want, name it: --captioner {name} --set host=HOST",
        )
    return captioner(options)


def signature(captioner: Captioner) -> str:
    """Name of a captioner with the options that shape its texts and differ from their defaults.

    For example ``template size=False``. Options with the metadata :data:`TRANSPORT` are left out; a ``fingerprint``
    of the captioner, which says what else shapes its texts, stands behind them.
    """
    options = getattr(captioner, "options", None)
    if options is None:
        return captioner.name
    default = type(options)()
    changed = [
        f"{field.name}={_brief(getattr(options, field.name))}"
        for field in fields(options)
        if field.metadata.get("shapes_text", True) and getattr(options, field.name) != getattr(default, field.name)
    ]
    fingerprint = getattr(captioner, "fingerprint", "")
    return " ".join(filter(None, [captioner.name, *changed, fingerprint]))


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_IN_SIGNATURE else hashlib.sha256(text.encode()).hexdigest()[:12]


def _captioner_class(name: str) -> Any:
    path = CAPTIONERS.get(name, name)
    known = f"Known: {', '.join(CAPTIONERS)}; or give package.module:Class of your own."
    module, separator, attribute = path.partition(":")
    if not separator:
        raise UserError(f"There is no captioner {name}.", known)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"Captioner {name} cannot be imported: {error}", known) from error
    missing = [member for member in ("name", "Options", "describe") if not hasattr(found, member)]
    if missing:
        raise UserError(
            f"{name} is no captioner: it has no {', '.join(missing)}.",
            "A captioner has a name, a dataclass Options, and describe(slices, facts), which gives one text per slice.",
        )
    return found


def modality_of(dataset_json: dict, channel: int = 0) -> str:
    """The name of a channel, or an empty text where it only names a normalisation.

    Args:
        dataset_json: content of nnU-Net's dataset.json (``channel_names``, or ``modality`` in old files).
        channel: its number.
    """
    names = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    name = str(names.get(str(channel), ""))
    return "" if name.casefold() in NORMALISERS else name
