"""Documents in files: what is a document, where a long one is divided, and what is no text."""

import json
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_jax.config import UserError
from moe_jax.data import documents
from moe_jax.data.documents import SEPARATOR, Message, Span, document_starts, documents_of, last_part_start

ANY_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, content: bytes | str, name: str = "text.txt") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def read(path: Path) -> list[str]:
    return list(documents_of(Span.of(path), "text"))


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


# Text


@given(
    texts=st.lists(st.text(st.sampled_from("a é😀\n <|endoftext>"), max_size=12), max_size=9), chunk=st.integers(1, 40)
)
@ANY_FOLDER
def test_documents_are_what_lies_between_separators(tmp_path: Path, texts: list[str], chunk: int) -> None:
    """However the reads fall on separators and characters. The alphabet spells parts of a separator."""
    text = SEPARATOR.join(texts)
    with patch.object(documents, "_CHUNK", chunk):
        assert read(write(tmp_path, text)) == [part.strip() for part in text.split(SEPARATOR) if part.strip()]


@given(
    words=st.lists(st.sampled_from(["a", "é", "😀", "\n", " ", "aaaaaaaaaa", SEPARATOR, "<|end"]), max_size=60),
    chunk=st.integers(1, 64),
)
@example(words=["a" * 27, SEPARATOR, "b"], chunk=1)  # 32 bytes end within the separator
@ANY_FOLDER
def test_a_long_document_is_divided_and_only_white_space_is_lost(tmp_path: Path, words: list[str], chunk: int) -> None:
    """Nor is a separator divided in two, and where a document is divided does not depend on the reads."""
    text = "".join(["x", *words])
    path = write(tmp_path, text)
    with patch.object(documents, "_LONGEST", 32):
        whole = read(path)
        with patch.object(documents, "_CHUNK", chunk):
            parts = read(path)
    assert parts == whole
    assert "".join("".join(parts).split()) == "".join(text.replace(SEPARATOR, "").split())
    assert all(len(part.encode()) < 32 + len(SEPARATOR) for part in parts)


@pytest.mark.parametrize(
    ("size", "mark", "start"),
    [
        *((2000, mark, start) for mark, start in ((1798, 1900), (1799, 1801), (1850, 1852), (1898, 1900))),
        *((size, None, start) for size, start in ((1, 1), (19, 19), (20, 19), (30, 29), (100, 95), (2000, 1900))),
    ],
)
def test_the_last_part_begins_at_a_blank_line_between_90_and_95_percent(
    size: int, mark: int | None, start: int, tmp_path: Path
) -> None:
    text = bytearray(b"a" * size)
    if mark is not None:
        text[mark : mark + 2] = b"\n\n"
    assert last_part_start(Span.of(write(tmp_path, bytes(text)))) == start


def test_reading_takes_bounded_memory(tmp_path: Path) -> None:
    """16 MB in documents of 1 KB, and 16 MB in one piece."""
    for text in (("x " * 500 + SEPARATOR) * 16_000, "word word " * 1_600_000):
        path, size = write(tmp_path, text), len(text)
        del text
        tracemalloc.start()
        assert sum(len(document) for document in documents_of(Span.of(path), "text")) > 0.9 * size
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 9e6


def test_bytes_that_are_not_utf8_are_named_by_their_offset(tmp_path: Path) -> None:
    path = write(tmp_path, f"Fine.{SEPARATOR}Good.{SEPARATOR}caf".encode() + b"\xe9!")
    with patch.object(documents, "_CHUNK", 10), pytest.raises(UserError, match=f"^{path}: not UTF-8 at byte 39;"):
        read(path)


# JSON lines


@given(texts=st.lists(st.text(st.sampled_from('a é😀\n\r"\\<|endoftext|>'), max_size=20), max_size=30))
@ANY_FOLDER
def test_rows_of_json_are_documents(tmp_path: Path, texts: list[str]) -> None:
    """A separator in a row is text: the row is what ends a document. Blank lines are skipped."""
    file = write(tmp_path, rows(*texts).replace("\n", "\n\n", 3), "rows.jsonl")
    assert read(file) == [text.strip() for text in texts if text.strip()]
    content = file.read_bytes()
    assert all(content[start:].startswith(b'{"text"') for start in document_starts(Span.of(file)))


def chat(*turns: tuple[object, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD_CHAT = chat(("user", "Hi"), ("assistant", "Yes"))
BAD_ROWS = [
    ("text", GOOD_CHAT),
    ("text", '{"story": "x", "id": 1}'),
    ("text", '["a"]'),
    ("text", "{"),
    ("text", '{"text": "\\ud800"}'),
    ("chat", '{"messages": []}'),
    ("chat", '{"messages": "a"}'),
    ("chat", chat(("user", "a"))),
    ("chat", chat(("robot", "a"), ("assistant", "b"))),
    ("chat", chat(("user", 3), ("assistant", "b"))),
    ("chat", '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}'),
    ("chat", chat(("assistant", " "))),
    ("chat", chat(("assistant", "\ud800"))),
]


@pytest.mark.parametrize(("form", "row"), BAD_ROWS)
def test_a_wrong_row_is_refused_with_its_line(form, row: str, tmp_path: Path) -> None:
    good = GOOD_CHAT if form == "chat" else '{"text": "a tale"}'
    file = write(tmp_path, f"{good}\n\n{row}\n{good}\n", "rows.jsonl")
    said = "must have `messages`" if form == "chat" else "must be an object whose key `text` holds a text"
    with pytest.raises(UserError, match=f"^{file}: line 3: {said}"):
        list(documents_of(Span.of(file), form))


def test_rows_with_messages_are_conversations(tmp_path: Path) -> None:
    file = write(tmp_path, f"\n{chat(('user', ' Hi '), ('assistant', 'Yes'))}\n", "a.jsonl")
    assert list(documents_of(Span.of(file), "chat")) == [(Message("user", "Hi"), Message("assistant", "Yes"))]


# Files of other kinds


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/gone.txt: cannot be read \(No such file .*check the file"):
        list(documents_of(Span(tmp_path / "gone.txt", 0, 5), "text"))
