"""/v1/chat/completions: a tuned model answers, in its role format (`data/chats.py`)."""

from typing import Any

from moe_jax.config import UserError
from moe_jax.data.chats import answer_prompt
from moe_jax.data.documents import ANSWERING, ROLES, Message
from moe_jax.inference.prompt_pass import MOST_ALTERNATIVES
from moe_jax.serving import limits
from moe_jax.serving.answers import Answer, checked_prompt
from moe_jax.serving.fields import COMMON, Fields, shown
from moe_jax.serving.limits import ApiError
from moe_jax.serving.model_card import ModelCard
from moe_jax.serving.texts import Event, Piece

KNOWN = COMMON | {"messages", "logprobs", "top_logprobs", "max_completion_tokens"}


class ChatCompletion(Answer):
    """Answers to a conversation."""

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
        fields = Fields(body, KNOWN)
        prompt = _prompt(fields.value("messages"), card)
        top = fields.whole("top_logprobs", 0, 0, MOST_ALTERNATIVES)
        alternatives = top if fields.switch("logprobs") else None
        if top and alternatives is None:
            raise ApiError(400, "top_logprobs: needs logprobs true", "top_logprobs")
        super().__init__(fields, card, [prompt], alternatives)
        self._begun = [False] * len(self.requests)

    def most_tokens(self, fields: Fields) -> int:
        name = "max_tokens" if fields.value("max_completion_tokens") is None else "max_completion_tokens"
        return fields.whole(name, 400, 1, limits.MAX_TOKENS)

    def choice(self, index: int, event: Event) -> dict[str, Any]:
        first, self._begun[index] = not self._begun[index], True
        delta: dict[str, str] = {"role": ANSWERING} if first else {}
        if event.pieces or first:
            delta["content"] = _text(event)
        return self._choice(index, event, first) | {"delta": delta}

    def whole_choice(self, index: int, event: Event) -> dict[str, Any]:
        return self._choice(index, event, first=True) | {"message": {"role": ANSWERING, "content": _text(event)}}

    def _choice(self, index: int, event: Event, first: bool) -> dict[str, Any]:
        logprobs = None if self.alternatives is None else {"content": [self._logprob(piece) for piece in event.pieces]}
        found = {"index": index, "finish_reason": event.finish, "logprobs": logprobs}
        return found | self.extras(index, event.pieces, first)

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        top = [self._entry(token, name, value) for token, name, value in self.likeliest(piece)]
        (name,) = self.names([piece.token])
        return self._entry(piece.token, name, piece.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, name: str, value: float | None) -> dict[str, Any]:
        raw = list(self.tokenizer.decode_bytes([token]))
        return {"token": name, "logprob": value, "bytes": raw, "token_id": token}


def _text(event: Event) -> str:
    return "".join(piece.text for piece in event.pieces)


def _prompt(value: Any, card: ModelCard) -> list[int]:
    """The tokens after which the model writes its answer. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: must be a list of objects with `role` and `content`", "messages")
    if len(value) > limits.MAX_MESSAGES:
        raise ApiError(400, f"messages: {len(value)}; at most {limits.MAX_MESSAGES} are allowed", "messages")
    turns = [_message(number, message) for number, message in enumerate(value)]
    tokenizer = card.run.tokenizer
    try:
        tokens = answer_prompt(tokenizer, turns)
    except (UserError, UnicodeEncodeError) as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    if len(tokens) >= card.context:
        problem = f"messages: have {len(tokens)} tokens with their roles, and the context {card.context}"
        raise ApiError(400, f"{problem}; shorten them", "messages", "context_length_exceeded")
    return checked_prompt(tokens, tokenizer, "messages")


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
