"""Clients that go, that close their side, or that no longer read free their slots at once. And the server's end."""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("pydantic", reason="needs the extra `serve`")

from moe_jax.config import UserError
from moe_jax.serving import server, sockets, streams
from moe_jax.serving.sockets import bind
from tests.serving import made
from tests.serving.site import Site, site
from tests.serving.test_engine import until
from tests.support.commands import refused

ENDLESS = {"prompt": made.PROMPT, "temperature": 0, "max_tokens": 4000}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("run")) as running:
        yield running


def reset(sock: socket.socket) -> None:
    """Close without a farewell: the other side gets RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset, lambda sock: sock.shutdown(socket.SHUT_WR)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(api: Site, leave, stream: bool) -> None:
    sockets = [api.open(**ENDLESS, stream=stream) for _ in range(made.SLOTS + 1)]
    until(lambda: (api.engine.busy, api.engine.queued) == (made.SLOTS, 1))
    if stream:
        assert sockets[0].recv(12) == b"HTTP/1.1 200"
    before = api.engine.cancelled
    for sock in sockets:
        leave(sock)
    # All of them, so none was written to its end. While the last one goes from the queue to a slot, it is in neither.
    gone = (before + made.SLOTS + 1, 0, 0)
    until(lambda: (api.engine.cancelled, api.engine.busy, api.engine.queued) == gone)
    for sock in sockets:
        sock.close()


def test_a_client_that_does_not_read_keeps_no_slot_beyond_its_texts(api: Site) -> None:
    """Its buffers are small, and each event has many alternatives."""
    fields = {**ENDLESS, "n": 3, "logprobs": 5, "routed_experts": True, "stream": True, "max_tokens": 300}
    with api.open(**fields):
        until(lambda: api.engine.busy == made.SLOTS)
        until(lambda: api.engine.busy == 0, 60)
        assert api.complete(prompt="One", max_tokens=2).status == 200


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a setting of Linux")
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_reads_is_dropped(tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its memory with it. A client that reads again finds its connection ended."""
    monkeypatch.setattr(sockets, "UNREAD_SECONDS", 1)
    fields = {**ENDLESS, "n": 3, "logprobs": 5, "routed_experts": True, "stream": stream, "max_tokens": 300}
    with site(tmp_path) as api, api.open(**fields) as sock:
        until(lambda: api.engine.busy == made.SLOTS)
        until(lambda: api.engine.busy == 0, 60)
        until(lambda: api.connections == 0, 30)
        with contextlib.suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert b"usage" not in answer
            assert b"[DONE]" not in answer
        assert api.complete(prompt="One", max_tokens=2).status == 200


def test_more_connections_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is being written goes on."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    with site(tmp_path) as api, contextlib.ExitStack() as sockets:
        text = sockets.enter_context(api.open(**ENDLESS, stream=True))
        until(lambda: b"data: " in text.recv(1 << 12))
        for _ in range(7):
            sockets.enter_context(api.connect())
        assert api.ask("/health").status == 503
        until(lambda: b"data: " in text.recv(1 << 12))


def test_a_body_that_does_not_arrive_takes_no_slot(api: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert sock.recv(12) == b"HTTP/1.1 408"
        assert api.engine.busy == 0


def test_stopping_ends_streams_with_a_last_event(tmp_path) -> None:
    with site(tmp_path) as api:
        streams = [api.open(**ENDLESS, stream=True), api.open(**ENDLESS, stream=False)]
        until(lambda: api.engine.busy == 2)
        stalled = api.open(**ENDLESS, stream=True)  # never reads
        until(lambda: api.engine.busy == 3)
        begin = time.monotonic()
        api.stop()
        told = [b"".join(iter(lambda s=s: s.recv(1 << 16), b"")).decode() for s in streams]
        until(lambda: not api.engine.running)
        assert time.monotonic() - begin < server.CONNECTION_SECONDS + server.ENGINE_SECONDS + 5
        lines = [line for line in told[0].replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "stopping"
        assert told[1].startswith("HTTP/1.1 503")
        stalled.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "ä..b"])
def test_a_port_that_cannot_be_had_is_said_in_one_line(host: str) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--host {host} --port {port}: .*; give another"):
            bind(host, port)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--api-key", "ä"], "--api-key: must be ASCII"),
        (["--api-key", "a b"], "--api-key: must be ASCII"),
        (["--allow-origin", "https://a/b"], "--allow-origin https://a/b: must be like"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines can reach it; give an --api-key, too"),
    ],
)
def test_settings_that_are_unsafe_are_refused(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe_jax.cli.serve.checked_run", lambda *_: Path("run"))
    assert said in refused(["serve", *flags], capsys)
