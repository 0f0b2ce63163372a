"""What a pretraining step costs: over the networks that the method defines, over the planned network, and by part.

    python benchmarks/step_cost.py -d 501 -tr Med3DInsightPretrainer -p nnUNetPlans nnUNetPlans-paper --output cost.json
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py -d 501 -tr Med3DInsightPretrainer --rounds 5

The trainer is the real one, on a dataset that is planned, preprocessed and captioned; its results go to a temporary
folder. In every round these are timed one after the other on the same batch:

    step       data, views, forward, backward, clipping, update and after_step, as in training
    floor      forward and backward of what the method encodes with, on the same views, with a trivial loss
    backbone   forward and backward of the calls into the backbone alone (a teacher's calls: forward)
    bare       forward and backward of the planned network on the same patches

Ratios are medians of the ratios round by round, which holds where the machine's speed drifts. Parts are shares of the
step: heads = floor - backbone; objective = forward and backward of the whole task - floor. Batches are made in this
process (no workers), so the share of data is what training waits for at worst.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nnssl_plugin.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone

TRAIN = 0
WARM_UP = 1
"""Rounds that are thrown away: the first allocates, and compiles where compiling is on."""
PARTS = ("data", "views", "backbone", "heads", "objective", "optimiser")


def make_trainer(args: argparse.Namespace, plan_name: str):
    """The initialised trainer, its loaders without workers."""
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = Path(str(nnUNet_preprocessed), maybe_convert_to_dataset_name(args.d))
    plans = read_json(folder / f"{plan_name}.json") | {"continue_training": False}
    trainer_class = recursive_find_trainer_class_by_name(args.tr)
    trainer = trainer_class(plans, args.c, "all", read_json(folder / "dataset.json"), torch.device(args.device))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    return trainer


class RecordedCalls:
    """The calls that a method makes into backbones during one ``encode``, to be made again on their own."""

    def __init__(self, task, views: dict[str, Tensor]):
        self._calls: list[tuple[Callable, tuple, dict, bool]] = []
        self._producer: dict[int, tuple[int, int]] = {}
        self._kept = []  # what was produced stays alive, so that no id comes twice
        with self._recording(), torch.no_grad():
            task.encode(views)

    @contextmanager
    def _recording(self):
        originals = {name: getattr(Backbone, name) for name in ("features", "decode")}
        for name, original in originals.items():
            setattr(Backbone, name, self._recorder(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(Backbone, name, original)

    def _recorder(self, original: Callable) -> Callable:
        def call(backbone: Backbone, given, **options):
            result = original(backbone, given, **options)
            trained = any(p.requires_grad for p in backbone.parameters())
            source = self._producer.get(id(given[0])) if isinstance(given, list) else None
            self._calls.append((original, (backbone, given if source is None else source), options, trained))
            first = result[0] if isinstance(result, list) else result
            self._producer[id(first)] = len(self._calls) - 1
            self._kept.append(result)
            return result

        return call

    def replay(self) -> Tensor:
        """Make the calls again and return a scalar that depends on everything that is trained."""
        results, total = [], 0.0
        for original, (backbone, given), options, trained in self._calls:
            with torch.set_grad_enabled(trained):
                results.append(original(backbone, results[given] if isinstance(given, int) else given, **options))
            if trained:
                maps = results[-1] if isinstance(results[-1], list) else [results[-1]]
                total = total + sum(m.float().mean() for m in maps)
        return total


class Round:
    """One batch, timed in every way."""

    def __init__(self, trainer, device: str):
        self.trainer, self.device = trainer, device
        self.times: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Seconds by name."""
        trainer, task = self.trainer, self.trainer.task
        started = self._now()
        self.batch = next(trainer.dataloader_train)
        self.times["data"] = self._now() - started
        self._time("step", lambda: trainer.train_step(self.batch))
        self.views = trainer._views(self.batch, TRAIN, trainer.step)
        self._time("views", lambda: trainer._views(self.batch, TRAIN, trainer.step))
        self._time("floor", self._floor)
        calls = RecordedCalls(task, self.views)
        self._time("backbone", lambda: self._backward(calls.replay))
        self._time("whole", lambda: trainer._backward(self.views, 0.0))
        total = torch.zeros((), device=trainer.device)
        self._time("optimiser", lambda: task.after_step(0.0, trainer._update(total)))
        self._time("bare", lambda: self._backward(self._bare))
        self.times["step"] += self.times["data"]
        return self.times

    def _time(self, name: str, work: Callable[[], object]) -> None:
        self.trainer.optimizer.zero_grad(set_to_none=name != "optimiser")
        started = self._now()
        work()
        self.times[name] = self._now() - started

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _backward(self, forward: Callable[[], Tensor]) -> None:
        with self.trainer._precision():
            total = forward()
        total.backward()

    def _floor(self) -> None:
        def forward() -> Tensor:
            outputs, own = self.trainer.task.encode(self.views)
            return sum(v.float().mean() for v in [*outputs.values(), *own.values()] if v.requires_grad)

        self._backward(forward)

    def _bare(self) -> Tensor:
        patch = self.trainer.configuration_manager.patch_size
        image = self.batch["image"].to(self.trainer.device)
        network = self.trainer.task.backbone.network.requires_grad_(True)
        return network(image[(..., *(slice(size) for size in patch))]).float().mean()


