"""Answers on the wire: one JSON object, or server-sent events. A client that has gone frees its slots."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_jax.serving.completions import Generation
from moe_jax.serving.engine import Engine, QueueFull, Stopping
from moe_jax.serving.requests import MAX_BODY_BYTES, ApiError
from moe_jax.serving.texts import Event
from moe_jax.system.files import json_text

BODY_SECONDS = 10.0
"""A body must have arrived within this time."""
NO_SNIFF = {"x-content-type-options": "nosniff"}
STREAM_HEADERS = NO_SNIFF | {"cache-control": "no-store"}
_LOST = {"stopped": (503, "the server is stopping", "stopping"), "failed": (500, "the program failed", "failed")}


def json_response(value: Any, status: int = 200) -> Response:
    headers = NO_SNIFF | ({"retry-after": "1"} if status == 429 else {})
    return Response(json_text(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status)


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


class GenerationResponse:
    """Gives the texts of a request to the engine, and their events to the client. An ASGI application."""

    def __init__(self, generation: Generation, engine: Engine) -> None:
        """Raises ApiError if no more texts can wait. For the event loop's thread, to which the engine's events must be
        delivered."""
        self._generation, self._engine = generation, engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        for index, text in enumerate(generation.texts):
            text.listener = lambda event, index=index: self._events.put_nowait((index, event))
        try:
            engine.submit(generation.texts)
        except QueueFull:
            problem = f"{len(generation.texts)} more texts cannot wait; at most {engine.queue} may; try again later"
            raise ApiError(429, problem, code="queue_full") from None
        except Stopping:
            raise ApiError(503, "the server is stopping", code="stopping") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._generation.stream:
            work = StreamingResponse(self._stream(), 200, STREAM_HEADERS, "text/event-stream").stream_response(send)
        else:
            work = self._whole(scope, receive, send)
        writing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._engine.cancel(self._generation.texts)
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Half a million tokens would take seconds to become JSON, for which the end of the server would wait. So each
        text becomes JSON when it ends, by itself."""
        parts: list[list[Event]] = [[] for _ in self._generation.texts]
        choices = [b""] * len(parts)
        try:
            async for index, event in self._news():
                parts[index].append(event)
                if event.finish is not None:
                    choices[index] = await asyncio.to_thread(
                        self._generation.whole_choice, index, _joined(parts[index])
                    )
                    parts[index] = []
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        body = self._generation.whole(choices)
        headers = NO_SNIFF | {"content-length": str(sum(map(len, body)))}
        await StreamingResponse(_each(body), 200, headers, "application/json").stream_response(send)

    async def _stream(self) -> AsyncIterator[str]:
        try:
            async for index, event in self._news():
                yield _sse(self._generation.chunk(index, event))
            if last := self._generation.last_chunk():
                yield _sse(last)
        except ApiError as error:
            yield _sse(error.body())
        yield "data: [DONE]\n\n"

    async def _news(self) -> AsyncIterator[tuple[int, Event]]:
        """The texts' events, until all texts have ended. Raises ApiError for a text that does not end by itself."""
        left = len(self._generation.texts)
        while left:
            index, event = await self._events.get()
            if event.finish in _LOST:
                status, message, code = _LOST[event.finish]
                raise ApiError(status, message, code=code)
            yield index, event
            left -= event.finish is not None


def _joined(events: list[Event]) -> Event:
    """All news of a text as one event."""
    pieces = [piece for event in events for piece in event.pieces]
    return Event(pieces, events[-1].finish, events[0].prompt)


async def _each(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone, or has closed its side of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(value: Any) -> str:
    return f"data: {json_text(value)}\n\n"
