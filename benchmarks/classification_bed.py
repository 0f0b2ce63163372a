"""A bed for classification: few and all labels, from scratch and pretrained, on images that choose nothing.

    python benchmarks/classification_bed.py benchmarks/studies/classification/busi.json -i busi_us_text -o busi-bed
    python benchmarks/classification_bed.py benchmarks/studies/classification/adrenal.json \\
        -i adrenalmnist3d_trainval.npz -o adrenal-bed --jobs 2 --device cuda

Every arm pretrains anew for each seed, on the pool without labels. Its learning rate is the best of three on labelled
images that are not those of the evaluation; where each seed holds out another part of the images, it is chosen within
the pool of each seed. A seed draws the pretraining, the labels, the initialisation and the augmentation: all arms of a
seed see the very same batches. The final weights are evaluated. Interrupted, the same command goes on. The folder then
holds summary.json and table.md, each run in runs/ and each pretraining in pretrained/.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from classification_results import summarise, table
from classification_study import (
    PLAN,
    SHUFFLED,
    Bed,
    Run,
    best_rates,
    evaluation_runs,
    fold_name,
    frozen_runs,
    prepare,
    read_bed,
    tuning_runs,
)
from study_steps import environment

from nnssl_plugin.io.files import atomic_path, read_json, write_json


class Again:
    """Batches of a stream, kept to be read again by the next arm.

    Raises:
        RuntimeError: where the stream has no more; a StopIteration would end a pool's work without a word.
    """

    def __init__(self, stream):
        self.stream, self.batches, self.place = stream, [], 0

    def __next__(self):
        if self.place == len(self.batches):
            self.batches.append(self._read())
        self.place += 1
        return self.batches[self.place - 1]

    def _read(self):
        try:
            return next(self.stream)
        except StopIteration as error:
            raise RuntimeError(f"The stream ended after {self.place} batches.") from error


class Relabelled:
    """Batches of a stream with other labels: case → index of its class."""

    def __init__(self, stream, labels: dict[str, int]):
        self.stream, self.labels = stream, labels

    def __next__(self):
        import torch

        batch = next(self.stream)
        return batch | {"target": [torch.tensor([self.labels[case] for case in batch["case"]])]}


def dealt_out(labels: dict[str, int], seed: int) -> dict[str, int]:
    """The labels in a random order: each class has as many cases as before."""
    mixed = np.random.default_rng([seed, 2]).permutation(list(labels.values())).tolist()
    return dict(zip(labels, mixed, strict=True))


# ---------------------------------------------------------------- pretraining


def pretrain(bed: Bed, arm: str, seed: int, fold: int, device: str, results: Path) -> None:
    """One pretraining on the pool of a seed, and its weights in the form of the bed's plan."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnssl_plugin import adapt

    done = results / f"{arm}-{seed}.json"
    if done.exists():
        return
    torch.set_num_threads(1)
    how = bed.pretrainings[arm]
    plan, dataset = _plan(bed)
    plan |= {"plans_name": f"pretrain-{arm}-{seed}", "pretraining": how.settings | {"seed": seed}}
    began, used = time.monotonic(), time.process_time()
    cls = recursive_find_trainer_class_by_name(how.trainer)
    trainer = cls(plan, bed.configuration, fold, dataset, torch.device(device))
    trainer.run_training()
    cost = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used}
    source = Path(trainer.output_folder, "checkpoint_final.pth")
    adapt(bed.number, name=f"{arm}-{seed}", weights=source, configuration=bed.configuration, plans_name=PLAN)
    losses = [float(value) for value in trainer.log.history()["train_losses"]]
    write_json(done, {"arm": arm, "seed": seed, "losses": losses, **cost})


def weights_of(bed: Bed, run: Run) -> str | None:
    """Name of the file that a run starts from."""
    return f"{PLAN}-{run['arm']}-{run['seed']}_{bed.configuration}.pth" if run["arm"] in bed.pretrainings else None


# ---------------------------------------------------------------- fine-tuning


def train_group(bed: Bed, runs: list[Run], device: str, results: Path) -> None:
    """All runs of one fold and seed on the very same batches; each result is written at once."""
    import torch

    from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

    class Trainer(PretrainedClassificationTrainer):
        kept = None
        validation_batches = 0
        shuffled = False

        def get_dataloaders(self):
            if Trainer.kept is None:
                Trainer.kept = tuple(Again(stream) for stream in super().get_dataloaders())
                Trainer.validation_batches = self.num_val_iterations_per_epoch
            self.num_val_iterations_per_epoch = Trainer.validation_batches
            for stream in Trainer.kept:
                stream.place = 0
            training, validation = Trainer.kept
            return (Relabelled(training, self.other_labels()) if self.shuffled else training), validation

        def other_labels(self) -> dict[str, int]:
            (target,) = self.targets
            cases, _ = self.do_split()
            return dealt_out({case: self.labels.labels[target.name][case] for case in cases}, self.seed)

        def perform_actual_validation(self, save_probabilities=False):
            """The last epoch's predictions are those of the final weights."""

    torch.set_num_threads(1)
    for run in runs:
        path = results / f"{run['name']}.json"
        if path.exists():
            continue
        began, used = time.monotonic(), time.process_time()
        trainer = _trainer(Trainer, bed, run, device)
        trainer.shuffled = run["control"] == SHUFFLED
        trainer.disable_checkpointing = True
        trainer.pictures_are_due = lambda: False
        trainer.run_training()
        (target,) = trainer.targets
        labels, probabilities = trainer.validation._arrays(target)
        found = _predictions(target, trainer.validation.cases, labels, probabilities)
        curve = [float(value) for value in trainer.log.history()["auroc"]]
        cost = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used}
        write_json(path, run | found | {"auroc": curve[-1], "curve": curve} | cost)


