"""Stores of many small shards, for the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import DataConfig
from moe_jax.data import text_plan
from moe_jax.data.store_draft import Draft
from moe_jax.data.synthetic.chats import write_chats
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.token_store import TokenStore, prepare_token_store

PART = 300
KINDS = {"byte": PART, "bpe": PART, "chat": 2000, "stories": 20_000}
"""Kind of text -> the size of its parts."""


def documents(count: int = 60) -> list[str]:
    return [f"Story {i}: " + "once upon a time é😀 " * (i % 5) + "the end." for i in range(count)]


def data_of(kind: str, folder: Path) -> DataConfig:
    if kind == "stories":
        return DataConfig(source="stories", stories=200, tokenizer="byte")
    if kind == "chat":
        write_chats(folder / "chats.jsonl", 60)
        return DataConfig(source=str(folder / "chats.jsonl"), tokenizer="byte", format="chat")
    (folder / "text.txt").write_text(SEPARATOR.join(documents()), encoding="utf-8")
    return DataConfig(source=str(folder / "text.txt"), tokenizer="bpe" if kind == "bpe" else "byte", vocab_size=280)


def prepare(data: DataConfig, cache: Path) -> TokenStore:
    return prepare_token_store(data, cache=cache, progress=False)


def unsharded(data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    """The oracle: the whole text at once."""
    with monkeypatch.context() as patch:
        patch.setattr(text_plan, "PART_BYTES", 1 << 40)
        store = prepare(data, cache)
    assert (store.folder / "train.bin").is_file()
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bins(folder: Path, split: str = "train") -> list[str]:
    return sorted(path.name for path in folder.glob(f"{split}.*bin"))


def count_writes(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """The shards that are made from now on. `stop_at` more are made before Ctrl-C."""
    made: list[str] = []
    true = Draft.write

    def write(draft: Draft, split: str, number: int, *arguments: Any) -> Any:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(f"{split} {number}")
        return true(draft, split, number, *arguments)

    monkeypatch.setattr(Draft, "write", write)
    return made
