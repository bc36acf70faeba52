"""/v1/completions: a prompt is continued."""

from typing import Any

from moe_jax.serving import limits
from moe_jax.serving.answers import Answer, checked_prompt, encoded
from moe_jax.serving.fields import COMMON, Fields
from moe_jax.serving.limits import ApiError
from moe_jax.serving.model_card import ModelCard
from moe_jax.serving.texts import Event, Piece

KNOWN = COMMON | {"prompt", "logprobs", "echo"}


class Completion(Answer):
    """Continuations. Text n of prompt p has the index p * `n` + n."""

    prefix = "cmpl-"
    object = stream_object = "text_completion"

    def __init__(self, body: bytes, card: ModelCard) -> None:
        """Raises ApiError."""
        fields = Fields(body, KNOWN)
        self._echo = fields.switch("echo")
        prompts = _prompts(fields.value("prompt"), card)
        longest = max(map(len, prompts))
        if self._echo and longest > card.context:
            problem = f"prompt: has {longest} tokens, and with echo at most the context, {card.context}, are allowed"
            raise ApiError(400, problem, "prompt", "context_length_exceeded")
        super().__init__(fields, card, prompts, fields.alternatives("logprobs"))
        for request in self.requests:
            request.echo = self._echo
        self._offsets = [0] * len(self.requests)
        """Characters of each text so far."""
        self._begun = [False] * len(self.requests)

    def most_tokens(self, fields: Fields) -> int:
        return fields.whole("max_tokens", 16, 0, limits.MAX_TOKENS)

    def choice(self, index: int, event: Event) -> dict[str, Any]:
        first, self._begun[index] = not self._begun[index], True
        pieces = [*event.prompt, *event.pieces]
        found = {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "finish_reason": event.finish,
            "logprobs": None if self.alternatives is None else self._logprobs(index, pieces),
        }
        self._offsets[index] += len(found["text"])
        return found | self.extras(index, pieces, first)

    def _logprobs(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        offset, offsets, tops, top_ids = self._offsets[index], [], [], []
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
            best: dict[str, float] = {}
            found = self.likeliest(piece)
            for token, name, value in found:
                best[f"{name}<{token}>" if name in best else name] = value  # two tokens may have the same text
            tops.append(best)
            top_ids.append([token for token, _, _ in found])
        return {
            "tokens": self.names([piece.token for piece in pieces]),
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": tops,
            "top_token_ids": top_ids,
            "text_offset": offsets,
        }


def _prompts(value: Any, card: ModelCard) -> list[list[int]]:
    """The prompts in tokens. A text gets the separator before it, as in `generate`; tokens are taken as they are."""
    tokenizer = card.run.tokenizer
    if _is_prompt(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(map(_is_prompt, value)):
        allowed = "must be a text, a list of token ids, or a list of texts or of such lists"
        raise ApiError(400, f"prompt: {allowed}", "prompt")
    if len(value) > limits.MAX_TEXTS:
        raise ApiError(400, f"prompt: {len(value)} prompts; at most {limits.MAX_TEXTS} are allowed", "prompt")
    return [
        checked_prompt(
            [tokenizer.separator_id, *encoded(prompt, tokenizer, "prompt")] if isinstance(prompt, str) else prompt,
            tokenizer,
            "prompt",
        )
        for prompt in value
    ]


def _is_prompt(value: Any) -> bool:
    """Whether a value is a text or a list of token ids."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )
