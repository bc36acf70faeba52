"""What `--data` names: which source wins, and which documents of it are scored."""

from pathlib import Path

import pytest

from moe_jax.config import NAMED_CORPORA, ConfigError, DataConfig
from moe_jax.data.corpora import Corpus, EmbeddedCorpus, check_source, open_corpus, scored_documents
from moe_jax.data.file_corpus import FileCorpus
from moe_jax.data.hub import HUB
from moe_jax.data.synthetic import stories
from moe_jax.data.text_files import SEPARATOR


def test_every_name_opens_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One. Two. Three.")
    for name in (*NAMED_CORPORA, str(tmp_path / "book.txt")):
        corpus = open_corpus(DataConfig(source=name))
        assert isinstance(corpus, Corpus)
        assert corpus.name == name
        kind = EmbeddedCorpus if name == "stories" else FileCorpus if "/" in name else type(HUB["pg19"])
        assert type(corpus) is kind
    assert {*HUB, "stories"} == set(NAMED_CORPORA)


def test_a_name_wins_over_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stories", "pg19"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    monkeypatch.chdir(tmp_path)
    check_source("stories")
    check_source("pg19")
    assert open_corpus(DataConfig(source="pg19")) is HUB["pg19"]
    assert next(scored_documents("stories")) == next(stories.generate(0, "valid", 1))
    with pytest.raises(ConfigError, match="gunzip"):
        check_source("./pg19")


@pytest.mark.parametrize("name", ["train.txt", "valid.txt"])
def test_both_files_of_a_folder_are_looked_at(name: str, tmp_path: Path) -> None:
    for file in ("train.txt", "valid.txt"):
        (tmp_path / file).write_bytes(b"%PDF" if file == name else b"text")
    with pytest.raises(ConfigError, match=rf"^--data {tmp_path}/{name}: is a PDF"):
        open_corpus(DataConfig(source=str(tmp_path)))


def test_all_of_a_file_is_scored_and_of_a_folder_the_validation_split(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(SEPARATOR.join(["One.", "Two.", "Three."]))
    (tmp_path / "valid.txt").write_text("Four.")
    assert list(scored_documents(str(tmp_path / "train.txt"))) == ["One.", "Two.", "Three."]
    assert list(scored_documents(str(tmp_path))) == ["Four."]
    with pytest.raises(ConfigError, match="existing file or folder"):
        scored_documents(str(tmp_path / "gone"))


def test_of_the_embedded_corpus_the_validation_stories_are_scored() -> None:
    assert list(scored_documents("stories")) == list(stories.generate(0, "valid", 600))


def test_the_embedded_corpus_has_no_file() -> None:
    corpus = EmbeddedCorpus(3, 7)
    assert (corpus.name, corpus.size("train"), corpus.size("valid")) == ("stories", None, None)
    assert corpus.fingerprint() == stories.fingerprint(3, 7)
    assert list(corpus.documents("train")) == list(stories.generate(3, "train", 7))
    assert list(corpus.documents("valid")) == list(stories.generate(3, "valid", 600))
