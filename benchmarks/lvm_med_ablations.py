"""LVM-Med's parts taken out one by one, beside MAE and no pretraining: linear readouts of frozen features.

    OMP_NUM_THREADS=1 python benchmarks/lvm_med_ablations.py -o ablations --steps 160
    OMP_NUM_THREADS=1 python benchmarks/lvm_med_ablations.py -o ablations-96 --size 96x96 --features 8 --steps 160

``--data`` holds ``images/`` and ``labels/`` of Medical Segmentation Decathlon Task04, whose slices fit the planned
patch of 56 × 40 at 1 mm, or at 0.5 mm one of 96 × 96 (``--size``). All arms have equal steps of equal batches of
slices of 160 volumes. The encoder is frozen, and the mean of its coarsest map describes a slice; a ridge regression of
the areas of both structures on it is fitted on 20 labelled volumes and scored on 40 others: the share of the variance
that it explains (R²). Its penalty is chosen by cross-validation over the labelled volumes. ``shuffled`` is the same
readout of shuffled training labels. Differences are to ``full``, with a 95 % interval over volumes and seeds; they take
the variance of the 40 volumes as given. A run that has finished stands in runs/; the same command goes on, and ends
with the table.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study_steps import FOLDERS, edit_command, environment

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap

HERE = Path(__file__).resolve().parent
ARMS: dict[str, dict[str, Any] | None] = {
    "full": {},
    "no second order": {"solver": "lap"},
    "no message passing": {"layers": 0},
    "no noise": {"noise": 0.0, "margin": 1.0},
    "no local term": {"alpha": 1.0},
    "mae": None,
    "untrained": None,
}
"""Settings of LVM-Med by arm."""
SLICES_PER_CASE = 4
UNLABELLED = "Dataset501_Unlabelled"
LABELLED = "Dataset502_HippocampusLabelled"
EPOCH = 20
"""Steps."""


@dataclass(frozen=True)
class Size:
    """A patch, and the network and data that go with it."""

    patch: tuple[int, int]
    """In voxels."""
    stages: int
    """Each but the first halves the map."""
    data: str
    """Identifier of the preprocessed slices."""
    edits: dict[str, Any] = field(default_factory=dict)
    """Of the planned 2D configuration."""
    architecture: dict[str, Any] = field(default_factory=dict)

    @property
    def token_stride(self) -> int:
        """Of the coarsest map, in voxels: 7 × 5 or 6 × 6 cells."""
        return 2 ** (self.stages - 1)


SIZES = {
    "56x40": Size((56, 40), 4, "nnUNetPlans_2d"),
    "96x96": Size(
        (96, 96),
        5,
        "halfMillimetre_2d",
        {"spacing": [0.5, 0.5], "patch_size": [96, 96], "data_identifier": "halfMillimetre_2d"},
        {
            "n_stages": 5,
            "kernel_sizes": [[3, 3]] * 5,
            "strides": [[1, 1], *[[2, 2]] * 4],
            "n_conv_per_stage": [1] * 5,
            "n_conv_per_stage_decoder": [1] * 4,
        },
    ),
}
"""The planned size, and a larger one at half the spacing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, type=Path, metavar="DIR", help="folder for everything")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data" / "hippocampus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=300, help="of pretraining, a multiple of 20")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", choices=list(SIZES), default="56x40", help="of slices in voxels (default: 56x40)")
    parser.add_argument("--features", type=int, default=16, help="of the network's first stage, doubled at each other")
    args = parser.parse_args()
    folder = args.o.resolve()
    os.environ |= environment(folder, one_thread=True)
    prepare(args.data.resolve(), folder, args.size, args.features)
    os.environ["nnUNet_n_proc_DA"] = "0"  # planning fails on it
    setting = {"steps": args.steps, "batch_size": args.batch_size, "features": args.features, "size": args.size}
    runs = []
    for seed in args.seeds:
        for arm in args.arms:
            file = folder / "runs" / f"{arm.replace(' ', '-')}-{seed}.json"
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                write_json(file, setting | carry_out(arm, seed, setting))
            runs.append(read_json(file))
            if {key: runs[-1].get(key) for key in setting} != setting:
                raise SystemExit(f"{file} was measured with other settings: choose another folder.")
            print(f"{arm}, seed {seed}: {np.mean(list(runs[-1]['score'].values())):.4f}", flush=True)
    print(table(runs))


