"""Where the tokens of a feature map lie in the image: their centres, the token at a point, the map between tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """A regular grid of tokens over an image, in voxels; voxel centres are the whole numbers.

    A token's cell is the box of one spacing around its centre, which is not where the image divided by the grid would
    have it: the convolutions of a U-Net centre the first token near voxel 0, so that its cell begins outside the image
    and the last one ends inside.
    """

    counts: tuple[int, ...]
    """Tokens per axis; their product is N, flattened as a map (*counts) is."""
    offset: tuple[float, ...]
    """Centre of the first token."""
    spacing: tuple[int, ...]
    """Voxels from one token to the next."""

    def centres(self, device: torch.device | str = "cpu") -> Tensor:
        """Centres of the tokens (N, d) in voxels, float32."""
        return torch.stack(torch.meshgrid(*self.axes(device), indexing="ij"), -1).flatten(0, -2)

    def axes(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """Coordinates (counts,) of the centres along each axis in voxels, float32."""
        return [
            offset + spacing * torch.arange(count, device=device, dtype=torch.float32)
            for count, offset, spacing in zip(self.counts, self.offset, self.spacing, strict=True)
        ]

    def token_at(self, points: Tensor) -> Tensor:
        """Index (...) of the token in whose cell each point (..., d) lies, -1 outside of all cells.

        A cell holds its lower faces and not its upper ones, so that a point lies in one cell only.
        """
        index, inside = torch.zeros_like(points[..., 0]), torch.ones_like(points[..., 0], dtype=torch.bool)
        for axis, (count, offset, spacing) in enumerate(zip(self.counts, self.offset, self.spacing, strict=True)):
            place = ((points[..., axis] - offset) / spacing + 0.5).floor()
            index = index * count + place
            inside &= (place >= 0) & (place < count)
        return torch.where(inside, index, -1).long()

    def read(self, maps: Tensor, points: Sequence[Tensor]) -> Tensor:
        """Maps read between the tokens: linear along each axis (trilinear in 3D), constant beyond the outermost ones.

        The points form a lattice, so that one small matrix per axis does it.

        Args:
            maps: (B, C, *counts).
            points: for each axis the coordinates (B, K) or (1, K) of the lattice in voxels; K may differ per axis.

        Returns:
            (B, C, *K), of the type of the maps, float32 at least.
        """
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            for axis, (count, offset, spacing) in enumerate(zip(self.counts, self.offset, self.spacing, strict=True)):
                cells = torch.arange(count, device=maps.device)
                place = ((points[axis].to(maps.dtype) - offset) / spacing).clamp(0, count - 1)
                weights = (1 - (place[:, None, :] - cells[:, None]).abs()).clamp(min=0)  # (B, count, K)
                weights = weights.reshape(len(weights), *[1] * (maps.ndim - 3), *weights.shape[1:])
                maps = (maps.movedim(axis + 2, -1) @ weights).movedim(-1, axis + 2)
        return maps

    def sums(self, volume: Tensor) -> Tensor:
        """Sums (B, C, N) of a volume (B, C, *size) over the cells, of voxels on a face the part that lies inside."""
        with torch.autocast(volume.device.type, enabled=False):
            volume = volume.float()
            for axis, size in reversed(list(enumerate(volume.shape[2:]))):  # the last one lies in a row in memory
                overlaps = self._overlaps(axis, size, volume.device)
                volume = (volume.movedim(axis + 2, -1) @ overlaps.mT).movedim(-1, axis + 2)
        return volume.flatten(2)

    def over(self, values: Tensor, size: Sequence[int]) -> Tensor:
        """Values of tokens (..., *counts) over an image: each voxel (..., *size) has that of the nearest token."""
        first = values.ndim - len(self.counts)
        for axis, length in enumerate(size):
            place = (torch.arange(length, device=values.device) - self.offset[axis]) / self.spacing[axis]
            nearest = (place + 0.5).floor().clamp(0, self.counts[axis] - 1).long()
            values = values.index_select(first + axis, nearest)
        return values

    def _overlaps(self, axis: int, size: int, device: torch.device) -> Tensor:
        """(counts, size): length in voxels that the cells of an axis share with its voxels."""
        centres = self.offset[axis] + self.spacing[axis] * torch.arange(self.counts[axis], device=device)[:, None]
        voxels, half = torch.arange(size, device=device), self.spacing[axis] / 2
        upper = torch.minimum(voxels + 0.5, centres + half)
        return (upper - torch.maximum(voxels - 0.5, centres - half)).clamp(min=0)
