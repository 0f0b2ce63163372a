"""A batch larger than memory: embed it in chunks, solve one problem over all samples, back-propagate chunk by chunk.

The gradient of a loss that couples samples passes through their embeddings alone, so each chunk can be encoded again
and given its own rows of it (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", section 3). It costs one more forward and needs the memory of one chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views


def backward_in_chunks(
    task: PretextTask,
    views: Views,
    progress: float,
    *,
    chunk_size: int,
    seed: int,
    precision: Callable[[], AbstractContextManager],
    scale: Callable[[Tensor], Tensor],
) -> Terms:
    """Add to the parameters the gradients that the whole batch at once would give them.

    Equal up to rounding where ``encode`` is deterministic; dropout draws other numbers than for the whole batch, the
    same ones in both passes over a chunk. ``encode`` must leave the task's state as it is, for it runs twice.

    Args:
        task: the bare method: calls around a DDP wrapper are not averaged over ranks, the caller does it.
        views: what ``encode`` reads, B samples each.
        progress: fraction of training done.
        chunk_size: samples encoded at a time; the last chunk may be smaller.
        seed: of dropout; chunk *i* uses ``seed + i``.
        precision: makes the context of mixed precision; entered anew for each pass, because autocast would give the
            second pass the weights that it cast without gradient in the first.
        scale: multiplies the total before the backward pass (the scaler of mixed precision).

    Returns:
        the terms of ``task.forward``, detached.
    """
    outputs, own = (
        _leaves(part) for part in encode_in_chunks(task, views, chunk_size=chunk_size, seed=seed, precision=precision)
    )
    with precision():
        terms = task.terms(outputs, own, progress)
    scale(terms["total"]).backward()
    start = 0
    for number, chunk in enumerate(_chunks(views, chunk_size)):
        torch.manual_seed(seed + number)
        with precision():
            encoded = task.encode(chunk)
        _pass_on(encoded, (outputs, own), start)
        start += chunk_size
    return {name: value.detach() for name, value in terms.items()}


@torch.no_grad()
def encode_in_chunks(
    task: PretextTask,
    views: Views,
    *,
    chunk_size: int,
    seed: int,
    precision: Callable[[], AbstractContextManager],
) -> tuple[Views, Terms]:
    """``task.encode`` of all samples without gradient, a chunk at a time; arguments as above."""
    parts = []
    for number, chunk in enumerate(_chunks(views, chunk_size)):
        torch.manual_seed(seed + number)
        with precision():
            parts.append(task.encode(chunk))
    outputs, own = zip(*parts, strict=True)
    return _joined(outputs), _joined(own)


def _chunks(views: Views, size: int) -> Iterator[Views]:
    samples = len(next(iter(views.values())))
    for start in range(0, samples, size):
        yield {name: value[start : start + size] for name, value in views.items()}


def _joined(parts: tuple[Views, ...]) -> Views:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _leaves(values: Views) -> Views:
    return {name: value.requires_grad_(value.is_floating_point()) for name, value in values.items()}


def _pass_on(encoded: tuple[Views, Terms], leaves: tuple[Views, Terms], start: int) -> None:
    """Back-propagate into a chunk what the leaves gathered for its rows, which begin at ``start``."""
    tensors, gradients = [], []
    for part, whole in zip(encoded, leaves, strict=True):
        for name, value in part.items():
            if value.requires_grad and whole[name].grad is not None:
                tensors.append(value)
                gradients.append(whole[name].grad[start : start + len(value)])
    if tensors:
        torch.autograd.backward(tensors, gradients)
