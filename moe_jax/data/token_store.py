"""A corpus as token ids: one stream for each split, in memory-mapped files that are made once.

    CACHE/KEY/train.bin, valid.bin     separator, document, separator, ..., separator; little-endian,
                                       uint16 where the vocabulary has at most 65,536 entries, else uint32
    CACHE/KEY/train.mask, valid.mask   of conversations only: a byte for each token, 1 if it is learned and scored
    CACHE/KEY/tokenizer.json
    CACHE/KEY/manifest.json            source, digests of text and tokenizer, and for each split its counts and the
                                       digests of its files
    CACHE/tokenizers/KEY.json          trained tokenizers

CACHE is `system.files.cache_dir`. KEY is a digest of the text and the tokenizer, so a changed input gets a new store. A
store is written into a folder of another name, and renamed at the end: it is complete or absent. A preparation that was
killed starts again. A second process waits for the first and uses its store. The files are compared with their digests
whenever a store is opened; a damaged store is made again.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import DataConfig, UserError
from moe_jax.data.chats import encode_chats
from moe_jax.data.corpora import Corpus, open_corpus
from moe_jax.data.documents import SEPARATOR, SplitName
from moe_jax.data.tokenizers import Stream, Tokenizer, json_digest, load_tokenizer, train_tokenizer
from moe_jax.system.errors import disk_cause
from moe_jax.system.files import cache_dir, file_digest, json_text, locked, new_folder
from moe_jax.system.terminal import Report, document_progress

FORMAT = 1  # part of every KEY; raise it when a change of the code gives other files for the same text and tokenizer
_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")
_BATCH_BYTES = 1 << 22
"""Text encoded at a time. Tokenizers encode the documents of a batch side by side, each at most 1 MiB long."""
_READ_TOKENS = 1 << 20  # tokens looked at in a time
_SEARCHED = 1 << 16  # tokens in which openings are looked for


@dataclass(frozen=True)
class Split:
    """One stream of tokens."""

    tokens: np.ndarray
    """uint16 or uint32 [N], memory-mapped, read-only."""
    documents: int
    bytes: int
    """UTF-8 bytes of the stripped documents."""
    targets: int
    """Tokens that are predicted and scored."""
    target_bytes: int
    """UTF-8 bytes of these tokens."""
    answers: np.ndarray | None = None
    """bool [N], memory-mapped: the tokens that are learned and scored. None if all of them are."""

    @property
    def stream(self) -> Stream:
        return Stream(self.tokens, self.answers)


@dataclass(frozen=True)
class TokenStore:
    """A corpus in tokens."""

    train: Split
    valid: Split
    tokenizer: Tokenizer
    folder: Path
    source: str
    """The value of `--data` that the store was made from."""
    digest: str
    """Digest of text, tokenizer and both streams, without paths. Equal digests mean equal training data. A checkpoint
    holds the digest of its text as `context.data`."""


# From a text to its token ids on disk


def prepare_token_store(
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Path | None = None,
    progress: bool = True,
    seq_len: int | None = None,
) -> TokenStore:
    """The token store of `data`. Opens the store if there is one, else makes it.

    A `tokenizer` replaces the one that `data` names. With `seq_len`, the training stream must hold at least one window
    of `seq_len` + 1 tokens.

    Raises ConfigError if the source does not exist. Raises UserError if the text is empty, too short or not UTF-8, if
    the network is needed and missing, or if the cache cannot be written.
    """
    cache, corpus = cache or cache_dir(), open_corpus(data)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizer or _tokenizer(data, corpus, cache, progress)
        store = _store(data.source, corpus, tokenizer, cache, progress)
    except OSError as error:
        raise UserError(
            f"token cache {cache}: cannot be written ({disk_cause(error)}); mend that, or set MOE_JAX_CACHE to another "
            "folder"
        ) from None
    # A validation stream is never too short: no split is empty, so it has a token between two separators.
    if seq_len is not None and len(store.train.tokens) < seq_len + 1:
        raise UserError(
            f"--data {store.source}: {len(store.train.tokens)} training tokens, and a context of --seq-len {seq_len} "
            f"needs {seq_len + 1}; give a longer text or a smaller --seq-len"
        )
    return store


def _tokenizer(data: DataConfig, corpus: Corpus, cache: Path, progress: bool) -> Tokenizer:
    """The tokenizer that `data` asks for. One that was trained is kept in the cache."""
    if data.tokenizer != "bpe":
        return train_tokenizer(data)
    path = cache / "tokenizers" / f"{json_digest([FORMAT, corpus.fingerprint(), data.vocab_size])}.json"
    with suppress(UserError):  # none yet, or a damaged one
        return load_tokenizer(path)
    tokenizer = train_tokenizer(data, corpus.documents("train"), progress)
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _store(source: str, corpus: Corpus, tokenizer: Tokenizer, cache: Path, progress: bool) -> TokenStore:
    """The store of a text and a tokenizer, opened or made."""
    folder = cache / json_digest([FORMAT, corpus.fingerprint(), tokenizer.digest])
    with suppress(UserError):  # before the lock: a whole cache may lie in a folder that cannot be written
        return open_store(folder)
    with locked(folder.with_suffix(".lock"), wait=True):
        with suppress(UserError):  # another process has made it meanwhile
            return open_store(folder)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        with new_folder(folder) as draft:
            _write(draft, source, corpus, tokenizer, progress)
    return open_store(folder)


def _write(folder: Path, source: str, corpus: Corpus, tokenizer: Tokenizer, progress: bool) -> None:
    tokenizer.save(folder / "tokenizer.json")
    splits = {}
    for name in _SPLITS:
        with document_progress(f"tokenizing {name}", progress) as report:
            splits[name] = _write_split(folder / name, corpus.documents(name), tokenizer, report)
    manifest = {
        "format": FORMAT,
        "source": source,
        "fingerprint": corpus.fingerprint(),
        "tokenizer": tokenizer.digest,
        "dtype": token_type(tokenizer).name,
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json_text(manifest, indent=2), encoding="utf-8")


def _write_split(path: Path, documents: Iterator[Any], tokenizer: Tokenizer, report: Report) -> dict[str, Any]:
    """Write the tokens of a split, and the mask of conversations. Returns the split's entry in the manifest."""
    stream, mask = path.with_suffix(".bin"), path.with_suffix(".mask")
    entry: dict[str, Any] = {"tokens": 0, "stories": 0, "bytes": 0}
    learned, sizes = {"tokens": 0, "bytes": 0}, tokenizer.token_bytes()
    with stream.open("wb") as tokens, mask.open("wb") as answers:
        for piece, count, size in encoded(documents, tokenizer):
            tokens.write(piece.tokens.data)
            entry["tokens"] += len(piece.tokens)
            entry["stories"] += count
            entry["bytes"] += size
            if piece.answers is not None:
                answers.write(piece.answers.data)
                learned["tokens"] += int(piece.answers.sum())
                learned["bytes"] += int(sizes[piece.tokens[piece.answers]].sum(dtype=np.int64))
            report(entry["stories"], entry["bytes"])
    entry["digest"] = file_digest(stream)
    if mask.stat().st_size:
        return {**entry, "answers": {**learned, "digest": file_digest(mask)}}
    mask.unlink()
    return entry


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in files: little-endian uint16, or uint32 if the vocabulary has more than 65,536 entries."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(documents: Iterator[Any], tokenizer: Tokenizer) -> Iterator[tuple[Stream, int, int]]:
    """The stream of at least one document, about 4 MiB of text at a time, with the number of documents and of bytes.

    Documents are texts or conversations, not both.
    """
    dtype = token_type(tokenizer)
    end, unlearned = np.array([tokenizer.separator_id], dtype), np.zeros(1, bool)
    tokens: list[Any] = [end]
    answers: list[Any] = [unlearned]
    for batch, size in _batches(documents):
        if isinstance(batch[0], str):
            tokens += chain.from_iterable((np.asarray(ids, dtype), end) for ids in tokenizer.encode_batch(batch))
            yield Stream(np.concatenate(tokens)), len(batch), size
        else:
            for chat in encode_chats(tokenizer, batch):
                tokens += [chat.tokens.astype(dtype), end]
                answers += [chat.answers, unlearned]
            yield Stream(np.concatenate(tokens), np.concatenate(answers)), len(batch), size
        tokens, answers = [], []


