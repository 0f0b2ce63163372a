"""Masks of whole blocks, and of the voxels that lie in a case; made on the device, in 2D and 3D."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_block_mask(
    batch: int,
    spatial: Sequence[int],
    *,
    block: int | Sequence[int],
    ratio: float,
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Mask a share of the blocks of a regular grid, drawn anew for each sample.

    Blocks start at voxel 0 of each axis and do not overlap; where the size is no multiple of the block, the last block
    is cut. Exactly floor(n_blocks · (1 − ratio)) blocks of each sample are kept, a cut block counting as one.

    Args:
        batch: number of samples B.
        spatial: size of the image in voxels, (H, W) or (D, H, W).
        block: edge of a block in voxels, one for all axes or one per axis.
        ratio: share of the blocks that is masked, in [0, 1].
        generator: source of the random numbers, on ``device``.
        device: where the mask is made.

    Returns:
        (B, 1, *spatial) bool, True = masked.

    Raises:
        ValueError: for a ratio outside [0, 1], a block below 1, or a block with another number of axes than the image.
    """
    edges = (block,) * len(spatial) if isinstance(block, int) else tuple(block)
    if len(edges) != len(spatial) or min(edges) < 1:
        raise ValueError(f"block {block} does not fit an image of size {tuple(spatial)}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], not {ratio}")
    grid = [math.ceil(size / edge) for size, edge in zip(spatial, edges, strict=True)]
    n_blocks = math.prod(grid)
    kept = math.floor(n_blocks * (1 - ratio) + 1e-9)  # 10 · (1 − 0.9) is 0.9999…98 in floating point
    return mask_all_but(random_ids(batch, n_blocks, kept, generator=generator, device=device), spatial, edges)


def random_cubes_mask(
    batch: int,
    spatial: Sequence[int],
    *,
    edge: int,
    ratio: float,
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Mask cubes around random voxels, which may overlap, until their share is reached (BrainMVP, Algorithm 1).

    "while p_mask < p_total · p*: select randomly (x, y, z), mask an area of size r × r × r centered at (x, y, z)". The
    loop in fixed work: a random number for each voxel says when it is drawn (to draw one twice changes nothing), the
    least number within reach says when a voxel is masked first, and the loop ends at the ⌈p* · n⌉-th of these moments.

    Args:
        batch: number of samples B.
        spatial: size of the image in voxels, (H, W) or (D, H, W).
        edge: r in voxels; a cube around voxel v holds v − r // 2 … v − r // 2 + r − 1, cut where the image ends.
        ratio: p*, share of the voxels that is masked at least, in [0, 1]; the last cube may bring more.
        generator: source of the random numbers, on ``device``.
        device: where the mask is made.

    Returns:
        (B, 1, *spatial) bool, True = masked.

    Raises:
        ValueError: for a ratio outside [0, 1], or an edge below 1.
    """
    if edge < 1 or not 0 <= ratio <= 1:
        raise ValueError(f"edge must be at least 1 and ratio in [0, 1], not {edge} and {ratio}")
    wanted = math.ceil(math.prod(spatial) * ratio - 1e-9)
    if wanted == 0:
        return torch.zeros(batch, 1, *spatial, dtype=torch.bool, device=device)
    drawn = torch.rand(batch, 1, *spatial, generator=generator, device=device)
    masked_at = _least_within_reach(drawn, edge)
    last = masked_at.flatten(1).kthvalue(wanted, dim=1).values
    return masked_at <= last.reshape(batch, *[1] * (len(spatial) + 1))


def _least_within_reach(values: Tensor, edge: int) -> Tensor:
    """The least of the values (B, 1, *spatial) around whose voxels lies a cube that holds the voxel; one axis at a
    time."""
    before, after = edge - 1 - edge // 2, edge // 2
    for axis in range(2, values.ndim):
        rows = F.pad(values.movedim(axis, -1), (before, after), value=math.inf)
        least = -F.max_pool1d(-rows.flatten(0, -2)[:, None], edge, stride=1)[:, 0]
        values = least.unflatten(0, rows.shape[:-1]).movedim(-1, axis)
    return values


def random_ids(batch: int, total: int, kept: int, *, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """``kept`` different numbers below ``total`` for each sample, in random order: (batch, kept) long."""
    return torch.rand(batch, total, generator=generator, device=device).argsort(1)[:, :kept]


def mask_all_but(visible: Tensor, spatial: Sequence[int], edges: Sequence[int]) -> Tensor:
    """The mask (B, 1, *spatial) bool, True = masked, that leaves some blocks of a grid visible.

    Args:
        visible: (B, K) long, the blocks of each sample that stay, numbered as a map of them is flattened.
        spatial: size of the image in voxels.
        edges: of a block, per axis; the last block of an axis is cut where they do not divide the size.
    """
    grid = [math.ceil(size / edge) for size, edge in zip(spatial, edges, strict=True)]
    mask = torch.ones(len(visible), math.prod(grid), dtype=torch.bool, device=visible.device)
    mask = mask.scatter_(1, visible, False).reshape(len(visible), 1, *grid)
    for axis, (edge, size) in enumerate(zip(edges, spatial, strict=True), start=2):
        mask = mask.repeat_interleave(edge, axis).narrow(axis, 0, size)
    return mask


def fill_masked(image: Tensor, mask: Tensor, filler: Tensor | float) -> Tensor:
    """Replace the masked voxels; the others keep their value bit for bit.

    Args:
        image: (B, C, *spatial).
        mask: bool, broadcastable to the image, True = replace.
        filler: a number, or a tensor broadcastable to the image.

    Returns:
        (B, C, *spatial), of the image's type.
    """
    if isinstance(filler, Tensor):
        filler = filler.to(image.dtype)
    return torch.where(mask, filler, image)


def inside_case(origin: Tensor, case_shape: Tensor, size: Sequence[int]) -> Tensor:
    """Which voxels of a window lie in its case, (B, 1, *size) bool; the others were padded.

    Args:
        origin: (B, d), voxel of the case at which the window begins, negative where it begins before the case.
        case_shape: (B, d), size of the case in voxels.
        size: of the window in voxels.
    """
    inside = torch.ones(len(origin), 1, *size, dtype=torch.bool, device=origin.device)
    for axis, length in enumerate(size):
        voxel = origin[:, axis, None] + torch.arange(length, device=origin.device)
        holds = (voxel >= 0) & (voxel < case_shape[:, axis, None])
        inside &= holds.reshape(len(origin), *(length if a == axis + 1 else 1 for a in range(len(size) + 1)))
    return inside
