"""What does a missing modality cost at test time, and what does a stand-in give back?

    python benchmarks/missing_modality.py -o missing            # on phantoms of four modalities; goes on where it was

Everything happens below the folder: phantoms, nnU-Net's folders, trainings, ``results.json``. Per seed one pretraining
by MAE and one by BrainMVP, equal in steps, and fine-tunings of equal steps on a few labelled cases:

    scratch    from random weights        → PretrainedSegmentationTrainer
    mae        from MAE's weights         → PretrainedSegmentationTrainer
    plain      from BrainMVP's weights    → PretrainedSegmentationTrainer
    brainmvp   from BrainMVP's weights    → BrainMVPSegmentationTrainer (each step takes its batch twice)

Test cases are predicted with all modalities, and with each modality withheld and filled in by zeros, the mean image,
or the template of that seed's BrainMVP. Reported is the Dice coefficient, mean over labels, cases and the modality
that is withheld, for each seed. ``--table`` prints the results as a table in Markdown.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

NAMES = ("T1", "T1CE", "T2", "FLAIR")
ID, DATASET = "907", "Dataset907_Missing"
CONFIGURATION = "3d_fullres"
ARMS = {
    "scratch": (None, "PretrainedSegmentationTrainer"),
    "mae": ("mae", "PretrainedSegmentationTrainer"),
    "plain": ("brainmvp", "PretrainedSegmentationTrainer"),
    "brainmvp": ("brainmvp", "BrainMVPSegmentationTrainer"),
}
PRETRAINERS = {"mae": "MAEPretrainer", "brainmvp": "BrainMVPPretrainer"}
FILLERS = ("zeros", "mean", "template")
GRID = {"shape": (24, 32, 32), "spacing_mm": (6.0, 5.0, 5.0)}
TRAINING_CASES, TEST_CASES = 16, 6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, metavar="DIR", help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining-steps", type=int, default=300)
    parser.add_argument("--finetuning-steps", type=int, default=120)
    parser.add_argument("--labelled", type=int, default=6, help="cases that fine-tuning sees")
    parser.add_argument("--features", type=int, default=6, help="of the network's first stage")
    parser.add_argument("--table", action="store_true", help="print what results.json holds, and end")
    args = parser.parse_args(arguments)
    if args.table:
        from nnssl_plugin.io.files import read_json

        print(table(read_json(Path(args.o, "results.json"))["dice"]))
        return
    root = Path(args.o).resolve()
    _set_environment(root)
    print(table(Benchmark(root, args).run()))


def table(dice: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows: arms; columns: what is shown; mean over the seeds and, in brackets, the lowest and highest of them."""
    columns = ("all", *FILLERS)
    lines = [f"| fine-tuning | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for arm in ARMS:
        seeds = [dice[seed][arm] for seed in sorted(dice) if arm in dice[seed]]
        shown = [[of_seed[column] for of_seed in seeds] for column in columns]
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in shown if v]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _set_environment(root: Path) -> None:
    """Before nnU-Net is imported."""
    from nnssl_plugin.cli.env import VARIABLE, search_path

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(root / name)
    os.environ |= {VARIABLE: search_path(), "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}


class Benchmark:
    """All steps of the benchmark; each is left out where its result is there."""

    def __init__(self, root: Path, args: argparse.Namespace):
        from nnssl_plugin.io.files import read_json

        self.root, self.args = root, args
        self.file = root / "results.json"
        self.results = read_json(self.file) if self.file.is_file() else {"settings": self._settings(), "dice": {}}
        if self.results["settings"] != self._settings():
            raise SystemExit(f"{self.file} was measured with other settings: choose another folder.")

    def run(self) -> dict:
        """Dice by seed, arm and what is shown."""
        self._dataset()
        os.environ["nnUNet_n_proc_DA"] = "0"  # planning fails on it
        for seed in self.args.seeds:
            for arm in ARMS:
                if arm not in self.results["dice"].get(str(seed), {}):
                    self._arm(seed, arm)
        return self.results["dice"]

    def _settings(self) -> dict:
        return {
            "pretraining_steps": self.args.pretraining_steps,
            "finetuning_steps": self.args.finetuning_steps,
            "labelled": self.args.labelled,
            "features": self.args.features,
            "training_cases": TRAINING_CASES,
            "test_cases": TEST_CASES,
        }

    def _arm(self, seed: int, arm: str) -> None:
        from nnssl_plugin.io.files import write_json

        weights, trainer = ARMS[arm]
        plan = f"small-{seed}-{weights or 'scratch'}"
        adapted = self._preprocessed() / f"{plan}.json"
        if not adapted.is_file():
            source = ["-w", str(self._pretrained(seed, weights))] if weights else ["--from-scratch"]
            _plugin("adapt", "-d", ID, "-p", self._plan(seed), "-n", weights or "scratch", *source)
        model = _trained(f"{plan}", "0", trainer)
        self.results["dice"].setdefault(str(seed), {})[arm] = self._measured(model, seed)
        write_json(self.file, self.results)

    def _plan(self, seed: int, method: str | None = None) -> str:
        """The plan of a seed; with the settings of a pretraining, where one is named."""
        from nnssl_plugin.io.files import read_json

        name = f"small-{seed}" + (f"-for-{method}" if method else "")
        if (self._preprocessed() / f"{name}.json").is_file():
            return name
        planned = read_json(self._preprocessed() / "nnUNetPlans.json")["configurations"][CONFIGURATION]
        stages = len(planned["architecture"]["arch_kwargs"]["features_per_stage"])
        features = [self.args.features * 2**stage for stage in range(stages)]
        steps = self.args.finetuning_steps // 4
        settings = [f"configurations.{CONFIGURATION}.architecture.arch_kwargs.features_per_stage={features}"]
        settings += [f"finetuning.{key}={value}" for key, value in (("epochs", 4), ("iterations_per_epoch", steps))]
        settings += [f"finetuning.seed={seed}", "finetuning.validation_iterations=1", "finetuning.optimiser=adamw"]
        settings += ["finetuning.lr=0.001", "finetuning.weight_decay=0.0001"]
        if method:
            steps = self.args.pretraining_steps // 5
            settings += ["epochs=5", f"iterations_per_epoch={steps}", "validation_iterations=1", "warmup_epochs=0"]
            settings += ["lr=0.001", "batch_size=2", f"seed={seed}"]
        preset = ["--preset", method] if method else []
        _plugin("plan", "-d", ID, "-n", name, *preset, "--set", *settings)
        return name

    def _pretrained(self, seed: int, method: str) -> Path:
        return _trained(self._plan(seed, method), "all", PRETRAINERS[method])

    # ------------------------------------------------------------------ data

    def _preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / DATASET

    def _dataset(self) -> None:
        from nnssl_plugin.io.files import write_json

        if not (self._preprocessed() / "splits_final.json").is_file():
            scans = self.root / "scans"
            _write_heads(scans, TRAINING_CASES, seed=1, labels=scans / "labels")
            patterns = [f"{name}=*_{channel:04d}*" for channel, name in enumerate(NAMES)]
            words = ["--modalities", *patterns, "--labels", "labels/*", "--keep", "-np", "1"]
            _plugin("prepare", "-i", str(scans), "-d", ID, "-n", "Missing", *words)
            _plan_and_preprocess()
            names = sorted(p.stem for p in (self._preprocessed() / "gt_segmentations").glob("*.nii.gz"))
            names = [name.removesuffix(".nii") for name in names]
            fold = {"train": names[: self.args.labelled], "val": names[self.args.labelled :]}
            write_json(self._preprocessed() / "splits_final.json", [fold])
        if not (self.root / "test_labels").is_dir():
            _write_heads(self.root / "test", TEST_CASES, seed=2, labels=self.root / "test_labels")

    def _measured(self, checkpoint: Path, seed: int) -> dict[str, float]:
        """Mean Dice of one model on every kind of test images."""
        predict = Predictor(checkpoint)
        score = {"all": self._dice(predict, [self.root / "test"])}
        for filler in FILLERS:
            folders = [self._filled(channel, filler, seed) for channel in range(len(NAMES))]
            score[filler] = self._dice(predict, folders)
        return score

    def _filled(self, channel: int, filler: str, seed: int) -> Path:
        """The test images without one channel, which something stands in for."""
        import shutil

        output = self.root / "filled" / f"{filler}-{seed}-{channel}"
        if (output / "filled.json").is_file():
            return output
        without = self.root / "without" / str(channel)
        if not without.is_dir():
            shutil.copytree(self.root / "test", without)
            for path in without.glob(f"*_{channel:04d}.nii.gz"):
                path.unlink()
        words = ["-d", ID, "-p", self._plan(seed), "--with", filler, "-w", str(self._pretrained(seed, "brainmvp"))]
        _plugin("fill", "-i", str(without), "-o", str(output), *words)
        return output

    def _dice(self, predict: "Predictor", folders: Sequence[Path]) -> float:
        import nibabel
        import numpy as np

        scores = []
        for folder in folders:
            for label in sorted((self.root / "test_labels").glob("*.nii.gz")):
                truth = np.asarray(nibabel.load(label).dataobj).T
                found = predict(folder, label.name.removesuffix(".nii.gz"))
                for value in (1, 2):
                    both = (truth == value).sum() + (found == value).sum()
                    scores.append(2 * ((truth == value) & (found == value)).sum() / both)
        return float(np.mean(scores))


class Predictor:
    """nnU-Net's prediction of one case, without mirroring and without processes.

    Args:
        checkpoint: of a fold's folder.
    """

    def __init__(self, checkpoint: Path):
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        self.predictor = nnUNetPredictor(
            device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False
        )
        self.predictor.initialize_from_trained_model_folder(
            str(checkpoint.parents[1]), (int(checkpoint.parent.name.removeprefix("fold_")),), checkpoint.name
        )

    def __call__(self, folder: Path, case: str):
        """Labels (z, y, x)."""
        reader = self.predictor.plans_manager.image_reader_writer_class()
        files = [str(folder / f"{case}_{channel:04d}.nii.gz") for channel in range(len(NAMES))]
        return self.predictor.predict_single_npy_array(*reader.read_images(files))


def _write_heads(folder: Path, count: int, *, seed: int, labels: Path) -> None:
    """Heads with lesions, ``head_000_0000.nii.gz`` and so on."""
    from nnssl_plugin.quickstart.phantoms import write_heads

    for path in write_heads(folder, count, seed=seed, labels_folder=labels, **GRID):
        path.rename(folder / f"{path.parent.name}_{NAMES.index(path.name.removesuffix('.nii.gz')):04d}.nii.gz")


def _plugin(*words: str) -> None:
    from nnssl_plugin.cli.main import main as plugin

    if plugin(list(words)):
        raise SystemExit(f"nnssl_plugin {' '.join(words)} failed.")


def _plan_and_preprocess() -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([int(ID)], num_processes=1)
    plan_experiments([int(ID)])
    preprocess([int(ID)], configurations=(CONFIGURATION,), num_processes=(1,))


def _trained(plan: str, fold: str, trainer: str) -> Path:
    """The final checkpoint of a training, which goes on where it was."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    folder = Path(os.environ["nnUNet_results"], DATASET, f"{trainer}__{plan}__{CONFIGURATION}", f"fold_{fold}")
    checkpoint = folder / "checkpoint_final.pth"
    if not checkpoint.is_file():
        begun, number = (folder / "checkpoint_latest.pth").is_file(), fold if fold == "all" else int(fold)
        subject = get_trainer_from_args(ID, CONFIGURATION, number, trainer, plan, begun, torch.device("cpu"))
        maybe_load_checkpoint(subject, begun, False)
        subject.run_training()
    return checkpoint


if __name__ == "__main__":
    main()
