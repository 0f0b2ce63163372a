"""S2DC passes the checks of every method: naive loop, rows of the views, constant input, exact resume."""

import pytest
import torch
from fake_dataset import fake_plan
from method_checks import assert_constant_input_is_harmless, assert_equals_naive_loop, assert_resumes_exactly

from nnssl_plugin.methods.s2dc.objective import S2DC
from nnssl_plugin.methods.s2dc.settings import Settings
from nnssl_plugin.methods.s2dc.trainer import S2DCPretrainer
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.objectives.contrastive import info_nce

METHOD = {"hidden": 16, "dim": 8, "queue": 6, "token_stride": 4, "momentum": 0.9}
DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}


def naive_info_nce(query, positive, negatives):
    """Eq. 1, a query at a time."""
    total = 0
    for q, p in zip(query, positive, strict=True):
        scores = [torch.exp(q @ p / 0.2), *(torch.exp(q @ n / 0.2) for n in negatives)]
        total = total - torch.log(scores[0] / sum(scores))
    return total / len(query)


def test_the_global_term_is_equation_1():
    def draw(generator):
        return [torch.randn(count, 5, generator=generator, dtype=torch.float64) for count in (3, 3, 4)]

    assert_equals_naive_loop(lambda *x: info_nce(*x, temperature=0.2), naive_info_nce, draw)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_windows(value):
    torch.manual_seed(0)
    task = S2DC(
        Backbone(build_network(fake_plan(), "3d_fullres", DATASET_JSON), 1), Settings(**METHOD), spacing=(1, 1, 1)
    )
    batch = {"image": torch.zeros(2, 1, 16, 16, 16), "available": torch.ones(2, 1, dtype=torch.bool)}
    assert_constant_input_is_harmless(task, batch, value=value)


def test_resume(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)
    settings = {"batch_size": 2, "lr": 1e-3, "warmup_epochs": 0, "method": METHOD}
    assert_resumes_exactly(S2DCPretrainer, channels=1, pretraining=settings)
