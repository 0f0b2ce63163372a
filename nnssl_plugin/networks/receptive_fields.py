"""Where the outputs of convolutional layers are centred: offset and stride of a layer, a chain, a residual block.

Output i of a layer is centred at offset + stride · i of its input, in voxels of that input: a strided 3×3×3 convolution
with padding 1 at stride · i, one whose kernel is its stride in the middle of its cell.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd


@dataclass(frozen=True)
class Sampling:
    """Where the outputs of a layer lie in its input, per axis."""

    offset: tuple[float, ...]
    """Centre of output 0, in voxels of the input."""
    stride: tuple[int, ...]
    """Voxels of the input from one output to the next."""

    def then(self, after: "Sampling") -> "Sampling":
        """This layer, and another on its output."""
        return Sampling(
            tuple(o + s * a for o, s, a in zip(self.offset, self.stride, after.offset, strict=True)),
            tuple(s * a for s, a in zip(self.stride, after.stride, strict=True)),
        )


def sampling(module: nn.Module, dimensions: int) -> Sampling:
    """Of a convolution, a pooling, a residual block, or modules that run one after the other in their order.

    The two branches of a residual block that strides differ: its convolution is centred at stride · i, the average
    pooling of its skip in the middle of the cell. Both are normalised, so that as initialised each carries half of
    what comes out, and the block is centred between them.

    Args:
        module: of dynamic_network_architectures, or made of layers in the order in which they run.
        dimensions: spatial ones.
    """
    if isinstance(module, _ConvNd | _AvgPoolNd | _MaxPoolNd):
        return _of_layer(module, dimensions)
    if isinstance(getattr(module, "conv", None), _ConvNd):  # a convolution with its normalisation, twice among them
        return _of_layer(module.conv, dimensions)
    if hasattr(module, "conv1") and hasattr(module, "skip"):
        layers = [getattr(module, name) for name in ("conv1", "conv2", "conv3") if hasattr(module, name)]
        skip = [module.skip] if isinstance(module.skip, nn.Module) else []
        branches = chain(layers, dimensions), chain(skip, dimensions)
        middle = zip(branches[0].offset, branches[1].offset, strict=True)
        return Sampling(tuple(sum(offsets) / 2 for offsets in middle), branches[0].stride)
    return chain(module.children(), dimensions)


def chain(modules: Iterable[nn.Module], dimensions: int) -> Sampling:
    """Of modules that run one after the other."""
    whole = Sampling((0.0,) * dimensions, (1,) * dimensions)
    for module in modules:
        whole = whole.then(sampling(module, dimensions))
    return whole


def _of_layer(layer: nn.Module, dimensions: int) -> Sampling:
    kernel, stride, padding, dilation = (
        _per_axis(getattr(layer, name, 1), dimensions) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    offset = (d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation, strict=True))
    return Sampling(tuple(offset), stride)


def _per_axis(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)
