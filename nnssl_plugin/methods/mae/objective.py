"""MAE: blocks of the image are hidden, and the network restores them.

He et al., "Masked Autoencoders Are Scalable Vision Learners", section 3. Networks with convolutions or windows read an
image whose masked blocks are 0, and restore it with all their skips, as MIC-DKFZ/nnssl does; transformers over patches
encode the visible patches alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_plugin.data.batch import Batch
from nnssl_plugin.methods.mae.heads import TokenDecoder
from nnssl_plugin.methods.mae.settings import Settings
from nnssl_plugin.methods.mae.views import block_edge, visible_count
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.reconstruction import mean_square
from nnssl_plugin.pretraining.pretext import PretextTask, Terms, Views
from nnssl_plugin.transforms.masks import fill_masked, inside_case, mask_all_but, random_ids


class MAE(PretextTask):
    """The pretext task: the mean square of x̂ − x over masked voxels.

    Args:
        backbone: the planned network; encoder and decoder are trained.
        settings: :class:`Settings`.
    """

    trained_parts = ("encoder", "decoder")

    def __init__(self, backbone: Backbone, settings: Settings):
        super().__init__(backbone, settings)
        self.token_decoder: TokenDecoder | None = None
        if backbone.encodes_subsets:
            blocks = backbone.token_decoder(settings.decoder_blocks)
            self.token_decoder = TokenDecoder(blocks, backbone.channels[-1])

    @torch.no_grad()
    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """The image, which voxels are masked, which count at all; in Primus also the visible patches (B, K)."""
        image = batch["image"]
        inside = inside_case(batch["origin"], batch["case_shape"], tuple(image.shape[2:]))
        return self.masked_views(image, inside, batch["available"], generator)

    def masked_views(self, image: Tensor, inside: Tensor, available: Tensor, generator: torch.Generator) -> Views:
        """The views of windows of which the voxels that lie in the case are known already.

        Args:
            image: (B, C, *spatial).
            inside: (B, 1, *spatial) bool, voxels that lie in the case.
            available: (B, C) bool, channels that the case has.
            generator: source of the random numbers, on the device of the image.
        """
        size = tuple(image.shape[2:])
        edges = self._edges(size)
        total, visible = visible_count(size, edges, self.settings.ratio)
        keep = random_ids(len(image), total, visible, generator=generator, device=image.device)
        masked = mask_all_but(keep, size, edges)
        views = {"image": image, "available": available, "inside": inside, "masked": masked}
        return views | ({} if self.token_decoder is None else {"keep": keep})

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """``reconstruction`` (B,): the mean square over the voxels that count, of channels that the case has."""
        return {}, {"reconstruction": self.error(self.reconstruct(views), views)}

    def error(self, restored: Tensor, views: Views) -> Tensor:
        """Mean square (B,) of x̂ − x over the voxels that count."""
        counted = _of_the_case(views)
        if self.settings.loss_on == "masked":
            counted = counted & views["masked"]
        return mean_square(restored, views["image"], counted)

    def reconstruct(self, views: Views) -> Tensor:
        """x̂ (B, C, *spatial), of the image without its masked voxels."""
        return self.restored(self.maps(views), views)

    def restored(self, maps: list[Tensor], views: Views) -> Tensor:
        """x̂ from what :meth:`maps` gave."""
        return self.backbone.reconstruct(maps).to(views["image"].dtype)

    def maps(self, views: Views) -> list[Tensor]:
        """What the network's decoder reads, fine to coarse: the encoder's maps; of a transformer the whole grid, in
        which the light decoder has put something into the masked places."""
        seen = fill_masked(views["image"], views["masked"], 0.0)
        if self.token_decoder is None:
            return self.backbone.features(seen)
        tokens = self.backbone.kept_tokens(seen, views["keep"])
        grid = [length // stride for length, stride in zip(seen.shape[2:], self.backbone.strides[-1], strict=True)]
        return [self.token_decoder(tokens, views["keep"], grid)]

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """The loss over masked voxels, that of the mean of the visible ones in their place, and the share explained:
        one less their ratio, 0 where nothing was learned that a constant does not know, 1 where all is exact."""
        image, inside = views["image"], _of_the_case(views)
        counted = inside & views["masked"]
        error = mean_square(self.reconstruct(views), image, counted).mean()
        control = mean_square(_visible_mean(image, inside & ~views["masked"]), image, counted).mean()
        explained = torch.where(control > 0, 1 - error / control, torch.nan)
        return {"masked_error": error, "visible_mean_error": control, "explained": explained}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor]]]:
        """Volume, masked volume and reconstruction, the first channel that the first sample has."""
        first = {name: view[:1] for name, view in views.items()}
        image, masked = first["image"], first["masked"]
        restored = torch.where(masked, self.reconstruct(first), image)
        channel = int(first["available"][0].int().argmax())
        shown = {
            "volume": image,
            "masked": fill_masked(image, masked, 0.0),
            "masked blocks reconstructed": restored,
        }
        return {"reconstruction": [(title, each[0, channel].float()) for title, each in shown.items()]}

    def _edges(self, size: Sequence[int]) -> tuple[int, ...]:
        """Edges of a block in voxels; of a transformer's patches, its own."""
        if self.token_decoder is not None:
            return self.backbone.strides[-1]
        return (self.settings.block or block_edge(size),) * len(size)


def _of_the_case(views: Views) -> Tensor:
    """(B, C, *spatial) bool: voxels that lie in the case, of channels that it has."""
    available = views["available"]
    return views["inside"] & available.reshape(*available.shape, *[1] * (views["image"].ndim - 2))


def _visible_mean(image: Tensor, visible: Tensor) -> Tensor:
    """Mean of the visible voxels of each channel (B, C, 1, …), 0 where there are none."""
    axes = tuple(range(2, image.ndim))
    number = visible.sum(axes, keepdim=True).clamp(min=1)
    return torch.where(visible, image, 0.0).sum(axes, keepdim=True) / number
