"""The interface to planned networks: features, tokens and where they lie, reconstructions, trained parts."""

from collections.abc import Sequence

from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.family import Parts, SummaryReader, TokenReader, reader_of
from nnssl_plugin.networks.token_grid import TokenGrid


class Backbone(nn.Module):
    """Features of any planned network by one interface; methods never look inside a network.

    Serves the networks of every family in ``networks/families``. Feature maps are ordered fine to coarse; the tokens of
    Primus are one map, at the stride of its patches. In SwinUNETR the stage of stride 1 is the image itself, which its
    decoder reads.

    Args:
        network: the bare network of the plan; it stays reachable as ``network`` and keeps its keys.
        input_channels: channels of the image, which ``reconstruct`` gives back.
    """

    def __init__(self, network: nn.Module, input_channels: int):
        super().__init__()
        self._reader = reader_of(network)
        self.network = network
        self.input_channels = input_channels
        self.channels: tuple[int, ...] = self._reader.channels
        self.dimensions: int = self._reader.dimensions
        self.strides: tuple[tuple[int, ...], ...] = self._reader.strides
        self.prefixes: tuple[str, ...] = self._reader.prefixes
        self.reconstruction_head = self._reader.image_layer(input_channels)

    def features(self, x: Tensor) -> list[Tensor]:
        """Encoder maps of ``x`` (B, C, *spatial), fine to coarse: (B, channels[s], *spatial / strides[s])."""
        return self._reader.features(x)

    @property
    def has_summary(self) -> bool:
        """Whether :meth:`summarised` works: for transformers with a token that stands for the whole image."""
        return isinstance(self._reader, SummaryReader) and self._reader.has_summary

    def summarised(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The summary token (B, C) of an image (B, C, *spatial), and its :meth:`features`, by one pass.

        Raises:
            UserError: for a network without such a token, as convolutional ones and Primus are.
        """
        if not (isinstance(self._reader, SummaryReader) and self._reader.has_summary):
            raise UserError(
                f"{type(self.network).__name__} has no summary token: it describes an image by its maps alone.",
                "Let the method use their mean (Backbone.pooled), or plan a transformer with a summary token.",
            )
        return self._reader.summarised(x)

    @property
    def encodes_subsets(self) -> bool:
        """Whether :meth:`kept_tokens` works: for transformers over patches."""
        return isinstance(self._reader, TokenReader)

    def kept_tokens(self, x: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, K, C) of some patches of an image, encoded as if the others did not exist.

        A convolutional patch embedding (PrimusV2, V3) reads across the borders of patches: blank what must not be seen.

        Args:
            x: (B, C, *spatial).
            keep: (B, K) long, which tokens of each sample, without repetition, as :meth:`tokens` numbers them; the
                result has their order.

        Raises:
            UserError: for a network that cannot leave out a part of the image.
        """
        return self._token_reader().kept_tokens(x, keep)

    def token_decoder(self, blocks: int) -> nn.Module:
        """Fresh transformer blocks of the encoder's width: called with tokens (B, N, C) and the counts of their grid.

        ``decode`` of Primus treats each token alone: what stands for a patch that was not encoded must attend to the
        encoded ones before.

        Raises:
            UserError: for a network without tokens.
        """
        return self._token_reader().token_decoder(blocks)

    def stage(self, stride: int | None) -> int:
        """Index of the finest stage whose largest stride is at least ``stride``; the bottleneck where there is none,
        and for ``None``."""
        last = len(self.strides) - 1
        return next((s for s, t in enumerate(self.strides) if stride is not None and max(t) >= stride), last)

    def tokens(self, features: Sequence[Tensor], stride: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens (B, N, C) of one stage, and its grid (N = their product).

        Args:
            features: what :meth:`features` returned.
            stride: see :meth:`stage`.
        """
        maps = features[self.stage(stride)]
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])

    def token_grid(self, counts: Sequence[int], stride: int | None = None) -> TokenGrid:
        """Where the tokens of one stage lie in the image.

        Args:
            counts: tokens per axis, the grid that :meth:`tokens` gives.
            stride: see :meth:`stage`.
        """
        return self.stage_grid(self.stage(stride), counts)

    def stage_grid(self, stage: int, counts: Sequence[int]) -> TokenGrid:
        """:meth:`token_grid` of a stage by its index in what :meth:`features` returns."""
        return TokenGrid(tuple(counts), self._reader.offsets[stage], self.strides[stage])

    def token_centres(self, counts: Sequence[int], stride: int | None = None) -> Tensor:
        """Centres (N, d) of the tokens of one stage in the image, in voxels; arguments as of :meth:`token_grid`."""
        return self.token_grid(counts, stride).centres()

    def pooled(self, features: Sequence[Tensor]) -> Tensor:
        """Mean of the bottleneck (B, C)."""
        return features[-1].flatten(2).mean(-1)

    def decode(self, features: Sequence[Tensor], skips: bool = True) -> Tensor:
        """The decoder's last map before the segmentation layer: (B, channels[0], *spatial) in a U-Net,
        (B, feature_size, *spatial) in SwinUNETR; in Primus, whose segmentation layer is its last up-sampling, one step
        coarser.

        Args:
            features: what :meth:`features` returned.
            skips: ``False`` replaces every skip connection by zeros, so that the bottleneck carries everything.
        """
        return self._reader.decode(features, skips)

    def reconstruct(self, features: Sequence[Tensor], skips: bool = True) -> Tensor:
        """The image (B, input_channels, *spatial) from the decoder; the segmentation layers take no part."""
        return self.reconstruction_head(self.decode(features, skips=skips))

    def _token_reader(self) -> TokenReader:
        if not isinstance(self._reader, TokenReader):
            raise UserError(
                f"{type(self.network).__name__} cannot encode a part of the image: its layers need the whole grid.",
                "Mask the image instead, or use a plan with Primus: nnssl_plugin plan -d ID -n NAME --preset primus-s",
            )
        return self._reader

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze everything but the named parts, ``"encoder"`` and ``"decoder"`` (never its segmentation layers)."""
        self.requires_grad_(False)
        if "encoder" in parts:
            for parameter in self._reader.encoder_parameters():
                parameter.requires_grad_(True)
        if "decoder" in parts:
            for parameter in (*self._reader.decoder_parameters(), *self.reconstruction_head.parameters()):
                parameter.requires_grad_(True)

    def parts(self) -> Parts:
        """Encoder stages and head of the network, for recipes of fine-tuning."""
        return self._reader.parts()

    def compile_parts(self) -> None:
        """Compile the network's large parts in place, which leaves their keys alone."""
        for module in self._reader.compiled():
            module.compile()

    def trained_prefixes(self) -> list[str]:
        """Prefixes of the keys of ``network`` that are trained, for the checkpoint's provenance."""
        trained = {name for name, p in self.network.named_parameters(remove_duplicate=False) if p.requires_grad}
        return [prefix for prefix in self.prefixes if any(name.startswith(prefix) for name in trained)]
