"""Answers on the wire: one JSON object, or server-sent events. A client that has gone, or that no longer reads, frees
its slots."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from moe_jax.serving.answers import Answer
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.requests import MAX_BODY_BYTES, ApiError
from moe_jax.serving.texts import Event
from moe_jax.system.files import json_text

BODY_SECONDS = 10.0
"""A body must have arrived within this time."""
PART_BYTES = 1 << 14
"""Of an answer, given to a connection at once: with more, a client that reads slowly would seem not to read."""
TOKENS_AT_ONCE = 64
"""The JSON of more tokens is built on another thread, so that other clients get their turn."""
_LOST = {"stopped": (503, "the server is stopping", "stopping"), "failed": (500, "the program failed", "failed")}


def json_response(value: Any, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == 429 else None
    return Response(json_text(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status)


class AnswerResponse:
    """Gives an answer to the engine, and its events to the client. An ASGI application."""

    def __init__(self, answer: Answer, engine: Engine) -> None:
        """Raises ApiError if no more texts can wait. For the event loop's thread, to which the engine's events must be
        delivered."""
        self._answer, self._engine = answer, engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        put = self._events.put_nowait
        try:
            engine.submit(answer.requests, [lambda e, n=n: put((n, e)) for n in range(len(answer.requests))])
        except QueueFull:
            problem = f"{len(answer.requests)} more texts cannot wait; at most {engine.queue} may; try again later"
            raise ApiError(429, problem, code="queue_full") from None
        except Stopping:
            raise ApiError(503, "the server is stopping", code="stopping") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._stream(send) if self._answer.stream else self._whole(send)
        writing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._engine.cancel(self._answer.requests)
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _whole(self, send: Send) -> None:
        try:
            async for _ in self._built():
                pass
            status, data = 200, await asyncio.to_thread(self._answer.whole)
        except ApiError as error:
            status, data = error.status, json_text(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for begin in range(0, len(data), PART_BYTES):
            await send(_part(data[begin : begin + PART_BYTES]))
            await asyncio.sleep(0)  # a client that reads fast leaves no other turn to the others
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for data in self._built():
                if data:
                    await send(_part(data))
            last = self._answer.last_chunk()
            tail = b"" if last is None else _sse(last)
        except ApiError as error:
            tail = _sse(error.body())
        await send(_part(tail + b"data: [DONE]\n\n"))
        await send({"type": "http.response.body", "body": b""})

    async def _built(self) -> AsyncIterator[bytes]:
        """What the events of the texts become, until all texts have ended: bytes of a stream, or nothing yet. Raises
        ApiError for a text that does not end by itself."""
        left = len(self._answer.requests)
        while left:
            news = [await self._events.get()]
            while not self._events.empty():
                news.append(self._events.get_nowait())
            left -= sum(event.finish is not None for _, event in news)
            tokens = sum(len(event.prompt) + len(event.pieces) for _, event in news)
            build = partial(self._build, [one for one in news if one[1].finish not in _LOST])
            yield await asyncio.to_thread(build) if tokens > TOKENS_AT_ONCE else build()
            for _, event in news:
                _check(event)

    def _build(self, news: list[tuple[int, Event]]) -> bytes:
        if self._answer.stream:
            return b"".join(_sse(self._answer.chunk(*one)) for one in news)
        for one in news:
            self._answer.keep(*one)
        return b""


def _check(event: Event) -> None:
    """Raises ApiError for a text that does not end by itself."""
    if event.finish in _LOST:
        status, message, code = _LOST[event.finish]
        raise ApiError(status, message, code=code)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone, or has closed its side of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _sse(value: Any) -> bytes:
    return b"data: " + json_text(value).encode() + b"\n\n"


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError if it is too large or does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    problem = f"the body has more than {MAX_BODY_BYTES:,} bytes, the most that is allowed"
                    raise ApiError(413, problem, code="body_too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds", code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(400, "the body is not complete") from None
    return bytes(body)
