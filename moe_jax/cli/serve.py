"""`moe-jax serve`."""

import asyncio
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from moe_jax.cli.command import ModelCommand, check_range
from moe_jax.config import ConfigError, UserError
from moe_jax.system import environment
from moe_jax.system.terminal import say


@dataclass(frozen=True, kw_only=True)
class Serve(ModelCommand):
    """Serve a trained model: OpenAI's API for programs, and a page that shows which experts write each token.

    Several texts are written at once, one in each slot; others wait. The same request with the same seed gives the same
    text, whatever else is being written. Ctrl-C or SIGTERM ends the server.
    """

    host: str = "127.0.0.1"
    """Address to listen on. To accept other machines, use another address and --api-key."""
    port: int = 8000
    """Port to listen on. 0 takes a free one."""
    slots: int = 4
    """Texts that are written at once. More slots are faster for many texts, and slower for one."""
    api_key: str = ""
    """Key that requests must send. None unless given."""
    allow_origin: list[str] = field(default_factory=list)
    """Another site whose pages may send requests, such as https://example.org."""

    def check(self) -> None:
        """Raise ConfigError if a value is out of range."""
        super().check()
        check_range("--port", self.port, 0, 65535)
        check_range("--slots", self.slots, 1, 256)
        if not self.api_key.isascii() or " " in self.api_key:
            raise ConfigError("--api-key: must be ASCII characters without a space, since it is sent in a header")
        from moe_jax.serving.sockets import is_loopback

        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(f"--host {self.host}: other machines can reach it; give an --api-key, too")
        for origin in self.allow_origin:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
                raise ConfigError(f"--allow-origin {origin}: must be like https://example.org, without a path")

    def execute(self) -> int:
        self.check()
        if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn", "pydantic")):
            raise UserError(
                "serve needs starlette, uvicorn and pydantic: `uv run --extra serve python -m moe_jax serve ...`"
            )
        from moe_jax.serving.sockets import bind, url

        sock = bind(self.host, self.port)
        say(f"loading {self.name}, {self.slots} slots; the server will be at {url(sock)}")
        environment.prepare_environment()
        from moe_jax.inference.decode import Decoder, cast_once
        from moe_jax.runs.load import open_run
        from moe_jax.serving.app import AccessPolicy, Server
        from moe_jax.serving.engine import Engine
        from moe_jax.serving.requests import MAX_QUEUE, ModelCard
        from moe_jax.serving.server import WebServer, delivered_to, serve

        run, loop = open_run(self.run, self.step), asyncio.new_event_loop()
        card = ModelCard(run, Path(self.run).resolve().name, self.slots, Path(self.run))
        shape = run.config.model.seq_len, run.tokenizer.vocab_size, self.slots
        decoder = Decoder(run.writer, *shape, short_prompts=True)
        params = cast_once(run.writer, run.params)
        engine = Engine(decoder, params, run.tokenizer, queue=MAX_QUEUE, deliver=delivered_to(loop))
        engine.compile()
        server = Server(engine, card, AccessPolicy(self.host, self.api_key, self.allow_origin))
        web = WebServer(server, ready=lambda: say(f"ready: {url(sock)} (Ctrl-C ends it)"))
        serve(web, loop, sock)
        say("stopped")
        return 0
