"""The files of a token store: what is written, under which name, and when they are written again."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data import shards, streams, token_store, tokenizers
from moe_jax.data.store_draft import Draft
from moe_jax.data.stream_parts import stream_parts
from moe_jax.data.streams import token_stream
from moe_jax.data.text_files import SEPARATOR
from moe_jax.data.token_store import TokenStore, open_store, prepare_token_store
from moe_jax.data.tokenizers import load_tokenizer, train_tokenizer
from moe_jax.system import files
from moe_jax.system.folders import draft_of

DOCUMENTS = ["Once.", "Grün 😀", "An old fox."]
BYTE = train_tokenizer(DataConfig(tokenizer="byte"), None)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(SEPARATOR.join(DOCUMENTS), encoding="utf-8")
    (tmp_path / "text" / "valid.txt").write_text("A hen.")
    return DataConfig(source=str(tmp_path / "text"), tokenizer="byte", vocab_size=260)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "above" / "cache"


def prepare(data: DataConfig, cache: Path, **options: Any) -> TokenStore:
    return prepare_token_store(data, cache=cache, progress=False, **options)


def bpe(data: DataConfig) -> DataConfig:
    return DataConfig(source=data.source, tokenizer="bpe", vocab_size=data.vocab_size)


# What is written


def test_a_manifest_says_what_lies_beside_it(data: DataConfig, cache: Path) -> None:
    store = prepare(data, cache)
    found = json.loads((store.folder / "manifest.json").read_text())
    train = (store.folder / "train.bin").read_bytes()
    sizes = [len(document.encode()) for document in DOCUMENTS]
    assert found == {
        "format": 1,
        "source": data.source,
        "fingerprint": store.fingerprint,
        "tokenizer": BYTE.digest,
        "dtype": "uint16",
        "splits": {
            "train": {
                "tokens": sum(sizes) + 4,
                "stories": 3,
                "bytes": sum(sizes),
                "digest": xxhash.xxh3_128_hexdigest(train),
            },
            "valid": {"tokens": 8, "stories": 1, "bytes": 6, "digest": store.valid.digest},
        },
    }
    assert len(train) == 2 * (sum(sizes) + 4)
    assert sorted(p.name for p in store.folder.iterdir()) == [
        *("manifest.json", "tokenizer.json", "train.bin", "valid.bin")
    ]
    assert load_tokenizer(store.folder / "tokenizer.json").digest == BYTE.digest


def test_a_store_is_known_by_its_data_or_its_text(data: DataConfig, cache: Path, tmp_path: Path) -> None:
    store, other = prepare(data, cache), prepare(bpe(data), cache)
    assert store.is_text_of(store.digest)
    assert store.is_text_of(f"fingerprint:{store.fingerprint}")
    assert store.fingerprint == other.fingerprint
    assert store.digest != other.digest
    for saved in (other.digest, store.fingerprint, f"fingerprint:{store.digest}", "", None, 7):
        assert not store.is_text_of(saved)


def test_a_store_is_named_by_format_text_and_tokenizer(
    data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(data, cache)
    expected = json.dumps([1, store.fingerprint, BYTE.digest]).encode()
    assert store.folder == cache / xxhash.xxh3_128_hexdigest(expected)
    monkeypatch.setattr(token_store, "FORMAT", 2)
    assert prepare(data, cache).folder != store.folder
    with pytest.raises(UserError, match="made by another version, or its tokenizer was changed"):
        open_store(store.folder)


def test_a_store_is_read_in_parts(data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_READ_BYTES", 7)
    store = prepare(data, cache)
    assert open_store(store.folder).digest == store.digest
    with pytest.raises(ValueError, match="read-only"):
        store.train.tokens[:][0] = 1


@pytest.mark.parametrize(("batch", "sizes"), [(1, [3, 3, 3, 3]), (4, [6, 6]), (6, [6, 6]), (7, [9, 3]), (99, [12])])
def test_documents_are_encoded_in_batches_of_a_size(
    batch: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes of UTF-8, and not in characters."""
    monkeypatch.setattr(streams, "_BATCH_BYTES", batch)
    documents = ["日", "aaa", "本", "bbb"]
    found = list(streams._batches(iter(documents)))
    assert [size for _, size in found] == sizes
    assert [document for part, _ in found for document in part] == documents
    assert list(streams._batches(iter([]))) == []


def test_progress_counts_documents_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BATCH_BYTES", 1)
    told: list[tuple[int, int]] = []
    part = next(stream_parts(iter(["日", "ab"])))
    Draft(tmp_path).write("train", 0, part, BYTE, token_store._Tally(lambda *seen: told.append(seen)).add)
    assert told == [(1, 3), (2, 5)]


