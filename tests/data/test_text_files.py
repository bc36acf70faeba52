"""Text files: which part of a file is read, where it is cut, and what is no text."""

import errno
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest
import xxhash

from moe_jax.config import UserError
from moe_jax.data import text_files
from moe_jax.data.file_corpus import FileCorpus
from moe_jax.data.text_files import (
    SEPARATOR,
    Span,
    cut_long,
    last_part_start,
    other_kind,
    read_chunks,
    refuse_empty,
    text_documents,
)


def write(folder: Path, content: bytes | str, name: str = "text.txt") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


# Spans


@pytest.mark.parametrize(
    ("content", "start"),
    [(b"", 0), (b"\xef\xbb", 0), (b"\xef\xbb\xbf", 3), (b"\xef\xbb\xbftext", 3), (b"text\xef\xbb\xbf", 0)],
)
def test_a_span_is_the_whole_file_but_for_a_mark(content: bytes, start: int, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    assert Span.of(path) == Span(path, start, len(content))


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_a_span_is_read_from_its_start_to_its_stop(chunk: int, tmp_path: Path) -> None:
    path = write(tmp_path, "0123456789")
    with patch.object(text_files, "_CHUNK", chunk):
        assert b"".join(read_chunks(Span(path, 2, 7))) == b"23456"
        assert b"".join(read_chunks(Span(path, 8, 20))) == b"89"  # a file that became shorter
        assert list(read_chunks(Span(path, 5, 5))) == []
        assert max(map(len, read_chunks(Span(path, 0, 10)))) == min(chunk, 10)


def test_pieces_come_with_their_offsets_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, f"..ab{SEPARATOR}{SEPARATOR}cde")
    span = Span(path, 2, path.stat().st_size)
    for chunk in (1, 4, 100):
        with patch.object(text_files, "_CHUNK", chunk):
            found = list(text_files._read_pieces(span, read_chunks(span)))
            assert found == [(2, b"ab"), (17, b""), (30, b"cde")]


def test_parts_of_a_long_piece_come_with_their_offsets(tmp_path: Path) -> None:
    path = write(tmp_path, f"ab{SEPARATOR}" + "c" * 80 + SEPARATOR + "d")
    span = Span.of(path)
    with patch.object(text_files, "_LONGEST", 32):
        for chunk in (7, 1000):
            with patch.object(text_files, "_CHUNK", chunk):
                pieces = list(text_files._read_pieces(span, read_chunks(span)))
                parts = [(at, part) for at, part in pieces if part.startswith(b"c")]
                assert parts[:2] == [(15, b"c" * 32), (47, b"c" * 32)]
                assert b"".join(part for _, part in parts) == b"c" * 80
                assert pieces[-1] == (108, b"d")


def test_a_file_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    span = Span(tmp_path / "gone.txt", 0, 5)
    with pytest.raises(UserError, match=rf"^{tmp_path}/gone.txt: cannot be read \(No such file .*check the file"):
        list(text_documents(span, read_chunks(span)))


# Long documents


@pytest.mark.parametrize(("size", "parts"), [(0, [0]), (44, [44]), (45, [32, 13]), (76, [32, 44]), (77, [32, 32, 13])])
def test_a_text_is_cut_where_it_is_too_long(size: int, parts: list[int]) -> None:
    """Longer than 32 bytes by a separator: what follows the cut may be the beginning of one."""
    with patch.object(text_files, "_LONGEST", 32):
        assert [len(part) for part in cut_long(b"a" * size)] == parts


@pytest.mark.parametrize(("space", "cut"), [(224, 240), (225, 226), (239, 240), (240, 240)])
def test_a_cut_is_made_at_a_boundary_of_the_last_sixteenth(space: int, cut: int) -> None:
    text = bytearray(b"a" * 300)
    text[space : space + 1] = b" "
    with patch.object(text_files, "_LONGEST", 240):
        assert len(next(cut_long(bytes(text)))) == cut


def test_a_mebibyte_is_the_longest_document() -> None:
    assert text_files._LONGEST == text_files._CHUNK == 2**20


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("aaaaaé", 5),
        ("aaaa日本", 4),
        ("aaa😀a", 3),
        ("aa😀aa", 6),
        ("aaaaaa", 6),
    ],
)
def test_no_character_is_cut(text: str, cut: int) -> None:
    """At 6 at the latest: the character that reaches over it begins up to 3 bytes before."""
    assert text_files._last_boundary(text.encode(), 0, 6) == cut


def test_bytes_that_are_no_character_are_cut_anyway() -> None:
    assert text_files._last_boundary(b"\x80" * 9, 0, 6) == 6
    assert text_files._last_boundary(b"\x80" * 9, 0, 2) == 2


# The validation part of a single file


@pytest.mark.parametrize(
    ("documents", "valid"), [(2, 1), (3, 1), (19, 1), (20, 1), (39, 1), (40, 2), (59, 2), (60, 3), (100, 5)]
)
def test_a_twentieth_of_the_documents_validates(documents: int, valid: int, tmp_path: Path) -> None:
    """Blank ones are none."""
    path = write(tmp_path, SEPARATOR.join(f"{i}.{SEPARATOR} \n" for i in range(documents)))
    corpus = FileCorpus.open(str(path))
    assert list(corpus.documents("train")) == [f"{i}." for i in range(documents - valid)]
    assert list(corpus.documents("valid")) == [f"{i}." for i in range(documents - valid, documents)]


