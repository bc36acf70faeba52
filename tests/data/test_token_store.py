"""The token store: what lies in it, when it is made again, and what an interruption leaves."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data import token_store
from moe_jax.data.documents import SEPARATOR
from moe_jax.data.token_store import (
    TokenStore,
    open_store,
    openings,
    prepare_token_store,
    stored_documents,
    token_stream,
    token_type,
)
from moe_jax.data.tokenizers import Stream, Tokenizer, load_tokenizer, train_tokenizer

TRAIN = ["Once upon a time there was a fox.", "The fox was old.\nIt ate.", "Grün 😀"]
VALID = ["A hen sat.", "It slept."]
BYTE = train_tokenizer(DataConfig(tokenizer="byte"))
STORE = ["manifest.json", "tokenizer.json", "train.bin", "valid.bin"]


def write_folder(folder: Path, train: list[str] = TRAIN, valid: list[str] = VALID) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(f"\n{SEPARATOR}\n".join(train), encoding="utf-8")
    (folder / "valid.txt").write_text(f"\n{SEPARATOR}\n".join(valid), encoding="utf-8")
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(source=write_folder(tmp_path / "text"), tokenizer="byte", vocab_size=260)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "above" / "cache"


def prepare(data: DataConfig, cache: Path, **options: Any) -> TokenStore:
    return prepare_token_store(data, cache=cache, progress=False, **options)


def bpe(source: str, vocab_size: int = 260) -> DataConfig:
    return DataConfig(source=source, tokenizer="bpe", vocab_size=vocab_size)


def fingerprint_of(store: TokenStore) -> str:
    return json.loads((store.folder / "manifest.json").read_text())["fingerprint"]


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob("*.partial"))


def forbidden(*_: Any) -> Any:
    raise AssertionError("made again")


# What is stored


def test_the_streams_are_separator_document_separator(data: DataConfig, cache: Path) -> None:
    """The digests and counts identify the text of saved runs."""
    store = prepare(data, cache)
    entries, fingerprint = {}, fingerprint_of(store)
    for name, split, texts in (("train", store.train, TRAIN), ("valid", store.valid, VALID)):
        expected = [256] + [token for text in texts for token in (*text.encode(), 256)]
        size = sum(len(text.encode()) for text in texts)
        assert split.tokens.tolist() == expected
        assert (split.documents, split.bytes, split.target_bytes, split.targets) == (
            *(len(texts), size, size),
            len(expected) - 1,
        )
        with pytest.raises(ValueError, match="read-only"):
            split.tokens[0] = 1
        content = (store.folder / f"{name}.bin").read_bytes()
        assert content == np.array(expected, "<u2").tobytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        entries[name] = {"tokens": len(expected), "stories": len(texts), "bytes": size, "digest": digest}
    manifest = {"format": 1, "fingerprint": fingerprint, "tokenizer": BYTE.digest, "dtype": "uint16", "splits": entries}
    assert json.loads((store.folder / "manifest.json").read_text()) == {**manifest, "source": data.source}
    assert sorted(p.name for p in store.folder.iterdir()) == STORE
    assert load_tokenizer(store.folder / "tokenizer.json").digest == BYTE.digest
    assert store.digest == xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    key = json.dumps([1, fingerprint, BYTE.digest]).encode()
    assert store.folder == cache / xxhash.xxh3_128_hexdigest(key)


def test_the_type_holds_the_separator() -> None:
    """The last id, on either side of what uint16 holds."""
    for vocab_size, size in ((65_536, 2), (65_537, 4)):
        dtype = token_type(cast(Tokenizer, SimpleNamespace(vocab_size=vocab_size)))
        assert (dtype.itemsize, np.array([vocab_size - 1], dtype)[0]) == (size, vocab_size - 1)


# When it is made


def test_a_store_is_made_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the same text elsewhere, and for a given tokenizer that is equal; nor is one trained again."""
    first = prepare(bpe(write_folder(tmp_path / "a")), cache)
    (path,) = (cache / "tokenizers").iterdir()
    assert path.stem == xxhash.xxh3_128_hexdigest(json.dumps([1, fingerprint_of(first), 260]).encode())
    monkeypatch.setattr(token_store, "_write", forbidden)
    monkeypatch.setattr(token_store, "train_tokenizer", forbidden)
    elsewhere = write_folder(tmp_path / "b")
    assert prepare(bpe(elsewhere), cache).digest == first.digest
    given = prepare(DataConfig(source=elsewhere, tokenizer="byte"), cache, tokenizer=first.tokenizer)
    assert given.folder == first.folder


