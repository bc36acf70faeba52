"""Corpora: which files and which documents a source has, what validates, and how bad sources are answered."""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import xxhash

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig, UserError
from moe_jax.data import corpora, documents
from moe_jax.data.corpora import HUB, Corpus, check_source, open_corpus, scored_documents
from moe_jax.data.documents import SEPARATOR


def write_folder(folder: Path, **texts: str | bytes) -> Path:
    """A text file for each name."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def both(source: Path | str) -> tuple[list[str], list[str]]:
    corpus = open_corpus(DataConfig(source=str(source)))
    return list(corpus.documents("train")), list(corpus.documents("valid"))


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# Sources


def test_every_name_opens_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name wins over a path."""
    for name in NAMED_CORPORA:
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    monkeypatch.chdir(tmp_path)
    for name in NAMED_CORPORA:
        check_source(DataConfig(source=name))
        if name != "shakespeare":
            open_corpus(DataConfig(source=name))
    assert {*HUB, "stories", "shakespeare"} == set(NAMED_CORPORA)


def test_shakespeare_is_downloaded_once_and_no_other_text_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a web address of this disk. The last tenth validates."""
    there, text = tmp_path / "there.txt", "".join(f"Enter {i}.\n" for i in range(110)).encode()
    there.write_bytes(text)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "SHAKESPEARE", there.as_uri())
    with pytest.raises(UserError, match=r"has another text than it had; save the right one as .*shakespeare\.txt"):
        open_corpus(DataConfig(source="shakespeare"))
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    for _ in range(2):
        (train,), (valid,) = both("shakespeare")
        assert (f"{train}\n{valid}\n".encode(), len(train) + 1) == (text, len(text) * 9 // 10)
        there.unlink(missing_ok=True)
    (tmp_path / "cache/shakespeare.txt").write_bytes(b"spoiled")
    with pytest.raises(UserError, match="cannot be reached"):
        open_corpus(DataConfig(source="shakespeare"))


def test_a_folder_has_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text(SEPARATOR.join(f"two {i}" for i in range(10)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows(*(f"one {i}" for i in range(10))).encode()))
    (tmp_path / "c.TXT").write_bytes(b"\xef\xbb\xbf" + SEPARATOR.join(f"three {i}" for i in range(20)).encode())
    for name in ("notes.rst", "b/old.gz", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).write_text("no text of the corpus")
    train, valid = both(tmp_path)
    whole = [*(f"one {i}" for i in range(10)), *(f"two {i}" for i in range(10)), *(f"three {i}" for i in range(20))]
    assert (train, valid) == (whole[:38], whole[38:])  # 5 % of 40 documents


def test_a_compressed_text_is_the_text(tmp_path: Path) -> None:
    """Split at the same places, also a single document; one that is cut is refused in one line."""
    for text in (SEPARATOR.join(f"story {i}" for i in range(50)), "word " * 40_000):
        (tmp_path / "plain.txt").write_text(text)
        (tmp_path / "same.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
        assert both(tmp_path / "same.txt.gz") == both(tmp_path / "plain.txt")
    whole = (tmp_path / "same.txt.gz").read_bytes()
    for damaged in (whole[:-9], b"no archive", whole[:20] + b"\xff" * 40 + whole[60:]):
        (tmp_path / "cut.txt.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cut.txt.gz: cannot be read \("):
            both(tmp_path / "cut.txt.gz")


def test_a_folder_with_a_training_text(tmp_path: Path) -> None:
    """Without a validation text, the last twentieth of the training text validates."""
    write_folder(tmp_path, train=SEPARATOR.join(f"story {i}" for i in range(100)), other="not in the corpus")
    train, valid = both(tmp_path)
    assert (len(train), valid) == (95, [f"story {i}" for i in range(95, 100)])
    (tmp_path / "valid.jsonl").write_text(rows("the validation text"))
    train, valid = both(tmp_path)
    assert (len(train), valid) == (100, ["the validation text"])
    assert list(scored_documents(str(tmp_path / "train.txt"))) == train
    assert list(scored_documents(str(tmp_path))) == valid


@pytest.mark.parametrize("count", [2, 3, 19, 20, 39, 40, 41, 59, 60, 100])
def test_a_twentieth_of_the_documents_validates(count: int, tmp_path: Path) -> None:
    """And at least one, of all files together. Blank ones are no documents."""
    texts = [f"{i}." for i in range(count)]
    for number, part in enumerate((texts[: count // 3], texts[count // 3 : count // 2], texts[count // 2 :])):
        (tmp_path / f"{number}.txt").write_text(SEPARATOR.join(f"{text}{SEPARATOR} \n" for text in part))
    held_out = max(1, count // 20)
    assert both(tmp_path) == (texts[: count - held_out], texts[count - held_out :])


@pytest.mark.parametrize("text", ["ééééééééééé", "日本語の短い文章です。", "A line.\nAnother."])
def test_a_single_document_is_divided_between_characters(tmp_path: Path, text: str) -> None:
    parts = both(write_folder(tmp_path, tiny=text))
    assert [len(part) for part in parts] == [1, 1]
    assert "".join(parts[0] + parts[1]) == text.replace("\n", "")


def test_a_long_document_validates_by_bytes_too(tmp_path: Path) -> None:
    """Its parts are no documents: with two of them, the second must not be all the validation there is."""
    text = "word word word\n" * 1000
    with patch.object(documents, "_LONGEST", 8000), patch.object(documents, "_CHUNK", 3000):
        train, valid = both(write_folder(tmp_path, book=text))
    assert len(train) == 2
    assert 0.05 <= len("".join(valid) + "\n") / len(text) <= 0.1
    assert "\n".join(train + valid) == text.strip()


@pytest.mark.parametrize("text", ["", " \n", SEPARATOR, f"\n{SEPARATOR} {SEPARATOR}\n", b"\xef\xbb\xbf"])
def test_a_text_without_a_document_is_refused(tmp_path: Path, text: str | bytes) -> None:
    folder = write_folder(tmp_path / "data", train=text, valid="One.")
    for source in (folder, folder / "train.txt"):
        with pytest.raises(UserError, match=r"train\.txt.*there is no text in it; give a longer one with --data$"):
            both(source)


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(rows("a story"))
    with pytest.raises(UserError, match="has fewer than two rows, and one must be left for validation; add rows"):
        both(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("source", "form", "said"),
    [
        (
            "tinystory",
            "text",
            "tinystory: must be an existing file or folder, or one of stories, shakespeare, tinystories, .*pg19$",
        ),
        ("/dev/null", "text", "/dev/null: must be an existing file or folder"),
        ("stories", "chat", "must be an existing file or folder of conversations"),
        ("empty", "text", r"empty: must hold train\.txt or .* files and no valid file"),
        ("only", "text", r"only: must hold train\.txt or "),
        ("only/valid.txt", "chat", r"only/valid\.txt: must be JSON lines"),
        ("a.JSON", "text", "must be JSON lines"),
    ],
)
def test_a_wrong_source_is_refused_before_jax_is_loaded(
    source: str, form: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.JSON").write_text("[]")
    write_folder(tmp_path / "only", valid="Story.")
    with pytest.raises(ConfigError, match=f"^--data .*{said}"):
        check_source(DataConfig(source=source, format=form))


# What identifies a text


def test_the_fingerprint_is_of_the_bytes_and_their_offsets_and_not_of_the_path(tmp_path: Path) -> None:
    """Caches and saved runs are known by it."""
    content = f"0-21;One.{SEPARATOR}Two.3-9;Three."
    for name in ("here", "there"):
        folder = write_folder(tmp_path / name, train=f"One.{SEPARATOR}Two.", valid=b"\xef\xbb\xbfThree.")
        corpus = open_corpus(DataConfig(source=str(folder)))
        assert corpus.fingerprint() == xxhash.xxh3_128_hexdigest(content.encode())


# Public data sets, without the network


def serve(monkeypatch: pytest.MonkeyPatch, *texts: str, error: Exception | None = None) -> list[Any]:
    """The hub gives these texts, and then fails. Returns what it is asked for."""
    requests: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
        requests.append((*arguments, options))
        yield from ({"text": text} for text in texts)
        if error is not None:
            raise error

    quiet = SimpleNamespace(logging=SimpleNamespace(set_verbosity_error=lambda: None))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))  # the library takes seconds
    monkeypatch.setitem(sys.modules, "huggingface_hub", quiet)
    return requests


def hub(name: str) -> Corpus:
    return open_corpus(DataConfig(source=name))


@pytest.mark.parametrize(("split", "name"), [("train", "train"), ("valid", "validation")])
def test_a_data_set_is_named_by_its_revision(split: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, (repository, configuration, revision) in HUB.items():
        corpus = hub(source)
        assert len(revision) == 40
        assert corpus.fingerprint() == xxhash.xxh3_128_hexdigest(f"{repository} {configuration} {revision}".encode())
        requests = serve(monkeypatch, "A tale.")
        assert list(corpus.documents(split)) == ["A tale."]
        options = {"split": name, "revision": revision, "streaming": True}
        assert requests == [(repository, configuration, options)]


def test_rows_are_documents_but_for_wikitext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one is divided."""
    lines = ["\n", " = One = \n", " It is . \n", "\n", " = Two = \n", " = = Part = = \n"]
    serve(monkeypatch, *lines)
    assert list(hub("tinystories").documents("train")) == [line.strip() for line in lines if line.strip()]
    assert list(hub("wikitext").documents("train")) == ["= One = \n It is .", "= Two = \n = = Part = ="]
    monkeypatch.setattr(documents, "_LONGEST", 32)
    serve(monkeypatch, "a" * 50, "b")
    assert list(hub("pg19").documents("train")) == ["a" * 32, "a" * 18, "b"]
