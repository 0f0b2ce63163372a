"""The fine-tunings of a study that share labels, one after another in one process and on the very same batches.

    python study_training.py jobs/seed0.json

What the first run of a fold had augmented is kept, and every other run of the fold reads it again: arms and recipes
differ in nothing else, and neither the augmentation nor the start of a process is paid for twice. The result of each
run is written when it is there; runs that have one are not repeated.
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from torch.utils.data import DataLoader, IterableDataset

from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

FIRST_STEPS, LOOK_EVERY = 100, 10
"""In so many steps, every so often, the norms of the encoder's weights and gradients are noted."""


class Endless(IterableDataset):
    """nnU-Net's loader, seeded where it runs: in this process, or in each of the workers."""

    def __init__(self, loader: Any, seed: int):
        self.loader, self.seed = loader, seed

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        entropy = np.random.SeedSequence([self.seed, worker.id if worker else 0])
        seed = int(entropy.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        while True:
            yield next(self.loader)


class Kept:
    """Batches of a loader, kept in memory to be read again from the first one."""

    def __init__(self, loader: Any, *, seed: int, workers: int):
        self.source = iter(DataLoader(Endless(loader, seed), batch_size=None, num_workers=workers))
        self.batches: list[dict] = []
        self.place = 0

    def __next__(self) -> dict:
        if self.place == len(self.batches):
            self.batches.append(_own(next(self.source)))
        self.place += 1
        return self.batches[self.place - 1]


class StudyTrainer(PretrainedSegmentationTrainer):
    """The package's trainer on kept batches; neither checkpoints nor pictures are written."""

    workers: ClassVar[int] = 0
    streams: ClassVar[dict[int, tuple[Kept, Kept]]] = {}
    """Fold → training and validation batches, of all trainers of this process."""

    def get_dataloaders(self) -> tuple[Kept, Kept]:
        if self.fold not in self.streams:
            loaders = super().get_dataloaders()  # with nnUNet_n_proc_DA=0: no workers of nnU-Net's own
            self.streams[self.fold] = tuple(
                Kept(each.data_loader, seed=self.settings.seed, workers=min(self.workers, most))
                for each, most in zip(loaders, (self.workers, 1), strict=True)
            )
        for kept in self.streams[self.fold]:
            kept.place = 0
        return self.streams[self.fold]

    def configure_optimizers(self) -> tuple:
        optimiser, schedule = super().configure_optimizers()
        self.first_steps: list[dict[str, float]] = []
        optimiser.register_step_pre_hook(self._look_at_encoder)
        return optimiser, schedule

    def plot_network_architecture(self) -> None:
        """Not needed."""

    def _look_at_encoder(self, *_) -> None:
        """Note norms of the encoder's weights and gradients (clipped, as they are applied) in the first steps."""
        if self.step >= FIRST_STEPS or self.step % LOOK_EVERY:
            return
        own = list(getattr(self.network, "encoder", self.network).parameters())
        norms = {"weights": own, "gradients": [p.grad for p in own if p.grad is not None]}  # none while it is frozen
        found = {key: float(torch.nn.utils.get_total_norm(of)) for key, of in norms.items()}
        self.first_steps.append({"step": self.step} | found)


def carry_out(run: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Train and segment.

    Args:
        run: ``name``, ``plan``, ``fold``, ``settings`` of the fine-tuning, ``cases`` and ``shifted`` cases to segment.
        job: ``dataset``, ``configuration``, ``device``, ``mirroring``, ``label_names``.

    Returns:
        the run with ``dice`` and ``dice_shifted`` (label → case → Dice), ``pseudo_dice`` per epoch, ``first_steps``
        (norms of the encoder's weights and gradients), and ``seconds``.
    """
    folder = Path(nnUNet_preprocessed, job["dataset"])
    plans = read_json(folder / f"{run['plan']}.json")
    plans["finetuning"] = plans["finetuning"] | run["settings"]
    plans |= {"plans_name": run["name"], "continue_training": False}
    began = time.monotonic()
    trainer = StudyTrainer(
        plans, job["configuration"], run["fold"], read_json(folder / "dataset.json"), torch.device(job["device"])
    )
    trainer.disable_checkpointing = True
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.run_training()
    trained = time.monotonic()
    scores = {key: segment(trainer, run[cases], job) for key, cases in (("dice", "cases"), ("dice_shifted", "shifted"))}
    pseudo = [float(value) for value in trainer.logger.get_value("mean_fg_dice", step=None)]
    seconds = {"training": trained - began, "prediction": time.monotonic() - trained}
    told = {"pseudo_dice": pseudo, "first_steps": trainer.first_steps, "seconds": seconds, "steps": trainer.step}
    return run | scores | told


def segment(trainer: StudyTrainer, cases: list[str], job: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Label → case → Dice on the grid of the scan, as nnU-Net computes it; None where a label is in neither."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=job["mirroring"], device=trainer.device, allow_tqdm=False)
    axes = trainer.inference_allowed_mirroring_axes
    plans, configuration, labels = trainer.plans_manager, trainer.configuration_manager, trainer.label_manager
    predictor.manual_initialization(
        trainer.network, plans, configuration, None, trainer.dataset_json, type(trainer).__name__, axes
    )
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    reader, truth = (
        plans.image_reader_writer_class(),
        Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations"),
    )
    dice: dict[str, dict[str, float | None]] = {name: {} for name in job["label_names"]}
    for case in cases:
        image, _, _, properties = data.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(image[:]))).cpu()
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, labels, properties, num_threads_torch=1
        )
        reference = reader.read_seg(str(truth / f"{case}{trainer.dataset_json['file_ending']}"))[0][0]
        for value, name in enumerate(job["label_names"], 1):
            masks = (region_or_label_to_mask(each, value) for each in (reference, found))
            tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks)
            dice[name][case] = float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else None
    return dice


def _own(batch: dict) -> dict:
    """Tensors in memory of this process: those of a worker hold a file open each."""
    return {
        key: [each.clone() for each in value]
        if isinstance(value, list) and torch.is_tensor(value[0])
        else value.clone()
        for key, value in batch.items()
        if key in ("data", "target")
    }


def main() -> None:
    job = read_json(sys.argv[1])
    if job["one_thread"]:
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    StudyTrainer.workers = job["workers"]
    results = Path(job["results"])
    for run in job["runs"]:
        path = results / f"{run['name']}.json"
        if not path.exists():
            write_json(path, carry_out(run, job))


if __name__ == "__main__":
    main()
