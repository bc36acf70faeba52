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
from moe_jax.serving.engine import Deliver
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
    server.engine.start()
    serving, stopping = asyncio.ensure_future(web.serve(sockets=[sock])), asyncio.ensure_future(stop.wait())
    ready()
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.stopping = True
    await asyncio.to_thread(server.engine.stop, ENGINE_SECONDS)
    web.should_exit = True
    await serving
