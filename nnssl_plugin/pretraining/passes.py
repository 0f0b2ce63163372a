"""Forward and backward passes of a ``Pretrainer`` over a batch: at once, or in chunks as a virtual batch."""

from typing import Any

from torch import Tensor

from nnssl_plugin.pretraining.batches import TRAIN
from nnssl_plugin.pretraining.pretext import Terms, Views
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks, encode_in_chunks
from nnssl_plugin.training.distributed import average_gradients


def backward(trainer, views: Views, progress: float) -> Terms:
    """The terms of the loss of a training batch, whose gradients are left in the parameters, averaged over ranks."""
    scale = _unscaled if trainer.grad_scaler is None else trainer.grad_scaler.scale
    chunks = _in_chunks(trainer, views)
    if chunks is None:
        with trainer.precision():
            terms = trainer.network(views, progress)
        scale(terms["total"]).backward()
        return terms
    terms = backward_in_chunks(trainer.task, views, progress, scale=scale, **chunks)
    if trainer.is_ddp:  # the chunks went around its wrapper
        average_gradients(trainer.task.parameters())
    return terms


def forward(trainer, views: Views, progress: float) -> Terms:
    """The terms of a validation batch."""
    chunks = _in_chunks(trainer, views)
    if chunks is None:
        with trainer.precision():
            return trainer.network(views, progress)
    encoded = encode_in_chunks(trainer.task, views, **chunks)
    with trainer.precision():
        return trainer.task.terms(*encoded, progress)


def first_chunk(views: Views, size: int | None) -> Views:
    """As many samples as are ever encoded at once; all for ``None``."""
    return {name: value[:size] for name, value in views.items()}


def _in_chunks(trainer, views: Views) -> dict[str, Any] | None:
    """How the samples are encoded in chunks, or ``None`` where they are encoded at once."""
    size = trainer.training_settings.chunk_size
    if size is None or size >= len(next(iter(views.values()))):
        return None
    return {"chunk_size": size, "seed": trainer.seeds(TRAIN, trainer.step)[1], "precision": trainer.precision}


def _unscaled(total: Tensor) -> Tensor:
    return total
