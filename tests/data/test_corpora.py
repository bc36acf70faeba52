"""Corpora: what is a document, what validates, and how bad sources are answered."""

import gzip
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_jax.config import ConfigError, DataConfig, UserError
from moe_jax.data import text_files
from moe_jax.data.corpora import check_source, open_corpus
from moe_jax.data.hub import articles
from moe_jax.data.synthetic import stories
from moe_jax.data.text_files import SEPARATOR, SplitName


def write_folder(folder: Path, train: str | bytes, valid: str | bytes = "One story.") -> str:
    folder.mkdir(exist_ok=True)
    for name, text in (("train.txt", train), ("valid.txt", valid)):
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder)


def documents_of(source: str, split: SplitName = "train") -> list[str]:
    return list(open_corpus(DataConfig(source=source)).documents(split))


@given(
    documents=st.lists(st.text(st.sampled_from("a é😀\n <|endoftext>"), max_size=12), max_size=9).filter(
        lambda documents: any(document.strip() for document in documents)
    ),
    chunk=st.integers(1, 40),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_are_what_lies_between_separators(tmp_path, documents, chunk):
    """However the reads fall on separators and characters. The alphabet spells parts of a separator."""
    text = SEPARATOR.join(documents)
    source = write_folder(tmp_path / "data", text)
    with patch.object(text_files, "_CHUNK", chunk):
        assert documents_of(source) == [part.strip() for part in text.split(SEPARATOR) if part.strip()]


@given(
    words=st.lists(st.sampled_from(["a", "é", "😀", "\n", " ", "aaaaaaaaaa", SEPARATOR, "<|end"]), max_size=60),
    chunk=st.integers(1, 64),
)
@example(words=["a" * 27, SEPARATOR, "b"], chunk=1)  # 32 bytes end within the separator
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_document_is_cut_and_nothing_but_white_space_is_lost(tmp_path, words, chunk):
    """Nor is a separator cut in two."""
    text = "".join(["x", *words])
    source = write_folder(tmp_path / "data", text)
    with patch.object(text_files, "_LONGEST", 32), patch.object(text_files, "_CHUNK", chunk):
        parts = documents_of(source)
    assert "".join("".join(parts).split()) == "".join(text.replace(SEPARATOR, "").split())
    assert all(len(part.encode()) < 32 + len(SEPARATOR) for part in parts)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (b"aaaa\n\nb\nc d", 6),  # after the blank line, though other boundaries come later
        (b"aaaaaaab\nc d", 9),
        (b"aaaaaaabbc d", 11),
        (b"aaaaaaaaaaaa", 11),
        ("aaaaaaaaaaé".encode(), 10),  # not inside the character
        (b"\n\naaaaaaaaaa", 11),  # too early a boundary is none
    ],
)
def test_where_a_text_is_cut(text, cut):
    assert text_files._last_boundary(text, 4, 11) == cut


def test_of_a_single_file_the_last_twentieth_of_the_documents_validates(tmp_path):
    file = tmp_path / "tales.txt"
    file.write_text(SEPARATOR.join(["", *(f"\nStory {i}.\n" for i in range(100)), "\n"]))
    assert documents_of(str(file), "train") == [f"Story {i}." for i in range(95)]
    assert documents_of(str(file), "valid") == [f"Story {i}." for i in range(95, 100)]
    file.write_text(f"One.{SEPARATOR}Two.{SEPARATOR}Three.")
    assert documents_of(str(file), "train") == ["One.", "Two."]
    assert documents_of(str(file), "valid") == ["Three."]


@pytest.mark.parametrize("text", ["ééééééééééé", "日本語の短い文章です。", "A line.\nAnother."])
def test_a_tiny_file_is_cut_between_characters(tmp_path, text):
    file = tmp_path / "tiny.txt"
    file.write_text(text, encoding="utf-8")
    parts = documents_of(str(file), "train") + documents_of(str(file), "valid")
    assert len(parts) == 2
    assert "".join(parts) == text.replace("\n", "")


