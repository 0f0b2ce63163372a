"""Fine-tune the encoders of lvm_med_ablations.py on few labelled hippocampus volumes, beside MAE's and from scratch.

    OMP_NUM_THREADS=1 python benchmarks/lvm_med_ablations.py -o ablations --steps 160
    OMP_NUM_THREADS=1 python benchmarks/lvm_med_finetuning.py -o ablations

2D segmentation of both structures, slices merged to volumes: 2 volumes drawn anew for each seed, or all 20, and the
same 40 others for evaluation. A seed is one of pretraining, of fine-tuning and of the labels drawn; all arms of a seed
see the very same batches. Reported is the Dice coefficient after the last step, mean over structures and volumes, with
differences to ``scratch`` and to ``mae`` and their 95 % intervals over volumes and seeds. A run that has finished
stands in finetuned/; the same command goes on, and ends with the table.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from study_steps import edit_command, environment

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.statistics.bootstrap import hierarchical_bootstrap

DATASET = "Dataset502_HippocampusLabelled"
TRAINERS = {"mae": "MAEPretrainer", "full": "LVMMedPretrainer"}
ARMS = ("scratch", *TRAINERS)
LABELLED = (2, 20)
STRUCTURES = ("anterior", "posterior")
BATCH, EPOCH = 8, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, type=Path, metavar="DIR", help="folder of lvm_med_ablations.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, a multiple of 20")
    args = parser.parse_args()
    folder = args.o.resolve()
    os.environ |= environment(folder, one_thread=True) | {"nnUNet_n_proc_DA": "0"}
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    base = read_json(preprocessed / "splits_final.json")[0]
    write_json(preprocessed / "splits_final.json", [base, *drawn_folds(base, args.seeds)])
    plans = {(arm, seed): adapted(folder, arm, seed) for seed in args.seeds for arm in ARMS}
    job = folder / "finetuning.json"
    write_json(job, job_of(args.seeds, args.steps, base["val"], plans, folder / "finetuned"))
    subprocess.run([sys.executable, str(Path(__file__).with_name("study_training.py")), str(job)], check=True)
    print(table([read_json(path) for path in sorted((folder / "finetuned").glob("*.json"))]))


def drawn_folds(base: dict[str, list[str]], seeds: list[int]) -> list[dict[str, list[str]]]:
    """For each seed a fold for each number of labelled volumes."""
    draws = [(np.random.default_rng(seed), number) for seed in seeds for number in LABELLED]
    return [
        {"train": sorted(rng.choice(base["train"], number, replace=False).tolist()), "val": base["val"]}
        for rng, number in draws
    ]


def adapted(folder: Path, arm: str, seed: int) -> str:
    """Name of the plan of an arm, which is written unless it is there."""
    name = "scratch" if arm == "scratch" else f"{arm}-{seed}"
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    if not (preprocessed / "tuned.json").is_file():
        settings = {"optimiser": "adamw", "lr": 0.001, "iterations_per_epoch": EPOCH, "validation_iterations": 1}
        edits = {f"finetuning.{key}": value for key, value in settings.items()}
        subprocess.run(
            edit_command("502", "small", "tuned", edits | {"configurations.2d.batch_size": BATCH}), check=True
        )
    if not (preprocessed / f"tuned-{name}.json").is_file():
        results = folder / "nnUNet_results" / "Dataset501_Unlabelled"
        run = results / f"{TRAINERS.get(arm)}__small-{name}__2d" / "fold_all" / "checkpoint_final.pth"
        weights = ("--from-scratch",) if arm == "scratch" else ("-w", str(run))
        command = ("nnssl_plugin", "adapt", "-d", "502", "-c", "2d", "-p", "tuned", "-n", name)
        subprocess.run((*command, *weights), check=True)
    return f"tuned-{name}"


def job_of(
    seeds: list[int], steps: int, cases: list[str], plans: dict[tuple[str, int], str], results: Path
) -> dict[str, object]:
    """What study_training.py is to carry out."""
    runs = [
        {
            "name": f"{arm}-{number}-{seed}",
            "arm": arm,
            "labelled": number,
            "seed": seed,
            "plan": plans[arm, seed],
            "fold": 1 + place * len(LABELLED) + LABELLED.index(number),
            "settings": {"seed": seed, "epochs": steps // EPOCH},
            "cases": cases,
            "shifted": [],
        }
        for number in LABELLED
        for place, seed in enumerate(seeds)
        for arm in ARMS
    ]
    results.mkdir(exist_ok=True)
    setting = {"dataset": DATASET, "configuration": "2d", "device": "cpu", "one_thread": True, "workers": 0}
    return setting | {
        "mirroring": False,
        "label_names": list(STRUCTURES),
        "results": str(results),
        "runs": runs,
    }


def table(runs: list[dict]) -> str:
    """Markdown: Dice of each arm and seed, and paired differences to the arms before."""
    lines = ["| labelled volumes | arm | mean | seeds | beside scratch (95 %) | beside MAE (95 %) |", "|" + "---|" * 6]
    for number in LABELLED:
        of_arm = {arm: [r for r in runs if r["labelled"] == number and r["arm"] == arm] for arm in ARMS}
        scores = {arm: {r["seed"]: volume_scores(r) for r in found} for arm, found in of_arm.items() if found}
        for arm, of_seed in scores.items():
            means = [float(np.mean(of_seed[seed])) for seed in sorted(of_seed)]
            beside = [difference(of_seed, scores[other]) if arm != other else "" for other in ("scratch", "mae")]
            if arm == "scratch":
                beside[1] = ""
            shown = ", ".join(f"{mean:.3f}" for mean in means)
            lines.append(f"| {number} | {arm} | {np.mean(means):.3f} | {shown} | {' | '.join(beside)} |")
    return "\n".join(lines)


def volume_scores(run: dict) -> np.ndarray:
    """Mean Dice of both structures of each volume, in the order of the names."""
    return np.mean([[of[case] for case in sorted(of)] for of in run["dice"].values()], axis=0)


def difference(scores: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> str:
    """Over the seeds that both have, with its interval over volumes and seeds."""
    found = hierarchical_bootstrap(np.array([scores[seed] - others[seed] for seed in scores if seed in others]))
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
