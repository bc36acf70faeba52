"""A store in shards that was damaged after it was made, and texts with odd parts."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import DataConfig, UserError
from moe_jax.data import file_corpus, shards, text_files, text_notes, text_plan, token_store
from moe_jax.data.token_store import open_store
from tests.data.sharded.stores import bins, content, count_writes, data_of, prepare


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_damaged_shard_is_found_at_its_first_use_and_made_again(
    number: int, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    name = bins(store.folder)[number]
    whole = bytearray(expected[name])
    whole[len(whole) // 2] ^= 1
    (store.folder / name).write_bytes(whole)
    store = prepare(data, tmp_path / "cache")  # nothing is read yet
    with pytest.raises(UserError, match=rf"{name}: damaged, .*; start again: only this shard is prepared again$"):
        store.train.tokens[:]
    made = count_writes(monkeypatch)
    again = prepare(data, tmp_path / "cache")
    assert made == [f"train {int(name[6:11])}", "valid 0"]
    assert content(again.folder) == expected
    assert again.digest == store.digest


@pytest.mark.parametrize("kind", ["chat"], indirect=True)
def test_a_damaged_mask_is_found_at_its_first_use_and_made_again(kind: str, tmp_path: Path, monkeypatch) -> None:
    data = data_of(kind, tmp_path)
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    mask = store.folder / "train.00002.mask"
    mask.write_bytes(bytes(len(expected[mask.name])))
    answers = prepare(data, tmp_path / "cache").train.answers
    assert answers is not None
    with pytest.raises(UserError, match=r"train\.00002\.mask: damaged"):
        answers[:]
    made = count_writes(monkeypatch)
    assert content(prepare(data, tmp_path / "cache").folder) == expected
    assert made[0] == "train 2"


@pytest.mark.parametrize("lie", [{"tokens": 5}, {"stories": -1}, {"bytes": "many"}, {"digest": ""}], ids=str)
def test_a_store_whose_index_lies_is_made_again(lie: dict[str, Any], data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = content(store.folder)
    index = json.loads(expected["manifest.json"])
    index["splits"]["train"]["shards"][1].update(lie)
    (store.folder / "manifest.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="prepare the data again"):
        open_store(store.folder)
    assert content(prepare(data, tmp_path / "cache").folder) == expected


def test_a_start_on_a_prepared_text_reads_neither_the_text_nor_the_shards(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_notes, "_CLOCK_SECONDS", -10.0)
    store = prepare(data, tmp_path / "cache")
    read: list[str] = []
    true = shards.digest_of
    monkeypatch.setattr(shards, "digest_of", lambda path: read.append(path.name) or true(path))
    for module in (text_files, text_plan, file_corpus):
        monkeypatch.setattr(module, "read_chunks", lambda *_: pytest.fail("the text was read"))
    again = prepare(data, tmp_path / "cache")
    assert read == ["valid.bin"]
    assert again.digest == store.digest
    again.train.tokens[3:5]
    assert read == ["valid.bin", "train.00000.bin"]


def test_a_shard_without_documents(tmp_path: Path) -> None:
    """Rows whose text is empty fill the first parts. The first separator is there all the same."""
    row = json.dumps({"text": " ", "filler": "x" * 100}) + "\n"
    good = json.dumps({"text": "A hen."}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 10 + good + row * 10 + good)
    (tmp_path / "valid.txt").write_text("An egg.")
    store = prepare(DataConfig(source=str(tmp_path), tokenizer="byte"), tmp_path / "cache")
    assert [shard.length for shard in store.train.tokens.shards][:2] == [1, 0]
    assert store.train.tokens[:].tolist() == [256, *b"A hen.", 256, *b"A hen.", 256]


def test_an_empty_split_of_several_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": " ", "filler": "x" * 100}) + "\n") * 20)
    (tmp_path / "valid.txt").write_text("An egg.")
    with pytest.raises(UserError, match=r"train\.jsonl \(train\): there is no text in it"):
        prepare(DataConfig(source=str(tmp_path), tokenizer="byte"), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.partial")) == []


def test_a_tokenizer_learns_from_the_text_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part in which the learner stops is read to its end. Later parts are not read."""
    data = data_of("bpe", tmp_path)
    path, true = Path(data.source), token_store.train_tokenizer
    whole = path.read_text()

    def edited(at: int) -> Any:
        def train(data: DataConfig, text: Any, *rest: Any) -> Any:
            path.write_text(whole.replace(f"Story {at}:", f"Storm {at}:"))
            next(text.documents("train"))
            path.write_text(whole)
            return true(data, token_store.open_corpus(data), *rest)

        return train

    for at, noticed in ((3, True), (40, False)):
        monkeypatch.setattr(token_store, "train_tokenizer", edited(at))
        corpus = token_store.open_corpus(data)
        arguments = (data, corpus, corpus.fingerprint(), tmp_path, False)
        if noticed:
            with pytest.raises(UserError, match="the text was changed while it was read"):
                token_store._cached_tokenizer(*arguments)
        else:
            token_store._cached_tokenizer(*arguments)
