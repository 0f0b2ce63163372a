"""The alignment out of a checkpoint: the mean over planes and places, by what the task itself gives."""

from dataclasses import asdict

import pytest
import torch
from test_objective import EMBEDDING_DIM, build

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.alignment import POSITIONS, load_alignment


@pytest.mark.parametrize("field_of_view", ["window", "resize"])
@torch.no_grad()
def test_a_volume_is_the_mean_over_planes_and_the_places_of_the_training(field_of_view):
    task = build(field_of_view=field_of_view)
    task.psat.plane_slice.normal_()
    alignment = load_alignment(task.state_dict(), asdict(task.settings))
    tokens, grid = torch.randn(2, 27, task.backbone.channels[-1]), (3, 3, 3)
    first, step = 0.25 + 1 / (4 * POSITIONS), 1 / (2 * POSITIONS)
    one_by_one = [
        task.psat(tokens, grid, torch.full((2,), plane), torch.full((2,), first + number * step))
        for plane in range(3)
        for number in range(POSITIONS)
    ]
    torch.testing.assert_close(alignment.embed(tokens, grid), sum(one_by_one) / len(one_by_one))
    assert alignment.dimensions == EMBEDDING_DIM and alignment.whole == (field_of_view == "resize")
    assert alignment.centre and not any(weight.requires_grad for weight in alignment.psat.parameters())


def test_a_checkpoint_of_the_network_alone_is_refused():
    with pytest.raises(UserError, match="network alone"):
        load_alignment({}, {})
