"""A server that answers, and one that does not: nothing is lost, nothing is asked twice, and nothing leaves unasked."""

import json
import socket
import sys
import threading
import time
from email.utils import formatdate

import numpy as np
import pytest
from vision_server import MISBEHAVIOURS, PASSING, running, text_of

from nnssl_plugin.captions import openai_server
from nnssl_plugin.captions.captioners import CaptionerStopped, SliceFacts, SliceFailed
from nnssl_plugin.captions.endpoint import find_endpoint
from nnssl_plugin.captions.openai_server import PROMPT, OpenAICaptioner, OpenAIOptions, retry_after
from nnssl_plugin.captions.rendering import png
from nnssl_plugin.errors import UserError

FACTS = SliceFacts("case_7", "MR", "axial", 0.5, (100.0, 100.0), 1.0, "left knee", 3)


def picture(seed=0):
    return np.repeat(np.random.default_rng(seed).integers(0, 256, size=(20, 16, 1), dtype=np.uint8), 3, axis=2)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)


@pytest.fixture
def make():
    """A function (server, options) → captioner; closed at the end."""
    made = []

    def captioner(server, **options):
        made.append(OpenAICaptioner(OpenAIOptions(endpoint=server.url, model="m", **options)))
        return made[-1]

    yield captioner
    for one in made:
        one.close()


def test_a_request_holds_the_picture_and_the_papers_prompt_and_no_name(make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running() as server:
        answer = make(server).ask(picture(), FACTS)
    sent = png(picture(), side=512)
    assert (answer.text, answer.requests, answer.tokens_in, answer.tokens_out) == (text_of(sent), 1, 100, 10)
    (body,) = server.bodies
    assert body["messages"][0]["content"][0] == {"type": "text", "text": PROMPT}
    assert PROMPT == "Describe the image in fewer than 100 words"
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0.0, 0, 300)
    assert server.headers_seen[0]["authorization"] == "Bearer secret"
    assert "case_7" not in json.dumps(body) + json.dumps(server.headers_seen)


def test_options_reach_the_server(make):
    prompt = "A {plane} {modality} of the {body_part}: {what}?"
    with running() as server:
        make(server, prompt=prompt, temperature=None, seed=None, max_tokens=None, side=64).ask(picture(), FACTS)
    (body,) = server.bodies
    assert body["messages"][0]["content"][0]["text"] == "A axial MR of the left knee: {what}?"
    assert not {"temperature", "seed", "max_tokens"} & set(body)


def test_what_was_sent_is_kept_where_asked_for(make, tmp_path):
    with running() as server:
        make(server, images=str(tmp_path / "sent")).ask(picture(), FACTS)
    (kept,) = (tmp_path / "sent").iterdir()
    assert kept.name == "case_7_axial_003.png" and set(server.asked) == {kept.read_bytes()}


@pytest.mark.parametrize("wrong", PASSING)
def test_whatever_goes_wrong_for_a_while_the_text_comes(wrong, make, quick):
    with running(misbehaviour=lambda total, of_picture: wrong if of_picture <= 2 else None) as server:
        captioner = make(server, timeout=0.4)
        started = time.monotonic()
        answer = captioner.ask(picture(), FACTS)
    assert answer.text == text_of(png(picture(), side=512)) and answer.requests == 3
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("wrong", ["silent", "drip", "broken", "no JSON", "empty"])
def test_a_slice_that_never_gets_a_text_fails_alone(wrong, make, quick):
    with (
        running(misbehaviour=lambda total, of_picture: wrong) as server,
        pytest.raises(SliceFailed, match="3 attempts, the last: "),
    ):
        make(server, timeout=0.2, attempts=3).ask(picture(), FACTS)
    assert server.asked.total() == 3


@pytest.mark.parametrize(
    ("wrong", "said"), [("endless", "more than"), ("endless error", "more than"), ("bomb", "compressed")]
)
def test_answers_are_read_up_to_a_limit_and_never_unpacked(wrong, said, make, quick):
    with (
        running(misbehaviour=lambda total, of_picture: wrong) as server,
        pytest.raises(SliceFailed, match=f"2 attempts, the last: .*{said}"),
    ):
        make(server, timeout=20, attempts=2).ask(picture(), FACTS)
    assert server.asked.total() == 2


