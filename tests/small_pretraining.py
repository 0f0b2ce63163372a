"""A real checkpoint of a pretraining of one step, for tests of what becomes of checkpoints."""

from pathlib import Path

from in_process import nnunet_folders
from pretraining_harness import run

ONE_STEP = {"epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1}


def pretrain_one_step(folder: Path, **dataset) -> Path:
    """Pretrain the toy method (teacher, queue, two channels) for one step, in nnU-Net's folders below ``folder``.

    Args:
        folder: an empty folder.
        dataset: arguments of ``write_fake_dataset``, such as ``residual=True``.

    Returns:
        its ``checkpoint_final.pth``.
    """
    with nnunet_folders(folder) as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        for drawing in ("draw_pictures", "draw_progress"):
            patch.setattr(f"nnssl_plugin.pretraining.pretrainer.{drawing}", lambda *arguments, **options: None)
        trainer = run(**{"pretraining": ONE_STEP, "cases": 2} | dataset)
        return Path(trainer.output_folder, "checkpoint_final.pth")
