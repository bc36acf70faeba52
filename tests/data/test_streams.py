"""Streams of token ids: documents between separators, in batches, and the words that samples begin with."""

from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import streams, token_store
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.streams import opening_words, openings, stored_documents, token_stream
from moe_jax.data.token_store import prepare_token_store
from moe_jax.data.tokenizers import train_tokenizer

BYTE = train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("batch", [1, 40, 10**6])
def test_documents_across_batches_stay_in_order(batch: int, tmp_path: Path, monkeypatch) -> None:
    """A stream in memory is the stored one, and gives the documents back."""
    monkeypatch.setattr(streams, "_BATCH_BYTES", batch)
    texts = [f"{i} " * (i % 7 + 1) + "é" for i in range(50)]
    (tmp_path / "train.txt").write_text(SEPARATOR.join(texts))
    (tmp_path / "valid.txt").write_text("One.")
    data = DataConfig(source=str(tmp_path), vocab_size=270)
    store = prepare_token_store(data, cache=tmp_path / "cache", progress=False)
    assert store.tokenizer.decode(store.train.tokens) == SEPARATOR + "".join(text + SEPARATOR for text in texts)
    stream, answers = token_stream(iter(texts), store.tokenizer)
    assert answers is None
    assert stream.dtype == store.train.tokens.dtype == np.uint16
    np.testing.assert_array_equal(stream, store.train.tokens)
    monkeypatch.setattr(streams, "_READ_TOKENS", batch)
    assert list(stored_documents(stream, store.tokenizer)) == texts
    assert list(stored_documents(stream[:-1], store.tokenizer)) == texts[:-1]  # the last one is incomplete
    assert list(stored_documents(stream[:0], store.tokenizer)) == []


@pytest.mark.parametrize(("batch", "sizes"), [(1, [3, 3, 3, 3]), (4, [6, 6]), (7, [9, 3]), (99, [12])])
def test_batches_are_measured_in_bytes_and_told(
    batch: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_BATCH_BYTES", batch)
    told: list[tuple[int, int]] = []
    texts = iter(["日", "aaa", "本", "bbb"])
    token_store._write_split(tmp_path / "train", texts, BYTE, lambda *seen: told.append(seen))
    assert np.diff([0, *(size for _, size in told)]).tolist() == sizes
    assert told[-1] == (4, 12)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("Once upon a time, a dragon", "Once upon a time,"),
        ("ROMEO:\nBut soft, what light", "ROMEO:"),
        ("\n\n  Two words", "Two words"),
        ("a\tb  c d e", "a\tb  c d"),
        ("日本語の短い文章です。" * 40, ("日本語の短い文章です。" * 40)[:48]),
        ("aa " + "語" * 85, "aa " + "語" * 45),  # the 256 bytes that are looked at end inside the last character
        ("", ""),
    ],
)
def test_the_first_words_of_the_first_line(document: str, words: str) -> None:
    stream = [256, *document.encode(), 256, *b"Another document"]
    assert opening_words(BYTE, np.array(stream)) == words


def test_openings_of_different_documents_each_once() -> None:
    texts = ["Once upon a time, a dragon", "", "Once upon a time, a cat", "ROMEO:\nBut", "One sunny day, Tom", "Last"]
    stream = np.array([token for text in texts for token in (256, *text.encode())])
    assert openings(BYTE, stream, 3) == ["Once upon a time,", "ROMEO:", "One sunny day, Tom"]
    assert openings(BYTE, stream[:1], 3) == []
