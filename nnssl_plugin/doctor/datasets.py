"""One dataset: is it there, what was made of it so far, and how much room will it take?"""

import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_plugin.doctor.finding import GIB, OK, PROBLEM, WARNING, Finding
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.nnunet import case_labels as class_labels
from nnssl_plugin.nnunet.dataset_json import read_dataset_file

KEYS = ("channel_names", "labels", "numTraining", "file_ending")
"""What nnU-Net asks of dataset.json."""
HEADERS = 200
"""Headers that are read at most; larger datasets are estimated from evenly spaced cases."""
BYTES_PER_VOXEL = 4
CHECKPOINTS = 1 * GIB
"""Final, latest and best checkpoint of one training with nnU-Net's default network."""
PLANS_SHOWN = 6
_READ_ERRORS = (OSError, EOFError, zlib.error, ValueError)


@dataclass(frozen=True)
class Dataset:
    """Where a dataset lies; None for a folder that is not there."""

    name: str
    raw: Path | None
    preprocessed: Path | None

    @property
    def number(self) -> str:
        """Its ID as commands take it."""
        return str(int(self.name[7:10]))


def find_dataset(environment: Mapping[str, str], dataset: str) -> tuple[Dataset | None, list[Finding]]:
    """The dataset of an ID or full name in nnU-Net's folders, and what is wrong about its whereabouts."""
    names = sorted(
        {
            folder.name
            for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
            for folder in _candidates(environment.get(variable, "").strip(), dataset)
        }
    )
    if not names:
        return None, [
            Finding(
                "dataset",
                PROBLEM,
                f"there is no dataset {dataset} in nnU-Net's folders",
                "nnssl_plugin prepare -i DIR -d ID -n NAME --modality MR",
            )
        ]
    if len(names) > 1:
        return None, [
            Finding(
                "dataset",
                PROBLEM,
                f"{dataset} is the ID of {', '.join(names)}: nnU-Net refuses that",
                "Give all but one another number (rename the folders).",
            )
        ]
    found = Dataset(
        names[0], _folder(environment, "nnUNet_raw", names[0]), _folder(environment, "nnUNet_preprocessed", names[0])
    )
    if found.raw is None:
        return found, [
            Finding(
                "dataset",
                WARNING,
                f"{found.name}: not in nnUNet_raw, so triplets cannot be read",
                "nnssl_plugin prepare -i DIR -d ID -n NAME --modality MR",
            )
        ]
    return found, [Finding("dataset", OK, str(found.raw))]


def dataset_findings(dataset: Dataset) -> list[Finding]:
    """``dataset.json``, cases, triplets and embeddings, plans and preprocessed cases."""
    findings, cases = [], []
    if dataset.raw is not None:
        description, wrong = _description(dataset.raw / "dataset.json")
        if wrong:
            return wrong
        cases = training_cases(dataset.raw, description)
        findings = [
            _cases(dataset, cases, description),
            *_class_labels(dataset.raw, cases, description),
            *_triplets(dataset.raw, cases),
        ]
    return findings + _plans(dataset, len(cases))


