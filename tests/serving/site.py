"""A server on the loopback interface, in a thread of the test's process, and a client of the standard library."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.serving.app import AccessPolicy, Server
from moe_jax.serving.engine import Engine
from moe_jax.serving.requests import ModelCard
from moe_jax.serving.server import WebServer
from moe_jax.serving.sockets import bind
from tests.serving import made

KEY = "a-key"


@dataclass
class Answer:
    """What a request was answered with."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream. Its last line is [DONE]."""
        lines = [line for line in self.text.split("\n") if line]
        assert lines[-1] == "data: [DONE]", lines[-1:]
        assert all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def problem(self) -> str:
        return self.json["error"]["message"]


@dataclass
class Site:
    """A running server."""

    engine: Engine
    port: int
    stop: Any
    web: WebServer

    @property
    def connections(self) -> int:
        return len(self.web.server_state.connections)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> Answer:
        """GET, or POST with a body: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())
        connection.close()
        return found

    def complete(self, **fields: Any) -> Answer:
        return self.ask("/v1/completions", fields)

    def connect(self) -> socket.socket:
        """A socket with a small buffer."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def open(self, path: str = "/v1/completions", **fields: Any) -> socket.socket:
        """A socket that has asked, and has read nothing yet."""
        sock = self.connect()
        body = json.dumps(fields).encode()
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body
        )
        return sock


@contextmanager
def site(folder: Path, tuned: bool = False, origins: Sequence[str] = (), key: str = "") -> Iterator[Site]:
    """A server until the end of the block."""
    sock, ready = bind("127.0.0.1", 0), threading.Event()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # a client that does not read is soon noticed
    engine = Engine(made.decoder(), made.run().params, made.run().tokenizer, queue=made.QUEUE)
    card = ModelCard(made.run(tuned), "tiny", made.SLOTS, folder)
    web = WebServer(Server(engine, card, AccessPolicy("127.0.0.1", key, origins)), ready.set)

    def end() -> None:
        web.should_exit = True

    thread = threading.Thread(target=lambda: asyncio.run(web.serve([sock])))
    thread.start()
    assert ready.wait(30)
    try:
        yield Site(engine, sock.getsockname()[1], end, web)
    finally:
        end()
        thread.join(30)
        assert not thread.is_alive()
