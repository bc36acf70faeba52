"""The routes of the server, and who may ask."""

import asyncio
import hmac
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_jax.serving import page
from moe_jax.serving.completions import ChatCompletion, Completion
from moe_jax.serving.engine import Engine
from moe_jax.serving.requests import ApiError, ModelCard
from moe_jax.serving.sockets import is_loopback
from moe_jax.serving.streams import GenerationResponse, error_response, json_response, read_body

OPEN_PATHS = {"/", "/health"}
"""Paths that need no key."""
LARGE_BODY = 1 << 16
"""Bodies with more bytes are read one after another, so that they leave the processor to other requests."""
READING_SECONDS = 10.0
"""Within this time a body must have become tokens."""


@dataclass(frozen=True)
class AccessPolicy:
    """What is required of a request. Host and Origin are compared with the server's own, so that a page of another site
    cannot use it."""

    host: str
    """The address that the server listens on."""
    api_key: str = ""
    """No key if empty; then `host` is a loopback address."""
    origins: Sequence[str] = ()
    """Other sites whose pages may ask."""

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that is not allowed."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()  # without the port
        # A name that its owner has pointed at this machine ("DNS rebinding") would make a page of that site ours.
        if is_loopback(self.host) and not is_loopback(name) and name != self.host:
            raise ApiError(403, f"Host {host[:100]}: this server answers as localhost and 127.0.0.1", code="host")
        if origin not in (None, f"http://{host}", f"https://{host}", *self.origins):
            problem = f"Origin {origin[:100]}: is another site; the server's --allow-origin can allow it"
            raise ApiError(403, problem, code="origin")
        if self.api_key and path not in OPEN_PATHS and method != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="api_key")

    def guard(self, app: ASGIApp) -> ASGIApp:
        """The application, behind an answer to what is not allowed."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            answer = app
            if scope["type"] == "http":
                try:
                    self.check(scope["method"], scope["path"], Headers(scope=scope))
                except ApiError as error:
                    answer = error_response(error)
            await answer(scope, receive, send)

        return guarded


class Server:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, card: ModelCard, policy: AccessPolicy) -> None:
        self.engine, self.card = engine, card
        self._large_body = asyncio.Semaphore(1)
        self.stopping = False
        """Whether /health says so."""
        routes = [
            Route("/", self.page),
            Route("/v1/models", self.models),
            Route("/v1/completions", partial(self.generation, Completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.generation, ChatCompletion), methods=["POST"]),
            Route("/health", self.health),
        ]
        middleware = [Middleware(policy.guard)]
        if policy.origins:  # outermost, so that the pages of these sites can read refusals, too
            cors = {"allow_origins": policy.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
            middleware.insert(0, Middleware(CORSMiddleware, **cors))
        errors: dict[Any, Any] = {ApiError: _error, HTTPException: _error, Exception: _error}
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=errors)

    async def page(self, request: Request) -> Response:
        html, security_policy = page.document()
        headers = {"content-security-policy": security_policy, "referrer-policy": "no-referrer"}
        headers |= {"x-frame-options": "DENY", "cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return Response(html, headers=headers, media_type="text/html; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self.card.to_dict()]})

    async def generation(self, kind: type[Completion | ChatCompletion], request: Request) -> GenerationResponse:
        body = await read_body(request)
        async with self._large_body if len(body) > LARGE_BODY else nullcontext():
            generation = await on_own_thread(kind, body, self.card)
        return GenerationResponse(generation, self.engine)

    async def health(self, request: Request) -> Response:
        engine = self.engine
        status = "stopping" if self.stopping else "ok" if engine.running else "failed"
        counts = {"slots": engine.slots, "busy": engine.busy, "queued": engine.queued, "cancelled": engine.cancelled}
        return json_response({"status": status, **counts}, 200 if status == "ok" else 503)


async def on_own_thread[**P, T](function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a request returns, computed on a thread of its own. Raises ApiError after READING_SECONDS.

    A thread that is late then holds up no other request, as it would in a pool, and not the end of the process.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(set_answer: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            set_answer(value)

    def work() -> None:
        try:
            told = answer.set_result, function(*args, **kwargs)
        except Exception as error:
            told = answer.set_exception, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, *told)

    threading.Thread(target=work, daemon=True).start()
    try:
        return await asyncio.wait_for(answer, READING_SECONDS)
    except TimeoutError:
        problem = f"the request was not read within {READING_SECONDS:g} seconds; shorten its text"
        raise ApiError(503, problem, code="too_slow") from None


async def _error(request: Request, error: Exception) -> Response:
    """OpenAI's form of an error. uvicorn prints one that is the program's."""
    if isinstance(error, HTTPException):
        problem = f"{request.method} {request.url.path[:100]}: {error.detail}; docs/serving.md lists what there is"
        error = ApiError(error.status_code, problem)
    known = error if isinstance(error, ApiError) else ApiError(500, "the program failed", code="failed")
    return error_response(known)
