"""What S2DC shows while it trains: which tokens resemble one of them, and what tells them apart (figures 1 and 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_plugin.training.pictures import Colours, Overlay

Pictures = list[tuple[str, Tensor | Overlay | Colours]]
"""Titled pictures of one file, as ``PretextTask.pictures`` gives them."""
COMPONENTS = 3


def anchor_similarity_pictures(
    image: Tensor, tokens: Tensor, *, grid: Sequence[int], anchor: int | None = None
) -> Pictures:
    """The image with an anchor marked, and over it the cosine of every token with the anchor's (figure 1).

    Args:
        image: (*spatial), one channel of the window that the tokens come from.
        tokens: (N, D) features of its tokens.
        grid: tokens per axis (N = their product).
        anchor: index of the anchor among the tokens; ``None`` for the token in the middle.
    """
    grid = tuple(grid)
    place = tuple(size // 2 for size in grid) if anchor is None else _unravel(anchor, grid)
    mark = tuple((cell + 0.5) * size / cells - 0.5 for cell, size, cells in zip(place, image.shape, grid, strict=True))
    unit = functional.normalize(tokens.float(), dim=1).unflatten(0, grid)
    similarity = _over(image, (unit @ unit[place])[None])[0]
    return [
        ("anchor", Overlay(image.float(), mark=mark)),
        ("cosine with the anchor", Overlay(image.float(), values=similarity, mark=mark)),
    ]


def principal_component_pictures(image: Tensor, tokens: Tensor, *, grid: Sequence[int]) -> Pictures:
    """The image, and the first three principal components of its tokens as red, green and blue (figure 6).

    Each component spans the whole range of its colour. Its sign is chosen so that its largest loading is positive, as
    in scikit-learn, so that equal tokens give equal pictures. Components that the tokens do not have stay grey.

    Args:
        image: (*spatial), one channel of the window that the tokens come from.
        tokens: (N, D) features of its tokens.
        grid: tokens per axis (N = their product).
    """
    components = principal_components(tokens).T.unflatten(1, tuple(grid))
    return [("image", image.float()), ("principal components 1 to 3", Colours(_over(image, components).movedim(0, -1)))]


def principal_components(tokens: Tensor) -> Tensor:
    """The first three principal components of tokens (N, D), each scaled to [0, 1]: (N, 3)."""
    centred = tokens.float() - tokens.float().mean(0)
    left, scale, right = torch.linalg.svd(centred, full_matrices=False)
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0]
    scores = (left * (scale * largest.sign()))[:, :COMPONENTS]
    low, spread = scores.amin(0), scores.amax(0) - scores.amin(0)
    # a component without variance is what rounding leaves of nothing
    present = scale[:COMPONENTS] > 1e-6 * scale[0].clamp(min=torch.finfo(scale.dtype).tiny)
    scaled = torch.where(present, (scores - low) / spread.where(present, 1.0), 0.5)
    return functional.pad(scaled, (0, COMPONENTS - scaled.shape[1]), value=0.5)


def _over(image: Tensor, cells: Tensor) -> Tensor:
    """Values of the cells (C, *grid), each over the voxels of its token: (C, *spatial)."""
    return functional.interpolate(cells[None], size=tuple(image.shape), mode="nearest-exact")[0]


def _unravel(index: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(place) for place in torch.unravel_index(torch.tensor(index), grid))
