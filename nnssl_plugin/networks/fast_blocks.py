"""Faster convolution blocks for nnU-Net's U-Nets: channels-last maps, and normalisation with activation as one step.

The blocks of dynamic_network_architectures are swapped in place: parameters, keys, initialisation and hooks stay, and
results are equal to rounding. cuDNN's convolutions in half precision work in channels-last memory; with stock blocks
every map is copied there and back, since PyTorch's instance normalisation knows the other order alone.
"""

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.instance_norm import NO_ACTIVATION, normalise

PARTS = ("conv", "dropout", "norm", "nonlin")
"""Of a block, in the order of the forward pass."""


class FastConv(ConvDropoutNormReLU):
    """Convolution, dropout, and instance normalisation with LeakyReLU in one."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock block."""
        return self.normalised(self.convolved(x), None, _slope(getattr(self, "nonlin", None)))

    def convolved(self, x: Tensor) -> Tensor:
        """What is normalised: without the convolution's bias, which the normalisation takes away again."""
        if hasattr(self, "dropout"):
            return self.dropout(self.conv(x))
        return self.conv._conv_forward(x, self.conv.weight, None)

    def normalised(self, x: Tensor, residual: Tensor | None, slope: float) -> Tensor:
        """Normalise, add a residual and activate."""
        cancelled = None if hasattr(self, "dropout") else self.conv.bias
        return normalise(
            x, self.norm.weight, self.norm.bias, residual, eps=self.norm.eps, slope=slope, cancelled=cancelled
        )


class FastBasicBlock(BasicBlockD):
    """Its last normalisation, the addition of the skip and LeakyReLU in one."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock block."""
        last: Any = self.conv2
        return last.normalised(last.convolved(self.conv1(x)), self.skip(x), _slope(self.nonlin2))


class FastBottleneck(BottleneckD):
    """Its last normalisation, the addition of the skip and LeakyReLU in one."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock block."""
        last: Any = self.conv3
        return last.normalised(last.convolved(self.conv2(self.conv1(x))), self.skip(x), _slope(self.nonlin3))


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ConvDropoutNormReLU: FastConv,
    BasicBlockD: FastBasicBlock,
    BottleneckD: FastBottleneck,
}


def use_fast_blocks(network: nn.Module) -> None:
    """Swap the blocks of a bare network, in place; once is enough. Weights are moved to channels-last memory.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet with instance normalisation and LeakyReLU.

    Raises:
        UserError: for any other network, which stays as it is.
    """
    if has_fast_blocks(network):
        return
    reason = reason_against_fast_blocks(network)
    if reason:
        raise UserError(
            f"{type(network).__name__} has no fast blocks: {reason}.",
            "Leave the setting fast out, or take a plan with nnU-Net's PlainConvUNet or ResidualEncoderUNet.",
        )
    for block in _blocks(network):
        block.__class__ = FAST[type(block)]
    dimensions = next(parameter.ndim for parameter in network.parameters() if parameter.ndim > 1)
    network.to(memory_format=torch.channels_last if dimensions == 4 else torch.channels_last_3d)
    network.encoder.register_forward_pre_hook(_to_channels_last)


def has_fast_blocks(network: nn.Module) -> bool:
    """Whether the blocks were swapped."""
    return any(isinstance(module, FastConv) for module in network.modules())


def reason_against_fast_blocks(network: nn.Module) -> str:
    """Why a network cannot have them; empty if it can."""
    blocks = _blocks(network)
    if not blocks or not hasattr(network, "encoder"):
        return "its layers are not nnU-Net's convolution blocks"
    return next(filter(None, map(_unknown, blocks)), "")


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module) in FAST]


def _unknown(block: nn.Module) -> str:
    """Why a block cannot be swapped; empty if it can."""
    if not isinstance(block, ConvDropoutNormReLU):
        if block.apply_stochastic_depth or block.apply_se:
            return "a block has more between its last normalisation and the addition"
        last = block.nonlin3 if isinstance(block, BottleneckD) else block.nonlin2
        return "" if _is_known_activation(last) else f"a block ends in {_name(last)}, not in LeakyReLU"
    parts = {name: getattr(block, name) for name in PARTS if hasattr(block, name)}
    if list(block.all_modules) != list(parts.values()):
        return "a block activates before it normalises"
    norm, activation = parts.get("norm"), parts.get("nonlin")
    if not isinstance(norm, _InstanceNorm) or norm.track_running_stats:
        return f"a block normalises by {_name(norm)}, not by InstanceNorm with the statistics of each image"
    if activation is not None and not _is_known_activation(activation):
        return f"a block activates by {_name(activation)}, not by LeakyReLU"
    return ""


def _is_known_activation(activation: object) -> bool:
    return isinstance(activation, nn.LeakyReLU) and activation.negative_slope >= 0


def _slope(activation: object) -> float:
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else NO_ACTIVATION


def _name(module: object) -> str:
    return "nothing" if module is None else type(module).__name__


def _to_channels_last(encoder: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give the encoder its image in channels-last memory, which all maps then keep."""
    x, *others = inputs
    if x.shape[1] == 1:  # memory of one channel is both, and convolutions take the strides' word
        x = x.contiguous()
        return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:])), *others
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d), *others
