"""Which batches a run has before it, from the start or from the middle of an epoch."""

from types import SimpleNamespace

import pytest
import torch

from nnssl_plugin.training.loading import streams_of


@pytest.mark.parametrize(
    ("step", "training", "validation"),
    [(0, [*range(12)], [0, 1] * 3), (5, [*range(5, 12)], [0, 1] * 2), (8, [8, 9, 10, 11], [0, 1])],
)
def test_a_run_goes_on_with_its_step(monkeypatch, step, training, validation):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    lines = []
    trainer = SimpleNamespace(
        step=step,
        current_epoch=step // 4,
        num_epochs=3,
        steps_per_epoch=4,
        num_val_iterations_per_epoch=2,
        device=torch.device("cpu"),
        print_to_log_file=lines.append,
    )
    streams = streams_of(trainer, range(100), range(100))
    for stream, expected in zip(streams, (training, validation), strict=True):
        assert [next(stream) for _ in expected] == expected
        with pytest.raises(StopIteration):
            next(stream)
    assert len(lines) == 1


def test_a_stop_after_the_last_step_of_an_epoch_leaves_its_validation(monkeypatch):
    """The epoch counts as the present one until its validation is done."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = SimpleNamespace(
        step=8,
        current_epoch=1,
        num_epochs=2,
        steps_per_epoch=4,
        num_val_iterations_per_epoch=2,
        device=torch.device("cpu"),
        print_to_log_file=print,
    )
    training, validation = streams_of(trainer, range(100), range(100))
    assert [next(validation), next(validation)] == [0, 1]
    with pytest.raises(StopIteration):
        next(training)
