"""A study of frozen features as one JSON file: what it says, which cases it takes, and its datasets on disk."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from study_file import ENDING, Data, build, evenly, files_by_case
from study_steps import PLAN, edit_command, environment, flags_of

from nnssl_plugin.data.triplets import (
    Embeddings,
    Triplet,
    load_embeddings,
    place_of,
    read_triplets,
    text_sha256,
    write_embeddings,
    write_triplets,
)
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.label_fractions import nested_subsets
from nnssl_plugin.nnunet.planes import stored_axis

DATASET, DATASET_ID = "Dataset601_Frozen", 601
CAPTIONED, SHUFFLED, NAMED = "template", "shuffled", "named"
CAPTIONS = {CAPTIONED: "Dataset611_Captioned", SHUFFLED: "Dataset612_Shuffled", NAMED: "Dataset613_Named"}
"""Kinds of captions → the raw dataset that holds them."""


@dataclass(frozen=True)
class Counts:
    """Numbers of cases; what is left of the data is for pretraining alone."""

    evaluation: int = 0
    """Cases that are scored; nothing else ever sees them. 0 with ``parts``."""
    tuning: int = 0
    """Cases on which choices are made and pretrainings are validated."""
    pool: int = 0
    """Pretraining cases with labels, from which few are drawn. 0: all of them."""
    parts: int = 1
    """More than 1: cross-validation instead. Each part is for evaluation once, and the others for pretraining."""


@dataclass(frozen=True)
class Arm:
    """One way to make an encoder."""

    name: str
    trainer: str | None = None
    """None: random weights."""
    edits: dict[str, Any] = field(default_factory=dict)
    """Keys and values of the plan's ``pretraining`` block, beside the study's."""
    terms: dict[str, float] = field(default_factory=dict)
    """Factors of terms of the loss, for ablations that no setting makes."""
    captions: str | None = None
    """One of :data:`CAPTIONS`."""
    seeds: int = 5
    priority: int = 0
    """Arms of a lower number run first."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the encoder is probed too, on the way."""


@dataclass(frozen=True)
class Study:
    """Everything that a study file says."""

    name: str
    question: str
    data: Data
    cases: Counts
    labelled: tuple[int, ...]
    arms: tuple[Arm, ...]
    draws: int = 3
    """Draws of labelled cases for each number of them."""
    plan: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    body_part: str = ""
    clip: dict[str, Any] = field(default_factory=dict)
    """Flags of ``nnssl_plugin clip``, for arms with captions."""
    configuration: str = "3d_fullres"


@dataclass(frozen=True)
class Part:
    """The cases of one fold of a study."""

    pretraining: tuple[str, ...]
    tuning: tuple[str, ...]
    pool: tuple[str, ...]
    evaluation: tuple[str, ...]


