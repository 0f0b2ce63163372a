"""Text to volume: the learned distance against loops, the pair that is looked for, refusals, and the commands."""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_scans import write_scans
from small_checkpoint import checkpoint_of
from small_index import make_index

from nnssl_plugin.captions.clip.pairs import load_pair, random_pair, save_pair
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.cli.main import main
from nnssl_plugin.data.triplets import Embeddings, write_embeddings
from nnssl_plugin.data.vector_store import VectorStore, writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.methods.med3dinsight.objective import Med3DInsight
from nnssl_plugin.methods.med3dinsight.settings import Settings
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.retrieval.embedding import embed_images
from nnssl_plugin.tasks.retrieval.index import load_index
from nnssl_plugin.tasks.retrieval.queries import Query
from nnssl_plugin.tasks.retrieval.texts import search_texts

DATASET, SIZE = "Dataset908_Texts", 512
SMALL = {"dim": 12, "queries": 3, "layers": 1, "heads": 2, "slice_bins": 4}


@pytest.mark.parametrize("centre", [True, False])
def test_the_distance_is_that_of_the_training(tmp_path, centre):
    rng = np.random.default_rng(0)
    vectors, texts = rng.normal(2, 1, (30, 6)).astype(np.float32), rng.normal(-1, 1, (4, 6))
    root = rng.normal(size=(6, 6))
    metric, of_texts = root @ root.T, rng.normal(size=6)
    index = make_index(tmp_path / "i", vectors, ("aligned",))
    with writing(index.store.folder) as store:
        store.commit(alignment={"weights": "p sha256:0", "pair": None, "centre": centre})
    np.savez(tmp_path / "i" / "alignment.npz", metric=metric, mean=of_texts)
    index = load_index(tmp_path / "i")
    found = search_texts(index, [Query(str(n), text, None, "") for n, text in enumerate(texts)], 5)
    shifts = (vectors.astype(float).mean(0), of_texts) if centre else (0, 0)
    for query, text in enumerate(texts):
        distances = []
        for row in vectors.astype(float):
            a, b = row - shifts[0], text - shifts[1]
            apart = a / np.linalg.norm(a) - b / np.linalg.norm(b)
            distances.append(np.sqrt(apart @ metric @ apart + 1e-8))
        order = np.argsort(distances)[:5]
        np.testing.assert_array_equal(found.rows[query], order)
        np.testing.assert_allclose(found.distances[query], np.array(distances)[order], rtol=1e-5)
    among = np.zeros(30, dtype=bool)
    among[[3, 4]] = True
    some = search_texts(index, [Query("", texts[0], None, "")], 4, among=among)
    assert set(some.rows[0, :2]) == {3, 4} and (some.rows[0, 2:] == -1).all() and np.isinf(some.distances[0, 2:]).all()


@pytest.fixture
def aligned(nnunet_environment, tmp_path):
    """A checkpoint as Med3DInsight's training writes it, before its first step, and its dataset with a pair."""
    given = torch.load(checkpoint_of(tmp_path), weights_only=True)["init_args"]
    network = build_network(given["plans"], given["configuration"], given["dataset_json"])
    settings = Settings(**SMALL)
    torch.manual_seed(1)
    task = Med3DInsight(Backbone(network, 1), settings, SIZE)
    state = {key: value for key, value in task.state_dict().items() if not key.startswith("backbone.network.")}
    said = {
        "network": describe_network(given["plans"], given["configuration"]),
        "method": "med3dinsight",
        "settings": asdict(settings),
        "data": {"dataset": DATASET, "cases": 6},
    }
    return checkpoint_of(tmp_path, ssl_state={"task": state, "step": 1}, provenance=said)


