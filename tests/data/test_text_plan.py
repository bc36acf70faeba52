"""The parts of a text: whole documents in order; and a plan that is kept while nothing changes."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, UserError
from moe_jax.data import file_corpus, text_files, text_notes, text_plan
from moe_jax.data.corpora import open_corpus
from moe_jax.data.file_corpus import FileCorpus
from moe_jax.data.stream_parts import stream_parts
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.text_plan import TextPart, TextPlan

WORDS = st.lists(st.sampled_from(["a", "é", "😀", "\n", " ", "aaaaaaaaaa", SEPARATOR, "<|end"]), max_size=80)


@given(
    texts=st.lists(WORDS, min_size=1, max_size=3), part=st.integers(1, 90), chunk=st.integers(1, 64), rows=st.booleans()
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_documents_of_the_parts_are_those_of_the_text(tmp_path, texts, part, chunk, rows):
    """Of several files, with long documents, as text or as JSON lines."""
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, words in enumerate(texts):
        content = "".join(words)
        if rows:
            content = "".join(json.dumps({"text": word}) + "\n" for word in words)
        (folder / f"{number}.{'jsonl' if rows else 'txt'}").write_text(content)
    spans = tuple(text_files.Span.of(path) for path in sorted(folder.iterdir()))
    with (
        patch.object(text_files, "_LONGEST", 32),
        patch.object(text_files, "_CHUNK", chunk),
        patch.object(text_plan, "PART_BYTES", part),
    ):
        corpus = FileCorpus("text", {"train": spans, "valid": ()})
        parts = corpus.parts("train")
        whole = [d for s in spans for d in text_plan.documents_of(s, text_files.read_chunks(s), "text")]
        found = [list(inner.documents()) for inner in parts]
        assert [d for documents in found for d in documents] == whole
        assert rows or all(found) or not whole
        pieces = [
            (span.path, span.start, span.stop) for inner in parts for span in inner.spans if span.start < span.stop
        ]
        for (path, _, stop), (following, start, _) in itertools.pairwise(pieces):
            assert (stop == start) if path == following else (start == 0)
        copies = [TextPart.from_dict(json.loads(json.dumps(inner.to_dict()))) for inner in parts]
    assert copies == list(parts)


def test_a_part_ends_with_the_document_in_which_it_reaches_its_size(tmp_path):
    """Documents of 10 bytes with their separator of 13, parts of 50 bytes: three documents each, since two have 46."""
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(["0123456789"] * 8))
    with patch.object(text_plan, "PART_BYTES", 50):
        plan = TextPlan.of("a", "text", {"train": (text_files.Span.of(path),), "valid": ()})
    assert [[(s.start, s.stop) for s in part.spans] for part in plan.parts["train"]] == [
        [(0, 69)],
        [(69, 138)],
        [(138, 171)],
    ]
    assert [part.spans for part in plan.parts["valid"]] == [()]


@pytest.mark.parametrize("size", range(30, 50))
def test_where_a_long_document_is_cut_does_not_depend_on_the_reads(tmp_path, size):
    """A separator that is half read may not count as text. 32 bytes are the longest document here."""
    path, found = tmp_path / "a.txt", set()
    path.write_text(f"{'a' * size}{SEPARATOR}b{SEPARATOR}{'c' * size}")
    for chunk in range(1, 80):
        with patch.object(text_files, "_LONGEST", 32), patch.object(text_files, "_CHUNK", chunk):
            corpus = FileCorpus("a", {"train": (text_files.Span.of(path),), "valid": ()})
            found.add(tuple(corpus.documents("train")))
    first = ("a" * size,) if size < 45 else ("a" * 32, "a" * (size - 32))
    assert found == {(*first, "b", *(text.replace("a", "c") for text in first))}


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_the_validation_part_is_the_same_with_few_places_kept(tmp_path, most):
    """Of 1 to 200 documents in three files, the last 5 % validate, and at least one."""
    for count in [*range(1, 45), 99, 100, 101, 200]:
        documents = [f"document {i}" for i in range(count)]
        cuts = [0, count // 3, count // 2, count]
        for number, (first, last) in enumerate(itertools.pairwise(cuts)):
            (tmp_path / f"{number}.txt").write_text(SEPARATOR.join(documents[first:last]))
        with patch.object(file_corpus, "_MOST_PLACES", most):
            corpus = FileCorpus.open(str(tmp_path))
        held = max(1, count // 20) if count > 1 else 0
        if count > 1:
            assert list(corpus.documents("train")) == documents[: count - held]
            assert list(corpus.documents("valid")) == documents[count - held :]


def test_a_text_changed_in_one_part_is_noticed_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join("abcdefgh"))
    with patch.object(text_plan, "PART_BYTES", 20):
        parts = FileCorpus("a", {"train": (text_files.Span.of(path),), "valid": ()}).parts("train")
    assert len(parts) == 4
    path.write_text(SEPARATOR.join("abcxefgh"))
    for number, part in enumerate(parts):
        if number == 1:
            with pytest.raises(UserError, match="--data a: the text was changed while it was read; start again"):
                list(part.documents())
        else:
            assert list(part.documents()) == list("abcdefgh"[2 * number : 2 * number + 2])


def test_a_stream_is_divided_in_turn():
    with patch.object(text_plan, "PART_BYTES", 5):
        found = []
        for number, part in enumerate(stream_parts(iter(["abc", "de", "fghijk", "l", "mnop", "q"]))):
            if number == 1:
                part.skip()
            else:
                found.append((part.key, list(part.documents())))
    assert found == [("part 0 by 5", ["abc", "de"]), ("part 2 by 5", ["l", "mnop"]), ("part 3 by 5", ["q"])]
    assert list(stream_parts(iter([]))) == []


# Kept plans


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of several parts, whose times count as old."""
    monkeypatch.setattr(text_plan, "PART_BYTES", 100)
    monkeypatch.setattr(text_notes, "_CLOCK_SECONDS", -10.0)
    path = tmp_path / "a.txt"
    path.write_text(SEPARATOR.join(f"document {i}" for i in range(60)))
    return path


