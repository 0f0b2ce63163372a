"""The folds of a cross-validation pooled as nnU-Net pools them: every case once, by the fold that held it out."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some
from nnssl_plugin.nnunet.case_labels import Target
from nnssl_plugin.tasks.classification.checkpoints import BEST, FINAL, VALIDATION
from nnssl_plugin.tasks.classification.metrics import overall_metrics
from nnssl_plugin.tasks.classification.predictions import Predictions
from nnssl_plugin.tasks.classification.runs import read_tables, targets_of
from nnssl_plugin.tasks.classification.summary import summarise_predictions, write_predictions_and_summary

_VALIDATE = {FINAL: "", BEST: " --val --val_best"}


def find_folds(
    model_folder: str | Path, folds: Sequence[int] | None = None, *, checkpoint: str = FINAL
) -> dict[int, Path]:
    """Fold → the folder of its validation.

    Args:
        model_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIG``.
        folds: those that are wanted; None: every numbered one with predictions. ``fold_all`` is never one, because its
            cases were trained on.
        checkpoint: ``final`` or ``best``, whose validation.

    Raises:
        UserError: the folder or a wanted fold is missing, or its validation holds no predictions.
    """
    model_folder = Path(model_folder)
    if not model_folder.is_dir():
        raise UserError(f"There is no folder {model_folder}.", "Train it first, or check -d, -tr, -p and -c.")
    present = {int(p.name[5:]): p / VALIDATION[checkpoint] for p in model_folder.glob("fold_*") if p.name[5:].isdigit()}
    wanted = sorted(k for k, p in present.items() if any(p.glob("predictions*.csv"))) if folds is None else list(folds)
    missing = [fold for fold in wanted if fold not in present or not any(present[fold].glob("predictions*.csv"))]
    if missing or not wanted:
        raise UserError(
            f"{model_folder} has no {VALIDATION[checkpoint]} of fold {missing[0] if missing else 0}.",
            f"Finish it: nnUNetv2_train … {missing[0] if missing else 0}{_VALIDATE[checkpoint]}, or name other folds "
            "with -f.",
        )
    return {fold: present[fold] for fold in wanted}


def accumulate_folds(
    model_folder: str | Path,
    *,
    folds: Sequence[int] | None = None,
    checkpoint: str = FINAL,
) -> tuple[Path, dict[str, tuple[Predictions, dict[str, Any]]]]:
    """Pool the validations of folds and write ``crossval_results_folds_0_1_…`` with tables, summaries and figures.

    Pooled metrics rank the probabilities of different models together; ``mean_of_folds`` in the summary does not
    (G. Forman and M. Scholz, Apples-to-Apples in Cross-Validation Studies, SIGKDD Explorations 12, 2010).

    Args:
        model_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIG``.
        folds: to pool; None: every numbered one with predictions.
        checkpoint: ``final`` or ``best``, whose validations. Tables that do not say were written by versions that
            validated the best epoch, and count as such.

    Returns:
        the folder, and target → (pooled predictions, summary).

    Raises:
        UserError: something is missing, or folds share a case or a subject.
    """
    model_folder = Path(model_folder)
    found = find_folds(model_folder, folds, checkpoint=checkpoint)
    targets = targets_of(model_folder)
    by_fold = {fold: read_tables(sorted(folder.glob("predictions*.csv")), targets) for fold, folder in found.items()}
    predicted = [target for target in targets if any(target.name in tables for tables in by_fold.values())]
    suffix = "" if checkpoint == FINAL else f"_{checkpoint}"
    output = model_folder / f"crossval_results_folds_{'_'.join(map(str, found))}{suffix}"
    output.mkdir(exist_ok=True)
    for name in ("dataset.json", "plans.json"):
        if (model_folder / name).is_file():
            shutil.copy(model_folder / name, output / name)
    results = {}
    for target in predicted:
        pooled = pool({fold: _of_target(tables, target, fold, model_folder) for fold, tables in by_fold.items()})
        more = _of_each_fold({fold: tables[target.name] for fold, tables in by_fold.items()})
        summary = write_predictions_and_summary(output, pooled, targets=predicted, more=more)
        results[target.name] = (pooled, summary)
    return output, results


def pool(by_fold: dict[int, Predictions]) -> Predictions:
    """The predictions of several folds as one table, sorted by case.

    Raises:
        UserError: two folds share a case or a subject, or differ in the kind of checkpoint.
    """
    for what in ("cases", "subjects"):
        seen: dict[str, int] = {}
        for fold, predictions in by_fold.items():
            twice = sorted({name for name in getattr(predictions, what) if seen.get(name, fold) != fold})
            if twice:
                raise UserError(
                    f"Folds {seen[twice[0]]} and {fold} share {what}: {some(twice)}.",
                    "Pool folds that share none, for example -f 0 1 2 3 4"
                    if what == "cases"
                    else "A subject in two folds was trained on and validated: make the splits anew (delete "
                    "splits_final.json) and train again.",
                )
            seen |= dict.fromkeys(getattr(predictions, what), fold)
    parts = list(by_fold.values())
    epochs = {fold: p.checkpoint for fold, p in by_fold.items()}
    if len(set(epochs.values())) > 1:
        shown = ", ".join(f"{fold}: {epoch}" for fold, epoch in epochs.items())
        raise UserError(
            f"The folds were validated with checkpoints of different kinds ({shown}).",
            "Validate all of them with the final one: nnUNetv2_train … FOLD --val",
        )
    joined = Predictions(
        parts[0].target,
        sum((p.cases for p in parts), ()),
        sum((p.subjects for p in parts), ()),
        np.concatenate([p.labels for p in parts]),
        np.concatenate([p.probabilities for p in parts]),
        next(iter(epochs.values())),
    )
    return joined.select(np.argsort(joined.cases, kind="stable").tolist())


def _of_target(tables: dict[str, Predictions], target: Target, fold: int, model_folder: Path) -> Predictions:
    if target.name not in tables:
        raise UserError(
            f"Fold {fold} of {model_folder} did not predict {target.name}, other folds did.",
            "Train all folds with one plan, or name those that belong together with -f.",
        )
    return tables[target.name]


def _of_each_fold(by_fold: dict[int, Predictions]) -> dict[str, Any]:
    """Each fold's metrics, and over the folds that define it their mean and standard deviation."""
    summaries = {str(fold): summarise_predictions(predictions) for fold, predictions in by_fold.items()}
    metrics = overall_metrics(next(iter(by_fold.values())).target)
    folds = {
        fold: {"cases": summary["cases"]} | {name: summary[name] for name in metrics}
        for fold, summary in summaries.items()
    }
    means = {}
    for name in metrics:
        defined = [values[name] for values in folds.values() if values[name] is not None]
        means[name] = {
            "mean": float(np.mean(defined)) if defined else None,
            "folds": len(defined),
            "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        }
    return {"folds": folds, "mean_of_folds": means}
