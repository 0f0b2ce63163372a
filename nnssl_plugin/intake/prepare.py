"""One way in: what a folder holds is recognised (DICOM, BIDS, scans or 2D images), and takes its own road to a dataset.

The command ``prepare`` and the function of the same name give their options here, so that both take the same road.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.bids import bids_patterns, is_bids, write_bids_subjects
from nnssl_plugin.intake.dicom.export import ConvertedExport, local_places
from nnssl_plugin.intake.dicom.files import is_export
from nnssl_plugin.intake.dicom.prepare import DicomChoice, prepare_dicom_class_dataset, prepare_dicom_dataset
from nnssl_plugin.intake.dicom.table import SeriesRow
from nnssl_plugin.intake.grouping import BY_NAME, Modalities, parse_modalities
from nnssl_plugin.intake.labelled import LabelSummary, prepare_class_dataset
from nnssl_plugin.intake.preview import Preview
from nnssl_plugin.intake.unlabelled import ALL, Part, PrepareSummary, prepare_dataset
from nnssl_plugin.intake.videos import COLOURS, ConvertedVideos, convert_videos


@dataclass(frozen=True)
class PrepareOptions:
    """What a user may ask for; the functions of the roads say more about each."""

    modality: str | None = None
    modalities: Sequence[str] = ()  # NAME=PATTERN each (of DICOM NAME=RULE), or one path of a csv
    labels: Sequence[str] | None = None  # patterns; none: labelsTr of a folder that nnU-Net laid out; None: body masks
    cases_by: str = BY_NAME
    resample: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    keep: Sequence[str] = ()
    suffixes: Sequence[str] = ()  # of BIDS
    series: Sequence[str] = ()  # of DICOM, as the next three
    structures: Sequence[str] = ()
    key_file: str | Path | None = None
    local: str | Path | None = None
    class_labels: str | Path | None = None
    targets: Sequence[str] = ()
    video: int | None = None  # frames of each video that is taken
    part: Part | None = None
    processes: int = 2


@dataclass(frozen=True)
class Listener:
    """Who is told what lies ahead, before the first voxel is read."""

    of_scans: Callable[[Preview], None] | None = None
    of_series: Callable[[Sequence[SeriesRow]], None] | None = None


@dataclass(frozen=True)
class Prepared:
    """What was done."""

    summary: PrepareSummary
    classes: LabelSummary | None = None  # with a table of classes
    export: ConvertedExport | None = None  # of DICOM
    videos: ConvertedVideos | None = None

    @property
    def has_failures(self) -> bool:
        """Whether a file that was looked at could not be used, was set aside, or a folder not searched."""
        of_export = self.export is not None and self.export.has_failures
        of_videos = self.videos is not None and bool(self.videos.refused)
        return bool(self.summary.rejected or self.summary.unread or of_export or of_videos)


def prepare(
    source: str | Path, dataset_id: int, name: str, options: PrepareOptions, listener: Listener | None = None
) -> Prepared:
    """Make or extend ``nnUNet_raw/DatasetXXX_NAME`` from a folder of scans, DICOM files or 2D images.

    Args:
        source: the folder; of DICOM also a zip file.
        dataset_id: 1 to 999.
        name: the part after ``DatasetXXX_``.
        options: what is taken, and how.
        listener: is told what lies ahead.

    Raises:
        UserError: options contradict one another or the folder, or no scan can be used.
    """
    source, listener = Path(source), listener or Listener()
    _check(options)
    if options.video is not None:
        return _from_videos(source, dataset_id, name, options, listener)
    if options.series or options.structures or (source.exists() and is_export(source)):
        return _from_export(source, dataset_id, name, options, listener)
    if options.suffixes or is_bids(source):
        return _from_bids(source, dataset_id, name, options, listener)
    return _from_scans(source, dataset_id, name, options, listener)


def modality_texts(modalities: Mapping[str, str] | Sequence[str] | None) -> list[str]:
    """``{"T1": "*_t1*"}`` → ``["T1=*_t1*"]``; a list of such texts as it is."""
    if isinstance(modalities, Mapping):
        return [f"{name}={pattern}" for name, pattern in modalities.items()]
    return list(modalities or ())


def _check(options: PrepareOptions) -> None:
    if options.targets and options.class_labels is None:
        raise UserError("--target describes a column of a table.", "Give the table too: --class-labels FILE.csv")
    if not options.modalities and (options.labels or options.cases_by != BY_NAME):
        raise UserError("--labels PATTERN and --cases-by tell which files are a case.", "Give --modalities too.")
    if options.modalities and options.labels is not None and not options.labels:
        raise UserError("--labels without a pattern.", 'Say which files hold the segmentations: --labels "*_seg*"')
    if options.class_labels is not None and (options.modalities or options.part is not None):
        raise UserError(
            "--class-labels goes with neither --modalities nor -num_parts.",
            "Prepare the images first, then add the classes: nnssl_plugin prepare -d ID --class-labels FILE.csv",
        )
    if options.video is not None and (options.modalities or options.class_labels is not None or options.series):
        raise UserError("--video N makes volumes of videos; the other options are for scans.", "Give --video alone.")
    if options.structures and options.class_labels is not None:
        raise UserError("--structures and --class-labels are two kinds of labels.", "Give one of them.")


def _from_scans(source: Path, dataset_id: int, name: str, options: PrepareOptions, listener: Listener) -> Prepared:
    if options.class_labels is None:
        summary = prepare_dataset(
            source,
            dataset_id,
            name,
            modality=options.modality,
            modalities=_modalities(options),
            processes=options.processes,
            include=options.include,
            exclude=options.exclude,
            keep=options.keep,
            part=options.part,
            announce=listener.of_scans,
        )
        return Prepared(summary)
    summary, classes = prepare_class_dataset(
        source,
        dataset_id,
        name,
        table=options.class_labels,
        targets=options.targets,
        modality=options.modality,
        processes=options.processes,
        include=options.include,
        exclude=options.exclude,
        announce=listener.of_scans,
    )
    return Prepared(summary, classes)


def _modalities(options: PrepareOptions) -> Modalities | None:
    if options.modalities:
        return parse_modalities(
            options.modalities, labels=options.labels or (), cases_by=options.cases_by, resample=options.resample
        )
    if options.labels is None and not options.resample:
        return None
    return Modalities(labels=() if options.labels is None else ALL, resample=options.resample)


def _from_bids(source: Path, dataset_id: int, name: str, options: PrepareOptions, listener: Listener) -> Prepared:
    of_suffixes, others = bids_patterns(source, options.suffixes)
    options = replace(options, include=options.include or of_suffixes, exclude=[*options.exclude, *others])
    prepared = _from_scans(source, dataset_id, name, options, listener)
    write_bids_subjects(prepared.summary.folder)
    return prepared


def _from_videos(source: Path, dataset_id: int, name: str, options: PrepareOptions, listener: Listener) -> Prepared:
    """Frames of videos as volumes of three colours, which then take the road of scans."""
    folder = local_places(f"Dataset{dataset_id:03d}_{name}", local=options.local).folder / "videos"
    videos = convert_videos(source, folder, frames=options.video, include=options.include, exclude=options.exclude)
    channels = [f"{colour}=*_{colour}.nii.gz" for colour in COLOURS]
    options = replace(options, modalities=channels, include=(), exclude=(), keep=ALL)
    return replace(_from_scans(folder, dataset_id, name, options, listener), videos=videos)


def _from_export(source: Path, dataset_id: int, name: str, options: PrepareOptions, listener: Listener) -> Prepared:
    _check_export(options)
    choice = DicomChoice(
        modality=options.modality,
        modalities=options.modalities,
        series=options.series,
        structures=options.structures,
        resample=options.resample,
        include=options.include,
        exclude=options.exclude,
        key_file=options.key_file,
        local=options.local,
    )
    if options.class_labels is None:
        summary, converted = prepare_dicom_dataset(
            source,
            dataset_id,
            name,
            choice,
            keep=options.keep,
            processes=options.processes,
            ahead=listener.of_series,
            announce=listener.of_scans,
        )
        return Prepared(summary, export=converted)
    summary, classes, converted = prepare_dicom_class_dataset(
        source,
        dataset_id,
        name,
        choice,
        table=options.class_labels,
        targets=options.targets,
        processes=options.processes,
        ahead=listener.of_series,
        announce=listener.of_scans,
    )
    return Prepared(summary, classes, converted)


def _check_export(options: PrepareOptions) -> None:
    """Nothing that was asked for is passed over without a word."""
    if options.labels is not None or options.cases_by != BY_NAME:
        raise UserError(
            "--labels and --cases-by name files; the folder holds DICOM.",
            "RTSTRUCT and SEG become labels by --structures 'NAME=1'; a study is a case with --modalities.",
        )
    if options.part is not None:
        raise UserError("-num_parts shares scans; DICOM is converted by one run.", "Leave it out; -np N helps.")
    if options.suffixes:
        raise UserError("--suffix is of BIDS; the folder holds DICOM.", "Choose series by --series RULE.")
