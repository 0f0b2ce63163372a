"""Separation of tokens by the labels of structures, with pretrained weights and with random ones.

After figure 5 of Pan et al. (S2DC): the silhouette of token features by the label under each token. The weights are
compared with the random initialisation of the same network on the same windows: before and after pretraining.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnssl_plugin.data.cases import Cases
from nnssl_plugin.data.windows import random_origin, read_labels, read_window
from nnssl_plugin.diagnostics.collapse import effective_rank, feature_std
from nnssl_plugin.diagnostics.separation import cosine_gap, silhouette, token_labels
from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.labels import structure_labels
from nnssl_plugin.nnunet.plans import (
    build_network,
    dataset_folder,
    input_channels,
    read_dataset_json,
    read_plan,
    resolve_configuration,
)
from nnssl_plugin.nnunet.splits import read_splits
from nnssl_plugin.tasks.probing.weights import load_fitted

BACKGROUND = "background"
TITLES = {"labels": "all labels and background", "structures": "labels among themselves", "tokens": "all tokens"}
"""Groups of tokens → how the table calls them."""
STRIDE = 16
"""Stride, in voxels, of the tokens that are measured: that of S2DC's tokens."""
SEED = 12345
"""Of the windows and of the random initialisation."""


@dataclass(frozen=True)
class Separation:
    """How well tokens tell labels apart; NaN where the labels do not suffice."""

    silhouette: float
    """Mean silhouette under the cosine distance, in [-1, 1]."""
    cosine_gap: float
    """Mean cosine of pairs with one label minus that of pairs with different ones, in [-2, 2]."""


@dataclass(frozen=True)
class Windows:
    """One window of each case: images and the labels under them."""

    cases: tuple[str, ...]
    images: Tensor
    """(B, C, *patch)."""
    labels: Tensor
    """(B, *patch) int16, -1 where unknown."""


def evaluate_tokens(
    dataset: str,
    plans_name: str,
    *,
    configuration: str = "3d_fullres",
    weights: str | Path | None = None,
    fold: int | None = None,
    cases: int | None = None,
    stride: int = STRIDE,
    device: str = "cpu",
) -> dict[str, Any]:
    """Token separation of a plan's network on a labelled, preprocessed dataset, before and after pretraining.

    Every case gives one window of the plan's patch size around one of its labelled voxels; the tokens of all windows
    are measured together. A token counts with the label of most voxels around its centre.

    Args:
        dataset: ID or full name.
        plans_name: the plan, whose network is built.
        configuration: one of its configurations.
        weights: a file of any kind that ``read_source`` knows; ``None`` measures the random initialisation alone.
        fold: use the validation cases of this fold of ``splits_final.json`` only.
        cases: how many cases, chosen evenly over their sorted names; ``None`` for all.
        stride: the finest stage of the network whose stride is at least this, in voxels of the plan's spacing.
        device: where the network runs.

    Returns:
        plain values for JSON: the setting, ``tokens`` per label, and under ``before`` and ``after`` the separation of
        all labels with the background (``labels``) and of the structures among themselves (``structures``), and the
        spread and effective rank of all ``tokens``.

    Raises:
        UserError: when the dataset labels no structures, no case is left, or the weights do not fit.
    """
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    names = {0: BACKGROUND} | structure_labels(dataset_json)
    if len(names) == 1:
        raise UserError(
            f"The labels of {folder.name} name no structures, at most where the body is.",
            "Name a dataset with labels of structures with -d.",
        )
    planned = resolve_configuration(plans, configuration)
    windows = _read_windows(folder, plans, planned, chosen=_choose(folder, planned, fold, cases), known=list(names))
    torch.manual_seed(SEED)
    network = build_network(plans, configuration, dataset_json)
    backbone = Backbone(network, input_channels(plans, configuration, dataset_json)).eval()
    before, grid = _tokens(backbone, windows.images, stride, device)
    labels = token_labels(windows.labels, backbone.token_grid(grid, stride).sums).flatten()
    result = {
        "dataset": folder.name,
        "plan": plans_name,
        "configuration": configuration,
        "weights": None if weights is None else str(weights),
        "stride": stride,
        "grid": list(grid),
        "cases": list(windows.cases),
        "tokens": {name: int((labels == value).sum()) for value, name in names.items()},
        "before": measure(before, labels),
    }
    if weights is not None:
        load_fitted(network, weights, plans, configuration)
        result["after"] = measure(_tokens(backbone, windows.images, stride, device)[0], labels)
    return result


