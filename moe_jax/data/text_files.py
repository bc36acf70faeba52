"""Documents read from text files, 1 MiB at a time.

- Documents are separated by `<|endoftext|>`. The bytes must be UTF-8.
- A document longer than 1 MiB, such as a whole book, is cut into parts of about 1 MiB. A cut is made at a blank line,
  else at a line end, else at a space. Each part is a document. So memory stays bounded, at the cost of one separator
  per MiB.
- A byte order mark of UTF-8 is skipped. Files of other kinds, such as gzip or UTF-16, are refused by their first bytes.
- A folder holds `train.txt` and `valid.txt`.
- A single file is split: the last 5 % of its documents, and at least one, are the validation split. A file with a
  single document is cut, by the rule above, between 90 and 95 % of its bytes; the part after the cut is the validation
  split.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.config import UserError

SEPARATOR = "<|endoftext|>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Windows programs write it at the start of a UTF-8 file. It is no text, and it is skipped."""
_KINDS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it with `gunzip`",
    b"PK\x03\x04": "is a zip archive; extract the text with `unzip`",
    b"BZh": "is compressed by bzip2; decompress it with `bunzip2`",
    b"\xfd7zXZ\x00": "is compressed by xz; decompress it with `unxz`",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it with `unzstd`",
    b"PAR1": "is a Parquet file; write its column of texts into a text file",
    b"ARROW1": "is an Arrow file; write its column of texts into a text file",
    b"\x89HDF": "is an HDF5 file; write its texts into a text file",
    b"%PDF": "is a PDF; extract its text with `pdftotext`",
    b"SQLite format 3\x00": "is an SQLite database; write its texts into a text file",
    b"\xff\xfe": "is in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}
"""How a file begins that is no text in UTF-8 -> what it is, and what to do."""
_JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
SplitName = Literal["train", "valid"]

_SEPARATOR = SEPARATOR.encode()
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST = 1 << 20  # a document of more bytes is cut


@dataclass(frozen=True)
class Span:
    """The bytes [start, stop) of a file."""

    path: Path
    start: int
    stop: int

    @classmethod
    def of(cls, path: Path) -> "Span":
        """All bytes of a file, but for a byte order mark."""
        with path.open("rb") as file:
            marked = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        return cls(path, len(BYTE_ORDER_MARK) if marked else 0, path.stat().st_size)


@dataclass(frozen=True)
class FileCorpus:
    """Text files as a `corpora.Corpus`."""

    name: str
    spans: dict[str, Span]

    @classmethod
    def open(cls, name: str) -> "FileCorpus":
        """The corpus of a folder or a file. A single file is read once, to find where its validation part begins."""
        path = Path(name)
        if path.is_dir():
            return cls(name, {"train": Span.of(path / "train.txt"), "valid": Span.of(path / "valid.txt")})
        whole = Span.of(path)
        cut = max(whole.start, validation_start(path))
        return cls(name, {"train": Span(path, whole.start, cut), "valid": Span(path, cut, whole.stop)})

    def documents(self, split: SplitName) -> Iterator[str]:
        return self.reading().documents(split)

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the file. The path is not included."""
        return self.reading().fingerprint()

    def reading(self) -> "FileReading":
        return FileReading(self)

    def size(self, split: SplitName) -> int | None:
        return self.spans[split].stop - self.spans[split].start


class FileReading:
    """One pass over a `FileCorpus`, which digests the bytes as it reads them. Each split can be read once, in order."""

    def __init__(self, corpus: FileCorpus) -> None:
        import xxhash

        self.name, self._corpus, self._digest = corpus.name, corpus, xxhash.xxh3_128()
        self._unread = {split: self._read(span) for split, span in corpus.spans.items()}

    def _read(self, span: Span) -> Iterator[bytes]:
        self._digest.update(f"{span.start}-{span.stop};".encode())
        for chunk in _read_chunks(span):
            self._digest.update(chunk)
            yield chunk

    def documents(self, split: SplitName) -> Iterator[str]:
        for earlier, chunks in self._unread.items():
            if earlier == split:
                span = self._corpus.spans[split]
                found = (document for _, document in _documents(span, chunks))
                yield from refuse_empty(found, f"{span.path} ({split})")
                return
            deque(chunks, maxlen=0)

    def fingerprint(self) -> str:
        """`FileCorpus.fingerprint` of what was read. Reads what is left."""
        for chunks in self._unread.values():
            deque(chunks, maxlen=0)
        return self._digest.hexdigest()

    def reading(self) -> "FileReading":
        return self

    def size(self, split: SplitName) -> int | None:
        return self._corpus.size(split)


def other_kind(path: Path) -> str | None:
    """What a file is that is not plain text in UTF-8, and what to do about it. None if it looks like text."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror}); check its permissions"
    for mark, problem in _KINDS.items():
        if start.startswith(mark):
            return problem
    if path.name.lower().endswith(_JSON_ENDINGS) and start.lstrip()[:1] in (b"{", b"["):
        return f"holds JSON, not plain text; write its texts into a file, separated by {SEPARATOR}"
    return None


