"""Which modalities a step shows."""

import pytest
import torch

from nnssl_plugin.methods.brainmvp.views import draw_modalities
from nnssl_plugin.transforms.channels import channel_of

AVAILABLE = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)


def drawn(available, together, draws=2000):
    generator = torch.Generator().manual_seed(0)
    return [draw_modalities(available, torch.tensor(together), generator) for _ in range(draws)]


@pytest.mark.parametrize("together", [False, True])
def test_both_modalities_are_there_and_differ_where_there_are_two(together):
    for own, other, paired in drawn(AVAILABLE, together, 200):
        for case, (m, n, two) in enumerate(zip(own, other, paired, strict=True)):
            assert AVAILABLE[case, m] and AVAILABLE[case, n]
            assert bool(two) == (AVAILABLE[case].sum() > 1) and bool(two) == (m != n)


def test_every_modality_of_a_case_is_drawn_equally_often():
    own = torch.stack([m for m, _, _ in drawn(AVAILABLE, False)])
    for case, available in enumerate(AVAILABLE):
        share = torch.bincount(own[:, case], minlength=4) / len(own)
        torch.testing.assert_close(share, available / available.sum(), atol=0.04, rtol=0)


def test_cases_that_can_show_the_commonest_modality_together():
    for own, _, _ in drawn(AVAILABLE, True, 100):
        assert own[[0, 1, 3]].tolist() == [3, 3, 3] and own[2] == 2


def test_of_equally_common_modalities_each_is_drawn():
    own = torch.stack([m for m, _, _ in drawn(torch.ones(3, 4, dtype=torch.bool), True, 200)])
    assert (own == own[:, :1]).all() and set(own[:, 0].tolist()) == {0, 1, 2, 3}


def test_a_channel_of_each_sample():
    image = torch.rand(2, 3, 4, 5, 6)
    chosen = channel_of(image, torch.tensor([2, 0]))
    assert torch.equal(chosen[:, 0], torch.stack([image[0, 2], image[1, 0]]))
