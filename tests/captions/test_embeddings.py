"""Frozen embeddings: computed once, reused by content, reproducible, offline, and never by running a foreign file."""

import functools
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from nnssl_plugin.captions import embeddings as module
from nnssl_plugin.captions.clip.pairs import ClipPair, load_pair
from nnssl_plugin.captions.embeddings import embedding_key, store_embeddings
from nnssl_plugin.captions.template import TemplateCaptioner
from nnssl_plugin.captions.triplets import caption_dataset, load_volume, slice_image
from nnssl_plugin.data.triplets import load_embeddings, read_embeddings, read_triplets, write_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.unlabelled import prepare_dataset

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 77, "vocab_size": 49408},
}
OTHER = {**TINY, "text_cfg": {**TINY["text_cfg"], "width": 48}}


@pytest.fixture(scope="module")
def pair_of():
    return functools.cache(load_pair)


@pytest.fixture(autouse=True)
def _one_pair_for_all(monkeypatch, pair_of):
    """The random pair takes half a second to make; here it is made once."""
    monkeypatch.setattr(module, "load_pair", pair_of)


@pytest.fixture
def captioned(raw, source, save):
    """Three cases with triplets."""
    for seed in range(3):
        save(f"c{seed}.nii.gz", seed=seed)
    folder = prepare_dataset(source, 501, "Scans", processes=1).folder
    caption_dataset(folder, TemplateCaptioner(), slices=1)
    return folder


@pytest.fixture
def tiny_model(monkeypatch):
    """A tiny architecture known to open_clip as ``tiny-test``, and the state dict of one such network."""
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS, "tiny-test": TINY, "other-test": OTHER})
    return open_clip.CLIP(**TINY).state_dict()


def folder_of(tmp_path, state, *, config=TINY, name="open_clip_model.safetensors"):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}}))
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def counted(monkeypatch):
    embed, calls = ClipPair.embed, []

    def counting(self, pictures, texts):
        calls.append(len(texts))
        return embed(self, pictures, texts)

    monkeypatch.setattr(ClipPair, "embed", counting)
    return calls


def test_stored_rows_are_those_computed_on_the_fly(captioned, no_network):
    summary = store_embeddings(captioned)
    triplets = read_triplets(captioned)
    stored = read_embeddings(captioned, triplets)
    pair = load_pair()
    assert (summary.computed, summary.reused, summary.weights) == (3, 0, pair.weights)
    for triplet in triplets:
        picture = slice_image(load_volume(captioned / "imagesTr" / f"{triplet.case}_0000.nii.gz"), triplet)
        image, text = pair.embed([picture], [triplet.text])
        np.testing.assert_allclose(stored[triplet.key][0], image[0], atol=1e-5)
        np.testing.assert_allclose(stored[triplet.key][1], text[0], atol=1e-5)
        assert stored[triplet.key][0].shape == (512,) and stored[triplet.key][0].dtype == np.float32
        assert np.linalg.norm(stored[triplet.key][0]) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(stored[triplet.key][1]) == pytest.approx(1, abs=1e-5)


def test_only_what_changed_is_computed_again(captioned, monkeypatch):
    calls = counted(monkeypatch)
    store_embeddings(captioned)
    before = load_embeddings(captioned)
    store_embeddings(captioned)
    assert calls == [3]
    triplets = read_triplets(captioned)
    triplets[1] = replace(triplets[1], text="Another text.", captioner="me")
    write_triplets(captioned, triplets)
    with pytest.raises(UserError, match=r"text of c1 .* has changed"):
        read_embeddings(captioned, triplets)
    summary = store_embeddings(captioned)
    after = load_embeddings(captioned)
    assert calls == [3, 1] and (summary.computed, summary.reused) == (1, 2)
    assert (before.key == after.key).tolist() == [True, False, True]
    np.testing.assert_array_equal(before.text[[0, 2]], after.text[[0, 2]])
    assert np.abs(before.text[1] - after.text[1]).max() > 1e-3


