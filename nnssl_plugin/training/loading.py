"""The batches of a run from where it stands, in the order of nnU-Net's loop."""

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch.utils.data import Dataset

from nnssl_plugin.data.streams import BatchStream, open_streams
from nnssl_plugin.training.resumable import ResumableTrainer


def streams_of(trainer: ResumableTrainer, training: Dataset, validation: Dataset) -> tuple[BatchStream, BatchStream]:
    """Training batches of a trainer from its present step on, and the same validation batches for every epoch left.

    Args:
        trainer: says how many batches an epoch has.
        training: what yields the batch of a step.
        validation: what yields batch *k* of the validation.
    """
    of_epoch, numbers = trainer.steps_per_epoch, range(trainer.num_val_iterations_per_epoch)
    epochs = [
        (range(max(trainer.step, epoch * of_epoch), (epoch + 1) * of_epoch), numbers)
        for epoch in range(trainer.current_epoch, trainer.num_epochs)
    ]
    return open_streams(
        training,
        validation,
        epochs,
        workers=get_allowed_n_proc_DA(),
        pin_memory=trainer.device.type == "cuda",
        tell=trainer.print_to_log_file,
    )