@pytest.fixture
def dataset(nnunet_environment):
    """The raw dataset with the small pair in it, as clip leaves it."""
    raw = Path(os.environ["nnUNet_raw"], DATASET)
    raw.mkdir(parents=True)
    (raw / "dataset.json").write_text("{}")
    save_pair(random_pair(), raw / "clip_pair")
    pair = load_pair(weights=str(raw / "clip_pair"))
    write(raw, pair.embed_texts(["a ball", "stripes"]), pair.weights)
    return raw


def write(raw, text, weights):
    rows = np.array(["a", "b"])
    write_embeddings(raw, Embeddings(rows, rows, rows, text, text, weights, rows))


@pytest.mark.slow
def test_text_to_volume_by_the_commands(aligned, dataset, tmp_path, capsys):
    scans, index, out = write_scans(tmp_path / "scans", 4), str(tmp_path / "index"), tmp_path / "found"
    assert main(["embed", "-m", str(aligned), "-i", str(scans), "-o", index, "--aligned"]) == 0
    assert VectorStore(index).dimensions == SIZE
    texts = ["a bright ball in the dark", "stripes"]
    assert main(["search", "--index", index, "--text", *texts, "-k", "3", "-o", str(out)]) == 0
    answers = read_json(out / "neighbours.json")["queries"]
    assert [answer["query"] for answer in answers] == texts
    assert all(len(answer["neighbours"]) == 3 for answer in answers) and (out / "neighbours.png").is_file()
    assert "a bright ball in the dark" in (out / "neighbours.html").read_text()
    assert main(["search", "--index", index, "-q", str(scans / "case_00_0000.nii.gz"), "-k", "1"]) == 0
    more = write_scans(tmp_path / "more" / "scans", 2, first=4)
    assert main(["index", "add", "--index", index, "-i", str(more)]) == 0
    capsys.readouterr()
    assert main(["index", "info", "--index", index]) == 0
    assert "texts: clip_pair sha256:" in capsys.readouterr().out
    (dataset / "clip_pair").rename(tmp_path / "moved")
    assert main(["search", "--index", index, "--text", "stripes"]) == 2
    assert "--pair" in capsys.readouterr().err
    assert main(["search", "--index", index, "--text", "stripes", "--approximate"]) == 2
    assert "--approximate" in capsys.readouterr().err
    assert main(["search", "--index", index, "--text", "stripes", "--pair", str(tmp_path / "moved")]) == 0
    other = random_pair()
    other.model.logit_scale.add_(1)
    save_pair(other, tmp_path / "other")
    assert main(["search", "--index", index, "--text", "stripes", "--pair", str(tmp_path / "other")]) == 2
    assert "was aligned with" in capsys.readouterr().err


def test_what_cannot_be_compared_with_texts_is_refused(aligned, dataset, tmp_path, capsys):
    scans = write_scans(tmp_path / "scans", 2)
    plain = checkpoint_of(tmp_path / "plain")
    for arguments, said in (
        (["-m", str(plain)], "does not align volumes with texts"),
        (["-m", str(aligned), "--rows", "lesion", "-seg", str(tmp_path / "masks")], "images or windows"),
    ):
        assert main(["embed", "-i", str(scans), "-o", str(tmp_path / "no"), "--aligned", *arguments]) == 2
        assert said in capsys.readouterr().err
    write(dataset, np.ones((2, SIZE), np.float32), "random-small sha256:1")
    command = ["embed", "-m", str(aligned), "-i", str(scans), "-o", str(tmp_path / "no"), "--aligned"]
    assert main(command) == 2 and "random encoders" in capsys.readouterr().err
    write(dataset, np.ones((2, 8), np.float32), "other sha256:1")
    assert main(command) == 2 and "8 numbers" in capsys.readouterr().err
    assert main(["embed", "-m", str(plain), "-i", str(scans), "-o", str(tmp_path / "features")]) == 0
    assert main(["search", "--index", str(tmp_path / "features"), "--text", "a ball"]) == 2
    assert "features of images" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be compared"):
        embed_images(scans, tmp_path / "features", aligned, processes=0)