def start_of(folder: Path, size: int, mark: int | None = None, blank: str = "\n\n") -> int:
    """Where the validation part of one document of `size` bytes begins."""
    text = bytearray(b"a" * size)
    if mark is not None:
        text[mark : mark + len(blank)] = blank.encode()
    return last_part_start(Span.of(write(folder, bytes(text))))


@pytest.mark.parametrize(
    ("mark", "start"),
    [(None, 1900), (1798, 1900), (1799, 1801), (1800, 1802), (1850, 1852), (1898, 1900), (1899, 1900)],
)
def test_one_document_is_cut_between_90_and_95_percent(mark: int | None, start: int, tmp_path: Path) -> None:
    assert start_of(tmp_path, 2000, mark) == start


def test_one_document_is_cut_at_a_space_for_want_of_a_line(tmp_path: Path) -> None:
    assert start_of(tmp_path, 2000, 1799, " ") == 1900
    assert start_of(tmp_path, 2000, 1800, " ") == 1801
    assert start_of(tmp_path, 2000, 1899, " ") == 1900
    assert start_of(tmp_path, 2000, 1900, " ") == 1900


@pytest.mark.parametrize(("size", "start"), [(1, 1), (19, 19), (20, 19), (30, 29), (100, 95), (2000, 1900)])
def test_without_a_boundary_the_last_twentieth_validates(size: int, start: int, tmp_path: Path) -> None:
    assert start_of(tmp_path, size) == start


def test_of_a_huge_document_a_bounded_part_is_searched(tmp_path: Path) -> None:
    with patch.object(text_files, "_CHUNK", 50):
        assert start_of(tmp_path, 2000, 1848) == 1900
        assert start_of(tmp_path, 2000, 1850) == 1852


def test_the_character_after_the_searched_part_is_seen(tmp_path: Path) -> None:
    text = "a" * 1899 + "é" + "a" * 99
    assert last_part_start(Span.of(write(tmp_path, text))) == 1899


def test_a_mark_at_the_start_is_not_a_training_text(tmp_path: Path) -> None:
    corpus = FileCorpus.open(str(write(tmp_path, b"\xef\xbb\xbf")))
    assert {split: (span.start, span.stop) for split, (span,) in corpus.spans.items()} == {
        "train": (3, 3),
        "valid": (3, 3),
    }


# A corpus of files


@pytest.fixture
def corpus(tmp_path: Path) -> FileCorpus:
    write(tmp_path, f"One.{SEPARATOR}Two.", "train.txt")
    write(tmp_path, b"\xef\xbb\xbfThree.", "valid.txt")
    return FileCorpus.open(str(tmp_path))


def test_the_sizes_are_in_bytes(corpus: FileCorpus) -> None:
    assert (corpus.size("train"), corpus.size("valid")) == (4 + 13 + 4, 6)


def test_the_fingerprint_is_of_the_bytes_and_their_offsets(corpus: FileCorpus) -> None:
    """Caches and saved runs are known by it."""
    content = f"0-21;One.{SEPARATOR}Two.3-9;Three."
    assert corpus.fingerprint() == xxhash.xxh3_128_hexdigest(content.encode())


def test_an_empty_corpus_is_refused_after_its_last_document() -> None:
    assert list(refuse_empty(["a", "b"], "this")) == ["a", "b"]
    with pytest.raises(UserError, match=r"^this: there is no text in it; give a longer one with --data$"):
        list(refuse_empty([], "this"))


# Other kinds


KINDS = {
    b"\x1f\x8b": "gunzip",
    b"PK\x03\x04": "unzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x89HDF": "HDF5",
    b"%PDF": "pdftotext",
    b"SQLite format 3\x00": "SQLite",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@pytest.mark.parametrize("start", KINDS)
def test_other_kinds_are_known_by_their_first_bytes(start: bytes, tmp_path: Path) -> None:
    assert KINDS[start] in (other_kind(write(tmp_path, start + b"rest")) or "")
    assert other_kind(write(tmp_path, start[:-1])) is None
    assert other_kind(write(tmp_path, b"x" + start)) is None


@pytest.mark.parametrize("part", ["word/document.xml", "xl/workbook.xml", "ppt/presentation.xml"])
@pytest.mark.parametrize("before", [0, 300_000])
def test_an_office_document_is_known_by_the_parts_of_its_archive(part: str, before: int, tmp_path: Path) -> None:
    """Under any name. The part may stand behind a large picture: the list of parts is at the end."""
    path = tmp_path / "renamed.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("media/picture", b"p" * before)
        archive.writestr(part, "<w>words</w>")
        archive.writestr("media/other", b"p" * before)
    assert "document of an office program" in (other_kind(path) or "")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "words")
    assert "unzip" in (other_kind(path) or "")


@pytest.mark.parametrize("name", ["a.json", "A.JSON"])
@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", ' \n\t{"a"'])
def test_json_is_known_by_its_name_and_its_first_character(name: str, text: str, tmp_path: Path) -> None:
    assert "holds JSON" in (other_kind(write(tmp_path, text, name)) or "")
    assert other_kind(write(tmp_path, text, "a.txt")) is None
    assert other_kind(write(tmp_path, "Once {", name)) is None
    assert other_kind(write(tmp_path, "", name)) is None


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path, "text")
    assert other_kind(path) is None
    monkeypatch.setattr(Path, "open", refuse)
    assert other_kind(path) == "cannot be read (Permission denied); check its permissions"
