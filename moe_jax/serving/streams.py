"""Answers on the wire: one JSON object, or server-sent events. A client that has gone, or that no longer reads, frees
its slots."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moe_jax.serving.answers import Answer
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.requests import MAX_BODY_BYTES, ApiError
from moe_jax.serving.texts import Event
from moe_jax.system.files import json_text

BODY_SECONDS = 10.0
"""A body must have arrived within this time."""
STALLED_SECONDS = 1.0
"""A client that takes nothing for so long, with all buffers full, loses its stream."""
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
        work = self._stream(send) if self._answer.stream else self._whole(scope, receive, send)
        writing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except TimeoutError:
            pass  # the client takes nothing; returning closes the connection
        finally:
            self._engine.cancel(self._answer.requests)
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: list[list[Event]] = [[] for _ in self._answer.requests]
        left = len(events)
        try:
            while left:
                index, event = await self._events.get()
                _check(event)
                events[index].append(event)
                left -= event.finish is not None
            response = json_response(self._answer.result(events))
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        left = len(self._answer.requests)
        try:
            while left:
                news = [await self._events.get()]
                while not self._events.empty():
                    news.append(self._events.get_nowait())
                left -= sum(event.finish is not None for _, event in news)
                data = b"".join(_sse(self._answer.chunk(*one)) for one in news if one[1].finish not in _LOST)
                if data:
                    await _send_in_time(send, data)
                for _, event in news:
                    _check(event)
            last = self._answer.last_chunk()
            tail = b"" if last is None else _sse(last)
        except ApiError as error:
            tail = _sse(error.body())
        await _send_in_time(send, tail + b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})


def _check(event: Event) -> None:
    """Raises ApiError for a text that does not end by itself."""
    if event.finish in _LOST:
        status, message, code = _LOST[event.finish]
        raise ApiError(status, message, code=code)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone, or has closed its side of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_in_time(send: Send, data: bytes) -> None:
    """Raises TimeoutError if the client takes nothing for a while."""
    await asyncio.wait_for(send({"type": "http.response.body", "body": data, "more_body": True}), STALLED_SECONDS)


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
