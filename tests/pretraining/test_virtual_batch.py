"""A virtual batch: the gradients of the whole batch, at the memory of one chunk."""

import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer, run, state_of
from ranks import on_two_ranks
from toy_method import ToyPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks, encode_in_chunks
from nnssl_plugin.settings import settings_from

METHOD = {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4}
ONE_EPOCH = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 1}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def in_chunks(task, views, size, *, scale=lambda total: total):
    return backward_in_chunks(task, views, 0.3, chunk_size=size, seed=5, precision=nullcontext, scale=scale)


def gradients(task):
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def task_and_views(kind, *, samples, method, dropout):
    """A method in float64 and the views of a batch."""
    trainer = make_trainer(trainer_class=kind, pretraining={"batch_size": samples, "method": method}, cases=8)
    trainer.initialize()
    views = trainer._views(next(trainer.get_dataloaders()[0]), 0, 0)
    task = trainer.task.double().train(dropout)
    return task, {k: v.double() if v.is_floating_point() else v for k, v in views.items()}


METHODS = [(Med3DInsightPretrainer, METHOD), (ToyPretrainer, {})]


@pytest.mark.parametrize(("kind", "method"), METHODS, ids=["med3dinsight", "toy"])
@pytest.mark.parametrize(("samples", "size"), [(5, 2), (4, 1), (3, 3)])
def test_gradients_are_those_of_the_whole_batch(kind, method, samples, size):
    task, views = task_and_views(kind, samples=samples, method=method, dropout=False)
    expected_terms = task(views, 0.3)
    expected_terms["total"].backward()
    expected = gradients(task)
    task.zero_grad()
    terms = in_chunks(task, views, size)
    assert gradients(task).keys() == expected.keys() and terms.keys() == expected_terms.keys()
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected_terms[name].detach(), rtol=1e-10, atol=1e-12)


def test_both_passes_over_a_chunk_drop_the_same_units():
    task, views = task_and_views(ToyPretrainer, samples=4, method={}, dropout=True)
    parts = []
    for number in range(2):
        torch.manual_seed(5 + number)
        parts.append(task.encode({k: v[2 * number : 2 * number + 2] for k, v in views.items()}))
    outputs, own = ({k: torch.cat([p[i][k] for p in parts]) for k in parts[0][i]} for i in range(2))
    task.terms(outputs, own, 0.3)["total"].backward()
    expected = gradients(task)
    task.zero_grad()
    in_chunks(task, views, 2)
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_a_scaled_loss_scales_every_gradient():
    task, views = task_and_views(ToyPretrainer, samples=4, method={}, dropout=False)
    in_chunks(task, views, 2)
    plain = gradients(task)
    task.zero_grad()
    in_chunks(task, views, 2, scale=lambda total: 8 * total)
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, 8 * plain[name], rtol=1e-10, atol=1e-13)


class Watched(PretextTask):
    """Counts what is encoded, and how many samples' activations are alive at a time."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.layer = torch.nn.Linear(3, 3)
        self.gather = lambda outputs: outputs
        self.calls, self.alive = [], []

    def encode(self, views):
        hidden = self.layer(views["x"])
        if torch.is_grad_enabled():
            assert all(reference() is None for reference in self.alive)
            self.alive.append(weakref.ref(hidden))
        self.calls.append((len(hidden), torch.is_grad_enabled()))
        return {"x": hidden.square(), "index": views["index"]}, {}

    def loss(self, outputs, progress):
        assert outputs["index"].tolist() == list(range(7))
        return {"coupled": outputs["x"].sum(0).prod()}


def test_one_more_forward_and_the_memory_of_one_chunk():
    task = Watched()
    in_chunks(task, {"x": torch.randn(7, 3), "index": torch.arange(7)}, 3)
    assert task.calls == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]


def test_encoding_in_chunks_is_encoding():
    task, views = task_and_views(ToyPretrainer, samples=5, method={}, dropout=False)
    outputs, own = encode_in_chunks(task, views, chunk_size=2, seed=0, precision=nullcontext)
    expected, expected_own = task.encode(views)
    for name, value in (outputs | own).items():
        torch.testing.assert_close(value, (expected | expected_own)[name].detach())
        assert not value.requires_grad


def test_training_in_chunks_is_training_on_the_batch():
    runs = [
        run(
            trainer_class=Med3DInsightPretrainer,
            channels=1,
            pretraining={"batch_size": 5, "chunk_size": size, "method": METHOD} | ONE_EPOCH,
        )
        for size in (None, 2)
    ]
    histories = [trainer.log.history() for trainer in runs]
    for name in ("train_losses", "val_losses"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-4)


@pytest.mark.slow
def test_a_run_in_chunks_resumes_exactly():
    settings = {"pretraining": {"batch_size": 4, "chunk_size": 2, "validation_iterations": 1}}
    reference = state_of(run(**settings))
    trainer = make_trainer(**settings)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    trainer.interruption.release()
    resumed = make_trainer(resume="checkpoint_latest.pth", **settings)
    resumed.run_training()
    assert_same(reference, state_of(resumed))


def test_a_chunk_of_no_samples_is_refused():
    with pytest.raises(UserError, match="chunk_size"):
        settings_from({"chunk_size": 0}, TrainingSettings(), "plan")


def gradients_on_a_rank(rank):
    """Gradients of the first step, encoded at once and in chunks."""
    results = []
    for size in (None, 2):
        settings = {"batch_size": 3, "chunk_size": size, "method": METHOD}
        trainer = make_trainer(trainer_class=Med3DInsightPretrainer, pretraining=settings)
        trainer.initialize()
        trainer._backward(trainer._views(next(trainer.get_dataloaders()[0]), 0, 0), 0.0)
        results.append(gradients(trainer.task))
    return results


@pytest.mark.slow
def test_ranks_in_chunks_have_the_gradients_of_ranks_on_the_batch(nnunet_environment, tmp_path):
    write_fake_dataset(channels=2)
    ranks = on_two_ranks(gradients_on_a_rank, tmp_path)
    for whole, chunked in ranks:
        assert whole.keys() == chunked.keys()
        for name, value in whole.items():
            torch.testing.assert_close(chunked[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert_same(*(chunked for _, chunked in ranks))
