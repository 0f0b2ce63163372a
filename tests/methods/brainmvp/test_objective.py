"""BrainMVP's losses beside the paper's equations, what they reach, and what a template learns."""

import pytest
import torch
from method_checks import assert_constant_input_is_harmless, assert_views_have_a_row_per_sample
from small_mae import small_backbone

from nnssl_plugin.methods.brainmvp.objective import BrainMVP, scaled_to_range
from nnssl_plugin.methods.brainmvp.settings import Settings
from nnssl_plugin.objectives.contrastive import symmetric_info_nce
from nnssl_plugin.transforms.placement import cut_placed

MODALITIES, SIZE, GRID = ("T1", "T1CE", "T2"), (16, 20, 12), (18, 20, 17)


def make(kind="unet", template_size=GRID, **settings):
    task = BrainMVP(
        small_backbone(kind), Settings(**settings), modalities=MODALITIES, template_size=template_size, lr=3e-4
    ).double()
    with torch.no_grad():
        task.templates.normal_(generator=torch.Generator().manual_seed(5))
    return task


def make_batch(available=((1, 1, 1), (1, 0, 1)), size=SIZE, seed=0):
    available = torch.tensor(available, dtype=torch.bool)
    generator, samples = torch.Generator().manual_seed(seed), len(available)
    image = torch.randn(samples, len(MODALITIES), *size, generator=generator, dtype=torch.float64)
    return {
        "image": torch.where(available[..., None, None, None], image, 0.0),
        "available": available,
        "cases": [f"case_{number}" for number in range(samples)],
        "origin": torch.tensor([[1.0, 0.0, 3.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[:samples],
        "case_shape": torch.tensor([[18.0, 20.0, 17.0], [12.0, 22.0, 15.0], [18.0, 20.0, 17.0]])[:samples],
    }


def views_of(task, batch=None, seed=0):
    return task.views(batch or make_batch(), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masking", ["random", "grid"])
def test_views_have_a_row_per_sample_and_show_what_the_case_has(masking):
    task, batch = make(masking=masking), make_batch()
    views = assert_views_have_a_row_per_sample(task, batch)
    for case, (m, image) in enumerate(zip(views["modality"], views["image"], strict=True)):
        assert torch.equal(image[0], batch["image"][case, m])
    for name in ("masked_by_template", "masked_by_other"):
        assert views[name].double().mean() == pytest.approx(0.875, abs=0.06)
    assert not torch.equal(views["masked_by_template"], views["masked_by_other"])


def test_kept_voxels_are_the_image_and_the_others_are_the_filler():
    task = make()
    views = views_of(task)
    by_template, by_other = task.seen(views)
    for case, m in enumerate(views["modality"].tolist()):
        place = [views[name][case].long().tolist() for name in ("origin", "case_shape")]
        template = cut_placed(task.templates[m], place[0], SIZE, place[1])
        masked = views["masked_by_template"][case, 0]
        assert torch.equal(by_template[case, 0], torch.where(masked, template, views["image"][case, 0]))
        masked = views["masked_by_other"][case, 0]
        assert torch.equal(by_other[case, 0], torch.where(masked, views["other"][case, 0], views["image"][case, 0]))


def test_the_total_is_equation_6():
    task = make(template_weight=2.0, contrast_weight=0.5, contrast_from=0.0)
    batch = make_batch(((1, 1, 1), (1, 0, 1), (0, 1, 0)))
    views = views_of(task, batch)
    with torch.no_grad():
        total, losses, pairs = 0.0, [], []
        for i in range(3):
            one = {name: view[i : i + 1] for name, view in views.items()}
            inside = one["inside"][0, 0]
            maps, restored = [], []
            for seen in task.seen(one):  # each view on its own
                maps.append(task.backbone.features(seen))
                image = task.backbone.reconstruct(maps[-1], skips=False)
                restored.append(((image - one["image"])[0, 0][inside] ** 2).mean())
            paired = batch["available"][i].sum() > 1
            total += (2.0 * restored[0] + (restored[1] if paired else 0.0)) / 3
            if paired:
                pairs.append([m[-1].flatten() / m[-1].norm() for m in maps])
        g, f = (torch.stack(each).float() for each in zip(*pairs, strict=True))
        assert views["modality"][0] == views["modality"][1], "shared by the cases that have it"
        losses = symmetric_info_nce(f, g, temperature=0.1)
        torch.testing.assert_close(task(views, 0.5)["total"], total + 0.5 * losses, check_dtype=False)


@pytest.mark.parametrize("term", ["distillation", "cross_modal"])
def test_gradients_reach_replaced_voxels_of_the_template_of_the_modality_alone(term):
    """Properties of the distillation: no other modality, nothing outside the window, nothing that was kept."""
    task = make()
    views = views_of(task)
    task(views, 0.0)[term].backward()
    assert all(p.grad.abs().sum() > 0 for n, p in task.backbone.named_parameters() if "encoder.stages.0.0" in n)
    if term == "cross_modal":
        assert torch.count_nonzero(task.templates.grad) == 0
        return
    reached = torch.zeros_like(task.templates)
    for m, masked, origin, shape in zip(
        views["modality"], views["masked_by_template"], views["origin"], views["case_shape"], strict=True
    ):
        hull = torch.zeros(GRID, dtype=torch.float64, requires_grad=True)
        place = (origin.long().tolist(), SIZE, shape.long().tolist())
        cut_placed(hull, *place)[masked[0]].sum().backward()
        reached[m] += hull.grad
    assert torch.count_nonzero(task.templates.grad[reached == 0]) == 0
    assert torch.count_nonzero(task.templates.grad[reached > 0]) > 0.5 * (reached > 0).sum()


def test_before_it_sets_in_the_contrast_changes_nothing():
    totals = []
    for weight in (0.0, 7.0):
        task = make(contrast_weight=weight)
        task.after_step(0.7, torch.tensor(True))  # so that the cases show one modality
        totals.append([task(views_of(task), progress)["total"].item() for progress in (0.6, 0.7)])
    assert totals[0][0] == totals[1][0] and totals[0][1] != totals[1][1]


def test_equal_features_cost_the_logarithm_of_the_cases_and_those_that_differ_nothing():
    """Property 4: log 3 for equal features of three cases, 0 for orthonormal pairs as τ vanishes."""
    task, group = make(temperature=1e-3), torch.zeros(3, dtype=torch.long)
    equal = {"f": torch.ones(3, 8), "g": torch.ones(3, 8), "group": group}
    assert task.loss(equal, 0.9)["contrast"].item() == pytest.approx(1.0986, abs=1e-4)
    apart = {"f": torch.eye(3), "g": torch.eye(3), "group": group}
    assert task.loss(apart, 0.9)["contrast"].item() == pytest.approx(0, abs=1e-6)
    drawn = {"f": torch.randn(3, 4), "g": torch.randn(3, 4), "group": group}
    swapped = drawn | {"f": drawn["g"], "g": drawn["f"]}
    assert task.loss(drawn, 0.9)["contrast"].item() == pytest.approx(task.loss(swapped, 0.9)["contrast"].item())


def test_a_case_with_one_modality_learns_from_its_template_alone():
    task, batch = make(contrast_from=0.0), make_batch(((0, 1, 0), (0, 1, 0)))
    outputs, own = task.encode(views_of(task, batch))
    assert (own["cross_modal"] == 0).all() and (own["distillation"] > 0).all()
    assert outputs["group"].tolist() == [-1, -1] and task.loss(outputs, 0.9)["contrast"] == 0
    assert torch.isnan(task.diagnostics(views_of(task, batch))["cross_modal_error"])


def test_shapes_do_not_depend_on_what_cases_have():
    """Property 7."""
    shapes = []
    for available in (((1, 1, 1), (1, 1, 1)), ((1, 0, 0), (0, 1, 1))):
        task = make()
        views = views_of(task, make_batch(available))
        outputs, own = task.encode(views)
        shapes.append([{name: value.shape for name, value in each.items()} for each in (views, outputs, own)])
    assert shapes[0] == shapes[1]


def test_while_templates_warm_up_they_stand_in_for_the_other_modality():
    task = make(template_warmup=0.5)
    views = views_of(task, make_batch(((0, 1, 0), (1, 1, 0))))
    task(views, 0.0)["cross_modal"].backward()
    assert torch.count_nonzero(task.templates.grad) > 0
    assert (task.encode(views)[1]["cross_modal"] > 0).all()
    task.after_step(0.5, torch.tensor(True))
    task.templates.grad = None
    task(views, 0.5)["cross_modal"].backward()
    assert torch.count_nonzero(task.templates.grad) == 0


def test_scaled_templates_lie_in_0_to_1_and_have_bounded_gradients_at_zero():
    task = make(template_view="minmax")
    shown = task.shown_templates().flatten(1)
    assert shown.min() == 0 and (shown.amax(1) > 0.999).all() and (shown.amax(1) < 1).all()
    with torch.no_grad():
        task.templates.zero_()
    task(views_of(task), 0.0)["total"].backward()
    assert torch.isfinite(task.templates.grad).all() and task.templates.grad.abs().max() < 1e4
    assert (scaled_to_range(torch.zeros(2, 3, 3, 3)) == 0).all()


@pytest.mark.parametrize("value", [0.0, -2.5])
@pytest.mark.parametrize("settings", [{}, {"masking": "grid", "template_view": "minmax", "features": "pooled"}])
def test_constant_windows(value, settings):
    assert_constant_input_is_harmless(make(contrast_from=0.0, **settings), make_batch(), value=value)


def test_one_case_of_a_step():
    task = make(contrast_from=0.0)
    terms = task(views_of(task, make_batch(((1, 1, 1),))), 0.9)
    assert terms["contrast"] == 0 and torch.isfinite(terms["total"])


def test_transformers_take_part():
    task = make("primus", template_size=(16, 16, 16))
    batch = make_batch(size=(16, 16, 16))
    task(views_of(task, batch), 0.9)["total"].backward()
    assert torch.count_nonzero(task.templates.grad) > 0


def test_templates_have_a_group_of_their_own():
    task = make(template_lr=3e-2, template_decay=0.2)
    others, own = task.parameter_groups()
    assert own["params"] == [task.templates] and own["weight_decay"] == 0.2 and own["clip"] is False
    assert own["lr_scale"] == pytest.approx(100)
    assert all(p is not task.templates for p in others["params"])


def test_pictures_show_every_template_and_both_reconstructions():
    task = make()
    pictures = task.pictures(views_of(task))
    assert [title for title, _ in pictures["templates"]] == list(MODALITIES)
    assert {image.shape for _, image in pictures["reconstruction"]} == {SIZE}


def test_nothing_is_read_on_the_host(monkeypatch):
    task, batch = make(contrast_from=0.0), make_batch()

    def refuse(*arguments):
        raise AssertionError("waits for the device")

    for name in ("item", "tolist", "__bool__", "nonzero", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    views = task.views(batch, torch.Generator().manual_seed(0))
    task(views, 0.9)
    task.after_step(0.9, torch.tensor(True))
