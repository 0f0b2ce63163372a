"""A step of MAE beside that of MIC-DKFZ/nnssl: the same network (ResEnc-L), patch and batch, in one run.

    python benchmarks/beside_nnssl.py -device cuda --patch 160 160 160 --batch 2
    OMP_NUM_THREADS=1 python benchmarks/beside_nnssl.py --patch 64 64 64 --batch 1 --rounds 5

Needs nnssl: pip install git+https://github.com/MIC-DKFZ/nnssl (it is no dependency of this package).

Both trainers are the real ones with nnssl's settings (preset ``mae-openmind``); both are handed the same batch,
which lies in the memory of this process (pinned on CUDA), so that reading is not timed. In every round these are timed
one after the other, and the medians of their ratios to nnssl are told:

    nnssl        its BaseMAETrainer.train_step
    ours         MAEPretrainer.train_step
    ours, fast   the same with pretraining.fast
    network      forward and backward of the bare network

On a CPU the process's own seconds are counted, on CUDA those of the wall, with the device waited for.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from fast_blocks import BLOCKS, FEATURES
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.nnunet.plan_edits import read_preset

NAME = "Dataset001_Beside"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnssl_raw", "nnssl_preprocessed", "nnssl_results")


def their_trainer(args: argparse.Namespace):
    """nnssl's, initialised."""
    from nnssl.experiment_planning.experiment_planners.plan import ConfigurationPlan, Plan
    from nnssl.training.nnsslTrainer.masked_image_modeling.BaseMAETrainer import BaseMAETrainer

    resampling = ("resample_data_or_seg_to_shape", {})
    planned = ConfigurationPlan(
        "onemmiso", "DefaultPreprocessor", "onemmiso", ["ZScoreNormalization"], [False], *resampling, *resampling
    )
    planned.spacing, planned.patch_size = [1, 1, 1], list(args.patch)
    axes = [0, 1, 2]
    plan = Plan(NAME, "nnsslPlans", [1.0] * 3, "NibabelIO", axes, axes, {"onemmiso": planned}, "benchmark")
    trainer = BaseMAETrainer(plan, "onemmiso", 0, {}, torch.device(args.device))
    trainer.config_plan.patch_size = tuple(args.patch)  # its constructor sets 160
    trainer.total_batch_size = args.batch
    trainer.initialize()
    trainer.network.train()
    return trainer


def our_trainer(args: argparse.Namespace, *, fast: bool):
    """``MAEPretrainer``, initialised, with nnssl's settings."""
    from nnssl_plugin.methods.mae.trainer import MAEPretrainer

    cases = Path(os.environ["nnUNet_preprocessed"], NAME, "cases")
    cases.mkdir(parents=True, exist_ok=True)
    (cases / "none.b2nd").touch()  # nnU-Net looks at the names of the files
    block = read_preset("mae-openmind")["pretraining"] | {"batch_size": args.batch, "fast": fast}
    labels = {"background": 0, "body": 1}
    dataset = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    trainer = MAEPretrainer(
        plan_of(args) | {"pretraining": block}, "3d_fullres", "all", dataset, torch.device(args.device)
    )
    trainer.initialize()
    trainer.network.train()
    return trainer


def plan_of(args: argparse.Namespace) -> dict:
    """A plan with nnssl's ResEnc-L."""
    stages = len(FEATURES)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(FEATURES),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_blocks_per_stage": list(BLOCKS),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": list(args.patch),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "benchmark",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
        "configurations": {
            "3d_fullres": {
                "data_identifier": "cases",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": args.batch,
                "patch_size": list(args.patch),
                "spacing": [1.0] * 3,
                "median_image_size_in_voxels": list(args.patch),
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "batch_dice": False,
                "architecture": architecture,
            }
        },
    }


def our_batch(image: torch.Tensor) -> dict:
    """The batch that a loader would bring, of cases as large as the patch."""
    size = torch.tensor([list(image.shape[2:])] * len(image), dtype=torch.float32)
    return {
        "image": image,
        "available": torch.ones(len(image), 1, dtype=torch.bool),
        "origin": torch.zeros_like(size),
        "case_shape": size,
        "kind": NAME,
    }


def bare(network: nn.Module, image: torch.Tensor, precision: Callable) -> None:
    """Forward and backward."""
    network.zero_grad(set_to_none=True)
    with precision():
        loss = network(image).float().square().mean()
    loss.backward()


def same_network(theirs: nn.Module, ours: nn.Module) -> None:
    """Refuse two networks whose weights differ in names or shapes, but in the layers that make labels of maps."""
    shapes = [
        {name: value.shape for name, value in each.state_dict().items() if "seg_layers" not in name}
        for each in (theirs, ours)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(
            "nnssl's ResEnc-L is not the network of this benchmark any more.", "Compare at its commit 7044864."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--patch", type=int, nargs=3, default=(160, 160, 160))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", help="JSON file for the numbers")
    args = parser.parse_args()
    if find_spec("nnssl") is None:
        raise UserError("nnssl is not installed.", "pip install git+https://github.com/MIC-DKFZ/nnssl")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {name: str(Path(scratch, name)) for name in FOLDERS} | {"nnUNet_compile": "f"}
        run(args)


def run(args: argparse.Namespace) -> None:
    """Time both and tell."""
    torch.backends.cudnn.benchmark = True  # as both commands do
    theirs, ours, fast = their_trainer(args), our_trainer(args, fast=False), our_trainer(args, fast=True)
    network = ours.task.backbone.network
    same_network(theirs.network, network)
    image = torch.randn(args.batch, 1, *args.patch)
    image = image.pin_memory() if args.device == "cuda" else image
    alone, on_device = copy.deepcopy(network), image.to(args.device)
    steps: dict[str, Callable[[], object]] = {
        "nnssl": lambda: theirs.train_step({"data": image}),
        "ours": lambda: ours.train_step(our_batch(image)),
        "ours, fast": lambda: fast.train_step(our_batch(image)),
        "network": lambda: bare(alone, on_device, ours.precision),
    }
    for step in steps.values():
        for _ in range(2):
            step()
    rounds = [{name: seconds(step, args.device) for name, step in steps.items()} for _ in range(args.rounds)]
    told = {}
    for name in steps:
        milliseconds = 1000 * statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each["nnssl"] for each in rounds)
        told[name] = {"ms": milliseconds, "of_nnssl": ratio}
        print(f"{name}: {milliseconds:.1f} ms, {ratio:.3f} of nnssl")
    setting = {**vars(args), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"ResEnc-L, patch {'×'.join(map(str, args.patch))}, batch {args.batch}, {args.device}, {args.rounds} rounds")
    if args.output:
        write_json(args.output, {"setting": setting, "results": told})


def seconds(step: Callable[[], object], device: str) -> float:
    """What a call takes."""
    started = now(device)
    step()
    return now(device) - started


def now(device: str) -> float:
    """Seconds of this process on a CPU; of the wall on CUDA, where all work that was asked for is done."""
    if device != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