def test_a_file_without_separators_is_cut_at_a_paragraph(tmp_path):
    paragraphs = [f"{i} " + "word " * 40 + "end" for i in range(200)]
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs))
    (train,), (valid,) = documents_of(str(file), "train"), documents_of(str(file), "valid")
    assert train.split("\n\n") + valid.split("\n\n") == paragraphs
    assert 0.05 <= len(valid) / file.stat().st_size <= 0.1


def test_a_long_file_without_separators_validates_by_bytes_too(tmp_path):
    """Its parts are no documents: with two of them, the second must not be all the validation there is."""
    file = tmp_path / "book.txt"
    file.write_text("word word word\n" * 1000)
    with patch.object(text_files, "_LONGEST", 8000), patch.object(text_files, "_CHUNK", 3000):
        train, valid = documents_of(str(file), "train"), documents_of(str(file), "valid")
    assert len(train) == 2
    assert 0.05 <= len("".join(valid) + "\n") / file.stat().st_size <= 0.1
    assert "\n".join(train + valid) == file.read_text().strip()


@pytest.mark.parametrize("as_file", [True, False])
def test_bytes_that_are_not_utf8_are_named_by_their_offset(tmp_path, as_file):
    text = f"Fine.{SEPARATOR}Good.{SEPARATOR}caf".encode() + b"\xe9!"
    source = write_folder(tmp_path / "data", text)
    path = str(tmp_path / "data" / "train.txt")
    with (
        patch.object(text_files, "_CHUNK", 10),
        pytest.raises(UserError, match="not UTF-8 at byte 39 ") as failure,
    ):
        documents_of(path if as_file else source, "valid" if as_file else "train")
    assert path in str(failure.value)


@pytest.mark.parametrize("text", ["", " \n", SEPARATOR, f"\n{SEPARATOR} {SEPARATOR}\n"])
def test_an_empty_corpus_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"train\.txt.*there is no text in it"):
        documents_of(write_folder(tmp_path / "data", text))
    with pytest.raises(UserError, match="there is no text in it"):
        documents_of(str(tmp_path / "data" / "train.txt"))


