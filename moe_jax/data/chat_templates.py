"""The chat template of a public model: a Jinja program that writes a conversation as one text.

The model has learned conversations in this form, so `chat`, `serve` and `sft` use it for a run that came from such a
model. The tokenizer reads the special tokens of the text. A special token that is spelled out inside a message loses
its last character, so no message can end its turn or begin another.

A template is a stranger's program. It runs in the sandbox of jinja2, as in transformers: it reaches no file and no
Python object. It may take any time and memory. Whatever goes wrong is one line.
"""

import json
import re
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from moe_jax.config import UserError
from moe_jax.data.documents import ANSWERING, Message
from moe_jax.data.hf_tokenizers import library_of, one_line

_PROBLEM = "the model's chat template cannot write this conversation"


def template_in(settings: dict[str, Any], file: str) -> str | None:
    """The template of a folder: the content of chat_template.jinja, or the field of tokenizer_config.json, of which
    one may be a list of named templates."""
    field = file or settings.get("chat_template")
    if isinstance(field, list):
        field = next((one["template"] for one in field if one["name"] == "default"), None)
    return field if isinstance(field, str) else None


class ChatTemplate:
    """A template with the tokenizer of its model."""

    def __init__(self, text: str, file: str, settings: str, separator: int) -> None:
        """`file` and `settings` are the texts of tokenizer.json and tokenizer_config.json."""
        self.text = text
        self._file, self._settings, self._separator = file, settings, separator

    def prompt(self, chat: Sequence[Message]) -> list[int]:
        """The tokens after which the model writes the assistant's next content."""
        return self._ids(self.render(chat, prompts=True))

    def encode(self, chat: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A conversation in tokens, and which of them are learned: each answer, up to the token that ends it."""
        whole = self._ids(self.render(chat))
        learned = [False] * len(whole)
        for number in (n for n, message in enumerate(chat) if message.role == ANSWERING):
            before, after = self.prompt(chat[:number]), self._ids(self.render(chat[: number + 1]))
            if whole[: len(before)] != before or len(after) <= len(before):
                raise UserError(
                    "the chat template writes the beginning of a conversation otherwise once it goes on, so an answer "
                    "has no place of its own; tune on conversations of one answer"
                )
            answer = whole[len(before) : len(after)]
            size = answer.index(self._separator) + 1 if self._separator in answer else len(answer)
            learned[len(before) : len(before) + size] = [True] * size
        return whole, learned

    def render(self, chat: Sequence[Message], prompts: bool = False) -> str:
        """The text of a conversation. With `prompts` it ends where the assistant's next content begins. Raises
        UserError."""
        program, variables = self._program
        messages = [{"role": message.role, "content": self._harmless(message.content)} for message in chat]
        with one_line(_PROBLEM):
            return program.render(messages=messages, add_generation_prompt=prompts, **variables)

    @cached_property
    def _program(self) -> tuple[Any, dict[str, Any]]:
        """The compiled template, and what it may read beside the messages."""
        with one_line(_PROBLEM):
            settings = json.loads(self._settings or "{}")
            tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
            texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
            special = {name: text for name, text in texts.items() if isinstance(text, str)}
            return _environment().from_string(self.text), {"tools": None, "documents": None, **special}

    @cached_property
    def _library(self) -> Any:
        """A tokenizer of its own, which reads special tokens: that of documents takes them for text."""
        library = library_of(self._file)
        library.encode_special_tokens = False
        return library

    @cached_property
    def _special(self) -> set[str]:
        return {token.content for token in self._library.get_added_tokens_decoder().values() if token.special} - {""}

    def _harmless(self, content: str) -> str:
        """The content without the last character of each special token, also of one that this brings about.

        What is kept never ends with a special token. The time is proportional to the length.
        """
        if not any(token in content for token in self._special):
            return content
        sizes = sorted({len(token) for token in self._special})
        ends = "".join(re.escape(end) for end in sorted({token[-1] for token in self._special}))
        kept, tail = [], ""
        for piece in re.split(f"([{ends}])", content):
            longer = tail + piece
            if not any(longer[-size:] in self._special for size in sizes):
                kept.append(piece)
                tail = longer[-sizes[-1] :]
        return "".join(kept)

    def _ids(self, text: str) -> list[int]:
        with one_line():
            return self._library.encode(text, add_special_tokens=False).ids


def _environment() -> Any:
    """jinja2's sandbox, with what templates for transformers use. Raises UserError if jinja2 is not installed."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(
            "the model's chat template needs jinja2, which is missing; run `uv run --extra templates moe-jax ...`"
        ) from None

    class Generation(Extension):
        """`{% generation %}` marks what the assistant writes. The text is the same without it."""

        tags = {"generation"}  # noqa: RUF012, as jinja2 has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return sandbox
