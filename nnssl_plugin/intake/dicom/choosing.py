"""Which series of an export are taken: a row of the table for each, with the reason where it is not."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.files import ExportFile, on_disk
from nnssl_plugin.intake.dicom.headers import SEGMENTATION, STRUCTURES, Instance, read_whole
from nnssl_plugin.intake.dicom.names import Names
from nnssl_plugin.intake.dicom.rules import DICOM_MODALITY, Channel, Rule, attributes, fulfils, why_left_out
from nnssl_plugin.intake.dicom.stacks import Stack, build_stacks
from nnssl_plugin.intake.dicom.structures import WantedStructure, names_in, referenced_series
from nnssl_plugin.intake.dicom.table import COLUMNS, LEFT_OUT, REFUSED, TAKEN, SeriesRow


@dataclass(frozen=True)
class SeriesChoice:
    """What is asked for."""

    modality: str | None = None  # MR, CT or PET: take these only
    rules: Sequence[Rule] = ()  # none: every series that is a volume
    channels: Sequence[Channel] = ()  # instead of both: what the series of a study are
    wanted: Sequence[WantedStructure] = ()  # structures that become labels


@dataclass(frozen=True)
class Drawing:
    """A structure set or segmentation."""

    instance: Instance
    series: frozenset[str]  # on which it was drawn; empty where it does not say
    names: tuple[str, ...]
    made: str  # date and time, to compare


@dataclass(frozen=True)
class Candidate:
    """A stack, its row, whose status says what becomes of it, and what was drawn on it."""

    stack: Stack
    row: SeriesRow
    drawn: tuple[Drawing, ...]

    @property
    def is_taken(self) -> bool:
        """Whether it is to be converted."""
        return self.row["status"] == TAKEN


def choose_series(
    instances: Sequence[Instance], drawings: Sequence[Drawing], names: Names, choice: SeriesChoice
) -> list[Candidate]:
    """Every stack of an export with its row."""
    candidates = []
    for stack in build_stacks(instances):
        drawn = tuple(drawing for drawing in drawings if _is_drawn_on(drawing, stack.first))
        row = _row(stack, names, drawn)
        status, reason = _verdict(stack, drawn, choice)
        row.update(status=status, reason=reason, channel=_channel(stack, choice) if status == TAKEN else "")
        candidates.append(Candidate(stack, row, drawn))
    if choice.channels:
        _check_studies(candidates, bool(choice.wanted))
    for candidate in candidates:
        if not candidate.is_taken:
            candidate.row["scan"] = ""
    return candidates


def other_rows(instances: Sequence[Instance]) -> list[SeriesRow]:
    """A row for each series of objects that are no images."""
    return [_other_row(i) for i in {(i.study, i.series): i for i in instances if not i.is_image}.values()]


def find_drawings(instances: Sequence[Instance]) -> tuple[list[Drawing], list[str]]:
    """Every structure set and segmentation, the oldest first, and those that cannot be read."""
    found, unreadable = [], []
    for instance in instances:
        if instance.sop_class not in (SEGMENTATION, STRUCTURES):
            continue
        try:
            found.append(_drawing(instance))
        except Exception as error:  # whatever pydicom raises for one file, the others go on
            unreadable.append(f"{instance.file}: damaged: {type(error).__name__}: {str(error)[:120]}")
    return sorted(found, key=lambda drawing: (drawing.made, drawing.instance.uid)), unreadable


def modality_of(rows: Sequence[SeriesRow]) -> str:
    """``--modality`` of the series, MR where it has no name of its own."""
    found = {row["Modality"] for row in rows}
    return next((ours for ours, dicom in DICOM_MODALITY.items() if {dicom} == found), "MR")


def refuse_several_modalities(rows: Sequence[SeriesRow]) -> None:
    """Leave out all rows that are taken where they are of several modalities, and say so.

    Raises:
        UserError: they are.
    """
    taken = [row for row in rows if row["status"] == TAKEN]
    found = sorted({row["Modality"] for row in taken})
    if len(found) < 2:
        return
    for row in taken:
        row.update(status=LEFT_OUT, reason="series of several modalities, and none was chosen", scan="")
    known = [ours for ours, dicom in DICOM_MODALITY.items() if dicom in found]
    raise UserError(
        f"The export holds series of {', '.join(found)}, and a dataset of single images has one modality.",
        f"Say which: --modality {known[0] if known else 'noNorm --series Modality=' + found[0]}",
    )


def _verdict(stack: Stack, drawn: Sequence[Drawing], choice: SeriesChoice) -> tuple[str, str]:
    rules = [channel.rule for channel in choice.channels] or choice.rules
    reason = why_left_out(stack, rules, choice.modality)
    if reason:
        return LEFT_OUT, reason.replace("rule of --series", "rule of --modalities") if choice.channels else reason
    named = [channel.name for channel in choice.channels if fulfils(channel.rule, attributes(stack))]
    if len(named) > 1:
        return REFUSED, f"several of --modalities name it ({', '.join(named)}): make a rule narrower"
    if choice.wanted and not choice.channels and not drawn:
        return LEFT_OUT, "no structures were drawn on it"
    return TAKEN, ""


def _channel(stack: Stack, choice: SeriesChoice) -> str:
    known = attributes(stack)
    return next((channel.name for channel in choice.channels if fulfils(channel.rule, known)), "")


def _check_studies(candidates: Sequence[Candidate], labelled: bool) -> None:
    """A study has one series per channel, and where structures are wanted, some on one of its series."""
    studies: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.is_taken:
            studies[candidate.stack.first.study].append(candidate)
    for members in studies.values():
        counts: dict[str, int] = defaultdict(int)
        for candidate in members:
            counts[candidate.row["channel"]] += 1
        is_drawn = any(candidate.drawn for candidate in members)
        for row in (candidate.row for candidate in members):
            count = counts[row["channel"]]
            if count > 1:
                row.update(status=REFUSED, reason=f"{count} series of its study are {row['channel']}: narrow its rule")
            elif labelled and not is_drawn:
                row.update(status=LEFT_OUT, reason="no structures were drawn on its study")


def _drawing(instance: Instance) -> Drawing:
    with on_disk([instance.file]) as (path,):
        dataset = read_whole(path)
    dates = (dataset.get(name) for name in ("StructureSetDate", "StructureSetTime", "ContentDate", "ContentTime"))
    made = " ".join(str(date or "") for date in dates)
    return Drawing(instance, frozenset(referenced_series(dataset)), tuple(names_in(dataset)), made)


def _is_drawn_on(drawing: Drawing, image: Instance) -> bool:
    """By the series that it names, and where it names none by study and frame of reference."""
    if drawing.series:
        return image.series in drawing.series
    same_frame = image.frame_of_reference and image.frame_of_reference == drawing.instance.frame_of_reference
    return bool(same_frame) and image.study == drawing.instance.study


def _row(stack: Stack, names: Names, drawn: Sequence[Drawing]) -> SeriesRow:
    first = stack.first
    study = names.of("study", first.study)
    series = names.of("series", f"{first.series} {stack.part}".strip())
    return dict.fromkeys(COLUMNS, "") | {
        **{name: text for name, text in attributes(stack).items() if name in COLUMNS},
        "scan": f"{study}/{series}.nii.gz",
        "subject": names.of("patient", first.patient or first.study),
        "slices": str(len(stack.frames)),
        "part": stack.part,
        "burnt_in": _burnt_in(stack),
        "structures": "; ".join(name for drawing in drawn for name in drawing.names),
        "files": str(stack.files),
        "folder": _folder(stack.frames[0].file),
        "StudyInstanceUID": first.study,
        "SeriesInstanceUID": first.series,
    }


def _burnt_in(stack: Stack) -> str:
    if stack.first.shown.get("BurnedInAnnotation", "").upper() == "YES":
        return "burnt-in annotation: its texts may name the patient"
    return "texts outside of the ultrasound regions may name the patient" if stack.ultrasound_regions else ""


def _other_row(instance: Instance) -> SeriesRow:
    kind = instance.shown.get("Modality") or "object"
    return dict.fromkeys(COLUMNS, "") | instance.shown | {
        "status": LEFT_OUT,
        "reason": f"{kind} and no image",
        "files": "1",
        "folder": _folder(instance.file),
        "StudyInstanceUID": instance.study,
        "SeriesInstanceUID": instance.series,
    }  # fmt: skip


def _folder(file: ExportFile) -> str:
    return str(file.path if file.member else file.path.parent)
