"""Fine-tuning a pair: the loss, who is held out, retrieval and chance, exact resume, and what is saved."""

import dataclasses
import json
import math
import shutil

import nibabel
import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors.torch import save_file

from nnssl_plugin.captions.clip import fine_tuning as clip_fine_tuning
from nnssl_plugin.captions.clip import training as clip_training
from nnssl_plugin.captions.clip.data import epoch_batches, prepare_pairs, scaled, split_cases
from nnssl_plugin.captions.clip.fine_tuning import STATE_FILE, fine_tune_pair
from nnssl_plugin.captions.clip.pairs import check_can_be_saved, load_pair, save_pair
from nnssl_plugin.captions.clip.training import ClipSettings, clip_loss, schedule, train_pair
from nnssl_plugin.captions.triplets import triplet_pictures
from nnssl_plugin.data.triplets import PAIR_RECORD, Triplet, read_triplets, write_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.statistics.ranking import chance_of_retrieval, first_right_ranks, measure_retrieval, retrieval_table

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 16, "vocab_size": 49408},
}
CORNERS = ("upper left", "upper right", "lower left", "lower right")
CASES = 24
QUICK = {"lr": 1e-3, "batch_size": 7, "epochs": 4, "holdout": 0.25}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A raw dataset whose slices have one bright corner that their text names, and a folder with tiny encoders."""
    root = tmp_path_factory.mktemp("clip")
    raw = root / "Dataset501_Corners"
    (raw / "imagesTr").mkdir(parents=True)
    write_json(raw / "dataset.json", {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz"})
    rng, triplets = np.random.default_rng(0), []
    for number in range(CASES):
        corner = number % len(CORNERS)
        volume = rng.uniform(0, 20, (16, 16, 5)).astype(np.float32)
        # the first axis runs to the right of the patient, which is the left of the picture; the second goes up
        rows, columns = slice(0, 8) if corner >= 2 else slice(8, 16), slice(8, 16) if corner % 2 == 0 else slice(0, 8)
        volume[columns, rows] += 100
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), raw / "imagesTr" / f"c{number:02d}_0000.nii.gz")
        triplets.append(Triplet(f"c{number:02d}", "axial", 2, 5, f"The {CORNERS[corner]} is bright.", "me"))
    write_triplets(raw, triplets)
    weights = root / "tiny"
    weights.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.CLIP(**TINY).state_dict()
    state["token_embedding.weight"] *= 30  # open_clip starts so near to 0 that a tiny network sees one text for all
    state["visual.conv1.weight"] *= 5
    save_file(state, weights / "open_clip_model.safetensors")
    write_json(weights / "open_clip_config.json", {"model_cfg": TINY, "preprocess_cfg": {"size": 32}})
    return raw, weights


@pytest.fixture(autouse=True)
def _figures(request, monkeypatch):
    """Drawing takes longer than training here; it is done where a test asks for it."""
    if "with_figures" not in request.fixturenames:
        monkeypatch.setattr(clip_fine_tuning, "_draw", lambda *_: None)


@pytest.fixture
def with_figures():
    """Asks for the figures."""


@pytest.fixture
def raw(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / made[0].name)


@pytest.fixture
def weights(made):
    return str(made[1])


def unit(rng, *shape):
    vectors = torch.from_numpy(rng.normal(size=shape))
    return vectors / vectors.norm(dim=-1, keepdim=True)


def weights_of(folder):
    return load_pair(weights=str(folder)).model.state_dict()


def test_loss_equals_a_naive_loop_with_repeated_texts():
    rng = np.random.default_rng(0)
    image, text, scale = unit(rng, 7, 5), unit(rng, 7, 5), torch.tensor(9.0, dtype=torch.float64)
    same_text = torch.tensor([3, 0, 3, 1, 3, 0, 2])
    logits = (scale * image @ text.T).tolist()
    total = 0.0
    for i in range(7):
        alike = [j for j in range(7) if same_text[j] == same_text[i]]
        for row in (logits[i], [logits[k][i] for k in range(7)]):
            normaliser = math.log(sum(math.exp(value) for value in row))
            total -= sum((row[j] - normaliser) / len(alike) for j in alike) / 2 + math.log(len(alike)) / 2
    assert clip_loss(image, text, scale, same_text).item() == pytest.approx(total / 7, abs=1e-12)


def test_loss_is_open_clips_where_all_texts_differ():
    rng = np.random.default_rng(1)
    image, text, scale = unit(rng, 6, 4), unit(rng, 6, 4), torch.tensor(20.0, dtype=torch.float64)
    expected = ClipLoss()(image, text, scale)
    assert clip_loss(image, text, scale, torch.arange(6)).item() == pytest.approx(expected.item(), abs=1e-12)


def test_loss_is_zero_for_a_perfect_match_and_for_a_single_pair():
    corners = torch.eye(3)[[0, 1, 1, 2]]  # the second and third pair have the same text
    assert clip_loss(corners, corners, torch.tensor(100.0), torch.tensor([0, 1, 1, 2])).item() == pytest.approx(0)
    one = torch.ones(1, 4, requires_grad=True)
    clip_loss(one, one.detach(), torch.tensor(5.0), torch.tensor([0])).backward()
    assert one.grad.abs().max() == 0


def test_repeated_texts_are_not_pushed_apart():
    """Slices of one text at the same place are at the minimum; as mutual negatives they would be driven apart."""
    image = torch.eye(2)[[0, 0, 1, 1]].requires_grad_()
    text = torch.eye(2)[[0, 0, 1, 1]]
    clip_loss(image, text, torch.tensor(50.0), torch.tensor([0, 0, 1, 1])).backward()
    assert image.grad.abs().max() < 1e-5


def test_no_case_stands_on_both_sides_and_the_order_does_not_matter():
    cases = [f"c{number // 2}" for number in range(40)]  # two pairs per case
    train, held_out = split_cases(cases, 0.15, seed=3)
    sides = [{cases[position] for position in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and sorted([*train, *held_out]) == list(range(40))
    assert len(sides[1]) == 3
    again = split_cases(cases[::-1], 0.15, seed=3)[1]
    assert {cases[::-1][position] for position in again} == sides[1]
    assert {cases[position] for position in split_cases(cases, 0.15, seed=4)[1]} != sides[1]
    assert len(split_cases([str(n) for n in range(10)], 0.1, seed=0)[1]) == 2


def test_batches_hold_every_pair_once_and_depend_on_seed_and_epoch_alone():
    positions = np.arange(100, 123)
    batches = epoch_batches(positions, 8, seed=1, epoch=5)
    assert [len(batch) for batch in batches] == [8, 8, 7]
    assert sorted(np.concatenate(batches)) == positions.tolist()
    same, other = (epoch_batches(positions, 8, seed=1, epoch=epoch) for epoch in (5, 6))
    assert np.array_equal(np.concatenate(batches), np.concatenate(same))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


def test_retrieval_equals_a_naive_loop_with_repeated_texts():
    rng = np.random.default_rng(2)
    texts = ["b", "a", "b", "c", "d", "a", "b", "e", "f", "g"]
    vector_of = {text: unit(rng, 6).numpy() for text in sorted(set(texts))}
    image = unit(rng, 10, 6).numpy()
    found = measure_retrieval(image, np.stack([vector_of[text] for text in texts]), texts)
    ranks = []
    for row, own in zip(image, texts, strict=True):
        ranks.append(1 + sum(row @ vector > row @ vector_of[own] for vector in vector_of.values()))
    assert found["slice_to_text"].recall_at_1 == np.mean([rank == 1 for rank in ranks])
    assert found["slice_to_text"].recall_at_5 == np.mean([rank <= 5 for rank in ranks])
    assert found["slice_to_text"].median_rank == np.median(ranks)
    ranks = []
    for text, vector in vector_of.items():
        ordered = sorted(range(10), key=lambda position, v=vector: -image[position] @ v)
        ranks.append(1 + min(place for place, position in enumerate(ordered) if texts[position] == text))
    assert found["text_to_slice"].recall_at_1 == np.mean([rank == 1 for rank in ranks])
    assert found["text_to_slice"].median_rank == np.median(ranks)
    assert (found["text_to_slice"].queries, found["text_to_slice"].candidates) == (7, 10)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_encoders_that_collapsed_come_out_last(value):
    right = np.eye(5, dtype=bool)
    assert first_right_ranks(np.full((5, 5), value), right).tolist() == [5] * 5


@pytest.mark.parametrize("texts", [list("abcdefghij"), list("aaaabbcdef"), list("aab"), ["a", "a"]])
def test_chance_agrees_with_a_simulation(texts):
    rng = np.random.default_rng(0)
    distinct = sorted(set(texts))
    right = np.array([[text == other for other in distinct] for text in texts])
    for direction, answers in (("slice_to_text", right), ("text_to_slice", right.T)):
        ranks = np.concatenate([first_right_ranks(rng.uniform(size=answers.shape), answers) for _ in range(6000)])
        chance = chance_of_retrieval(texts)[direction]
        assert chance.recall_at_1 == pytest.approx(np.mean(ranks <= 1), abs=0.01)
        assert chance.recall_at_5 == pytest.approx(np.mean(ranks <= 5), abs=0.01)
        assert abs(chance.median_rank - np.median(ranks)) <= 1
        assert (chance.queries, chance.candidates) == answers.shape


def test_chance_among_distinct_texts_is_one_over_their_number():
    chance = chance_of_retrieval([str(number) for number in range(20)])
    for one in chance.values():
        assert (one.recall_at_1, one.recall_at_5) == (pytest.approx(0.05), pytest.approx(0.25))
        assert one.median_rank == 10.5
    lines = retrieval_table({"chance": chance})
    assert len(lines) == 7 and "5.0%" in lines[1] and "10.5" in lines[3]


def test_learning_rate_rises_then_falls_to_zero():
    factors = [schedule(step, 100, warmup=0.1) for step in range(101)]
    assert np.all(np.diff(factors[:11]) > 0) and np.all(np.diff(factors[10:]) < 0)
    assert max(factors) == factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert schedule(0, 10, warmup=0) == 1


def test_prepared_images_are_what_the_encoders_transform_gives(raw, weights):
    pair = load_pair(weights=weights)
    pairs = prepare_pairs(raw, pair)
    assert pairs.images.dtype == torch.uint8 and pairs.images.shape == (CASES, 3, 32, 32)
    images = scaled(pairs.images, pair)
    pictures = list(triplet_pictures(raw, read_triplets(raw)))
    for position in (0, 7, 23):
        triplet, picture = pictures[position]
        assert (pairs.cases[position], pairs.texts[position]) == (triplet.case, triplet.text)
        torch.testing.assert_close(images[position], pair.transform(Image.fromarray(picture)))
    assert (pairs.same_text[0] == pairs.same_text[4]) and (pairs.same_text[0] != pairs.same_text[1])


@pytest.mark.slow
def test_the_pair_learns_what_the_texts_say(raw, weights):
    tuned = fine_tune_pair(raw, weights=weights, **{**QUICK, "epochs": 10})
    assert (tuned.pairs, tuned.held_out) == (CASES, 6)
    assert tuned.chance["slice_to_text"].recall_at_1 < 0.5
    assert tuned.after["slice_to_text"].recall_at_1 == tuned.after["text_to_slice"].recall_at_1 == 1
    record = json.loads((tuned.folder / PAIR_RECORD).read_text())
    assert record["distinct_texts"] == 4 and record["share_of_commonest_text"] == 0.25
    assert record["history"][tuned.best_epoch]["held_out_loss"] == min(e["held_out_loss"] for e in record["history"])


@pytest.mark.slow
def test_saved_pair_is_the_one_that_was_measured_and_open_clip_reads_it(raw, weights, tmp_path, with_figures):
    tuned = fine_tune_pair(raw, weights=weights, **QUICK)
    moved = shutil.copytree(tuned.folder, tmp_path / "elsewhere" / "clip_pair")
    pair = load_pair(weights=str(moved))
    record = json.loads((moved / PAIR_RECORD).read_text())
    pictures = {t.case: (picture, t.text) for t, picture in triplet_pictures(raw, read_triplets(raw))}
    shown = [pictures[case] for case in record["held_out_cases"]]
    image, text = pair.embed([picture for picture, _ in shown], [text for _, text in shown])
    assert measure_retrieval(image, text, [text for _, text in shown]) == tuned.after
    theirs = open_clip.create_model(f"local-dir:{moved}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{moved}")([text for _, text in shown])
    with torch.no_grad():
        np.testing.assert_allclose(theirs.encode_text(tokens, normalize=True).numpy(), text, atol=1e-6)
    names = {"open_clip_config.json", "open_clip_model.safetensors", "clip_pair.json"}
    assert {p.name for p in moved.iterdir()} == names | {"clip_training.png", "clip_retrieval.png"}
    assert record["base_weights"] == load_pair(weights=weights).weights and "key" in record
    for figure in ("clip_training.png", "clip_retrieval.png"):
        assert Image.open(moved / figure).size[0] == 1080


@pytest.mark.slow
def test_saved_pair_can_be_the_start_of_another(raw, weights):
    settings = {**QUICK, "epochs": 1}
    first = fine_tune_pair(raw, weights=weights, **settings)
    second = fine_tune_pair(raw, weights=str(first.folder), **settings)
    assert not second.was_there and second.before == first.after


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(made, tmp_path, weights, monkeypatch):
    whole, broken = (shutil.copytree(made[0], tmp_path / name) for name in ("whole", "broken"))
    fine_tune_pair(whole, weights=weights, **QUICK)
    calls, real = [], clip_training.clip_loss

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 11:  # held out once, then three steps and a held-out batch per epoch: in the third epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(clip_training, "clip_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fine_tune_pair(broken, weights=weights, **QUICK)
    state = torch.load(broken / STATE_FILE, weights_only=True)
    assert [entry["epoch"] for entry in state["history"]] == [0, 1, 2] and not (broken / "clip_pair").exists()
    (broken / f".{STATE_FILE}.abc.pt").touch()  # as a kill in the middle of writing leaves it
    torch.manual_seed(1234)
    fine_tune_pair(broken, weights=weights, **QUICK)
    assert len(calls) == 11 + 2 * 4  # two more epochs, not four
    expected, found = weights_of(whole / "clip_pair"), weights_of(broken / "clip_pair")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    records = [json.loads((folder / "clip_pair" / PAIR_RECORD).read_text()) for folder in (whole, broken)]
    assert records[0] == records[1]
    assert not [path for path in broken.iterdir() if STATE_FILE in path.name]


@pytest.mark.slow
def test_state_of_other_texts_or_a_damaged_one_is_not_used(raw, weights, monkeypatch, caplog):
    monkeypatch.setattr(clip_fine_tuning, "save_pair", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    settings = {**QUICK, "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        fine_tune_pair(raw, weights=weights, **settings)
    left = (raw / STATE_FILE).read_bytes()
    monkeypatch.setattr(clip_fine_tuning, "save_pair", save_pair)
    triplets = read_triplets(raw)
    triplets[3] = dataclasses.replace(triplets[3], text="Other words.")
    write_triplets(raw, triplets)
    for content, said in ((left, "afresh"), (left[:500], "cannot be read")):
        (raw / STATE_FILE).write_bytes(content)
        (raw / "clip_pair" / PAIR_RECORD).unlink(missing_ok=True)
        caplog.clear()
        tuned = fine_tune_pair(raw, weights=weights, **settings)
        assert said in caplog.text and not tuned.was_there and tuned.epochs == 1


def test_other_texts_slices_and_cases_have_another_fingerprint(raw, weights):
    pair, triplets = load_pair(weights=weights), read_triplets(raw)
    changes = ({}, {"text": "Other words."}, {"slice": 3}, {"plane": "coronal", "n_slices": 16})
    prints = set()
    for change in changes:
        write_triplets(raw, [*triplets[:3], dataclasses.replace(triplets[3], **change), *triplets[4:]])
        prints.add(prepare_pairs(raw, pair).fingerprint())
    write_triplets(raw, triplets[1:])
    prints.add(prepare_pairs(raw, pair).fingerprint())
    assert len(prints) == 5
    write_triplets(raw, reversed(triplets))  # the order of the lines does not matter
    assert prepare_pairs(raw, pair).fingerprint() in prints


@pytest.mark.slow
def test_finished_training_is_not_repeated(raw, weights):
    settings = {**QUICK, "epochs": 1}
    first = fine_tune_pair(raw, weights=weights, **settings)
    stamp = (first.folder / "open_clip_model.safetensors").stat().st_mtime_ns
    second = fine_tune_pair(raw, weights=weights, **settings)
    assert second == dataclasses.replace(first, was_there=True)
    assert (first.folder / "open_clip_model.safetensors").stat().st_mtime_ns == stamp
    assert not fine_tune_pair(raw, weights=weights, **{**settings, "lr": 2e-3}).was_there
    (first.folder / PAIR_RECORD).write_text("{")
    assert not fine_tune_pair(raw, weights=weights, **settings).was_there


def test_best_epoch_is_kept_and_patience_ends_the_training(raw, weights, monkeypatch):
    held_out_losses = iter([3.0, 2.0, 1.0, 1.5, 1.2, 1.1, 0.1])
    seen = []

    def measures(pair, *_):
        seen.append({name: tensor.clone() for name, tensor in pair.model.state_dict().items()})
        nothing = {"recall_at_1": 0.0, "recall_at_5": 0.0, "median_rank": 1.0, "queries": 6, "candidates": 4}
        return {"held_out_loss": next(held_out_losses), "slice_to_text": nothing, "text_to_slice": nothing}

    monkeypatch.setattr(clip_training, "_held_out_measures", measures)
    tuned = fine_tune_pair(raw, weights=weights, **{**QUICK, "epochs": 6, "patience": 3})
    assert (tuned.best_epoch, tuned.epochs) == (2, 5)
    kept = weights_of(tuned.folder)
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[2].items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in seen[5].items())


def test_pair_that_does_not_gain_stays_as_it_was(raw, weights, monkeypatch):
    real, rising = clip_training._held_out_measures, iter(range(10))
    measures = lambda *args: {**real(*args), "held_out_loss": next(rising)}  # noqa: E731
    monkeypatch.setattr(clip_training, "_held_out_measures", measures)
    tuned = fine_tune_pair(raw, weights=weights, **{**QUICK, "patience": 2})
    assert (tuned.best_epoch, tuned.epochs) == (0, 2) and tuned.before == tuned.after
    before, after = weights_of(weights), weights_of(tuned.folder)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_temperature_stays_in_its_range(raw, weights, tmp_path):
    for start, bound in ((10.0, math.log(100)), (-3.0, 0.0)):
        pair = load_pair(weights=weights)
        pair.model.logit_scale.fill_(start)
        pairs = prepare_pairs(raw, pair)
        settings = ClipSettings(epochs=1, lr=1e-4)
        parts = split_cases(pairs.cases, 0.25, seed=0)
        train_pair(pair, pairs, parts, settings, state_path=tmp_path / f"{start}.pt", key="k")
        state = torch.load(tmp_path / f"{start}.pt", weights_only=True)
        assert state["model"]["logit_scale"].item() == pytest.approx(bound, abs=1e-6)


def test_training_leaves_the_pair_frozen_and_the_generator_alone(raw, weights, tmp_path):
    pair = load_pair(weights=weights)
    pairs = prepare_pairs(raw, pair)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    parts = split_cases(pairs.cases, 0.25, seed=0)
    train_pair(pair, pairs, parts, ClipSettings(epochs=1), state_path=tmp_path / "s.pt", key="k")
    assert torch.equal(torch.rand(3), expected)
    assert not pair.model.training and not any(parameter.requires_grad for parameter in pair.model.parameters())


def test_what_cannot_be_trained_says_why(raw, weights, monkeypatch):
    for wrong in ({"lr": 0.0}, {"lr": math.nan}, {"epochs": 0}, {"batch_size": 1}, {"holdout": 0.6}, {"seed": -1}):
        with pytest.raises(UserError, match=f"No training with {next(iter(wrong))}"):
            fine_tune_pair(raw, weights=weights, **wrong)
    with pytest.raises(UserError, match="without weights"):
        fine_tune_pair(raw, model="ViT-B-32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        fine_tune_pair(raw, weights=weights, device="cuda")
    monkeypatch.setattr(clip_training, "clip_loss", lambda image, *_: image.sum() * math.nan)
    with pytest.raises(UserError, match="epoch 1 is not finite") as caught:
        fine_tune_pair(raw, weights=weights, **QUICK)
    assert "--lr" in caught.value.remedy and not (raw / "clip_pair").exists()
    write_triplets(raw, read_triplets(raw)[:9])
    with pytest.raises(UserError, match="pairs of 9 cases") as caught:
        fine_tune_pair(raw, weights=weights)
    assert "caption" in caught.value.remedy


def test_pair_that_could_not_be_loaded_again_is_refused_before_training(weights):
    pair = load_pair(weights=weights)
    pair.config["model_cfg"]["text_cfg"]["hf_model_name"] = "some/bert"
    with pytest.raises(UserError, match="Hugging Face hub only"):
        check_can_be_saved(pair)
