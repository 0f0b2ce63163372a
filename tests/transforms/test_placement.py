"""An array laid on cases by the centre rule, against a loop over voxels."""

import itertools

import pytest
import torch

from nnssl_plugin.transforms.placement import centre_offset, cut_placed, on_case, placed_windows


def naive(values, origin, extent, case_shape):
    cut = torch.zeros(len(values), *extent, dtype=values.dtype)
    for voxel in itertools.product(*map(range, extent)):
        place = [v + o + (g - c) // 2 for v, o, g, c in zip(voxel, origin, values.shape[1:], case_shape, strict=True)]
        if all(0 <= p < g for p, g in zip(place, values.shape[1:], strict=True)):
            cut[(slice(None), *voxel)] = values[(slice(None), *place)]
    return cut


@pytest.mark.parametrize(
    ("origin", "case_shape"),
    [
        ((0, 0, 0), (7, 6, 5)),  # as large as the array
        ((2, -1, 1), (9, 8, 9)),  # a larger case, a window that begins before it
        ((1, 2, 0), (4, 5, 2)),  # a smaller one
        ((30, 0, 0), (40, 6, 5)),  # a window that the array does not reach
        ((-9, 0, 0), (3, 6, 5)),
    ],
)
def test_a_window_holds_the_array_s_voxels_and_zeros_beside_them(origin, case_shape):
    values = torch.rand(2, 7, 6, 5, dtype=torch.float64) + 1
    cut = cut_placed(values, origin, (4, 3, 6), case_shape)
    assert torch.equal(cut, naive(values, origin, (4, 3, 6), case_shape))


def test_gradients_reach_the_voxels_of_the_window_alone():
    values = torch.rand(1, 8, 8, 8, requires_grad=True)
    cut_placed(values, (2, 2, 2), (3, 3, 3), (8, 8, 8)).sum().backward()
    assert values.grad.sum() == 27 and values.grad[0, 2:5, 2:5, 2:5].min() == 1


def test_the_centre_of_the_array_is_the_centre_of_the_case():
    values = torch.zeros(1, 9, 9, 9)
    values[0, 4, 4, 4] = 1
    for case in ((9, 9, 9), (5, 13, 21), (3, 3, 3)):
        (place,) = on_case(values, case)[0].nonzero().tolist()
        assert place == [size // 2 for size in case]
    assert centre_offset((9, 9), (4, 12)) == (2, -2)


def test_windows_of_a_batch_are_those_of_each_sample_and_so_are_their_gradients():
    values = torch.rand(3, 7, 6, 5, dtype=torch.float64)
    origin = torch.tensor([[0, 0, 0], [2, -1, 1], [30, 0, 0], [-2, 3, 1]])
    case_shape = torch.tensor([[7, 6, 5], [9, 8, 9], [40, 6, 5], [4, 5, 2]])
    number, weight = torch.tensor([2, 0, 1, 2]), torch.rand(4, 4, 3, 6, dtype=torch.float64)
    results = []
    for together in (True, False):
        arrays = values.clone().requires_grad_()
        if together:
            cut = placed_windows(arrays, number, origin.float(), case_shape.float(), (4, 3, 6))
        else:
            each = zip(number.tolist(), origin.tolist(), case_shape.tolist(), strict=True)
            cut = torch.stack([cut_placed(arrays[n], o, (4, 3, 6), shape) for n, o, shape in each])
        (cut * weight).sum().backward()
        results.append((cut.detach(), arrays.grad))
    torch.testing.assert_close(*results)
