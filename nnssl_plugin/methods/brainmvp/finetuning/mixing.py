"""The two copies of an image, in which templates stand for some of its modalities (BrainMVP, appendix A)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.methods.brainmvp.finetuning.settings import Settings
from nnssl_plugin.transforms.masks import fill_masked, random_cubes_mask


@dataclass(frozen=True)
class Mixing:
    """Draws the two copies of every image of a batch; what step k draws depends on the seed and k alone."""

    settings: Settings
    known: tuple[bool, ...]
    """(C,) channels of which there is a template."""
    present: Mapping[str, np.ndarray]
    """Case → (C,) bool, channels that it really has."""
    dimensions: int
    """Spatial ones of a patch."""
    seed: tuple[int, ...]

    def copies(self, data: Tensor, cases: Sequence[str], step: int) -> Tensor:
        """X' of every image, then X'' of every image: (2B, C, …) from images with their templates (B, 2C, …).

        Args:
            data: axes between the channels and the patch's are those of several windows of an image.
            cases: names of the B.
            step: of the training.
        """
        images, templates = data.chunk(2, 1)
        generator = torch.Generator(data.device)
        generator.manual_seed(int(np.random.SeedSequence([*self.seed, step]).generate_state(1, np.uint64)[0] >> 1))
        present = torch.from_numpy(np.stack([self.present[case] for case in cases]))
        present = present.to(data.device, non_blocking=True)
        return torch.cat([self._copy(images, templates, present, generator) for _ in range(2)])

    def _copy(self, images: Tensor, templates: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        if images.shape[1] > 1:
            known = torch.tensor(self.known, device=images.device)
            replaced = replaced_modalities(present, known, self.settings.most_replaced, generator)
            return fill_masked(images, replaced.reshape(*replaced.shape, *(1,) * (images.ndim - 2)), templates)
        spatial = images.shape[-self.dimensions :]
        masked = random_cubes_mask(
            math.prod(images.shape[: -self.dimensions]),
            spatial,
            edge=self.settings.block,
            ratio=self.settings.masked,
            generator=generator,
            device=images.device,
        )
        return fill_masked(images, masked.reshape(images.shape), templates)


def replaced_modalities(present: Tensor, known: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Which modalities a template replaces, (B, C) bool.

    One that the case has is drawn to stay; of the others, from 0 to ``most`` go, every number equally likely. A
    modality that the case lacks goes like any other, so that the network meets both what may stand there at test
    time: zeros, and the template.

    Args:
        present: (B, C) bool, one true in each row at least.
        known: (C,) bool.
        most: largest number that goes.
        generator: source of the random numbers, on the device of ``present``.
    """
    device, (batch, channels) = present.device, present.shape
    order = torch.rand(batch, channels, generator=generator, device=device).masked_fill(~known, 2.0)
    stays = order.masked_fill(~present, -1.0).argmax(1, keepdim=True)
    place = order.scatter(1, stays, 3.0).argsort(1).argsort(1)
    number = torch.randint(most + 1, (batch, 1), generator=generator, device=device).clamp(max=channels - 1)
    return (place < number) & known