@pytest.mark.parametrize(
    ("wrong", "raised", "said"),
    [
        ("refused picture", SliceFailed, "status 400: .*the picture is not liked"),
        ("no key", CaptionerStopped, "OPENAI_API_KEY"),
        ("no model", CaptionerStopped, "there is no model m"),
        ("no money", CaptionerStopped, "no more answers on this account"),
        ("tomorrow", CaptionerStopped, "come back in 1440 minutes"),
    ],
)
def test_what_another_attempt_cannot_mend_is_asked_once(wrong, raised, said, make):
    with (
        running(misbehaviour=lambda total, of_picture: wrong) as server,
        pytest.raises(raised, match=f"(?s){said}"),
    ):
        make(server).ask(picture(), FACTS)
    assert server.asked.total() == 1


def test_waiting_as_long_as_the_server_says_is_no_attempt_and_holds_for_all(make):
    with running(misbehaviour=lambda total, of_picture: "busy" if total == 1 else None) as server:
        captioner = make(server, attempts=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MISBEHAVIOURS, "busy", lambda handler: handler.reply(429, {}, Retry_After="0.6"))
            first = threading.Thread(target=captioner.ask, args=(picture(0), FACTS))
            first.start()
            while captioner._resume_at == 0:
                time.sleep(0.01)
            captioner.ask(picture(1), FACTS)
            first.join()
    assert server.times[1] - server.times[0] >= 0.59 and len(server.times) == 3


def test_a_server_that_serves_one_at_a_time_serves_all(make, quick, monkeypatch):
    """Each pause holds for seven who ask at once, and only one of them is served after it: the last waits six times."""
    monkeypatch.setitem(MISBEHAVIOURS, "busy", lambda handler: handler.reply(429, {}, Retry_After="0.05"))
    served = [0.0]

    def misbehaviour(total, of_picture):
        if time.monotonic() - served[0] < 0.04:
            return "busy"
        served[0] = time.monotonic()
        return None

    texts = []
    with running(misbehaviour=misbehaviour) as server:
        captioner = make(server, attempts=1)
        threads = [
            threading.Thread(target=lambda n=n: texts.append(captioner.ask(picture(n), FACTS).text)) for n in range(7)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(texts)) == 7 and server.asked.total() > 14


@pytest.mark.parametrize("after", ["0", "0.01"])
def test_a_server_that_only_ever_asks_to_wait_is_left_alone(after, make, quick, monkeypatch):
    monkeypatch.setitem(MISBEHAVIOURS, "busy", lambda handler: handler.reply(429, {}, Retry_After=after))
    monkeypatch.setattr(openai_server, "LONGEST_SILENCE", 0.3)
    with running(misbehaviour=lambda total, of_picture: "busy") as server, pytest.raises(SliceFailed, match="429"):
        make(server, attempts=4).ask(picture(), FACTS)
    assert server.times[-1] - server.times[0] > 0.2 and 4 <= server.asked.total() < 45


