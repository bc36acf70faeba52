"""The routes of the server, and who may ask."""

import asyncio
import hmac
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.serving import page
from moe_jax.serving.answers import Answer, ChatCompletion, Completion
from moe_jax.serving.engine import Engine
from moe_jax.serving.requests import ApiError, ModelCard
from moe_jax.serving.sockets import is_loopback
from moe_jax.serving.streams import AnswerResponse, error_response, json_response, read_body

OPEN_PATHS = {"/", "/health"}
"""Paths that need no key."""


@dataclass(frozen=True)
class Rules:
    """What is required of a request. Host and Origin are compared with the server's own, so that a page of another site
    cannot use it."""

    host: str
    """The address that the server listens on."""
    api_key: str = ""
    """No key if empty; then `host` is a loopback address."""
    origins: Sequence[str] = ()
    """Other sites whose pages may ask."""

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raise ApiError for a request that is not allowed. The names of `headers` are in lower case."""
        host = headers.get("host", "")
        # A name that its owner has pointed at this machine ("DNS rebinding") would make a page of that site ours.
        if is_loopback(self.host) and not is_loopback(_name(host)) and _name(host) != self.host:
            raise ApiError(403, f"Host {host[:100]}: this server answers as localhost and 127.0.0.1", code="host")
        origin = headers.get("origin")
        own = {f"http://{host}", f"https://{host}"}
        if origin is not None and origin not in own and origin not in self.origins:
            problem = f"Origin {origin[:100]}: is another site; the server's --allow-origin can allow it"
            raise ApiError(403, problem, code="origin")
        if self.api_key and path not in OPEN_PATHS and method != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="api_key")


def _name(host: str) -> str:
    """The name of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Access:
    """Refuses what `Rules` refuse, and turns every error into an answer. ASGI middleware."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._rules.check(scope["method"], scope["path"], headers)
            await self._app(scope, receive, noted)
        except Exception as error:
            if not isinstance(error, ApiError):
                traceback.print_exception(error, file=sys.stderr)
            if begun:
                raise
            known = error if isinstance(error, ApiError) else ApiError(500, "the program failed", code="failed")
            await error_response(known)(scope, receive, noted)


class Server:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, card: ModelCard, rules: Rules) -> None:
        self.engine, self.card = engine, card
        self.stopping = False
        """Whether /health says so."""
        self._page, self._card = page.document(), card.to_dict()
        routes = [
            Route("/", self.page),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
        ]
        middleware = [Middleware(Access, rules=rules)]
        if rules.origins:  # outermost, so that the pages of these sites can read refusals, too
            cors = {"allow_origins": rules.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
            middleware.insert(0, Middleware(CORSMiddleware, **cors))
        errors: dict[Any, Any] = {HTTPException: _http_error}
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=errors)

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": self._page.policy, "referrer-policy": "no-referrer"}
        headers |= {"x-frame-options": "DENY", "cache-control": "no-cache"}
        return Response(self._page.html, headers=headers, media_type="text/html; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card]})

    async def completions(self, request: Request) -> AnswerResponse:
        return await self._answer(Completion, request)

    async def chat(self, request: Request) -> AnswerResponse:
        return await self._answer(ChatCompletion, request)

    async def _answer(self, kind: type[Completion] | type[ChatCompletion], request: Request) -> AnswerResponse:
        body = await read_body(request)
        answer: Answer = await asyncio.to_thread(kind, body, self.card)  # a megabyte of text takes a while to encode
        return AnswerResponse(answer, self.engine)

    async def health(self, request: Request) -> Response:
        engine = self.engine
        status = "stopping" if self.stopping else "ok" if engine.running else "failed"
        counts = {"slots": engine.slots, "busy": engine.busy, "queued": engine.queued, "cancelled": engine.cancelled}
        return json_response({"status": status, **counts}, 200 if status == "ok" else 503)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {request.url.path[:100]}: {error.detail}; docs/serving.md lists what there is"
    return error_response(ApiError(error.status_code, problem))
