"""Who describes slices: the contract of a captioner, the table of those that the command knows, and how one is made."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.settings import settings_from

CAPTIONERS = {"template": "nnssl_plugin.captions.template:TemplateCaptioner"}
"""Name on the command line → ``package.module:Class``; the class's ``Options`` are what ``--set`` changes."""

NORMALISERS = {"nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
"""Channel names by which nnU-Net chooses a normalisation; they say nothing about the modality."""


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
            slices: (H, W, 3) uint8 each, oriented for viewing (see ``triplets.slice_image``).
            facts: what the file knows of each.

        Returns:
            one text per slice; line breaks become blanks.
        """
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
    """Name of a captioner with the options that differ from their defaults, for example ``template size=False``."""
    options = getattr(captioner, "options", None)
    if options is None:
        return captioner.name
    defaults = asdict(type(options)())
    changed = [f"{key}={value}" for key, value in asdict(options).items() if value != defaults[key]]
    return " ".join([captioner.name, *changed])


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
