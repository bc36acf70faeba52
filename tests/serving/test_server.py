"""The server's process and its edges: signals, what is no request, an engine that takes nothing, how answers end."""

import asyncio
import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from starlette.requests import ClientDisconnect

from moe_jax.serving import app, server, streams
from moe_jax.serving.answers import Completion
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.requests import ApiError, ModelCard
from moe_jax.serving.sockets import bind
from moe_jax.serving.texts import Event, Listener
from tests.serving import made

CARD = ModelCard(made.run(), "tiny", made.SLOTS, Path("absent"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("in_a_step", [False, True])
def test_a_signal_ends_the_server(number: int, in_a_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handlers from before come back. If the engine is in the middle of a step, the process ends at once."""
    ended: list[int] = []
    monkeypatch.setattr(server.os, "_exit", ended.append)
    before = [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]
    loop = asyncio.new_event_loop()
    engine = Engine(made.decoder(), made.run().params, made.run().tokenizer, queue=1, deliver=server.delivered_to(loop))
    running = app.Server(engine, CARD, app.Rules("127.0.0.1"))
    if in_a_step:
        monkeypatch.setattr(engine, "stop", lambda timeout: None)
    try:
        server.serve(running, loop, bind("127.0.0.1", 0), lambda: os.kill(os.getpid(), number))
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_IGN] * 2
    finally:
        for n, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(n, handler)
    assert (running.stopping, engine.running, ended) == (True, in_a_step, [0] if in_a_step else [])
    if in_a_step:
        Engine.stop(engine)


def test_news_for_a_loop_that_has_ended_are_lost() -> None:
    loop = asyncio.new_event_loop()
    heard: list[Event] = []
    deliver = server.delivered_to(loop)
    deliver([(heard.append, Event([])), (heard.append, Event([], "stop"))])
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert [event.finish for event in heard] == [None, "stop"]
    loop.close()
    deliver([(heard.append, Event([]))])
    assert len(heard) == 2


async def nothing(*_: Any) -> Any:
    raise AssertionError("called")


def test_what_is_no_request_is_left_alone() -> None:
    asyncio.run(app.Access(nothing, app.Rules("127.0.0.1"))({"type": "websocket"}, nothing, nothing))


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_after_the_first_byte_ends_the_connection(begun: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it, the client gets an answer."""
    sent: list[Any] = []

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    access = app.Access(fails, app.Rules("127.0.0.1"))
    if begun:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(access(scope, nothing, send))
    else:
        asyncio.run(access(scope, nothing, send))
        assert json.loads(sent[1]["body"])["error"]["code"] == "failed"
    assert sent[0]["status"] == (200 if begun else 500)
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost:80", "localhost"), ("[::1]:80", "::1"), ("EXAMPLE.org", "example.org"), ("", ""), ("[::1", "")],
)
def test_the_name_of_a_host_header(header: str, name: str) -> None:
    assert app._name(header) == name


def test_a_server_of_a_public_address_answers_to_any_name_with_its_key() -> None:
    rules = app.Rules("0.0.0.0", "key")
    rules.check("GET", "/v1/models", {"host": "my.example", "authorization": "Bearer key"})
    rules.check("OPTIONS", "/v1/models", {"host": "my.example"})
    rules.check("GET", "/health", {"host": "my.example"})
    with pytest.raises(ApiError) as refused:
        rules.check("GET", "/v1/models", {"host": "my.example"})
    assert (refused.value.status, refused.value.code) == (401, "api_key")
    own = app.Rules("192.0.2.1")
    own.check("GET", "/", {"host": "192.0.2.1:80"})
    own.check("GET", "/", {"host": "other"})


def engine_that(submit: Any) -> Any:
    return SimpleNamespace(submit=submit, cancel=lambda requests: None, queue=7)


@pytest.mark.parametrize(("error", "status", "code"), [(QueueFull, 429, "queue_full"), (Stopping, 503, "stopping")])
def test_an_engine_that_takes_no_text(error: type[Exception], status: int, code: str) -> None:
    def submit(*_: Any) -> None:
        raise error

    with pytest.raises(ApiError) as refused:
        streams.AnswerResponse(Completion(b'{"prompt": "One", "n": 3}', CARD), engine_that(submit))
    assert (refused.value.status, refused.value.code) == (status, code)
    assert status == 503 or str(refused.value).startswith("3 more texts cannot wait; at most 7 may")


@pytest.mark.parametrize(
    ("finish", "status", "code"), [("failed", 500, "failed"), ("stopped", 503, "stopping"), ("stop", 200, None)]
)
def test_the_status_of_an_answer_is_known_when_its_texts_have_ended(finish: Any, status: int, code: str | None) -> None:
    def submit(requests: Any, listeners: list[Listener]) -> None:
        listeners[0](Event([], "length"))
        listeners[1](Event([], finish))

    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def whole() -> None:
        answer = Completion(b'{"prompt": "One", "n": 2}', CARD)
        await streams.AnswerResponse(answer, engine_that(submit))({}, receive, send)

    asyncio.run(whole())
    body = b"".join(message["body"] for message in sent[1:])
    assert sent[0]["status"] == status
    assert (b"content-length", b"%d" % len(body)) in sent[0]["headers"]
    assert json.loads(body).get("error", {}).get("code") == code
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]


def test_a_client_that_goes_before_its_body_has_arrived() -> None:
    async def stream() -> Any:
        yield b"{"
        raise ClientDisconnect

    request: Any = SimpleNamespace(stream=stream)
    with pytest.raises(ApiError, match="the body is not complete") as refused:
        asyncio.run(streams.read_body(request))
    assert refused.value.status == 400


def test_experts_cannot_be_asked_of_a_model_without_them() -> None:
    config = made.run().config
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, dense="active"))
    card = dataclasses.replace(CARD, run=dataclasses.replace(made.run(), config=dense))
    assert Completion(b'{"prompt": "One"}', card).requests
    with pytest.raises(ApiError, match="routed_experts: this model has no router") as refused:
        Completion(b'{"prompt": "One", "routed_experts": true}', card)
    assert (refused.value.status, refused.value.param) == (400, "routed_experts")
