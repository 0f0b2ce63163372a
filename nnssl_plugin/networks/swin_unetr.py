"""MONAI's SwinUNETR as nnU-Net builds the network of a plan: ``nnssl_plugin.networks.swin_unetr.SwinUNETR``.

Hatamizadeh et al. 2022, arXiv 2201.01266; the second version (``use_v2``) He et al. 2023, MICCAI. Nothing in this
package imports this module but a plan that names its class: MONAI is optional, and takes seconds to import.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nnssl_plugin.networks.construction import need_monai, refuse_deep_supervision
from nnssl_plugin.networks.families.swin_unetr import SWIN_UNETR

try:
    from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
except ImportError:
    MonaiSwinUNETR = None


class SwinUNETR(MonaiSwinUNETR or nn.Module):
    """MONAI's network under MONAI's keys, with what the networks of dynamic_network_architectures say of themselves.

    Args:
        input_channels: channels of the image (B, input_channels, *spatial).
        num_classes: channels of the output, at the size of the image.
        arguments: MONAI's other arguments, which JSON can hold (``feature_size``, ``depths``, ``num_heads`` …).
            ``deep_supervision`` may be False: the network has one output.

    Raises:
        UserError: without MONAI, or where deep supervision is asked for.
    """

    key_to_encoder = SWIN_UNETR.encoder
    key_to_stem = SWIN_UNETR.stem
    keys_to_in_proj = SWIN_UNETR.image_layers

    def __init__(self, input_channels: int, num_classes: int, **arguments):
        need_monai(MonaiSwinUNETR, "SwinUNETR", "swin")
        refuse_deep_supervision("SwinUNETR", arguments.pop("deep_supervision", False))
        with _RatesAsNumbers():
            super().__init__(in_channels=input_channels, out_channels=num_classes, **arguments)


class _RatesAsNumbers(TorchFunctionMode):
    """``torch.linspace`` on the CPU: MONAI reads the rates of stochastic depth out of it while it builds the network,
    and the meta device, on which plans are checked, holds no numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(kwargs or {}), **device)
