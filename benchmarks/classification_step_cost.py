"""What a step of classification costs over forward and backward of the bare encoder on the same windows.

    python benchmarks/classification_step_cost.py -d 701 -c 3d_fullres -p nnUNetPlans nnUNetPlans-windows \\
        --output cost.json
    OMP_NUM_THREADS=1 python benchmarks/classification_step_cost.py -d 701 --rounds 15

The trainer is the real one, on a dataset that is planned, preprocessed and has class labels; its results go to a
temporary folder. In every round these are timed one after the other on the same batch:

    data     reading, resizing or cutting, and augmentation, in this process (no workers): what training waits for at
             worst
    step     the trainer's step: forward, loss, backward, clipping, update
    bare     forward and backward of the encoder with a trivial loss

Ratios are medians of the ratios round by round, which holds where the machine's speed drifts.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nnssl_plugin.io.files import read_json, write_json

WARM_UP = 2
"""Rounds that are thrown away: the first allocates, and compiles where compiling is on."""
COLUMNS = ("step / bare", "(step + data) / bare")


def make_trainer(args: argparse.Namespace, plan_name: str):
    """The initialised trainer, its loaders without workers."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from nnssl_plugin.tasks.classification.trainer import PretrainedClassificationTrainer

    folder = Path(str(nnUNet_preprocessed), maybe_convert_to_dataset_name(args.d))
    plans = read_json(folder / f"{plan_name}.json") | {"continue_training": False}
    trainer = PretrainedClassificationTrainer(
        plans, args.c, "all", read_json(folder / "dataset.json"), torch.device(args.device)
    )
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.interruption.release()
    trainer.network.train()
    return trainer


def timed_round(trainer) -> dict[str, float]:
    """Seconds of one batch in every way."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        _wait(trainer.device)
        started = time.perf_counter()
        result = work()
        _wait(trainer.device)
        seconds[name] = time.perf_counter() - started
        return result

    batch = timed("data", lambda: next(trainer.dataloader_train))
    timed("step", lambda: trainer.train_step(batch))
    trainer.optimizer.zero_grad(set_to_none=True)
    windows = batch["data"].to(trainer.device).flatten(0, 1)
    timed("bare", lambda: _bare(trainer, windows))
    return seconds


def _bare(trainer, windows: torch.Tensor) -> None:
    with torch.autocast(trainer.device.type, enabled=trainer.device.type == "cuda"):
        loss = trainer.network.backbone.features(windows)[-1].float().mean()
    loss.backward()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace, plan_name: str) -> dict:
    """Setting, seconds and ratios of one plan."""
    trainer = make_trainer(args, plan_name)
    rounds = [timed_round(trainer) for _ in range(args.rounds + WARM_UP)][WARM_UP:]
    ratios = ([r["step"] / r["bare"] for r in rounds], [(r["step"] + r["data"]) / r["bare"] for r in rounds])
    return {
        "plan": plan_name,
        "inputs": trainer.settings.inputs,
        "batch": trainer.batch_size,
        "windows": trainer.settings.windows_per_case,
        "patch": list(trainer.configuration_manager.patch_size),
        "features": list(trainer.network.backbone.channels),
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in ("data", "step", "bare")},
        "ratios": {name: statistics.median(values) for name, values in zip(COLUMNS, ratios, strict=True)},
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    header = ["plan", "inputs", "batch × windows", "patch", "data (s)", "step (s)", "bare (s)", *COLUMNS]
    lines = [header, ["---"] * len(header)]
    for result in results:
        lines.append(
            [
                result["plan"],
                result["inputs"],
                f"{result['batch']} × {result['windows']}",
                "×".join(map(str, result["patch"])),
                *(f"{s:.3f}" for s in result["seconds"].values()),
                *(f"{ratio:.3f}" for ratio in result["ratios"].values()),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset that is planned, preprocessed and has class labels")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="plans, timed one after the other")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"nnUNet_results": scratch, "nnUNet_n_proc_DA": "0"}
        results = [measure(args, plan_name) for plan_name in args.p]
    print(table(results))
    setting = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{args.device}, {setting['threads']} threads, torch {torch.__version__}, {args.rounds} rounds")
    if args.output:
        write_json(args.output, {"setting": setting, "results": results})


if __name__ == "__main__":
    main()
