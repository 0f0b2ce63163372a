"""A method with views of two sizes: resumes exactly, in 2D and 3D, whole and in chunks."""

from contextlib import nullcontext

import pytest
import torch
from method_checks import assert_resumes_exactly, assert_views_have_a_row_per_sample
from pretraining_harness import make_trainer
from toy_method import Toy, ToyPretrainer

from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks
from nnssl_plugin.transforms.crops import Crops, multi_crop


class CroppedToy(Toy):
    """The student also sees small crops, whose features shall be those of the window."""

    def views(self, batch, generator):
        image, dimensions = batch["image"], self.backbone.dimensions
        kinds = {
            "global": Crops(2, (16,) * dimensions, (0.6, 1.0), flip=0.5),
            "local": Crops(3, (8,) * dimensions, (0.3, 0.6)),
        }
        crops = {
            name: multi_crop(image, crops, spacing=(1.0,) * dimensions, generator=generator)[0]
            for name, crops in kinds.items()
        }
        return super().views(batch, generator) | crops

    def encode(self, views):
        outputs, own = super().encode(views)
        large, small = (self._pooled(views[name]) for name in ("global", "local"))
        return outputs, own | {"crops": (small.mean(1) - large.mean(1)).square().mean(1)}

    def _pooled(self, crops):
        return self.backbone.pooled(self.backbone.features(crops.flatten(0, 1))).unflatten(0, crops.shape[:2])


class CroppedToyPretrainer(ToyPretrainer):
    def build_task(self, backbone):
        return CroppedToy(backbone, self.method_settings)


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_resumes_exactly(dimensions):
    assert_resumes_exactly(CroppedToyPretrainer, dimensions=dimensions)


def test_chunks_have_the_gradients_of_the_batch():
    trainer = make_trainer(trainer_class=CroppedToyPretrainer, pretraining={"batch_size": 3})
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
