"""/v1/completions continues a prompt; /v1/chat/completions answers a conversation, for a tuned model.

A request becomes texts for the engine, and the events of these texts become JSON as OpenAI's clients read it.
"""

import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_jax.config import UserError
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import ANSWERING, Message
from moe_jax.data.tokenizers import token_pieces
from moe_jax.serving.requests import (
    MAX_PROMPT_TOKENS,
    MAX_TEXTS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    parse_request,
)
from moe_jax.serving.texts import Event, Piece, TextRequest
from moe_jax.system.errors import shortened
from moe_jax.system.files import json_text


class Generation(ABC):
    """The texts of one HTTP request, and the JSON that their events become. Text n of prompt p has the index
    p * `n` + n."""

    prefix: ClassVar[str]
    """How its ids begin."""
    object: ClassVar[str]
    stream_object: ClassVar[str]
    echo = False
    """Whether a text begins with its prompt."""

    def __init__(
        self,
        request: GenerationRequest,
        card: ModelCard,
        prompts: Sequence[list[int]],
        alternatives: int | None,
        limit: int,
    ) -> None:
        """`alternatives`: likeliest tokens to report; None: no log-probabilities. `limit`: most tokens of each text.
        Raises ApiError."""
        count = request.n
        if request.model not in ("", card.name):
            problem = f"model {shortened(request.model)!r}: this server has {card.name!r}"
            raise ApiError(404, problem, "model", "model_not_found")
        if request.routed_experts and card.run.config.model.dense != "none":
            raise ApiError(400, "routed_experts: this model has no router that chooses experts", "routed_experts")
        if count * len(prompts) > MAX_TEXTS:
            problem = f"n {count}: with {len(prompts)} prompts it makes {count * len(prompts)} texts"
            raise ApiError(400, f"{problem}; at most {MAX_TEXTS} are allowed", "n")
        self.tokenizer, self.stream, self.alternatives = card.run.tokenizer, request.stream, alternatives
        self._request, self._prompts = request, prompts
        options = request.stop, alternatives is not None, request.routed_experts, self.echo
        self.texts = [
            TextRequest(prompt, request.sampling, request.seed, number, limit, *options)
            for prompt, number in itertools.product(prompts, range(count))
        ]
        self._begun = [False] * len(self.texts)
        self._generated = 0
        made = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time())}
        self._head = made | {"model": card.name, "seed": request.seed}

    @abstractmethod
    def choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        """News of a text. `first`: there was none of this text before."""

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The object of a stream for one event."""
        self._generated += len(event.pieces)
        first, self._begun[index] = not self._begun[index], True
        return {**self._head, "object": self.stream_object, "choices": [self.choice(index, event, first)]}

    def last_chunk(self) -> dict[str, Any] | None:
        """The object behind the last event of a stream."""
        if not self._request.stream_options.get("include_usage"):
            return None
        return {**self._head, "object": self.stream_object, "choices": [], "usage": self._usage()}

    def whole_choice(self, index: int, event: Event) -> bytes:
        """The JSON of a text that has ended, for an answer without a stream. `event` has all of its pieces."""
        self._generated += len(event.pieces)
        return json_text(self.choice(index, event, True)).encode()

    def whole(self, choices: Sequence[bytes]) -> list[bytes]:
        """The JSON of an answer without a stream, in parts, from the choices of all texts."""
        rest = json_text({**self._head, "object": self.object, "usage": self._usage()}).encode()
        commas = [b", " + choice for choice in choices[1:]]
        return [rest[:-1] + b', "choices": [' + choices[0], *commas, b"]}"]

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self._prompts))
        total = read + self._generated
        return {"prompt_tokens": read, "completion_tokens": self._generated, "total_tokens": total}

    def extras(self, index: int, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        """The fields that OpenAI's API does not have."""
        more: dict[str, Any] = {}
        if self._request.return_token_ids:
            more["token_ids"] = [piece.token for piece in pieces]
            if first:
                more["prompt_token_ids"] = self._prompts[index // self._request.n]
        if self._request.routed_experts:
            more["routed_experts"] = [piece.experts for piece in pieces]
            more["gates"] = [piece.gates for piece in pieces]
        return more

    def name(self, token: int) -> str:
        """The text of a token by itself."""
        return token_pieces(self.tokenizer, np.array([token]))[0]


class Completion(Generation):
    """Continuations."""

    prefix = "cmpl-"
    object = stream_object = "text_completion"

    def __init__(self, body: bytes, card: ModelCard) -> None:
        """Raises ApiError."""
        request = parse_request(CompletionRequest, body)
        prompts = [_prompt_tokens(prompt, card) for prompt in request.prompt]
        longest, self.echo = max(map(len, prompts)), request.echo
        if request.echo and longest > card.context:
            problem = f"prompt: has {longest} tokens, and with echo at most the context, {card.context}, are allowed"
            raise ApiError(400, problem, "prompt", "context_length_exceeded")
        super().__init__(request, card, prompts, request.logprobs, request.max_tokens)
        self._offsets = [0] * len(self.texts)
        """Characters of each text so far."""

    def choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        pieces = [*event.prompt, *event.pieces]
        text = "".join(piece.text for piece in pieces)
        logprobs = None if self.alternatives is None else self._logprobs(self._offsets[index], pieces)
        self._offsets[index] += len(text)
        choice = {"index": index, "text": text, "finish_reason": event.finish, "logprobs": logprobs}
        return choice | self.extras(index, pieces, first)

    def _logprobs(self, offset: int, pieces: list[Piece]) -> dict[str, Any]:
        likeliest = [piece.likeliest[: self.alternatives] for piece in pieces]
        tops: list[dict[str, float]] = [{} for _ in pieces]
        for best, found in zip(tops, likeliest, strict=True):
            for token, value in found:
                name = self.name(token)
                best[f"{name}<{token}>" if name in best else name] = value  # two tokens may have the same text
        ends = list(itertools.accumulate((len(piece.text) for piece in pieces), initial=offset))
        return {
            "tokens": [self.name(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": tops,
            "top_token_ids": [[token for token, _ in found] for found in likeliest],
            "text_offset": ends[:-1],
        }


class ChatCompletion(Generation):
    """Answers to a conversation, in the role format of `data/chats.py`."""

    prefix = "chatcmpl-"
    object, stream_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: bytes, card: ModelCard) -> None:
        """Raises ApiError."""
        if not card.run.converses:
            problem = (
                f"{card.name} is not tuned on conversations; ask /v1/completions, or tune it with `uv run moe-jax sft`"
            )
            raise ApiError(400, problem, "model", "not_tuned")
        request = parse_request(ChatRequest, body)
        alternatives = request.top_logprobs if request.logprobs else None
        limit = request.max_completion_tokens or request.max_tokens
        super().__init__(request, card, [_conversation_tokens(request, card)], alternatives, limit)

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


def _prompt_tokens(prompt: str | list[int], card: ModelCard) -> list[int]:
    """The tokens of a prompt. A text gets the separator before it, as in `generate`; tokens are taken as they are.
    Raises ApiError if they are too many, or if one of them is unknown."""
    tokenizer = card.run.tokenizer
    try:
        tokens = [tokenizer.separator_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    except UserError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from None
    if len(tokens) > MAX_PROMPT_TOKENS:
        problem = f"prompt: has {len(tokens):,} tokens, and at most {MAX_PROMPT_TOKENS:,} are allowed"
        raise ApiError(400, problem, "prompt", "context_length_exceeded")
    if unknown := [token for token in tokens if not 0 <= token < tokenizer.vocab_size]:
        problem = f"prompt: token {unknown[0]} is outside the vocabulary of {tokenizer.vocab_size:,}"
        raise ApiError(400, problem, "prompt")
    return tokens


def _conversation_tokens(request: ChatRequest, card: ModelCard) -> list[int]:
    """The tokens after which the model writes its answer. Raises ApiError."""
    turns = [Message(message.role, str(message.content)) for message in request.messages]
    try:
        tokens = answer_prompt(card.run.tokenizer, turns)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    if len(tokens) >= min(card.context, MAX_PROMPT_TOKENS):
        problem = f"messages: have {len(tokens)} tokens with their roles, and the context {card.context}"
        raise ApiError(400, f"{problem}; shorten them", "messages", "context_length_exceeded")
    return tokens