def test_another_text_or_tokenizer_is_another_store(data: DataConfig, cache: Path, tmp_path: Path) -> None:
    """The same data elsewhere has the same digest. Saved runs name their text by it."""
    stores = [prepare(data, cache), prepare(bpe(data.source, 258), cache), prepare(bpe(data.source, 259), cache)]
    there = prepare(DataConfig(source=write_folder(tmp_path / "there"), tokenizer="byte"), tmp_path / "other")
    assert (there.digest, there.source) == (stores[0].digest, str(tmp_path / "there"))
    write_folder(Path(data.source), valid=[*VALID, "New."])
    stores.append(prepare(data, cache))
    assert stores[-1].valid.documents == 3
    assert len({store.digest for store in stores}) == len({store.folder for store in stores}) == 4


def change_the_tokenizer(folder: Path) -> None:
    values = {"kind": "bpe", "merges": [[97, 98]]}
    (folder / "tokenizer.json").write_text(json.dumps({**values, "digest": token_store.json_digest(values)}))


def change_the_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "valid.bin: damaged": lambda folder: os.truncate(folder / "valid.bin", 10),
    "ValueError": change_the_tokenizer,
    r"\(ValueError\)": change_the_format,
    "FileNotFoundError": lambda folder: (folder / "train.bin").unlink(),
    "JSONDecodeError": lambda folder: (folder / "manifest.json").write_text("{"),
    "TypeError": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_store_is_refused_and_made_again(said: str, data: DataConfig, cache: Path) -> None:
    first = prepare(data, cache)
    DAMAGES[said](first.folder)
    with pytest.raises(UserError, match=f"{said}.*prepare the data again$"):
        open_store(first.folder)
    assert prepare(data, cache).digest == first.digest
    assert open_store(first.folder).digest == first.digest


PREPARE = """
import sys
from pathlib import Path
from moe_jax.config import DataConfig
from moe_jax.data import token_store
print(token_store.prepare_token_store(DataConfig(source=sys.argv[1], tokenizer="byte"), cache=Path(sys.argv[2])).digest)
"""


def start(data: DataConfig, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, data.source, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_preparations_at_once_agree(data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One makes the store, and the others wait for it. A whole store is opened without a lock."""
    started = [start(data, cache) for _ in range(2)]
    digests = {process.communicate()[0] for process in started}
    monkeypatch.setattr(token_store, "locked", forbidden)
    assert digests == {prepare(data, cache).digest + "\n"}
    assert leftovers(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "")])
def test_a_preparation_that_stops_leaves_nothing(
    error: BaseException, data: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(token_store, "json_text", fail)
    said = r"cannot be written \(the disk is full\); mend that, or set MOE_JAX_CACHE"
    kind, said = (UserError, said) if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(kind, match=said):
        prepare(data, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_text_that_is_too_short_is_refused(data: DataConfig, cache: Path, tmp_path: Path) -> None:
    tokens = sum(len(text.encode()) + 1 for text in TRAIN) + 1
    prepare(data, cache, seq_len=tokens - 1)
    with pytest.raises(UserError, match=f"{tokens} training tokens.*--seq-len {tokens} needs {tokens + 1}"):
        prepare(data, cache, seq_len=tokens)
    with pytest.raises(UserError, match=r"valid\.txt.*there is no text in it"):
        prepare(DataConfig(source=write_folder(tmp_path / "empty", valid=[" "]), tokenizer="byte"), cache)
    assert leftovers(cache) == []


# The stream


@pytest.mark.parametrize("batch", [1, 40, 10**6])
def test_documents_across_batches_stay_in_order(batch: int, tmp_path: Path, monkeypatch) -> None:
    """A stream in memory is the stored one, and gives the documents back."""
    monkeypatch.setattr(token_store, "_BATCH_BYTES", batch)
    texts = [f"{i} " * (i % 7 + 1) + "é" for i in range(50)]
    (tmp_path / "train.txt").write_text(SEPARATOR.join(texts))
    (tmp_path / "valid.txt").write_text("One.")
    store = prepare(bpe(str(tmp_path), 270), tmp_path / "cache")
    assert store.tokenizer.decode(store.train.tokens) == SEPARATOR + "".join(text + SEPARATOR for text in texts)
    stream, answers = token_stream(iter(texts), store.tokenizer)
    assert answers is None
    assert stream.dtype == store.train.tokens.dtype == np.uint16
    np.testing.assert_array_equal(stream, store.train.tokens)
    monkeypatch.setattr(token_store, "_READ_TOKENS", batch)
    assert list(stored_documents(stream, store.tokenizer)) == texts
    assert list(stored_documents(stream[:-1], store.tokenizer)) == texts[:-1]  # the last one is incomplete
    assert list(stored_documents(stream[:0], store.tokenizer)) == []


def test_openings_of_different_documents_each_once() -> None:
    texts = ["Once upon a time, a dragon", "", "Once upon a time, a cat", "ROMEO:\nBut", "One sunny day, Tom", "Last"]
    stream = np.array([token for text in texts for token in (256, *text.encode())])
    assert openings(BYTE, Stream(stream)) == ["Once upon a time,", "ROMEO:", "One sunny day, Tom"]
    assert openings(BYTE, Stream(stream[:1])) == []
