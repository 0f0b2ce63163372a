"""The nnU-Net trainer under pretraining and fine-tuning: steps, checkpoints, stopping and going on.

The state counts optimiser steps. A run can stop after any of them (SIGTERM, SIGINT, ``--time-limit``) with a checkpoint
and exit code 75, and goes on from there with ``--c``; over all its parts it makes the planned number of steps.
"""

import sys
import time
from os.path import join
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnssl_plugin.checkpoints.format.files import read_checkpoint, save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import weights_hash
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import disk_errors_in_words, remove_temporary_files
from nnssl_plugin.io.lock import locked
from nnssl_plugin.training.distributed import any_rank, check_device, device_of_rank, wrapping_for
from nnssl_plugin.training.epoch_log import EpochLog
from nnssl_plugin.training.interruption import TO_BE_CONTINUED, Interruption
from nnssl_plugin.training.planned_network import DEFAULT_DEVICE, PlannedNetworkTrainer
from nnssl_plugin.training.user_errors import end_in_words

FINAL, LATEST, PREVIOUS, BEST = (f"checkpoint_{kind}.pth" for kind in ("final", "latest", "previous", "best"))
LOCK = ".training.lock"
STEPS_BETWEEN_AGREEMENTS = 10
"""With several ranks, steps between two looks at whether any was asked to stop (each look waits for the device)."""
SECONDS_BETWEEN_PICTURES = 30
"""Shortest time between two drawings of progress.png."""
RESUME_STATE = "nnssl_resume"
"""Entry of a checkpoint with ``step``, ``epoch_losses`` of the unfinished epoch, and ``weights_sha256``."""