def _batches(documents: Iterator[Any]) -> Iterator[tuple[list[Any], int]]:
    """(documents, UTF-8 bytes of their texts), about 4 MiB at a time."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        texts = [document] if isinstance(document, str) else [message.content for message in document]
        size += sum(len(text.encode()) for text in texts)
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


# What lies there


def open_store(folder: Path) -> TokenStore:
    """The store in a folder. Raises UserError if it is missing, damaged or of another format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if (manifest["format"], manifest["tokenizer"]) != (FORMAT, tokenizer.digest):
            raise ValueError
        train, valid = (_open_split(folder / name, manifest["splits"][name], tokenizer) for name in _SPLITS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole token store ({type(error).__name__}); prepare the data again") from None
    digest = json_digest({key: value for key, value in manifest.items() if key != "source"})  # saved runs hold it
    return TokenStore(train, valid, tokenizer, folder, manifest["source"], digest)


def _open_split(path: Path, entry: dict[str, Any], tokenizer: Tokenizer) -> Split:
    tokens = _mapped(path.with_suffix(".bin"), entry["digest"], token_type(tokenizer))
    counted = {"tokens": len(tokens) - 1, "bytes": entry["bytes"]}  # all but the first are predicted
    answers = None
    if "answers" in entry:
        counted = entry["answers"]
        answers = _mapped(path.with_suffix(".mask"), counted["digest"], np.dtype(np.bool_))
    return Split(tokens, entry["stories"], entry["bytes"], counted["tokens"], counted["bytes"], answers)


def _mapped(path: Path, digest: str, dtype: np.dtype) -> np.ndarray:
    if file_digest(path) != digest:
        raise UserError(f"{path}: damaged, its digest does not match; prepare the data again")
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def token_stream(documents: Iterator[Any], tokenizer: Tokenizer) -> Stream:
    """The stream of texts or conversations in memory, for what is scored once and not stored."""
    parts = [part for part, _, _ in encoded(documents, tokenizer)]
    answers = [part.answers for part in parts if part.answers is not None]
    return Stream(np.concatenate([part.tokens for part in parts]), np.concatenate(answers) if answers else None)


def stored_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a stream, in order."""
    before = None
    for first in range(0, len(tokens), _READ_TOKENS):
        ends = first + np.flatnonzero(tokens[first : first + _READ_TOKENS] == tokenizer.separator_id)
        for end in ends.tolist():
            if before is not None:
                yield tokenizer.decode(tokens[before + 1 : end].tolist())
            before = end


def openings(tokenizer: Tokenizer, stream: Stream) -> list[str]:
    """What a sample begins with, to look like the text of the model: up to four words, at most 48 characters, of the
    first lines of the first three documents that differ in them. Of conversations, the first question."""
    documents = tokenizer.decode(stream.tokens[:_SEARCHED].tolist()).split(SEPARATOR)
    if stream.answers is not None:
        turns = (turn.partition("\n") for turn in documents)
        return [content for role, _, content in turns if role == "user"][:1]
    lines = (text.lstrip().partition("\n")[0].split()[:4] for text in documents)
    return list(dict.fromkeys(" ".join(words)[:48] for words in lines if words))[:3]
