"""A server on a socket, until a signal ends it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from moe_jax.serving.app import Server
from moe_jax.serving.texts import Event, Listener

ENGINE_SECONDS = 2.0
"""How long a step may take until the server ends without it."""
CONNECTION_SECONDS = 2
"""How long clients may take to read the end of their streams."""
MAX_CONNECTIONS = 1000


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own: they end the process with the signal's status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Loop:
    """Where the engine's events go: to the event loop, once it runs."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver to this loop from now on."""
        self._loop = loop

    def deliver(self, news: Sequence[tuple[Listener, Event]]) -> None:
        """Call the listeners on the event loop's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(_tell, news)


def _tell(news: Sequence[tuple[Listener, Event]]) -> None:
    for listener, event in news:
        listener(event)


def serve(server: Server, loop: Loop, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. `ready` is called once requests are answered."""

    async def run() -> None:
        stop, here = asyncio.Event(), asyncio.get_running_loop()

        def handle(number: int, frame: Any) -> None:
            here.call_soon_threadsafe(stop.set)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            await serve_until(stop, server, loop, sock, ready)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    asyncio.run(run())
    if server.engine.running:  # the device is in the middle of a step, which Python's shutdown must not interrupt
        sys.stdout.flush()
        os._exit(0)


async def serve_until(
    stop: asyncio.Event, server: Server, loop: Loop, sock: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until `stop` is set. Then streams get a last event, and the engine stops."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a client that has gone is no error
    config = uvicorn.Config(
        server.app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=CONNECTION_SECONDS,
    )
    web = _Uvicorn(config)
    loop.run_in(asyncio.get_running_loop())
    server.engine.start()
    serving, stopping = asyncio.ensure_future(web.serve(sockets=[sock])), asyncio.ensure_future(stop.wait())
    ready()
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.stopping = True
    await asyncio.to_thread(server.engine.stop, ENGINE_SECONDS)
    web.should_exit = True
    await serving
