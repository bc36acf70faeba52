"""A store in shards: the same ids, digests and batches as one file."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import shards
from moe_jax.data.batches import evaluation_windows, text_bytes, train_positions, validation_subset
from moe_jax.data.opening import openings
from moe_jax.data.streams import stored_documents
from tests.data.sharded.stores import PART, bins, content, data_of, documents, prepare, unsharded


def test_the_union_is_the_store_of_the_whole_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(kind, tmp_path)
    one, many = unsharded(data, tmp_path / "one", monkeypatch), prepare(data, tmp_path / "many")
    assert len(bins(many.folder)) > 3
    assert many.digest == one.digest
    assert many.folder.name == one.folder.name
    for a, b in ((one.train, many.train), (one.valid, many.valid)):
        assert (a.documents, a.bytes, a.digest, a.targets, a.target_bytes) == (
            *(b.documents, b.bytes, b.digest, b.targets, b.target_bytes),
        )
        np.testing.assert_array_equal(a.tokens[:], b.tokens[:])
        assert (a.answers is None) == (b.answers is None) == (kind != "chat")
        if a.answers is not None and b.answers is not None:
            np.testing.assert_array_equal(a.answers[:], b.answers[:])
    pieces = [np.fromfile(many.folder / name, "<u2") for name in bins(many.folder)]
    np.testing.assert_array_equal(np.concatenate(pieces), one.train.tokens[:])
    assert all(piece[-1] == many.tokenizer.separator_id for piece in pieces)  # whole documents


def test_the_ids_of_the_union_by_hand(data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    expected = [256] + [token for document in documents()[:57] for token in (*document.encode(), 256)]
    assert store.train.tokens[:].tolist() == expected


def test_windows_cross_the_ends_of_shards(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that reads a stream gives the same numbers as on one file."""
    one, many = unsharded(data, tmp_path / "one", monkeypatch), prepare(data, tmp_path / "many")
    count, ends = len(many.train.tokens), np.cumsum([shard.length for shard in many.train.tokens.shards])[:-1]
    crossing = 0
    for step in range(40):
        where = train_positions(count, seed=3, step=step, batch_size=4, seq_len=100).reshape(2, 2, -1)
        np.testing.assert_array_equal(one.train.tokens[where], many.train.tokens[where])
        crossing += sum(row[0] < end <= row[-1] for row in where.reshape(4, -1) for end in ends)
    assert crossing > 20
    for a, b in zip(*(evaluation_windows(s.train.tokens, seq_len=100, batch_size=5) for s in (one, many)), strict=True):
        for name in ("inputs", "targets", "start", "weights"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert list(stored_documents(many.train.tokens, many.tokenizer)) == documents()[:57]
    sizes = many.tokenizer.token_bytes()
    assert text_bytes(many.train.tokens, sizes) == many.train.bytes
    for limit in (10, 500, 10**6):
        a, b = (validation_subset(s.train.tokens, 256, limit) for s in (one, many))
        np.testing.assert_array_equal(a, b)
    opening = [" ".join(document.split()[:4]) for document in documents()]
    assert openings(many.tokenizer, many.train.tokens, 30) == opening[:30]


def test_the_index_has_an_entry_for_each_shard(data: DataConfig, tmp_path: Path) -> None:
    store = prepare(data, tmp_path / "cache")
    train = json.loads((store.folder / "manifest.json").read_text())["splits"]["train"]
    names = [f"train.{i:05d}.bin" for i in range(len(train["shards"]))]
    assert bins(store.folder) == names
    assert sorted(content(store.folder)) == sorted([*names, "valid.bin", "manifest.json", "tokenizer.json"])
    for name, entry in zip(names, train["shards"], strict=True):
        assert shards.digest_of(store.folder / name) == entry["digest"]
        assert (store.folder / name).stat().st_size == 2 * entry["tokens"]
        assert PART < entry["bytes"] + 13 * entry["stories"] < 2 * PART or name == names[-1]
    assert [path.name for path in (tmp_path / "cache").glob("*.partial")] == []