# ---------------------------------------------------------------- data


def plan_edits(size: Size, features: int) -> dict[str, Any]:
    """From nnU-Net's plan to ``small``, as ``nnssl_plugin plan --set`` takes them."""
    network = size.architecture | {"features_per_stage": [features * 2**n for n in range(size.stages)]}
    edits = size.edits | {f"architecture.arch_kwargs.{key}": value for key, value in network.items()}
    return {f"configurations.2d.{key}": value for key, value in edits.items()}


def commands(data: Path, folder: Path, size: str, features: int) -> list[tuple[str, ...]]:
    """From the images to preprocessed datasets and the plan ``small``."""
    edits = plan_edits(SIZES[size], features)
    scans = str(folder / "scans")
    return [
        (sys.executable, str(HERE / "hippocampus_data.py"), "-i", str(data), "-o", scans, "-d", "502"),
        ("nnssl_plugin", "prepare", "-i", scans, "-d", "501", "-n", "Unlabelled", "--modality", "MR"),
        ("nnUNetv2_plan_and_preprocess", "-d", "501", "502", "-c", "2d", "-npfp", "2", "--no_pp"),
        *(edit_command(dataset, "nnUNetPlans", "small", edits) for dataset in ("501", "502")),
        ("nnUNetv2_preprocess", "-d", "501", "502", "-plans_name", "small", "-c", "2d", "-np", "1"),
    ]


def prepare(data: Path, folder: Path, size: str, features: int) -> None:
    """Datasets and plans, unless they are there."""
    marker = folder / "prepared.json"
    if marker.is_file():
        return
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for command in commands(data, folder, size, features):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    write_json(marker, {"size": size, "features": features})


# ---------------------------------------------------------------- one run


def carry_out(arm: str, seed: int, setting: dict[str, Any]) -> dict[str, Any]:
    """Pretrain and read out; scores by held-out case."""
    started = time.process_time()
    trainer = pretrainer(arm, seed, setting)
    if arm == "untrained":
        trainer.initialize()
    else:
        trainer.run_training()
    trained = time.process_time() - started
    backbone = trainer.task.backbone.eval()
    size = SIZES[setting["size"]]
    score, shuffled = (readout(backbone, size, seed, shuffled=wrong) for wrong in (False, True))
    history = trainer.log.history()
    log = {key: value for key, value in history.items() if key.startswith(("train/", "diagnostics/"))}
    return {"arm": arm, "seed": seed, "seconds": trained, "score": score, "shuffled": shuffled, "log": log}


def pretrainer(arm: str, seed: int, setting: dict[str, Any]):
    """The trainer of an arm; the untrained encoder is what that of ``full`` starts from."""
    import torch

    from nnssl_plugin.methods.lvm_med.trainer import LVMMedPretrainer
    from nnssl_plugin.methods.mae.trainer import MAEPretrainer

    torch.set_num_threads(1)
    folder = Path(os.environ["nnUNet_preprocessed"], UNLABELLED)
    plan = read_json(folder / "small.json")
    plan |= {"plans_name": f"small-{arm.replace(' ', '-')}-{seed}", "continue_training": False}
    epochs = setting["steps"] // EPOCH
    block = {
        "epochs": epochs,
        "iterations_per_epoch": EPOCH,
        "validation_iterations": 1,
        "warmup_epochs": min(2, epochs // 2),
    }
    block |= {"batch_size": setting["batch_size"], "seed": seed, "figure_every": 10**6}
    if arm != "mae":
        of_slices = {"token_stride": SIZES[setting["size"]].token_stride, "slices_per_case": SLICES_PER_CASE}
        block |= {"lr": 0.002, "method": of_slices | (ARMS[arm] or {})}
    plan["pretraining"] = block
    cls = MAEPretrainer if arm == "mae" else LVMMedPretrainer
    return cls(plan, "2d", "all", read_json(folder / "dataset.json"), torch.device("cpu"))


# ---------------------------------------------------------------- readouts


def readout(backbone, size: Size, seed: int, *, shuffled: bool) -> dict[str, float]:
    """Explained share of the variance of both areas, a part for each held-out volume: their mean is R²."""
    folder = Path(os.environ["nnUNet_preprocessed"], LABELLED)
    split = read_json(folder / "splits_final.json")[0]
    x, y, volumes = {}, {}, {}
    for part in ("train", "val"):
        read = [_case(folder / size.data, case) for case in split[part]]
        x[part] = np.concatenate([_described(backbone, centred(image, size.patch)) for image, _ in read])
        y[part] = np.concatenate([np.stack([(seg == n).sum((1, 2)) for n in (1, 2)], 1) for _, seg in read])
        volumes[part] = np.repeat(split[part], [len(image) for image, _ in read])
    target = np.random.default_rng(seed).permutation(y["train"]) if shuffled else y["train"]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()), {"ridge__alpha": np.logspace(-1, 6, 15)}, cv=GroupKFold(5)
    )
    predicted = search.fit(x["train"], target, groups=volumes["train"]).predict(x["val"])
    return explained(y["val"], predicted, y["train"].mean(0), volumes["val"])


