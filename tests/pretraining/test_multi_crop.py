"""A method with views of two sizes: in chunks it has the gradients of the batch."""

from contextlib import nullcontext

import pytest
import torch
from method_checks import assert_views_have_a_row_per_sample
from pretraining_harness import make_trainer
from toy_variants import CroppedPretrainer

from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def test_chunks_have_the_gradients_of_the_batch():
    trainer = make_trainer(trainer_class=CroppedPretrainer, pretraining={"batch_size": 3})
    trainer.initialize()
    batch = next(trainer.get_dataloaders()[0])
    task = trainer.task.double().eval()
    views = {name: view.double() for name, view in assert_views_have_a_row_per_sample(task, batch).items()}
    assert views["global"].shape == (3, 2, 2, 16, 16, 16) and views["local"].shape == (3, 3, 2, 8, 8, 8)
    task(views, 0.0)["total"].backward()
    expected = [p.grad.clone() for p in task.parameters() if p.grad is not None]
    task.zero_grad()
    backward_in_chunks(task, views, 0.0, chunk_size=2, seed=0, precision=nullcontext, scale=lambda total: total)
    torch.testing.assert_close([p.grad for p in task.parameters() if p.grad is not None], expected)
