"""A corpus as token ids: two memory-mapped files, built once for each pair of corpus and tokenizer.

    CACHE/KEY/train.bin, valid.bin    separator, document, separator, ..., separator; little-endian,
                                      uint16 where the vocabulary has at most 65,536 entries, else uint32
    CACHE/KEY/tokenizer.json
    CACHE/KEY/manifest.json           source, digests of text and tokenizer, counts, digest of each file
    CACHE/KEY/train.mask, valid.mask  of conversations only: a byte for each token, 1 if it is learned and scored
    CACHE/tokenizers/KEY.json         trained tokenizers, so that an interrupted build does not train again

CACHE is `system.files.cache_dir`. KEY is a digest of the text and the tokenizer, so a changed input gets a new store.

A store is built in a temporary folder in CACHE, and the folder is renamed once all files are on the disk. So a store is
either complete or absent, even if a build is interrupted or several processes build at once. If the system has locks, a
second process waits for the first and uses its store, and a build removes the temporary folders of killed builds.
Opening a store reads all its files once and compares their digests. A damaged store is built again.
"""

import dataclasses
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data.chat_rows import text_size
from moe_jax.data.chats import encode_chats
from moe_jax.data.corpora import Corpus, open_corpus
from moe_jax.data.text_files import SplitName
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from moe_jax.system.console import Report, byte_progress
from moe_jax.system.files import cache_dir, disk_cause, locked
from moe_jax.system.json_text import json_text

FORMAT = 1  # part of every KEY; raise it when a change of the code gives other files for the same text and tokenizer
_BATCH_BYTES = 1 << 20  # text encoded at a time
_READ_BYTES = 1 << 22
_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")


@dataclass(frozen=True)
class Split:
    """One stream of tokens."""

    tokens: np.ndarray
    """uint16 or uint32 [N], memory-mapped, read-only."""
    documents: int
    bytes: int
    """UTF-8 bytes of the stripped documents."""
    digest: str
    """xxh3-128 of the file."""
    answers: np.ndarray | None = None
    """bool [N], memory-mapped: the tokens that are learned and scored. None if all of them are."""
    answer_tokens: int = 0
    answer_bytes: int = 0
    """UTF-8 bytes of the tokens in `answers`."""

    @property
    def stream(self) -> "Stream":
        return Stream(self.tokens, self.answers)

    @property
    def targets(self) -> int:
        """Tokens that are predicted and scored."""
        return len(self.tokens) - 1 if self.answers is None else self.answer_tokens

    @property
    def target_bytes(self) -> int:
        """UTF-8 bytes of these tokens."""
        return self.bytes if self.answers is None else self.answer_bytes


@dataclass(frozen=True)
class TokenStore:
    """A corpus in tokens."""

    train: Split
    valid: Split
    tokenizer: Tokenizer
    folder: Path
    source: str
    """The value of `--data` that the store was built from."""
    fingerprint: str
    """Digest of the text (`Corpus.fingerprint`)."""
    digest: str
    """Digest of text, tokenizer and both streams. Equal digests mean equal training data. Paths are not included."""

    def is_text_of(self, saved: Any) -> bool:
        """Whether a checkpoint was trained on this text. `saved` is the entry `context.data` of its manifest.

        The entry is the digest of a store or, after a migration (`runs.migrations`), `fingerprint:` and a fingerprint.
        """
        return saved in (self.digest, f"fingerprint:{self.fingerprint}")


def prepare_token_store(
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Path | None = None,
    progress: bool = True,
    seq_len: int | None = None,
) -> TokenStore:
    """The token store of `data`. Opens the store if there is one, else builds it.

    A `tokenizer` replaces the one that `data` names. With `seq_len`, the training stream must hold at least one window
    of `seq_len` + 1 tokens.

    Raises ConfigError if the source does not exist. Raises UserError if the text is empty, too short or not UTF-8, if
    the network is needed and missing, or if the cache cannot be written.
    """
    cache = cache or cache_dir()
    corpus = open_corpus(data)
    fingerprint = corpus.fingerprint()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if tokenizer is None:
            tokenizer = _cached_tokenizer(data, corpus, fingerprint, cache, progress)
        store = _open_or_build(corpus, fingerprint, tokenizer, cache, progress)
    except OSError as error:
        raise UserError(
            f"token cache {cache}: cannot be written ({disk_cause(error)}); mend that, or set MOE_JAX_CACHE to another "
            "folder"
        ) from None
    if seq_len is not None:
        _check_length(store, seq_len)
    return store


