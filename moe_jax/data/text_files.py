"""Documents read from text files, 1 MiB at a time.

- Documents are separated by `<|endoftext|>`. The bytes must be UTF-8.
- A document longer than 1 MiB, such as a whole book, is cut into parts of about 1 MiB. A cut is made at a blank line,
  else at a line end, else at a space. Each part is a document. So memory stays bounded, at the cost of one separator
  per MiB.
- A byte order mark of UTF-8 is skipped. Files of other kinds, such as gzip or UTF-16, are refused by their first bytes.
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.config import UserError

SEPARATOR = "<|endoftext|>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Windows programs write it at the start of a UTF-8 file. It is no text, and it is skipped."""
_ZIP = b"PK\x03\x04"
_KINDS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it with `gunzip`",
    _ZIP: "is a zip archive; extract the text with `unzip`",
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
OFFICE = (".docx", ".doc", ".odt", ".rtf", ".epub", ".pptx", ".xlsx")
"""Files that hold text, but not plain text."""
_OFFICE_DOCUMENT = "is a document of an office program; save it there as plain text in UTF-8"
_OFFICE_PARTS = (b"word/document.xml", b"ppt/presentation.xml", b"xl/workbook.xml", b"mimetypeapplication/")
"""What the archive of an office document holds: .docx, .pptx, .xlsx; and .odt or .epub."""
_END = 1 << 16
"""Bytes at both ends of an archive in which the names of its parts are looked for."""
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


def other_kind(path: Path) -> str | None:
    """What a file is that is not plain text in UTF-8, and what to do about it. None if it looks like text."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror}); check its permissions"
    if path.suffix.lower() in OFFICE and start.startswith((b"PK", b"\xd0\xcf\x11\xe0", b"{\\rtf")):
        return _OFFICE_DOCUMENT
    if start.startswith(_ZIP):
        return _of_zip(path)
    for mark, problem in _KINDS.items():
        if start.startswith(mark):
            return problem
    if path.suffix.lower() == ".json" and start.lstrip()[:1] in (b"{", b"["):
        return (
            "holds JSON, not plain text; write one object a line with a key `text` into a file that ends in .jsonl "
            f"(an array of objects: `jq -c '.[]' {path.name} > {path.stem}.jsonl`)"
        )
    return None


def _of_zip(path: Path) -> str:
    """What a zip archive is. Documents of office programs are zip archives too: the names inside tell."""
    with path.open("rb") as file:
        ends = file.read(_END)
        file.seek(max(0, path.stat().st_size - _END))
        ends += file.read(_END)
    return _OFFICE_DOCUMENT if any(name in ends for name in _OFFICE_PARTS) else _KINDS[_ZIP]


def not_utf8(path: Path, offset: int, reason: str) -> str:
    """What to say of a file whose bytes are not UTF-8 from an offset on."""
    name = shlex.quote(path.name)
    new = shlex.quote(f"{path.stem}-utf8{path.suffix}")
    return (
        f"{path}: not UTF-8 at byte {offset} ({reason}); text of older Windows programs is converted by "
        f"`iconv -f WINDOWS-1252 -t UTF-8 {name} > {new}`"
    )


def refuse_empty[D](documents: Iterable[D], what: str) -> Iterator[D]:
    """The same documents. Raises UserError after the last one if there was none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise UserError(f"{what}: there is no text in it; give a longer one with --data")


def cut_long(text: bytes, spare: int = 0) -> Iterator[bytes]:
    """The text in parts of about 1 MiB. The last part has fewer than 1 MiB + 13 + `spare` bytes."""
    while len(text) >= _LONGEST + len(_SEPARATOR) + spare:
        cut = _last_boundary(text, _LONGEST - _LONGEST // 16, _LONGEST)
        yield text[:cut]
        text = text[cut:]
    yield text


def last_part_start(span: Span) -> int:
    """Where the last 5 to 10 % of a span's bytes begin, at a boundary of the text."""
    twentieth = span.stop // 20
    window = min(max(twentieth, 64), span.stop - twentieth, _CHUNK)
    start = span.stop - twentieth - window
    text = b"".join(read_chunks(Span(span.path, start, start + window + 1)))
    return start + _last_boundary(text, 0, window)


def read_chunks(span: Span) -> Iterator[bytes]:
    """The bytes of a span, up to 1 MiB at a time. Raises UserError if the file cannot be read."""
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
    """(offset in the file, bytes) of each piece of text between separators. A long piece is cut by `cut_long`.

    The pieces do not depend on where the chunks end. So a span that begins at a piece of another span has the same
    pieces from there on.
    """
    rest, offset = b"", span.start  # bytes not yet given out, and where they begin
    for chunk in chunks:
        *pieces, rest = (rest + chunk).split(_SEPARATOR)
        for piece in pieces:
            for part in cut_long(piece):
                yield offset, part
                offset += len(part)
            offset += len(_SEPARATOR)
        # The last 12 bytes may begin a separator. Without them, the piece must be long enough to be cut.
        *parts, rest = cut_long(rest, spare=len(_SEPARATOR) - 1)
        for part in parts:
            yield offset, part
            offset += len(part)
    for part in cut_long(rest):
        yield offset, part
        offset += len(part)


def piece_starts(span: Span, chunks: Iterable[bytes]) -> Iterator[int]:
    """The offset of each piece of a span's chunks that is not blank. A text may be divided at every one of them."""
    return (offset for offset, piece in _read_pieces(span, chunks) if piece.strip())


def document_starts(span: Span) -> Iterator[int]:
    """The offset of each document. The parts of a long document count as one."""
    end = -1
    for offset, piece in _read_pieces(span, read_chunks(span)):
        if offset != end and piece.strip():
            yield offset
        end = offset + len(piece)


def text_documents(span: Span, chunks: Iterable[bytes]) -> Iterator[str]:
    """Every piece of the span's chunks that is not blank, stripped. Raises UserError if the bytes are not UTF-8."""
    for offset, piece in _read_pieces(span, chunks):
        try:
            document = piece.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(not_utf8(span.path, offset + error.start, error.reason)) from None
        if document:
            yield document


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
