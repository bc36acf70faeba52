"""The text as token ids: two memory-mapped files, built once for a pair of corpus and tokenizer.

    CACHE/KEY/train.bin, valid.bin    separator, story, separator, story, ..., separator; little-endian,
                                      uint16 where the vocabulary has at most 65,536 entries, else uint32
    CACHE/KEY/tokenizer.json
    CACHE/KEY/manifest.json           source, digests of text and tokenizer, counts, digest of each file
    CACHE/tokenizers/KEY.json         trained tokenizers, so that an interrupted build does not train again

CACHE is the environment variable MOE_JAX_CACHE, else the user's cache folder. KEY is a digest of what goes
in, the text and the tokenizer, so a changed input is another store.

A store is built in a folder beside it, of a name used once, and renamed when everything is on the disk: so a
store is whole or absent, whatever interrupts a build and however many build at once. Where the system has
`flock`, a lock per KEY also makes a second build wait for the first and use its store, and lets a build
remove what a killed one left. Opening a store reads it once and compares the digests: a damaged one is built
again.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np
import platformdirs
import xxhash

from moe_jax.config import DataConfig, UserError
from moe_jax.data.corpora import Corpus, SplitName, open_corpus
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # part of every KEY: raise it where the same text and tokenizer would give other files
_BATCH_BYTES = 1 << 20  # text encoded at a time
_READ_BYTES = 1 << 22
_PLAIN_SECONDS = 10  # between lines of progress where there is no terminal
_SPLITS: tuple[SplitName, SplitName] = ("train", "valid")

Report = Callable[[int, int], None]
"""Called with the stories and the bytes done so far."""


@dataclass(frozen=True)
class Split:
    """One stream of tokens."""

    tokens: np.ndarray
    """uint16 or uint32 [N], memory-mapped, read-only."""
    stories: int
    bytes: int
    """UTF-8 bytes of the stripped stories."""
    digest: str
    """xxh3-128 of the file."""


@dataclass(frozen=True)
class TokenStore:
    """A corpus in tokens."""

    train: Split
    valid: Split
    tokenizer: Tokenizer
    folder: Path
    source: str
    """The `--data` that it was built from."""
    fingerprint: str
    """Digest of the text (`Corpus.fingerprint`)."""
    digest: str
    """Of text, tokenizer and both streams: equal digests mean equal training data, wherever it lies."""


def prepare(
    data: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    cache: Path | None = None,
    progress: bool = True,
    seq_len: int | None = None,
) -> TokenStore:
    """The token store of `data`: opened where there is one, else built. A given tokenizer is used as it is,
    in place of the one that `data` names. With `seq_len`, the streams must hold a training window and a
    predicted token.

    Raises ConfigError where the source does not exist; UserError where the text is empty, too short or not
    UTF-8, the network is needed and missing, or the cache cannot be written.
    """
    cache = cache or default_cache()
    corpus = open_corpus(data)
    fingerprint = corpus.fingerprint()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if tokenizer is None:
            tokenizer = _cached_tokenizer(data, corpus, fingerprint, cache)
        store = _open_or_build(corpus, fingerprint, tokenizer, cache, progress)
    except OSError as error:
        full = error.errno in (ENOSPC, EDQUOT)
        cause = "the disk is full; free space there" if full else f"cannot be written ({error.strerror}); mend that"
        raise UserError(f"token cache {cache}: {cause}, or set MOE_JAX_CACHE to another folder") from None
    if seq_len is not None:
        _check_length(store, seq_len)
    return store


def default_cache() -> Path:
    """The folder of all token stores."""
    folder = os.environ.get("MOE_JAX_CACHE")
    return Path(folder) if folder else platformdirs.user_cache_path("moe-jax")


def open_store(folder: Path) -> TokenStore:
    """The store in a folder. Raises UserError where it is missing, damaged or of another format."""
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
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != counts["digest"]:
        raise UserError(f"{path}: damaged, its digest does not match; prepare the data again")
    tokens = np.memmap(path, dtype=_dtype(tokenizer), mode="r")
    return Split(tokens, counts["stories"], counts["bytes"], counts["digest"])


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _digest(values: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _check_length(store: TokenStore, seq_len: int) -> None:
    train, valid = len(store.train.tokens), len(store.valid.tokens)
    if train < seq_len + 1:
        raise UserError(
            f"--data {store.source}: {train} training tokens, and a context of --seq-len {seq_len} needs "
            f"{seq_len + 1}; give a longer text or a smaller --seq-len"
        )
    if valid < 2:
        raise UserError(f"--data {store.source}: {valid} validation tokens, 2 are needed; give a longer text")


def _cached_tokenizer(data: DataConfig, corpus: Corpus, fingerprint: str, cache: Path) -> Tokenizer:
    if data.tokenizer != "bpe":
        return train_tokenizer(data, corpus)
    folder = cache / "tokenizers"
    path = folder / f"{_digest([FORMAT, fingerprint, data.vocab_size])}.json"
    try:
        return load_tokenizer(path)
    except UserError:  # none yet, or a damaged one
        tokenizer = train_tokenizer(data, corpus)
        folder.mkdir(exist_ok=True)
        tokenizer.save(path)
        return tokenizer


def _open_or_build(corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, cache: Path, progress: bool) -> TokenStore:
    key = _digest([FORMAT, fingerprint, tokenizer.digest])
    folder = cache / key
    with _exclusive(cache / f"{key}.lock") as alone:
        if folder.exists():
            try:
                return open_store(folder)
            except UserError:
                shutil.rmtree(folder)
        if alone:
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
                # Without a lock, another process was faster: its store is as good.
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return open_store(folder)


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock, which ends with the process at the latest. Gives False where the system or the disk has
    none."""
    with path.open("ab") as file:
        locked = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError:  # some network file systems
                pass
        yield locked


