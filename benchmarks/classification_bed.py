"""A bed for classification: AdrenalMNIST3D with 5 % and all of its labels, from scratch and pretrained.

    python benchmarks/classification_bed.py -i adrenalmnist3d_trainval.npz -o adrenal-bed --jobs 2 --device cuda

The 1,188 volumes of the official training split are a pool of 1,000, on which all arms pretrain without labels and
from which labels are drawn, and 188 for tuning, on which each arm's learning rate is chosen; the 98 of the official
validation split are evaluated. A seed draws the labels, the initialisation and the augmentation, alike in all arms.
Interrupted, the same command goes on. It writes summary.json, and each run as soon as it is there into ``runs``.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nnssl_plugin.cli.env import search_path
from nnssl_plugin.io.files import read_json, write_json

DATASET, CONFIGURATION = "Dataset511_AdrenalBed", "3d_fullres"
ARMS = {"MAE": "MAEPretrainer", "S2DC": "S2DCPretrainer", "scratch": None}
RATES = (3e-4, 1e-3, 3e-3)
POOL, TUNING, EVALUATION, SEEDS = 1000, 188, 98, (0, 1, 2, 3, 4)
STEPS, BATCH = 30, 16
"""Of fine-tuning: steps per epoch, volumes per step."""
PRETRAINING = {
    "iterations_per_epoch": 50,
    "validation_iterations": 2,
    "batch_size": 8,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "warmup_epochs": 1,
    "figure_every": 20,
}
METHODS = {"S2DC": {"token_stride": 4, "hidden": 256, "dim": 128, "queue": 400, "momentum": 0.99}, "MAE": {"block": 4}}
NETWORK = {
    "n_stages": 4,
    "features_per_stage": [16, 32, 64, 128],
    "kernel_sizes": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [1, 1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1, 1],
}
PATCH = [24, 24, 24]
ENDINGS = {"train": ".nii.gz", "test": "_0000.nii.gz"}
"""Of the files that adrenal_data.py writes."""


class Again:
    """Batches of a stream, kept to be read again by the next arm."""

    def __init__(self, stream):
        self.stream, self.batches, self.place = stream, [], 0

    def __next__(self):
        if self.place == len(self.batches):
            self.batches.append(next(self.stream))
        self.place += 1
        return self.batches[self.place - 1]


def prepare(archive: Path, folder: Path, fractions: list[float]) -> None:
    """Volumes, table, nnU-Net's planning and preprocessing, one edited plan, and the folds."""
    scripts = Path(__file__).parent
    here = Path(os.environ["nnUNet_preprocessed"], DATASET)
    if (here / "splits_final.json").exists():
        return
    _run(sys.executable, scripts / "adrenal_data.py", "-i", archive, "-o", folder / "adrenal")
    scans, table = folder / "scans", folder / "scans.csv"
    scans.mkdir(exist_ok=True)
    lines = ["case,diagnosis"]
    for split in ("train", "test"):
        for path in (folder / "adrenal" / split).iterdir():
            path.rename(scans / (path.name.removesuffix(ENDINGS[split]) + ".nii.gz"))
        lines += (folder / "adrenal" / f"{split}.csv").read_text().splitlines()[1:]
    table.write_text("\n".join(lines) + "\n")
    number, name = DATASET[7:10], DATASET[11:]
    flags = ("--class-labels", table, "--modality", "noNorm")
    _run("nnssl_plugin", "prepare", "-i", scans, "-d", number, "-n", name, *flags)
    _run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-npfp", 4, "-np", 4)
    plan = read_json(here / "nnUNetPlans.json")
    block = plan["configurations"][CONFIGURATION]
    block["patch_size"] = PATCH
    block["architecture"]["arch_kwargs"] |= NETWORK
    write_json(here / "bed.json", plan | {"plans_name": "bed"})
    train = sorted(line.partition(",")[0] for line in lines if line.startswith("train"))
    evaluation = sorted(line.partition(",")[0] for line in lines if line.startswith("val"))
    order = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    tuning, pool = order[:TUNING], sorted(order[TUNING:])
    few = round(min(fractions) * len(pool))
    folds = [{"train": pool, "val": tuning}, {"train": tuning[:few], "val": tuning[few:]}]
    for seed in SEEDS:
        drawn = np.random.default_rng(seed).permutation(pool).tolist()
        folds += [{"train": sorted(drawn[: round(part * len(pool))]), "val": evaluation} for part in fractions]
    write_json(here / "splits_final.json", folds)


