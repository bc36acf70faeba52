"""A corpus as token ids: memory-mapped files, built once for each pair of corpus and tokenizer.

    CACHE/KEY/train.bin, valid.bin          separator, document, separator, ..., separator; little-endian,
                                            uint16 where the vocabulary has at most 65,536 entries, else uint32
    CACHE/KEY/train.00000.bin, ...          instead of train.bin: the shards of a text of more than 128 MiB, in order
    CACHE/KEY/tokenizer.json
    CACHE/KEY/manifest.json                 the index: source, digests of text and tokenizer, and for each split and
                                            each shard its counts and the digest of its file
    CACHE/KEY/train.mask, valid.mask        of conversations only: a byte for each token, 1 if it is learned and scored.
                                            In shards like the tokens
    CACHE/KEY.partial/                      a store that is being built (`store_draft.py`)
    CACHE/tokenizers/KEY.json               trained tokenizers, so that an interrupted build does not train again
    CACHE/texts/KEY.json                    what a large text is (`text_notes.py`)

CACHE is `system.files.cache_dir`. KEY is a digest of the text and the tokenizer, so a changed input gets a new store.

Building. A text is divided into parts (`text_plan.py`), and each part becomes a shard. On several cores, the shards of
one text are made side by side (`shard_workers.py`). A store is built in its draft, and the draft is renamed once all
files are on the disk. So a store is either complete or absent. If the system has locks, a second process waits for the
first and uses its store, and a build that was interrupted goes on from its finished shards. Without locks, it starts
over.

Opening. The index is read, and the sizes of all files are compared with it. A split with one file is verified at once,
and a damaged one is built again. Of a split with shards, each shard is verified when it is first read (`shards.py`). A
damaged shard is removed and named in an error; the next start builds that shard again.
"""

import json
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data import shard_workers
from moe_jax.data.corpora import Corpus, Part, open_corpus
from moe_jax.data.file_corpus import FileCorpus
from moe_jax.data.shards import ShardedArray, check_index, indexed
from moe_jax.data.store_draft import Draft, Entry, to_disk
from moe_jax.data.streams import Stream, token_type
from moe_jax.data.text_files import SplitName
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from moe_jax.system.console import Report, byte_progress
from moe_jax.system.files import cache_dir, disk_cause, locked
from moe_jax.system.json_text import json_text
from moe_jax.system.limits import usable_cores

FORMAT = 1  # part of every KEY; raise it when a change of the code gives other files for the same text and tokenizer
_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")


