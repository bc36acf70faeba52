"""Documents read from text files, 1 MiB at a time.

- Documents are separated by `<|endoftext|>`. The bytes must be UTF-8.
- A document longer than 1 MiB, such as a whole book, is cut into parts of about 1 MiB. A cut is made at a blank line,
  else at a line end, else at a space. Each part is a document. So memory stays bounded, at the cost of one separator
  per MiB.
- A folder holds `train.txt` and `valid.txt`.
- A single file is split: the last 5 % of its documents, and at least one, are the validation split. A file with a
  single document is cut, by the rule above, between 90 and 95 % of its bytes; the part after the cut is the validation
  split.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.config import UserError

SEPARATOR = "<|endoftext|>"
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
        """All bytes of a file."""
        return cls(path, 0, path.stat().st_size)


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
        cut = validation_start(path)
        return cls(name, {"train": Span(path, 0, cut), "valid": Span(path, cut, path.stat().st_size)})

    def documents(self, split: SplitName) -> Iterator[str]:
        return read_documents(self.spans[split], f"{self.spans[split].path} ({split})")

    def fingerprint(self) -> str:
        """xxh3-128 of the bytes of both splits and of their offsets in the file. The path is not included."""
        import xxhash

        digest = xxhash.xxh3_128()
        for span in self.spans.values():
            digest.update(f"{span.start}-{span.stop};".encode())
            for chunk in _read_chunks(span):
                digest.update(chunk)
        return digest.hexdigest()

    def size(self, split: SplitName) -> int | None:
        return self.spans[split].stop - self.spans[split].start


def read_documents(span: Span, what: str) -> Iterator[str]:
    """The documents of a span, stripped and not empty. Raises UserError if there is no document, or if the bytes are
    not UTF-8."""
    return refuse_empty((document for _, document in _documents(span)), what)


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
    for offset, piece in _read_pieces(span):
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


def _read_pieces(span: Span) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each piece of text between separators. A long piece is cut by `cut_long`."""
    rest, offset = b"", span.start  # bytes not yet given out, and where they begin
    for chunk in _read_chunks(span):
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


def _documents(span: Span) -> Iterator[tuple[int, str]]:
    """(offset of the piece that holds it, document), for every piece that is not blank."""
    for offset, piece in _read_pieces(span):
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
