"""How near do BrainMVP's templates come to the mean of their modality?

    python benchmarks/template_means.py -o means --features 8 --epochs 8          # on phantoms; goes on where it was

Heads of four modalities are prepared, planned, preprocessed and pretrained on through the package's own commands, below
the folder; windows are smaller than the heads. ``results.json`` holds for each modality the correlation (Pearson) of
its template with the mean of the preprocessed cases, each where the template lies on it: over all voxels, within the
head (voxels that are head in half of the cases), and there after the mean of 3 x 3 x 3 voxels of both. The control is
the mean correlation of two cases within the head. ``templates.png`` shows the middle slice of mean and template.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NAMES = ("T1", "T1CE", "T2", "FLAIR")
ID, DATASET, CONFIGURATION, PLAN = "908", "Dataset908_Means", "3d_fullres", "means"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, metavar="DIR", help="folder for everything")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1, help="of the heads")
    parser.add_argument("--size", type=int, nargs=3, default=(24, 28, 24), help="of a head in voxels")
    parser.add_argument("--patch", type=int, default=16, help="edge of a window in voxels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--features", type=int, help="of the network's first stage; without it nnU-Net's")
    parser.add_argument("--stages", type=int, default=3, help="of the network; its last features 2^(stages - 1) times")
    parser.add_argument("--epochs", type=int, default=8, help="of 250 steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="further settings of the plan")
    args = parser.parse_args(arguments)
    root = Path(args.o).resolve()
    _set_environment(root)
    _dataset(root, args)
    _plan(args)
    checkpoint = _trained(args)
    result = measured(checkpoint)
    from nnssl_plugin.io.files import write_json

    write_json(root / "results.json", {"settings": vars(args), **result})
    draw(checkpoint, root / "templates.png")
    print(table(result))


def table(result: dict) -> str:
    """A row for each modality."""
    columns = ("all", "head", "head_smoothed", "two_cases")
    lines = [f"| modality | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, values in result["correlation"].items():
        lines.append(f"| {name} | {' | '.join(f'{values[column]:.3f}' for column in columns)} |")
    return "\n".join(lines)


def measured(checkpoint: Path) -> dict:
    """Steps of the run, and the correlations of each modality."""
    import torch
    from scipy.ndimage import uniform_filter

    from nnssl_plugin.checkpoints.format.spatial_arrays import read_spatial_arrays

    templates = read_spatial_arrays(checkpoint)["templates"]
    images = _images()
    placed = _on_grid(images, templates.grid)
    mean = placed.mean(0)
    anatomy = [(image != image[:, :1, :1, :1]).astype(np.float32) for image in images]  # a corner lies in no head
    head = _on_grid(anatomy, templates.grid).mean((0, 1)) >= 0.5
    found = {}
    for number, name in enumerate(templates.names):
        learned = templates.values[number].numpy()
        of_cases = np.corrcoef(placed[:, number][:, head])
        found[name] = {
            "all": _correlation(learned, mean[number]),
            "head": _correlation(learned[head], mean[number][head]),
            "head_smoothed": _correlation(uniform_filter(learned, 3)[head], uniform_filter(mean[number], 3)[head]),
            "two_cases": float(of_cases[np.triu_indices(len(of_cases), 1)].mean()),
        }
    step = torch.load(checkpoint, map_location="cpu", weights_only=True)["ssl_state"]["step"]
    return {"steps": step, "correlation": found}


def draw(checkpoint: Path, path: Path) -> None:
    """Middle slice, in axial view, of the mean of each modality (above) and of its template (below)."""
    from matplotlib.figure import Figure

    from nnssl_plugin.checkpoints.format.spatial_arrays import read_spatial_arrays

    templates = read_spatial_arrays(checkpoint)["templates"]
    mean = _on_grid(_images(), templates.grid).mean(0)
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.subplots(2, len(templates.names))
    for column, name in enumerate(templates.names):
        for row, (title, volume) in enumerate((("mean", mean[column]), ("template", templates.values[column].numpy()))):
            middle = volume[volume.shape[0] // 2]
            low, high = np.percentile(middle, (1, 99))
            axes[row, column].imshow(middle, cmap="gray", origin="lower", vmin=low, vmax=high)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
            axes[row, column].set_title(f"{name}, {title}", fontsize=8)
    figure.savefig(path, dpi=110)


def _on_grid(images: Sequence[np.ndarray], grid: Sequence[int]) -> np.ndarray:
    """Cases (C, *shape) where the templates lie on them, (N, C, *grid), 0 beside them.

    Not ``on_case(image, grid)``: where grid and case differ by an odd number, that is a voxel beside.
    """
    import torch

    from nnssl_plugin.transforms.placement import centre_offset, cut_placed

    placed = []
    for image in images:
        shape = image.shape[1:]
        before = [-first for first in centre_offset(grid, shape)]
        placed.append(cut_placed(torch.from_numpy(image), before, grid, shape).numpy())
    return np.stack(placed)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def _set_environment(root: Path) -> None:
    """Before nnU-Net is imported."""
    from nnssl_plugin.cli.env import VARIABLE, search_path

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    os.environ.setdefault(VARIABLE, search_path())


def _preprocessed() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], DATASET)


def _images() -> list[np.ndarray]:
    """The preprocessed cases (C, *shape)."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    dataset = nnUNetDatasetBlosc2(str(_preprocessed() / f"nnUNetPlans_{CONFIGURATION}"))
    return [np.asarray(dataset.load_case(name)[0][:]) for name in dataset.identifiers]


