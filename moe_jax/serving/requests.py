"""What a request may ask: a pydantic model for each endpoint, errors in OpenAI's form, and the entry of the model."""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    FailFast,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from moe_jax.data.documents import Role
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.traced_pass import MOST_ALTERNATIVES
from moe_jax.pages.live import MAX_TOKENS, model_entry
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

type TokenIds = Annotated[list[Annotated[int, Strict()]], Field(min_length=1, max_length=MAX_PROMPT_TOKENS), FailFast()]
type StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx, in the form that OpenAI's clients read."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """`param` is the field that is wrong. `code` is a word for programs."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class GenerationRequest(BaseModel):
    """The fields of both endpoints. null stands for the default. Other fields are ignored."""

    model: str = ""
    stream: bool = False
    stream_options: dict[str, Any] = {}
    """`include_usage`: whether the last event of a stream counts the tokens."""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=1e-6, le=1)
    top_k: int = Field(0, ge=-1, le=2**24)
    """0 and -1 are off."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-3, le=1e3)
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**31), ge=0, lt=2**31)
    stop: Annotated[list[StopString], FailFast()] = Field([], max_length=MAX_STOPS)
    n: int = Field(1, ge=1, le=MAX_TEXTS)
    return_token_ids: bool = False
    routed_experts: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def sampling(self) -> Sampling:
        """How to draw. OpenAI's defaults: temperature 1, no filter."""
        return Sampling(self.temperature, max(self.top_k, 0), self.top_p, self.min_p, self.repetition_penalty)


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: Annotated[list[str | TokenIds], FailFast()] = Field(min_length=1, max_length=MAX_TEXTS)
    """Texts, or lists of token ids. One of them may stand without the list."""
    max_tokens: int = Field(16, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    """How many of the likeliest tokens are reported; None: no log-probabilities."""
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        single = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
        return [value] if single else value


class TextPart(BaseModel):
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation. Newer clients send its content in parts."""

    role: Role
    content: str | list[TextPart]

    @field_validator("content")
    @classmethod
    def _not_empty(cls, content: str | list[TextPart]) -> str:
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        if not text.strip():
            raise ValueError("the content must not be empty")
        return text.strip()


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int = Field(400, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self


def parse_request[R: GenerationRequest](kind: type[R], body: bytes) -> R:
    """A request of this kind from its JSON. Raises ApiError, which names the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in wrong[:3]]
        param = str(wrong[0]["loc"][0])[:80] if wrong[0]["loc"] else None
        raise ApiError(400, "; ".join(shortened(problem, 200) for problem in problems), param) from None


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

    def to_dict(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        run = self.run
        entry = model_entry(self.name, run.config, run.tokenizer.vocab_size, read_summary(self.folder))
        own = {"object": "model", "created": self.created, "owned_by": "moe-jax"}
        return entry | own | {"moe_jax": entry["moe_jax"] | {"slots": self.slots, "chat": run.converses}}
