"""What a network will see otherwise than in pretraining."""

import pytest

from nnssl_plugin.checkpoints.adaptation.inputs import compare_ct_windows, compare_inputs, unstated

SEEN = {
    "normalisation": ["CTNormalization"],
    "spacing_mm": [1.0, 1.0, 1.0],
    "channels": ["CT"],
    "orientation": "RAS",
    "transpose_forward": [0, 1, 2],
}
WINDOW = {"mean": 50.0, "std": 100.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0}


def plan(**window):
    return {"foreground_intensity_properties_per_channel": {"0": WINDOW | window}}


def test_equal_inputs_and_unknown_ones_give_no_line():
    assert compare_inputs(SEEN, dict(SEEN)) == []
    assert compare_inputs({}, SEEN) == []
    assert compare_inputs({field: None for field in SEEN}, SEEN) == []


def test_a_network_that_reads_other_channels_than_its_dataset_has_is_told_even_where_the_names_agree():
    four = ["T1", "T1CE", "T2", "FLAIR"]
    (line,) = compare_inputs({"channels": four, "network_channels": 1}, {"channels": four})
    assert line.startswith("the network read 1 channel in pretraining, made of ['T1', ") and line.endswith("here")
    assert compare_inputs({"channels": four, "network_channels": 4}, {"channels": four}) == []


def test_every_difference_is_a_line():
    here = {
        "normalisation": ["ZScoreNormalization"],
        "spacing_mm": [5.0, 1.0, 1.0],
        "channels": ["T1", "T2"],
        "orientation": "as stored",
        "transpose_forward": [2, 0, 1],
    }
    lines = compare_inputs(SEEN, here)
    assert len(lines) == 5
    assert lines[0] == (
        "intensities are normalised differently: CTNormalization (one window in HU for all images) in "
        "pretraining, ZScoreNormalization (every image by its own mean and standard deviation) here"
    )
    assert lines[1].startswith("voxel spacing differs: [1.0, 1.0, 1.0] in pretraining")
    assert "5.0 times coarser" in lines[1]


@pytest.mark.parametrize(
    ("before", "now", "differ"),
    [
        ([1.0, 1.0, 1.0], [1.2, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0], [1.0, 0.5, 1.0], True),
        ([1.0, 1.0], [5.0, 1.0, 1.0], False),
        ([None, None, None], [1.0, 1.0, 1.0], False),
    ],
)
def test_spacing_is_compared_axis_by_axis_and_2d_in_the_plane(before, now, differ):
    assert bool(compare_inputs({"spacing_mm": before}, {"spacing_mm": now})) == differ


def test_the_same_normalisation_of_more_channels_is_no_difference():
    z, ct = "ZScoreNormalization", "CTNormalization"
    assert not compare_inputs({"normalisation": [z]}, {"normalisation": [z, z]})
    assert compare_inputs({"normalisation": [z, ct]}, {"normalisation": [ct, z]})


def test_channels_in_another_order_are_told_from_other_channels():
    assert not compare_inputs({"channels": ["t1", "T2"]}, {"channels": ["T1", "T2"]})
    assert "another order" in compare_inputs({"channels": ["T2", "T1"]}, {"channels": ["T1", "T2"]})[0]
    assert "channels differ: ['T2']" in compare_inputs({"channels": ["T2"]}, {"channels": ["T1", "T2"]})[0]


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({}, False),
        ({"mean": 60.0, "std": 110.0}, False),
        ({"mean": 150.0}, True),
        ({"std": 300.0}, True),
        ({"percentile_00_5": 400.0, "percentile_99_5": 900.0}, True),
    ],
)
def test_ct_windows_differ_where_the_same_hu_gets_another_value(change, differ):
    assert bool(compare_ct_windows(plan(), plan(**change), ["CTNormalization"])) == differ
    assert not compare_ct_windows(plan(), plan(**change), ["ZScoreNormalization"])
    assert not compare_ct_windows(None, plan(**change), ["CTNormalization"])


def test_what_a_checkpoint_does_not_say_is_named():
    assert unstated(SEEN) == []
    assert "its channels, axis order:" in unstated({**SEEN, "channels": None, "transpose_forward": []})[0]