def open_store(folder: Path) -> TokenStore:
    """The store in a folder. Raises UserError if it is missing, damaged or of another format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if (manifest["format"], manifest["tokenizer"]) != (FORMAT, tokenizer.digest):
            raise UserError(f"{folder}: made by another version, or its tokenizer was changed; prepare the data again")
        train, valid = (_open_split(folder / f"{name}.bin", manifest["splits"][name], tokenizer) for name in _SPLITS)
        digest = _digest({key: value for key, value in manifest.items() if key != "source"})
        return TokenStore(train, valid, tokenizer, folder, manifest["source"], manifest["fingerprint"], digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole token store ({type(error).__name__}); prepare the data again") from None


def _open_split(path: Path, counts: dict[str, Any], tokenizer: Tokenizer) -> Split:
    _check_digest(path, counts["digest"])
    tokens = np.memmap(path, dtype=_dtype(tokenizer), mode="r")
    split = Split(tokens, counts["stories"], counts["bytes"], counts["digest"])
    if "answers" not in counts:
        return split
    found, mask = counts["answers"], path.with_suffix(".mask")
    _check_digest(mask, found["digest"])
    answers = np.memmap(mask, dtype=np.bool_, mode="r")
    if len(answers) != len(tokens):
        raise UserError(f"{mask}: has {len(answers)} entries for {len(tokens)} tokens; prepare the data again")
    return dataclasses.replace(split, answers=answers, answer_tokens=found["tokens"], answer_bytes=found["bytes"])


def _check_digest(path: Path, expected: str) -> None:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise UserError(f"{path}: damaged, its digest does not match; prepare the data again")


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _digest(values: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _check_length(store: TokenStore, seq_len: int) -> None:
    """A validation stream is never too short: no split is empty, so it has a token between two separators."""
    train = len(store.train.tokens)
    if train < seq_len + 1:
        raise UserError(
            f"--data {store.source}: {train} training tokens, and a context of --seq-len {seq_len} needs "
            f"{seq_len + 1}; give a longer text or a smaller --seq-len"
        )


def _cached_tokenizer(data: DataConfig, corpus: Corpus, fingerprint: str, cache: Path, progress: bool) -> Tokenizer:
    if data.tokenizer != "bpe":
        return train_tokenizer(data, corpus)
    folder = cache / "tokenizers"
    path = folder / f"{_digest([FORMAT, fingerprint, data.vocab_size])}.json"
    try:
        return load_tokenizer(path)
    except UserError:  # none yet, or a damaged one
        reading = corpus.reading()
        tokenizer = train_tokenizer(data, reading, progress)
        _check_unchanged(reading, fingerprint)
        folder.mkdir(exist_ok=True)
        tokenizer.save(path)
        return tokenizer


def _open_or_build(corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, cache: Path, progress: bool) -> TokenStore:
    key = _digest([FORMAT, fingerprint, tokenizer.digest])
    folder = cache / key
    if folder.exists():  # before the lock is asked for: a whole cache may lie in a folder that cannot be written
        with suppress(UserError):
            return open_store(folder)
    with locked(cache / f"{key}.lock", wait=True) as lock:
        if folder.exists():
            try:
                return open_store(folder)
            except UserError:
                shutil.rmtree(folder)
        if lock is not None:
            for leftover in cache.glob(f"{key}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        draft = cache / f"{key}.{secrets.token_hex(8)}.partial"
        try:
            draft.mkdir()
            _build(draft, corpus, fingerprint, tokenizer, progress)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # There is no lock, and another process has built the same store first. Use that store.
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return open_store(folder)


def _build(folder: Path, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, progress: bool) -> None:
    splits, reading = {}, corpus.reading()
    for name in _SPLITS:
        with byte_progress(f"tokenizing {name}", "documents", corpus.size(name), progress) as report:
            splits[name] = _write_split(folder / f"{name}.bin", reading.documents(name), tokenizer, report)
    _check_unchanged(reading, fingerprint)
    tokenizer.save(folder / "tokenizer.json")
    manifest = {
        "format": FORMAT,
        "source": corpus.name,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.digest,
        "dtype": _dtype(tokenizer).name,
        "splits": splits,
    }
    with (folder / "manifest.json").open("wb") as file:
        file.write(json_text(manifest, indent=2).encode())
        _to_disk(file)


def _check_unchanged(reading: Corpus, fingerprint: str) -> None:
    """Raise UserError if the text that was read is not the text of the fingerprint, under which the result is kept."""
    if reading.fingerprint() != fingerprint:
        raise UserError(f"--data {reading.name}: the text was changed while it was read; start again")


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Written:
    """A file that is written and digested at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, array: np.ndarray) -> None:
        self._file.write(array.data)
        self._digest.update(array.data)

    def finish(self) -> str:
        """Bring the file to the disk. Returns its digest."""
        _to_disk(self._file)
        return self._digest.hexdigest()


