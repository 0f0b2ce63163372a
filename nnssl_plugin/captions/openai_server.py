"""The captioner that asks a server with the OpenAI interface: vLLM, Ollama, llama.cpp on this computer, or hosted.

What is sent is one picture (PNG without metadata) and the prompt; the case's name never leaves.
"""

import asyncio
import base64
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from nnssl_plugin.captions.captioners import TRANSPORT, Answer, CaptionerStopped, SliceFacts, SliceFailed
from nnssl_plugin.captions.endpoint import find_endpoint
from nnssl_plugin.captions.rendering import png
from nnssl_plugin.captions.transport import HEADERS, limit_answer
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path
from nnssl_plugin.io.text import printable
from nnssl_plugin.settings import Count, NonNegative, Positive, Range

PROMPT = "Describe the image in fewer than 100 words"
"""The paper's (Med3DInsight, section III-A)."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, doubled before each further one up to the longest, less a random part."""
LONGEST_PAUSE = 3600.0
"""Seconds that a server may ask to wait (Retry-After); beyond it the run ends."""
LONGEST_SILENCE = 600.0
"""Seconds without a text for any slice, after which a server that asks to wait is believed no more."""
PASSING = (408, 409, 425, 429)
"""Statuses below 500 that another attempt may mend."""
SHOWN = 300
"""Characters of a server's message that are repeated."""


@dataclass(frozen=True)
class OpenAIOptions:
    """Whom to ask, what, and how patiently."""

    endpoint: str = field(default="", metadata=TRANSPORT)
    """Address of the server up to ``/v1``."""
    model: str = ""
    """Name of the model, as the server knows it."""
    prompt: str = PROMPT
    """``{plane}``, ``{modality}`` and ``{body_part}`` are filled in."""
    temperature: NonNegative | None = 0.0
    """0: the likeliest words; null: as the server likes it."""
    seed: int | None = 0
    """Of the server's draws; null: none is sent."""
    max_tokens: Count | None = 300
    """Longest answer; null: as the server likes it."""
    side: Annotated[int, Range(ge=32)] = 512
    """Length in pixels of the longer side of what is sent."""
    concurrency: Count = field(default=8, metadata=TRANSPORT)
    """Slices that are asked for at once."""
    per_minute: NonNegative = field(default=0.0, metadata=TRANSPORT)
    """Most requests per minute; 0: no limit but the server's."""
    timeout: Positive = field(default=120.0, metadata=TRANSPORT)
    """Seconds for a whole answer."""
    attempts: Count = field(default=6, metadata=TRANSPORT)
    """Per slice; a pause that the server asks for is none, unless no slice got a text for ten minutes."""
    allow_remote: bool = field(default=False, metadata=TRANSPORT)
    """Whether pictures may leave this computer."""
    images: str = field(default="", metadata=TRANSPORT)
    """Folder that keeps every picture that is sent; empty: none."""
    key_variable: str = field(default="OPENAI_API_KEY", metadata=TRANSPORT)
    """Environment variable that holds the server's key; a server without keys needs none."""
    price_in: NonNegative = field(default=0.0, metadata=TRANSPORT)
    """Price of a million tokens that are sent, for the sum at the end."""
    price_out: NonNegative = field(default=0.0, metadata=TRANSPORT)
    """Price of a million tokens that come back."""


class _Again(Exception):
    """Another attempt may help; ``pause``: seconds after which the server wants it."""

    def __init__(self, why: str, pause: float | None = None):
        super().__init__(why)
        self.pause = pause