@pytest.mark.parametrize("batch", [1, 10**6])
def test_a_stream_in_memory_is_the_stored_one(
    batch: int, data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_BATCH_BYTES", batch)
    store = prepare(data, cache)
    stream, answers = token_stream(iter(DOCUMENTS), BYTE)
    assert answers is None
    assert stream.dtype == store.train.tokens.dtype == np.uint16
    np.testing.assert_array_equal(stream, store.train.tokens)
    assert token_stream(iter([]), BYTE).tokens[:].tolist() == [256]


# When it is written again


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the locks that are asked for."""
    asked: list[str] = []

    @contextmanager
    def counted(path: Path, wait: bool) -> Iterator[object]:
        assert wait
        asked.append(path.name)
        with files.locked(path, wait) as lock:
            yield lock

    monkeypatch.setattr(token_store, "locked", counted)
    return asked


def test_a_whole_store_is_opened_without_a_lock(data: DataConfig, cache: Path, locks: list[str]) -> None:
    """The cache may lie in a folder that cannot be written."""
    store = prepare(data, cache)
    assert locks == [f"{store.folder.name}.lock"]
    prepare(data, cache)
    assert len(locks) == 1
    os.truncate(store.folder / "train.bin", 4)
    assert prepare(data, cache).digest == store.digest
    assert len(locks) == 2


def test_drafts_of_the_same_store_are_removed_and_no_others(
    data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, another process may be writing them."""
    folder = prepare(data, cache).folder
    own, other = (cache / f"{key}.partial" for key in (folder.name, "0" * 32))
    for without_locks in (True, False):
        for draft in (own, other):
            draft.mkdir(exist_ok=True)
            leftovers = [draft_of(draft / f"train.00000.{ending}") for ending in ("bin", "json")]
            for path in leftovers:
                path.touch()
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            if without_locks:
                patch.setattr(files, "fcntl", None)
            prepare(data, cache)
        assert own.exists() == without_locks
        assert sorted(path.name for path in folder.iterdir()) == [
            *("manifest.json", "tokenizer.json", "train.bin", "valid.bin")
        ]
        assert all(path.exists() for path in leftovers), "those of the other store"


def test_a_store_that_another_process_built_meanwhile_is_used(
    data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process waited for the lock."""
    there = prepare(data, cache).folder
    there.rename(cache / "aside")

    @contextmanager
    def waited(path: Path, wait: bool) -> Iterator[None]:
        (cache / "aside").rename(there)
        yield None

    monkeypatch.setattr(token_store, "locked", waited)
    monkeypatch.setattr(token_store, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(data, cache).folder == there


def test_a_rename_that_fails_is_an_error_unless_the_store_is_there(
    data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=rf"^token cache {cache}: cannot be written \(Permission denied\); mend that"):
        prepare(data, cache)
    assert list(cache.glob("*.partial")) == []


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "FileNotFoundError"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "JSONDecodeError"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "KeyError"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "TypeError"),
    ],
)
def test_a_store_that_is_not_whole_says_why(harm: Any, cause: str, data: DataConfig, cache: Path) -> None:
    folder = prepare(data, cache).folder
    harm(folder)
    with pytest.raises(UserError, match=rf"^{folder}: no whole token store \({cause}\); prepare the data again$"):
        open_store(folder)


# Its tokenizer


def test_a_trained_tokenizer_is_kept_by_text_and_size(
    data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(bpe(data), cache)
    path = cache / "tokenizers"
    expected = json.dumps([1, first.fingerprint, 260]).encode()
    assert [p.name for p in path.iterdir()] == [f"{xxhash.xxh3_128_hexdigest(expected)}.json"]
    trained: list[int] = []
    true = token_store.train_tokenizer

    def count(*arguments: Any) -> Any:
        trained.append(1)
        return true(*arguments)

    monkeypatch.setattr(token_store, "train_tokenizer", count)
    assert prepare(bpe(data), cache).tokenizer.digest == first.tokenizer.digest
    assert trained == []
    next(path.iterdir()).write_text("{")
    assert prepare(bpe(data), cache).tokenizer.digest == first.tokenizer.digest
    assert trained == [1]
    assert load_tokenizer(next(path.iterdir())).digest == first.tokenizer.digest


def test_other_tokenizers_are_not_kept(data: DataConfig, cache: Path) -> None:
    prepare(data, cache)
    assert not (cache / "tokenizers").exists()


def test_a_given_tokenizer_is_used(data: DataConfig, cache: Path) -> None:
    assert prepare(bpe(data), cache, tokenizer=BYTE).tokenizer is not None
    assert not (cache / "tokenizers").exists()


@pytest.mark.parametrize(("size", "total"), [(None, None), (7, 7), (10**9, 50_000_000)])
def test_the_bar_of_learning_ends_where_reading_ends(
    size: int | None, total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []

    @contextmanager
    def bar(*arguments: Any) -> Iterator[Any]:
        shown.append(arguments)
        yield lambda *_: None

    class Text:
        def size(self, split: str) -> int | None:
            assert split == "train"
            return size

        def documents(self, split: str) -> Iterator[str]:
            return iter(["ab ab ab"] if split == "train" else [])

    monkeypatch.setattr(tokenizers, "byte_progress", bar)
    text: Any = Text()
    assert train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=1260), text).vocab_size > 257
    assert capsys.readouterr().err == ""
    train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=1260), text, progress=True)
    assert capsys.readouterr().err == "learning a tokenizer of 1,260 entries ...\n"
    assert [arguments[2:] for arguments in shown] == [(total, False), (total, True)]
