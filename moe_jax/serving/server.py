"""A server on a socket, until a signal ends it. uvicorn limits the connections and ends late ones."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import uvicorn

from moe_jax.serving.app import Server
from moe_jax.serving.engine import News, tell

ENGINE_SECONDS = 1.5
"""How long the step in progress may take until the streams end without it."""
CONNECTION_SECONDS = 1
"""How long clients may take to read the end of their streams."""
MAX_CONNECTIONS = 1000
IDLE_SECONDS = 10
"""A connection ends if its next request does not begin within this time after an answer."""


class WebServer(uvicorn.Server):
    """Serves until SIGTERM, Ctrl-C or `should_exit`. Then streams get a last event, and the engine stops."""

    def __init__(self, server: Server, ready: Callable[[], None]) -> None:
        """`ready` is called once requests are answered."""
        limits = {"limit_concurrency": MAX_CONNECTIONS, "timeout_keep_alive": IDLE_SECONDS}
        limits |= {"timeout_graceful_shutdown": CONNECTION_SECONDS}
        quiet = {"log_config": None, "log_level": "error", "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(server.app, http="h11", ws="none", lifespan="off", **limits, **quiet))
        self.server, self.engine, self._ready = server, server.engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()

        def deliver(news: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, news)

        self.engine.start(deliver)
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server.stopping = True
        await asyncio.to_thread(self.engine.stop, ENGINE_SECONDS)
        await super().shutdown(sockets)


def serve(web: WebServer, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then wait for the engine's last step, which Python's end must not interrupt."""
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends itself the signal again at its end
        signal.signal(number, lambda *_: None)
    asyncio.run(web.serve([sock]))
    web.engine.stop()
