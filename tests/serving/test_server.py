"""The server's process and its edges: signals, an engine that takes nothing, how answers end."""

import asyncio
import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")
pytest.importorskip("pydantic", reason="needs the extra `serve`")

from starlette.datastructures import Headers

from moe_jax.serving import app, streams
from moe_jax.serving.completions import Completion
from moe_jax.serving.engine import QueueFull, Stopping
from moe_jax.serving.requests import ApiError, ModelCard
from moe_jax.serving.texts import Event, TextRequest
from tests.serving import made
from tests.serving.site import site

CARD = ModelCard(made.run(), "tiny", made.SLOTS, Path("absent"))


@pytest.mark.parametrize("size", [10, app.LARGE_BODY + 1])
def test_requests_that_are_never_read_hold_up_no_other(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pool would have threads: other requests are answered, and the server ends although they wait."""
    begun, never = threading.Semaphore(0), threading.Event()

    def stuck(body: bytes, card: ModelCard) -> None:
        begun.release()
        never.wait(60)

    monkeypatch.setattr(app, "ChatCompletion", stuck)
    with site(tmp_path) as served:
        chats = [served.open("/v1/chat/completions", prompt="a" * size) for _ in range(40)]
        assert begun.acquire(timeout=30)
        assert served.complete(prompt="the", max_tokens=3).status == 200
    assert not never.is_set()
    never.set()
    for sock in chats:
        sock.close()


def test_a_request_that_takes_too_long_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(app, "READING_SECONDS", 0.2)
    monkeypatch.setattr(app, "Completion", lambda body, card: never.wait(60))
    with site(tmp_path) as served:
        answer = served.complete(prompt="the")
    never.set()
    assert (answer.status, answer.json["error"]["code"]) == (503, "too_slow")


def test_a_server_of_a_public_address_answers_to_any_name_with_its_key() -> None:
    host, key = Headers({"host": "my.example"}), Headers({"host": "my.example", "authorization": "Bearer key"})
    policy = app.AccessPolicy("0.0.0.0", "key")
    policy.check("GET", "/v1/models", key)
    policy.check("OPTIONS", "/v1/models", host)
    policy.check("GET", "/health", host)
    with pytest.raises(ApiError) as refused:
        policy.check("GET", "/v1/models", host)
    assert (refused.value.status, refused.value.code) == (401, "api_key")


def test_a_failure_of_the_program_is_answered_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "Completion", lambda *_: 1 / 0)
    with site(tmp_path) as running:
        answer = running.complete(prompt="a")
        assert (answer.status, answer.json["error"]["code"]) == (500, "failed")
    assert "ZeroDivisionError" in caplog.text


def engine_that(submit: Any) -> Any:
    return SimpleNamespace(submit=submit, cancel=lambda requests: None, queue=7)


@pytest.mark.parametrize(("error", "status", "code"), [(QueueFull, 429, "queue_full"), (Stopping, 503, "stopping")])
def test_an_engine_that_takes_no_text(error: type[Exception], status: int, code: str) -> None:
    def submit(*_: Any) -> None:
        raise error

    with pytest.raises(ApiError) as refused:
        streams.GenerationResponse(Completion(b'{"prompt": "One", "n": 3}', CARD), engine_that(submit))
    assert (refused.value.status, refused.value.code) == (status, code)
    assert status == 503 or str(refused.value).startswith("3 more texts cannot wait; at most 7 may")


@pytest.mark.parametrize(
    ("finish", "status", "code"), [("failed", 500, "failed"), ("stopped", 503, "stopping"), ("stop", 200, None)]
)
def test_the_status_of_an_answer_is_known_when_its_texts_have_ended(finish: Any, status: int, code: str | None) -> None:
    def submit(requests: list[TextRequest]) -> None:
        requests[0].listener(Event([], "length"))
        requests[1].listener(Event([], finish))

    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def whole() -> None:
        answer = Completion(b'{"prompt": "One", "n": 2}', CARD)
        await streams.GenerationResponse(answer, engine_that(submit))({"type": "http"}, receive, send)

    asyncio.run(whole())
    body = b"".join(message["body"] for message in sent[1:])
    assert sent[0]["status"] == status
    assert (b"content-length", b"%d" % len(body)) in sent[0]["headers"]
    assert json.loads(body).get("error", {}).get("code") == code


def test_experts_cannot_be_asked_of_a_model_without_them() -> None:
    config = made.run().config
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, dense="active"))
    card = dataclasses.replace(CARD, run=dataclasses.replace(made.run(), config=dense))
    assert Completion(b'{"prompt": "One"}', card).texts
    with pytest.raises(ApiError, match="routed_experts: this model has no router") as refused:
        Completion(b'{"prompt": "One", "routed_experts": true}', card)
    assert (refused.value.status, refused.value.param) == (400, "routed_experts")
