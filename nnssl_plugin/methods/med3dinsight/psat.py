"""The plane-slice-aware transformer: from the tokens of a volume to the embedding of one of its slices.

Med3DInsight, section III-C, which calls it PSAT. Shapes: B samples, L tokens, Q queries.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_plugin.nnunet.planes import PLANES


class PlaneSliceAwareTransformer(nn.Module):
    """Queries that read, out of the tokens of a volume, what its slice j of plane i shows.

    Tokens are projected to ``dim`` and get a fixed sin-cos position on their grid. The plane-slice embedding V_p[:, i,
    j], zero at the start, is added to tokens and queries, so that every attention depends on the place, the queries'
    first one too, and belongs to its sample. The mean of the queries' outputs is the embedding.

    With ``output="attended"`` place and queries decide where is looked, and what is found there is all that comes out:
    tokens are read without positions and V_p, and the last block leaves out the residual of the queries.

    Args:
        channels: C of the tokens.
        embedding_dim: E of the frozen image and text embeddings.
        dim: width of tokens and queries.
        queries: number of queries Q.
        layers: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``dim``.
        slice_bins: number of slice positions J.
        output: ``residual`` or ``attended``.
    """

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        *,
        dim: int,
        queries: int,
        layers: int,
        heads: int,
        mlp_ratio: int,
        slice_bins: int,
        output: str = "residual",
    ):
        super().__init__()
        self.output = output
        self.project_tokens = nn.Linear(channels, dim)
        # equal queries would stay equal for ever under the mean, hence random ones
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.plane_slice = nn.Parameter(torch.zeros(dim, len(PLANES), slice_bins))
        self.token_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(QueryBlock(dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.project_embedding = nn.Linear(dim, embedding_dim)

    def forward(self, tokens: Tensor, grid: Sequence[int], plane: Tensor, position: Tensor) -> Tensor:
        """Embed each volume as its slice.

        Args:
            tokens: (B, L, C).
            grid: size of the grid that the tokens stand on, row-major; L is its product.
            plane: (B,) int64, index into ``planes.PLANES``.
            position: (B,) relative place of the slice along its axis, in [0, 1].

        Returns:
            (B, E) float32, L2-normalised.
        """
        bins = self.plane_slice.shape[2]
        index = (position * bins).floor().long().clamp(0, bins - 1)
        plane_slice = self.plane_slice[:, plane, index].mT[:, None]  # (B, 1, dim)
        tokens = self.project_tokens(tokens)
        places = grid_positions(grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        placed = self.token_norm(tokens + places + plane_slice)
        content = placed if self.output == "residual" else self.token_norm(tokens)
        queries = self.queries + plane_slice
        for block in self.blocks[:-1]:
            queries = block(queries, placed, content)
        last = self.blocks[-1]
        queries = last(queries, placed, content) if self.output == "residual" else last.read(queries, placed, content)
        # the projection is linear: of the mean it is the mean of the queries' projections
        embedding = self.project_embedding(self.norm(queries).mean(1))
        return F.normalize(embedding.float(), dim=1)


class QueryBlock(nn.Module):
    """Pre-norm self-attention of the queries, cross-attention to the tokens, and MLP, each with a residual.

    Args:
        dim: width of queries and tokens.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
    """

    def __init__(self, dim: int, *, heads: int, mlp_ratio: int):
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Update the queries (B, Q, dim) by tokens (B, L, dim): found by their keys, read as their values."""
        queries = self._exchange(queries)
        queries = queries + self._attend(queries, keys, values)
        return queries + self.mlp(self.mlp_norm(queries))

    def read(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the queries find (B, Q, dim), without what they are."""
        found = self._attend(self._exchange(queries), keys, values)
        return found + self.mlp(self.mlp_norm(found))

    def _exchange(self, queries: Tensor) -> Tensor:
        x = self.self_norm(queries)
        return queries + attention(self.self_attention, x, x, x)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(self.cross_attention, self.cross_norm(queries), keys, values)


def attention(layer: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What ``layer`` returns without its weights, by scaled-dot-product attention on views of the projections.

    The layer itself copies every projection into another order first. It must be batch-first, of one width and without
    dropout.

    Args:
        layer: its parameters are used.
        queries: (B, Q, dim).
        keys: (B, L, dim).
        values: (B, L, dim).

    Returns:
        (B, Q, dim).
    """
    different = _runs((queries, keys, values))
    sizes = [layer.embed_dim * len(run) for run in different]
    weights = layer.in_proj_weight.split(sizes)
    biases = layer.in_proj_bias.split(sizes)
    projected = [
        part
        for run, weight, bias in zip(different, weights, biases, strict=True)
        for part in F.linear(run[0], weight, bias).chunk(len(run), -1)
    ]
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in projected)
    found = F.scaled_dot_product_attention(q, k, v)
    return layer.out_proj(found.transpose(1, 2).flatten(2))


def _runs(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours that are the same tensor, together: they are projected at once."""
    return [list(run) for _, run in groupby(inputs, key=id)]


def grid_positions(grid: Sequence[int], dim: int, device: torch.device | str) -> Tensor:
    """Fixed sin-cos positions of the points of a grid (Vaswani et al., 2017, section 3.5, one axis after the other).

    Args:
        grid: size of the grid, any number of axes.
        dim: width; each axis takes an equal, even share, and what cannot be shared stays 0.
        device: where to make them.

    Returns:
        (product of the grid, dim) float32, row-major.
    """
    pairs = dim // (2 * len(grid))
    rates = 10000.0 ** (-torch.arange(pairs, device=device) / max(pairs, 1))
    axes = torch.meshgrid([torch.arange(size, device=device) for size in grid], indexing="ij")
    angles = [axis.reshape(-1, 1) * rates for axis in axes]
    parts = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return F.pad(parts, (0, dim - parts.shape[1]))
