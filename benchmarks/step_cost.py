"""What a pretraining step costs: over the networks that the method defines, over the planned network, and by part.

    python benchmarks/step_cost.py -d 501 -tr Med3DInsightPretrainer -p nnUNetPlans nnUNetPlans-paper --output cost.json
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py -d 501 -tr Med3DInsightPretrainer --rounds 5 --clock process

The trainer is the real one, on a dataset that is planned, preprocessed and captioned; its results go to a temporary
folder. In every round these are timed one after the other on the same batch:

    step       data, views, forward, backward, clipping, update and after_step, as in training
    floor      forward and backward of every network that the method calls (backbone, heads), and forward of those that
               are frozen (teachers), on the inputs that they get in encode, with a trivial loss
    backbone   the same of the calls into backbones alone
    bare       forward and backward of the planned network on the same patches

Ratios are medians of the ratios round by round, which holds where the machine's speed drifts; where other programs
share the processor, ``--clock process`` counts this process's own seconds (take one thread: those of all are added
up). Parts are shares of the step: heads = floor - backbone; objective = forward and backward of the whole task - floor
(of S2DC: the correspondences and the losses). Batches are made in this process (no workers), so the share of data is
what training waits for at worst. Below the table stands what one step asks of the device: operators on a CPU; launches,
milliseconds of kernels and waits of the host on CUDA.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_work import work_of
from torch import Tensor, nn

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.networks.backbone import Backbone

TRAIN = 0
WARM_UP = 1
"""Rounds that are thrown away: the first allocates, and compiles where compiling is on."""
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
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


@dataclass(frozen=True)
class Call:
    """One call into a network, to be made again."""

    network: nn.Module
    function: Callable
    inputs: tuple
    options: dict[str, Any]

    @property
    def trained(self) -> bool:
        """Whether the network learns; a teacher does not."""
        return any(parameter.requires_grad for parameter in self.network.parameters())

    def again(self) -> Tensor:
        """Make the call, and return a scalar that depends on everything that came out."""
        with torch.set_grad_enabled(self.trained):
            results = self.function(self.network, *self.inputs, **self.options)
            return sum(result.float().mean() for result in _tensors(results))


class RecordedCalls:
    """The calls that a method makes into networks during one ``encode``, to be made again on their own.

    Calls within calls are not recorded: a head counts as one, and so does ``Backbone.features``, of a student as of a
    teacher, whether through ``Teacher.module`` or ``Teacher.forward``.
    """

    def __init__(self, task, views: dict[str, Tensor]):
        self.calls: list[Call] = []
        self._depth = 0
        with self._recording():
            task.encode(views)

    def replay(self, kind: type[nn.Module] = nn.Module) -> Tensor:
        """Make the calls into networks of a kind again; a scalar that depends on everything that is trained."""
        values = [(call.trained, call.again()) for call in self.calls if isinstance(call.network, kind)]
        return sum(value for trained, value in values if trained)

    @contextmanager
    def _recording(self):
        entries = ((Backbone, "features"), (Backbone, "kept_tokens"), (Backbone, "decode"), (nn.Module, "__call__"))
        originals = [(owner, name, getattr(owner, name)) for owner, name in entries]
        for owner, name, original in originals:
            setattr(owner, name, self._recorder(original))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _recorder(self, original: Callable) -> Callable:
        def call(network: nn.Module, *inputs, **options):
            if self._depth == 0:
                self.calls.append(Call(network, original, _leaves(inputs), _leaves(options)))
            self._depth += 1
            try:
                return original(network, *inputs, **options)
            finally:
                self._depth -= 1

        return call


def _leaves(value: Any) -> Any:
    """Tensors cut off from what made them, which still ask for a gradient where they did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _leaves(each) for key, each in value.items()}
    return type(value)(map(_leaves, value)) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


class Round:
    """One batch, timed in every way."""

    def __init__(self, trainer, device: str, clock: str):
        self.trainer, self.device, self.clock = trainer, device, CLOCKS[clock]
        self.times: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Seconds by name."""
        trainer, task = self.trainer, self.trainer.task
        started = self._now()
        self.batch = next(trainer.dataloader_train)
        self.times["data"] = self._now() - started
        trainer.train_step(self.batch)  # what follows the bare network asks the system for memory anew, which is slow
        self._time("step", lambda: trainer.train_step(self.batch))
        self.views = trainer._views(self.batch, TRAIN, trainer.step)
        self._time("views", lambda: trainer._views(self.batch, TRAIN, trainer.step))
        with trainer.precision():
            calls = RecordedCalls(task, self.views)
        self._time("floor", lambda: self._backward(calls.replay))
        self._time("backbone", lambda: self._backward(lambda: calls.replay(Backbone)))
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
        return self.clock()

    def _backward(self, forward: Callable[[], Tensor]) -> None:
        with self.trainer.precision():
            total = forward()
        total.backward()

    def _bare(self) -> Tensor:
        patch = self.trainer.configuration_manager.patch_size
        backbone = self.trainer.task.backbone
        image = self.batch["image"][:, : backbone.input_channels].to(self.trainer.device)
        network = backbone.network.requires_grad_(True)
        return network(image[(..., *(slice(size) for size in patch))]).float().mean()


def measure(args: argparse.Namespace, plan_name: str) -> dict:
    """Setting, ratios, and the share of each part for one plan."""
    trainer = make_trainer(args, plan_name)
    frozen = [p for p in trainer.task.parameters() if not p.requires_grad]
    rounds = []
    for _ in range(args.rounds + WARM_UP):
        rounds.append(Round(trainer, args.device, args.clock).run())
        for parameter in frozen:  # the bare network was timed with everything trained
            parameter.requires_grad_(False)
    batch = next(trainer.dataloader_train)
    return summarise(rounds[WARM_UP:]) | {
        "work": work_of(lambda: trainer.train_step(batch), args.device),
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
        lines.append(
            [
                result["plan"],
                str(result["batch"]),
                "×".join(map(str, result["patch"])),
                f"{result['seconds']['step']:.3f}",
                f"{result['step_over_floor']:.3f}",
                f"{result['step_over_bare']:.3f}",
                *(f"{100 * result['shares'][name]:.1f}" for name in PARTS),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset that is planned, preprocessed and captioned")
    parser.add_argument("-tr", required=True, help="pretrainer")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="plans, timed one after the other")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of this process on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="JSON file for the numbers and their setting")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"nnUNet_results": scratch, "nnUNet_n_proc_DA": "0"}
        results = [measure(args, plan_name) for plan_name in args.p]
    print(table(results))
    for result in results:
        told = ", ".join(f"{name} {value:.4g}" for name, value in result["work"].items())
        print(f"{result['plan']}, one step: {told}")
    setting = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    clock = f"{args.clock} clock, {setting['threads']} threads"
    print(f"{args.tr}, {args.device}, {clock}, torch {torch.__version__}, {args.rounds} rounds")
    if args.output:
        write_json(args.output, {"setting": setting, "results": results})


if __name__ == "__main__":
    main()