def test_other_slice_with_the_same_text_is_computed_again(captioned):
    store_embeddings(captioned)
    triplets = read_triplets(captioned)
    triplets[0] = replace(triplets[0], slice=(triplets[0].slice + 3) % triplets[0].n_slices)
    write_triplets(captioned, triplets)
    assert store_embeddings(captioned).computed == 1


def test_more_slices_are_added_to_those_that_are_embedded(captioned):
    store_embeddings(captioned)
    caption_dataset(captioned, TemplateCaptioner(), slices=3)
    summary = store_embeddings(captioned)
    assert (summary.computed, summary.reused) == (6, 3)
    triplets = read_triplets(captioned)
    assert list(read_embeddings(captioned, triplets)) == [triplet.key for triplet in triplets]


def test_an_embedding_that_was_cut_off_goes_on(captioned, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)
    embed, calls = ClipPair.embed, []

    def failing(self, pictures, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(self, pictures, texts)

    monkeypatch.setattr(ClipPair, "embed", failing)
    with pytest.raises(KeyboardInterrupt):
        store_embeddings(captioned)
    summary = store_embeddings(captioned)
    assert (summary.computed, summary.reused) == (1, 2)


def test_batches_smaller_than_the_dataset_give_the_same_rows(captioned, monkeypatch):
    store_embeddings(captioned)
    whole = load_embeddings(captioned)
    (captioned / "clip_embeddings.npz").unlink()
    monkeypatch.setattr(module, "BATCH", 2)
    store_embeddings(captioned)
    np.testing.assert_array_equal(load_embeddings(captioned).key, whole.key)
    np.testing.assert_allclose(load_embeddings(captioned).image, whole.image, atol=1e-5)


def test_random_pair_is_the_same_every_time_says_what_it_is_and_leaves_the_generator_alone(no_network, caplog):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_pair()
    assert torch.equal(torch.rand(3), expected)
    second = load_pair()
    assert first.weights == second.weights and first.weights.startswith("random-small sha256:")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert "no medical meaning" in caplog.text and "--weights" in caplog.text
    assert not first.model.training and not any(p.requires_grad for p in first.model.parameters())


def test_random_pair_has_the_same_bits_on_every_machine():
    """Written down from one machine: another must name the same weights, or stored embeddings would not be reused."""
    assert load_pair().weights == "random-small sha256:8d9d3481ad3347a1"


def test_random_pair_tells_slices_and_texts_apart(captioned):
    store_embeddings(captioned)
    stored = load_embeddings(captioned)
    for vectors in (stored.image, stored.text):
        cosines = vectors @ vectors.T
        assert cosines[~np.eye(3, dtype=bool)].max() < 0.9999


def test_key_depends_on_weights_shape_pixels_and_text():
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    keys = {
        embedding_key("w", picture, "t"),
        embedding_key("v", picture, "t"),
        embedding_key("w", picture.reshape(3, 2, 3), "t"),
        embedding_key("w", picture + 1, "t"),
        embedding_key("w", picture, "u"),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_local_file_is_loaded_without_the_network(tmp_path, tiny_model, no_network, name):
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(tiny_model, path)
    else:
        torch.save({"state_dict": tiny_model, "epoch": 3}, path)
    pair = load_pair(weights=str(path), model="tiny-test")
    for key, tensor in tiny_model.items():
        assert torch.equal(pair.model.state_dict()[key], tensor)
    reference = open_clip.CLIP(**TINY).eval()
    reference.load_state_dict(tiny_model)
    _, text = pair.embed([np.zeros((40, 30, 3), dtype=np.uint8)], ["a scan"])
    with torch.no_grad():
        expected = reference.encode_text(open_clip.SimpleTokenizer(context_length=77)(["a scan"]), normalize=True)
    np.testing.assert_allclose(text, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_local_folder_is_loaded_without_the_network(tmp_path, tiny_model, no_network, name):
    pair = load_pair(weights=str(folder_of(tmp_path, tiny_model, name=name)))
    assert torch.equal(pair.model.state_dict()["text_projection"], tiny_model["text_projection"])


def test_long_slices_are_padded_not_cropped(tmp_path, tiny_model):
    transform = load_pair(weights=str(folder_of(tmp_path, tiny_model))).transform
    from PIL import Image

    picture = np.zeros((32, 128, 3), dtype=np.uint8)
    picture[:, :4] = 255  # a mark at the end that a centre crop would lose
    tensor = transform(Image.fromarray(picture))
    assert tensor.shape == (3, 32, 32) and tensor.max() > 1


@pytest.mark.parametrize("name", ["evil.pt", "evil.bin", "model/open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_file_that_would_run_code_is_refused_and_not_run(tmp_path, tiny_model, name, writer):
    victim, path = tmp_path / "made-by-the-pickle", tmp_path / name
    if path.parent != tmp_path:
        (folder_of(tmp_path, tiny_model) / "open_clip_model.safetensors").unlink()
    writer({"state_dict": Malicious(victim)}, path)
    where = {"weights": str(path), "model": "tiny-test"} if path.parent == tmp_path else {"weights": str(path.parent)}
    with pytest.raises(UserError, match="holds more than tensors"):
        load_pair(**where)
    assert not victim.exists()


def test_weights_that_cannot_be_used_are_refused_with_a_remedy(tmp_path, tiny_model, no_network):
    save_file(tiny_model, tmp_path / "w.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    (tmp_path / "w.xyz").touch()
    folder_of(tmp_path, tiny_model)
    (tmp_path / "bare").mkdir()
    cases = {
        ("w.safetensors", None): "does not say which model",
        ("w.safetensors", "ViT-X-99"): "no model of open_clip",
        ("w.safetensors", "hf-hub:some/thing"): "no model of open_clip",
        ("w.safetensors", "other-test"): "could not be loaded",
        ("damaged.safetensors", "tiny-test"): "damaged",
        ("w.xyz", "tiny-test"): "no weights file by its ending",
        ("w.safetensors", "roberta-ViT-B-32"): "Hugging Face hub only",
        ("w.safetensors", "ViT-B-16-SigLIP"): "tokenizer from the network",
        ("model", "ViT-B-32"): "names the model",
        ("bare", None): "no usable open_clip_config.json",
        ("absent.pt", "ViT-B-32"): "neither a file, nor a folder, nor a tag",
    }
    for (name, model), problem in cases.items():
        with pytest.raises(UserError, match=problem) as caught:
            load_pair(weights=str(tmp_path / name), model=model)
        assert caught.value.remedy
    with pytest.raises(UserError, match="without weights"):
        load_pair(model="ViT-B-32")


def test_tag_that_cannot_be_downloaded_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    from open_clip import factory

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(factory, "download_pretrained", unreachable)
    with pytest.raises(UserError, match="no route to host") as caught:
        load_pair(weights="laion2b_s34b_b79k", model="ViT-B-32")
    assert "--weights FILE" in caught.value.remedy


def test_random_encoders_do_not_replace_those_that_were_given(captioned, tmp_path, tiny_model):
    weights = str(folder_of(tmp_path, tiny_model))
    assert store_embeddings(captioned, weights=weights).computed == 3
    with pytest.raises(UserError, match="no weights are given now"):
        store_embeddings(captioned)
    assert store_embeddings(captioned, weights=weights).reused == 3


def test_other_weights_compute_everything_again(captioned, tmp_path, tiny_model):
    store_embeddings(captioned)
    summary = store_embeddings(captioned, weights=str(folder_of(tmp_path, tiny_model)))
    assert (summary.computed, summary.reused) == (3, 0)
    assert load_embeddings(captioned).image.shape == (3, 16)


def test_triplets_of_cases_that_are_gone_are_left_out(captioned, caplog):
    for path in (captioned / "imagesTr").glob("c2*"):
        path.unlink()
    store_embeddings(captioned)
    assert load_embeddings(captioned).case.tolist() == ["c0", "c1"]
    assert "c2" in caplog.text
