"""Memory of a pretraining step, method by method: measured on CUDA, counted on a CPU.

    python benchmarks/method_memory.py -d 501 -device cuda MAEPretrainer:mae LVMMedPretrainer:lvm-med:2d
    OMP_NUM_THREADS=1 python benchmarks/method_memory.py -d 501 MAEPretrainer:mae

Each method is TRAINER:PLAN or TRAINER:PLAN:CONFIGURATION, on a dataset that is planned, preprocessed and captioned.
The trainer is the real one, and takes a real step. In GiB:

    held    weights, teachers, buffers and the optimiser's moments, which stay between steps
    step    the most that a step holds beside them: views, maps, gradients of the weights
    bare    the same of forward and backward of the planned network on the plan's patches, as many as the step has cases

Measured is what PyTorch's allocator gave out, in the trainer's mixed precision. Counted are the storages that operators
make, in float32, as ``benchmarks/memory.py`` counts them; what an operator needs for itself is not.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from memory import GIB, LiveStorages
from step_cost import make_trainer

from nnssl_plugin.io.files import write_json


@dataclass(frozen=True)
class Row:
    """What one method needs, in GiB."""

    trainer: str
    plan: str
    network: str
    patch: tuple[int, ...]
    batch: int
    parameters: float  # millions, teachers included
    held: float
    step: float
    bare: float


def peak_gib(work: Callable[[], object], device: str) -> float:
    """The most that a piece of work holds beside what was there before it."""
    if device != "cuda":
        with LiveStorages() as storages:
            work()
        return storages.peak / GIB
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def bytes_of(tensors) -> int:
    """Of the storages of tensors, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def held_gib(trainer) -> float:
    """Weights, buffers and the optimiser's state."""
    moments = (each for state in trainer.optimizer.state.values() for each in state.values())
    tensors = [*trainer.task.parameters(), *trainer.task.buffers(), *filter(torch.is_tensor, moments)]
    return bytes_of(tensors) / GIB


def bare_step(trainer, cases: int) -> Callable[[], None]:
    """Forward and backward of the planned network."""
    backbone = trainer.task.backbone
    network = backbone.network.requires_grad_(True)
    image = torch.zeros(cases, backbone.input_channels, *trainer.configuration_manager.patch_size)
    image = image.to(trainer.device)

    def work() -> None:
        with trainer.precision():
            results = network(image)
            results = results if isinstance(results, list | tuple) else [results]
            total = sum(each.float().mean() for each in results)
        total.backward()

    return work


def measure(args: argparse.Namespace, trainer_name: str, plan: str, configuration: str = "3d_fullres") -> Row:
    """One method's numbers, from its second step."""
    wanted = argparse.Namespace(d=args.d, tr=trainer_name, c=configuration, device=args.device)
    trainer = make_trainer(wanted, plan)
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    trainer.optimizer.zero_grad(set_to_none=True)
    held = held_gib(trainer)
    step = peak_gib(lambda: trainer.train_step(batch), args.device)
    trainer.optimizer.zero_grad(set_to_none=True)
    cases = len(batch["image"])
    bare = bare_step(trainer, cases)
    if args.device == "cuda":
        bare()  # chooses its convolutions
        trainer.task.zero_grad(set_to_none=True)
    return Row(
        trainer=trainer_name,
        plan=plan,
        network=type(trainer.task.backbone.network).__name__,
        patch=tuple(trainer.configuration_manager.patch_size),
        batch=cases,
        parameters=sum(each.numel() for each in trainer.task.parameters()) / 1e6,
        held=held,
        step=step,
        bare=peak_gib(bare, args.device),
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| trainer | network, patch | batch | parameters | held | step | bare network |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = f"{row.parameters:.1f} M | {row.held:.2f} | {row.step:.2f} | {row.bare:.2f}"
        size = "×".join(map(str, row.patch))
        lines.append(f"| `{row.trainer}` | {row.network}, {size} | {row.batch} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", help="TRAINER:PLAN or TRAINER:PLAN:CONFIGURATION")
    parser.add_argument("-d", required=True, help="dataset that is planned, preprocessed and captioned")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", help="JSON file for the numbers, written after every method")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"nnUNet_results": scratch, "nnUNet_n_proc_DA": "0"}
        for method in args.methods:
            rows.append(measure(args, *method.split(":")))
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if args.output:
                setting = {"device": args.device, "torch": torch.__version__}
                write_json(args.output, {"setting": setting, "rows": [asdict(row) for row in rows]})
    print(table(rows))
    print(f"GiB, {'measured on ' + torch.cuda.get_device_name() if args.device == 'cuda' else 'counted, float32'}")


if __name__ == "__main__":
    main()
