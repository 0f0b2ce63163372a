"""A server with the OpenAI interface on loopback, that answers, or misbehaves on purpose."""

import base64
import gzip
import hashlib
import io
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class VisionServer(ThreadingHTTPServer):
    """Describes a picture by its hash, after ``delay`` seconds.

    ``misbehaviour`` is a function (number of the request, number of this picture's request) → what goes wrong, a key of
    :data:`MISBEHAVIOURS`, or None. ``answered`` counts the answers of each picture that were sent to the end.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, delay=0.0, misbehaviour=lambda total, of_picture: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.misbehaviour = delay, misbehaviour
        self.asked, self.answered, self.bodies, self.times = Counter(), Counter(), [], []
        self.headers_seen = []
        self.working = self.most_working = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that go away are part of the game."""


@contextmanager
def running(**how):
    """A server for the time of a ``with`` block."""
    server = VisionServer(**how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def text_of(image: bytes) -> str:
    """What the server says of a picture."""
    return f"This image is picture {hashlib.sha256(image).hexdigest()[:12]}."


def completion(text):
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][0]["content"][1]["image_url"]["url"]
        image = base64.b64decode(url.partition("base64,")[2])
        Image.open(io.BytesIO(image)).verify()
        server = self.server
        with server.lock:
            server.asked[image] += 1
            server.bodies.append(body)
            server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.working += 1
            server.most_working = max(server.most_working, server.working)
            wrong = server.misbehaviour(server.asked.total(), server.asked[image])
        try:
            time.sleep(server.delay)
            if wrong is None:
                self.reply(200, completion(text_of(image)))
                with server.lock:
                    server.answered[image] += 1
            else:
                MISBEHAVIOURS[wrong](self)
        finally:
            with server.lock:
                server.working -= 1

    def reply(self, status, content, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        """Nothing is printed."""


def error(message, code=None):
    return {"error": {"message": message, "type": "x", "code": code}}


def _cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def _drip(handler):
    """A byte now and then: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def _endless(handler, status):
    """Bytes until the connection ends, of a stated length that nobody has room for."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    handler.close_connection = True
    with suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 16))


MISBEHAVIOURS = {
    "busy": lambda handler: handler.reply(429, error("slow down"), Retry_After="0.3"),
    "busy, says not how long": lambda handler: handler.reply(429, error("slow down")),
    "broken": lambda handler: handler.reply(500, error("something broke")),
    "overloaded": lambda handler: handler.reply(503, b"<html>no</html>", Content_Type="text/html"),
    "silent": lambda handler: time.sleep(3),
    "drip": _drip,
    "cut": _cut,
    "cut at once": lambda handler: handler.connection.close(),
    "no JSON": lambda handler: handler.reply(200, b'{"choices": [{"mess'),
    "no UTF-8": lambda handler: handler.reply(200, b'{"choices": "\xff\xfe"}'),
    "other JSON": lambda handler: handler.reply(200, {"result": "fine"}),
    "a list": lambda handler: handler.reply(200, [1, 2]),
    "no choices": lambda handler: handler.reply(200, {**completion(""), "choices": []}),
    "null": lambda handler: handler.reply(200, completion(None)),
    "empty": lambda handler: handler.reply(200, completion("  \n")),
    "parts": lambda handler: handler.reply(200, completion([{"type": "text", "text": "x"}])),
    "refused picture": lambda handler: handler.reply(400, error("the picture is not liked")),
    "no key": lambda handler: handler.reply(401, error("who are you?")),
    "no model": lambda handler: handler.reply(404, error("there is no model m")),
    "no money": lambda handler: handler.reply(429, error("pay first", "insufficient_quota")),
    "tomorrow": lambda handler: handler.reply(429, error("tomorrow"), Retry_After="86400"),
    "endless": lambda handler: _endless(handler, 200),
    "endless error": lambda handler: _endless(handler, 500),
    "bomb": lambda handler: handler.reply(200, gzip.compress(bytes(1 << 24)), Content_Encoding="gzip"),
}
"""What a server may do instead of answering."""
PASSING = tuple(MISBEHAVIOURS)[:16]
"""Those after which another attempt helps."""