def measure(args: argparse.Namespace, plan_name: str) -> dict:
    """Setting, ratios, and the share of each part for one plan."""
    trainer = make_trainer(args, plan_name)
    frozen = [p for p in trainer.task.parameters() if not p.requires_grad]
    rounds = []
    for _ in range(args.rounds + WARM_UP):
        rounds.append(Round(trainer, args.device).run())
        for parameter in frozen:  # the bare network was timed with everything trained
            parameter.requires_grad_(False)
    return summarise(rounds[WARM_UP:]) | {
        "plan": plan_name,
        "batch": trainer.batch_size,
        "patch": list(trainer.configuration_manager.patch_size),
        "features": list(trainer.task.backbone.channels),
        "peak_memory_gib": trainer.log.peak_memory(trainer.device),
    }


def summarise(rounds: list[dict[str, float]]) -> dict:
    """Medians over the rounds."""

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    parts = {
        "heads": lambda r: r["floor"] - r["backbone"],
        "objective": lambda r: r["whole"] - r["floor"],
    } | {name: lambda r, name=name: r[name] for name in ("data", "views", "backbone", "optimiser")}
    return {
        "seconds": {name: median(lambda r, name=name: r[name]) for name in ("step", "floor", "backbone", "bare")},
        "step_over_floor": median(lambda r: r["step"] / r["floor"]),
        "step_over_bare": median(lambda r: r["step"] / r["bare"]),
        "shares": {name: median(lambda r, name=name: parts[name](r) / r["step"]) for name in PARTS},
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    header = ["plan", "batch", "patch", "step (s)", "step / floor", "step / bare", *(f"{name} %" for name in PARTS)]
    lines = [header, ["---"] * len(header)]
    for result in results:
        lines.append([
            result["plan"], str(result["batch"]), "×".join(map(str, result["patch"])),
            f"{result['seconds']['step']:.3f}", f"{result['step_over_floor']:.3f}", f"{result['step_over_bare']:.3f}",
            *(f"{100 * result['shares'][name]:.1f}" for name in PARTS),
        ])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset that is planned, preprocessed and captioned")
    parser.add_argument("-tr", required=True, help="pretrainer")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="plans, timed one after the other")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"nnUNet_results": scratch, "nnUNet_n_proc_DA": "0"}
        results = [measure(args, plan_name) for plan_name in args.p]
    print(table(results))
    setting = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{args.tr}, {args.device}, {setting['threads']} threads, torch {torch.__version__}, {args.rounds} rounds")
    if args.output:
        write_json(args.output, {"setting": setting, "results": results})


if __name__ == "__main__":
    main()
