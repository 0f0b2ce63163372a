"""Vectors against a plain forward pass: pooling, batches, views, rows, teacher, refusals, kills."""

import multiprocessing
import os
import signal
import time
from functools import partial

import nibabel
import numpy as np
import pytest
import torch
from retrieval_scans import write_scans
from small_checkpoint import checkpoint_of
from small_primus import with_primus

import nnssl_plugin as nnssl
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.data.vector_store import VectorStore, writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.retrieval import embedding
from nnssl_plugin.tasks.retrieval.embedding import drift_of, embed_images
from nnssl_plugin.tasks.retrieval.encoder import checkpoint_of as file_of
from nnssl_plugin.tasks.retrieval.encoder import load_encoder
from nnssl_plugin.tasks.retrieval.inputs import cut, prepare_case


@pytest.fixture
def checkpoint(nnunet_environment, tmp_path):
    return checkpoint_of(tmp_path)


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans")


def by_loop(checkpoint, scans, case):
    """Mean and maximum over the tokens of all windows, weighed by the body in their cells, voxel by voxel."""
    backbone = nnssl.load_backbone(checkpoint)
    prepared = prepare_case(case, [scans / f"{case}_0000.nii.gz"], backbone.preprocessing)
    (row,) = prepared.rows
    weights, values = [], []
    for number in range(len(row.places)):
        window, inside = cut(prepared, row, number, backbone.patch_size)
        maps = backbone(torch.from_numpy(window)[None])[-1][0]
        for token in np.ndindex(*maps.shape[1:]):
            cell = inside[0]
            for place in token:  # the centre of token 0 is voxel 0, its cell [-2, 2)
                voxels = np.arange(16)
                low, high = 4 * place - 2, 4 * place + 2
                share = np.clip(np.minimum(voxels + 0.5, high) - np.maximum(voxels - 0.5, low), 0, 1)
                cell = np.tensordot(cell, share, axes=([0], [0]))
            weights.append(float(cell))
            values.append(maps[(slice(None), *token)].numpy())
    weights, values = np.array(weights), np.array(values, dtype=np.float64)
    return np.concatenate(((weights[:, None] * values).sum(0) / weights.sum(), values[weights > 0].max(0)))