def test_the_limit_per_minute_holds(make):
    with running() as server:
        captioner = make(server, per_minute=600)
        threads = [threading.Thread(target=captioner.ask, args=(picture(n), FACTS)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gaps = np.diff(sorted(server.times))
    assert gaps.sum() >= 0.35 and len(gaps) == 4  # four times 0.1 s, less what the first request takes to connect


def test_closing_breaks_off_what_is_being_asked(make):
    with running(misbehaviour=lambda total, of_picture: "silent") as server:
        captioner, ended = make(server), []

        def ask():
            try:
                captioner.ask(picture(), FACTS)
            except BaseException as error:
                ended.append(type(error).__name__)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.asked:
            time.sleep(0.01)
        started = time.monotonic()
        captioner.close()
        thread.join()
    assert ended == ["CancelledError"] and time.monotonic() - started < 20
    with pytest.raises(CaptionerStopped, match="closed"):
        captioner.ask(picture(), FACTS)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status, make, monkeypatch):
    with running() as elsewhere, running(misbehaviour=lambda total, of_picture: "elsewhere") as server:
        location = f"{elsewhere.url}/chat/completions"
        away = lambda handler: handler.reply(status, {}, Location=location)  # noqa: E731
        monkeypatch.setitem(MISBEHAVIOURS, "elsewhere", away)
        with pytest.raises(CaptionerStopped, match=f"redirect \\({status}\\)"):
            make(server).ask(picture(), FACTS)
    assert elsewhere.asked.total() == 0 and server.asked.total() == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_no_proxy_of_the_environment_carries_loopback_away(variable, make, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with running() as proxy, running() as server:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.server_port}")
        make(server).ask(picture(), FACTS)
    assert proxy.asked.total() == 0 and server.asked.total() == 1


def test_neither_does_an_address_or_project_of_the_environment(make, monkeypatch):
    with running() as elsewhere, running() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", elsewhere.url)
        make(server).ask(picture(), FACTS)
    assert elsewhere.asked.total() == 0 and server.asked.total() == 1


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/v1",
        "https://93.184.216.34/v1",
        "http://0.0.0.0:8000/v1",
        "http://10.0.0.5:8000/v1",
        "http://127.0.0.1.example.org/v1",
        "http://localhost.example.org/v1",
        "http://127.1/v1",
        "http://2130706433/v1",
        "http://0x7f000001/v1",
        "http://[fe80::1]/v1",
        "http://my-own-computer:8000/v1",
    ],
)
def test_every_other_computer_needs_permission(address, no_network):
    with pytest.raises(UserError, match="is another computer") as caught:
        OpenAICaptioner(OpenAIOptions(endpoint=address, model="m"))
    assert "--allow-remote" in caught.value.remedy
    assert OpenAICaptioner(OpenAIOptions(endpoint=address, model="m", allow_remote=True)).destination in address


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("http://127.5.6.7/v1", "http://127.5.6.7/v1"),
        ("http://[::1]:11434/v1", "http://[::1]:11434/v1"),
        ("HTTP://LOCALHOST:80/v1", "http://localhost:80/v1"),
    ],
)
def test_loopback_is_local(address, url):
    endpoint = find_endpoint(address, allow_remote=False)
    assert (endpoint.url, endpoint.is_local) == (url, True)


@pytest.mark.parametrize("found", [["10.0.0.5"], ["127.0.0.1", "10.0.0.5"], []])
def test_localhost_is_local_only_where_it_leads_to_loopback_alone(found, monkeypatch):
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: entries)
    with pytest.raises(UserError, match="localhost is another computer"):
        find_endpoint("http://localhost:8000/v1", allow_remote=False)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000",
        "ftp://127.0.0.1/v1",
        "http://",
        "http://user:word@127.0.0.1/v1",
        "http://127.0.0.1\\@example.org/v1",
        "http://example.org#@127.0.0.1/v1",
        "http://127.0.0.1:port/v1",
        "http://127.0.0.1:99999/v1",
        "http://[::1/v1",
        "http://127.0.0.1 /v1",
        "http://127.0.0.1\n.example.org/v1",
        "http://ⓛocalhost/v1",
    ],
)
def test_what_is_no_address_is_refused_even_with_permission(address):
    with pytest.raises(UserError, match="is no address of a server"):
        find_endpoint(address, allow_remote=True)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match="No server is named") as caught:
        OpenAICaptioner(OpenAIOptions())
    assert "--endpoint http://127.0.0.1:8000/v1" in caught.value.remedy
    with pytest.raises(UserError, match="No model is named"):
        OpenAICaptioner(OpenAIOptions(endpoint="http://127.0.0.1:8000/v1"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="needs the package openai") as caught:
        OpenAICaptioner(OpenAIOptions(endpoint="http://127.0.0.1:8000/v1", model="m"))
    assert "nnssl_plugin[openai]" in caught.value.remedy


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after("-3") == 0
    assert retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=2)
    assert [retry_after(header) for header in (None, "", "soon", "nan")] == [None] * 4
