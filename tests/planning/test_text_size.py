"""How many tokens a text has, before it is prepared. Counts by hand, or compared with the store of a run."""

import json
from pathlib import Path

import pytest

from moe_jax.config import DataConfig, RunConfig
from moe_jax.data.token_store import prepare_token_store
from moe_jax.planning import text_size
from moe_jax.planning.text_size import bytes_per_token, text_bytes


def config(path: Path, **data: object) -> RunConfig:
    return RunConfig(data=DataConfig(**{"source": str(path), "tokenizer": "byte", **data}))  # type: ignore[arg-type]


def test_bytes_and_separators_are_counted(tmp_path: Path) -> None:
    """20 documents of 4 bytes, one of them held out. A byte is a token, and so is a separator: 4 bytes, 5 tokens."""
    text = tmp_path / "a.txt"
    text.write_text("\n<|endoftext|>\n".join(["abcd"] * 20))
    assert text_bytes(str(text)) == 19 * 4  # the file has 36 bytes for each further document
    assert bytes_per_token(config(text)) == pytest.approx(4 / 5)


def test_only_the_texts_of_json_rows_count(tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text("\n".join([json.dumps({"text": "abcd", "from": "a long name"})] * 20))
    assert text_bytes(str(rows)) == 19 * 4


def test_a_text_smaller_than_the_sample_is_counted_as_the_run_counts_it(tmp_path: Path) -> None:
    """The stream of the run has one separator more, behind the last document."""
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(f"the cat {n} sat on the mat, and the dog {n} ran" for n in range(400)))
    asked = config(text, tokenizer="bpe", vocab_size=300)
    store = prepare_token_store(asked.data, cache=tmp_path / "cache", progress=False)
    size = text_bytes(str(text))
    assert size is not None
    assert round(size / bytes_per_token(asked)) == len(store.train.tokens) - 1


def test_only_the_beginning_of_a_long_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 15 documents have 60 bytes; the rest would change the answer."""
    monkeypatch.setattr(text_size, "SAMPLE_BYTES", 60)
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(["abcd"] * 15 + ["abcdefgh"] * 100))
    assert bytes_per_token(config(text)) == pytest.approx(4 / 5)
    monkeypatch.setattr(text_size, "TRAINING_BYTES", 60)
    size = text_bytes(str(text))
    assert size is not None
    assert size > 15 * 4 + 95 * 8  # bytes of the file, separators included