def training_cases(raw: Path, description: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Name and first image of each training case, sorted by name (nnU-Net's two ways to name them)."""
    if "dataset" in description:
        images = {case: os.path.expandvars(entry["images"][0]) for case, entry in description["dataset"].items()}
        return [(case, raw / images[case]) for case in sorted(images)]
    tail = f"_0000{description['file_ending']}"
    return sorted((path.name[: -len(tail)], path) for path in (raw / "imagesTr").glob(f"*{tail}"))


def room_needed(dataset: Dataset) -> tuple[dict[str, float] | None, list[Finding]]:
    """Bytes that preprocessing and one training will write, from the headers of the raw NIfTI files.

    Uncompressed voxels × channels × 4 bytes: an estimate, as nnU-Net crops, resamples and compresses. Nothing is
    needed for preprocessing where preprocessed cases lie already.

    Returns:
        variable → bytes (None where it cannot be told), and a finding for files that cannot be read.
    """
    if dataset.raw is None or any(count for *_, count in preprocessed_cases(dataset)):
        return {"nnUNet_results": CHECKPOINTS}, []
    description, wrong = _description(dataset.raw / "dataset.json")
    files = [] if wrong else [path for _, path in training_cases(dataset.raw, description)]
    if not files or not str(files[0]).endswith((".nii", ".nii.gz")):
        return None, []
    sizes, unreadable = _sizes(files[:: -(-len(files) // HEADERS)])
    wrong = [_unreadable(files[0].parent, unreadable)] if unreadable else []
    if not sizes:
        return None, wrong
    voxels = sum(sizes) / len(sizes) * len(files)
    preprocessed = voxels * len(description["channel_names"]) * BYTES_PER_VOXEL
    return {"nnUNet_preprocessed": preprocessed, "nnUNet_results": CHECKPOINTS}, wrong


def preprocessed_cases(dataset: Dataset) -> list[tuple[str, str, int]]:
    """Plan, configuration and number of preprocessed cases, for every plan of the dataset."""
    found = []
    for path, plan in _plan_files(dataset):
        for name in plan["configurations"]:
            identifier = _data_identifier(plan["configurations"], name)
            cases = (path.parent / identifier).glob("*.pkl") if identifier else ()
            found.append((path.stem, name, len(list(cases))))
    return found


def _candidates(root: str, dataset: str) -> list[Path]:
    if not root or not os.path.isdir(root):
        return []
    if dataset.startswith("Dataset"):
        return [path for path in [Path(root, dataset)] if path.is_dir()]
    return [p for p in Path(root).glob("Dataset*") if re.match(rf"Dataset0*{re.escape(dataset.lstrip('0'))}_", p.name)]


def _folder(environment: Mapping[str, str], variable: str, name: str) -> Path | None:
    root = environment.get(variable, "").strip()
    return Path(root, name) if root and Path(root, name).is_dir() else None


def _description(path: Path) -> tuple[dict[str, Any], list[Finding]]:
    """dataset.json, or what is wrong with it."""
    again = f"nnssl_plugin prepare -i DIR -d {int(path.parent.name[7:10])} -n NAME   (or write it by hand)"
    try:
        description = read_dataset_file(path)
    except UserError as error:
        return {}, [Finding("dataset.json", PROBLEM, error.problem, error.remedy or again)]
    missing = [key for key in KEYS if key not in description] if isinstance(description, dict) else KEYS
    if missing:
        return {}, [Finding("dataset.json", PROBLEM, f"{path} lacks {', '.join(missing)}", again)]
    if not isinstance(description["channel_names"], dict):
        return {}, [Finding("dataset.json", PROBLEM, f"{path}: channel_names is no object from number to name", again)]
    return description, []


def _cases(dataset: Dataset, cases: list, description: Mapping[str, Any]) -> Finding:
    channels = ", ".join(str(name) for name in description["channel_names"].values())
    text = f"{len(cases)} training cases; channels: {channels}"
    if not cases:
        return Finding(
            "images",
            PROBLEM,
            f"no *_0000{description['file_ending']} in {dataset.raw / 'imagesTr'}",
            f"nnssl_plugin prepare -i DIR -d {dataset.number} -n NAME",
        )
    if len(cases) != description["numTraining"]:
        return Finding(
            "images",
            WARNING,
            f"{text}; dataset.json says {description['numTraining']}",
            f'Set "numTraining": {len(cases)} in {dataset.raw / "dataset.json"}',
        )
    return Finding("images", OK, text)


def _class_labels(raw: Path, cases: list[tuple[str, Path]], description: Mapping[str, Any]) -> list[Finding]:
    """Nothing for a dataset that is not meant for classification."""
    if class_labels.BLOCK not in description and not (raw / class_labels.LABELS_FILE).is_file():
        return []
    again = f"nnssl_plugin prepare -d {int(raw.name[7:10])} --class-labels FILE.csv"
    try:
        labels = class_labels.read_class_labels(raw)
    except UserError as error:
        return [Finding("class labels", PROBLEM, error.problem, error.remedy.removeprefix("Run: "))]
    names = {name for name, _ in cases}
    unknown = sorted(set(labels.cases) - names)
    if unknown:
        return [Finding("class labels", PROBLEM, f"for cases that are not there: {class_labels.some(unknown)}", again)]
    targets = ", ".join(f"{target.name} ({target.kind}, {len(target.classes)} classes)" for target in labels.targets)
    text = f"{targets}; {len(labels.cases)} of {len(names)} cases, {len(set(labels.subjects.values()))} subjects"
    if len(labels.cases) < len(names):
        return [Finding("class labels", WARNING, f"{text}; the other cases are not used for classification", again)]
    return [Finding("class labels", OK, text)]


def _triplets(raw: Path, cases: list[tuple[str, Path]]) -> list[Finding]:
    from nnssl_plugin.data import triplets  # numpy and nibabel: only where a dataset is named

    caption = f"nnssl_plugin caption -d {int(raw.name[7:10])}"
    if not (raw / triplets.TRIPLETS_FILE).is_file():
        return [Finding("triplets", WARNING, f"no {triplets.TRIPLETS_FILE}: Med3DInsightPretrainer needs it", caption)]
    try:
        found = triplets.read_triplets(raw)
        described = {triplet.case for triplet in found}
        without = [case for case, _ in cases if case not in described]
        if without:
            return [
                Finding(
                    "triplets", WARNING, f"none for {len(without)} of {len(cases)} cases, such as {without[0]}", caption
                )
            ]
        triplets.read_embeddings(raw, found)
    except UserError as error:
        return [Finding("triplets", PROBLEM, error.problem, error.remedy.removeprefix("Run: "))]
    weights = triplets.load_embeddings(raw).weights
    if weights.startswith("random"):
        return [
            Finding(
                "triplets",
                WARNING,
                f"{len(found)}, but by random encoders, which only tell slices apart",
                f"{caption} --model ViT-B-32 --weights FILE",
            )
        ]
    return [Finding("triplets", OK, f"{len(found)}, embedded by {weights}")]


def _plans(dataset: Dataset, cases: int) -> list[Finding]:
    """A line per plan with what is preprocessed of it."""
    plans: dict[str, dict[str, int]] = {}
    for plan, configuration, count in preprocessed_cases(dataset):
        plans.setdefault(plan, {})[configuration] = count
    if not plans:
        return [
            Finding(
                "plans", WARNING, "not planned yet", f"nnUNetv2_plan_and_preprocess -d {dataset.number} -c 3d_fullres"
            )
        ]
    if not any(any(counts.values()) for counts in plans.values()):
        return [
            Finding(
                "plans",
                WARNING,
                f"{', '.join(plans)}: not preprocessed",
                f"nnUNetv2_preprocess -d {dataset.number} -plans_name {next(iter(plans))} -c 3d_fullres",
            )
        ]
    findings = [_plan(dataset.number, plan, counts, cases) for plan, counts in plans.items()]
    more = len(findings) - PLANS_SHOWN
    return findings if more <= 0 else [*findings[:PLANS_SHOWN], Finding("plans", OK, f"and {more} more")]


def _plan(number: str, plan: str, counts: Mapping[str, int], cases: int) -> Finding:
    partly = [name for name, count in counts.items() if 0 < count < cases]
    states = [
        f"{name}: {count} of {cases} cases"
        if name in partly
        else f"{name}: {count} cases"
        if count
        else f"{name}: not preprocessed"
        for name, count in counts.items()
    ]
    if not partly:
        return Finding(plan, OK, "; ".join(states))
    return Finding(
        plan, WARNING, "; ".join(states), f"nnUNetv2_preprocess -d {number} -plans_name {plan} -c {' '.join(partly)}"
    )


def _plan_files(dataset: Dataset) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in sorted(dataset.preprocessed.glob("*.json")) if dataset.preprocessed else ():
        try:
            content = read_json(path)
        except UserError:
            continue  # adapt and nnU-Net name the plan that they cannot read
        if isinstance(content, dict) and isinstance(content.get("configurations"), dict):
            found.append((path, content))
    return found


def _data_identifier(configurations: Mapping[str, Any], name: str) -> str | None:
    """The folder of a configuration's cases, its own or inherited."""
    seen = set()
    while name in configurations and name not in seen:
        seen.add(name)
        if "data_identifier" in configurations[name]:
            return configurations[name]["data_identifier"]
        name = configurations[name].get("inherits_from", "")
    return None


def _sizes(files: list[Path]) -> tuple[list[int], list[str]]:
    """Voxels per readable file, and name and reason of each other one."""
    sizes, unreadable = [], []
    for path in files:
        try:
            sizes.append(_voxels(path))
        except _READ_ERRORS as error:
            unreadable.append(f"{path.name} ({' '.join(str(error).split())[:80]})")
    return sizes, unreadable


def _unreadable(folder: Path, files: list[str]) -> Finding:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return Finding(
        "images",
        PROBLEM,
        f"cannot be read: {', '.join(files[:3])}{more}",
        f'Replace them in "{folder}", or take the cases out.',
    )


def _voxels(path: Path) -> int:
    """Voxels of one channel, from the header alone."""
    import nibabel

    try:
        shape = nibabel.load(path).shape
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(str(error)) from error
    return math.prod(shape)
