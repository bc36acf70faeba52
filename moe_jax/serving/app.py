"""The routes of the server."""

import asyncio
from collections import Counter
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moe_jax.serving import page
from moe_jax.serving.access import Access, Rules
from moe_jax.serving.answers import Answer
from moe_jax.serving.chat import ChatCompletion
from moe_jax.serving.completions import Completion
from moe_jax.serving.engine import Engine
from moe_jax.serving.limits import ApiError
from moe_jax.serving.metrics import CONTENT_TYPE, metrics_text
from moe_jax.serving.model_card import ModelCard
from moe_jax.serving.streams import AnswerResponse, read_body


class Server:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, card: ModelCard, rules: Rules) -> None:
        self.engine, self.card = engine, card
        self.stopping = False
        """Whether /health says so."""
        self._answers: Counter[tuple[str, int]] = Counter()
        self._page, self._card = page.document(), card.to_dict()
        routes = [
            Route("/", self.page),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        paths = frozenset(route.path for route in routes)
        middleware = [Middleware(Access, rules=rules, answers=self._answers, paths=paths)]
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
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.card.name:
            problem = f"model {name[:60]!r}: this server has {self.card.name!r}"
            raise ApiError(404, problem, "model", "model_not_found")
        return JSONResponse(self._card)

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
        return JSONResponse(
            {"status": status, "slots": engine.slots, "busy": engine.busy, "queued": engine.queued},
            status_code=200 if status == "ok" else 503,
        )

    async def metrics(self, request: Request) -> Response:
        return Response(metrics_text(self.engine, self._answers), headers={"content-type": CONTENT_TYPE})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {request.url.path[:100]}: {error.detail}; docs/serving.md lists what there is"
    return JSONResponse(ApiError(error.status_code, problem).body(), status_code=error.status_code)
