"""How one tensor takes another shape: pure functions of tensors, each with what it preserves.

Weights of convolutions are (O, I, *kernel), of transposed ones (I, O, *kernel). Nothing is changed in place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def input_channels(weight: Tensor, channels: int) -> Tensor:
    """The first convolution for ``channels`` input channels, which an image replicated over them answers alike.

    With N channels before and M now, channel n goes with channel m where n ≡ m (mod min(N, M)). More channels repeat
    the old ones, each divided by the number of its copies; fewer sum those that fall together. In both directions
    Σ_m w'_m = Σ_n w_n.

    Args:
        weight: (O, N, *kernel).
        channels: M.
    """
    present = weight.shape[1]
    if channels < present:
        index = torch.arange(present) % channels
        return weight.new_zeros(weight.shape[0], channels, *weight.shape[2:]).index_add_(1, index, weight)
    index = torch.arange(channels) % present
    copies = torch.bincount(index, minlength=present)[index].to(weight.dtype)
    return weight[:, index] / copies.view(-1, *[1] * (weight.dim() - 2))


def kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A convolution padded by (k - 1) // 2 with another kernel size; centres coincide.

    A larger kernel has zeros around the old one: the response to every image stays. A smaller one adds the taps that
    fall outside to the nearest that remains: the response to images constant along the shortened axes stays, away
    from the border (3 → 1 is the sum over the axis).

    Args:
        weight: (O, I, *kernel).
        size: the new kernel.
    """
    for axis, (before, after) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if before != after:
            index = (torch.arange(before) - (before - 1) // 2 + (after - 1) // 2).clamp(0, after - 1)
            shape = (*weight.shape[:axis], after, *weight.shape[axis + 1 :])
            weight = weight.new_zeros(shape).index_add_(axis, index, weight)
    return weight


def patch_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A convolution whose stride is its kernel (patch embedding) with another patch size.

    Every tap is shared out among the taps that its cell overlaps, in proportion to the overlap. The response to any
    patch is what the old kernel gives for the patch resampled to the old size by area; the sum of the taps stays, so
    constant images keep their response.

    Args:
        weight: (O, I, *kernel).
        size: the new patch in voxels.
    """
    for axis, (before, after) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if before != after:
            weight = _apply(_overlaps(before, after) / after, weight, axis)
    return weight


def upsampling(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A transposed convolution whose stride is its kernel, with another stride.

    The output cell of every input voxel is the old one resampled to the new size by area: 2 → 1 is the mean, 1 → 2 a
    repetition. Constant outputs stay, and so does the mean of every cell.

    Args:
        weight: (I, O, *kernel).
        size: the new kernel and stride.
    """
    for axis, (before, after) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if before != after:
            weight = _apply(_overlaps(before, after) / before, weight, axis)
    return weight


def inflate(weight: Tensor, depth: int, *, mean: bool) -> Tensor:
    """A 2D kernel repeated along a new first spatial axis, the slowest, along which nnU-Net cuts its 2D slices.

    Args:
        weight: (O, I, h, w), or (I, O, h, w) of a transposed convolution.
        depth: size of the kernel along the new axis.
        mean: divide by ``depth``, so that the response to images constant along the axis stays, away from the border;
            False for transposed convolutions, which then give constant outputs along it.
    """
    repeated = weight.unsqueeze(2).expand(-1, -1, depth, *weight.shape[2:])
    return repeated / depth if mean else repeated.contiguous()


def flatten(weight: Tensor, *, mean: bool) -> Tensor:
    """A 3D kernel without its first spatial axis: its sum (convolution), or its mean (transposed).

    The sum answers a slice as the 3D kernel answers the image that repeats it along the axis.
    """
    return weight.mean(2) if mean else weight.sum(2)


def positions(embedding: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Learned positional embeddings on another grid of tokens: trilinear (2D: bilinear) between token centres.

    An embedding that is constant along an axis stays so; equal grids change nothing.

    Args:
        embedding: (1, product of ``before``, C), the last axis of the grid running fastest.
        before: the grid that it was learned on.
        after: the new grid, with as many axes.
    """
    maps = embedding.reshape(1, *before, embedding.shape[-1]).movedim(-1, 1)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(after)]
    return F.interpolate(maps, size=tuple(after), mode=mode, align_corners=False).flatten(2).transpose(1, 2)


def first_channels(values: Tensor, fresh: Tensor, *, out_axis: int = 0, parts: int = 1) -> tuple[Tensor, int]:
    """The first channels of ``fresh`` taken from ``values``; new channels keep their initialisation.

    Outputs that are kept get zero weights on inputs that are new, so where a layer became wider they answer as
    before. Where it became narrower the contributions of the dropped inputs are lost.

    Args:
        values: weight, or a vector per channel (bias, normalisation), of the other width.
        fresh: the initialised tensor of the new width, equal in the axes after the first two.
        out_axis: axis of the output channels: 0, and 1 for weights of transposed convolutions.
        parts: number of equal parts that the input channels are concatenated from, each resized by itself.

    Returns:
        the tensor, and how many of its numbers come from ``values``.
    """
    result = fresh.clone()
    kept = min(values.shape[out_axis], fresh.shape[out_axis])
    if values.dim() == 1:
        result[:kept] = values[:kept]
        return result, kept
    rows, source = result.narrow(out_axis, 0, kept).zero_(), values.narrow(out_axis, 0, kept)
    in_axis = 1 - out_axis
    now, before = rows.shape[in_axis] // parts, source.shape[in_axis] // parts
    width, taken = min(now, before), 0
    for part in range(parts):
        target = rows.narrow(in_axis, part * now, width)
        taken += target.copy_(source.narrow(in_axis, part * before, width)).numel()
    return result, taken


def grids(count: int, dimensions: int) -> list[tuple[int, ...]]:
    """Every grid of ``count`` tokens with more than one along each of its axes."""
    if dimensions == 1:
        return [(count,)] if count > 1 else []
    divisors = [d for d in range(2, count // 2 + 1) if count % d == 0]
    return [(d, *rest) for d in divisors for rest in grids(count // d, dimensions - 1)]


def _overlaps(before: int, after: int) -> Tensor:
    """(after, before): shared length of the cells of two grids over one interval, in units of 1 / (before · after)."""
    old, new = torch.arange(before + 1) * after, torch.arange(after + 1)[:, None] * before
    return (torch.minimum(old[1:], new[1:]) - torch.maximum(old[:-1], new[:-1])).clamp(min=0).double()


def _apply(matrix: Tensor, weight: Tensor, axis: int) -> Tensor:
    return torch.tensordot(matrix.to(weight.dtype), weight, dims=([1], [axis])).movedim(0, axis).contiguous()
