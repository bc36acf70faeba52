"""A server on a socket, until a signal ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_jax.serving.app import Server
from moe_jax.serving.engine import Deliver
from moe_jax.serving.texts import Event, Listener

ENGINE_SECONDS = 2.0
"""How long a step may take until the server ends without it."""
CONNECTION_SECONDS = 2
"""How long clients may take to read the end of their streams."""
MAX_CONNECTIONS = 1000
REQUEST_SECONDS = 10.0
"""A connection ends if the headers of its first request, or of the next one after an answer, take longer."""
STALLED_SECONDS = 5.0
"""A connection ends if its client takes nothing for so long, with all buffers full."""


class _Connection(H11Protocol):
    """A connection that ends if its client takes too long, or waits for it when there are too many. So clients that
    send nothing, or half a header, or do not read keep nobody out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(self.connections) + 1 >= MAX_CONNECTIONS:
            waiting = [one for one in self.connections if isinstance(one, _Connection) and one.waits]
            if waiting:
                min(waiting, key=lambda one: one.since).end()
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._expect_request()
        super().on_response_complete()  # may begin the next request

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.end)

    def resume_writing(self) -> None:
        self._stalled.cancel()
        super().resume_writing()

    @property
    def waits(self) -> bool:
        """Whether the client has to send a request, or the rest of one."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def end(self) -> None:
        self.connections.discard(self)
        self.transport.abort()

    def _expect_request(self) -> None:
        answered, self.since = self.cycle, self.loop.time()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, lambda: self.cycle is answered and self.end())


def delivered_to(loop: asyncio.AbstractEventLoop) -> Deliver:
    """Calls the listeners of the engine's events on the thread of an event loop."""

    def tell(news: Sequence[tuple[Listener, Event]]) -> None:
        for listener, event in news:
            listener(event)

    def deliver(news: Sequence[tuple[Listener, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, news)

    return deliver


def serve(server: Server, loop: asyncio.AbstractEventLoop, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve in this loop until SIGTERM or Ctrl-C. `ready` is called once requests are answered."""
    stop = asyncio.Event()

    def handle(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve_until(stop, server, sock, ready))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.engine.running:  # the device is in the middle of a step, which Python's shutdown must not interrupt
        sys.stdout.flush()
        os._exit(0)


async def serve_until(stop: asyncio.Event, server: Server, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until `stop` is set. Then streams get a last event, and the engine stops."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a client that has gone is no error
    config = uvicorn.Config(
        server.app,
        http=_Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=CONNECTION_SECONDS,
    )
    web = uvicorn.Server(config)
    # uvicorn's own handlers would end the process with the signal's status.
    web.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    server.engine.start()
    serving, stopping = asyncio.ensure_future(web.serve(sockets=[sock])), asyncio.ensure_future(stop.wait())
    ready()
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.stopping = True
    await asyncio.to_thread(server.engine.stop, ENGINE_SECONDS)
    web.should_exit = True
    await serving