def read_frozen_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: for a missing or unknown key.
    """
    study = build(Study, read_json(path), where=f"{path}")
    return replace(
        study,
        data=build(Data, study.data, where=f"{path}, data"),
        cases=build(Counts, study.cases, where=f"{path}, cases"),
        arms=tuple(build(Arm, arm, where=f"{path}, arms") for arm in study.arms),
    )


def parts_of(study: Study, data: Path) -> list[Part]:
    """The cases of each fold, chosen evenly over the sorted names."""
    images, labels = (files_by_case(data, place) for place in (study.data.images, study.data.labels))
    names = sorted(images.keys() & labels.keys())
    counts = study.cases
    if len(names) < counts.evaluation + counts.tuning + max(1, counts.pool):
        raise UserError(f"{data / study.data.images} holds {len(names)} cases, too few.", "Name the data with --data.")
    if counts.parts > 1:
        found = []
        for number in range(counts.parts):
            evaluation = tuple(names[number :: counts.parts])
            others = tuple(name for name in names if name not in evaluation)
            found.append(Part(others, evaluation, others, evaluation))
        return found
    evaluation = evenly(names, counts.evaluation)
    left = [name for name in names if name not in set(evaluation)]
    tuning = evenly(left, counts.tuning)
    pretraining = tuple(name for name in left if name not in set(tuning))
    return [Part(pretraining, tuning, evenly(pretraining, counts.pool or len(pretraining)), evaluation)]


def label_draws(study: Study, part: Part) -> dict[int, list[tuple[str, ...]]]:
    """Number of labelled cases → which, for each draw; the smaller are parts of the larger."""
    drawn: dict[int, list[tuple[str, ...]]] = {}
    for number in study.labelled:
        fraction = number / len(part.pool)
        draws = range(study.draws if number < len(part.pool) else 1)
        drawn[number] = [tuple(nested_subsets(part.pool, [fraction], seed=seed)[fraction]) for seed in draws]
    return drawn


def prepare(study: Study, data: Path, folder: Path) -> None:
    """Write raw dataset, plan and folds into the study's folder; what is there stays."""
    parts, run = parts_of(study, data), _Commands(folder)
    _write_raw(study, data, folder)
    dataset = str(DATASET_ID)
    run("plan", "nnUNetv2_plan_and_preprocess", "-d", dataset, "-npfp", "4", "--no_pp")
    run("edit-plan", *edit_command(dataset, "nnUNetPlans", PLAN, study.plan))
    folds = [{"train": list(part.pretraining), "val": list(part.tuning)} for part in parts]
    write_json(folder / "nnUNet_preprocessed" / DATASET / "splits_final.json", folds)