def read_documents(span: Span, what: str) -> Iterator[str]:
    """The documents of a span, stripped and not empty. Raises UserError if there is no document, or if the bytes are
    not UTF-8."""
    return refuse_empty((document for _, document in _documents(span, _read_chunks(span))), what)


def refuse_empty(documents: Iterable[str], what: str) -> Iterator[str]:
    """The same documents. Raises UserError after the last one if there was none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise UserError(f"{what}: there is no text in it; give a longer one with --data")


def cut_long(text: bytes) -> Iterator[bytes]:
    """The text in parts of about 1 MiB. No cut falls into the last 13 bytes, because they may hold the beginning of a
    separator."""
    while len(text) >= _LONGEST + len(_SEPARATOR):
        cut = _last_boundary(text, _LONGEST - _LONGEST // 16, _LONGEST)
        yield text[:cut]
        text = text[cut:]
    yield text


def validation_start(path: Path) -> int:
    """The offset at which the validation part of a single file begins."""
    span = Span.of(path)
    starts, end = array("q"), -1  # offsets of the documents; the parts of a long document count as one
    for offset, piece in _read_pieces(span, _read_chunks(span)):
        if offset != end and piece.strip():
            starts.append(offset)
        end = offset + len(piece)
    if len(starts) >= 2:
        return starts[-max(1, len(starts) // 20)]
    twentieth = span.stop // 20
    window = min(max(twentieth, 64), span.stop - twentieth, _CHUNK)
    start = span.stop - twentieth - window
    text = b"".join(_read_chunks(Span(path, start, start + window + 1)))
    return start + _last_boundary(text, 0, window)


def _read_chunks(span: Span) -> Iterator[bytes]:
    try:
        with span.path.open("rb") as file:
            file.seek(span.start)
            left = span.stop - span.start
            while left and (chunk := file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(f"{span.path}: cannot be read ({error.strerror}); check the file and its permissions") from None


def _read_pieces(span: Span, chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each piece of text between separators. A long piece is cut by `cut_long`."""
    rest, offset = b"", span.start  # bytes not yet given out, and where they begin
    for chunk in chunks:
        *pieces, rest = (rest + chunk).split(_SEPARATOR)
        for piece in pieces:
            for part in cut_long(piece):
                yield offset, part
                offset += len(part)
            offset += len(_SEPARATOR)
        *parts, rest = cut_long(rest)
        for part in parts:
            yield offset, part
            offset += len(part)
    yield offset, rest


def _documents(span: Span, chunks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(offset of the piece that holds it, document), for every piece of the span's chunks that is not blank."""
    for offset, piece in _read_pieces(span, chunks):
        try:
            document = piece.decode().strip()
        except UnicodeDecodeError as error:
            where = f"{span.path}: not UTF-8 at byte {offset + error.start} ({error.reason})"
            raise UserError(f"{where}; convert the file to UTF-8") from None
        if document:
            yield offset, document


def _last_boundary(text: bytes, low: int, high: int) -> int:
    """Where to cut a text: after the last blank line in [low, high], else after the last line end, else after the last
    space, else at `high`. If `high` is inside a character, up to 3 bytes before it, where the character begins."""
    for mark in (b"\n\n", b"\n", b" "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    for cut in range(high, max(high - 4, 0), -1):
        if cut == len(text) or text[cut] & 0xC0 != 0x80:  # no second, third or fourth byte of a character
            return cut
    return high
