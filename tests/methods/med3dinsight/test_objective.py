"""The objective of Med3DInsight on a tiny U-Net: terms, gradients, projection, frozen embeddings, overfitting."""

import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.diagnostics.collapse import feature_std
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight, retrieval
from nnssl_plugin.methods.med3dinsight.settings import TRAINING, Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.objectives.partial_transport import mpot_loss
from nnssl_plugin.settings import settings_from

SMALL = {"dim": 24, "queries": 8, "layers": 1, "heads": 4, "mlp_ratio": 2, "slice_bins": 8, "mask_block": 4}
EMBEDDING_DIM = 12


def build(channels=1, network_class=PlainConvUNet, **changes):
    torch.manual_seed(0)
    depth = "n_blocks_per_stage" if network_class is ResidualEncoderUNet else "n_conv_per_stage"
    network = network_class(
        channels,
        3,
        (4, 8, 16),
        nn.Conv3d,
        3,
        (1, 2, 2),
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **{depth: 1},
    )
    return Med3DInsight(Backbone(network, channels), Settings(**(SMALL | changes)), EMBEDDING_DIM)


def make_batch(size=4, channels=1, spatial=(16, 16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid([torch.linspace(-1, 1, n) for n in spatial], indexing="ij")
    centres = torch.rand(size, 3, 1, 1, 1, generator=generator) - 0.5
    squared = (torch.stack(axes)[None] - centres).square().sum(1, keepdim=True)
    image = torch.exp(-6 * squared).repeat(1, channels, 1, 1, 1)
    return {
        "image": (image - image.mean()) / image.std(),
        "available": torch.ones(size, channels, dtype=torch.bool),
        "plane": torch.randint(3, (size,), generator=generator),
        "slice_position": torch.rand(size, generator=generator),
        "image_embedding": nn.functional.normalize(torch.randn(size, EMBEDDING_DIM, generator=generator), dim=1),
        "text_embedding": nn.functional.normalize(torch.randn(size, EMBEDDING_DIM, generator=generator), dim=1),
    }


def views_of(task, batch, seed=0):
    return task.views(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("network_class", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_terms_are_finite_and_add_up(network_class, channels, size):
    task = build(channels, network_class, alignment_weight=0.5, reconstruction_weight=2.0)
    terms = task(views_of(task, make_batch(size, channels)), 0.0)
    assert set(terms) == {"reconstruction", "mpot_image", "mpot_text", "total"}
    expected = 2 * terms["reconstruction"] + 0.5 * (terms["mpot_image"] + terms["mpot_text"])
    torch.testing.assert_close(terms["total"], expected)
    terms["total"].backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_everything_trained_gets_a_gradient_and_nothing_else():
    task = build()
    task(views_of(task, make_batch()), 0.0)["total"].backward()
    for name, p in task.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.requires_grad == ("seg_layers" not in name), name
        # the instance norm that follows a convolution takes its bias away
        assert p.grad is None or p.grad.abs().sum() > 0 or name.endswith("conv.bias"), name


def test_losses_couple_the_gathered_samples():
    task = build()
    batch = make_batch(4)
    views = views_of(task, batch)
    whole = task(views, 0.0)
    halves = [{k: v[i : i + 2] for k, v in views.items()} for i in (0, 2)]
    other = task.encode(halves[1])[0]
    task.gather = lambda outputs: {k: torch.cat((v, other[k])) for k, v in outputs.items()}
    gathered = task(halves[0], 0.0)
    torch.testing.assert_close(gathered["mpot_image"], whole["mpot_image"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gathered["mpot_text"], whole["mpot_text"], atol=1e-5, rtol=1e-5)


def test_samples_do_not_interact_in_encode():
    task = build()
    views = views_of(task, make_batch(3))
    outputs, own = task.encode(views)
    alone_outputs, alone = task.encode({k: v[1:2] for k, v in views.items()})
    torch.testing.assert_close(alone_outputs["volume"][0], outputs["volume"][1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone["reconstruction"][0], own["reconstruction"][1], atol=1e-5, rtol=1e-5)


def test_batch_of_one_trains_the_reconstruction_only():
    task = build()
    terms = task(views_of(task, make_batch(1)), 0.0)
    assert terms["mpot_image"].item() == pytest.approx(0, abs=1e-6)
    terms["total"].backward()
    assert task.metric.grad.abs().max().item() == pytest.approx(0, abs=1e-6)
    assert task.psat.queries.grad.abs().max().item() == pytest.approx(0, abs=1e-6)
    assert task.backbone.reconstruction_head.weight.grad.abs().max() > 0


def test_reconstruction_is_the_mean_square_over_all_voxels_of_the_channels_a_case_has():
    task = build(channels=2)
    batch = make_batch(2, 2)
    batch["available"][1, 1] = False
    views = views_of(task, batch)
    restored = task.backbone.reconstruct(task.backbone.features(views["corrupted"]))
    error = (restored - views["image"]).square()
    _, own = task.encode(views)
    torch.testing.assert_close(own["reconstruction"], torch.stack((error[0].mean(), error[1, 0].mean())))


def test_views_mask_blocks_from_one_generator():
    task = build(mask_ratio=0.75)
    batch = make_batch()
    first, again, other = (views_of(task, batch, seed) for seed in (1, 1, 2))
    assert torch.equal(first["corrupted"], again["corrupted"])
    assert not torch.equal(first["corrupted"], other["corrupted"])
    share = (first["corrupted"] != 0).float().mean()
    assert share.item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(first["image"], batch["image"])


@pytest.mark.parametrize("centre", [True, False])
def test_what_all_embeddings_of_a_step_have_in_common_counts_only_where_it_is_not_taken_off(centre):
    task = build(centre=centre)
    outputs, _ = task.encode(views_of(task, make_batch()))
    outputs = {name: value.detach().double() for name, value in outputs.items()}
    task.double()
    shifted = outputs | {"text": outputs["text"] + 3}
    loss, other = task.loss(outputs, 0.0), task.loss(shifted, 0.0)
    assert torch.allclose(loss["mpot_text"], other["mpot_text"], atol=1e-5) == centre
    centred = {name: value - value.mean(0) for name, value in outputs.items()}
    expected = {name: nn.functional.normalize(centred[name] if centre else outputs[name], dim=1) for name in outputs}
    for name in ("image", "text"):
        by_hand = mpot_loss(expected["volume"], expected[name], task.metric, mass=0.9, epsilon=0.05, iterations=100)
        torch.testing.assert_close(loss[f"mpot_{name}"], by_hand)


def test_volumes_that_are_nearly_alike_get_a_gradient_that_sets_them_apart():
    """At the start all volumes give nearly the same embedding; uncentred, they are then nowhere near to a match."""
    found = {}
    for centre in (True, False):
        task = build(centre=centre).double()
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(1, EMBEDDING_DIM, generator=generator, dtype=torch.float64)
        noise = torch.randn(4, EMBEDDING_DIM, generator=generator, dtype=torch.float64)
        volume = nn.functional.normalize(base + 1e-3 * noise, dim=1).requires_grad_()
        target = nn.functional.normalize(torch.randn(4, EMBEDDING_DIM, generator=generator, dtype=torch.float64), dim=1)
        loss = task.loss({"volume": volume, "image": target, "text": target}, 0.0)["mpot_image"]
        (gradient,) = torch.autograd.grad(loss, volume)
        found[centre] = (gradient - gradient.mean(0)).norm().item()
    assert found[True] > 20 * found[False]


def test_without_corruption_the_skips_carry_nothing():
    task = build(corruption="none")
    views = views_of(task, make_batch())
    assert torch.equal(views["corrupted"], views["image"])
    features = task.backbone.features(views["image"])
    spoiled = [torch.randn_like(f) for f in features[:-1]] + features[-1:]
    torch.testing.assert_close(task._reconstruct(spoiled), task._reconstruct(features))


@pytest.mark.parametrize(("field_of_view", "window"), [("window", "slice"), ("resize", "whole")])
def test_field_of_view_decides_the_window(field_of_view, window):
    needs = build(field_of_view=field_of_view).needs
    assert (needs.window, needs.placement, needs.triplets, needs.dimensions) == (window, "free", True, (3,))
    assert Med3DInsight.needs.window == "slice"


def test_property_8_places_change_nothing_at_the_start():
    task = build()
    views = views_of(task, make_batch())
    moved = views | {"plane": (views["plane"] + 1) % 3, "position": 1 - views["position"]}
    assert torch.equal(task.encode(views)[0]["volume"], task.encode(moved)[0]["volume"])


def test_property_9_order_of_the_triplets_does_not_matter_but_their_match_does():
    task = build()
    batch = make_batch(4)
    views = views_of(task, batch)
    outputs, _ = task.encode(views)
    outputs = {k: v.detach() for k, v in outputs.items()}
    outputs["volume"] = nn.functional.normalize(outputs["text"] + 0.1 * outputs["volume"], dim=1)
    order = torch.tensor([2, 0, 3, 1])
    loss = task.loss(outputs, 0.0)
    permuted = task.loss({k: v[order] for k, v in outputs.items()}, 0.0)
    for name in loss:
        torch.testing.assert_close(permuted[name], loss[name], atol=1e-4, rtol=1e-4)
    mismatched = task.loss(outputs | {"text": outputs["text"][order]}, 0.0)
    assert mismatched["mpot_text"] > loss["mpot_text"] + 0.5
    torch.testing.assert_close(mismatched["mpot_image"], loss["mpot_image"])


def test_property_9_a_permuted_batch_has_the_same_total():
    task = build()
    views = views_of(task, make_batch(4))
    order = torch.tensor([2, 0, 3, 1])
    permuted = task({k: v[order] for k, v in views.items()}, 0.0)
    torch.testing.assert_close(permuted["total"], task(views, 0.0)["total"], atol=1e-4, rtol=1e-4)


def test_property_10_frozen_encoders_are_never_trained_and_cached_embeddings_serve_as_well():
    task = build()
    image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16, EMBEDDING_DIM))
    before = {k: v.clone() for k, v in image_encoder.state_dict().items()}
    batch = make_batch()
    slices = batch["image"][:, 0, 8]
    cached = nn.functional.normalize(image_encoder(slices), dim=1).detach().numpy()
    on_the_fly = task(views_of(task, batch | {"image_embedding": image_encoder(slices)}), 0.0)
    from_cache = task(views_of(task, batch | {"image_embedding": torch.from_numpy(cached)}), 0.0)
    torch.testing.assert_close(on_the_fly["mpot_image"], from_cache["mpot_image"], atol=1e-5, rtol=1e-5)
    on_the_fly["total"].backward()
    torch.optim.Adam(task.parameters(), lr=0.1).step()
    assert all(p.grad is None for p in image_encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in image_encoder.state_dict().items())
    outputs, _ = task.encode(views_of(task, batch))
    assert not outputs["image"].requires_grad and not outputs["text"].requires_grad


def test_one_metric_serves_images_and_texts():
    task = build()
    outputs, _ = task.encode(views_of(task, make_batch()))
    loss = task.loss(outputs, 0.0)
    for name in ("image", "text"):
        pair = (task._compared(outputs["volume"]), task._compared(outputs[name]))
        alone = mpot_loss(*pair, task.metric, mass=0.9, epsilon=0.05, iterations=100)
        torch.testing.assert_close(loss[f"mpot_{name}"], alone)


@pytest.mark.parametrize("applied", [True, False])
def test_metric_starts_euclidean_and_is_projected_even_where_the_last_step_was_skipped(applied):
    task = build()
    assert torch.equal(task.metric, torch.eye(EMBEDDING_DIM))
    with torch.no_grad():
        task.metric.copy_(torch.randn(EMBEDDING_DIM, EMBEDDING_DIM))
    task.after_step(0.5, torch.tensor(applied))
    assert torch.linalg.eigvalsh(task.metric).min() >= -1e-5
    assert task.metric.requires_grad


def test_metric_is_projected_every_few_steps_and_after_the_last_one():
    task = build(project_every=4)
    task.steps, projected = 1003, []
    for step in range(task.steps):
        with torch.no_grad():
            task.metric.copy_(-torch.eye(EMBEDDING_DIM))
        task.after_step(step / task.steps, torch.tensor(True))
        projected += [step + 1] * (task.metric[0, 0].item() == 0)
    assert projected == [*range(4, 1003, 4), 1003]


def test_metric_and_places_have_no_weight_decay_and_groups_are_complete():
    task = build()
    others, spared = task.parameter_groups()
    assert {id(p) for p in spared["params"]} == {id(task.metric), id(task.psat.plane_slice)}
    assert spared["weight_decay"] == 0.0 and "weight_decay" not in others
    grouped = [id(p) for group in (others, spared) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in task.parameters() if p.requires_grad)


def test_state_dict_holds_everything_that_is_learned():
    task, copy = build(), build()
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.01 * torch.randn_like(p))
    copy.load_state_dict(task.state_dict())
    views = views_of(task, make_batch())
    assert torch.equal(copy(views, 0.0)["total"], task(views, 0.0)["total"])
    assert {"metric", "psat.queries", "psat.plane_slice"} <= set(task.state_dict())


@pytest.mark.parametrize("seed", [0, 1])
def test_each_embedding_of_the_batch_is_compared_under_its_own_name(seed):
    """Images and texts differ in the batch, so that one in the place of the other changes its term."""
    task = build(centre=False)
    batch = make_batch(seed=seed)
    for name in ("image", "text"):
        batch[f"{name}_embedding"] = 3 * batch[f"{name}_embedding"]  # the task normalises
    views = views_of(task, batch)
    outputs, _ = task.encode(views)
    terms = task(views, 0.0)
    for name in ("image", "text"):
        own = batch[f"{name}_embedding"] / batch[f"{name}_embedding"].norm(dim=1, keepdim=True)
        torch.testing.assert_close(views[f"{name}_embedding"], own)
        torch.testing.assert_close(outputs[name], own)
        expected = mpot_loss(outputs["volume"], own, task.metric, mass=0.9, epsilon=0.05, iterations=100)
        torch.testing.assert_close(terms[f"mpot_{name}"], expected)
    assert (terms["mpot_image"] - terms["mpot_text"]).abs() > 1e-3


def test_retrieval_looks_for_the_target_of_each_volume_not_for_the_volume_of_each_target():
    volume, target = torch.zeros(2, 3, EMBEDDING_DIM).unbind()
    volume[:, 0] = torch.tensor([0.6, 0.2, 1.0])  # the nearest targets are 0, 0, 0
    target[:, 0] = torch.tensor([0.7, 2.0, 1.4])  # the nearest volumes are 0, 2, 2
    metric = torch.eye(EMBEDDING_DIM)
    assert retrieval(volume, target, metric).item() == pytest.approx(1 / 3)
    assert retrieval(target, volume, metric).item() == pytest.approx(2 / 3)


class Oracle(nn.Module):
    """In the transformer's place: gives each sample the embedding that is written into its tokens, or one by place."""

    def __init__(self, table, *, by_place):
        super().__init__()
        self.table, self.by_place = table, by_place

    def forward(self, tokens, grid, plane, position):
        volume = tokens[:, 0, 0].round().long().clamp(0, len(self.table) - 1)
        return self.table[plane if self.by_place else volume]


def with_oracle(task, views, table, *, by_place):
    """Tokens say which sample they are of (an empty volume: the first), planes too."""
    task.psat = Oracle(table, by_place=by_place)
    task.backbone.features = lambda image: [image]
    task.backbone.tokens = lambda features: (features[0].flatten(1)[:, :1, None], (1,))
    image = torch.arange(4.0).reshape(4, 1, 1, 1, 1).expand_as(views["image"])
    return views | {"corrupted": image, "plane": torch.arange(4)}


def test_controls_stay_at_chance_where_the_volume_is_read():
    task = build()
    views = views_of(task, make_batch())
    found = task.diagnostics(with_oracle(task, views, views["text_embedding"], by_place=False))
    assert found["retrieval_text"] == 1 and found["retrieval_image"] < 1
    assert found["retrieval_text_other_case"] == 0  # the other case's own text
    assert found["retrieval_text_empty"] == found["retrieval_text_chance"] == 0.25
    assert found["features"].shape == (4, EMBEDDING_DIM)


def test_controls_show_a_match_by_the_place_alone():
    task = build()
    views = views_of(task, make_batch())
    found = task.diagnostics(with_oracle(task, views, views["text_embedding"], by_place=True))
    for name in ("", "_other_case", "_empty"):
        assert found[f"retrieval_text{name}"] == 1
    assert feature_std(found["features"]) == 0  # the alarm of the trainer: the volume adds nothing


def test_equal_texts_are_one_candidate_and_their_chance_is_said():
    task = build()
    views = views_of(task, make_batch())
    views["text_embedding"] = views["text_embedding"][[0, 0, 1, 2]]
    views = with_oracle(task, views, views["text_embedding"], by_place=False)
    found = task.diagnostics(views)
    assert found["retrieval_text"] == 1
    assert found["retrieval_text_chance"].item() == pytest.approx(1 / 3)
    assert found["retrieval_image_chance"] == 0.25
    assert found["retrieval_text_empty"] in (0.25, 0.5)  # one text for all, which one or two of four have


def test_diagnostics_of_the_network_are_finite_and_a_single_sample_has_no_other_case():
    task = build()
    views = views_of(task, make_batch())
    found = task.diagnostics(views)
    assert found["metric_smallest_eigenvalue"].item() == pytest.approx(1)
    assert all(value.isfinite().all() for value in found.values())
    assert feature_std(found["features"]) > 0
    single = task.diagnostics(views_of(task, make_batch(1)))
    assert set(found) - set(single) == {"retrieval_image_other_case", "retrieval_text_other_case"}


def test_pictures_show_the_first_sample():
    task = build(channels=2)
    views = views_of(task, make_batch(3, 2))
    (titled,) = task.pictures(views).values()
    assert [title for title, _ in titled] == ["input", "corrupted", "reconstruction"]
    assert all(image.shape == (16, 16, 16) and not image.requires_grad for _, image in titled)
    assert torch.equal(titled[0][1], views["image"][0, 0])


def test_mixed_precision_gives_finite_float32_terms():
    task = build()
    views = views_of(task, make_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = task(views, 0.0)
        assert task.diagnostics(views)["features"].dtype == torch.float32
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    terms["total"].backward()
    assert task.metric.grad.isfinite().all()


def test_nan_in_one_image_reaches_the_total_without_raising():
    task = build()
    batch = make_batch()
    batch["image"][0, 0, 0, 0, 0] = math.nan
    assert task(views_of(task, batch), 0.0)["total"].isnan()


def test_defaults_are_the_papers_numbers():
    settings = Settings()
    assert (settings.queries, settings.dim) == (300, 512)
    assert settings.alignment_weight == settings.reconstruction_weight == 1
    assert (TRAINING.lr, TRAINING.epochs, TRAINING.batch_size, TRAINING.weight_decay) == (2e-5, 300, 4, 0)


def test_settings_come_from_a_plan_and_mistakes_are_named():
    settings = settings_from({"mass": 1, "field_of_view": "resize"}, Settings(), "plan")
    assert (settings.mass, settings.field_of_view, settings.queries) == (1, "resize", 300)
    wrong = {
        "mass": 0.0,
        "epsilon": -1.0,
        "field_of_view": "sphere",
        "corruption": "blur",
        "output": "place",
        "mask_ratio": 1.0,
        "queries": 0,
        "dim": 500,
        "heads": 0,
    }
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            settings_from({name: value}, Settings(), "plan")


@pytest.mark.slow
def test_t_1_four_blobs_are_overfitted():
    task = build(iterations=30)
    batch = make_batch()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(task.parameter_groups(), lr=5e-3)
    history = []
    for _ in range(45):
        terms = task(task.views(batch, generator), 0.0)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        task.after_step(0.0, torch.tensor(True))
        history.append({name: value.item() for name, value in terms.items()})
    last = {name: sum(step[name] for step in history[-5:]) / 5 for name in history[0]}
    assert last["reconstruction"] < history[0]["reconstruction"] / 5
    assert history[0]["mpot_image"] > 1
    assert last["mpot_image"] < 0.1 and last["mpot_text"] < 0.1
    assert torch.linalg.eigvalsh(task.metric.detach()).min() > -1e-5
