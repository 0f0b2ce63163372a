"""The preprocessed datasets that a pretraining draws from: the trainer's own, or those that its plan names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plan_edits import fitting_patch, patch_divisors
from nnssl_plugin.nnunet.plans import (
    dataset_folder,
    input_channels,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)
from nnssl_plugin.nnunet.splits import SPLITS_FILE, check_fold, read_splits
from nnssl_plugin.pretraining.sources import DataSource
from nnssl_plugin.settings import assignment


@dataclass(frozen=True)
class PlannedDataset:
    """A configuration of a preprocessed dataset, and how a pretraining draws from it."""

    folder: Path
    """Of the dataset in ``nnUNet_preprocessed``."""
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    kind: str
    """What the method and the log call its batches."""
    batch_size: int
    """Samples per rank and step."""
    fold: int | str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Full name of the dataset."""
        return self.plans["dataset_name"]

    @property
    def planned(self) -> ConfigurationManager:
        """nnU-Net's view of the configuration."""
        return PlansManager(dict(self.plans)).get_configuration(self.configuration)

    @property
    def case_folder(self) -> Path:
        """Where the preprocessed cases lie."""
        return self.folder / self.planned.data_identifier

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return input_channels(self.plans, self.configuration, self.dataset_json)

    @property
    def licence(self) -> str:
        """What ``dataset.json`` says."""
        return self.dataset_json.get("licence", "not stated")

    def split(self) -> tuple[list[str], list[str]]:
        """Names of the training and validation cases of its fold; all of them twice for the fold ``all``.

        Raises:
            UserError: when nothing is preprocessed, or there is no such fold.
        """
        if not self.case_folder.is_dir():
            raise UserError(
                f"The images of {self.name} are not preprocessed for {self.plans['plans_name']}, {self.configuration}: "
                f"there is no folder {self.case_folder}.",
                f"nnUNetv2_preprocess -d {self.name} -plans_name {self.plans['plans_name']} -c {self.configuration}",
            )
        cases = infer_dataset_class(str(self.case_folder)).get_identifiers(str(self.case_folder))
        if self.fold == "all":
            return list(cases), list(cases)
        path = self.folder / SPLITS_FILE
        splits = read_splits(path) if path.is_file() else []
        if int(self.fold) >= len(splits):
            raise UserError(
                f"The source {self.name} has no fold {self.fold} ({path}: {len(splits)} folds).",
                'Give it "fold": "all" in pretraining.sources, or train fold all.',
            )
        fold = splits[int(self.fold)]
        check_fold(fold, known=cases, where=f"{path}: fold {self.fold}")
        return fold["train"], fold["val"]

    def describe(self, cases: int) -> dict[str, Any]:
        """What provenance says of it, with the number of training cases."""
        return {
            "dataset": self.name,
            "cases": cases,
            "kind": self.kind,
            "plans_name": self.plans["plans_name"],
            "configuration": self.configuration,
            **describe_input(self.plans, self.configuration, self.dataset_json),
            "patch_size": list(self.planned.patch_size),
            "batch_size": self.batch_size,
            "weight": self.weight,
            "licence": self.licence,
        }


def datasets_of(trainer) -> list[PlannedDataset]:
    """What a ``Pretrainer`` draws from: the sources that its plan names, or its own dataset."""
    settings = trainer.training_settings
    sources = [_open(each, fold=trainer.fold, batch_size=settings.batch_size) for each in settings.sources]
    return sources or [own_dataset(trainer)]


def splits_of(trainer) -> list[tuple[list[str], list[str]]]:
    """Training and validation cases of each dataset of a ``Pretrainer``; of its own one as nnU-Net splits it."""
    if not trainer.training_settings.sources:
        return [trainer.do_split()]
    return [dataset.split() for dataset in trainer.datasets]


def check_sources(trainer) -> None:
    """Refuse sources whose images the network of a ``Pretrainer`` cannot read.

    Raises:
        UserError: for another number of axes or channels, or a patch that the network does not divide.
    """
    if trainer.task.needs.unifies or not trainer.training_settings.sources:
        return
    own, whose = own_dataset(trainer), type(trainer).__name__
    for dataset in trainer.datasets:
        _check_image(dataset, own, whose)
        _check_patch(dataset, own)


def own_dataset(trainer) -> PlannedDataset:
    """The dataset and configuration that the trainer was started for; its full name is its kind."""
    return PlannedDataset(
        folder=Path(trainer.preprocessed_dataset_folder_base),
        plans=trainer.plans_manager.plans,
        configuration=trainer.configuration_name,
        dataset_json=trainer.dataset_json,
        kind=trainer.plans_manager.dataset_name,
        batch_size=trainer.training_settings.batch_size or trainer.configuration_manager.batch_size,
        fold=trainer.fold,
    )


def _open(source: DataSource, *, fold: int | str, batch_size: int | None) -> PlannedDataset:
    folder = dataset_folder(source.dataset)
    plans = read_plan(folder, source.plans)
    planned = resolve_configuration(plans, source.configuration)
    return PlannedDataset(
        folder=folder,
        plans=plans,
        configuration=source.configuration,
        dataset_json=read_dataset_json(folder),
        kind=source.kind or folder.name,
        batch_size=source.batch_size or batch_size or planned["batch_size"],
        fold=fold if source.fold is None else source.fold,
        weight=source.weight,
    )


def _check_image(dataset: PlannedDataset, own: PlannedDataset, whose: str) -> None:
    wanted, found = (f"{len(each.planned.patch_size)}D with {each.channels} channel(s)" for each in (own, dataset))
    if wanted != found:
        raise UserError(
            f"The source {dataset.name} ({dataset.configuration}) is {found}; the network of {own.plans['plans_name']} "
            f"reads {wanted}, and {whose} brings no others to it.",
            f"Leave {dataset.name} out of pretraining.sources, or name a configuration that fits.",
        )


def _check_patch(dataset: PlannedDataset, own: PlannedDataset) -> None:
    architecture = resolve_configuration(own.plans, own.configuration)["architecture"]
    patch, fixed = list(dataset.planned.patch_size), architecture["arch_kwargs"].get("input_shape")
    divisors = patch_divisors(architecture, len(patch))
    if fixed is None and not any(size % divisor for size, divisor in zip(patch, divisors, strict=True)):
        return
    if fixed is not None and patch == list(fixed):
        return
    needed = f"multiples of {divisors}" if fixed is None else f"{list(fixed)}, for which it is built"
    fitting = fitting_patch(patch, divisors) if fixed is None else list(fixed)
    changed = assignment(f"configurations.{dataset.configuration}.patch_size", fitting)
    raise UserError(
        f"The patch {patch} of the source {dataset.name} ({dataset.plans['plans_name']}, {dataset.configuration}) does "
        f"not fit the network of {own.plans['plans_name']}, which reads {needed}.",
        f"nnssl_plugin plan -d {dataset.name} -p {dataset.plans['plans_name']} -n NAME --set {changed}",
    )