def opened(source: Path, cache: Path) -> FileCorpus:
    corpus = open_corpus(DataConfig(source=str(source)), cache)
    assert isinstance(corpus, FileCorpus)
    return corpus


def notes(cache: Path) -> list[Path]:
    return list((cache / "texts").glob("*"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read, once for each pass over them."""
    found: list[Path] = []
    true = text_files.read_chunks

    def seen(span: text_files.Span) -> Any:
        found.append(span.path)
        return true(span)

    for module in (text_files, text_plan, file_corpus):
        monkeypatch.setattr(module, "read_chunks", seen)
    return found


def test_a_text_with_a_kept_plan_is_not_read(source: Path, tmp_path: Path, read: list[Path], monkeypatch) -> None:
    first = opened(source, tmp_path / "cache")
    fingerprint, parts = first.fingerprint(), first.parts("train")
    assert len(parts) > 5
    assert len(notes(tmp_path / "cache")) == 1
    read.clear()
    monkeypatch.chdir(tmp_path)
    for path in (source, Path("a.txt")):
        again = opened(path, tmp_path / "cache")
        assert (again.fingerprint(), again.size("train")) == (fingerprint, first.size("train"))
        assert [part.key for part in again.parts("train")] == [part.key for part in parts]
        assert read == []
        assert list(again.documents("valid")) == [f"document {i}" for i in range(57, 60)]
        read.clear()


def keep_the_times(source: Path) -> None:
    before = source.stat()
    source.write_text(source.read_text().replace("document 9", "document 8"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_the_file(source: Path) -> None:
    copy = source.with_suffix(".new")
    copy.write_text(source.read_text())
    copy.replace(source)


EDITS: dict[str, Callable[[Path], object]] = {
    "longer": lambda source: source.write_text(source.read_text() + "x"),
    "same size and times": keep_the_times,
    "another file": replace_the_file,
    "touched": os.utime,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_file_is_read_again(source: Path, tmp_path: Path, read: list[Path], edit: str) -> None:
    before = opened(source, tmp_path / "cache").fingerprint()
    EDITS[edit](source)
    read.clear()
    after = opened(source, tmp_path / "cache").fingerprint()
    assert read
    assert (after == before) == (edit in ("another file", "touched"))


def test_a_new_file_in_the_folder_is_read(source: Path, tmp_path: Path, read: list[Path]) -> None:
    before = opened(source.parent, tmp_path / "cache").fingerprint()
    (source.parent / "b.txt").write_text("One more.")
    assert opened(source.parent, tmp_path / "cache").fingerprint() != before
    assert source.parent / "b.txt" in read


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"note": {}, "digest": 3}', '{"note": 3}', None], ids=["empty", *"abcde", "flip"]
)
def test_a_damaged_note_is_not_believed(source: Path, tmp_path: Path, content: str | None, read: list[Path]) -> None:
    before = opened(source, tmp_path / "cache").fingerprint()
    (note,) = notes(tmp_path / "cache")
    whole = note.read_text()
    note.write_text(whole.replace(before, "0" * 32) if content is None else content)
    read.clear()
    assert opened(source, tmp_path / "cache").fingerprint() == before
    assert read
    assert note.read_text() == whole


def test_a_plan_is_kept_of_large_old_texts_only(source: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(text_notes, "_CLOCK_SECONDS", 2.0)  # the file was written a moment ago
        opened(source, tmp_path / "new").fingerprint()
    with monkeypatch.context() as m:
        m.setattr(text_plan, "PART_BYTES", 10**6)
        opened(source, tmp_path / "small").fingerprint()
    assert notes(tmp_path / "new") == notes(tmp_path / "small") == []
    opened(source, tmp_path / "large").fingerprint()
    assert len(notes(tmp_path / "large")) == 1


def test_a_cache_that_cannot_be_written_keeps_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert opened(source, tmp_path / "cache").fingerprint() == opened(source, tmp_path / "other").fingerprint()


def test_a_file_edited_while_the_plan_is_made_is_noticed(source: Path, tmp_path: Path) -> None:
    corpus = opened(source, tmp_path / "cache")
    source.write_text(source.read_text() + "x")
    with pytest.raises(UserError, match="the text was changed while it was read; start again"):
        corpus.fingerprint()
    assert notes(tmp_path / "cache") == []


def test_a_file_that_has_gone_is_said(source: Path, tmp_path: Path) -> None:
    corpus = opened(source, tmp_path / "cache")
    source.unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        corpus.fingerprint()


@pytest.mark.parametrize(("part", "reads"), [(1 << 20, 1), (400, 2)], ids=["one part", "several parts"])
def test_how_often_a_plan_reads_a_text(part: int, reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split of one part is read once. The keys are the digests of the bytes either way."""
    spans = {}
    for split in ("train", "valid"):
        (tmp_path / split).write_text(SEPARATOR.join(f"{split}: a cat sat on mat {i}." for i in range(40)))
        spans[split] = (text_files.Span.of(tmp_path / split),)
    monkeypatch.setattr(text_plan, "PART_BYTES", part)
    read, count = text_files.read_chunks, [0]

    def counted(span: text_files.Span) -> Iterator[bytes]:
        for chunk in read(span):
            count[0] += len(chunk)
            yield chunk

    monkeypatch.setattr(text_plan, "read_chunks", counted)
    plan = TextPlan.of("text", "text", spans)
    assert count[0] == reads * sum((tmp_path / split).stat().st_size for split in spans)
    for split, parts in plan.parts.items():
        assert (len(parts) == 1) == (reads == 1)
        assert [*parts] == [TextPart.of("text", "text", p.spans) for p in parts], split