@torch.no_grad()
def test_the_vector_is_the_mean_and_maximum_inside_the_body(checkpoint, scans, tmp_path):
    done = embed_images(scans, tmp_path / "index", checkpoint, batch_size=3)
    assert (done.done, done.skipped, done.rows, done.failed) == (6, 0, 6, {}) and done.drift is None
    store = VectorStore(tmp_path / "index")
    assert store.vectors().shape == (6, 32) and store.facts["encoder"]["parts"] == ["mean", "maximum"]
    for number in (0, 5):
        np.testing.assert_allclose(
            store.vectors()[number], by_loop(checkpoint, scans, f"case_{number:02d}"), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("rows, view", [("case", "windows"), ("case", "whole"), ("window", "windows")])
def test_a_vector_does_not_depend_on_its_batch(checkpoint, scans, tmp_path, rows, view):
    first, second = (tmp_path / name for name in ("one", "many"))
    embed_images(scans, first, checkpoint, batch_size=1, rows=rows, view=view)
    embed_images(scans, second, checkpoint, batch_size=7, rows=rows, view=view)
    np.testing.assert_allclose(VectorStore(first).vectors(), VectorStore(second).vectors(), atol=1e-5)
    assert VectorStore(first).table() == VectorStore(second).table()


@pytest.mark.slow
def test_other_processes_read_the_same_and_tell_what_they_could_not(checkpoint, scans, tmp_path, monkeypatch):
    (scans / "case_01_0000.nii.gz").write_bytes(b"no image")
    monkeypatch.setattr(embedding, "FEW", 3)
    done = {n: embed_images(scans, tmp_path / str(n), checkpoint, processes=n) for n in (0, 2)}
    assert set(done[2].failed) == {"case_01"} and done[2].failed == done[0].failed
    here, there = (VectorStore(tmp_path / str(n)) for n in (0, 2))
    assert here.table() == there.table()
    np.testing.assert_array_equal(here.vectors(), there.vectors())


def test_the_whole_image_keeps_its_proportions(checkpoint, scans):
    backbone = nnssl.load_backbone(checkpoint)
    prepared = prepare_case("case_00", [scans / "case_00_0000.nii.gz"], backbone.preprocessing, view="whole")
    window, _ = cut(prepared, prepared.rows[0], 0, backbone.patch_size)
    depth, height, width = prepared.data.shape[1:]
    assert window.shape == (1, 16, 16, 16) and depth == 36  # 18 slices of 2 mm; 36 voxels become 16
    outside = [(window[0] == 0).all(axis=tuple(a for a in range(3) if a != axis)).sum() for axis in range(3)]
    expected = [16 * (1 - size / depth) for size in (depth, height, width)]
    assert all(abs(a - b) <= 2 for a, b in zip(outside, expected, strict=True))


def test_a_row_per_lesion_tells_label_volume_and_height(checkpoint, scans, tmp_path):
    embed_images(scans, tmp_path / "index", checkpoint, rows="lesion", segmentations=tmp_path / "masks")
    table = VectorStore(tmp_path / "index").table()
    assert len(table) == 12 and [row["part"] for row in table[:2]] == ["lesion_01", "lesion_02"]
    assert [row["label"] for row in table[:2]] == ["1", "2"]
    np.testing.assert_allclose([float(row["volume_ml"]) for row in table[:2]], [0.036, 0.36], rtol=0.15)
    np.testing.assert_allclose([float(row["height"]) for row in table[:2]], [3 / 18, 13 / 18], atol=0.03)
    (tmp_path / "masks" / "case_03.nii.gz").unlink()
    done = embed_images(scans, tmp_path / "less", checkpoint, rows="lesion", segmentations=tmp_path / "masks")
    assert done.rows == 10 and "no segmentation" in done.failed["case_03"]
    with pytest.raises(UserError, match="-seg"):
        embed_images(scans, tmp_path / "none", checkpoint, rows="lesion")


def test_the_height_is_that_of_the_file_whatever_its_orientation(checkpoint, tmp_path):
    scan = tmp_path / "a_0000.nii.gz"
    volume = np.zeros((20, 20, 20), dtype=np.float32)
    volume[5:15, 5:15, 12:18] = 100  # high up
    nibabel.save(nibabel.Nifti1Image(volume + np.random.default_rng(0).random(volume.shape), np.eye(4)), scan)
    backbone = nnssl.load_backbone(checkpoint)
    up = float(prepare_case("a", [scan], backbone.preprocessing).rows[0].facts["height"])
    turned = nibabel.as_closest_canonical(nibabel.load(scan)).as_reoriented(np.array([[2, -1], [0, 1], [1, 1]]))
    nibabel.save(turned, scan)
    assert abs(up - 15 / 20) < 0.03
    assert abs(float(prepare_case("a", [scan], backbone.preprocessing).rows[0].facts["height"]) - up) < 0.01


def test_two_dimensions_and_several_channels(nnunet_environment, tmp_path):
    scans = write_scans(tmp_path / "scans", 2, channels=2)
    flat = checkpoint_of(tmp_path, dimensions=2, channels=2, spacing=(1.0, 1.0))
    for view in ("windows", "whole"):
        done = embed_images(scans, tmp_path / view, flat, view=view)
        assert done.rows == 2 and np.isfinite(VectorStore(tmp_path / view).vectors()).all()


def test_tokens_have_their_mean_alone_and_are_compared_as_they_are(nnunet_environment, tmp_path, scans):
    checkpoint = checkpoint_of(tmp_path, change=with_primus)
    embed_images(scans, tmp_path / "index", checkpoint, view="whole")
    index = nnssl.load_index(tmp_path / "index")
    assert index.store.facts["encoder"]["parts"] == ["mean"] and index.store.dimensions == 24
    assert (index.standardise.mean == 0).all() and (index.standardise.scale == 1).all()


def test_the_teachers_weights_are_taken_where_there_are_any(nnunet_environment, tmp_path):
    plain = checkpoint_of(tmp_path / "plain")
    other = torch.load(checkpoint_of(tmp_path / "other", seed=9), weights_only=True)["network_weights"]
    task = {f"teacher.backbone.module.network.{key}": value for key, value in other.items()}
    task |= {
        "teacher.backbone.module.reconstruction_head.weight": torch.ones(1),
        "teacher.heads.module.0.bias": torch.ones(1),
    }
    taught = checkpoint_of(tmp_path / "taught", ssl_state={"task": task, "step": 1})
    x = torch.randn(1, 1, 16, 16, 16)
    encoder = load_encoder(taught)
    assert encoder.teacher and not load_encoder(plain).teacher
    assert torch.equal(
        encoder.backbone(x)[-1], load_encoder(tmp_path / "other" / "checkpoint_final.pth").backbone(x)[-1]
    )
    assert encoder.facts["encoder_sha256"] != load_encoder(plain).facts["encoder_sha256"]


def test_the_rules_of_the_checkpoint_are_repeated(nnunet_environment, tmp_path):
    """Three channels and the unit range, as a pretraining on several kinds of images states them."""
    given = torch.load(checkpoint_of(tmp_path), weights_only=True)["init_args"]
    network = build_network(given["plans"], given["configuration"], given["dataset_json"], channels=3)
    said = {
        "network": describe_network(given["plans"], given["configuration"]),
        "network_channels": 3,
        "settings": {"intensity": "unit"},
        "method": "toy",
    }
    content = {"network_weights": network.state_dict(), "init_args": given, "provenance": said}
    save_checkpoint(content, tmp_path / "own.pth")
    encoder = load_encoder(tmp_path / "own.pth")
    x, inside = torch.randn(2, 1, 16, 16, 16), torch.ones(2, 1, 16, 16, 16)
    unit = torch.stack([(each - each.min()) / (each.max() - each.min()) for each in x]).repeat(1, 3, 1, 1, 1)
    torch.testing.assert_close(encoder.read(x, inside).parts["maximum"], encoder.backbone(unit)[-1].amax((2, 3, 4)))
    assert encoder.facts["unit_range"] and encoder.facts["method"] == "toy"
    assert torch.isfinite(encoder.read(torch.zeros_like(x), inside).parts["maximum"]).all()


def test_model_folders_name_their_one_checkpoint(tmp_path):
    for fold in ("fold_0", "fold_1"):
        (tmp_path / fold).mkdir()
        (tmp_path / fold / "checkpoint_final.pth").touch()
    with pytest.raises(UserError, match="fold_0"):
        file_of(tmp_path)
    (tmp_path / "fold_all").mkdir()
    (tmp_path / "fold_all" / "checkpoint_final.pth").touch()
    assert file_of(tmp_path).parent.name == "fold_all"


def test_what_is_there_is_skipped_and_statistics_stay(checkpoint, tmp_path):
    scans, folder = write_scans(tmp_path / "scans", 4), tmp_path / "index"
    embed_images(scans, folder, checkpoint)
    frozen, vectors = VectorStore(folder).statistics(), np.array(VectorStore(folder).vectors())
    write_scans(scans, 2, first=4)
    done = embed_images(scans, folder, checkpoint)
    assert (done.done, done.skipped, done.rows) == (2, 4, 6) and done.drift > 0
    np.testing.assert_array_equal(VectorStore(folder).statistics(), frozen)
    np.testing.assert_array_equal(VectorStore(folder).vectors()[:4], vectors)


def test_drift_is_the_shift_in_standard_deviations():
    statistics = np.array([[1.0, 2.0, 5.0], [2.0, 4.0, 0.0]])
    assert drift_of(np.array([[3.0, 2.0, 9.0], [3.0, 2.0, 9.0]]), statistics) == pytest.approx(np.sqrt(1 / 2))


def test_cases_that_cannot_be_used_are_named(checkpoint, scans, tmp_path):
    (scans / "case_01_0000.nii.gz").write_bytes(b"no image")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)), scans / "case_02_0000.nii.gz")
    done = embed_images(scans, tmp_path / "index", checkpoint)
    assert set(done.failed) == {"case_01", "case_02"} and done.rows == 4
    for file in scans.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="No case"):
        embed_images(scans, tmp_path / "none", checkpoint)


