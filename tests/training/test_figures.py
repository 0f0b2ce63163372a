"""Pictures drawn while training: grey, with values over them, coloured; their slices, aspect and sides; and curves."""

from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl_plugin.training import figures, pictures
from nnssl_plugin.training.figures import Panel, draw_progress
from nnssl_plugin.training.pictures import Colours, Overlay, draw_pictures

RED = (1, 0, 0)


def drawn(images, tmp_path, **how):
    draw_pictures(images, tmp_path / "p.png", **how)
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


def red_boxes(picture):
    """Height and width in pixels of each red area, from top to bottom."""
    areas, _ = ndimage.label(np.abs(picture - np.array(RED)).max(-1) < 0.02)
    return [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in ndimage.find_objects(areas)]


@pytest.mark.parametrize("letters", [None, ("IS", "PA", "LR")])
@pytest.mark.parametrize("spacing", [(5, 1, 1), (1, 2, 0.5)])
def test_voxels_keep_their_aspect_and_slices_have_one_scale(tmp_path, spacing, letters):
    red = torch.zeros(12, 30, 20, 3)
    red[..., 0] = 1
    boxes = red_boxes(drawn([("a", Colours(red))], tmp_path, spacing=spacing, letters=letters))
    z, y, x = (size * mm for size, mm in zip((12, 30, 20), spacing, strict=True))
    expected = [(y, x), (z, x), (z, y)]
    scale = boxes[0][0] / expected[0][0]
    assert len(boxes) == 3
    for box, (up, across) in zip(boxes, expected, strict=True):
        np.testing.assert_allclose(box, (up * scale, across * scale), atol=3)


@pytest.mark.parametrize("size", [(16, 16, 16), (40, 20, 10), (48, 6), (6, 48)])
def test_titles_stand_apart_and_inside(size, tmp_path, monkeypatch):
    caught = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: caught.append(figure))
    titles = ["image", "masked image, as the network reads it", "reconstruction of what was masked"]
    draw_pictures([(title, torch.rand(size)) for title in titles], tmp_path / "p.png")
    (figure,) = caught
    figure.canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a, b in pairwise(boxes))
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    figures.pyplot().close(figure)


def test_an_image_keeps_its_aspect(tmp_path):
    red = torch.zeros(10, 10, 3)
    red[..., 0] = 1
    for how in ({}, {"letters": ("IS", "PA", "LR")}):
        ((height, width),) = red_boxes(drawn([("a", Colours(red))], tmp_path, spacing=(1, 2), **how))
        assert height == pytest.approx(width / 2, abs=2)


@pytest.mark.parametrize(
    ("letters", "left", "top"),
    [(("IS", "PA", "LR"), True, True), (None, False, True), (("SI", "AP", "RL"), False, False)],
)
def test_the_patients_right_is_on_the_left_and_the_head_at_the_top(tmp_path, letters, left, top):
    red = torch.zeros(20, 20, 20, 3)
    red[12:, 12:, 12:, 0] = 1  # where the indices are high
    picture = drawn([("a", Colours(torch.ones(20, 20, 20, 3))), ("b", Colours(red))], tmp_path, letters=letters)
    coronal = picture[picture.shape[0] // 3 : 2 * picture.shape[0] // 3, picture.shape[1] // 2 :]
    assert not has(coronal, RED)  # the central slices lie outside
    red[10:, 10:, 10:, 0] = 1
    picture = drawn([("b", Colours(red))], tmp_path, letters=letters)
    rows, columns = np.nonzero(np.abs(picture - np.array(RED)).max(-1) < 0.02)
    third = (rows > picture.shape[0] / 3) & (rows < 2 * picture.shape[0] / 3)
    assert (columns[third].mean() < picture.shape[1] / 2) == left
    assert (rows[third].mean() < picture.shape[0] / 2) == top


def test_what_is_not_finite_does_not_hide_the_rest(tmp_path):
    image = torch.rand(8, 9)
    image[0, 0], image[1, 1] = float("nan"), float("inf")
    assert np.ptp(drawn([("a", image)], tmp_path)) > 0.9
    assert drawn([("a", torch.full((4, 4), float("nan")))], tmp_path).size


@pytest.fixture
def curves(monkeypatch, tmp_path):
    """A function (history, panels) → the matplotlib figure."""
    caught = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: caught.append(figure))

    def draw(history, **how):
        draw_progress(history, tmp_path / "p.png", **how)
        return caught.pop()

    yield draw
    figures.pyplot().close("all")


def test_a_panel_without_a_number_is_named_with_its_reason(curves):
    panels = (
        Panel("Loss", lambda name: name == "train_losses"),
        Panel("Rank", lambda name: name == "rank", "too few samples"),
        ("Rate", lambda name: name == "lrs"),
    )
    figure = curves({"train_losses": [2.0, 1.0], "rank": [float("nan")] * 2}, panels=panels)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["Loss"]
    assert [text.get_text() for text in figure.texts] == ["Not shown. Rank: too few samples; Rate: not logged."]
    whole = curves({"train_losses": [2.0], "rank": [1.0], "lrs": [1.0]}, panels=panels)
    assert not any(text.get_text() for text in whole.texts)


def test_epochs_count_from_0_as_in_nnunets_log(curves):
    (line,) = curves({"train_losses": [3.0, 2.0, 1.0]}).axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])


def test_what_is_measured_every_few_epochs_is_joined_to_a_line(curves):
    nan = float("nan")
    (line,) = curves({"train_losses": [nan, 3.0, nan, nan, 1.0]}).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 3.0], [4, 1.0]])


def test_several_kinds_have_a_panel_for_each_term_and_a_colour_for_each_kind(curves):
    kinds = [f"kind_{number}" for number in range(5)]
    names = [f"{prefix}/{term}/{kind}" for prefix in ("train", "val") for term in ("a", "b") for kind in kinds]
    few = [name for name in names if name.endswith(("0", "1"))]
    axes = [axis for axis in curves({name: [2.0, 1.0] for name in names}).axes if axis.get_visible()]
    assert [axis.get_title().rpartition(": ")[2] for axis in axes] == ["a", "b"]
    for axis in axes:
        assert [text.get_text() for text in axis.get_legend().get_texts()] == kinds and len(axis.lines) == 10
        assert len({line.get_color() for line in axis.lines}) == 5
        assert [line.get_linestyle() for line in axis.lines] == ["-"] * 5 + ["--"] * 5
    (axis,) = (axis for axis in curves({name: [2.0, 1.0] for name in few}).axes if axis.get_visible())
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "a/kind_0",
        "a/kind_1",
        "b/kind_0",
        "b/kind_1",
    ]
