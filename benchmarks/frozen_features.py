"""Pretrain encoders in several ways, freeze them, and measure what a linear readout finds in whole cases.

    python benchmarks/frozen_features.py benchmarks/studies/frozen-hippocampus.json -o frozen-hippocampus --jobs 2

Each run pretrains one arm with one seed and probes it as ``nnssl_plugin evaluate probe`` does, for each number and draw
of labelled cases. A run that has finished stands in runs/; an interrupted study goes on with the same command. At the
end the folder holds result.json, table.md and two figures. Evaluation cases choose nothing.
"""

import argparse
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from copy import deepcopy
from multiprocessing.managers import BaseManager
from pathlib import Path

from frozen_study import (
    CAPTIONS,
    DATASET,
    Arm,
    Study,
    fork_context,
    label_draws,
    parts_of,
    prepare,
    preprocess,
    read_frozen_study,
    write_captions,
)
from study_steps import PLAN, environment

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VALIDATION = {"validation_iterations": 5}


def runs_of(study: Study, parts: int) -> list[tuple[Arm, int, int]]:
    """Arm, seed and part of each run, the important ones first and the seeds of all arms beside each other."""
    runs = [(arm, seed, part) for arm in study.arms for seed in range(arm.seeds) for part in range(parts)]
    return sorted(runs, key=lambda run: (run[0].priority + run[1], run[1], run[2]))


def run_file(folder: Path, arm: Arm, seed: int, part: int) -> Path:
    """Where a run is written."""
    return folder / "runs" / f"{arm.name}-seed{seed}-part{part}.json"


def work(study: Study, data: Path, folder: Path, device: str, waiting, until: float) -> None:
    """Carry out runs until none is left or the time is over; what fails is told and left (exit code 1)."""
    import_all(study, folder)
    import torch

    torch.set_num_threads(1)
    parts, failed = parts_of(study, data), 0
    while time.time() < until:
        _, run = waiting.get()
        if run is None:
            break
        arm, seed, part = run
        try:
            result = carry_out(study, parts[part], arm, seed, part, device)
        except Exception:
            traceback.print_exc()
            failed = 1
            continue
        write_json(run_file(folder, arm, seed, part), result)
        spent = f"{result['seconds_training']:.0f} + {result['seconds_probing']:.0f} s"
        five = {
            number: round(sum(sum(c) for c in d) / max(1, sum(map(len, d))), 3) for number, d in result["dice"].items()
        }
        print(f"{arm.name} seed {seed} part {part}: {spent}, Dice {five}", flush=True)
    sys.exit(failed)


def import_all(study: Study, folder: Path) -> None:
    """Set nnU-Net's folders and import what runs need, once for all processes that are forked."""
    os.environ |= environment(folder, one_thread=True) | {
        "nnUNet_n_proc_DA": "0",
        "MPLBACKEND": "Agg",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looks for a GPU without making it unusable for forked processes
    }
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnssl_plugin.features.voxels  # noqa: F401

    for trainer in {arm.trainer for arm in study.arms if arm.trainer}:
        recursive_find_trainer_class_by_name(trainer)


def mean_dice(dice: list[list[float]]) -> float:
    """Mean over draws and cases."""
    scores = [score for draw in dice for score in draw]
    return sum(scores) / len(scores)


def carry_out(study: Study, part_cases, arm: Arm, seed: int, part: int, device: str) -> dict:
    """Pretrain and probe one encoder; plain values for JSON."""
    import numpy as np
    import torch

    from nnssl_plugin.features.voxels import Draw, LabelledVoxels
    from nnssl_plugin.networks.backbone import Backbone
    from nnssl_plugin.nnunet.plans import build_network, dataset_folder, read_dataset_json, read_plan

    started = time.perf_counter()
    source = dataset_folder(DATASET)
    plans, dataset_json = read_plan(source, PLAN), read_dataset_json(source)
    torch.manual_seed(seed)
    network, log, snapshots = build_network(plans, study.configuration, dataset_json), {}, {}
    if arm.trainer is not None:
        network, log, snapshots = pretrain(study, arm, seed, part, plans, dataset_json, device)
    trained = time.perf_counter()
    drawn = label_draws(study, part_cases)
    draws = [Draw(cases) for of_number in drawn.values() for cases in of_number]
    few = drawn[study.labelled[min(1, len(study.labelled) - 1)]][0]
    used = sorted({case for draw in draws for case in draw.cases})
    scored = sorted({*part_cases.evaluation, *part_cases.tuning})
    voxels = LabelledVoxels(source, plans, study.configuration, dataset_json, [*used, *scored])

    def probe(state=None):
        if state is not None:
            network.load_state_dict(state)
        backbone = Backbone(network, len(dataset_json["channel_names"])).eval()
        readouts = voxels.fit(backbone, [*draws, Draw(few, shuffled=True)], device=device)
        dice = np.nanmean(voxels.dice(backbone, readouts, scored, device=device), axis=2).round(5)
        of_case = dict(zip(scored, dice.T, strict=True))
        taken, found = 0, {"ridge": [readout.ridge for readout in readouts]}
        for split in ("evaluation", "tuning"):
            cases = np.array([of_case[case] for case in getattr(part_cases, split)]).T
            found[split], taken = {}, 0
            for number, of_number in drawn.items():
                found[split][number] = cases[taken : taken + len(of_number)].tolist()
                taken += len(of_number)
            found[f"{split}_shuffled"] = cases[-1].tolist()
        return found

    found = probe()
    probed = time.perf_counter()
    return {
        "arm": arm.name,
        "seed": seed,
        "part": part,
        "cases": list(part_cases.evaluation),
        "dice": found["evaluation"],
        "tuning": found["tuning"],
        "shuffled": found["evaluation_shuffled"],
        "ridge": found["ridge"],
        "log": {name: [float(value) for value in series] for name, series in log.items()},
        "snapshots": {str(step): probe(state) for step, state in snapshots.items()},
        "seconds_training": trained - started,
        "seconds_probing": probed - trained,
    }


