"""Documents in files, read without ever holding a whole file.

- Text files hold documents separated by `<|endoftext|>`, in UTF-8. A byte order mark is skipped. A document longer than
  1 MiB, such as a whole book, is divided into parts of about 1 MiB: at a blank line, else at a line end, else at a
  space. Each part is a document. So memory stays bounded, at the cost of one separator per MiB.
- Files that end in .jsonl or .ndjson hold JSON lines: one object a line, whose key `text` is a document.
- A file whose name ends in .gz as well is decompressed while it is read. Its offsets are those of the text.
- With the format `chat`, the key `messages` of such a line is a conversation, `[{"role": ..., "content": ...}, ...]`.
  The roles are system, user and assistant.

Importing this module imports only the standard library, so that a wrong text is refused before jax is loaded.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from moe_jax.config import DataFormat, Role, UserError

SEPARATOR = "<|endoftext|>"
TEXTS, JSON_LINES = (".txt", ".md"), (".jsonl", ".ndjson")
SplitName = Literal["train", "valid"]
ROLES: tuple[Role, ...] = get_args(Role)
ANSWERING: Role = "assistant"

_SEPARATOR = SEPARATOR.encode()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 20  # a document of more bytes is divided
_WANTED: dict[DataFormat, str] = {
    "text": "must be an object whose key `text` holds a text; `sft` learns from conversations (`messages`)",
    "chat": "must have `messages`, each with a `role` (system, user or assistant), a `content` that is not empty, and "
    "no other key, and at least one of the assistant",
}


@dataclass(frozen=True)
class Span:
    """The bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int

    @classmethod
    def of(cls, path: Path) -> "Span":
        """All bytes of a file, except for a byte order mark."""
        with _opened(path) as file:
            marked = file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK
            size = path.stat().st_size
            if path.suffix.lower() == ".gz":
                size = len(_BYTE_ORDER_MARK) + sum(map(len, iter(lambda: file.read(_CHUNK), b"")))
        return cls(path, len(_BYTE_ORDER_MARK) if marked else 0, size)

    @property
    def is_json(self) -> bool:
        return ending(self.path) in JSON_LINES

    def chunks(self) -> Iterator[bytes]:
        """The bytes, up to 1 MiB at a time. Raises UserError if the file cannot be read."""
        with _opened(self.path) as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk


class Message(NamedTuple):
    """One turn of a conversation. Its content is stripped and not empty."""

    role: Role
    content: str


type Conversation = tuple[Message, ...]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to be read. Raises UserError if it cannot be opened, or later if it cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # pyright: ignore[reportReturnType]
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({cause}); check the file and its permissions") from None


def ending(path: Path) -> str:
    """The end of a file's name, in small letters and without .gz: ".txt"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def documents_of(span: Span, form: DataFormat) -> Iterator[Any]:
    """The documents of a span: texts, stripped and not empty, or conversations. Raises UserError for bytes that are not
    UTF-8, and for a row that is neither."""
    if form == "chat":
        yield from (_row(span, offset, line, form) for offset, line in lines(span))
    elif span.is_json:
        texts = (_row(span, offset, line, form) for offset, line in lines(span))
        yield from (document for text in texts for document in divided(text))
    else:
        for offset, piece in _pieces(span):
            try:
                document = piece.decode().strip()
            except UnicodeDecodeError as error:
                at = f"{span.path}: not UTF-8 at byte {offset + error.start}"
                raise UserError(f"{at}; decompress it, or save it again as plain text in UTF-8") from None
            if document:
                yield document


def document_starts(span: Span) -> Iterator[int]:
    """The offset of each document. The parts of a long document count as one."""
    if span.is_json:
        yield from (offset for offset, _ in lines(span))
        return
    end = -1
    for offset, piece in _pieces(span):
        if offset != end and piece.strip():
            yield offset
        end = offset + len(piece)


def divided(text: str) -> Iterator[str]:
    """The stripped parts of a text that may be long."""
    return (document for part in _divided(text.encode()) if (document := part.decode().strip()))


def last_part_start(span: Span) -> int:
    """Where the last 5 to 10 % of a span's bytes begin, at a boundary of the text."""
    twentieth = span.stop // 20
    window = min(max(twentieth, 64), span.stop - twentieth, _CHUNK)
    start = span.stop - twentieth - window
    text = b"".join(Span(span.path, start, start + window + 1).chunks())
    return start + _last_boundary(text, 0, window)


def lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each line that is not blank."""
    with _opened(span.path) as file:
        file.seek(span.start)
        offset = span.start
        while offset < span.stop and (line := file.readline()):
            if line.strip():
                yield offset, line
            offset += len(line)


def _pieces(span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each piece of text between separators; a long one in parts (`_divided`)."""
    rest, offset = b"", span.start  # bytes not yet given out, and where they begin
    for chunk in chain(span.chunks(), [_SEPARATOR]):  # the end of the text ends a document too
        *pieces, rest = (rest + chunk).split(_SEPARATOR)
        for piece in pieces:
            for part in _divided(piece):
                yield offset, part
                offset += len(part)
            offset += len(_SEPARATOR)
        # The last 12 bytes may begin a separator. Without them, the piece must be long enough to be divided.
        *parts, rest = _divided(rest, spare=len(_SEPARATOR) - 1)
        for part in parts:
            yield offset, part
            offset += len(part)


def _divided(text: bytes, spare: int = 0) -> Iterator[bytes]:
    """The text in parts of about 1 MiB. The last part has fewer than 1 MiB + 13 + `spare` bytes."""
    while len(text) >= _LONGEST + len(_SEPARATOR) + spare:
        end = _last_boundary(text, _LONGEST - _LONGEST // 16, _LONGEST)
        yield text[:end]
        text = text[end:]
    yield text


def _last_boundary(text: bytes, low: int, high: int) -> int:
    """Where to divide a text: after the last blank line in [low, high], else after the last line end, else after the
    last space, else at `high`. If `high` is inside a character, up to 3 bytes before it, where the character begins."""
    for mark in (b"\n\n", b"\n", b" "):
        place = text.rfind(mark, low, high)
        if place >= 0:
            return place + len(mark)
    for end in range(high, max(high - 4, 0), -1):
        if end == len(text) or text[end] & 0xC0 != 0x80:  # no second, third or fourth byte of a character
            return end
    return high


def _row(span: Span, offset: int, line: bytes, form: DataFormat) -> Any:
    """The text or the conversation in a line. Raises UserError with the number of the line."""
    try:
        row = json.loads(line)
        if form == "chat":
            conversation = tuple(map(_message, row["messages"]))
            if not any(message.role == ANSWERING for message in conversation):
                raise ValueError
            return conversation
        row["text"].encode()
        return row["text"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        number = 1 + sum(chunk.count(b"\n") for chunk in Span(span.path, 0, offset).chunks())
        raise UserError(f"{span.path}: line {number}: {_WANTED[form]}") from None


def _message(values: dict[str, Any]) -> Message:
    """A turn. Keys whose value is null do not count. Raises ValueError, or what Python raises, for anything else."""
    known = {key: value for key, value in values.items() if value is not None}
    message = Message(known["role"], known["content"].strip())
    if message.role not in ROLES or not message.content.encode() or len(known) != len(message):
        raise ValueError
    return message