class ResumableTrainer(PlannedNetworkTrainer):
    """What pretraining and fine-tuning share beyond nnU-Net's trainer; a subclass adds what it learns.

    ``checkpoint_latest.pth`` is written after an epoch unless the last writing is younger than
    ``seconds_between_checkpoints``; the one before it stays as ``checkpoint_previous.pth``.

    Raises:
        UserError: for a CUDA device that is not there.
    """

    seconds_between_checkpoints = 60.0

    def __new__(cls, *args, **kwargs):
        end_in_words()  # before any constructor: what a plan lacks is said by those of the subclasses
        return super().__new__(cls)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = DEFAULT_DEVICE,
    ):
        check_device(device)
        self.step = 0
        self.epoch_losses: list[float] = []
        self.interruption = Interruption()
        with disk_errors_in_words("nnUNet_results"):
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = device_of_rank(device)
        if self.device.type != "cuda":  # with several ranks nnU-Net takes CUDA for granted
            self.grad_scaler = None
        self.log = EpochLog(self.logger)
        self._saved_at = self._drawn_at = time.monotonic()
        self._saved_step: int | None = None
        self._whole_checkpoint: str | None = None
        """Name of the newest readable checkpoint of this run."""

    # ------------------------------------------------------------------ what a subclass gives

    def saved_network(self) -> nn.Module:
        """The module whose state is ``network_weights`` of a checkpoint."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def synchronises_batch_norm(self) -> bool:
        """Whether ranks normalise their batches together; nnU-Net's always do, which works on CUDA alone."""
        return self.device.type == "cuda"

    def own_state(self) -> dict[str, Any]:
        """Entries of a checkpoint beside nnU-Net's."""
        return {}

    def load_own_state(self, checkpoint: dict[str, Any]) -> None:
        """Take back :meth:`own_state`, weights included; earlier versions kept step and losses there, too."""
        self.load_weights(self.saved_network(), checkpoint["network_weights"])

    def check_is_resumable(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else with a :class:`UserError`."""
        missing = {"network_weights", "optimizer_state", "logging", "current_epoch"} - checkpoint.keys()
        if missing:
            raise UserError(
                f"The checkpoint holds no training to continue: {', '.join(sorted(missing))} are missing.",
                "Start without --c.",
            )

    # ------------------------------------------------------------------ steps

    @property
    def num_iterations_per_epoch(self) -> int:
        """Steps left in the current epoch: fewer than ``steps_per_epoch`` after a stop in its middle."""
        return (self.current_epoch + 1) * self.steps_per_epoch - self.step

    @num_iterations_per_epoch.setter
    def num_iterations_per_epoch(self, value: int) -> None:
        """nnU-Net and its trainers set the steps of a whole epoch."""
        self.steps_per_epoch = value

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_epochs * self.steps_per_epoch

    def initialize(self) -> None:
        with wrapping_for(self.device, synchronised=self.synchronises_batch_norm):
            super().initialize()

    def run_training(self) -> None:
        """nnU-Net's loop, by one run at a time in an output folder.

        Raises:
            UserError: another run works there, or the disk is full or read-only.
        """
        with disk_errors_in_words(self.output_folder):
            if self.local_rank != 0:
                self._train()
                return
            with locked(Path(self.output_folder, LOCK)):
                for folder in ("", "figures"):
                    remove_temporary_files(Path(self.output_folder, folder))
                self._train()

    def _train(self) -> None:
        try:
            super().run_training()
        finally:
            self.close_loaders()
            self.interruption.release()

    def on_train_start(self) -> None:
        self.interruption.watch()  # before nnU-Net forks its loader's workers, which a scheduler signals too
        super().on_train_start()

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, counted."""
        result = super().train_step(batch)
        self.epoch_losses.append(float(result["loss"]))
        self.end_step()
        return result

    def end_step(self) -> None:
        """Count a step, and stop after it where that was asked for; after the last one of an epoch its end does."""
        self.step += 1
        if self.num_iterations_per_epoch > 0 and self._should_stop():
            self._stop()

    def end_epoch(self) -> None:
        """Save and stop where due; ``current_epoch`` already counts the epoch that ended."""
        if time.monotonic() - self._saved_at >= self.seconds_between_checkpoints:
            self.save_checkpoint(join(self.output_folder, LATEST))
        if self.current_epoch < self.num_epochs and self._should_stop(now=True):
            self._stop()

    def pictures_are_due(self) -> bool:
        """Whether to draw: after the last epoch, and now and then before, for it can cost more than a short epoch."""
        due = self.current_epoch == self.num_epochs or time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_PICTURES
        if due:
            self._drawn_at = time.monotonic()
        return due and self.local_rank == 0

    def on_train_end(self) -> None:
        self.interruption.release()
        super().on_train_end()
        if self.local_rank == 0:
            Path(self.output_folder, PREVIOUS).unlink(missing_ok=True)  # as nnU-Net does with the latest one

    def close_loaders(self) -> None:
        """End the workers of the loaders; nnU-Net's outlive an exception else."""
        for loader in (self.dataloader_train, self.dataloader_val):
            end = getattr(loader, "close", None) or getattr(loader, "_finish", None)
            if end is not None:
                end()

    # ------------------------------------------------------------------ stopping

    def _should_stop(self, now: bool = False) -> bool:
        """Whether to stop after this step; all ranks agree, every few steps or ``now``."""
        wanted = self.interruption.requested()
        if not self.is_ddp:
            return wanted
        if not now and self.step % STEPS_BETWEEN_AGREEMENTS:
            return False
        return any_rank(wanted, self.device)

    def _stop(self) -> None:
        """Save and leave with the exit code that says: continue with --c."""
        if self._saved_step != self.step:
            self.save_checkpoint(join(self.output_folder, LATEST))
        self.print_to_log_file(
            f"Stopped by {self.interruption.reason or 'another rank'} after step {self.step} of {self.total_steps}; "
            "the same command with --c goes on from here."
        )
        if self.is_ddp:
            dist.barrier()  # a launcher ends the other ranks when one leaves: not before the file is written
        sys.exit(TO_BE_CONTINUED)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with what continues the run, atomically and in plain types."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        epochs = self.step // self.steps_per_epoch
        weights = self.saved_network().state_dict()
        content = {
            "network_weights": weights,
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.log.history(epochs),
            "_best_ema": self._best_ema,
            "current_epoch": epochs,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            RESUME_STATE: {
                "step": self.step,
                "epoch_losses": self.epoch_losses,
                "weights_sha256": weights_hash(weights),
            },
            **self.own_state(),
        }
        if Path(filename).name == LATEST:
            self._save_latest(content, Path(filename))
        else:
            save_checkpoint(content, filename)

    def _save_latest(self, content: dict[str, Any], path: Path) -> None:
        """Keep the one before, where it is this run's and can be read."""
        previous = path.with_name(PREVIOUS)
        save_checkpoint(content, path, keep_as=previous if self._whole_checkpoint == LATEST else None)
        if self._whole_checkpoint not in (LATEST, PREVIOUS):
            previous.unlink(missing_ok=True)
        self._whole_checkpoint, self._saved_step, self._saved_at = LATEST, self.step, time.monotonic()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Go on where the checkpoint was written.

        Raises:
            UserError: neither it nor the one before can be read, or it does not fit the plan.
        """
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, dict):
            checkpoint = filename_or_checkpoint
        else:
            checkpoint = self._read_newest(Path(filename_or_checkpoint))
        self.check_is_resumable(checkpoint)
        self.current_epoch = checkpoint["current_epoch"]
        # checkpoints without an entry of ours (stock nnU-Net's) are of whole epochs
        self.step = self.current_epoch * self.steps_per_epoch
        self.load_own_state(checkpoint)
        self._load_optimizer(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self._best_ema = checkpoint["_best_ema"]
        self.logger.load_checkpoint(checkpoint["logging"])
        if "inference_allowed_mirroring_axes" in checkpoint:
            self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        if RESUME_STATE in checkpoint:
            self.step = checkpoint[RESUME_STATE]["step"]
            self.epoch_losses = list(checkpoint[RESUME_STATE]["epoch_losses"])
        self._check_steps()

    def load_weights(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """``load_state_dict`` whose refusal is the user's error: the plan is not the checkpoint's."""
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:  # keys or shapes differ
            raise UserError(
                f"The checkpoint does not fit the plan: {str(error).splitlines()[1].strip()[:200]}",
                "Restore the plan's network and settings, or start without --c.",
            ) from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        saved, own = (groups[0].keys() for groups in (state["param_groups"], self.optimizer.param_groups))
        if ("betas" in saved) != ("betas" in own):  # PyTorch would take SGD's numbers for AdamW's
            raise UserError(
                "The checkpoint was written by another optimiser than the plan asks for (AdamW or SGD).",
                "Restore the plan's optimiser, or start without --c.",
            )
        try:
            self.optimizer.load_state_dict(state)
        except ValueError as error:  # other groups
            raise UserError(
                f"The checkpoint's optimiser does not fit the plan: {error}.",
                "Restore the plan's settings, or start without --c.",
            ) from error
        for parameter, values in self.optimizer.state.items():  # fused optimisers want one order in memory for all
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)

    def _read_newest(self, path: Path) -> dict[str, Any]:
        """The checkpoint, or the one before where it is damaged."""
        previous = path.with_name(PREVIOUS)
        try:
            checkpoint = _read_whole(path, self.device)
        except UserError as error:
            if path.name != LATEST or not previous.is_file():
                raise
            checkpoint = _read_whole(previous, self.device)
            self.print_to_log_file(f"{error.problem}\nGoing on from the one before: {previous}")
            path = previous
        self._whole_checkpoint = path.name
        return checkpoint

    def _check_steps(self) -> None:
        if not 0 <= self.step - self.current_epoch * self.steps_per_epoch <= self.steps_per_epoch:
            raise UserError(
                f"The checkpoint was written after step {self.step}, in epoch {self.current_epoch}; that does not fit "
                f"the plan's epochs of {self.steps_per_epoch} steps.",
                "Restore iterations_per_epoch and batch_size of the plan, or start without --c.",
            )


def _read_whole(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint whose weights are those that were written.

    Raises:
        UserError: it cannot be read, or its weights have another hash than it says.
    """
    checkpoint = read_checkpoint(path, device=device)
    said = checkpoint.get(RESUME_STATE, checkpoint.get("provenance", {})).get("weights_sha256")
    if said is not None and weights_hash(checkpoint["network_weights"]) != said:
        raise UserError(
            f"{path} is damaged: its weights are not those that were written (their SHA-256 differs).",
            "Copy it again, or use an earlier checkpoint of the same folder.",
        )
    return checkpoint
