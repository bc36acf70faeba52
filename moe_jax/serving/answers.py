"""Answers: the texts of one HTTP request, as OpenAI's clients read them."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_jax.config import UserError
from moe_jax.data.tokenizers import Tokenizer, token_pieces
from moe_jax.serving import limits
from moe_jax.serving.fields import Fields
from moe_jax.serving.limits import ApiError
from moe_jax.serving.model_card import ModelCard
from moe_jax.serving.texts import Event, Piece, TextRequest


class Answer(ABC):
    """The requests that an HTTP request makes of the engine, and the JSON that their events become."""

    prefix: ClassVar[str]
    """How its ids begin."""
    object: ClassVar[str]
    stream_object: ClassVar[str]

    def __init__(self, fields: Fields, card: ModelCard, prompts: Sequence[list[int]], alternatives: int | None) -> None:
        """`alternatives`: likeliest tokens to report; None: no log-probabilities. Raises ApiError."""
        fields.check_model(card.name)
        self.tokenizer: Tokenizer = card.run.tokenizer
        self.stream, self.alternatives = fields.switch("stream"), alternatives
        self._usage_wanted = fields.include_usage()
        self._token_ids, self._routing = fields.switch("return_token_ids"), fields.switch("routed_experts")
        if self._routing and not card.expert_layers:
            raise ApiError(400, "routed_experts: this model has no router that chooses experts", "routed_experts")
        self._seed, count = fields.seed(), fields.whole("n", 1, 1, limits.MAX_TEXTS)
        if count * len(prompts) > limits.MAX_TEXTS:
            problem = f"n {count}: with {len(prompts)} prompts it makes {count * len(prompts)} texts"
            raise ApiError(400, f"{problem}; at most {limits.MAX_TEXTS} are allowed", "n")
        self._prompts, self._count = prompts, count
        self.requests = [self._request(fields, prompt, number) for prompt in prompts for number in range(count)]
        self._generated = 0
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": card.name,
            "seed": self._seed,
        }

    def _request(self, fields: Fields, prompt: list[int], number: int) -> TextRequest:
        return TextRequest(
            prompt,
            fields.sampling(),
            self._seed,
            number,
            self.most_tokens(fields),
            fields.stops(),
            logprobs=self.alternatives is not None,
            routing=self._routing,
        )

    @abstractmethod
    def most_tokens(self, fields: Fields) -> int:
        """The most tokens of each text."""

    @abstractmethod
    def choice(self, index: int, event: Event) -> dict[str, Any]:
        """News of a text in a stream."""

    def whole_choice(self, index: int, event: Event) -> dict[str, Any]:
        """A whole text."""
        return self.choice(index, event)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """The object of a stream for one event."""
        self._generated += len(event.pieces)
        return self._with(self.stream_object, [self.choice(index, event)])

    def last_chunk(self) -> dict[str, Any] | None:
        """The object behind the last event of a stream."""
        return self._with(self.stream_object, []) | {"usage": self._usage()} if self._usage_wanted else None

    def result(self, events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """The object of an answer without a stream, from all events of each text."""
        choices = []
        for index, parts in enumerate(events):
            pieces = [piece for event in parts for piece in event.pieces]
            self._generated += len(pieces)
            choices.append(self.whole_choice(index, Event(pieces, parts[-1].finish, parts[0].prompt)))
        return self._with(self.object, choices) | {"usage": self._usage()}

    def _with(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self._prompts))
        total = read + self._generated
        return {"prompt_tokens": read, "completion_tokens": self._generated, "total_tokens": total}

    def extras(self, index: int, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
        """The fields that OpenAI's API does not have."""
        found: dict[str, Any] = {}
        if self._token_ids:
            found["token_ids"] = [piece.token for piece in pieces]
            if first:
                found["prompt_token_ids"] = self._prompts[index // self._count]
        if self._routing:
            found["routed_experts"] = [piece.experts for piece in pieces]
            found["gates"] = [piece.gates for piece in pieces]
        return found

    def names(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return token_pieces(self.tokenizer, np.asarray(tokens, np.int64))

    def likeliest(self, piece: Piece) -> list[tuple[int, str, float]]:
        """The likeliest tokens at a piece's place, as many as were asked for: id, text, log-probability."""
        found = piece.likeliest[: self.alternatives]
        names = self.names([token for token, _ in found])
        return [(token, name, value) for (token, value), name in zip(found, names, strict=True)]


def checked_prompt(tokens: list[int], tokenizer: Tokenizer, param: str) -> list[int]:
    """The tokens of a prompt. Raises ApiError if they are too many, or if one of them is unknown."""
    if not tokens:
        raise ApiError(400, f"{param}: has no token; give at least one", param)
    if len(tokens) > limits.MAX_PROMPT_TOKENS:
        problem = f"{param}: has {len(tokens):,} tokens, and at most {limits.MAX_PROMPT_TOKENS:,} are allowed"
        raise ApiError(400, problem, param, "context_length_exceeded")
    unknown = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"{param}: token {unknown} is outside the vocabulary of {tokenizer.vocab_size:,}", param)
    return tokens


def encoded(text: str, tokenizer: Tokenizer, param: str) -> list[int]:
    """The tokens of a text. Raises ApiError if it cannot be encoded."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from None
