"""Triton's kernels of ``instance_norm.py``, with its functions ``normalised`` and ``gradients``.

Maps are read as (N, S, C), which channels-last memory is: S voxels of C channels. Statistics and sums are made of
chunks of voxels, without atomics, so that they are the same in every run; forward reads the input twice and backward
reads input and gradient twice. Everything is computed in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnssl_plugin.networks.instance_norm import NO_ACTIVATION, Gradients, Normalised

TILE = 4096
"""Voxels times channels that a program holds at a time."""
MOST_CHANNELS = 64
"""Of a tile."""
MOST_CHUNKS = 256
"""Into which the voxels of a sample are cut for statistics and sums."""
WARPS = 4
"""Of a program."""


class Layout(NamedTuple):
    """How maps are cut into tiles and chunks."""

    samples: int
    voxels: int
    channels: int
    block: int
    """Channels of a tile."""
    rows: int
    """Voxels of a tile."""
    chunks: int
    chunk: int
    """Voxels of a chunk."""

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        """The layout for maps (N, C, *spatial)."""
        samples, channels, voxels = x.shape[0], x.shape[1], x.shape[2:].numel()
        block = min(triton.next_power_of_2(channels), MOST_CHANNELS)
        rows = TILE // block
        tiles = triton.cdiv(voxels, rows)
        chunk = rows * triton.cdiv(tiles, min(tiles, MOST_CHUNKS))
        return cls(samples, voxels, channels, block, rows, triton.cdiv(voxels, chunk), chunk)

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return triton.cdiv(self.channels, self.block)


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *, eps: float, slope: float
) -> Normalised:
    """See ``instance_norm.normalised``; the result is in channels-last memory."""
    x = _channels_last(x)
    cut, y = Layout.of(x), torch.empty_like(x)
    mean, scale = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    means, squares = _sums(cut, x)
    _statistics_of_chunks[(cut.chunks, cut.samples, cut.blocks)](
        x, means, squares, cut.voxels, cut.channels, cut.chunk, ROWS=cut.rows, BLOCK=cut.block, num_warps=WARPS
    )
    _statistics[(cut.samples, cut.blocks)](
        means, squares, mean, scale, eps, cut.voxels, cut.channels, cut.chunks, cut.chunk, BLOCK=cut.block, MANY=64
    )
    _apply[(triton.cdiv(cut.voxels, cut.rows), cut.samples, cut.blocks)](
        x,
        *_given(weight, bias, x),
        x if residual is None else _channels_last(residual),
        mean,
        scale,
        y,
        slope,
        cut.voxels,
        cut.channels,
        AFFINE=weight is not None,
        RESIDUAL=residual is not None,
        ROWS=cut.rows,
        BLOCK=cut.block,
        num_warps=WARPS,
    )
    return Normalised(y, mean, scale)


def gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    *,
    mean: Tensor,
    scale: Tensor,
    slope: float,
) -> Gradients:
    """See ``instance_norm.gradients``; those of maps are in channels-last memory."""
    x, gradient = _channels_last(x), _channels_last(gradient)
    cut = Layout.of(x)
    of_x, of_residual = torch.empty_like(x), None if y is None else torch.empty_like(x)
    told = x if y is None else _channels_last(y)
    common = (gradient, x, *_given(weight, bias, x), told, mean, scale)
    options = {
        "AFFINE": weight is not None,
        "RESIDUAL": y is not None,
        "ACTIVATED": slope != NO_ACTIVATION,
        "ROWS": cut.rows,
        "BLOCK": cut.block,
        "num_warps": WARPS,
    }
    chunks = _sums(cut, x)
    _sums_of_chunks[(cut.chunks, cut.samples, cut.blocks)](
        *common, *chunks, slope, cut.voxels, cut.channels, cut.chunk, **options
    )
    sums = chunks.sum(2)  # (2, N, C)
    _apply_backward[(triton.cdiv(cut.voxels, cut.rows), cut.samples, cut.blocks)](
        *common,
        *sums,
        of_x,
        of_x if of_residual is None else of_residual,
        slope,
        cut.voxels,
        cut.channels,
        **options,
    )
    of_bias, of_weight = sums.sum(1)
    return Gradients(of_x, of_weight, of_bias, of_residual)


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last if maps.ndim == 4 else torch.channels_last_3d)


def _sums(cut: Layout, x: Tensor) -> Tensor:
    """Room for two numbers per chunk and channel, (2, N, chunks, C)."""
    return torch.empty(2, cut.samples, cut.chunks, cut.channels, dtype=torch.float32, device=x.device)


def _given(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers, which are not read where there are no weights."""
    return (x, x) if weight is None or bias is None else (weight, bias)


