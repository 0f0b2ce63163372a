"""nnU-Net's ``splits_final.json``: reading the folds and checking their cases."""

from collections.abc import Collection, Mapping
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.io.text import some

SPLITS_FILE = "splits_final.json"
"""Beside the plans, in ``nnUNet_preprocessed/DatasetXXX_NAME``."""
PARTS = ("train", "val")

Splits = list[dict[str, list[str]]]


def read_splits(path: str | Path) -> Splits:
    """The folds of a split file, ``[{"train": [CASE, …], "val": [CASE, …]}, …]``.

    Raises:
        UserError: the file cannot be read or does not look like that.
    """
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(error.problem, f"{error.remedy} To have folds made anew: rm {path}") from error
    expected = 'It reads [{"train": ["CASE", …], "val": ["CASE", …]}, …], one entry per fold.'
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} is no list of folds.", f"{expected} Mend it, or: rm {path}")
    for number, fold in enumerate(content):
        for part in PARTS:
            names = fold.get(part) if isinstance(fold, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(
                    f'{path}: fold {number} has no list of names of cases under "{part}".',
                    f"{expected} Mend it, or: rm {path}",
                )
    return [{part: list(fold[part]) for part in PARTS} for fold in content]


def check_fold(fold: Mapping[str, list[str]], *, known: Collection[str] | None, where: str) -> None:
    """Refuse a fold that trains and validates on one case, names a case twice, or one that does not exist.

    Args:
        fold: ``train`` and ``val``.
        known: names of all cases; None where they are not known.
        where: file and number of the fold, for messages.

    Raises:
        UserError: naming the cases.
    """
    for part in PARTS:
        names = fold[part]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise UserError(f'{where} names cases twice under "{part}": {some(twice)}.', "Name each once.")
    both = sorted(set(fold["train"]) & set(fold["val"]))
    if both:
        raise UserError(
            f"{where} trains and validates on the same cases: {some(both)}.", "Put each case on one side only."
        )
    unknown = sorted({*fold["train"], *fold["val"]} - set(known)) if known is not None else []
    if not unknown:
        return
    example = next((case for name in unknown for case in known if name.startswith(f"{case}.")), None)
    raise UserError(
        f"{where} names cases that are not preprocessed: {some(unknown)}.",
        f"Write the case without the ending of its file: {example}"
        if example
        else "Correct the names, or preprocess the cases: nnUNetv2_preprocess -d ID",
    )
