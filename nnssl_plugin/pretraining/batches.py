"""From a preprocessed dataset to the batches that a method needs."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from operator import attrgetter

import numpy as np

from nnssl_plugin.data.batch import Needs
from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.mixture import MixedBatches
from nnssl_plugin.data.triplets import by_case, describe_encoders, load_embeddings, read_embeddings, read_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.labels import structure_labels
from nnssl_plugin.nnunet.raw_folders import raw_folder
from nnssl_plugin.pretraining.datasets import PlannedDataset
from nnssl_plugin.pretraining.sources import sources_of_steps

TRAIN, VALIDATE = PURPOSES = 0, 1
"""Streams of randomness: the same step draws different numbers for training and for validation."""
LOOKED_AT = 200
"""Steps whose slices and texts are looked at before training."""
SMALLEST_FLOOR = 0.005
"""Of a loss, from which on it is worth a line."""


def batches_of(trainer, cases: Sequence[list[str]], purpose: int) -> StepBatches | MixedBatches:
    """Batches of the dataset of a ``Pretrainer``, or of its several: in validation one of each in turn.

    Args:
        trainer: the initialised trainer.
        cases: of each of its datasets.
        purpose: ``TRAIN`` or ``VALIDATE``.
    """
    seed, datasets = trainer.training_settings.seed, trainer.datasets
    if len(datasets) == 1:
        return trainer.open_batches(datasets[0], cases[0], (seed, purpose))
    parts = [trainer.open_batches(each, cases[n], (seed, purpose, n)) for n, each in enumerate(datasets)]
    if purpose == VALIDATE:
        return MixedBatches(parts, np.arange(trainer.num_val_iterations_per_epoch) % len(parts))
    return MixedBatches(parts, sources_of_steps([each.weight for each in datasets], seed, trainer.total_steps))


def open_batches(
    dataset: PlannedDataset,
    identifiers: list[str],
    needs: Needs,
    *,
    patch_size: Sequence[int],
    stream: tuple[int, ...],
    whose: str,
    rank: int,
    labels: bool = False,
) -> StepBatches:
    """Batches of a dataset's configuration that hold what a task needs.

    Args:
        dataset: what to draw from.
        identifiers: its cases to draw from.
        needs: those of the task.
        patch_size: of the windows, before the margin.
        stream: numbers that choose the stream of randomness: seed, purpose, and where there are several datasets the
            number of this one.
        whose: name of the trainer, for messages.
        rank: of this process.
        labels: also the labels that the task needs, where the dataset labels structures.

    Raises:
        UserError: the configuration's dimension does not fit, no case has enough channels, or captions are missing.
    """
    dimensions = len(dataset.planned.patch_size)
    if dimensions not in needs.dimensions:
        raise UserError(
            f"{whose} does not support {dimensions}D; configuration '{dataset.configuration}' is.",
            f"Use a {needs.dimensions[-1]}D configuration.",
        )
    folder = raw_folder(dataset.name)
    available = available_channels(folder, identifiers, dataset.channels)
    usable = [case for case in identifiers if available[case].sum() >= needs.modalities]
    if not usable:
        raise UserError(f"No case of {dataset.name} has {needs.modalities} channels.")
    triplets = embeddings = None
    if needs.triplets:
        triplets = by_case(read_triplets(folder))
        _require_triplets(usable, triplets, dataset.name)
        triplets = {case: triplets[case] for case in usable}
        embeddings = read_embeddings(folder, chain.from_iterable(triplets.values()))
    cases = Cases(
        dataset.case_folder,
        usable,
        transpose_forward=dataset.plans["transpose_forward"],
        triplets=triplets,
    )
    return StepBatches(
        cases,
        needs,
        patch_size=patch_size,
        batch_size=dataset.batch_size,
        available=available,
        stream=stream,
        embeddings=embeddings,
        triplets=triplets,
        structures=structure_labels(dataset.dataset_json) if labels else (),
        rank=rank,
        ranks=_ranks(),
        kind=dataset.kind,
    )


def matching_notes(batches: StepBatches, dataset: str, *, batch_size: int) -> list[str]:
    """What the log says of slices and texts before they are matched with volumes.

    Args:
        batches: of the training.
        dataset: full name.
        batch_size: samples per step over all ranks.
    """
    folder, slices = raw_folder(dataset), [len(of_case) for of_case in batches.triplets.values()]
    encoders = describe_encoders(folder, load_embeddings(folder).weights)
    notes = [f"Slices and texts: {sum(slices)} of {len(slices)} cases, embedded by {encoders}."]
    single = sum(number == 1 for number in slices)
    if single:
        notes.append(
            f"WARNING: {single} of {len(slices)} cases have a single slice: whatever tells the case then names its "
            f"slice and text, and what they show need not be found in the volume. More slices: nnssl_plugin caption -d "
            f"{dataset}"
        )
    steps = [
        [batches.triplets[case][number] for case, number in zip(*drawn, strict=True)]
        for drawn in (
            (batches.cases_of_all_ranks(step), batches.slices_of_all_ranks(step)) for step in range(LOOKED_AT)
        )
    ]
    for term, equal in (("mpot_image", attrgetter("key")), ("mpot_text", attrgetter("text"))):
        floor = float(np.mean([lowest_loss(list(map(equal, step))) for step in steps]))
        if floor >= SMALLEST_FLOOR:
            kind = "slices" if term == "mpot_image" else "texts"
            notes.append(
                f"WARNING: the {kind} of a step are not all different (steps of {batch_size}, {len(slices)} cases): "
                f"{term} cannot fall below {floor:.2f} on average; {np.log(batch_size):.2f} tells nothing."
            )
    return notes


def lowest_loss(targets: Sequence[Hashable]) -> float:
    """The transport loss of a step whose volumes are matched perfectly: 0 where all targets differ.

    Nothing tells equal targets apart, so a volume's mass is spread evenly over the m that are equal to its own, and
    the mean of log m is left.
    """
    counts = Counter(targets)
    return float(np.mean([np.log(counts[target]) for target in targets]))


def embedding_size(dataset_name: str) -> int:
    """Length E of the stored slice and text embeddings of a dataset.

    Raises:
        UserError: there are no triplets, or no embeddings of them.
    """
    folder = raw_folder(dataset_name)
    triplets = read_triplets(folder)
    if not triplets:
        raise UserError(f"{folder} has no triplets.", f"nnssl_plugin caption -d {dataset_name}")
    return len(read_embeddings(folder, triplets)[triplets[0].key][0])


def _require_triplets(cases: list[str], triplets: dict, dataset: str) -> None:
    missing = [case for case in cases if case not in triplets]
    if missing:
        raise UserError(
            f"{len(missing)} cases of {dataset} have no slice and text yet, first {missing[0]}.",
            f"nnssl_plugin caption -d {dataset}",
        )


def _ranks() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