def test_bad_sources_are_answered_with_the_flag_and_the_choice(tmp_path):
    for name in ("stories", "tinystories", "wikitext", "pg19", __file__):
        check_source(name)
    with pytest.raises(ConfigError, match=r"^--data tinystory: .*stories, tinystories, wikitext, pg19$"):
        check_source("tinystory")
    (tmp_path / "valid.txt").write_text("Story.")
    with pytest.raises(ConfigError, match=r"valid\.txt is there, but no train\.txt"):
        check_source(str(tmp_path))
    with pytest.raises(ConfigError, match="existing file or folder"):
        open_corpus(DataConfig(source=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match="existing file"):
        check_source("/dev/null")


def test_a_source_is_checked_without_loading_anything():
    """Fast because nothing but the standard library and the configuration is imported."""
    code = "import sys; import moe_jax.data.corpora; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "numpy", "xxhash", "datasets", "tokenizers", "rich"} & set(loaded)


def test_the_fingerprint_is_of_the_text_and_not_of_the_path(tmp_path):
    def fingerprint(name: str, *texts: str) -> str:
        return open_corpus(DataConfig(source=write_folder(tmp_path / name, *texts))).fingerprint()

    first = fingerprint("a", "Once.", "Twice.")
    assert fingerprint("b", "Once.", "Twice.") == first
    others = [("Once!", "Twice."), ("Once.", "Twice!"), ("Once.Twice", ".")]
    assert len({first, *(fingerprint("c", *texts) for texts in others)}) == 4


def test_reading_takes_bounded_memory(tmp_path):
    """32 MiB in documents of 1 KB, and 32 MiB in one piece."""
    for text in (("x " * 500 + SEPARATOR) * 33_000, "word word " * 3_300_000):
        source = write_folder(tmp_path / "data", text)
        size = len(text)
        del text
        tracemalloc.start()
        assert sum(len(document) for document in open_corpus(DataConfig(source=source)).documents("train")) > 0.9 * size
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 9e6


def test_wikitext_lines_are_joined_into_articles():
    """An article begins at a heading of one equals sign after a blank line; sections and formulas do not."""
    first = [" = Robin = \n", "", " A bird . \n", " = 3 = \n", "", " = = Nest = = \n", " Twigs . \n", ""]
    second = [" = Wren = \n", "", " Smaller . \n"]
    assert [text for text in articles(["", *first, *second]) if text] == ["".join(first), "".join(second)]


def test_a_public_data_set_is_streamed_from_a_pinned_revision(monkeypatch):
    calls = []

    def load(repository, configuration, *, split, revision, streaming):
        calls.append((repository, configuration, split, streaming))
        assert len(revision) == 40
        return iter([{"text": " A tale.\n"}, {"text": " \n"}, {"text": "Another."}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert documents_of("tinystories", "valid") == ["A tale.", "Another."]
    assert documents_of("pg19") == ["A tale.", "Another."]
    assert documents_of("wikitext") == ["A tale.\n \nAnother."]
    assert calls == [
        ("roneneldan/TinyStories", None, "validation", True),
        ("emozilla/pg19", None, "train", True),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", True),
    ]


def test_a_connection_that_breaks_is_said_in_one_line(monkeypatch):
    """The hub's client has errors of its own, which are no OSError."""
    client = pytest.importorskip("huggingface_hub.utils").httpx

    def load(*_, **__):
        raise client.RemoteProtocolError("Server disconnected")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match=r"^tinystories: no network.*\(Server disconnected\)"):
        documents_of("tinystories")


@pytest.mark.parametrize("when", ["opening", "reading"])
def test_no_network_is_said_in_one_line(monkeypatch, when):
    def rows():
        yield {"text": "A tale."}
        raise ConnectionError("no route\nto host")

    def load(*_, **__):
        if when == "opening":
            raise ConnectionError("no route\nto host")
        return rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match=r"^tinystories: no network.*\(no route\).*--data stories, or a folder.*$"):
        documents_of("tinystories")


def test_the_embedded_corpus_generates_its_splits():
    corpus = open_corpus(DataConfig(source="stories", stories=7, stories_seed=3))
    assert list(corpus.documents("train")) == list(stories.generate(3, "train", 7))
    assert len(list(corpus.documents("valid"))) == stories.VALIDATION_STORIES
    settings = [(7, 3), (7, 3), (8, 3), (7, 4)]
    prints = [open_corpus(DataConfig(stories=n, stories_seed=seed)).fingerprint() for n, seed in settings]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", gzip.compress(b"text"), "gzip"),
        ("a.zip", b"PK\x03\x04rest", "zip archive"),
        ("a.parquet", b"PAR1rest", "Parquet"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"[1, 2]", "each line must be an object"),
        ("a.jsonl", b'[\n{"text": "a"}]', r"jq -c '\.\[\]' FILE"),
        ("a.jsonl", b'{\n"text": "a"}', r"jq -c \. FILE"),
        ("a.docx", b"PK\x03\x04rest", "save it there as plain text"),
        ("a.json", b"[1, 2]", "JSON"),
        ("a.txt", b"%PDF-1.7", "pdftotext"),
    ],
    ids=["gzip", "zip", "parquet", "utf-16", "jsonl", "array", "object", "docx", "json", "pdf"],
)
def test_files_of_other_kinds_are_said_for_what_they_are(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--data {path}: .*{said}"):
        check_source(str(path))
    for other in ("train.txt", "valid.txt"):
        (tmp_path / other).write_bytes(b"text")
    if name.endswith(".txt"):
        path.rename(tmp_path / "valid.txt")
        with pytest.raises(ConfigError, match=f"--data {tmp_path}/valid.txt: .*{said}"):
            check_source(str(tmp_path))


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    documents = [f"story {i}" for i in range(40)]
    text = "<|endoftext|>".join(documents).encode()
    (tmp_path / "plain.txt").write_bytes(text)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text)
    for split in ("train", "valid"):
        assert documents_of(str(tmp_path / "marked.txt"), split) == documents_of(str(tmp_path / "plain.txt"), split)
    (tmp_path / "braces.txt").write_bytes(b'{"this": "is a text by its name"}')
    check_source(str(tmp_path / "braces.txt"))
