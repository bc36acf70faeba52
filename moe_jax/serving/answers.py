"""/v1/completions continues a prompt; /v1/chat/completions answers a conversation, for a tuned model.

A body becomes requests of the engine, and the events of their texts become JSON as OpenAI's clients read it.
"""

import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_jax.config import UserError
from moe_jax.data.documents import ANSWERING, ROLES, Message
from moe_jax.data.tokenizers import Tokenizer, answer_prompt, token_pieces
from moe_jax.inference.traced_pass import MOST_ALTERNATIVES
from moe_jax.pages.live import MAX_TOKENS
from moe_jax.serving.requests import (
    COMMON,
    MAX_MESSAGES,
    MAX_PROMPT_TOKENS,
    MAX_TEXTS,
    ApiError,
    Fields,
    ModelCard,
    shown,
)
from moe_jax.serving.texts import Event, Piece, TextRequest
from moe_jax.system.files import json_text


class Answer(ABC):
    """The requests that an HTTP request makes of the engine, and the JSON that their events become. Text n of prompt p
    has the index p * `n` + n."""

    prefix: ClassVar[str]
    """How its ids begin."""
    object: ClassVar[str]
    stream_object: ClassVar[str]

    def __init__(
        self, fields: Fields, card: ModelCard, prompts: Sequence[list[int]], alternatives: int | None, limit: int
    ) -> None:
        """`alternatives`: likeliest tokens to report; None: no log-probabilities. `limit`: most tokens of each text.
        Raises ApiError."""
        fields.check_model(card.name)
        self.tokenizer: Tokenizer = card.run.tokenizer
        self.stream, self.alternatives = fields.switch("stream"), alternatives
        self._include_usage = fields.include_usage()
        self._token_ids, self._routing = fields.switch("return_token_ids"), fields.switch("routed_experts")
        if self._routing and card.run.config.model.dense != "none":
            raise ApiError(400, "routed_experts: this model has no router that chooses experts", "routed_experts")
        seed, count = fields.seed(), fields.whole("n", 1, 1, MAX_TEXTS)
        settings, stops = fields.sampling(), fields.stops()
        if count * len(prompts) > MAX_TEXTS:
            problem = f"n {count}: with {len(prompts)} prompts it makes {count * len(prompts)} texts"
            raise ApiError(400, f"{problem}; at most {MAX_TEXTS} are allowed", "n")
        self._prompts, self._count = prompts, count
        logprobs, texts = alternatives is not None, itertools.product(prompts, range(count))
        self.requests = [TextRequest(p, settings, seed, n, limit, stops, logprobs, self._routing) for p, n in texts]
        self._begun = [False] * len(self.requests)
        self._whole: list[dict[str, Any]] = [{} for _ in self.requests]
        self._generated = 0
        made = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time())}
        self._head = made | {"model": card.name, "seed": seed}

    @abstractmethod
    def choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        """News of a text. `first`: there was none of this text before."""

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The object of a stream for one event."""
        self._generated += len(event.pieces)
        first, self._begun[index] = not self._begun[index], True
        return self._with(self.stream_object, [self.choice(index, event, first)])

    def last_chunk(self) -> dict[str, Any] | None:
        """The object behind the last event of a stream."""
        return self._with(self.stream_object, []) | {"usage": self._usage()} if self._include_usage else None

    def keep(self, index: int, event: Event) -> None:
        """Append an event to the answer without a stream."""
        (choice,) = self.chunk(index, event)["choices"]
        _append(self._whole[index], choice)

    def whole(self) -> bytes:
        """The JSON of an answer without a stream, once all events are kept."""
        head, usage = json_text(self._with(self.object, [])), json_text({"usage": self._usage()})
        return b"%s%s], %s" % (head[:-2].encode(), b", ".join(map(_encoded, self._whole)), usage[1:].encode())

    def _with(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self._prompts))
        total = read + self._generated
        return {"prompt_tokens": read, "completion_tokens": self._generated, "total_tokens": total}

    def extras(self, index: int, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        """The fields that OpenAI's API does not have."""
        more: dict[str, Any] = {}
        if self._token_ids:
            more["token_ids"] = [piece.token for piece in pieces]
            if first:
                more["prompt_token_ids"] = self._prompts[index // self._count]
        if self._routing:
            more["routed_experts"] = [piece.experts for piece in pieces]
            more["gates"] = [piece.gates for piece in pieces]
        return more

    def name(self, token: int) -> str:
        """The text of a token by itself."""
        return token_pieces(self.tokenizer, np.array([token]))[0]


class Completion(Answer):
    """Continuations."""

    prefix = "cmpl-"
    object = stream_object = "text_completion"

    def __init__(self, body: bytes, card: ModelCard) -> None:
        """Raises ApiError."""
        fields = Fields(body, COMMON | {"prompt", "logprobs", "echo"})
        echo = fields.switch("echo")
        prompts = _prompts(fields.value("prompt"), card)
        longest = max(map(len, prompts))
        if echo and longest > card.context:
            problem = f"prompt: has {longest} tokens, and with echo at most the context, {card.context}, are allowed"
            raise ApiError(400, problem, "prompt", "context_length_exceeded")
        limit = fields.whole("max_tokens", 16, 0, MAX_TOKENS)
        super().__init__(fields, card, prompts, fields.alternatives("logprobs"), limit)
        for request in self.requests:
            request.echo = echo
        self._offsets = [0] * len(self.requests)
        """Characters of each text so far."""

    def choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        pieces = [*event.prompt, *event.pieces]
        text = "".join(piece.text for piece in pieces)
        logprobs = None if self.alternatives is None else self._logprobs(self._offsets[index], pieces)
        self._offsets[index] += len(text)
        choice = {"index": index, "text": text, "finish_reason": event.finish, "logprobs": logprobs}
        return choice | self.extras(index, pieces, first)

    def _logprobs(self, offset: int, pieces: list[Piece]) -> dict[str, Any]:
        offsets, tops, top_ids = [], [], []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
            best: dict[str, float] = {}
            likeliest = piece.likeliest[: self.alternatives]
            for token, value in likeliest:
                name = self.name(token)
                best[f"{name}<{token}>" if name in best else name] = value  # two tokens may have the same text
            tops.append(best)
            top_ids.append([token for token, _ in likeliest])
        return {
            "tokens": [self.name(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": tops,
            "top_token_ids": top_ids,
            "text_offset": offsets,
        }


class ChatCompletion(Answer):
    """Answers to a conversation, in the role format of `data/tokenizers.py`."""

    prefix = "chatcmpl-"
    object, stream_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: bytes, card: ModelCard) -> None:
        """Raises ApiError."""
        if not card.tuned:
            problem = (
                f"{card.name} is not tuned on conversations; ask /v1/completions, or tune it with "
                "`uv run python -m moe_jax sft`"
            )
            raise ApiError(400, problem, "model", "not_tuned")
        fields = Fields(body, COMMON | {"messages", "logprobs", "top_logprobs", "max_completion_tokens"})
        prompt = _conversation(fields.value("messages"), card)
        top = fields.whole("top_logprobs", 0, 0, MOST_ALTERNATIVES)
        alternatives = top if fields.switch("logprobs") else None
        if top and alternatives is None:
            raise ApiError(400, "top_logprobs: needs logprobs true", "top_logprobs")
        name = "max_tokens" if fields.value("max_completion_tokens") is None else "max_completion_tokens"
        super().__init__(fields, card, [prompt], alternatives, fields.whole(name, 400, 1, MAX_TOKENS))

    def choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        delta: dict[str, str] = {"role": ANSWERING} if first else {}
        if event.pieces or first:
            delta["content"] = "".join(piece.text for piece in event.pieces)
        logprobs = None if self.alternatives is None else {"content": [self._logprob(piece) for piece in event.pieces]}
        choice = {"index": index, "finish_reason": event.finish, "logprobs": logprobs}
        return choice | self.extras(index, event.pieces, first) | {"delta" if self.stream else "message": delta}

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in piece.likeliest[: self.alternatives]]
        return self._entry(piece.token, piece.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, value: float | None) -> dict[str, Any]:
        raw = list(self.tokenizer.decode_bytes([token]))
        return {"token": self.name(token), "logprob": value, "bytes": raw, "token_id": token}


def _append(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Append news of a text to its earlier ones: texts and lists grow, other values are replaced. Lists are kept as
    JSON. An answer may have half a million tokens, and no client is answered while all of them become JSON at once."""
    for key, value in part.items():
        if isinstance(value, dict):
            _append(whole.setdefault(key, {}), value)
        elif isinstance(value, list):
            entries = whole.setdefault(key, bytearray())
            entries += (b", " if entries and value else b"") + json_text(value)[1:-1].encode()
        else:
            whole[key] = whole[key] + value if isinstance(whole.get(key), str) else value


def _encoded(whole: dict[str, Any]) -> bytes:
    """The JSON of what `_append` has kept."""
    kinds = {dict: _encoded, bytearray: lambda entries: b"[%s]" % entries}
    fields = (
        b"%s: %s" % (json_text(key).encode(), kinds.get(type(value), lambda value: json_text(value).encode())(value))
        for key, value in whole.items()
    )
    return b"{%s}" % b", ".join(fields)


def _prompts(value: Any, card: ModelCard) -> list[list[int]]:
    """The prompts in tokens. A text gets the separator before it, as in `generate`; tokens are taken as they are."""
    if _is_prompt(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(map(_is_prompt, value)):
        allowed = "must be a text, a list of token ids, or a list of texts or of such lists"
        raise ApiError(400, f"prompt: {allowed}", "prompt")
    if len(value) > MAX_TEXTS:
        raise ApiError(400, f"prompt: {len(value)} prompts; at most {MAX_TEXTS} are allowed", "prompt")
    tokenizer = card.run.tokenizer
    try:
        tokens = [[tokenizer.separator_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in value]
    except UserError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from None
    return [_checked(prompt, tokenizer, "prompt") for prompt in tokens]


def _is_prompt(value: Any) -> bool:
    """Whether a value is a text or a list of token ids."""
    tokens = isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    return isinstance(value, str) or tokens


def _checked(tokens: list[int], tokenizer: Tokenizer, param: str) -> list[int]:
    """The tokens of a prompt. Raises ApiError if they are too many, or if one of them is unknown."""
    if len(tokens) > MAX_PROMPT_TOKENS:
        problem = f"{param}: has {len(tokens):,} tokens, and at most {MAX_PROMPT_TOKENS:,} are allowed"
        raise ApiError(400, problem, param, "context_length_exceeded")
    unknown = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"{param}: token {unknown} is outside the vocabulary of {tokenizer.vocab_size:,}", param)
    return tokens


def _conversation(value: Any, card: ModelCard) -> list[int]:
    """The tokens after which the model writes its answer. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: must be a list of objects with `role` and `content`", "messages")
    if len(value) > MAX_MESSAGES:
        raise ApiError(400, f"messages: {len(value)}; at most {MAX_MESSAGES} are allowed", "messages")
    turns = [_message(number, message) for number, message in enumerate(value)]
    try:
        tokens = answer_prompt(card.run.tokenizer, turns)
    except (UserError, UnicodeEncodeError) as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    if len(tokens) >= card.context:
        problem = f"messages: have {len(tokens)} tokens with their roles, and the context {card.context}"
        raise ApiError(400, f"{problem}; shorten them", "messages", "context_length_exceeded")
    return _checked(tokens, card.run.tokenizer, "messages")


def _message(number: int, value: Any) -> Message:
    name = f"messages[{number}]"
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} {shown(value)}: must be an object with `role` and `content`", "messages")
    if value.get("role") not in ROLES:
        problem = f"{name}: has the role {shown(value.get('role'))}; it must be one of {', '.join(ROLES)}"
        raise ApiError(400, problem, "messages")
    content = value.get("content")
    if isinstance(content, list):  # parts, as newer clients send them
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str) or not content.strip():
        raise ApiError(400, f"{name}: its content must be a text that is not empty", "messages")
    return Message(value["role"], content.strip())
