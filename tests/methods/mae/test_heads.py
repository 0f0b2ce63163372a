"""The sequence that the light decoder reads: encoded tokens in their places, the mask token in all others."""

import torch
from torch import nn

from nnssl_plugin.methods.mae.heads import TokenDecoder


class Untouched(nn.Module):
    def forward(self, tokens, grid):
        return tokens


def test_tokens_return_to_their_places():
    decoder = TokenDecoder(Untouched(), 5).double()
    tokens = torch.randn(3, 4, 5, dtype=torch.float64)
    keep = torch.rand(3, 12).argsort(1)[:, :4]
    map_ = decoder(tokens, keep, (2, 3, 2))
    assert map_.shape == (3, 5, 2, 3, 2)
    expected = decoder.mask_token[0, 0].detach().repeat(3, 12, 1)
    for sample in range(3):
        for number, place in enumerate(keep[sample]):
            expected[sample, place] = tokens[sample, number]
    torch.testing.assert_close(map_, expected.mT.reshape(3, 5, 2, 3, 2))


def test_the_mask_token_learns_from_masked_places_alone():
    decoder = TokenDecoder(Untouched(), 5).double()
    tokens = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    keep = torch.arange(4).expand(2, -1)
    restored = decoder.restored(tokens, keep, 6)
    restored.backward(torch.arange(1.0, 7).double()[None, :, None].expand_as(restored))
    torch.testing.assert_close(decoder.mask_token.grad, torch.full((1, 1, 5), 2 * (5 + 6.0), dtype=torch.float64))
    torch.testing.assert_close(tokens.grad, torch.arange(1.0, 5).double()[None, :, None].expand(2, -1, 5))