@dataclass(frozen=True)
class Split:
    """One stream of tokens."""

    tokens: ShardedArray
    """uint16 or uint32 [N], memory-mapped, read-only."""
    documents: int
    bytes: int
    """UTF-8 bytes of the stripped documents."""
    digest: str
    """xxh3-128 of the tokens as one file."""
    answers: ShardedArray | None = None
    """bool [N], memory-mapped: the tokens that are learned and scored. None if all of them are."""
    answer_tokens: int = 0
    answer_bytes: int = 0
    """UTF-8 bytes of the tokens in `answers`."""

    @property
    def stream(self) -> Stream:
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
    """Digest of text, tokenizer and both streams. Equal digests mean equal training data. Neither paths are included,
    nor how the streams are divided into shards."""

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
    the network is needed and missing, or if the cache cannot be written. A build of several shards that is interrupted
    goes on from its finished shards at the next call.
    """
    cache = cache or cache_dir()
    corpus = open_corpus(data, cache)
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
    """The store in a folder. Raises UserError if it is missing, damaged or of another format.

    Damage within a shard is found later, when the shard is first read (`ShardedArray`).
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if (manifest["format"], manifest["tokenizer"]) != (FORMAT, tokenizer.digest):
            raise UserError(f"{folder}: made by another version, or its tokenizer was changed; prepare the data again")
        train, valid = (_open_split(folder, name, manifest["splits"][name], tokenizer) for name in _SPLITS)
        return TokenStore(
            train, valid, tokenizer, folder, manifest["source"], manifest["fingerprint"], _data_digest(manifest)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole token store ({type(error).__name__}); prepare the data again") from None


def _open_split(folder: Path, name: SplitName, entry: Entry, tokenizer: Tokenizer) -> Split:
    tokens, answers, found = indexed(folder, name, entry, token_type(tokenizer)), None, {"tokens": 0, "bytes": 0}
    if "answers" in entry:
        found, answers = entry["answers"], indexed(folder, name, entry, np.dtype(np.bool_), mask=True)
    for array in (tokens, answers):
        if array is not None and len(array.shards) == 1:
            array.verify(0)
    return Split(tokens, entry["stories"], entry["bytes"], entry["digest"], answers, found["tokens"], found["bytes"])


def _data_digest(manifest: dict[str, Any]) -> str:
    """`TokenStore.digest`. Saved runs hold it."""
    whole = {
        name: {key: value for key, value in entry.items() if key != "shards"}
        for name, entry in manifest["splits"].items()
    }
    return _digest({key: value for key, value in manifest.items() if key != "source"} | {"splits": whole})


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
        text = _CheckedText(corpus)
        tokenizer = train_tokenizer(data, text, progress)
        text.check()
        folder.mkdir(exist_ok=True)
        tokenizer.save(path)
        return tokenizer


class _CheckedText:
    """The documents of a corpus from its parts, for a reader that stops before the end (`corpora.Documents`)."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._reading: Iterator[Any] = iter(())

    def documents(self, split: SplitName) -> Iterator[Any]:
        for part in self._corpus.parts(split):
            self._reading = part.documents()
            for document in self._reading:  # noqa: UP028, `yield from` would close the part when the reader stops
                yield document

    def size(self, split: SplitName) -> int | None:
        return self._corpus.size(split)

    def check(self) -> None:
        """Raise UserError if the text that was read is not the text of the fingerprint. Reads to the end of a part."""
        deque(self._reading, maxlen=0)


def _open_or_build(corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, cache: Path, progress: bool) -> TokenStore:
    key = _digest([FORMAT, fingerprint, tokenizer.digest])
    folder = cache / key
    if folder.exists():  # before the lock is asked for: a whole cache may lie in a folder that cannot be written
        with suppress(UserError):
            return open_store(folder)
    with locked(cache / f"{key}.lock", wait=True) as lock:
        # Without a lock, another process may be building too: each has a draft of its own, for one build.
        draft = Draft(cache / (f"{key}.partial" if lock is not None else f"{key}.{secrets.token_hex(8)}.partial"))
        if folder.exists():
            try:
                return open_store(folder)
            except UserError:
                shutil.rmtree(draft.folder, ignore_errors=True)
                folder.rename(draft.folder)
                if not _take_entries(draft):
                    shutil.rmtree(draft.folder)
        else:
            _take_entries(draft)  # a build that was killed just before its rename has left an index
        draft.folder.mkdir(exist_ok=True)
        draft.clean()
        try:
            _build(draft, corpus, fingerprint, tokenizer, progress)
            try:
                draft.folder.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # There is no lock, and another process has built the same store first. Use that store.
        except UserError as error:
            if not isinstance(error, shard_workers.WorkerEnded):  # the text must be mended first
                shutil.rmtree(draft.folder)
            raise
        finally:
            if lock is None or not draft.holds_shards:
                shutil.rmtree(draft.folder, ignore_errors=True)
            else:
                draft.clean()
        return open_store(folder)


def _take_entries(draft: Draft) -> bool:
    """Record the shards of a draft's index as finished, and remove the index. False if there is none, or if it is not
    credible."""
    index = draft.folder / "manifest.json"
    try:
        splits = json.loads(index.read_bytes())["splits"]
        for name in _SPLITS:
            check_index(draft.folder, name, splits[name])
        for name in _SPLITS:
            for number, entry in enumerate(splits[name].get("shards", [])):
                draft.finish(name, number, entry)
        index.unlink()
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _build(draft: Draft, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, progress: bool) -> None:
    tokenizer.save(draft.folder / "tokenizer.json")
    splits = {}
    for name in _SPLITS:
        with byte_progress(f"tokenizing {name}", "documents", corpus.size(name), progress) as report:
            splits[name] = _build_split(draft, corpus, name, tokenizer, report)
    manifest = {
        "format": FORMAT,
        "source": corpus.name,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.digest,
        "dtype": token_type(tokenizer).name,
        "splits": splits,
    }
    with (draft.folder / "manifest.json").open("wb") as file:
        file.write(json_text(manifest, indent=2).encode())
        to_disk(file)
    draft.remove_entries()


def _build_split(draft: Draft, corpus: Corpus, name: SplitName, tokenizer: Tokenizer, report: Report) -> Entry:
    """Make the shards of a split: in this process, or side by side in others if there are several to make."""
    added = _Tally(report).add
    made: dict[int, Future[Entry]] = {}
    with ExitStack() as stack:
        if isinstance(corpus, FileCorpus):  # other processes can read its parts too
            parts = enumerate(corpus.parts(name))
            todo = [(i, part) for i, part in parts if draft.finished(name, i, part.key) is None]
            count = min(len(todo), usable_cores())
            if count > 1:
                workers = stack.enter_context(shard_workers.shard_workers(draft, count, added))
                made = {i: workers.submit(name, i, part) for i, part in todo}

        def make(number: int, part: Part) -> Entry:
            if number in made:
                return made[number].result()
            return draft.write(name, number, part, tokenizer, added)

        entry = draft.split_entry(name, corpus.parts(name), make, added)
    if not entry["stories"]:
        next(corpus.documents(name))  # raises UserError: there is no text in it
    return entry


class _Tally:
    """The sum of what several threads have added, for a progress bar."""

    def __init__(self, report: Report) -> None:
        self._report, self._lock = report, Lock()
        self._documents = self._bytes = 0

    def add(self, documents: int, size: int) -> None:
        with self._lock:
            self._documents, self._bytes = self._documents + documents, self._bytes + size
            self._report(self._documents, self._bytes)