def explained(truth: np.ndarray, predicted: np.ndarray, mean: np.ndarray, cases: np.ndarray) -> dict[str, float]:
    """Case → what it adds to R² (mean over the columns) times the number of cases.

    Args:
        truth: (N, K).
        predicted: (N, K).
        mean: (K,) of the training labels, beside which R² is taken.
        cases: (N,) names.
    """
    names = np.unique(cases)
    total, wrong = (truth - mean) ** 2, (truth - predicted) ** 2
    gain = (total - wrong) / total.sum(0) * len(names)
    return {str(name): float(gain[cases == name].sum(0).mean()) for name in names}


def _case(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed slices and their labels (N, H, W)."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    image, labels, *_ = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return np.asarray(image[:])[0], np.asarray(labels[:])[0]


def _described(backbone, slices: np.ndarray) -> np.ndarray:
    """The mean of the coarsest map of each slice, (N, C)."""
    import torch

    with torch.no_grad():
        return backbone.pooled(backbone.features(torch.from_numpy(slices)[:, None].float())).numpy()


def centred(slices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Slices (N, H, W) cut, or padded with 0, to a size around their centre."""
    for axis, length in enumerate(size, 1):
        over = slices.shape[axis] - length
        if over > 0:
            slices = slices.take(range(over // 2, over // 2 + length), axis)
        before = max(0, -over) // 2
        pad = [(0, 0)] * 3
        pad[axis] = (before, max(0, -over) - before)
        slices = np.pad(slices, pad)
    return slices


# ---------------------------------------------------------------- results


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the mean score of each arm and its seeds, the difference to ``full``, and shuffled labels."""
    arms = {run["arm"]: sorted((r for r in runs if r["arm"] == run["arm"]), key=lambda r: r["seed"]) for run in runs}
    lines = ["| arm | mean | seeds | beside full (95 %) | shuffled labels |", "|---|---|---|---|---|"]
    for arm, of_arm in arms.items():
        seeds = [float(np.mean(list(run["score"].values()))) for run in of_arm]
        wrong = float(np.mean([np.mean(list(run["shuffled"].values())) for run in of_arm]))
        beside = "" if arm == "full" or "full" not in arms else difference(of_arm, arms["full"])
        shown = ", ".join(f"{seed:.3f}" for seed in seeds)
        lines.append(f"| {arm} | {np.mean(seeds):.3f} | {shown} | {beside} | {wrong:.3f} |")
    return "\n".join(lines)


def difference(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Mean difference of the seeds that both have, with its interval over cases and seeds."""
    of_seed = {run["seed"]: run["score"] for run in others}
    both = [(run["score"], of_seed[run["seed"]]) for run in runs if run["seed"] in of_seed]
    cases = sorted({case for scores, _ in both for case in scores})
    paired = [[a.get(case, np.nan) - b.get(case, np.nan) for case in cases] for a, b in both]
    found = hierarchical_bootstrap(np.array(paired))
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
