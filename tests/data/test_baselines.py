"""The scores to compare a model with, of any text."""

import json
import threading
import time
from pathlib import Path

import pytest

from moe_jax.config import DataConfig
from moe_jax.data import baselines
from moe_jax.data.baselines import CorpusBaselines, corpus_baselines, first_documents, ngram_baselines
from moe_jax.data.ngrams import ngram_bits_per_byte
from moe_jax.data.synthetic import stories
from moe_jax.data.synthetic.stories import VALIDATION_STORIES, entropy_floor_bits_per_byte, generate
from moe_jax.data.token_store import TokenStore, prepare_token_store

STORIES = DataConfig(source="stories", tokenizer="byte", stories=40, stories_seed=3)
NAME = "references.json"
TRAIN, VALID = ["the cat sat. the dog sat.", "the cat ran."] * 5, ["the cat sat.", "the dog ran."]


def test_any_text_has_its_ngram_models(tmp_path: Path) -> None:
    for name, documents in (("train", TRAIN), ("valid", VALID)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(documents))
    data = DataConfig(source=str(tmp_path), tokenizer="byte")
    store = prepare_token_store(data, cache=tmp_path / "cache", progress=False)
    found = corpus_baselines(data, store)
    assert found == CorpusBaselines(*ngram_bits_per_byte(TRAIN, VALID, (1, 3, 5)))
    assert found.entropy_floor is None
    assert "the best possible" not in found.describe()
    path = store.folder / "references.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trigram": 9.5}))
    assert corpus_baselines(data, store).trigram == 9.5  # from the cache
    path.write_text('{"entropy_floor": 1.0, "trigram": 2.0}')  # of an earlier version
    assert corpus_baselines(data, store) == found


def test_the_embedded_stories_have_a_floor_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(stories=60, tokenizer="byte")
    store = prepare_token_store(data, cache=tmp_path, progress=False)
    found = corpus_baselines(data, store)
    valid = list(generate(0, "valid", VALIDATION_STORIES))
    assert found.entropy_floor == entropy_floor_bits_per_byte(valid)
    assert found.entropy_floor < found.kneser_ney_5gram < found.unigram
    assert found.describe().startswith(f"the best possible is {found.entropy_floor:.4f}")


def test_a_long_text_is_counted_and_scored_in_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(TRAIN))
    (tmp_path / "valid.txt").write_text("<|endoftext|>".join(VALID))
    monkeypatch.setattr(baselines, "TRAIN_BYTES", 30)
    monkeypatch.setattr(baselines, "VALID_BYTES", 12)
    data = DataConfig(source=str(tmp_path), tokenizer="byte")
    store = prepare_token_store(data, cache=tmp_path / "cache", progress=False)
    assert corpus_baselines(data, store) == ngram_baselines(TRAIN[:1], VALID[:1])


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (99, 3)])
def test_the_first_documents_are_cut_by_bytes(most: int, kept: int) -> None:
    documents = ["aa", "é", "b"]  # 2, 2 and 1 bytes
    assert list(first_documents(documents, most)) == documents[:kept]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    monkeypatch.setattr(stories, "VALIDATION_STORIES", 5)
    return prepare_token_store(STORIES, cache=tmp_path, progress=False)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"entropy_floor": 1, "other": 2}'])
def test_a_damaged_copy_is_replaced(text: str, store: TokenStore) -> None:
    first = corpus_baselines(STORIES, store)
    whole = (store.folder / NAME).read_text()
    (store.folder / NAME).write_text(text)
    assert corpus_baselines(STORIES, store) == first
    assert (store.folder / NAME).read_text() == whole


def test_other_work_is_done_meanwhile_if_there_is_anything_to_count(store: TokenStore) -> None:
    """In another thread, which has ended when the scores are known. An error of it is not one of the scores."""
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        time.sleep(0.05)
        threads.append(threading.current_thread())
        raise RuntimeError

    found = corpus_baselines(STORIES, store, meanwhile=work)
    assert len(threads) == 2
    assert threads[0] is not threading.current_thread()
    assert corpus_baselines(STORIES, store, meanwhile=work) == found
    assert len(threads) == 2


def test_a_cache_that_cannot_be_written_is_no_failure(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    first = corpus_baselines(STORIES, store)
    (store.folder / NAME).unlink()
    monkeypatch.setattr(baselines, "write_atomically", refuse)
    assert corpus_baselines(STORIES, store) == first
    assert not (store.folder / NAME).exists()


def test_a_stored_text_needs_its_source_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub whose tokens are there is scored without a network."""
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(TRAIN))
    (tmp_path / "valid.txt").write_text("<|endoftext|>".join(VALID))
    data = DataConfig(source=str(tmp_path), tokenizer="bpe", vocab_size=270)
    store = prepare_token_store(data, cache=tmp_path / "cache", progress=False)
    monkeypatch.setattr(baselines, "open_corpus", lambda _: pytest.fail("the source was opened"))
    assert corpus_baselines(data, store) == CorpusBaselines(*ngram_bits_per_byte(TRAIN, VALID, (1, 3, 5)))
