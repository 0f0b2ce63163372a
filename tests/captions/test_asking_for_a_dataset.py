"""A dataset described by a server that misbehaves, by processes that are killed, and with many requests at once."""

import json
import os
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
from vision_server import MISBEHAVIOURS, PASSING, running

from nnssl_plugin.captions import describing, openai_server, triplets
from nnssl_plugin.captions.captioners import CaptionerStopped, open_captioner
from nnssl_plugin.captions.journal import JOURNAL_FILE, RECORD_FILE
from nnssl_plugin.captions.triplets import caption_dataset
from nnssl_plugin.cli.main import main
from nnssl_plugin.data.triplets import read_triplets
from nnssl_plugin.errors import UserError


@pytest.fixture
def make_dataset(raw, phantom):
    """A function (number of cases, ID) → folder of a raw dataset whose slices are all different."""

    def make(cases=4, number=9):
        folder = raw / f"Dataset{number:03d}_Asked"
        (folder / "imagesTr").mkdir(parents=True)
        for case in range(cases):
            image = nibabel.Nifti1Image(phantom(case), np.diag([1.0, 2.0, 3.0, 1.0]))
            nibabel.save(image, folder / "imagesTr" / f"c{case}_0000.nii.gz")
        content = {"channel_names": {"0": "MR"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": cases}))
        return folder

    return make


def ask(folder, server, *, slices=8, **options):
    options = {"endpoint": server.url, "model": "m", "side": 32, **options}
    return caption_dataset(folder, open_captioner("openai", options), slices=slices)


def lines(folder):
    return (folder / "triplets.jsonl").read_text()


@pytest.mark.slow
def test_a_server_that_misbehaves_loses_nothing_and_is_asked_nothing_twice(make_dataset, monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)
    with running() as server:
        ask(make_dataset(number=9), server)
    rng = np.random.default_rng(0)
    wrongs = iter([*rng.permutation([*PASSING, *PASSING]), *[None] * 1000])

    def misbehaviour(total, of_picture):
        return next(wrongs) if total % 2 else None

    folder = make_dataset(number=10)
    with running(misbehaviour=misbehaviour) as server:
        summary = ask(folder, server, timeout=0.5, attempts=20)
        assert summary.added == 32 and not summary.failed
        assert lines(folder) == lines(folder.parent / "Dataset009_Asked")
        assert set(server.answered.values()) == {1} and len(server.answered) == 32
        asked = server.asked.total()
        assert asked == 32 + 2 * len(PASSING) == summary.cost.requests
        assert ask(folder, server).added == 0 and server.asked.total() == asked
    record = json.loads((folder / RECORD_FILE).read_text())["captioners"]["openai model=m side=32"]
    assert record["cost"]["texts"] == 32 and record["cost"]["requests"] == asked
    assert record["options"]["prompt"] == openai_server.PROMPT and record["options"]["seed"] == 0
    assert record["cost"]["tokens_out"] >= 320 and "key" not in json.dumps(record).replace("key_variable", "")
    assert not (folder / JOURNAL_FILE).exists()


@pytest.mark.slow
def test_a_slice_without_a_text_stops_no_other_and_is_asked_for_again(make_dataset, monkeypatch, capsys):
    folder = make_dataset(cases=2)
    flags = ["caption", "-d", "9", "--captioner", "openai", "--captioner-model", "m", "--slices", "4", "--endpoint"]
    with running(misbehaviour=lambda total, of_picture: "refused picture" if total == 3 else None) as server:
        assert main([*flags, server.url]) == 1
        printed = capsys.readouterr().out
        assert "7 texts written, 0 kept" in printed and "1 slices got no text" in printed
        assert "the picture is not liked" in printed and "7 requests, 700 tokens sent, 70 received." in printed
        assert len(read_triplets(folder)) == 7
        assert main([*flags, server.url, "--set", "price_in=2", "price_out=100"]) == 0
        assert "1 texts written, 7 kept" in (printed := capsys.readouterr().out) and ", 0.00 at" in printed
    assert server.asked.total() == 9 and len(read_triplets(folder)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["no model", "refused picture"])
def test_a_server_that_answers_nothing_is_soon_left_alone(make_dataset, wrong):
    folder = make_dataset(cases=8)
    with running(misbehaviour=lambda total, of_picture: wrong if total > 5 else None) as server:
        with pytest.raises(CaptionerStopped):
            ask(folder, server, concurrency=2)
        assert server.asked.total() < 5 + describing.FAILURES_IN_A_ROW + 8
        assert len(read_triplets(folder)) == 5
        server.misbehaviour = lambda total, of_picture: None
        assert ask(folder, server).added == 59
    assert set(server.answered.values()) == {1}


def test_an_image_that_cannot_be_read_ends_the_run_with_what_was_asked_kept(make_dataset):
    folder = make_dataset(cases=3)
    good = (folder / "imagesTr" / "c2_0000.nii.gz").read_bytes()
    (folder / "imagesTr" / "c2_0000.nii.gz").write_bytes(b"broken")
    with running(delay=0.1) as server:
        with pytest.raises(UserError, match="c2_0000"):
            ask(folder, server, concurrency=16)
        assert set(server.asked.values()) == {1} and len(read_triplets(folder)) == 16
        (folder / "imagesTr" / "c2_0000.nii.gz").write_bytes(good)
        ask(folder, server)
    assert set(server.asked.values()) == {1} and len(server.asked) == 24


def test_an_interruption_ends_at_once_and_keeps_what_was_answered(make_dataset, monkeypatch):
    folder = make_dataset(cases=4)
    whole, read = triplets.load_volume, []
    monkeypatch.setitem(MISBEHAVIOURS, "silent", lambda handler: time.sleep(10))

    def interrupted(path):
        read.append(path)
        if len(read) == 3:
            while (folder / JOURNAL_FILE).read_text().count("\n") < 5:  # four texts below the header
                time.sleep(0.01)
            raise KeyboardInterrupt
        return whole(path)

    with running(misbehaviour=lambda total, of_picture: "silent" if total > 4 else None) as server:
        monkeypatch.setattr(triplets, "load_volume", interrupted)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(folder, server, concurrency=16)
        assert len(read_triplets(folder)) == 4 and time.monotonic() - started < 60
        monkeypatch.setattr(triplets, "load_volume", whole)
        server.misbehaviour = lambda total, of_picture: None
        assert ask(folder, server).added == 28
    assert set(server.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 8])
def test_as_many_are_asked_at_once_as_was_said(make_dataset, concurrency):
    """What that is worth in time is measured by benchmarks/caption_throughput.py."""
    with running(delay=0.25) as server:
        ask(make_dataset(number=concurrency + 8), server, concurrency=concurrency)
    assert server.most_working == concurrency


def test_what_leaves_for_another_computer_is_told_and_kept(make_dataset, monkeypatch, caplog):
    """The permission is needed; what leaves is counted before it does. (The other computer is this one.)"""
    folder = make_dataset(cases=2)
    flags = ["caption", "-d", "9", "--captioner", "openai", "--captioner-model", "m", "--slices", "3"]
    endpoint = type("Elsewhere", (), {"url": "", "host": "far.example", "is_local": False})
    with running() as server:
        endpoint.url = server.url
        assert main([*flags, "--endpoint", "http://far.example/v1"]) == 2
        assert server.asked.total() == 0
        monkeypatch.setattr(openai_server, "find_endpoint", lambda *_, **__: endpoint)
        assert main([*flags, "--endpoint", "http://far.example/v1", "--allow-remote"]) == 0
    assert "Up to 6 pictures of Dataset009_Asked leave this computer for far.example." in caplog.messages
    kept = {path.read_bytes() for path in (folder / "caption_images").iterdir()}
    assert len(kept) == 6 and kept == set(server.asked)


RUN = """
import sys
from pathlib import Path
from nnssl_plugin.captions.captioners import open_captioner
from nnssl_plugin.captions.triplets import caption_dataset
options = {"endpoint": sys.argv[2], "model": "m", "side": 32, "concurrency": 4}
caption_dataset(Path(sys.argv[1]), open_captioner("openai", options))
"""


def killed_and_finished(make_dataset, kills, cases):
    """Describe a dataset with so many kills on the way; nothing may differ from one run, and nothing is asked twice."""
    with running() as server:
        ask(make_dataset(cases, 9), server)
    folder = make_dataset(cases, 10)
    with running(delay=0.02) as server:
        rng, ended = np.random.default_rng(1), 0
        for kill in range(kills):
            goal = max(server.answered.total() + 1, (kill + rng.uniform(0, 1)) * 8 * cases / (kills + 1))
            process = subprocess.Popen([sys.executable, "-c", RUN, str(folder), server.url], stderr=subprocess.DEVNULL)
            while process.poll() is None and server.answered.total() < goal:
                time.sleep(0.002)
            ended += process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        in_flight = server.answered.total() - len(server.answered)
        assert ended == kills, "a process ended by itself"
        subprocess.run([sys.executable, "-c", RUN, str(folder), server.url], check=True, stderr=subprocess.DEVNULL)
    assert lines(folder) == lines(folder.parent / "Dataset009_Asked")
    assert len(server.answered) == 8 * cases and not (folder / JOURNAL_FILE).exists()
    # whatever was being asked when the process died (at most four) has nobody to take its answer
    assert in_flight <= 4 * kills and server.answered.total() - len(server.answered) <= 4 * kills
    record = json.loads((folder / RECORD_FILE).read_text())["captioners"]["openai model=m side=32"]
    assert record["cost"]["texts"] == 8 * cases
    return server


@pytest.mark.slow
def test_three_kills_change_nothing(make_dataset):
    killed_and_finished(make_dataset, kills=3, cases=8)


@pytest.mark.nightly
def test_twenty_kills_change_nothing(make_dataset):
    killed_and_finished(make_dataset, kills=20, cases=40)
