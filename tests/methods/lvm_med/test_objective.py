"""The pretext task: graphs of a batch, Hamming loss and its gradient, permuted nodes, hard inputs, learning."""

import pytest
import torch
from fake_dataset import fake_plan
from method_checks import assert_constant_input_is_harmless, assert_views_have_a_row_per_sample
from torch import nn

from nnssl_plugin.methods.lvm_med.objective import LVMMed
from nnssl_plugin.methods.lvm_med.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network

SMALL = {"nodes": 8, "neighbours": 3, "dim": 16, "token_stride": 4}
SIZE = (16, 16)


def make_task(channels=1, batch_norm=False, **settings):
    torch.manual_seed(0)
    names = {str(number): "MR" for number in range(channels)}
    dataset_json = {"channel_names": names, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}
    network = build_network(fake_plan(dimensions=2, batch_norm=batch_norm), "2d", dataset_json)
    return LVMMed(Backbone(network, channels), Settings(**SMALL | settings), size=SIZE, spacing=(1.0, 1.0))


def make_batch(samples, channels=1, seed=0, shape=(20, 24)):
    """Smooth images that differ from one another."""
    image = torch.randn(samples, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    image = nn.functional.interpolate(image, shape, mode="bilinear")
    return {"image": image, "available": torch.ones(samples, channels, dtype=torch.bool)}


def outputs_of(task, batch, seed=0):
    return task.encode(task.views(batch, torch.Generator().manual_seed(seed)))[0]


def test_every_view_has_a_row_per_sample_and_cells_match_their_places():
    task = make_task()
    views = assert_views_have_a_row_per_sample(task, make_batch(19))
    assert views["node_noise"].shape == (19, 8) and views["edge_noise"].shape == (19, 3, 24)
    outputs, _ = task.encode(views)
    assert outputs["source_q"].shape[1] == outputs["source_places"].shape[1] == 16
    assert outputs["source_z"].shape == (19, 16)


def test_the_gradient_raises_true_pairs_and_lowers_found_ones():
    """Property 5 at λ = 80: rows and columns of the gradient sum to 0, and it is (ṽ − v*)/λ times that of the loss."""
    task = make_task(noise=1.0)
    seen = {}

    class Spied(LVMMed):
        def _pairs(self, outputs):
            pairs = super()._pairs(outputs)
            pairs.node_affinity.retain_grad()
            seen["pairs"] = pairs
            return pairs

    task.__class__ = Spied
    loss = task(task.views(make_batch(24), torch.Generator().manual_seed(0)), 0.0)["total"]
    loss.backward()
    gradient, truth = seen["pairs"].node_affinity.grad, seen["pairs"].truth
    assert gradient.shape == (3, 8, 8) and 0 < loss.item() <= 1
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3, 8), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient.sum(2), torch.zeros(3, 8), atol=1e-7, rtol=0)
    true = nn.functional.one_hot(truth, 8).bool()
    wrong = loss.item() * 24
    unit = 1 / (80 * 2 * 8 * 3)  # 1/λ of a loss that is a mean over 3 graphs of 16 entries
    torch.testing.assert_close(gradient[true].sum().item(), -wrong * unit, rtol=1e-4, atol=0)
    assert gradient[true].max() <= 0 and gradient[~true].min() >= 0


def test_the_gradient_reaches_encoder_projector_and_message_passing_alone():
    task = make_task(noise=1.0)
    task(task.views(make_batch(16), torch.Generator().manual_seed(0)), 0.0)["total"].backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {name for name, p in task.named_parameters() if p.requires_grad and name.endswith("weight")}
    assert expected <= moved
    assert all(".encoder." in name or name.startswith(("projector", "message_passing")) for name in moved)


def test_no_solver_is_right_for_free():
    """Equal embeddings decide nothing: the nodes of the second graph are permuted, so chance is left (property 4)."""
    task = make_task(noise=0.0, standardise=False, alpha=1.0)
    outputs = outputs_of(task, make_batch(400))
    for name in ("source_z", "target_z"):
        outputs[name] = torch.ones_like(outputs[name])
    error = task.loss(outputs, 0.0)["matching"]
    assert abs(error.item() - 7 / 8) < 0.06


def test_identical_views_are_matched_rightly_in_any_order():
    task = make_task(noise=0.0)
    outputs = outputs_of(task, make_batch(64))
    outputs |= {f"target_{name}": outputs[f"source_{name}"] for name in ("z", "q", "places")}
    assert task.loss(outputs, 0.0)["matching"] == 0
    local = task._local(outputs, task._of_graphs(outputs["order"]).argsort(1))
    truth = task._pairs(outputs).truth
    assert local.gather(2, truth[..., None]).min() > 0.999  # property 6


