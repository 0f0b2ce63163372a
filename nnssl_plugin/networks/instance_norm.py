"""Instance normalisation, the addition of a residual and LeakyReLU as one operation, forward and backward.

Maps keep their memory format: channels-last ones stay so, where PyTorch's instance normalisation copies them into the
other order. On CUDA Triton's kernels do the work (``instance_norm_kernels.py``), elsewhere PyTorch's operators.
Shapes: maps (N, C, *spatial), one statistic per sample and channel.
"""

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_ACTIVATION = 1.0
"""The slope below 0 that leaves everything as it is."""


class Normalised(NamedTuple):
    """What the forward pass gives."""

    y: Tensor
    """(N, C, *spatial), in the type and memory format of the input."""
    mean: Tensor
    """(N, C) of the input, float32 at least."""
    scale: Tensor
    """(N, C), 1 / sqrt(variance + eps)."""


class Gradients(NamedTuple):
    """What the backward pass gives."""

    x: Tensor
    weight: Tensor
    """(C,), also where there is no weight."""
    bias: Tensor
    residual: Tensor | None
    """``None`` where there was no residual."""


def normalise(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    slope: float = NO_ACTIVATION,
    cancelled: Tensor | None = None,
) -> Tensor:
    """LeakyReLU(instance normalisation of ``x``, times ``weight`` plus ``bias``, plus ``residual``).

    Mean and variance are of two passes in float32, or float64 for such maps. Differentiable once.

    Args:
        x: (N, C, *spatial), with more than one voxel.
        weight: (C,), with ``bias``; ``None`` without.
        bias: (C,).
        residual: of the shape of ``x``.
        eps: added to the variance.
        slope: of LeakyReLU below 0, at least 0; 1 is no activation.
        cancelled: (C,), a bias that was not added to ``x``, since the mean takes it away; its gradient is 0.

    Returns:
        (N, C, *spatial), of the type of ``x``.

    Raises:
        ValueError: for maps of a single voxel, as of PyTorch's instance normalisation.
    """
    if x.shape[2:].numel() == 1:
        raise ValueError(f"Instance normalisation needs more than one voxel per channel, got {tuple(x.shape)}")
    return _Normalise.apply(x, weight, bias, residual, cancelled, eps, slope)


class _Normalise(torch.autograd.Function):
    """Keeps the input and two numbers per sample and channel, with a residual the result too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        cancelled: Tensor | None,
        eps: float,
        slope: float,
    ) -> Tensor:
        kernels = _kernels(x)
        forward = normalised if kernels is None else kernels.normalised
        y, mean, scale = forward(x, weight, bias, residual, eps=eps, slope=slope)
        # LeakyReLU keeps the sign: the result tells its branch; without a residual the input does
        ctx.save_for_backward(x, weight, bias, mean, scale, y if residual is not None else None, cancelled)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale, y, cancelled = ctx.saved_tensors
        kernels = _kernels(x)
        backward = gradients if kernels is None else kernels.gradients
        found = backward(gradient, x, weight, bias, y, mean=mean, scale=scale, slope=ctx.slope)
        affine = (None, None) if weight is None else (found.weight.to(weight.dtype), found.bias.to(bias.dtype))
        of_cancelled = None if cancelled is None else torch.zeros_like(cancelled)
        return found.x, *affine, found.residual, of_cancelled, None, None


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *, eps: float, slope: float
) -> Normalised:
    """:func:`normalise` by PyTorch's operators, with its statistics."""
    spatial, wide = tuple(range(2, x.ndim)), _full_precision(x)
    mean = wide.mean(spatial, keepdim=True)
    z = wide - mean
    scale = (z.square().mean(spatial, keepdim=True) + eps).rsqrt()
    if weight is None or bias is None:
        z = z.mul_(scale)
    else:
        z = z.mul_(scale * _over_maps(weight, x)).add_(_over_maps(bias, x))
    if residual is not None:
        z = z.add_(residual)
    y = z if slope == NO_ACTIVATION else torch.nn.functional.leaky_relu_(z, slope)
    return Normalised(y.to(x.dtype), mean.flatten(1), scale.flatten(1))


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
    """The backward pass of :func:`normalised`: with x̂ the normalised input, g the gradient before the activation and w
    the weight, that of x is w · scale · (g − mean(g) − x̂ · mean(g x̂)), the means over the voxels of a channel.

    Args:
        gradient: of the result, (N, C, *spatial).
        x: the input.
        weight: as it was.
        bias: as it was.
        y: the result, where there was a residual.
        mean: of the input, (N, C).
        scale: of the input, (N, C).
        slope: as it was.
    """
    spatial, voxels = tuple(range(2, x.ndim)), x.shape[2:].numel()
    mean, scale = (_per_map(each, x) for each in (mean, scale))
    normal = (_full_precision(x) - mean).mul_(scale)
    g = _full_precision(gradient)
    if slope != NO_ACTIVATION:
        g = torch.where(_is_positive(normal, weight, bias, y), g, g * slope)
    of_bias, of_weight = g.sum(spatial, keepdim=True), (g * normal).sum(spatial, keepdim=True)
    factor = scale if weight is None else scale * _over_maps(weight, x)
    of_x = normal.mul_(of_weight / -voxels).add_(g).sub_(of_bias / voxels).mul_(factor)
    return Gradients(
        of_x.to(x.dtype),
        of_weight.sum(0).flatten(),
        of_bias.sum(0).flatten(),
        None if y is None else g.to(x.dtype),
    )


def _is_positive(normal: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None) -> Tensor:
    """Where the activation left the values as they were."""
    if y is not None:
        return y > 0
    if weight is None or bias is None:
        return normal > 0
    return normal * _over_maps(weight, normal) + _over_maps(bias, normal) > 0


def _kernels(x: Tensor) -> ModuleType | None:
    """Triton's kernels, where they can be used; they compute in float32."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or not _has_triton():
        return None
    from nnssl_plugin.networks import instance_norm_kernels  # needs Triton

    return instance_norm_kernels


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _full_precision(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _over_maps(per_channel: Tensor, maps: Tensor) -> Tensor:
    """(C,) as (1, C, 1, …)."""
    return per_channel.reshape(1, -1, *[1] * (maps.ndim - 2))


def _per_map(values: Tensor, maps: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, …)."""
    return values.reshape(*values.shape, *[1] * (maps.ndim - 2))
