"""MONAI's SegResNetDS as nnU-Net builds the network of a plan: ``nnssl_plugin.networks.segresnet.SegResNetDS``.

Myronenko 2018, arXiv 1810.11654; the network of Auto3DSeg, and of CT-FM (Pai et al. 2025, arXiv 2501.09001). Nothing in
this package imports this module but a plan that names its class: MONAI is optional, and takes seconds to import.
"""

from torch import nn

from nnssl_plugin.networks.construction import need_monai, refuse_deep_supervision
from nnssl_plugin.networks.families.segresnet import SEG_RES_NET

try:
    from monai.networks.nets.segresnet_ds import SegResNetDS as MonaiSegResNetDS
except ImportError:
    MonaiSegResNetDS = None


class SegResNetDS(MonaiSegResNetDS or nn.Module):
    """MONAI's network under MONAI's keys, with what the networks of dynamic_network_architectures say of themselves.

    Args:
        input_channels: channels of the image (B, input_channels, *spatial).
        num_classes: channels of the output, at the size of the image.
        arguments: MONAI's other arguments, which JSON can hold (``init_filters``, ``blocks_down``, ``norm`` …).
            ``deep_supervision`` may be False: nnU-Net tells the scales of its losses from arguments of U-Nets.

    Raises:
        UserError: without MONAI, or where deep supervision is asked for.
    """

    key_to_encoder = SEG_RES_NET.encoder
    key_to_stem = SEG_RES_NET.stem
    keys_to_in_proj = SEG_RES_NET.image_layers

    def __init__(self, input_channels: int, num_classes: int, **arguments):
        need_monai(MonaiSegResNetDS, "SegResNetDS", "monai")
        refuse_deep_supervision("SegResNetDS", arguments.pop("deep_supervision", False))
        super().__init__(in_channels=input_channels, out_channels=num_classes, **arguments)
