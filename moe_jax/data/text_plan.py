"""How a text of many gigabytes is divided: into parts of about 128 MiB, each of which becomes one shard of tokens.

A part is a range of whole documents, in the order of the text. Each part has a digest of its bytes. So parts can be
tokenized side by side and in any order, a finished part can be told from an unfinished one, and an edit of the text
while it is tokenized is noticed. A plan is made by reading the text once.

Importing this module imports only the standard library.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import DataFormat, UserError
from moe_jax.data.chat_rows import conversations
from moe_jax.data.json_lines import holds_json_lines, json_documents, lines_of
from moe_jax.data.text_files import Span, SplitName, piece_starts, read_chunks, text_documents

PART_BYTES = 1 << 27
"""A part ends with the document in which it reaches this size, in bytes of the files."""

type Spans = tuple[Span, ...]


@dataclass(frozen=True)
class TextPart:
    """Consecutive documents of one split: what one shard is made of (`corpora.Part`)."""

    source: str
    """The value of `--data`, for messages."""
    form: DataFormat
    spans: Spans
    key: str
    """xxh3-128 of the bytes."""

    @classmethod
    def of(cls, source: str, form: DataFormat, spans: Spans) -> "TextPart":
        """Reads the spans once."""
        digest = new_digest()
        for span in spans:
            for chunk in read_chunks(span):
                digest.update(chunk)
        return cls(source, form, spans, digest.hexdigest())

    def documents(self) -> Iterator[Any]:
        """The documents. Raises UserError after the last one if the bytes were not those of the plan."""
        digest = new_digest()

        def digested(span: Span) -> Iterator[bytes]:
            for chunk in read_chunks(span):
                digest.update(chunk)
                yield chunk

        for span in self.spans:
            yield from documents_of(span, digested(span), self.form)
        if digest.hexdigest() != self.key:
            raise changed(self.source)

    def skip(self) -> None:
        """Go on to the next part. Nothing needs to be read for that."""

    def to_dict(self) -> dict[str, Any]:
        """The part as a dict for JSON, which another process reads."""
        spans = [(str(span.path), span.start, span.stop) for span in self.spans]
        return {"source": self.source, "form": self.form, "spans": spans, "key": self.key}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextPart":
        spans = tuple(Span(Path(path), start, stop) for path, start, stop in values["spans"])
        return cls(values["source"], values["form"], spans, values["key"])


@dataclass(frozen=True)
class TextPlan:
    """The parts of a text, and the digest of all of it."""

    fingerprint: str
    """xxh3-128 of the bytes of both splits and of their offsets in the files. The paths are not included."""
    parts: dict[SplitName, tuple[TextPart, ...]]

    @classmethod
    def of(cls, source: str, form: DataFormat, spans: dict[SplitName, Spans]) -> "TextPlan":
        """Reads a split once, and once more if it has several parts. Raises UserError if a file cannot be read."""
        digest, bytes_only = new_digest(), new_digest()

        def starts(span: Span) -> Iterator[int]:
            kind = "chats;" if form == "chat" else "lines;" if holds_json_lines(span.path) else ""
            digest.update(f"{span.start}-{span.stop};{kind}".encode())
            yield from _starts(span, digested(span))

        def digested(span: Span) -> Iterator[bytes]:
            for chunk in read_chunks(span):
                digest.update(chunk)
                bytes_only.update(chunk)
                yield chunk

        parts: dict[SplitName, tuple[TextPart, ...]] = {}
        for split, files in spans.items():
            if len(files) != 1:  # a file that moves to the other split changes the digest
                digest.update(f"{len(files)} files;".encode())
            bytes_only.reset()
            ranges = [*_divided((span, starts(span)) for span in files)]
            if len(ranges) == 1:
                parts[split] = (TextPart(source, form, ranges[0], bytes_only.hexdigest()),)
            else:
                parts[split] = tuple(TextPart.of(source, form, inner) for inner in ranges)
        return cls(digest.hexdigest(), parts)


def documents_of(span: Span, chunks: Iterable[bytes], form: DataFormat) -> Iterator[Any]:
    """The documents in a span's chunks."""
    if form == "chat":
        return conversations(span, chunks)
    return (json_documents if holds_json_lines(span.path) else text_documents)(span, chunks)


def changed(source: str) -> UserError:
    return UserError(f"--data {source}: the text was changed while it was read; start again")


def _starts(span: Span, chunks: Iterable[bytes]) -> Iterator[int]:
    """Offsets of the documents. There a span may be divided without a change to any document."""
    if holds_json_lines(span.path):
        return (offset for offset, line in lines_of(span, chunks) if line.strip())
    return piece_starts(span, chunks)


def _divided(files: Iterable[tuple[Span, Iterator[int]]]) -> Iterator[Spans]:
    """The spans of each part. Files are given with the offsets of their documents. There is at least one part. Every
    part has a document, unless there is none at all."""
    held: list[Span] = []
    size, holds_document = 0, False
    for span, starts in files:
        begin = span.start
        for offset in starts:
            if holds_document and size + offset - begin >= PART_BYTES:
                yield (*held, Span(span.path, begin, offset))
                held, size, begin = [], 0, offset
            holds_document = True
        held.append(Span(span.path, begin, span.stop))
        size += span.stop - begin
    yield tuple(held)


def new_digest(content: bytes = b"") -> Any:
    """xxh3-128. The library is imported here, because this module may import only the standard library."""
    import xxhash

    return xxhash.xxh3_128(content)
