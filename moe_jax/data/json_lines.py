"""Documents read from JSON lines: one object a line, whose key `text` holds a document.

A text longer than 1 MiB is cut into several documents, as in a text file (`text_files.py`). Blank lines are skipped.
Rows with `messages` are conversations, and are refused: a model of plain text would learn the names of their roles.
The command `sft` reads them (`chats.py`).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_jax.config import UserError
from moe_jax.data.text_files import Span, cut_long, read_chunks

ENDINGS = (".jsonl", ".ndjson")
"""Files of these names hold JSON lines."""
LONGEST_LINE = 1 << 26
"""Bytes. A longer line is refused, because it would be held in memory."""


def holds_json_lines(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def line_starts(span: Span) -> Iterator[int]:
    """The offset of each line that is not blank."""
    return (offset for offset, line in lines_of(span, read_chunks(span)) if line.strip())


def json_documents(span: Span, chunks: Iterable[bytes]) -> Iterator[str]:
    """The texts of the rows in a span's chunks, stripped and not empty. Raises UserError for a row without a text."""
    for offset, line in lines_of(span, chunks):
        if not line.strip():
            continue
        problem, text = _read(line)
        if problem:
            raise UserError(f"{span.path}: line {line_number(span.path, offset)} {problem}")
        for part in cut_long(text.encode()):
            if document := part.decode().strip():
                yield document


def first_row_problem(path: Path) -> str | None:
    """What is wrong with the first row of a file, in one line. None if it has a text."""
    try:
        line = next((line for _, line in first_lines(path) if line.strip()), b"")
    except UserError as error:
        return str(error)
    problem = _read(line)[0] if line else ""
    return f"its first row {problem}" if problem else None


def how_to_convert(line: bytes) -> str:
    """The program that makes JSON lines of a file whose line opens an array, or an object of several lines. Empty for
    another line."""
    if line.startswith(b"["):
        return " (`jq -c '.[]' FILE > NEW.jsonl` converts a file that holds one array)"
    return " (`jq -c . FILE > NEW.jsonl` writes each object on one line)" if line.strip() == b"{" else ""


def first_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the lines of a file, from the first."""
    span = Span.of(path)
    return lines_of(span, read_chunks(span))


def _read(line: bytes) -> tuple[str, str]:
    """What is wrong with a row ("" if nothing is), and its text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error}); each line must be an object with a key `text`"
        return problem + how_to_convert(line), ""
    if not isinstance(row, dict):
        problem = f"is {repr(row)[:40]}; each line must be an object with a key `text`"
        return problem + how_to_convert(line), ""
    text = row.get("text")
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return "holds half a surrogate pair (\\ud800 to \\udfff); write whole characters", ""
        return "", text
    if "messages" in row:
        return (
            "holds `messages`, a conversation; `uv run python -m moe_jax sft` learns from those, training needs rows "
            "with `text`"
        ), ""
    names = ", ".join(list(row)[:5]) or "none"
    return f"has no key `text` that holds a text (its keys: {names}); rename the key of the text", ""


def line_number(path: Path, offset: int) -> int:
    """The number of the line that begins at an offset, from 1. Only for an error: it reads the file again."""
    with path.open("rb") as file:
        count, left = 1, offset
        while left and (chunk := file.read(min(1 << 20, left))):
            left -= len(chunk)
            count += chunk.count(b"\n")
        return count


def lines_of(span: Span, chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each line of a span's chunks, without line ends."""
    rest, offset = [], span.start
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for following in others:
            line = b"".join(rest)
            yield offset, line
            offset += len(line) + 1
            rest = [following]
        if sum(map(len, rest)) > LONGEST_LINE:
            raise UserError(f"{span.path}: the line at byte {offset} is longer than {LONGEST_LINE >> 20} MiB; cut it")
    yield offset, b"".join(rest)