def _write_split(path: Path, documents: Iterator[Any], tokenizer: Tokenizer, report: Report) -> dict[str, Any]:
    """Encode the documents into a file, and the mask of conversations into another. Returns the split's entry in the
    manifest."""
    count = size = tokens = learned = learned_bytes = 0
    lengths, answers = tokenizer.token_bytes(), None
    with ExitStack() as files:
        stream = _Written(files.enter_context(path.open("wb")))
        for part in _stream_parts(documents, tokenizer):
            count, size, tokens = count + part.documents, size + part.bytes, tokens + len(part.tokens)
            stream.write(part.tokens)
            if part.answers is not None:
                answers = answers or _Written(files.enter_context(path.with_suffix(".mask").open("wb")))
                answers.write(part.answers)
                learned += int(part.answers.sum())
                learned_bytes += int(lengths[part.tokens[part.answers]].sum(dtype=np.int64))
            report(count, size)
        entry = {"tokens": tokens, "stories": count, "bytes": size, "digest": stream.finish()}
        if answers is not None:
            entry["answers"] = {"tokens": learned, "bytes": learned_bytes, "digest": answers.finish()}
    return entry


class _Part(NamedTuple):
    """A part of a stream, about 1 MiB of text."""

    tokens: np.ndarray
    answers: np.ndarray | None
    documents: int
    bytes: int


def _stream_parts(documents: Iterator[Any], tokenizer: Tokenizer) -> Iterator[_Part]:
    """The stream `separator, document, separator, ..., separator`, part by part. Documents are texts or conversations,
    not both."""
    dtype = _dtype(tokenizer)
    end, unlearned = np.array([tokenizer.separator_id], dtype), np.zeros(1, bool)
    tokens, answers = [end], [unlearned]
    for batch, size in _batches(documents):
        chats = not isinstance(batch[0], str)
        if chats:
            for encoded in encode_chats(tokenizer, batch):
                tokens += [encoded.tokens.astype(dtype), end]
                answers += [encoded.answers, unlearned]
        else:
            tokens += [part for ids in tokenizer.encode_batch(batch) for part in (np.asarray(ids, dtype), end)]
        yield _Part(np.concatenate(tokens), np.concatenate(answers) if chats else None, len(batch), size)
        tokens, answers = [end[:0]], [unlearned[:0]]


def _batches(documents: Iterator[Any]) -> Iterator[tuple[list[Any], int]]:
    """(documents, their bytes), about 1 MiB at a time."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.encode()) if isinstance(document, str) else text_size(document)
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def stored_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a stream `separator, document, separator, ..., separator`, in order."""
    ends = np.flatnonzero(tokens == tokenizer.separator_id)
    for first, end in itertools.pairwise(ends):
        yield tokenizer.decode(tokens[first + 1 : end].tolist())


class Stream(NamedTuple):
    """Tokens that are scored, `separator, document, separator, ..., separator`."""

    tokens: np.ndarray
    answers: np.ndarray | None = None
    """bool [N]: the tokens that count. None if all of them do."""


def token_stream(documents: Iterator[Any], tokenizer: Tokenizer) -> Stream:
    """The stream of texts or conversations in memory, for what is scored once and not stored."""
    parts = list(_stream_parts(documents, tokenizer))
    if not parts:
        return Stream(np.array([tokenizer.separator_id], _dtype(tokenizer)))
    answers = [part.answers for part in parts if part.answers is not None]
    return Stream(np.concatenate([part.tokens for part in parts]), np.concatenate(answers) if answers else None)
