"""Reading features, tokens and reconstructions out of the network that nnU-Net built from a plan."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnssl_plugin.errors import UserError


class Backbone(nn.Module):
    """One way to ask any planned U-Net for features; methods never look inside a network.

    Serves the encoder-decoder networks of dynamic_network_architectures (PlainConvUNet, ResidualEncoderUNet),
    2D and 3D. Feature maps are ordered fine to coarse.

    Args:
        network: the bare network of the plan; it stays reachable as ``network`` and keeps its keys.
        input_channels: channels of the image, which ``reconstruct`` gives back.
    """

    def __init__(self, network: nn.Module, input_channels: int):
        super().__init__()
        if not (hasattr(network, "encoder") and hasattr(getattr(network, "decoder", None), "transpconvs")):
            raise UserError(
                f"{type(network).__name__} is not a U-Net that pretraining can read.",
                "Use a plan with PlainConvUNet or ResidualEncoderUNet (nnUNetPlans, nnUNetResEncUNet*Plans).",
            )
        self.network = network
        self.input_channels = input_channels
        self.channels: tuple[int, ...] = tuple(network.encoder.output_channels)
        conv = network.encoder.conv_op
        self.dimensions = {nn.Conv2d: 2, nn.Conv3d: 3}[conv]
        strides = torch.tensor([[s] * self.dimensions if isinstance(s, int) else list(s)
                                for s in network.encoder.strides])
        self.strides: tuple[tuple[int, ...], ...] = tuple(tuple(s) for s in strides.cumprod(0).tolist())
        self.reconstruction_head = conv(self.channels[0], input_channels, 1)

    def features(self, x: Tensor) -> list[Tensor]:
        """Encoder maps of ``x`` (B, C, *spatial), fine to coarse: (B, channels[s], *spatial / strides[s])."""
        return self.network.encoder(x)

    def tokens(self, features: Sequence[Tensor], stride: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens (B, N, C) of one stage, and its grid (N = their product).

        Args:
            features: what :meth:`features` returned.
            stride: the finest stage whose largest stride is at least this; ``None`` for the bottleneck.
        """
        stage = -1
        if stride is not None:
            stage = next((s for s, t in enumerate(self.strides) if max(t) >= stride), -1)
        maps = features[stage]
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])

    def pooled(self, features: Sequence[Tensor]) -> Tensor:
        """Mean of the bottleneck (B, C)."""
        return features[-1].flatten(2).mean(-1)

    def decode(self, features: Sequence[Tensor], skips: bool = True) -> Tensor:
        """The decoder's finest map (B, channels[0], *spatial), before the segmentation layer.

        Args:
            features: what :meth:`features` returned.
            skips: ``False`` replaces every skip connection by zeros, so that the bottleneck carries everything.
        """
        decoder = self.network.decoder
        x = features[-1]
        for upsample, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(features[:-1]), strict=True):
            x = stage(torch.cat((upsample(x), skip if skips else torch.zeros_like(skip)), 1))
        return x

    def reconstruct(self, features: Sequence[Tensor], skips: bool = True) -> Tensor:
        """The image (B, input_channels, *spatial) from the decoder; the segmentation layers take no part."""
        return self.reconstruction_head(self.decode(features, skips=skips))

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze everything but the named parts, ``"encoder"`` and ``"decoder"`` (never its segmentation layers)."""
        self.requires_grad_(False)
        if "encoder" in parts:
            self.network.encoder.requires_grad_(True)
        if "decoder" in parts:
            for module in (self.network.decoder.transpconvs, self.network.decoder.stages, self.reconstruction_head):
                module.requires_grad_(True)

    def compile_parts(self) -> None:
        """Compile encoder and decoder stages in place, which leaves their keys alone."""
        for module in (self.network.encoder, *self.network.decoder.stages):
            module.compile()

    def trained_prefixes(self) -> list[str]:
        """Prefixes of the keys of ``network`` that are trained, for the checkpoint's provenance."""
        trained = {name for name, p in self.network.named_parameters(remove_duplicate=False) if p.requires_grad}
        prefixes = ["encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages."]
        return [prefix for prefix in prefixes if any(name.startswith(prefix) for name in trained)]