def test_another_encoder_other_rows_and_foreign_metadata_are_refused(checkpoint, scans, tmp_path):
    embed_images(scans, tmp_path / "index", checkpoint)
    with pytest.raises(UserError, match="encoder_sha256"):
        embed_images(scans, tmp_path / "index", checkpoint_of(tmp_path / "other", seed=8))
    with pytest.raises(UserError, match="rows_are"):
        embed_images(scans, tmp_path / "index", checkpoint, rows="window")
    with pytest.raises(UserError, match="metadata"):
        embed_images(scans, tmp_path / "new", checkpoint, metadata={"stranger": {}})
    with pytest.raises(UserError, match="nnssl_plugin embed"):
        embed_images(scans, tmp_path / "new", checkpoint, new=False)


def test_an_interrupted_index_goes_on(checkpoint, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "SECONDS", 0)
    append, calls = embedding.StoreWriter.append, []

    def failing(store, vectors, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(store, vectors, rows)

    monkeypatch.setattr(embedding.StoreWriter, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        embed_images(scans, tmp_path / "index", checkpoint)
    with pytest.raises(UserError, match="embed again"):
        nnssl.load_index(tmp_path / "index")
    with pytest.raises(UserError, match="embed again"):  # its statistics would be those of other images
        embed_images(scans, tmp_path / "index", checkpoint, new=False)
    done = embed_images(scans, tmp_path / "index", checkpoint)
    assert done.skipped >= 1 and done.rows == 6
    embed_images(scans, tmp_path / "whole", checkpoint)
    a, b = (VectorStore(tmp_path / name) for name in ("index", "whole"))
    np.testing.assert_allclose(a.vectors(), b.vectors(), atol=1e-5)
    np.testing.assert_allclose(a.statistics(), b.statistics(), atol=1e-5)


def _in_a_child(scans, folder, checkpoint, new):
    embedding.SECONDS = 0.0
    torch.set_num_threads(1)
    embed_images(scans, folder, checkpoint, batch_size=1, processes=0, new=new)


def kill_at_random_moments(scans, folder, checkpoint, *, times, new):
    """Start the embedding again and again, and kill it; then let it finish."""
    rng, fork = np.random.default_rng(times), multiprocessing.get_context("fork")
    whole = None
    for number in range(times + 1):
        child = fork.Process(target=partial(_in_a_child, scans, folder, checkpoint, new))
        started = time.perf_counter()
        child.start()
        if number < times:
            time.sleep(float(rng.uniform(0.05, 1.2)))
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
        child.join()
        whole = time.perf_counter() - started
    assert child.exitcode == 0, whole


def assert_killing_loses_and_doubles_nothing(tmp_path, times):
    checkpoint, scans = checkpoint_of(tmp_path), write_scans(tmp_path / "scans", 12)
    kill_at_random_moments(scans, tmp_path / "index", checkpoint, times=times, new=True)
    write_scans(scans, 8, first=12)
    kill_at_random_moments(scans, tmp_path / "index", checkpoint, times=times, new=False)
    embed_images(scans, tmp_path / "whole", checkpoint)
    killed, whole = (VectorStore(tmp_path / name) for name in ("index", "whole"))
    assert [row["case"] for row in killed.table()] == [f"case_{n:02d}" for n in range(20)]
    np.testing.assert_allclose(killed.vectors(), whole.vectors(), atol=1e-5)
    np.testing.assert_array_equal(np.load(killed.vectors_file), killed.vectors())
    with writing(tmp_path / "index") as store:  # no lock is left
        assert store.rows == 20


@pytest.mark.slow
def test_killing_loses_and_doubles_nothing(nnunet_environment, tmp_path):
    assert_killing_loses_and_doubles_nothing(tmp_path, 3)


@pytest.mark.nightly
def test_killing_twenty_times_loses_and_doubles_nothing(nnunet_environment, tmp_path):
    assert_killing_loses_and_doubles_nothing(tmp_path, 20)
