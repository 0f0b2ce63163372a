"""Pictures of S2DC: similarity of all tokens with one of them, and their principal components (figures 1 and 6)."""

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_plugin.networks.token_grid import TokenGrid
from nnssl_plugin.training.pictures import Colours, Overlay

Pictures = list[tuple[str, Tensor | Overlay | Colours]]
"""Titled pictures of one file, as ``PretextTask.pictures`` gives them."""
COMPONENTS = 3


def anchor_similarity_pictures(
    image: Tensor, tokens: Tensor, *, grid: TokenGrid, anchor: int | None = None
) -> Pictures:
    """The image with an anchor marked, and over it the cosine of every token with the anchor's (figure 1).

    Args:
        image: (*spatial), one channel of the window that the tokens come from.
        tokens: (N, D) features of its tokens.
        grid: where they lie in the image.
        anchor: index of the anchor among the tokens; ``None`` for the token in the middle.
    """
    if anchor is None:
        anchor = int(torch.arange(len(tokens)).view(grid.counts)[tuple(count // 2 for count in grid.counts)])
    mark = tuple(grid.centres()[anchor].tolist())
    unit = functional.normalize(tokens.float(), dim=1)
    similarity = grid.over((unit @ unit[anchor]).unflatten(0, grid.counts), image.shape)
    return [
        ("anchor", Overlay(image.float(), mark=mark)),
        ("cosine with the anchor", Overlay(image.float(), values=similarity, mark=mark)),
    ]


def principal_component_pictures(image: Tensor, tokens: Tensor, *, grid: TokenGrid) -> Pictures:
    """The image, and the first three principal components of its tokens as red, green and blue (figure 6).

    Each component spans the whole range of its colour. Its sign is chosen so that its largest loading is positive, as
    in scikit-learn, so that equal tokens give equal pictures. Components that the tokens do not have stay grey.

    Args:
        image: (*spatial), one channel of the window that the tokens come from.
        tokens: (N, D) features of its tokens.
        grid: where they lie in the image.
    """
    components = grid.over(principal_components(tokens).T.unflatten(1, grid.counts), image.shape)
    return [("image", image.float()), ("principal components 1 to 3", Colours(components.movedim(0, -1)))]


def principal_components(tokens: Tensor) -> Tensor:
    """The first three principal components of tokens (N, D), each scaled to [0, 1]: (N, 3).

    They are those of the tokens that are finite; the others are grey, and so is everything where none is.
    """
    finite = tokens.isfinite().all(1)
    if not finite.all():
        colours = tokens.new_full((len(tokens), COMPONENTS), 0.5, dtype=torch.float32)
        if finite.any():
            colours[finite] = principal_components(tokens[finite])
        return colours
    centred = tokens.float() - tokens.float().mean(0)
    left, scale, right = torch.linalg.svd(centred, full_matrices=False)
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0]
    scores = (left * (scale * largest.sign()))[:, :COMPONENTS]
    low, spread = scores.amin(0), scores.amax(0) - scores.amin(0)
    # a component without variance is what rounding leaves of nothing
    present = scale[:COMPONENTS] > 1e-6 * scale[0].clamp(min=torch.finfo(scale.dtype).tiny)
    scaled = torch.where(present, (scores - low) / spread.where(present, 1.0), 0.5)
    return functional.pad(scaled, (0, COMPONENTS - scaled.shape[1]), value=0.5)
