"""Which series become scans: rules that a user gives, and what is left out without being asked for."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.headers import SHOWN
from nnssl_plugin.intake.dicom.stacks import Stack
from nnssl_plugin.intake.ledger import LABEL

FEWEST_SLICES = 5
"""Fewer planes are a localiser or a few pictures, and nnU-Net's 3D networks cannot use them."""
DICOM_MODALITY = {"MR": "MR", "CT": "CT", "PET": "PT"}
"""``--modality`` → DICOM's Modality."""
_TEST = re.compile(r"\s*(\w+)\s*(!=|!~|=|~|<|>)\s*(.*?)\s*", re.DOTALL)
_LOCALISER = re.compile(r"scout|locali[sz]er|topogram|surview|survey|3[ -]?plane|smart ?prep|bolus ?track", re.I)
_EXTRA = ("Slices", "Part")


@dataclass(frozen=True)
class Test:
    """One condition on an attribute."""

    attribute: str
    operator: str
    value: str

    def holds(self, found: str) -> bool:
        """Whether an attribute's text fulfils it; text is compared without regard to case."""
        if self.operator in "<>":
            try:
                return float(found) < float(self.value) if self.operator == "<" else float(found) > float(self.value)
            except ValueError:
                return False
        if "~" in self.operator:
            return (re.search(self.value, found, re.IGNORECASE) is not None) == (self.operator == "~")
        return (found.casefold() == self.value.casefold()) == (self.operator == "=")


Rule = tuple[Test, ...]
"""Conditions that have to hold together."""


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules such as ``Modality=MR,SeriesDescription~T1``.

    The operators are ``=``, ``!=``, ``~`` (a regular expression occurs), ``!~``, ``<`` and ``>``.

    Raises:
        UserError: a rule is no such text, or names an attribute that the table of series does not have.
    """
    return tuple(tuple(_parse_test(part, text) for part in re.split(r",(?=\s*\w+\s*[!=~<>])", text)) for text in texts)


@dataclass(frozen=True)
class Channel:
    """A channel of a dataset whose cases are studies, and which of a study's series shows it."""

    name: str
    rule: Rule


def parse_channels(texts: Sequence[str]) -> tuple[Channel, ...]:
    """``NAME=RULE`` each, such as ``T1=SeriesDescription~T1``.

    Raises:
        UserError: a text is none, or a name comes twice or is that of a column of tables.
    """
    channels = []
    for text in texts:
        name, _, rule = text.partition("=")
        if not name.strip() or not _TEST.match(rule):
            raise UserError(
                f"--modalities {text!r} for DICOM.",
                "Write NAME=RULE: --modalities 'T1=SeriesDescription~T1' 'PET=Modality=PT'",
            )
        channels.append(Channel(name.strip(), parse_rules([rule])[0]))
    names = [channel.name for channel in channels]
    if len(set(names)) < len(names) or set(names) & {"case", "subject", LABEL}:
        raise UserError(f"--modalities: the names are {', '.join(names)}.", "Give each modality a name of its own.")
    return tuple(channels)


def fulfils(rule: Rule, known: Mapping[str, str]) -> bool:
    """Whether all conditions of a rule hold for the attributes of a stack."""
    return all(test.holds(known[test.attribute]) for test in rule)


def attributes(stack: Stack) -> dict[str, str]:
    """What rules and the table know of a stack."""
    return {**dict.fromkeys(SHOWN, ""), **stack.first.shown, "Slices": str(len(stack.frames)), "Part": stack.part}


def why_left_out(stack: Stack, rules: Sequence[Rule], modality: str | None) -> str:
    """Why a stack is not taken; empty where it is.

    A rule that takes the stack and names ``ImageType`` asks for derived images and localisers, one that names
    ``BurnedInAnnotation`` for images with burnt-in texts.
    """
    known = attributes(stack)
    taking = [rule for rule in rules if fulfils(rule, known)]
    if rules and not taking:
        return "no rule of --series takes it"
    wanted = DICOM_MODALITY.get(modality or "", "")
    if wanted and known["Modality"] != wanted:
        return f"another modality: {known['Modality'] or 'none stated'}"
    asked = {test.attribute for rule in taking for test in rule}
    return next(filter(None, (why(stack, known, asked) for why in _REASONS)), "")


def _no_volume(stack: Stack, known: dict[str, str], asked: set[str]) -> str:
    if stack.colour:
        return "colour (RGB): one value per voxel is needed"
    if known["PhotometricInterpretation"] == "MONOCHROME1":
        return "inverted grey (MONOCHROME1)"
    if any(frame.position is None or frame.orientation is None or frame.spacing is None for frame in stack.frames):
        several = max(frame.number for frame in stack.frames) > 0
        return "no geometry: a cine or other sequence of pictures" if several else "no geometry: pictures, no slices"
    return ""


def _captured(stack: Stack, known: dict[str, str], asked: set[str]) -> str:
    return "secondary capture" if stack.captured else ""


def _localiser(stack: Stack, known: dict[str, str], asked: set[str]) -> str:
    if "ImageType" in asked:
        return ""
    if "LOCALIZER" in known["ImageType"].upper() or _LOCALISER.search(known["SeriesDescription"]):
        return "localiser"
    parts = stack.frames[0].apart[0].upper().split("\\") or [""]
    if "DERIVED" in parts or "SECONDARY" in parts:
        return "derived image (ImageType DERIVED or SECONDARY): --series 'ImageType~DERIVED|SECONDARY' takes it"
    return ""


def _burnt_in(stack: Stack, known: dict[str, str], asked: set[str]) -> str:
    if known["BurnedInAnnotation"].upper() == "YES" and "BurnedInAnnotation" not in asked:
        return "burnt-in annotation, which may name the patient: --series BurnedInAnnotation=YES takes it"
    return ""


def _few(stack: Stack, known: dict[str, str], asked: set[str]) -> str:
    count = len(stack.frames)
    return f"only {count} slices: {FEWEST_SLICES} are needed" if count < FEWEST_SLICES else ""


_REASONS: tuple[Callable[[Stack, dict[str, str], set[str]], str], ...] = (
    _captured, _no_volume, _localiser, _burnt_in, _few,
)  # fmt: skip


def _parse_test(part: str, text: str) -> Test:
    found = _TEST.fullmatch(part)
    if found is None:
        raise UserError(f"--series {text}: {part!r} is no condition.", "Write: --series 'Modality=MR,EchoTime<30'")
    attribute, operator, value = found.groups()
    known = (*SHOWN, *_EXTRA)
    if attribute not in known:
        near = get_close_matches(attribute, known, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--series {text}: {attribute!r} is not looked at.", f"{hint}Attributes are: {', '.join(known)}."
        )
    if "~" in operator:
        try:
            re.compile(value)
        except re.error as error:
            raise UserError(
                f"--series {text}: {value!r} is no pattern ({error}).", "Write \\ before ( and *."
            ) from error
    return Test(attribute, operator, value)
