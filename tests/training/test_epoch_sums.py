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