def _dataset(root: Path, args: argparse.Namespace) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    from nnssl_plugin.quickstart.phantoms import write_heads

    done = _preprocessed() / "preprocessed"
    if done.exists():
        return
    write_heads(root / "scans", args.cases, seed=args.seed, shape=args.size, spacing_mm=[144 / n for n in args.size])
    patterns = [f"{name}={name}.nii.gz" for name in NAMES]
    words = ["--modalities", *patterns, "--cases-by", "folder", "--keep", "-np", "1"]
    _plugin("prepare", "-i", str(root / "scans"), "-d", ID, "-n", "Means", *words)
    extract_fingerprints([int(ID)], num_processes=1)
    plan_experiments([int(ID)])
    preprocess([int(ID)], configurations=(CONFIGURATION,), num_processes=(1,))
    done.touch()


def _plan(args: argparse.Namespace) -> None:
    from nnssl_plugin.io.files import read_json

    if (_preprocessed() / f"{PLAN}.json").is_file():
        return
    planned = read_json(_preprocessed() / "nnUNetPlans.json")["configurations"][CONFIGURATION]["architecture"]
    first = args.features or planned["arch_kwargs"]["features_per_stage"][0]
    network = {
        "n_stages": args.stages,
        "features_per_stage": [first * 2**stage for stage in range(args.stages)],
        "kernel_sizes": [[3, 3, 3]] * args.stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (args.stages - 1)],
        "n_conv_per_stage": [1] * args.stages,
        "n_conv_per_stage_decoder": [1] * (args.stages - 1),
    }
    kwargs = f"configurations.{CONFIGURATION}.architecture.arch_kwargs"
    settings = [f"{kwargs}.{key}={value}" for key, value in network.items()]
    settings += [f"configurations.{CONFIGURATION}.patch_size={[args.patch] * 3}"]
    settings += [f"epochs={args.epochs}", "iterations_per_epoch=250", "validation_iterations=2"]
    settings += [f"batch_size={args.batch}", "lr=0.001"]
    _plugin("plan", "-d", ID, "-n", PLAN, "--preset", "brainmvp", "--set", *settings, *args.set)


def _trained(args: argparse.Namespace) -> Path:
    """The final checkpoint of the pretraining, which goes on where it was."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    name = "BrainMVPPretrainer"
    folder = Path(os.environ["nnUNet_results"], DATASET, f"{name}__{PLAN}__{CONFIGURATION}", "fold_all")
    if not (folder / "checkpoint_final.pth").is_file():
        os.environ.setdefault("nnUNet_n_proc_DA", "0")
        begun = (folder / "checkpoint_latest.pth").is_file()
        trainer = get_trainer_from_args(ID, CONFIGURATION, "all", name, PLAN, begun, torch.device(args.device))
        maybe_load_checkpoint(trainer, begun, False)
        trainer.run_training()
    return folder / "checkpoint_final.pth"


def _plugin(*words: str) -> None:
    from nnssl_plugin.cli.main import main as plugin

    if plugin(list(words)):
        raise SystemExit(f"nnssl_plugin {' '.join(words)} failed.")


if __name__ == "__main__":
    main()