def pretrain(arm: str, epochs: int, device: str) -> None:
    """One pretraining on the pool."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    if weights_of(arm).exists():
        return
    plan, dataset = _plan()
    plan |= {"plans_name": f"pretrain-{arm}", "pretraining": PRETRAINING | {"epochs": epochs, "method": METHODS[arm]}}
    trainer = recursive_find_trainer_class_by_name(ARMS[arm])(plan, CONFIGURATION, 0, dataset, torch.device(device))
    trainer.run_training()
    source = Path(trainer.output_folder, "checkpoint_final.pth")
    _run("nnssl_plugin", "adapt", "-d", DATASET[7:10], "-c", CONFIGURATION, "-p", "bed", "-w", source, "-n", arm)


def weights_of(arm: str) -> Path:
    return Path(os.environ["nnUNet_preprocessed"], DATASET, f"bed-{arm}_{CONFIGURATION}.pth")


def train_fold(runs: list[dict], device: str, results: Path) -> None:
    """All runs of one fold on the very same batches; each result is written at once."""
    import torch

    from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

    class Trainer(PretrainedClassificationTrainer):
        kept = None

        def get_dataloaders(self):
            if Trainer.kept is None:
                Trainer.kept = tuple(Again(stream) for stream in super().get_dataloaders())
            for stream in Trainer.kept:
                stream.place = 0
            return Trainer.kept

    torch.set_num_threads(1)
    for run in runs:
        path = results / f"{run['name']}.json"
        if path.exists():
            continue
        plan, dataset = _plan()
        weights = weights_of(run["arm"]).name if ARMS[run["arm"]] else None
        plan |= {
            "plans_name": run["name"],
            "finetuning": {"weights": weights, "seed": run["seed"], "lr": run["lr"]},
            "classification": {
                "inputs": "windows",
                "windows": 1,
                "batch_size": BATCH,
                "epochs": run["epochs"],
                "iterations_per_epoch": STEPS,
            },
        }
        began = time.monotonic()
        trainer = Trainer(plan, CONFIGURATION, run["fold"], dataset, torch.device(device))
        trainer.disable_checkpointing = True
        trainer.pictures_are_due = lambda: False
        trainer.run_training()
        curve = [float(value) for value in trainer.log.history()["auroc"]]
        (target,) = trainer.targets
        labels, probabilities = trainer.validation._arrays(target)
        positive = list(target.classes).index("hyperplasia")
        score = dict(zip(trainer.validation.cases, probabilities[:, positive].tolist(), strict=True))
        truth = dict(zip(trainer.validation.cases, (labels == positive).tolist(), strict=True))
        found = {"score": score, "truth": truth, "auroc": curve[-1], "curve": curve}
        write_json(path, run | found | {"seconds": time.monotonic() - began})


def summarise(results: Path, fractions: list[float]) -> dict:
    """AUROC per arm and fraction; differences to scratch, intervals over seeds and cases (draws of both, crossed)."""
    from nnssl_plugin.statistics.areas import areas
    from nnssl_plugin.statistics.bootstrap import percentile_interval

    runs = [read_json(path) for path in sorted(results.glob("*.json"))]
    rows, calibration = [], []
    for fraction in fractions:
        of = {arm: {r["seed"]: r for r in runs if (r["arm"], r["fraction"]) == (arm, fraction)} for arm in ARMS}
        twin = of["scratch"]
        if not twin:
            continue
        labelled = round(fraction * POOL)
        finals = [run["auroc"] for run in twin.values()]
        gain = statistics.fmean(run["curve"][-1] - run["curve"][-1 - len(run["curve"]) // 5] for run in twin.values())
        spread = statistics.stdev(finals) if len(finals) > 1 else None
        calibration.append(
            {
                "labelled_cases": labelled,
                "seeds": len(finals),
                "gain_in_last_fifth": gain,
                "sd_over_seeds": spread,
                "converged": None if spread is None else gain < spread / 3,
            }
        )
        for arm, own in of.items():
            together = sorted(set(own) & set(twin))
            if not together:
                continue
            values = [own[seed]["auroc"] for seed in own]
            row = {"look": "as trained", "labelled_cases": labelled, "arm": arm, "mean": statistics.fmean(values)}
            row |= {"seeds": len(together), "difference_to_scratch": None}
            row["paired"] = [statistics.fmean(each[seed]["auroc"] for seed in together) for each in (own, twin)]
            row |= {"sd_over_seeds": statistics.stdev(values) if len(values) > 1 else None, "per_seed": values}
            if arm != "scratch":
                rng, cases = np.random.default_rng(0), sorted(twin[together[0]]["truth"])
                truth = np.array([twin[together[0]]["truth"][case] for case in cases])
                drawn = rng.multinomial(len(cases), np.full(len(cases), 1 / len(cases)), size=2000).astype(float)
                seeds = rng.multinomial(len(together), np.full(len(together), 1 / len(together)), size=2000)
                per_seed = []
                for seed in together:
                    one, other = (
                        areas(np.array([run[seed]["score"][case] for case in cases]), truth, drawn)[0]
                        for run in (own, twin)
                    )
                    per_seed.append(one - other)
                means = (np.stack(per_seed, 1) * seeds).sum(1) / seeds.sum(1)
                low, high = percentile_interval(means) if len(together) > 1 else (None, None)
                mean = statistics.fmean(own[seed]["auroc"] - twin[seed]["auroc"] for seed in together)
                row["difference_to_scratch"] = {"mean": mean, "low": low, "high": high}
            rows.append(row)
    tuning = {
        arm: {str(r["lr"]): r["auroc"] for r in runs if r["fraction"] is None and r["arm"] == arm} for arm in ARMS
    }
    seconds = sum(run["seconds"] for run in runs)
    return {
        "name": "adrenal",
        "data": "AdrenalMNIST3D (MedMNIST v2): binary shapes of 28³ voxels, normal or hyperplasia",
        "metric": "AUROC",
        "evaluation_cases": EVALUATION,
        "rows": rows,
        "calibration": calibration,
        "tuning": tuning,
        "run_minutes": seconds / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="adrenalmnist3d_trainval.npz")
    parser.add_argument("-o", required=True, type=Path, help="folder of the bed")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 1.0])
    parser.add_argument("--epochs", type=int, default=10, help="of 30 steps, fine-tuning (default: 10)")
    parser.add_argument("--pretraining-epochs", type=int, default=20, help="of 50 steps (default: 20)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (default: 2)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder, results = args.o.resolve(), args.o.resolve() / "runs"
    results.mkdir(parents=True, exist_ok=True)
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / f"nnUNet_{name}")
        (folder / f"nnUNet_{name}").mkdir(exist_ok=True)
    os.environ |= {"nnUNet_extTrainer": search_path(), "OMP_NUM_THREADS": "1", "nnUNet_compile": "f"}
    os.environ.pop("nnUNet_n_proc_DA", None)
    prepare(args.i.resolve(), folder, args.fractions)
    os.environ["nnUNet_n_proc_DA"] = "0"
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pretrained = [arm for arm in ARMS if ARMS[arm]]
        pool.starmap(pretrain, [(arm, args.pretraining_epochs, args.device) for arm in pretrained], chunksize=1)
        trials = [
            {
                "name": f"tune-{arm}-{lr:g}",
                "arm": arm,
                "lr": lr,
                "seed": 0,
                "fold": 1,
                "fraction": None,
                "epochs": args.epochs,
            }
            for lr in RATES
            for arm in ARMS
        ]
        pool.starmap(train_fold, [(trials, args.device, results)], chunksize=1)
        tuning = summarise(results, [])["tuning"]
        rates = {arm: float(max(found, key=found.__getitem__)) for arm, found in tuning.items()}
        folds = [(seed, fraction) for seed in SEEDS for fraction in args.fractions]
        jobs = []
        for number, (seed, fraction) in enumerate(folds):
            common = {"seed": seed, "fold": 2 + number, "fraction": fraction, "epochs": args.epochs}
            runs = [{"name": f"{arm}-seed{seed}-{fraction:g}", "arm": arm, "lr": rates[arm]} | common for arm in ARMS]
            jobs.append((runs, args.device, results))
        pool.starmap(train_fold, sorted(jobs, key=lambda job: job[0][0]["fraction"]), chunksize=1)
    write_json(folder / "summary.json", summarise(results, args.fractions))


def _plan() -> tuple[dict, dict]:
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET)
    return read_json(folder / "bed.json") | {"continue_training": False}, read_json(folder / "dataset.json")


def _run(*words) -> None:
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    main()