def preprocess(study: Study, folder: Path, *, jobs: int) -> None:
    """nnU-Net's preprocessing of the cases that lack it, in forked processes: its command starts each anew, which takes
    longer than small cases do. The folders of nnU-Net must be set to those of the study."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = read_json(folder / "nnUNet_preprocessed" / DATASET / f"{PLAN}.json")
    target = folder / "nnUNet_preprocessed" / DATASET
    target /= PlansManager(plans).get_configuration(study.configuration).data_identifier
    target.mkdir(parents=True, exist_ok=True)
    images = sorted((folder / "nnUNet_raw" / DATASET / "imagesTr").iterdir())
    names = [image.name.removesuffix(f"_0000{ENDING}") for image in images]
    tasks = [(name, plans, study.configuration, folder, target) for name in names]
    left = [task for task in tasks if not (target / f"{task[0]}.pkl").exists()]
    with fork_context().Pool(jobs) as pool:
        pool.starmap(_preprocess_case, left, chunksize=4)


def _preprocess_case(name: str, plans: dict, configuration: str, folder: Path, target: Path) -> None:
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    planned, raw = PlansManager(plans), folder / "nnUNet_raw" / DATASET
    described = planned.get_configuration(configuration)
    described.preprocessor_class(verbose=False).run_case_save(
        str(target / name),
        [str(raw / "imagesTr" / f"{name}_0000{ENDING}")],
        str(raw / "labelsTr" / f"{name}{ENDING}"),
        planned,
        described,
        read_json(raw / "dataset.json"),
    )


def fork_context():
    """Processes that share what has been imported, where the system can fork."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class _Commands:
    """Runs commands in a study's folder, each once, with a log."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, title: str, *command: str) -> None:
        done, log = self.folder / "done" / title, self.folder / "logs" / f"{title}.log"
        if done.exists():
            return
        for place in (done, log):
            place.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment(self.folder, one_thread=False)
            ).returncode
        if code:
            raise UserError(f"Step {title} failed.", f"See {log}")
        done.write_text(json.dumps(command))


def _write_raw(study: Study, data: Path, folder: Path) -> None:
    images, labels = (files_by_case(data, place) for place in (study.data.images, study.data.labels))
    names = sorted(images.keys() & labels.keys())
    raw = folder / "nnUNet_raw" / DATASET
    for place in ("imagesTr", "labelsTr"):
        (raw / place).mkdir(parents=True, exist_ok=True)
    for case in names:
        _link(images[case], raw / "imagesTr" / f"{case}_0000{ENDING}")
        _link(labels[case], raw / "labelsTr" / f"{case}{ENDING}")
    _describe(study, raw, len(names))


def _describe(study: Study, raw: Path, cases: int) -> None:
    names = {name: value for value, name in enumerate(study.data.label_names, 1)}
    content = {
        "channel_names": {"0": study.data.modality},
        "labels": {"background": 0} | names,
        "numTraining": cases,
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    write_json(raw / "dataset.json", content)


def write_captions(study: Study, data: Path, folder: Path, *, device: str) -> None:
    """Raw datasets of the cases that pretrainings may see, one for each kind of captions.

    A pair of encoders is trained on slices and true texts; shuffled captions are its embeddings with the texts dealt
    out anew, so that they say what slices look like, but not which.
    """
    part, run = parts_of(study, data)[0], _Commands(folder)
    images, labels = (files_by_case(data, place) for place in (study.data.images, study.data.labels))
    seen = (*part.pretraining, *part.tuning)
    for name in CAPTIONS.values():
        raw = folder / "nnUNet_raw" / name
        (raw / "imagesTr").mkdir(parents=True, exist_ok=True)
        for case in seen:
            _link(images[case], raw / "imagesTr" / f"{case}_0000{ENDING}")
        _describe(study, raw, len(seen))
        _link(folder / "nnUNet_preprocessed" / DATASET, folder / "nnUNet_preprocessed" / name)
    template, shuffled, named = (folder / "nnUNet_raw" / CAPTIONS[kind] for kind in (CAPTIONED, SHUFFLED, NAMED))
    body = ("--body-part", study.body_part) if study.body_part else ()
    run("caption", "nnssl_plugin", "caption", "-d", template.name, *body)
    flags = flags_of(study.clip)
    run("clip", "nnssl_plugin", "clip", "-d", template.name, "-device", device, *flags)
    triplets = read_triplets(template)
    if not (named / "triplets.jsonl").exists():
        write_triplets(named, [_with_structures(triplet, labels, study.data.label_names) for triplet in triplets])
    run("clip-named", "nnssl_plugin", "clip", "-d", named.name, "-device", device, *flags)
    _shuffle(template, shuffled, triplets)


def _with_structures(triplet: Triplet, labels: dict[str, Path], names: tuple[str, ...]) -> Triplet:
    """The triplet with the structures that its slice cuts, from the expert's mask."""
    image = nibabel.load(labels[triplet.case])
    axis, _ = stored_axis(image.affine, triplet.plane)
    values = np.unique(np.take(np.asarray(image.dataobj), triplet.slice, axis=axis))
    shown = [names[int(value) - 1] for value in values if value > 0]
    text = f"{triplet.text} It shows {', '.join(shown) if shown else 'none of the structures'}."
    return replace(triplet, text=text, captioner="template and expert masks")


def _shuffle(template: Path, shuffled: Path, triplets: list[Triplet]) -> None:
    stored, order = load_embeddings(template), np.random.default_rng(0).permutation(len(triplets))
    dealt = [replace(triplet, text=triplets[other].text) for triplet, other in zip(triplets, order, strict=True)]
    numbered = enumerate(zip(stored.case, stored.place, strict=True))
    places = {(str(case), str(place)): row for row, (case, place) in numbered}
    rows = [places[triplet.case, place_of(triplet)] for triplet in triplets]
    write_triplets(shuffled, dealt)
    write_embeddings(
        shuffled,
        Embeddings(
            case=stored.case[rows],
            text_sha256=np.array([text_sha256(triplet.text) for triplet in dealt]),
            key=stored.key[rows],
            image=stored.image[rows],
            text=stored.text[[rows[other] for other in order]],
            weights=stored.weights,
            place=stored.place[rows],
        ),
    )


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.symlink_to(source.resolve())
