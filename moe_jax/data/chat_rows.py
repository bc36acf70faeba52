"""Conversations as rows of JSON lines: `{"messages": [{"role": "user", "content": "..."}, ...]}`.

The roles are system, user and assistant. Contents are stripped. A row of another form is refused with the number of its
line. Importing this module imports only the standard library, as `corpora.py` needs it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from moe_jax.config import Role, UserError
from moe_jax.data.json_lines import ENDINGS, first_lines, holds_json_lines, how_to_convert, line_number, lines_of
from moe_jax.data.text_files import Span
from moe_jax.system.errors import shortened

ROLES: tuple[Role, ...] = get_args(Role)
ANSWERING: Role = "assistant"
_KEYS = {"role", "content"}


class Message(NamedTuple):
    """One turn of a conversation. Its content is stripped and not empty."""

    role: Role
    content: str


type Conversation = tuple[Message, ...]


def conversations(span: Span, chunks: Iterable[bytes]) -> Iterator[Conversation]:
    """The conversations of the rows in a span's chunks. Blank lines are skipped. Raises UserError for another row."""
    for offset, line in lines_of(span, chunks):
        if line.strip():
            problem, found = _read(line)
            if problem:
                raise UserError(f"{span.path}: line {line_number(span.path, offset)}{problem}")
            yield found


def first_chat_problem(path: Path) -> str | None:
    """What is wrong with the first row of a file, in one line. None if it is a conversation."""
    try:
        line = next((line for _, line in first_lines(path) if line.strip()), b"")
    except UserError as error:
        return str(error)
    problem = _read(line)[0] if line else ""
    return f"its first row{problem}" if problem else None


def holds_chats(path: Path) -> bool:
    """Whether a file, or the first of a folder's files, is JSON lines with `messages`."""
    try:
        files = sorted(p for e in ENDINGS for p in path.rglob(f"*{e}")) if path.is_dir() else [path]
        if not files or not holds_json_lines(files[0]):
            return False
        line = next((line for _, line in first_lines(files[0]) if line.strip()), b"")
        row = json.loads(line)
    except (OSError, ValueError, RecursionError, UserError):
        return False
    return isinstance(row, dict) and "messages" in row


def _read(line: bytes) -> tuple[str, Conversation]:
    """What is wrong with a row ("" if nothing is), and its conversation."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f" is not JSON ({error}); each line must be an object with a key `messages`"
        return problem + how_to_convert(line), ()
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        problem = f" has no list `messages` ({_short(row)}); each line must be an object with that key"
        return problem + (how_to_convert(line) if isinstance(row, list) else ""), ()
    if not row["messages"]:
        return " has no message; remove the row", ()
    found: list[Message] = []
    for number, message in enumerate(row["messages"], 1):
        problem = _problem(message)
        if problem:
            return f", message {number} {problem}", ()
        found.append(Message(message["role"], message["content"].strip()))
    if not any(message.role == ANSWERING for message in found):
        return " has no message of the assistant, so there is nothing to learn; remove the row", ()
    return "", tuple(found)


def _problem(message: Any) -> str:
    """What is wrong with a message, "" if nothing is."""
    if not isinstance(message, dict):
        return f"is {_short(message)}; it must be an object with `role` and `content`"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {_short(role)}; it must be one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"has the content {_short(content)}; it must be a text"
    if not content.strip():
        return "is empty; remove it"
    further = sorted(key for key, value in message.items() if key not in _KEYS and value is not None)
    if further:
        return (
            f"has the key {_short(further[0])}, which would be ignored; only `role` and `content` can be learned from"
        )
    try:
        content.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair (\\ud800 to \\udfff); write whole characters"
    return ""


def _short(value: Any) -> str:
    return shortened(repr(value), 40)


def text_size(conversation: Conversation) -> int:
    """UTF-8 bytes of all contents."""
    return sum(len(message.content.encode()) for message in conversation)
