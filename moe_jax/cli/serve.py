"""`moe-jax serve`."""

import importlib.util
from urllib.parse import urlsplit

import tyro

from moe_jax.cli.options import RunName, StepNumber, check_range, checked_run, note_device
from moe_jax.config import ConfigError, UserError
from moe_jax.runs.catalog import title
from moe_jax.system import environment
from moe_jax.system.terminal import say


def serve(
    run: RunName = "",
    step: StepNumber = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 4,
    api_key: str = "",
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> int:
    """Serve a trained model: OpenAI's API for programs, and a page that shows which experts write each token.

    Several texts are written at once, one in each slot; others wait. The same request with the same seed gives the same
    text, whatever else is being written. Ctrl-C or SIGTERM ends the server.

    Args:
        host: Address to listen on. To accept other machines, use another address and --api-key.
        port: Port to listen on. 0 takes a free one.
        slots: Texts that are written at once. More slots are faster for many texts, and slower for one.
        api_key: Key that requests must send. None unless given.
        allow_origin: Another site whose pages may send requests, such as https://example.org. May be repeated.
    """
    folder = checked_run(run, step)
    check_range("--port", port, 0, 65535)
    check_range("--slots", slots, 1, 256)
    _check_access(host, api_key, allow_origin)
    if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn", "pydantic")):
        raise UserError("serve needs starlette, uvicorn and pydantic: `uv run --extra serve moe-jax serve ...`")
    from moe_jax.serving.sockets import bind, url

    sock = bind(host, port)
    say(f"loading {title(folder)}, {slots} slots; the server will be at {url(sock)}")
    notes = environment.prepare_environment()
    from moe_jax.inference.decode import Decoder, cast_once
    from moe_jax.runs.load import open_run
    from moe_jax.serving.app import AccessPolicy, Server
    from moe_jax.serving.engine import Engine
    from moe_jax.serving.requests import MAX_QUEUE, ModelCard
    from moe_jax.serving.server import WebServer
    from moe_jax.serving.server import serve as serve_until_stopped

    note_device(notes)
    opened = open_run(folder, step)
    card = ModelCard(opened, folder.resolve().name, slots, folder)
    shape = opened.config.model.seq_len, opened.tokenizer.vocab_size, slots
    decoder = Decoder(opened.writer, *shape, short_prompts=True)
    engine = Engine(decoder, cast_once(opened.writer, opened.params), opened.tokenizer, queue=MAX_QUEUE)
    engine.compile()
    server = Server(engine, card, AccessPolicy(host, api_key, list(allow_origin)))
    web = WebServer(server, ready=lambda: say(f"ready: {url(sock)} (Ctrl-C ends it)"))
    serve_until_stopped(web, sock)
    say("stopped")
    return 0


def _check_access(host: str, api_key: str, origins: tuple[str, ...]) -> None:
    """Raise ConfigError unless the address, the key and the other sites go together."""
    if not api_key.isascii() or " " in api_key:
        raise ConfigError("--api-key: must be ASCII characters without a space, since it is sent in a header")
    from moe_jax.serving.sockets import is_loopback

    if not api_key and not is_loopback(host):
        raise ConfigError(f"--host {host}: other machines can reach it; give an --api-key, too")
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
            raise ConfigError(f"--allow-origin {origin}: must be like https://example.org, without a path")
