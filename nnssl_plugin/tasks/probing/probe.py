"""``evaluate probe`` on images: Dice of a linear readout of frozen encoders, beside a random one."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl_plugin.errors import UserError
from nnssl_plugin.features.voxels import SEED, Draw, LabelledVoxels
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.label_fractions import nested_subsets
from nnssl_plugin.nnunet.plans import (
    build_network,
    dataset_folder,
    input_channels,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)
from nnssl_plugin.nnunet.splits import SPLITS_FILE, check_fold, read_splits
from nnssl_plugin.nnunet.subjects import raw_folder_if_there, subjects_of_cases
from nnssl_plugin.statistics.bootstrap import Interval, hierarchical_bootstrap, paired_bootstrap
from nnssl_plugin.tasks.probing.weights import load_fitted

logger = logging.getLogger(__name__)

RANDOM = "random encoder"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Arm:
    """What was found with one encoder; lists over draws of labels, cases and structures, None where undefined."""

    weights: str | None
    dice: float | None
    """Mean over draws, cases and structures."""
    by_label: dict[str, float | None]
    shuffled: float | None
    """The same with labels exchanged at random within each case: what is reached without anatomy."""
    scores: list[list[list[float | None]]]
    ridge: list[float]
    """λ of each draw, chosen on its training cases alone."""
    seconds: float


def evaluate_voxels(
    dataset: str,
    plans_name: str,
    weights: Mapping[str, str | Path],
    *,
    fold: int,
    configuration: str = "3d_fullres",
    labelled: int | None = None,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    tell: Callable[[str], object] = logger.info,
) -> dict[str, Any]:
    """Fit a linear readout to each frozen encoder with a fold's training labels, and score its validation cases.

    Every encoder is also measured with shuffled labels, and all are compared with a random one. No choice is made on
    validation cases: λ is chosen by leaving training cases out.

    Args:
        dataset: ID or full name of a labelled, preprocessed dataset.
        plans_name: its plan, whose network is built.
        weights: name → file of any kind that ``read_source`` knows.
        fold: of ``splits_final.json``.
        configuration: one of the plan's configurations.
        labelled: draw so many of the training cases; None: all of them.
        seeds: one draw for each, nested in those of larger ``labelled``; where all cases are drawn there is one.
        device: where encoders run.
        tell: takes a line for each encoder that is done.

    Returns:
        plain values for JSON: the setting, ``draws``, ``cases``, under ``arms`` an :class:`Arm` for each encoder, and
        ``over_random``: mean paired difference and its 95 % interval over subjects, of several draws over them too.

    Raises:
        UserError: the dataset names no structures, has no such fold or too few cases, or weights do not fit.
    """
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    training, validation = _cases(folder, resolve_configuration(plans, configuration), fold)
    subjects = subjects_of_cases([*training, *validation], table=None, raw_folder=raw_folder_if_there(folder.name))
    voxels = LabelledVoxels(folder, plans, configuration, dataset_json, [*training, *validation])
    if not voxels.structures:
        raise UserError(
            f"The labels of {folder.name} name no structures, at most where the body is.",
            "Name a dataset with labels of structures with -d.",
        )
    draws = _draws(training, labelled, seeds, subjects)
    arms = {}
    for name, file in {RANDOM: None, **weights}.items():
        torch.manual_seed(SEED)
        network = build_network(plans, configuration, dataset_json)
        if file is not None:
            load_fitted(network, file, plans, configuration)
        backbone = Backbone(network, input_channels(plans, configuration, dataset_json)).eval()
        arms[name] = _measure(voxels, backbone, draws, validation, file, device)
        tell(f"{name}: {arms[name].seconds:.1f} s")
    over_random = {name: asdict(_difference(arms[name], arms[RANDOM], validation, subjects)) for name in weights}
    return {
        "dataset": folder.name,
        "plan": plans_name,
        "configuration": configuration,
        "fold": fold,
        "structures": voxels.structures,
        "draws": [list(draw.cases) for draw in draws],
        "cases": list(validation),
        "arms": {name: asdict(arm) for name, arm in arms.items()},
        "over_random": {
            name: {key: _plain(value) for key, value in interval.items()} for name, interval in over_random.items()
        },
    }


def voxel_table(result: Mapping[str, Any]) -> str:
    """What :func:`evaluate_voxels` gave, as Markdown: a row for each encoder."""
    structures = result["structures"] if len(result["structures"]) > 1 else []
    lines = [["encoder", "Dice", *structures, "over random", "shuffled labels", "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for name, arm in result["arms"].items():
        over = result["over_random"].get(name)
        cells = [arm["dice"], *(arm["by_label"][label] for label in structures)]
        lines.append(
            [
                name,
                *map(_number, cells),
                "" if over is None else _interval(over),
                _number(arm["shuffled"]),
                f"{arm['seconds']:.0f}",
            ]
        )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sizes = sorted({len(draw) for draw in result["draws"]})
    drawn = f", {len(result['draws'])} draws" if len(result["draws"]) > 1 else ""
    return (
        f"{rows}\n\nRidge readout of frozen features: {' or '.join(map(str, sizes))} labelled cases of fold "
        f"{result['fold']}{drawn}; Dice at the plan's spacing on its {len(result['cases'])} validation cases."
    )


def names_of(files: Sequence[str]) -> dict[str, str]:
    """Name → file of ``[NAME=]FILE``; a checkpoint of nnU-Net without a name has that of its training.

    Raises:
        UserError: two have one name, or that of the random encoder.
    """
    named: dict[str, str] = {}
    for text in files:
        name, _, file = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        path = Path(file)
        name = name or (path.parent.parent.name if path.parent.name.startswith("fold_") else path.stem)
        if name in named or name == RANDOM:
            raise UserError(f"Two encoders are called '{name}'.", f"Give each a name: -w a={file} b=…")
        named[name] = file
    return named


def _cases(folder: Path, planned: Mapping[str, Any], fold: int) -> tuple[list[str], list[str]]:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    path, data = folder / SPLITS_FILE, folder / planned["data_identifier"]
    if not data.is_dir():
        raise UserError(f"There is no {data}.", f"nnUNetv2_preprocess -d {folder.name} -plans_name PLAN -c CONFIG")
    if not path.is_file():
        raise UserError(
            f"There is no {path}, which says which cases are for training.",
            f"nnU-Net writes it at its first training, and so does: nnssl_plugin split -d {folder.name}",
        )
    splits = read_splits(path)
    if fold not in range(len(splits)):
        raise UserError(f"{path} has no fold {fold}; it has {len(splits)}.", "Name another with -f.")
    present = infer_dataset_class(str(data)).get_identifiers(str(data))
    check_fold(splits[fold], known=present, where=f"{path}: fold {fold}")
    training, validation = (sorted(splits[fold][part]) for part in ("train", "val"))
    if not training or not validation:
        raise UserError(f"{path}: fold {fold} has no cases for training or for validation.", "Name another with -f.")
    return training, validation


def _draws(
    training: Sequence[str], labelled: int | None, seeds: Sequence[int], subjects: Mapping[str, str]
) -> list[Draw]:
    if labelled is None or labelled == len(training):
        return [Draw(tuple(training))]
    if not 0 < labelled <= len(training):
        raise UserError(
            f"--labelled {labelled}, but the fold has {len(training)} training cases.",
            f"Name 1 to {len(training)}.",
        )
    fraction = labelled / len(training)
    drawn = (nested_subsets(training, [fraction], seed=seed, subjects=subjects)[fraction] for seed in seeds)
    return [Draw(tuple(cases)) for cases in drawn]


def _measure(
    voxels: LabelledVoxels,
    backbone: Backbone,
    draws: Sequence[Draw],
    validation: Sequence[str],
    file: str | Path | None,
    device: str,
) -> Arm:
    started = time.perf_counter()
    control = Draw(draws[0].cases, shuffled=True)
    readouts = voxels.fit(backbone, [*draws, control], device=device)
    scores = voxels.dice(backbone, readouts, validation, device=device)
    true = scores[:-1]
    return Arm(
        weights=None if file is None else str(file),
        dice=_plain(_mean(true)),
        by_label={name: _plain(_mean(true[..., k])) for k, name in enumerate(voxels.structures)},
        shuffled=_plain(_mean(scores[-1])),
        scores=[[[_plain(score) for score in case] for case in draw] for draw in true.tolist()],
        ridge=[readout.ridge for readout in readouts[:-1]],
        seconds=time.perf_counter() - started,
    )


def _difference(arm: Arm, other: Arm, cases: Sequence[str], subjects: Mapping[str, str]) -> Interval:
    """Over the cases' means of their structures, with an interval over subjects and, of several, draws."""
    a, b = (
        np.array([[_mean(np.array(case, dtype=float)) for case in draw] for draw in each.scores])
        for each in (arm, other)
    )
    whose = [subjects[case] for case in cases]
    if len(a) == 1:
        return paired_bootstrap(a[0], b[0], subjects=whose, confidence=CONFIDENCE)
    return hierarchical_bootstrap(a - b, subjects=whose, confidence=CONFIDENCE)


def _mean(scores: np.ndarray) -> float:
    return float(np.nanmean(scores)) if not np.isnan(scores).all() else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(over: Mapping[str, float | None]) -> str:
    if over["mean"] is None:
        return "–"
    edges = "" if over["low"] is None else f" [{over['low']:+.3f}, {over['high']:+.3f}]"
    return f"{over['mean']:+.3f}{edges}"
