"""Answers on the wire: one JSON object, or server-sent events. A client that has gone, or that no longer reads, frees
its slots."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from moe_jax.serving import limits
from moe_jax.serving.answers import Answer
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.limits import ApiError
from moe_jax.serving.texts import Event
from moe_jax.system.files import json_text

_LOST = {"stopped": (503, "the server is stopping", "stopping"), "failed": (500, "the program failed", "failed")}


class AnswerResponse:
    """Gives an answer to the engine, and its events to the client. An ASGI application."""

    def __init__(self, answer: Answer, engine: Engine) -> None:
        """Raises ApiError if no more texts can wait. For the event loop's thread, to which the engine's events must be
        delivered."""
        self._answer, self._engine = answer, engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        put: Callable[[int, Event], None] = lambda index, event: self._events.put_nowait((index, event))  # noqa: E731
        try:
            engine.submit(answer.requests, [partial(put, index) for index in range(len(answer.requests))])
        except QueueFull:
            problem = f"{len(answer.requests)} more texts cannot wait; at most {engine.queue} may; try again later"
            raise ApiError(429, problem, code="queue_full") from None
        except Stopping:
            raise ApiError(503, "the server is stopping", code="stopping") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        writing = asyncio.ensure_future((self._stream if self._answer.stream else self._whole)(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
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

    async def _whole(self, send: Send) -> None:
        events: list[list[Event]] = [[] for _ in self._answer.requests]
        left = len(events)
        try:
            while left:
                index, event = await self._events.get()
                _check(event)
                events[index].append(event)
                left -= event.finish is not None
        except ApiError as error:
            await send_json(send, error.body(), error.status)
        else:
            await send_json(send, self._answer.result(events))

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        left = len(self._answer.requests)
        try:
            while left:
                found = [await self._events.get()]
                while not self._events.empty():
                    found.append(self._events.get_nowait())
                left -= sum(event.finish is not None for _, event in found)
                data = b"".join(_sse(self._answer.chunk(*news)) for news in found if news[1].finish not in _LOST)
                if data:
                    await _send_in_time(send, data)
                for news in found:
                    _check(news[1])
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
    await asyncio.wait_for(
        send({"type": "http.response.body", "body": data, "more_body": True}), limits.STALLED_SECONDS
    )


def _sse(value: Any) -> bytes:
    return b"data: " + json_text(value).encode() + b"\n\n"


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    """Answer with a JSON object."""
    body = json_text(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError if it is too large or does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limits.MAX_BODY_BYTES:
                    problem = f"the body has more than {limits.MAX_BODY_BYTES:,} bytes, the most that is allowed"
                    raise ApiError(413, problem, code="body_too_large")
    except TimeoutError:
        problem = f"the body did not arrive within {limits.BODY_SECONDS:g} seconds"
        raise ApiError(408, problem, code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(400, "the body is not complete") from None
    return bytes(body)
