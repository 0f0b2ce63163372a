"""The checks that methods call from their tests pass for a sound method and fail for each fault that they are for."""

import pytest
import torch
import torch.nn.functional as F
from fake_dataset import fake_plan
from method_checks import (
    assert_constant_input_is_harmless,
    assert_equals_naive_loop,
    assert_resumes_exactly,
    assert_views_have_a_row_per_sample,
)
from toy_method import Settings, Toy, ToyPretrainer

from nnssl_plugin.data.batch import Place
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

DATASET_JSON = {
    "channel_names": {"0": "MR", "1": "MR"},
    "labels": {"background": 0, "body": 1},
    "file_ending": ".nii.gz",
}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def make_task(kind=Toy):
    torch.manual_seed(0)
    return kind(Backbone(build_network(fake_plan(), "3d_fullres", DATASET_JSON), 2), Settings())


def make_batch(samples=3):
    image = torch.randn(samples, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    places = [Place((0, 0, 0), (16, 16, 16), (18, 20, 17))] * samples
    return {"image": image, "origin": torch.zeros(samples, 3), "places": places}


def draw(generator):
    return torch.randn(4, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1, 4])


def naive_cross_entropy(logits, target):
    rows = [logits[i].exp().sum().log() - logits[i, target[i]] for i in range(len(logits))]
    return sum(rows) / len(rows)


def test_the_naive_loop_agrees_and_a_wrong_value_or_gradient_is_noticed():
    assert_equals_naive_loop(F.cross_entropy, naive_cross_entropy, draw)
    with pytest.raises(AssertionError):
        assert_equals_naive_loop(lambda *x: F.cross_entropy(*x, reduction="sum"), naive_cross_entropy, draw)
    with pytest.raises(AssertionError):  # same value, half of the gradient
        halved = lambda x, target: (naive_cross_entropy(x, target) + naive_cross_entropy(x.detach(), target)) / 2  # noqa: E731
        assert_equals_naive_loop(halved, naive_cross_entropy, draw)
    with pytest.raises(AssertionError, match="float64"):
        assert_equals_naive_loop(torch.sum, torch.sum, lambda generator: [torch.randn(3, generator=generator)])


def test_a_view_without_a_row_per_sample_is_noticed():
    class Crossed(Toy):
        def views(self, batch, generator):
            return super().views(batch, generator) | {"grid": torch.zeros(16)}

    assert_views_have_a_row_per_sample(make_task(), make_batch())
    with pytest.raises(AssertionError):
        assert_views_have_a_row_per_sample(make_task(Crossed), make_batch())


def test_a_division_by_the_spread_of_a_constant_is_noticed():
    class Divided(Toy):
        def encode(self, views):
            outputs, terms = super().encode(views)
            image = views["teacher"].flatten(1)
            return outputs, terms | {"spread": image.mean(1) / image.std(1)}

    assert_constant_input_is_harmless(make_task(), make_batch())
    assert_constant_input_is_harmless(make_task(), make_batch(samples=1), value=-3.0)
    with pytest.raises(AssertionError):
        assert_constant_input_is_harmless(make_task(Divided), make_batch())


class Forgetful(Toy):
    """Counts its steps in a plain attribute, by which it weighs its loss."""

    seen = 0

    def weights(self, progress):
        return {"size": 1.0 + self.seen}

    def after_step(self, progress, applied):
        super().after_step(progress, applied)
        self.seen += 1


class ForgetfulPretrainer(ToyPretrainer):
    def build_task(self, backbone):
        return Forgetful(backbone, self.method_settings)


@pytest.mark.slow
def test_what_a_resume_loses_is_noticed():
    assert_resumes_exactly(ToyPretrainer)
    with pytest.raises(AssertionError, match="state"):
        assert_resumes_exactly(ForgetfulPretrainer)
