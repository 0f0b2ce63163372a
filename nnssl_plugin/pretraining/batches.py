"""From a trainer's plan and folders to the batches that its method needs."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_plugin.data.batches import StepBatches
from nnssl_plugin.data.cases import Cases, available_channels
from nnssl_plugin.data.triplets import read_embeddings, read_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.labels import structure_labels
from nnssl_plugin.nnunet.raw_folders import raw_folder


def open_batches(
    trainer: nnUNetTrainer, identifiers: list[str], *, stream: tuple[int, int], labels: bool = False
) -> StepBatches:
    """Batches of the trainer's configuration that hold what its task needs.

    Args:
        trainer: the initialised trainer.
        identifiers: cases to draw from.
        stream: numbers that choose the stream of randomness: seed and purpose.
        labels: also the labels that the task needs, where the dataset labels structures.

    Raises:
        UserError: the configuration's dimension does not fit, no case has enough channels, or captions are missing.
    """
    needs, plan = trainer.task.needs, trainer.configuration_manager
    dimensions = len(plan.patch_size)
    if dimensions not in needs.dimensions:
        raise UserError(
            f"{type(trainer).__name__} does not support {dimensions}D; configuration "
            f"'{trainer.configuration_name}' is.",
            f"Use a {needs.dimensions[-1]}D configuration.",
        )
    folder = raw_folder(trainer.plans_manager.dataset_name)
    available = available_channels(folder, identifiers, trainer.num_input_channels)
    usable = [case for case in identifiers if available[case].sum() >= needs.modalities]
    if not usable:
        raise UserError(f"No case of {trainer.plans_manager.dataset_name} has {needs.modalities} channels.")
    triplets = embeddings = None
    if needs.triplets:
        triplets = read_triplets(folder)
        _require_triplets(usable, triplets, trainer.plans_manager.dataset_name)
        triplets = {case: triplets[case] for case in usable}
        embeddings = read_embeddings(folder, triplets)
    cases = Cases(
        trainer.preprocessed_dataset_folder,
        usable,
        transpose_forward=trainer.plans_manager.transpose_forward,
        triplets=triplets,
    )
    return StepBatches(
        cases,
        needs,
        patch_size=plan.patch_size,
        batch_size=trainer.batch_size,
        available=available,
        stream=stream,
        embeddings=embeddings,
        triplets=triplets,
        structures=structure_labels(trainer.dataset_json) if labels else (),
        rank=trainer.local_rank,
        ranks=_ranks(),
    )


def embedding_size(dataset_name: str) -> int:
    """Length E of the stored slice and text embeddings of a dataset."""
    folder = raw_folder(dataset_name)
    first = next(iter(read_embeddings(folder, read_triplets(folder)).values()), None)
    if first is None:
        raise UserError(f"{folder} has no triplets.", "nnssl_plugin caption -d ID")
    return len(first[0])


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
