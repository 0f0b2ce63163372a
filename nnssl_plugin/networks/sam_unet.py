"""SAM's vision transformer with a light decoder: ``nnssl_plugin.networks.sam_unet.SAMUNet``, in 2D.

Kirillov et al. 2023, Segment Anything, the image encoder, as timm has it; LVM-Med's second backbone. The encoder's
keys are timm's, below ``vit.``. Its positions are those of ``img_size``, SAM's 1024, and interpolated to the image at
hand as timm does: weights fit every patch size as they are. The decoder is that of
:mod:`nnssl_plugin.networks.patch_vit`; the paper takes TransUNet's.
"""

from collections.abc import Sequence

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.families.sam_unet import SAM_UNET
from nnssl_plugin.networks.patch_vit import LightDecoder


class SAMUNet(nn.Module):
    """SAM's image encoder of the size ViT-B, unless told otherwise, and a decoder whose one skip is the image.

    Args:
        input_channels: channels of the image (B, input_channels, H, W).
        num_classes: channels of the output, at the size of the image.
        img_size: pixels along an axis that the positions are made for.
        patch_size: pixels along an axis of a patch, a power of two.
        embed_dim: width of a token.
        depth: transformer blocks.
        num_heads: of each block.
        window_size: tokens along an axis that attend to one another.
        global_attn_indexes: blocks in which all tokens do.
        neck_chans: channels of SAM's neck, the encoder's last map; 0 for the tokens themselves, as LVM-Med pools them,
            with a normalisation.
        use_abs_pos: whether patches know their place in the image, beside their distances; LVM-Med's do not.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        decoder_width: channels of the decoder's finest map.
        deep_supervision: may be False: the network has one output.

    Raises:
        UserError: where deep supervision is asked for.
    """

    key_to_encoder = SAM_UNET.encoder
    key_to_stem = SAM_UNET.stem
    keys_to_in_proj = SAM_UNET.image_layers

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        img_size: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        window_size: int = 14,
        global_attn_indexes: Sequence[int] = (2, 5, 8, 11),
        neck_chans: int = 0,
        use_abs_pos: bool = True,
        drop_path_rate: float = 0.0,
        decoder_width: int = 32,
        deep_supervision: bool = False,
    ):
        super().__init__()
        if deep_supervision:
            raise UserError(
                "SAMUNet has no deep supervision, which this trainer asks for.",
                "Train with -tr PretrainedSegmentationTrainer; from random weights with the plan of "
                "nnssl_plugin adapt --from-scratch.",
            )
        self.vit = SAMEncoder(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=input_channels,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            window_size=window_size,
            global_attn_indexes=tuple(global_attn_indexes),
            neck_chans=neck_chans,
            use_abs_pos=use_abs_pos,
            use_rel_pos=True,
            drop_path_rate=drop_path_rate,
        )
        self.decoder = LightDecoder(input_channels, (patch_size, patch_size), self.vit.num_features, decoder_width)
        self.head = nn.Conv2d(decoder_width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of an image (B, input_channels, H, W)."""
        return self.head(self.decoder(self.vit(x), x))


class SAMEncoder(VisionTransformerSAM):
    """timm's network up to its last map."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, num_features, H / patch_size, W / patch_size) of an image (B, C, H, W)."""
        return self.forward_features(x)
