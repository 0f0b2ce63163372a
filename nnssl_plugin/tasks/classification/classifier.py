"""Classification heads on the encoder of a planned network: pooled stages, attention over windows, linear layers."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import Parts

ATTENTION_WIDTH = 128


class Classifier(nn.Module):
    """The encoder of the plan's network and one linear head per target.

    The decoder takes no part: it is frozen, and kept so that the keys are those of the plan's network.

    A stage is pooled to the mean and the maximum of each channel. The networks of nnU-Net end in an instance
    normalisation, which gives each channel the same mean in every image; what the mean after the activation still tells
    is little, and the maximum tells whether the channel's pattern stands out anywhere.

    Args:
        network: the bare network of the plan, any that :class:`Backbone` serves.
        input_channels: channels of the image.
        heads: target → outputs (logits).
        stages: pooled stages, counted from the bottleneck; all of them where the network has fewer.
        dropout: of the pooled features before the heads, in [0, 1).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        input_channels: int,
        heads: Mapping[str, int],
        stages: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.backbone = Backbone(network, input_channels)
        self.backbone.train_only(("encoder",))
        self.stages = min(stages, len(self.backbone.channels))
        self.feature_size = 2 * sum(self.backbone.channels[-self.stages :])
        self.windows = AttentionPooling(self.feature_size)
        self.dropout = nn.Dropout(dropout)
        # a list, as names of targets may hold characters that a ModuleDict refuses
        self.targets = tuple(heads)
        self.heads = nn.ModuleList(nn.Linear(self.feature_size, outputs) for outputs in heads.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, outputs) of each target, from W windows of each image: ``x`` (B, W, C, *patch)."""
        features = self.dropout(self.embed(x))
        return {target: head(features) for target, head in zip(self.targets, self.heads, strict=True)}

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, feature_size) of images ``x`` (B, W, C, *patch)."""
        return self.windows(self._pooled(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    def _pooled(self, x: Tensor) -> Tensor:
        """(N, feature_size) of windows (N, C, *patch)."""
        maps = [stage.flatten(2) for stage in self.backbone.features(x)[-self.stages :]]
        return torch.cat([part for stage in maps for part in (stage.mean(-1), stage.amax(-1))], 1)

    def parts(self) -> Parts:
        """The encoder's stages; heads and the attention over windows are the head."""
        head = [*self.windows.parameters(), *self.heads.parameters()]
        return replace(self.backbone.parts(), head=head, rest_name="head")

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """:meth:`forward` of images on any device, in nnU-Net's precision: mixed on CUDA, full elsewhere."""
        device = next(self.parameters()).device
        with torch.autocast("cuda") if device.type == "cuda" else nullcontext():
            return self(x.to(device, non_blocking=True))


class AttentionPooling(nn.Module):
    """Gated attention over the windows of an image (Ilse, Tomczak and Welling 2018, eq. 8 and 9).

    It does not depend on the order of the windows. One window alone has weight 1: what comes in goes out.

    Args:
        width: F, features per window.
        hidden: width of the two layers that are multiplied.
    """

    def __init__(self, width: int, hidden: int = ATTENTION_WIDTH):
        super().__init__()
        self.pattern = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) from (B, W, F)."""
        return (self.weights(features)[..., None] * features).sum(1)

    def weights(self, features: Tensor) -> Tensor:
        """(B, W), which sum to 1 over the windows, from (B, W, F)."""
        scores = self.score(torch.tanh(self.pattern(features)) * torch.sigmoid(self.gate(features)))
        return scores.float().squeeze(-1).softmax(1)