class OpenAICaptioner:
    """Asks for each slice until there is a text; after :meth:`close` it asks no more.

    Raises:
        UserError: no server or model is named, the server is another computer without permission, or the package
            ``openai`` is missing.
    """

    name = "openai"
    Options = OpenAIOptions

    def __init__(self, options: OpenAIOptions):
        self.options = options
        self.concurrency = options.concurrency
        self._endpoint = find_endpoint(options.endpoint, allow_remote=options.allow_remote)
        self.destination = None if self._endpoint.is_local else self._endpoint.host
        if not options.model:
            raise UserError("No model is named that would describe the slices.", "For example: --captioner-model NAME")
        self._openai = _library()
        self._changing = threading.Lock()  # of the loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._next_start = self._resume_at = 0.0  # of the loop's clock
        self._last_answer = 0.0  # to any slice; at first the time of the first request

    def describe(self, slices: Sequence[np.ndarray], facts: Sequence[SliceFacts]) -> list[str]:
        """See :class:`~nnssl_plugin.captions.captioners.Captioner`; one slice after the other."""
        return [self.ask(picture, fact).text for picture, fact in zip(slices, facts, strict=True)]

    def ask(self, picture: np.ndarray, facts: SliceFacts) -> Answer:
        """See :class:`~nnssl_plugin.captions.captioners.AskedCaptioner`."""
        image = png(picture, side=self.options.side)
        if self.options.images:
            self._keep(image, facts)
        with self._changing:
            loop = self._running_loop()
            future = asyncio.run_coroutine_threadsafe(self._answer(image, facts), loop)
        return future.result()

    def close(self) -> None:
        """Break off what is being asked."""
        with self._changing:
            self._closed, loop, self._loop = True, self._loop, None
        if loop is None:
            return
        asyncio.run_coroutine_threadsafe(self._break_off(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _keep(self, image: bytes, facts: SliceFacts) -> None:
        path = Path(self.options.images) / f"{facts.case}_{facts.plane}_{facts.index:03d}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(image)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop in a thread of its own: only there can a request be broken off at any point."""
        if self._closed:
            raise CaptionerStopped("The captioner is closed.")
        if self._loop is None:
            self._client = self._make_client()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="captioner", daemon=True)
            self._thread.start()
        return self._loop

    def _make_client(self) -> Any:
        """A client that follows no redirect, and on this computer asks no proxy: both could lead elsewhere."""
        transport = self._openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            trust_env=not self._endpoint.is_local,
            timeout=self.options.timeout,
            event_hooks={"response": [limit_answer]},
        )
        return self._openai.AsyncOpenAI(
            base_url=self._endpoint.url,
            api_key=os.environ.get(self.options.key_variable) or "none",
            default_headers=HEADERS,
            max_retries=0,
            http_client=transport,
        )

    async def _break_off(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _answer(self, image: bytes, facts: SliceFacts) -> Answer:
        requests = failed = tokens_in = tokens_out = 0
        clock = asyncio.get_running_loop().time
        self._last_answer = self._last_answer or clock()
        while True:
            await self._turn()
            requests += 1
            try:
                reply = read_reply(await self._request(image, facts))
                tokens_in, tokens_out = tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
                if reply.text:
                    self._last_answer = clock()
                    return Answer(reply.text, requests, tokens_in, tokens_out)
                raise _Again("an empty text")
            except _Again as again:
                is_patient = again.pause is not None and clock() - self._last_answer < LONGEST_SILENCE
                failed += not is_patient
                if failed >= self.options.attempts:
                    raise SliceFailed(f"{failed} attempts, the last: {again}") from again
                if again.pause is None:
                    await asyncio.sleep(min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT) * random.uniform(0.5, 1))
                else:
                    self._pause(max(again.pause, FIRST_WAIT))

    async def _turn(self) -> None:
        """Wait until the server's pause is over and the limit per minute allows a request."""
        clock = asyncio.get_running_loop().time
        while (wait := max(self._resume_at, self._next_start) - clock()) > 0:
            await asyncio.sleep(wait)
        if self.options.per_minute:
            self._next_start = clock() + 60 / self.options.per_minute

    def _pause(self, seconds: float) -> None:
        """Nobody asks for a while: a server that is busy for one is so for all."""
        if seconds > LONGEST_PAUSE:
            problem = f"{self._endpoint.host} asks to come back in {seconds / 60:.0f} minutes."
            raise CaptionerStopped(problem, "What was answered is kept. Run the same command again then.")
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)

    async def _request(self, image: bytes, facts: SliceFacts) -> str:
        """The body of one answer.

        Raises:
            _Again, SliceFailed, CaptionerStopped: as what came of it means.
        """
        url = f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
        content = [
            {"type": "text", "text": self._prompt(facts)},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        extra = {name: getattr(self.options, name) for name in ("temperature", "seed", "max_tokens")}
        ask = self._client.chat.completions.with_raw_response.create(
            model=self.options.model,
            messages=[{"role": "user", "content": content}],
            **{name: value for name, value in extra.items() if value is not None},
        )
        try:
            return (await asyncio.wait_for(ask, self.options.timeout)).text
        except (asyncio.TimeoutError, self._openai.APITimeoutError) as error:
            raise _Again(f"no answer within {self.options.timeout:g} s") from error
        except self._openai.APIConnectionError as error:
            raise _Again(f"no connection ({error.__cause__ or error})") from error
        except self._openai.APIStatusError as error:
            raise self._verdict(error) from error

    def _prompt(self, facts: SliceFacts) -> str:
        prompt = self.options.prompt
        for name in ("plane", "modality", "body_part"):
            prompt = prompt.replace(f"{{{name}}}", getattr(facts, name))
        return prompt

    def _verdict(self, error: Any) -> Exception:
        """What a status means: another attempt, no text for this slice, or no text for any."""
        status, said = error.status_code, printable(str(error.message))[:SHOWN]
        if status in (401, 403):
            remedy = f"Put the server's key into the environment variable {self.options.key_variable}."
            return CaptionerStopped(f"{self._endpoint.url} refuses the key: {said}", remedy)
        if status < 400:
            remedy = "Redirects are not followed; name the true address: --endpoint URL"
            return CaptionerStopped(f"{self._endpoint.url} answers with a redirect ({status}).", remedy)
        if status in (404, 405):
            remedy = "An address ends before /chat/completions, usually in /v1; the model is one that the server lists."
            return CaptionerStopped(f"{self._endpoint.url} or model {self.options.model} is not there: {said}", remedy)
        if error.code == "insufficient_quota":
            return CaptionerStopped(f"{self._endpoint.host} gives no more answers on this account: {said}")
        if status in PASSING or status >= 500:
            return _Again(f"status {status}: {said}", retry_after(error.response.headers.get("retry-after")))
        return SliceFailed(f"status {status}: {said}")


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait (a number or a date); None where it asks nothing sensible."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None


def read_reply(body: str) -> Answer:
    """The text and the tokens of a chat completion; the text may be empty.

    Raises:
        _Again: the body is no chat completion.
    """
    try:
        content = json.loads(body)
        text = content["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Again(f"no chat completion ({type(error).__name__}): {printable(body[:80])}") from error
    if not isinstance(text, str):
        raise _Again(f"no text but a {type(text).__name__}")
    usage = content.get("usage")
    return Answer(text.strip(), 1, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else 0


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        remedy = 'Install it: pip install "nnssl_plugin[openai]"'
        raise UserError(f"The captioner openai needs the package openai: {error}", remedy) from error
    return openai
