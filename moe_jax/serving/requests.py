"""What a request may ask: the bounds of every request and the error that names them, the fields of a body, and what the
server says about its model."""

import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import MOST_ALTERNATIVES
from moe_jax.pages.live import model_entry
from moe_jax.runs.load import LoadedRun
from moe_jax.runs.records import read_summary
from moe_jax.system.errors import shortened

MAX_BODY_BYTES = 1 << 20
MAX_PROMPT_TOKENS = 65_536
"""Of one prompt, the separator included. The model reads the last T."""
MAX_TEXTS = 128
"""Texts of one request: its prompts times `n`."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_MESSAGES = 1000
MAX_QUEUE = 256
"""Texts that wait for a slot."""

COMMON = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "model", "stream", "stream_options"}
COMMON |= {"max_tokens", "seed", "stop", "n", "user", "return_token_ids", "routed_experts"}
"""The fields of both kinds of completion."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
}
"""Fields of OpenAI's that this server does not have, and the values that ask for nothing."""


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx, in the form that OpenAI's clients read."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """`param` is the field that is wrong. `code` is a word for programs."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ModelCard:
    """A run, as its clients see it."""

    run: LoadedRun
    name: str
    slots: int
    folder: Path
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def context(self) -> int:
        """T."""
        return self.run.config.model.seq_len

    @property
    def tuned(self) -> bool:
        """Whether the run is tuned on conversations."""
        return self.run.converses

    def to_dict(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        run = self.run
        entry = model_entry(self.name, run.config, run.tokenizer.vocab_size, read_summary(self.folder))
        own = {"object": "model", "created": self.created, "owned_by": "moe-jax"}
        return entry | own | {"moe_jax": entry["moe_jax"] | {"slots": self.slots, "chat": self.tuned}}


class Fields:
    """The body of a request: a JSON object. Its methods raise ApiError for a value that cannot be."""

    def __init__(self, body: bytes, known: set[str]) -> None:
        """Raises ApiError for a body that is not a JSON object, and for a field that is not known."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ApiError(400, "the body must be a JSON object")
        for name, value in values.items():
            if name in _NEUTRAL and name not in known:
                if value not in _NEUTRAL[name]:
                    raise ApiError(400, f"{name}: this server does not have it; leave it out", name, "unsupported")
            elif name not in known:
                raise ApiError(400, f"{shown(name)}: no such field; known are {', '.join(sorted(known))}", name[:80])
        self._values = values

    def value(self, name: str) -> Any:
        """The value as it was sent; None if it was not."""
        return self._values.get(name)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number between `low` and `high`."""
        value = self._value_or(name, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, shown(value), f"must be a whole number between {low:,} and {high:,}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number between `low` and `high`."""
        value = self._value_or(name, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN too
            raise self._wrong(name, shown(value), f"must be a number between {low:g} and {high:g}")
        return float(value)

    def switch(self, name: str) -> bool:
        """True or false; false if it was not sent."""
        value = self._value_or(name, False)
        if type(value) is not bool:
            raise self._wrong(name, shown(value), "must be true or false")
        return value

    def sampling(self) -> Sampling:
        """How to draw. OpenAI's defaults: temperature 1, no filter."""
        return Sampling(
            temperature=self.number("temperature", 1.0, 0, 100),
            top_k=max(self.whole("top_k", 0, -1, 2**24), 0),  # other servers have -1 for off
            top_p=self.number("top_p", 1.0, 1e-6, 1),
            min_p=self.number("min_p", 0.0, 0, 1),
            repetition_penalty=self.number("repetition_penalty", 1.0, 1e-3, 1e3),
        )

    def seed(self) -> int:
        """The seed; a random one if it was not sent."""
        return self.whole("seed", secrets.randbelow(2**31), 0, 2**31 - 1)

    def stops(self) -> list[str]:
        """The strings that end a text."""
        value = self._value_or("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise self._wrong("stop", shown(value), "must be a text that is not empty, or a list of such texts")
        if len(stops) > MAX_STOPS:
            raise self._wrong("stop", f"{len(stops)} texts", f"may be at most {MAX_STOPS}")
        longest = max(map(len, stops), default=0)
        if longest > MAX_STOP_CHARACTERS:
            problem = f"may have at most {MAX_STOP_CHARACTERS}"
            raise self._wrong("stop", f"a text of {longest} characters", problem)
        return stops

    def alternatives(self, name: str) -> int | None:
        """How many of the likeliest tokens are reported; None without log-probabilities."""
        value = self.value(name)
        if value is None or value is False:  # 0 asks for the probability of the token alone
            return None
        return self.whole(name, 0, 0, MOST_ALTERNATIVES)

    def check_model(self, name: str) -> None:
        """Raise ApiError if it names another model."""
        wanted = self._value_or("model", name)
        if wanted != name:
            raise ApiError(404, f"model {shown(wanted)}: this server has {name!r}", "model", "model_not_found")

    def include_usage(self) -> bool:
        """Whether the last event of a stream counts the tokens."""
        value = self._value_or("stream_options", {})
        if not isinstance(value, dict) or not set(value) <= {"include_usage", "include_obfuscation"}:
            raise self._wrong("stream_options", shown(value), 'must be {"include_usage": true or false}')
        return value.get("include_usage") is True

    def _value_or(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: str, problem: str) -> ApiError:
        """`value` says in a few words what was sent."""
        return ApiError(400, f"{name} {value}: {problem}", name)


def shown(value: Any) -> str:
    """A value of a request, for an error. A value may be as long as a whole body."""
    return shortened(repr(value))