def read_out_group(bed: Bed, runs: list[Run], device: str, results: Path) -> None:
    """Logistic regressions on frozen encoders; their penalty is chosen on the training images."""
    import torch

    from nnssl_plugin.finetuning.weights import load_planned_weights
    from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

    torch.set_num_threads(1)
    for run in runs:
        path = results / f"{run['name']}.json"
        if path.exists():
            continue
        began, used = time.monotonic(), time.process_time()
        trainer = _trainer(PretrainedClassificationTrainer, bed, run, device)
        trainer.initialize()
        if (weights := weights_of(bed, run)) is not None:
            load_planned_weights(trainer.network.backbone.network, bed.preprocessed / weights, plans_name=PLAN)
        (target,) = trainer.targets
        (x, y, _), (unseen, labels, cases) = (_embedded(trainer, names) for names in trainer.do_split())
        found = _predictions(target, cases, labels, regression().fit(x, y).predict_proba(unseen))
        cost = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used}
        write_json(path, run | found | cost)


def regression():
    """Standardised features, and the penalty of the best likelihood in five folds of the training cases."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": np.logspace(-5, 1, 7)},
        scoring="neg_log_loss",
        cv=5,
    )


def _embedded(trainer, names: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pooled features (N, F) of whole cases, their labels (N,) and names."""
    import torch

    from nnssl_plugin.tasks.classification.batches import ClassCases, ValidationBatches

    cases = ClassCases(trainer.preprocessed_dataset_folder, names, labels=trainer.labels, targets=trainer.targets)
    batches = ValidationBatches(cases, trainer._inputs(), batch_size=trainer.batch_size)
    network, features, labels, seen = trainer.network.eval(), [], [], []
    with torch.no_grad():
        for number in range(len(batches)):
            batch = batches[number]
            features.append(network.embed(batch["data"].to(trainer.device)).float().cpu().numpy())
            labels.append(batch["target"][0].numpy())
            seen += batch["case"]
    return np.concatenate(features), np.concatenate(labels), seen


def _trainer(cls, bed: Bed, run: Run, device: str):
    """The trainer of a run, from its weights and with its rate."""
    import torch

    plan, dataset = _plan(bed)
    plan |= {
        "plans_name": run["name"],
        "finetuning": {"weights": weights_of(bed, run), "seed": run["seed"]},
        "classification": bed.classification | ({} if run["lr"] is None else {"lr": run["lr"]}),
    }
    return cls(plan, bed.configuration, run["fold"], dataset, torch.device(device))


def _predictions(target, cases: list[str], labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """What a result says of the evaluation: case → probability of each class, and case → index of its class."""
    return {
        "kind": target.kind,
        "classes": list(target.classes),
        "probabilities": dict(zip(cases, probabilities.tolist(), strict=True)),
        "truth": dict(zip(cases, map(int, labels), strict=True)),
    }


def _plan(bed: Bed) -> tuple[dict[str, Any], dict[str, Any]]:
    plan = read_json(bed.preprocessed / f"{PLAN}.json")
    return plan | {"continue_training": False}, read_json(bed.preprocessed / "dataset.json")


# ---------------------------------------------------------------- the whole bed


def carry_out(bed: Bed, folder: Path, *, device: str, jobs: int) -> None:
    """All pretrainings and runs that have no result yet."""
    folds, results, pretrained = read_json(folder / "folds.json"), folder / "runs", folder / "pretrained"
    for place in (results, pretrained):
        place.mkdir(exist_ok=True)
    pool_of = {seed: list(folds).index(fold_name(seed, "pool")) for seed in bed.seeds}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        weights = [(arm, seed) for seed in bed.seeds for arm in bed.pretrainings]
        pool.starmap(pretrain, [(bed, *w, pool_of[w[1]], device, pretrained) for w in weights], chunksize=1)
        trials = tuning_runs(bed, folds)
        pool.starmap(train_group, [(bed, runs, device, results) for runs in trials], chunksize=1)
        rates = best_rates([read_json(results / f"{run['name']}.json") for runs in trials for run in runs])
        groups = evaluation_runs(bed, folds, rates)
        pool.starmap(train_group, [(bed, runs, device, results) for runs in groups], chunksize=1)
        frozen = frozen_runs(bed, folds)
        pool.starmap(read_out_group, [(bed, runs, device, results) for runs in frozen], chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="file of the bed, in benchmarks/studies/classification")
    parser.add_argument("-i", required=True, type=Path, help="its images: busi_us_text, adrenalmnist3d_trainval.npz")
    parser.add_argument("-o", required=True, type=Path, help="folder of the bed")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (default: 1)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    bed, folder = read_bed(args.study), args.o.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "study.json"
    if copy.exists() and read_json(copy) != read_json(args.study):
        raise SystemExit(f"{folder} holds a bed of other settings: choose another folder.")
    write_json(copy, read_json(args.study))
    os.environ |= environment(folder, one_thread=True)
    prepare(bed, args.i.resolve(), folder)
    os.environ["nnUNet_n_proc_DA"] = "0"  # planning fails on it
    carry_out(bed, folder, device=args.device, jobs=args.jobs)
    summary = summarise(bed, folder)
    write_json(folder / "summary.json", summary)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(table(summary), encoding="utf-8")
    print(table(summary))


if __name__ == "__main__":
    main()