def pretrain(study: Study, arm: Arm, seed: int, part: int, plans: dict, dataset_json: dict, device: str):
    """The pretrained network of the plan, the training's log, and states of the network on the way."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    plans = deepcopy(plans) | {"plans_name": f"{PLAN}-{arm.name}-seed{seed}", "continue_training": False}
    if arm.captions:
        plans["dataset_name"] = CAPTIONS[arm.captions]
    block = plans["pretraining"] = {"seed": seed, "method": {}} | VALIDATION
    for key, value in (study.pretraining | arm.edits).items():
        name, _, own = key.partition(".")
        target, name = (block["method"], own) if own else (block, name)
        target[name] = value
    trainer_class = recursive_find_trainer_class_by_name(arm.trainer)
    trainer = trainer_class(plans, study.configuration, part, dataset_json, torch.device(device))
    trainer.disable_checkpointing = True
    trainer.pictures_are_due, trainer._draw = lambda: False, lambda views, kind: None
    trainer.initialize()
    task, weights = trainer.task, trainer.task.weights
    task.weights = lambda progress: weights(progress) | arm.terms
    snapshots, ended = {}, trainer.on_epoch_end

    def on_epoch_end():
        ended()
        if trainer.step in arm.snapshots:
            snapshots[trainer.step] = {
                k: v.detach().cpu().clone() for k, v in trainer.saved_network().state_dict().items()
            }

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    network = trainer.saved_network()
    network.requires_grad_(False)
    log = {name: series for name, series in trainer.log.history().items() if series}
    return network, log, snapshots


def carry_out_study(study_file: Path, folder: Path, *, data: Path, jobs: int, device: str, seconds: float) -> int:
    """Prepare, run what is left, and write the results; 1 where a run failed."""
    from frozen_results import write_results

    started = time.time()
    study = read_frozen_study(study_file)
    prepare(study, data, folder)
    import_all(study, folder)
    preprocess(study, folder, jobs=jobs)
    (folder / "runs").mkdir(exist_ok=True)
    runs = list(enumerate(runs_of(study, max(1, study.cases.parts))))
    left = [(place, run) for place, run in runs if not run_file(folder, *run).exists()]
    waiting = _queue()
    arguments = (study, data, folder, device, waiting, started + seconds)
    context = _context(device)
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(min(jobs, len(left)))]
    for worker in workers:
        worker.start()
    for entry in left:
        if not entry[1][0].captions:
            waiting.put(entry)
    for entry in _captioned(study, data, folder, left, device):  # while the others run
        waiting.put(entry)
    for number in range(jobs):
        waiting.put((len(runs) + number, None))
    for worker in workers:
        worker.join()
    done = [read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    print(f"{len(done)} of {len(runs)} runs are done.")
    write_results(study, done, folder, study_file=study_file, device=device, jobs=jobs)
    return int(any(worker.exitcode for worker in workers))


def _captioned(study: Study, data: Path, folder: Path, left: list, device: str) -> list:
    """The runs that need captions, once there are some; none where that fails, which is told."""
    runs = [entry for entry in left if entry[1][0].captions]
    try:
        if runs:
            write_captions(study, data, folder, device=device)
    except UserError as error:
        print(f"No captions: {error}", flush=True)
        return []
    return runs


def _context(device: str):
    """Forked workers, which import nothing anew, unless something has touched CUDA before the fork."""
    forked = fork_context()
    if device == "cpu":
        return forked
    trial = forked.Process(target=_use_cuda)
    trial.start()
    trial.join()
    return forked if trial.exitcode == 0 else multiprocessing.get_context("spawn")


def _use_cuda() -> None:
    import torch

    torch.zeros(1, device="cuda")


class _Queues(BaseManager):
    """Holds the queue from which all workers take what comes first."""


_Queues.register("PriorityQueue", queue.PriorityQueue)


def _queue():
    manager = _Queues(ctx=fork_context())
    manager.start()
    waiting = manager.PriorityQueue()
    waiting.manager = manager  # lives as long as the queue
    return waiting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a file as benchmarks/studies/frozen-hippocampus.json")
    parser.add_argument("-o", required=True, type=Path, metavar="DIR", help="folder of the study")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data (default: ../shared/data)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))  # the workers end with this process
    return carry_out_study(
        args.study,
        args.o.resolve(),
        data=args.data.resolve(),
        jobs=args.jobs,
        device=args.device,
        seconds=args.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
