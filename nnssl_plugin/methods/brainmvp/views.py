"""Which modalities a step shows."""

import torch
from torch import Tensor


def draw_modalities(available: Tensor, together: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A modality m of each case and another one n ≠ m of the same case, among those that it has.

    m is drawn evenly, so that the mean over steps is Eq. 6's mean over the modalities of each case. Once the contrast
    counts, one that most cases of the step have is drawn for all of these, as the negatives of Eq. 4 share their
    modality; a case without it keeps its own.

    Args:
        available: (B, C) bool, at least one of each case.
        together: () bool, whether one modality is drawn for all.
        generator: source of the random numbers, on the device of ``available``.

    Returns:
        m and n (B,) long, and (B,) bool whether the case has two modalities; where it has not, n is m.
    """
    batch, channels = available.shape
    scores = torch.rand(2 * batch + 1, channels, generator=generator, device=available.device)
    own = _best(scores[:batch], available)
    number = available.sum(0)
    common = _best(scores[-1], number == number.max())
    own = torch.where(together & available.gather(1, common.expand(batch, 1))[:, 0], common, own)
    others = available & (torch.arange(channels, device=available.device) != own[:, None])
    paired = others.any(1)
    return own, torch.where(paired, _best(scores[batch : 2 * batch], others), own), paired


def _best(scores: Tensor, allowed: Tensor) -> Tensor:
    """Index of the largest allowed score along the last axis."""
    return scores.masked_fill(~allowed, -1).argmax(-1)