@triton.jit
def _statistics_of_chunks(x, means, squares, voxels, channels, chunk, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of each channel in a chunk: two passes over a tile, tiles merged by Chan,
    Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37(3), 1983."""
    number, sample = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    length = tl.minimum(chunk, voxels - number * chunk)
    start = x + (sample.to(tl.int64) * voxels + number * chunk) * channels
    mean, square, seen = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
    for first in range(0, length, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < length)[:, None] & (column < channels)[None, :]
        tile = tl.load(start + row[:, None] * channels + column[None, :], mask=inside, other=0.0).to(tl.float32)
        new = tl.minimum(ROWS, length - first).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / new
        deviation = tl.where(inside, tile - tile_mean[None, :], 0.0)
        difference = tile_mean - mean
        square += tl.sum(deviation * deviation, 0) + difference * difference * (seen * new / (seen + new))
        mean += difference * (new / (seen + new))
        seen += new
    place = (sample * tl.num_programs(0) + number) * channels + column
    tl.store(means + place, mean, mask=column < channels)
    tl.store(squares + place, square, mask=column < channels)


@triton.jit
def _statistics(
    means, squares, mean_of, scale_of, eps, voxels, channels, chunks, chunk, BLOCK: tl.constexpr, MANY: tl.constexpr
):
    """Mean and 1 / sqrt(variance + eps) of the chunks together, in two passes."""
    sample = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = sample * chunks * channels
    mean, square = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, MANY):
        number = first + tl.arange(0, MANY)
        inside = (number < chunks)[:, None] & (column < channels)[None, :]
        length = tl.minimum(chunk, voxels - number * chunk).to(tl.float32)
        place = start + number[:, None] * channels + column[None, :]
        mean += tl.sum(tl.load(means + place, mask=inside, other=0.0) * (length / voxels)[:, None], 0)
    for first in range(0, chunks, MANY):
        number = first + tl.arange(0, MANY)
        inside = (number < chunks)[:, None] & (column < channels)[None, :]
        length = tl.minimum(chunk, voxels - number * chunk).to(tl.float32)
        place = start + number[:, None] * channels + column[None, :]
        difference = tl.load(means + place, mask=inside, other=0.0) - mean[None, :]
        within = tl.load(squares + place, mask=inside, other=0.0)
        square += tl.sum(within + tl.where(inside, difference * difference * length[:, None], 0.0), 0)
    tl.store(mean_of + sample * channels + column, mean, mask=column < channels)
    tl.store(scale_of + sample * channels + column, 1.0 / tl.sqrt(square / voxels + eps), mask=column < channels)


@triton.jit
def _apply(
    x,
    weight,
    bias,
    residual,
    mean_of,
    scale_of,
    y,
    slope,
    voxels,
    channels,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the result."""
    sample = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    known = column < channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < voxels)[:, None] & known[None, :]
    place = (sample.to(tl.int64) * voxels + row[:, None]) * channels + column[None, :]
    mean = tl.load(mean_of + sample * channels + column, mask=known, other=0.0)
    scale = tl.load(scale_of + sample * channels + column, mask=known, other=0.0)
    z = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    if AFFINE:
        z = z * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
        z += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        z += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, tl.where(z > 0, z, z * slope).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normal_and_gradient(
    gradient,
    x,
    weight,
    bias,
    y,
    mean,
    scale,
    slope,
    place,
    inside,
    column,
    known,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATED: tl.constexpr,
):
    """Of a tile: the normalised input, and the gradient before the activation."""
    normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATED:
        z = normal
        if RESIDUAL:
            z = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        elif AFFINE:
            z = normal * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
            z += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
        g = tl.where(z > 0, g, g * slope)
    return normal, g


@triton.jit
def _sums_of_chunks(
    gradient,
    x,
    weight,
    bias,
    y,
    mean_of,
    scale_of,
    of_bias,
    of_weight,
    slope,
    voxels,
    channels,
    chunk,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the gradient before the activation, alone and times the normalised input, over a chunk."""
    number, sample = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    known = column < channels
    mean = tl.load(mean_of + sample * channels + column, mask=known, other=0.0)
    scale = tl.load(scale_of + sample * channels + column, mask=known, other=0.0)
    length = tl.minimum(chunk, voxels - number * chunk)
    alone, together = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < length)[:, None] & known[None, :]
        place = (sample.to(tl.int64) * voxels + number * chunk + row[:, None]) * channels + column[None, :]
        normal, g = _normal_and_gradient(
            gradient, x, weight, bias, y, mean, scale, slope, place, inside, column, known, AFFINE, RESIDUAL, ACTIVATED
        )
        alone += tl.sum(g, 0)
        together += tl.sum(g * normal, 0)
    out = (sample * tl.num_programs(0) + number) * channels + column
    tl.store(of_bias + out, alone, mask=known)
    tl.store(of_weight + out, together, mask=known)


@triton.jit
def _apply_backward(
    gradient,
    x,
    weight,
    bias,
    y,
    mean_of,
    scale_of,
    of_bias,
    of_weight,
    of_x,
    of_residual,
    slope,
    voxels,
    channels,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the gradients of input and residual."""
    sample = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    known = column < channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < voxels)[:, None] & known[None, :]
    place = (sample.to(tl.int64) * voxels + row[:, None]) * channels + column[None, :]
    of_map = sample * channels + column
    mean = tl.load(mean_of + of_map, mask=known, other=0.0)
    scale = tl.load(scale_of + of_map, mask=known, other=0.0)
    normal, g = _normal_and_gradient(
        gradient, x, weight, bias, y, mean, scale, slope, place, inside, column, known, AFFINE, RESIDUAL, ACTIVATED
    )
    mean_of_g = tl.load(of_bias + of_map, mask=known, other=0.0) / voxels
    mean_of_product = tl.load(of_weight + of_map, mask=known, other=0.0) / voxels
    factor = scale
    if AFFINE:
        factor = scale * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    result = factor[None, :] * (g - mean_of_g[None, :] - normal * mean_of_product[None, :])
    tl.store(of_x + place, result.to(of_x.dtype.element_ty), mask=inside)
    if RESIDUAL:
        tl.store(of_residual + place, g.to(of_residual.dtype.element_ty), mask=inside)
