"""Who may ask. Host and Origin are compared with the server's own, so that a page of another site cannot use it."""

import hmac
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.serving.limits import ApiError
from moe_jax.serving.sockets import is_loopback
from moe_jax.serving.streams import send_json

OPEN_PATHS = {"/", "/health"}
"""Paths that need no key."""
_MODELS = "/v1/models/"


@dataclass(frozen=True)
class Rules:
    """What is required of a request."""

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
    """Refuses what `Rules` refuse, counts the answers, and turns every error into an answer. ASGI middleware."""

    def __init__(self, app: ASGIApp, rules: Rules, answers: Counter[tuple[str, int]], paths: frozenset[str]) -> None:
        """`answers` counts by path and status. `paths` are those of the routes. All others are counted as one."""
        self._app, self._rules, self._answers, self._paths = app, rules, answers, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._answers[self._label(scope["path"]), message["status"]] += 1
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._rules.check(scope["method"], scope["path"], headers)
            await self._app(scope, receive, counted)
        except ApiError as error:
            if begun:
                raise
            await send_json(counted, error.body(), error.status)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            if begun:
                raise
            failure = ApiError(500, "the program failed", code="failed")
            await send_json(counted, failure.body(), failure.status)

    def _label(self, path: str) -> str:
        """The name under which an answer is counted. The names of models are the client's, so they are not labels."""
        if path.startswith(_MODELS):
            return _MODELS + "{name}"
        return path if path in self._paths else "other"
