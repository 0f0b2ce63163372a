"""Pictures drawn while training: grey, with values over them, coloured; the slices that they show."""

import matplotlib.image
import numpy as np
import pytest
import torch

from nnssl_plugin.training.pictures import Colours, Overlay, draw_pictures


def drawn(images, tmp_path):
    draw_pictures(images, tmp_path / "p.png")
    return matplotlib.image.imread(tmp_path / "p.png")[..., :3]


def has(picture, colour):
    """Pixels of a colour, up to rounding."""
    return int((np.abs(picture - np.array(colour)).max(-1) < 0.02).sum())


@pytest.mark.parametrize("size", [(8, 9), (8, 9, 7)])
def test_grey_images_stay_grey(size, tmp_path):
    picture = drawn([("a", torch.rand(size)), ("b", torch.rand(size))], tmp_path)
    assert np.ptp(picture, axis=-1).max() < 0.01


@pytest.mark.parametrize("size", [(8, 9), (8, 9, 7)])
def test_coloured_images_keep_their_colours(size, tmp_path):
    colours = torch.zeros(*size, 3)
    colours[..., 0] = 1
    picture = drawn([("a", torch.rand(size)), ("b", Colours(colours))], tmp_path)
    assert has(picture, (1, 0, 0)) > 1000


def test_a_marked_point_chooses_the_slices_of_all_pictures(tmp_path):
    colours = torch.zeros(9, 9, 9, 3)
    colours[1, 2, 3, 1] = 1
    shown = [("a", Overlay(torch.rand(9, 9, 9), mark=(1.0, 2.0, 3.0))), ("b", Colours(colours))]
    assert has(drawn(shown, tmp_path), (0, 1, 0)) > 1000
    assert has(drawn([("a", torch.rand(9, 9, 9)), ("b", Colours(colours))], tmp_path), (0, 1, 0)) == 0


def test_values_are_drawn_over_the_image_with_a_bar(tmp_path):
    image = torch.rand(8, 8)
    plain = drawn([("a", Overlay(image))], tmp_path)
    over = drawn([("a", Overlay(image, values=torch.ones(8, 8)))], tmp_path)
    assert over.shape[1] > plain.shape[1]
    assert np.ptp(over, axis=-1).max() > 0.2 > np.ptp(plain, axis=-1).max()


def test_a_constant_image_can_be_drawn(tmp_path):
    assert drawn([("a", Overlay(torch.zeros(4, 4, 4), values=torch.zeros(4, 4, 4)))], tmp_path).size