def measure(tokens: Tensor, labels: Tensor) -> dict[str, dict[str, float | None]]:
    """Separation of tokens (N, D) by their labels (N,): with the background, and of the structures alone; and whether
    the tokens have collapsed, whatever their labels.

    Numbers that the labels do not give are ``None``.
    """
    kinds = {"labels": labels, "structures": labels.where(labels > 0, -1)}
    measured = {
        kind: asdict(Separation(silhouette(tokens, chosen), float(cosine_gap(tokens, chosen))))
        for kind, chosen in kinds.items()
    }
    measured["tokens"] = {"spread": float(feature_std(tokens)), "effective_rank": float(effective_rank(tokens))}
    return {
        kind: {name: None if math.isnan(value) else value for name, value in numbers.items()}
        for kind, numbers in measured.items()
    }


def table(result: dict[str, Any]) -> str:
    """What :func:`evaluate_tokens` gave, as Markdown: a row for each measure."""
    stages = [stage for stage in ("before", "after") if stage in result]
    lines = [["tokens compared", "measure", *stages], ["---"] * (2 + len(stages))]
    for kind, title in TITLES.items():
        lines += [
            [title, measured.replace("_", " "), *(_number(result[stage][kind][measured]) for stage in stages)]
            for measured in result["before"][kind]
        ]
    counts = ", ".join(f"{name} {count}" for name, count in result["tokens"].items())
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\nTokens of {len(result['cases'])} cases by label: {counts}."


def _choose(folder: Path, planned: dict[str, Any], fold: int | None, count: int | None) -> list[str]:
    """Names of the cases to measure."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    data = folder / planned["data_identifier"]
    if not data.is_dir():
        raise UserError(f"There is no {data}.", f"nnUNetv2_preprocess -d {folder.name} -plans_name PLAN -c CONFIG")
    present = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
    if fold is not None:
        present = sorted(set(present) & set(_validation_cases(folder / "splits_final.json", fold)))
    if not present:
        raise UserError(f"{data} holds no cases{'' if fold is None else f' of fold {fold}'}.", "Leave -f out.")
    number = len(present) if count is None else min(count, len(present))
    return [present[index * len(present) // number] for index in range(number)]


def _validation_cases(path: Path, fold: int) -> Sequence[str]:
    splits = read_splits(path) if path.is_file() else []
    if fold not in range(len(splits)):
        raise UserError(f"{path} has no fold {fold}; it has {len(splits)}.", "Leave -f out to use every case.")
    return splits[fold]["val"]


def _read_windows(
    folder: Path, plans: dict[str, Any], planned: dict[str, Any], *, chosen: list[str], known: list[int]
) -> Windows:
    """One window of each case around a labelled voxel, always the same one."""
    cases = Cases(folder / planned["data_identifier"], chosen, transpose_forward=plans["transpose_forward"])
    flat = len(planned["patch_size"]) == 2
    window = [1, *planned["patch_size"]] if flat else planned["patch_size"]
    read = []
    for number, case in enumerate(tqdm(chosen, desc="read", unit="case")):
        data, segmentation, facts = cases.load_labelled(case)
        rng = np.random.default_rng([SEED, number])
        anchor = facts.foreground[rng.integers(len(facts.foreground))] if len(facts.foreground) else None
        origin = random_origin(data.shape[1:], window, rng, anchor)
        values = read_labels(segmentation, origin, window)
        read.append((read_window(data, origin, window), np.where(np.isin(values, known), values, -1)))
    images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
    if flat:
        images, labels = images.squeeze(-3), labels.squeeze(-3)
    return Windows(tuple(chosen), images, labels)


@torch.no_grad()
def _tokens(backbone: Backbone, images: Tensor, stride: int, device: str) -> tuple[Tensor, tuple[int, ...]]:
    """Tokens (B · N, D) of the images (B, C, *patch), on the CPU, and the grid of one image."""
    backbone = backbone.to(device)
    found = []
    for image in tqdm(images, desc="tokens", unit="case"):
        tokens, grid = backbone.tokens(backbone.features(image[None].to(device)), stride)
        found.append(tokens[0].float().cpu())
    return torch.cat(found), grid


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
