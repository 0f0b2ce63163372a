"""Images as sequences of patches."""

import pytest
import torch
from einops import rearrange

from nnssl_plugin.methods.m3ret.mae.patches import grid_of, patchify, unpatchify


@pytest.mark.parametrize(("slices", "count"), [(4, 256), (16, 1024), (64, 4096)])
def test_the_papers_inputs_have_256_1024_and_4096_patches_of_3072_numbers(slices, count):
    with torch.device("meta"):
        patches = patchify(torch.empty(1, 3, slices, 256, 256), (4, 16, 16))
    assert patches.shape == (1, count, 3072)


@pytest.mark.parametrize(("size", "patch"), [((4, 6, 10), (2, 3, 5)), ((8, 12), (4, 2)), ((2, 2, 2), (2, 2, 2))])
@pytest.mark.parametrize("channels", [1, 3])
def test_back_and_forth(size, patch, channels):
    image = torch.randn(2, channels, *size)
    patches = patchify(image, patch)
    grid = grid_of(size, patch)
    names = "abc"[: len(size)]
    inner = " ".join(name.upper() for name in names)
    whole = " ".join(f"({name} {name.upper()})" for name in names)
    edges = {name.upper(): edge for name, edge in zip(names, patch, strict=True)}
    expected = rearrange(image, f"n k {whole} -> n ({' '.join(names)}) (k {inner})", **edges)
    assert torch.equal(patches, expected)
    assert torch.equal(unpatchify(patches, patch, grid), image)
