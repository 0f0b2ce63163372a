"""Sums of an epoch: numbers that some batches do not give."""

import math

import pytest
import torch

from nnssl_plugin.training.epoch_sums import EpochSums


def test_a_number_that_a_batch_does_not_give_is_left_out_of_its_mean_alone():
    sums = EpochSums(torch.device("cpu"))
    for loss, gap in ((1.0, float("nan")), (2.0, 0.5), (6.0, 0.1)):
        sums.add({"loss": torch.tensor(loss)}, torch.tensor(True))
        sums.add_known({"gap": torch.tensor(gap, dtype=torch.float64), "never": torch.tensor(float("nan"))})
    means = sums.means()
    assert means["loss"] == pytest.approx(3) and means["gap"] == pytest.approx(0.3) and math.isnan(means["never"])
    sums.reset()
    assert sums.means() == {}


def test_a_loss_that_is_not_finite_is_not_hidden():
    sums = EpochSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor(float("nan"))}, torch.tensor(True))
    sums.add({"loss": torch.tensor(1.0)}, torch.tensor(True))
    assert math.isnan(sums.means()["loss"])


def test_the_first_skipped_step_is_remembered_across_a_stop_and_forgotten_with_the_epoch():
    sums, again = EpochSums(torch.device("cpu")), EpochSums(torch.device("cpu"))
    assert sums.first_skipped == -1
    for applied in (True, True, False, True, False):
        sums.add({"loss": torch.tensor(1.0)}, torch.tensor(applied))
    assert sums.first_skipped == 2
    again.load(sums.state())
    again.add({"loss": torch.tensor(1.0)}, torch.tensor(False))
    assert again.first_skipped == 2
    again.reset()
    assert again.first_skipped == -1


def test_sums_of_a_checkpoint_of_before_are_taken_back():
    sums = EpochSums(torch.device("cpu"))
    sums.add({"loss": torch.tensor(1.0)}, torch.tensor(True))
    state = {name: value for name, value in sums.state().items() if name != "first_skipped"}
    again = EpochSums(torch.device("cpu"))
    again.load(state)
    assert again.applied == 1 and again.first_skipped == -1
