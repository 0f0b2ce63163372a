"""What a server may send: an answer of limited length, and none that unpacks to more than was sent."""

import importlib
from collections.abc import AsyncIterator
from typing import Any

MOST_BYTES = 4 << 20
"""Of an answer; a text of 100 words and its envelope have a thousand."""
HEADERS = {"Accept-Encoding": "identity"}
"""Of every request: the answer shall not be compressed."""


async def limit_answer(response: Any) -> None:
    """A hook for the responses of the client library: reading more than :data:`MOST_BYTES` fails, and so does a
    compressed answer.

    Args:
        response: of ``httpx``, or of the package that the client library has in its place.

    Raises:
        RemoteProtocolError: of that package; the client takes it for a broken connection.
    """
    package = importlib.import_module(type(response).__module__.partition(".")[0])
    if response.headers.get("content-encoding", "identity") != "identity":
        raise package.RemoteProtocolError("a compressed answer, which was not asked for")
    response.stream = _limited(response.stream, package)


def _limited(stream: Any, package: Any) -> Any:
    class Limited(package.AsyncByteStream):  # which the response insists on
        async def __aiter__(self) -> AsyncIterator[bytes]:
            received = 0
            async for part in stream:
                received += len(part)
                if received > MOST_BYTES:
                    raise package.RemoteProtocolError(f"an answer of more than {MOST_BYTES} bytes")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Limited()
