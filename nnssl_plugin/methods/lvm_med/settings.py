"""Settings of LVM-Med: the ``pretraining`` block of a plan, its ``method`` part being :class:`Settings`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.settings import Count, NonNegative, Positive, Range, Share

PositiveShare = Annotated[float, Range(gt=0, le=1)]


@dataclass(frozen=True)
class Settings:
    """Settings of the method. Numbers of the paper are marked [paper].

    Raises:
        UserError: when a smallest share or width is larger than the largest.
    """

    nodes: Annotated[int, Range(ge=2)] = 16
    """Images of a graph [paper]; the whole batch where it is smaller. Rows of a batch beyond the last whole graph are
    left out of the loss."""
    neighbours: Count = 5
    """k of the nearest neighbours that a node has edges to [paper]; all others in smaller graphs."""
    dim: Count = 128
    """Width F of the embeddings z and of the graph convolution [paper]."""
    layers: Annotated[int, Range(ge=0)] = 2
    """Layers of the graph convolution, Eq. 1 [paper]; 0 leaves it out."""
    residual: bool = True
    """Whether the embeddings z are added to what the graph convolution gives. As printed, `false` [paper], it averages
    a node with its neighbours, and encoders that start from random weights did not learn to tell these apart."""
    alpha: Share = 0.8
    """α of Eq. 3, the weight of the global affinity beside the local one [paper]; 1 leaves the local one out."""
    token_stride: Count = 32
    """Cells of the local affinity come from the finest stage with at least this stride in voxels, from the bottleneck
    where none has it: 7 × 7 cells at 224² of ResNet-50."""
    matches: PositiveShare = 0.41
    """γ, the share of a view's cells whose matches count, the nearest ones: 20 of 49 (VICRegL's; the paper gives no
    number)."""
    edge_weight: NonNegative = 1.0
    """Factor of the edges' affinities [paper: 1]."""
    solver: Literal["fw", "lap"] = "fw"
    """``fw``: nodes and edges are matched (Eq. 4), by Frank-Wolfe steps and a local search; ``lap``: nodes alone."""
    strength: Positive = 80.0
    """λ of Algorithm 1 [paper]. From about 60 on it only scales the gradient, which AdamW takes back."""
    noise: NonNegative = 0.05
    """Scale of the Gumbel noise on all affinities. Under the paper's 1 the noise decides most matches."""
    margin: NonNegative = 0.0
    """Taken from the affinity of the true pairs while training, so that they must win by as much: the constant of the
    paper's ablation without noise."""
    standardise: bool = True
    """Whether embeddings are standardised over the batch before the graphs are built. Behind an instance normalisation,
    as nnU-Net's networks have it, pooled features of all images are nearly equal."""
    slices_per_case: Count = 1
    """Consecutive slices of one case in consecutive rows, which share a graph: what the second order is for. 4 suits
    volumes; datasets of single pictures need 1."""
    channels: Count | None = None
    """Input channels of the network, ``null``: the dataset's. Images of another number show one of their channels,
    drawn at random, in all of them; so pictures of three channels and scans of one can share a network of 3."""
    image_share: tuple[PositiveShare, PositiveShare] = (1.0, 1.0)
    """Smallest and largest share of the window's area that both views of an image are cut from. The paper's images that
    it duplicates to balance modalities are first cropped to (0.85, 0.95)."""
    view_share: tuple[PositiveShare, PositiveShare] = (0.4, 1.0)
    """Smallest and largest share of that area that a view shows (VICRegL's large crops)."""
    flip: Share = 0.5
    """Probability that an axis of a view is mirrored [paper]."""
    shift: NonNegative = 0.2
    """Largest change of brightness, of each channel, in ranges of the image."""
    gamma: tuple[Positive, Positive] = (0.7, 1.5)
    """Smallest and largest exponent of a change of contrast, of each channel."""
    jitter_probability: Share = 0.8
    """Probability of a change of brightness and contrast, for each view."""
    blur: tuple[NonNegative, NonNegative] = (0.1, 2.0)
    """Smallest and largest standard deviation of a Gaussian blur, in voxels of the view."""
    blur_probability: Share = 0.5
    """Probability of the blur, for each view."""

    def __post_init__(self) -> None:
        for name in ("image_share", "view_share", "gamma", "blur"):
            smallest, largest = getattr(self, name)
            if smallest > largest:
                raise UserError(
                    f"Setting '{name}' of LVM-Med is [{smallest}, {largest}]; the smallest comes first.",
                    f"nnssl_plugin plan -d ID -p PLANS -n NAME --set 'method.{name}=[{largest},{smallest}]'",
                )


TRAINING = TrainingSettings(epochs=300, batch_size=32, lr=5e-4, schedule="halving", warmup_epochs=5.0)
"""Halved four times, without weight decay [paper]; the paper's 2e-3 is for batches of 3200."""