@pytest.mark.parametrize("rows, nodes, graphs", [(2, 2, 1), (3, 3, 1), (8, 8, 1), (13, 8, 1), (17, 8, 2)])
def test_batches_that_do_not_divide_into_graphs(rows, nodes, graphs):
    task = make_task(channels=3)
    outputs = outputs_of(task, make_batch(rows, channels=3))
    pairs = task._pairs(outputs)
    assert pairs.node_affinity.shape == (graphs, nodes, nodes)
    assert pairs.node_affinity.abs().max() <= 1 + 1e-6 and pairs.edge_affinity.abs().max() <= 1 + 1e-6
    loss = task.loss(outputs, 0.0)["matching"]
    loss.backward()
    assert loss.isfinite() and 0 <= loss <= 1
    numbers = task.diagnostics(task.views(make_batch(rows, channels=3), torch.Generator().manual_seed(0)))
    assert all(value.isfinite().all() for value in numbers.values())


def test_rows_beyond_the_last_graph_get_no_gradient():
    task = make_task(noise=1.0, standardise=False)
    outputs = {k: v.detach().requires_grad_() for k, v in outputs_of(task, make_batch(13)).items()}
    task.loss(outputs, 0.0)["matching"].backward()
    assert outputs["source_z"].grad[8:].eq(0).all() and outputs["source_z"].grad[:8].ne(0).any()


@pytest.mark.parametrize("value", [0.0, -2.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_identical_images_are_harmless(value, channels):
    task = make_task(channels=channels)
    assert_constant_input_is_harmless(task, make_batch(9, channels), value=value)


def test_a_nan_spoils_the_step_and_says_so():
    task, batch = make_task(), make_batch(8)
    batch["image"][3, 0, 5:15, 5:15] = torch.nan
    assert task(task.views(batch, torch.Generator().manual_seed(0)), 0.0)["total"].isnan()


def test_settings_of_the_ablations():
    batch = make_batch(16)
    for settings in ({"solver": "lap"}, {"layers": 0}, {"alpha": 1.0}, {"noise": 0.0, "margin": 1.0}):
        task = make_task(**settings)
        loss = task(task.views(batch, torch.Generator().manual_seed(0)), 0.0)["total"]
        loss.backward()
        assert loss.isfinite()
    without = make_task(noise=0.0).loss(outputs_of(make_task(noise=0.0), batch), 0.0)["matching"]
    with_margin = make_task(noise=0.0, margin=3.0).loss(outputs_of(make_task(noise=0.0), batch), 0.0)["matching"]
    assert with_margin > without and with_margin > 0.9


def textures(samples, seed):
    """Stripes of random width, direction and share of white, with noise: what pooled features can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    frequency, angle, phase, white = torch.rand(4, samples, 1, 1, generator=generator)
    angle = angle * torch.pi / 2
    wave = ((0.2 + 1.3 * frequency) * (rows * angle.cos() + columns * angle.sin()) + 6 * phase).sin()
    image = (wave > 1.6 * white - 0.8).float() + 0.1 * torch.randn(wave.shape, generator=generator)
    return {"image": image[:, None], "available": torch.ones(samples, 1, dtype=torch.bool)}


@pytest.mark.slow
def test_a_small_encoder_learns_to_match_images_that_it_has_not_seen():
    task = make_task(batch_norm=True)
    optimiser = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=3e-3)

    def error(step):
        return task(task.views(textures(64, step), torch.Generator().manual_seed(step)), 0.0)["total"]

    def measured():
        with torch.no_grad():
            return sum(error(step).item() for step in range(10_000, 10_004)) / 4

    before = measured()
    for step in range(80):
        optimiser.zero_grad()
        error(step).backward()
        optimiser.step()
    assert measured() < before - 0.15


def test_property_8_under_adam_a_large_strength_is_of_no_account():
    ends = []
    for strength in (80.0, 640.0):
        task = make_task(noise=1.0, strength=strength)
        optimiser = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=1e-3, eps=1e-20)
        start = torch.cat([p.detach().flatten() for p in task.parameters()])
        for step in range(6):
            optimiser.zero_grad()
            task(task.views(make_batch(16, seed=step), torch.Generator().manual_seed(step)), 0.0)["total"].backward()
            optimiser.step()
        ends.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert (ends[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_pictures_show_images_and_their_matches():
    task = make_task()
    pictures = task.pictures(task.views(make_batch(9), torch.Generator().manual_seed(0)))
    titles = [title for title, _ in pictures["matches"]]
    assert len(titles) == 8 and all(title.endswith(("right", "wrong")) for title in titles[1::2])
    ((_, affinity),) = pictures["affinity"]
    assert affinity.shape == (8, 8)
    outputs, _ = task.encode(task.views(make_batch(9), torch.Generator().manual_seed(0)))
    pairs = task._pairs(outputs)
    assert torch.equal(affinity.diagonal(), pairs.node_affinity[0].gather(1, pairs.truth[0][:, None])[:, 0])
