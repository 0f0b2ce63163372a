"""The fake dataset with class labels, and classification trainers on it, for tests in one process."""

import os
from pathlib import Path

import torch
from fake_dataset import NAME, write_fake_dataset

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.nnunet.case_labels import ClassLabels, Target, write_class_labels
from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

DIAGNOSIS = Target("diagnosis", "multiclass", ("benign", "malignant", "normal"))
SIGNS = Target("signs", "multilabel", ("oedema", "mass"))
GRADE = Target("grade", "ordinal", ("low", "middle", "high"))
SHORT = {"epochs": 3, "iterations_per_epoch": 4, "lr": 1e-3}


def class_labels(targets=(DIAGNOSIS,), cases: int = 6) -> ClassLabels:
    """Labels of ``case_00`` … in turn, two cases per subject."""
    names = [f"case_{i:02d}" for i in range(cases)]
    answers = {"multilabel": [(), (0,), (0, 1), (1,)]}
    return ClassLabels(
        tuple(targets),
        {name: f"subject_{i // 2}" for i, name in enumerate(names)},
        {
            t.name: {
                name: (a := answers.get(t.kind, range(len(t.classes))))[i % len(a)] for i, name in enumerate(names)
            }
            for t in targets
        },
    )


def write_class_dataset(*, targets=(DIAGNOSIS,), cases: int = 6, labels: ClassLabels | None = None, **dataset) -> dict:
    """Write the fake dataset with labels into nnU-Net's folders of this process, and two folds; return its plan."""
    plan = write_fake_dataset(cases=cases, **dataset)
    raw, preprocessed = (Path(os.environ[name]) / NAME for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    write_json(raw / "dataset.json", read_json(preprocessed / "dataset.json"))
    write_class_labels(raw, labels or class_labels(targets, cases))
    names = [f"case_{i:02d}" for i in range(cases)]
    half = cases // 2 + cases // 2 % 2
    write_json(
        preprocessed / "splits_final.json",
        [{"train": names[half:], "val": names[:half]}, {"train": names[:half], "val": names[half:]}],
    )
    return plan


def make_classifier(
    *,
    settings: dict | None = None,
    finetuning: dict | None = None,
    fold=0,
    resume: str | None = None,
    plan: dict | None = None,
    **dataset,
):
    """A trainer on the fake dataset; ``resume`` names a checkpoint of its folder."""
    written = write_class_dataset(**dataset)
    plan = (plan or written) | {"classification": SHORT | (settings or {})}
    plan |= {} if finetuning is None else {"finetuning": {"weights": None} | finetuning}
    plan["continue_training"] = resume is not None
    dataset_json = read_json(Path(os.environ["nnUNet_preprocessed"]) / NAME / "dataset.json")
    trainer = PretrainedClassificationTrainer(
        plan, next(iter(plan["configurations"])), fold, dataset_json, torch.device("cpu")
    )
    if resume:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, resume))
    return trainer
