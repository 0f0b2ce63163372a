"""The alignment out of a checkpoint: the mean over planes and places, one by one."""

from dataclasses import asdict

import pytest
import torch

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.alignment import POSITIONS, load_alignment
from nnssl_plugin.methods.med3dinsight.psat import PlaneSliceAwareTransformer
from nnssl_plugin.methods.med3dinsight.settings import Settings

SMALL = {"dim": 24, "queries": 8, "layers": 1, "heads": 4, "mlp_ratio": 2, "slice_bins": 16}


@torch.no_grad()
@pytest.mark.parametrize("field_of_view, output", [("window", "residual"), ("resize", "attended")])
def test_a_volume_is_the_mean_over_planes_and_the_places_of_the_training(field_of_view, output):
    torch.manual_seed(0)
    psat = PlaneSliceAwareTransformer(16, 12, output=output, **SMALL)
    psat.plane_slice.normal_()
    state = {f"psat.{key}": value for key, value in psat.state_dict().items()} | {"metric": 2 * torch.eye(12)}
    settings = Settings(**SMALL, field_of_view=field_of_view, output=output)
    alignment = load_alignment(state, asdict(settings))
    tokens, grid = torch.randn(2, 27, 16), (3, 3, 3)
    one_by_one = [
        psat(tokens, grid, torch.full((2,), plane), torch.full((2,), 0.25 + (number + 0.5) / (2 * POSITIONS)))
        for plane in range(3)
        for number in range(POSITIONS)
    ]
    torch.testing.assert_close(alignment.embed(tokens, grid), sum(one_by_one) / len(one_by_one))
    assert alignment.dimensions == 12 and alignment.whole == (field_of_view == "resize") and alignment.centre
    assert not any(weight.requires_grad for weight in alignment.psat.parameters())


def test_a_checkpoint_of_the_network_alone_is_refused():
    with pytest.raises(UserError, match="network alone"):
        load_alignment({}, {})