def _build(folder: Path, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, progress: bool) -> None:
    splits = {}
    for name in _SPLITS:
        with _open_progress(progress, f"tokenizing {name}", corpus.size(name)) as report:
            splits[name] = _write_split(folder / f"{name}.bin", corpus.stories(name), tokenizer, report)
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
        file.write(json.dumps(manifest, indent=2).encode())
        _to_disk(file)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_split(path: Path, stories: Iterator[str], tokenizer: Tokenizer, report: Report) -> dict[str, Any]:
    """Encode the stories into a file, and give the split's part of the manifest."""
    dtype, separator = _dtype(tokenizer), tokenizer.separator_id
    digest = xxhash.xxh3_128()
    count = size = tokens = 0
    with path.open("wb") as file:
        ends = stream = np.array([separator], dtype)
        for batch, batch_bytes in _batches(stories):
            count, size = count + len(batch), size + batch_bytes
            ids = [part for story in tokenizer.encode_batch(batch) for part in (np.asarray(story, dtype), ends)]
            stream = np.concatenate([stream, *ids])
            file.write(stream.data)
            digest.update(stream.data)
            tokens += len(stream)
            stream = stream[:0]
            report(count, size)
        _to_disk(file)
    return {"tokens": tokens, "stories": count, "bytes": size, "digest": digest.hexdigest()}


def _batches(stories: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """(stories, their bytes), about 1 MiB at a time."""
    batch, size = [], 0
    for story in stories:
        batch.append(story)
        size += len(story.encode())
        if size >= _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def token_stream(stories: Iterator[str], tokenizer: Tokenizer) -> np.ndarray:
    """`separator, story, separator, ..., separator` of a text that is scored once and not kept."""
    ends = np.array([tokenizer.separator_id], _dtype(tokenizer))
    parts = [ends]
    for batch, _ in _batches(stories):
        parts += [part for ids in tokenizer.encode_batch(batch) for part in (np.asarray(ids, ends.dtype), ends)]
    return np.concatenate(parts)


# Progress


@contextmanager
def _open_progress(wanted: bool, what: str, total: int | None) -> Iterator[Report]:
    """A bar on a terminal, a line now and then elsewhere, on stderr; nothing unless `wanted`."""
    if not wanted:
        yield lambda stories, size: None
    elif sys.stderr.isatty():
        with _bar(what, total) as report:
            yield report
    else:
        with _lines(what, total) as report:
            yield report


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Report]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
    )
    begin = monotonic()
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, rate="")

        def report(stories: int, size: int) -> None:
            rate = stories / (monotonic() - begin + 1e-9)
            bar.update(task, completed=size, rate=f"{stories:,} stories, {rate:,.0f}/s")

        yield report


@contextmanager
def _lines(what: str, total: int | None) -> Iterator[Report]:
    begin = printed = monotonic()
    done = (0, 0)

    def line() -> str:
        stories, size = done
        seconds = monotonic() - begin + 1e-9
        share = f" of {total / 1e6:.1f}" if total else ""
        rates = f"{stories / seconds:,.0f} stories/s, {size / seconds / 1e6:.1f} MB/s"
        return f"{what}: {stories:,} stories, {size / 1e6:.1f}{share} MB ({rates})"

    def report(stories: int, size: int) -> None:
        nonlocal done, printed
        done = (stories, size)
        if monotonic() - printed >= _PLAIN_SECONDS:
            printed = monotonic()
            print(line(), file=sys.stderr, flush=True)

    yield report
    print(line(), file=sys.stderr, flush=True)
